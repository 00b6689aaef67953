"""`dfs volume`: the volumes of a cluster."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dfs.cli.context import (
    cluster_file,
    cluster_option,
    count,
    echo_json,
    human_size,
    json_option,
)
from dfs.cli.context import run as run_async
from dfs.cli.sizes import limit_of_bytes, limit_of_files
from dfs.cli.times import local_time

if TYPE_CHECKING:
    from dfs.cli.client import Usage
    from dfs.client.registry import VolumeInfo

F = TypeVar("F", bound=Callable[..., Any])


def quota_options(command: F) -> F:
    """Add `--quota-bytes` and `--quota-files`, the limits of a volume, to a command."""
    size = click.option(
        "--quota-bytes",
        type=limit_of_bytes,
        metavar="SIZE",
        help="What the sizes of all files may add up to, such as 10GiB; none: no limit.",
    )
    files = click.option(
        "--quota-files",
        type=limit_of_files,
        metavar="N",
        help="How many files, directories and links there may be, the root among them.",
    )
    return size(files(command))


@click.group()
def volume() -> None:
    """Create, list and delete volumes: file systems that are independent of each other."""


@volume.command()
@cluster_option
@json_option
@click.option("--no-compress", is_flag=True, help="Store chunks as they are.")
@quota_options
@click.argument("name")
def create(
    cluster_path: str | None,
    as_json: bool,
    no_compress: bool,
    quota_bytes: int | None,
    quota_files: int | None,
    name: str,
) -> None:
    """Create the volume NAME: up to 63 letters, digits, dots, dashes and underscores.

    \b
    Example:
      dfs volume create photos
      dfs volume create --quota-bytes 10GiB --quota-files 100000 scratch
    """
    from dfs.cli.client import connected, registry
    from dfs.client.registry import check_name

    check_name(name)
    params: dict[str, Any] = {"compress": False} if no_compress else {}
    if quota_bytes:
        params["quota_bytes"] = quota_bytes
    if quota_files:
        params["quota_inodes"] = quota_files

    async def work() -> "VolumeInfo":
        async with (
            connected(cluster_file(cluster_path)) as cluster,
            registry(cluster) as volumes,
        ):
            return await volumes.create(name, params)

    info = run_async(work)
    if as_json:
        echo_json(_as_dict(info))
    else:
        click.echo(f"created volume {name}, {info.params['n']} copies")


@volume.command("list")
@cluster_option
@json_option
def list_(cluster_path: str | None, as_json: bool) -> None:
    """List the volumes with their contents and quotas.

    Sizes are what files hold, once: copies and compression are not in them.
    """
    from dfs.cli.client import connected, registry, usages

    async def work() -> "list[tuple[VolumeInfo, Usage | None]]":
        async with connected(cluster_file(cluster_path)) as cluster:
            async with registry(cluster, mode="ro") as volumes:
                found = await volumes.list()
            used = await usages(cluster, [v.volume_id for v in found if v.state == "created"])
            return [(v, used.get(v.volume_id)) for v in found]

    found = run_async(work)
    if as_json:
        echo_json([{**_as_dict(entry), **usage_as_dict(used)} for entry, used in found])
        return
    if not found:
        click.echo("there are no volumes: `dfs volume create NAME` makes one", err=True)
        return
    click.echo("\n".join(_table(found)))


@volume.command()
@cluster_option
@json_option
@click.argument("name")
def info(cluster_path: str | None, as_json: bool, name: str) -> None:
    """Show what is known about the volume NAME."""
    from dfs.cli.client import registry
    from dfs.cli.client import volume as open_volume
    from dfs.client.quota import read_limits

    async def work() -> dict[str, Any]:
        file = cluster_file(cluster_path)
        async with open_volume(file, name, mode="ro") as (fs, _):
            stats = await fs.statfs()
            limits = await read_limits(fs.session)
            cluster = fs.session.cluster
            async with registry(cluster, mode="ro") as volumes:
                found = _as_dict(await volumes.find(name))
            found.update(
                bytes=stats.used,
                inodes=stats.inodes,
                quota_bytes=limits[0] or None,
                quota_files=limits[1] or None,
                seq=fs.session.view.seq,
                checkpoint=fs.session.view.root_seq,
                homes=[
                    cluster.get_map().node(n).name
                    for n in cluster.get_map().volume_homes(bytes.fromhex(found["id"]))
                ],
            )
            return found

    found = run_async(work)
    if as_json:
        echo_json(found)
        return
    click.echo(f"volume {name} ({found['id']}), {found['state']}")
    click.echo(f"  made        {local_time(found['params']['created'])}")
    click.echo(f"  class       {found['params']['class']}, {found['params']['n']} copies")
    click.echo(f"  contents    {human_size(found['bytes'])}, {count(found['inodes'], 'inode')}")
    click.echo(f"  quota       {_quota_line(found['quota_bytes'], found['quota_files'])}")
    click.echo(f"  commits     {found['seq']}, checkpoint at {found['checkpoint']}")
    click.echo(f"  homes       {', '.join(found['homes'])}")


@volume.command("set")
@cluster_option
@json_option
@quota_options
@click.argument("name")
def set_(
    cluster_path: str | None,
    as_json: bool,
    quota_bytes: int | None,
    quota_files: int | None,
    name: str,
) -> None:
    """Change limits of the volume NAME; mounts hear of it within a second.

    A limit below what is used refuses everything that would add to it, and nothing else.

    \b
    Example:
      dfs volume set --quota-bytes 20GiB --quota-files none scratch
    """
    from dfs.cli.client import volume as open_volume
    from dfs.client.quota import set_limits

    if quota_bytes is None and quota_files is None:
        raise click.UsageError("nothing to set: give --quota-bytes or --quota-files")

    async def work() -> tuple[int, int]:
        async with open_volume(cluster_file(cluster_path), name) as (fs, _):
            return await set_limits(fs.session, quota_bytes, quota_files)

    size, files = run_async(work)
    if as_json:
        echo_json({"name": name, "quota_bytes": size or None, "quota_files": files or None})
    else:
        click.echo(f"volume {name}: quota {_quota_line(size, files)}")


@volume.command()
@cluster_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("name")
def delete(cluster_path: str | None, yes: bool, name: str) -> None:
    """Delete the volume NAME with everything in it."""
    from dfs.cli.client import connected, registry
    from dfs.client.registry import check_name

    check_name(name)
    file = cluster_file(cluster_path)

    async def find() -> None:
        async with connected(file) as cluster, registry(cluster, mode="ro") as volumes:
            await volumes.find(name)

    async def work() -> None:
        async with connected(file) as cluster, registry(cluster) as volumes:
            await volumes.delete(name)

    if not yes:
        run_async(find)
        if not _confirmed(f"Delete volume {name} and everything in it?"):
            raise click.ClickException(f"volume {name} is kept: --yes deletes it unasked")
    run_async(work)
    click.echo(f"deleted volume {name}")


def _confirmed(question: str) -> bool:
    """Whether people say yes; they do not where nobody is there to answer."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        return False


def _quota_line(size: int | None, files: int | None) -> str:
    limits = [human_size(size)] if size else []
    limits += [count(files, "inode")] if files else []
    return ", ".join(limits) or "none"


def _table(found: "list[tuple[VolumeInfo, Usage | None]]") -> list[str]:
    """Lines for people: `?` is what is not known now, `-` no limit."""
    width = max(len("name"), *(len(entry.name) for entry, _ in found))
    head = f"{'size':>10} {'quota':>10} {'inodes':>8} {'quota':>8}"
    lines = [f"{'name':{width}} copies {head}  made"]
    for entry, used in found:
        numbers = ["?"] * 4
        if used is not None:
            numbers = [
                human_size(used.bytes),
                human_size(used.quota_bytes) if used.quota_bytes else "-",
                str(used.inodes),
                str(used.quota_inodes or "-"),
            ]
        size, quota, inodes, files = numbers
        state = "" if entry.state == "created" else f"  ({entry.state})"
        lines.append(
            f"{entry.name:{width}} {entry.params['n']:6} {size:>10} {quota:>10} {inodes:>8}"
            f" {files:>8}  {local_time(entry.params['created'])}{state}"
        )
    return lines


def usage_as_dict(used: "Usage | None") -> dict[str, int | None]:
    """What a volume holds, null if that is not known, and its limits, null where there is none."""
    if used is None:
        return dict.fromkeys(("bytes", "inodes", "quota_bytes", "quota_files"))
    return {
        "bytes": used.bytes,
        "inodes": used.inodes,
        "quota_bytes": used.quota_bytes or None,
        "quota_files": used.quota_inodes or None,
    }


def _as_dict(info: "VolumeInfo") -> dict[str, Any]:
    return {
        "name": info.name,
        "id": info.volume_id.hex(),
        "state": info.state,
        # The quota of its making may have been changed since.
        "params": {k: v for k, v in info.params.items() if not k.startswith("quota_")},
    }
