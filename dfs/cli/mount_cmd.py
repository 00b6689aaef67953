"""`dfs mount` and `dfs umount`."""

import os
import sys
from pathlib import Path

import click

from dfs.cli.context import cluster_file, cluster_option
from dfs.cli.context import run as run_async


@click.command()
@cluster_option
@click.option("--foreground", is_flag=True, help="Serve in this process until interrupted.")
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option(
    "--exclusive",
    is_flag=True,
    help="Be the only one that writes, and let the kernel keep writes back; for databases.",
)
@click.option("--xattrs", is_flag=True, help="Serve extended attributes; writes cost more.")
@click.option("--acls", is_flag=True, help="Enforce POSIX ACLs; includes --xattrs.")
@click.option("--relatime", is_flag=True, help="Keep access times, as seldom as relatime does.")
@click.option(
    "--pid-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="[default: run/mount-VOLUME.pid next to the cluster file]",
)
@click.argument("volume")
@click.argument("mountpoint", type=Path)  # click.Path looks at it, which may take long
def mount(
    cluster_path: str | None,
    foreground: bool,
    read_only: bool,
    exclusive: bool,
    xattrs: bool,
    acls: bool,
    relatime: bool,
    pid_file: Path | None,
    volume: str,
    mountpoint: Path,
) -> None:
    """Mount VOLUME on the empty directory MOUNTPOINT and return once it can be used.

    \b
    Example:
      mkdir -p /mnt/photos && dfs mount photos /mnt/photos
      dfs mount --exclusive pgdata /var/lib/postgresql

    An exclusive mount is refused while another one that writes lives, and others that would write
    while it lives; read-only ones are let in.
    """
    from dfs.cli.local import environment
    from dfs.cli.mounts import check_mount_point, forget_dead, start_mount

    if read_only and exclusive:
        raise click.UsageError("--read-only and --exclusive exclude each other")
    file = cluster_file(cluster_path)
    flags = {
        "--read-only": read_only,
        "--exclusive": exclusive,
        "--xattrs": xattrs,
        "--acls": acls,
        "--relatime": relatime,
    }
    options = [name for name, given in flags.items() if given]
    where = check_mount_point(mountpoint)
    run_async(_find, file, volume)
    if foreground:
        arguments = ["--cluster", str(file), "--volume", volume, "--foreground", *options]
        os.execve(  # noqa: S606 - our own interpreter and module
            sys.executable,
            [sys.executable, "-P", "-m", "fuse", *arguments, str(where)],
            environment("fuse"),
        )
    forget_dead(file)
    start_mount(file, volume, where, options, pid_file and pid_file.absolute())
    click.echo(f"{volume} is mounted on {mountpoint}")


async def _find(file: Path, volume: str) -> None:
    """Raise here what would keep the mount from being made: sooner, and said better."""
    from dfs.cli.client import connected, registry

    async with connected(file) as cluster, registry(cluster, mode="ro") as volumes:
        await volumes.find(volume)


@click.command()
@click.option("--lazy", is_flag=True, help="Detach now, even if files are open.")
@cluster_option
@click.argument("mountpoint", type=Path)  # click.Path looks at it, which may take long
def umount(cluster_path: str | None, lazy: bool, mountpoint: Path) -> None:
    """Unmount MOUNTPOINT; returns when everything written there is in the cluster.

    Also removes what is left of a mount whose process has ended. With --lazy it returns at once if
    files are open; what is written to them is committed until the last one is closed.
    """
    from dfs.cli.mounts import forget_dead, unmount
    from dfs.errors import ConfigError

    unmount(mountpoint, lazy=lazy)
    try:
        file = cluster_file(cluster_path)
    except ConfigError:
        return  # unmounting works without knowing the cluster; only its pid file stays behind
    forget_dead(file)
