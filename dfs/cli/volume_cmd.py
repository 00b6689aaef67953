"""`dfs volume`: the volumes of a cluster."""

from typing import TYPE_CHECKING, Any

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
from dfs.cli.times import local_time

if TYPE_CHECKING:
    from dfs.client.registry import VolumeInfo


@click.group()
def volume() -> None:
    """Create, list and delete volumes: file systems that are independent of each other."""


@volume.command()
@cluster_option
@json_option
@click.option("--no-compress", is_flag=True, help="Store chunks as they are.")
@click.argument("name")
def create(cluster_path: str | None, as_json: bool, no_compress: bool, name: str) -> None:
    """Create the volume NAME: up to 63 letters, digits, dots, dashes and underscores.

    \b
    Example:
      dfs volume create photos
    """
    from dfs.cli.client import connected, registry
    from dfs.client.registry import check_name

    check_name(name)

    async def work() -> "VolumeInfo":
        async with (
            connected(cluster_file(cluster_path)) as cluster,
            registry(cluster) as volumes,
        ):
            return await volumes.create(name, {"compress": False} if no_compress else {})

    info = run_async(work)
    if as_json:
        echo_json(_as_dict(info))
    else:
        click.echo(f"created volume {name}, {info.params['n']} copies")


@volume.command("list")
@cluster_option
@json_option
def list_(cluster_path: str | None, as_json: bool) -> None:
    """List the volumes with their contents.

    Sizes are what files hold, once: copies and compression are not in them.
    """
    from dfs.cli.client import connected, registry, usages

    async def work() -> "list[tuple[VolumeInfo, tuple[int, int] | None]]":
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
    width = max(len("name"), *(len(entry.name) for entry, _ in found))
    click.echo(f"{'name':{width}}  copies        size   inodes  made")
    for entry, used in found:
        size, inodes = ("?", "?") if used is None else (human_size(used[0]), str(used[1]))
        state = "" if entry.state == "created" else f"  ({entry.state})"
        click.echo(
            f"{entry.name:{width}}  {entry.params['n']:6}  {size:>10}  {inodes:>7}  "
            f"{local_time(entry.params['created'])}{state}"
        )


@volume.command()
@cluster_option
@json_option
@click.argument("name")
def info(cluster_path: str | None, as_json: bool, name: str) -> None:
    """Show what is known about the volume NAME."""
    from dfs.cli.client import registry
    from dfs.cli.client import volume as open_volume

    async def work() -> dict[str, Any]:
        file = cluster_file(cluster_path)
        async with open_volume(file, name, mode="ro") as (fs, _):
            stats = await fs.statfs()
            cluster = fs.session.cluster
            async with registry(cluster, mode="ro") as volumes:
                found = _as_dict(await volumes.find(name))
            found.update(
                bytes=stats.used,
                inodes=stats.inodes,
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
    click.echo(f"  commits     {found['seq']}, checkpoint at {found['checkpoint']}")
    click.echo(f"  homes       {', '.join(found['homes'])}")


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
    if not yes:
        click.confirm(f"Delete volume {name} and everything in it?", abort=True)

    async def work() -> None:
        async with connected(file) as cluster, registry(cluster) as volumes:
            await volumes.delete(name)

    run_async(work)
    click.echo(f"deleted volume {name}")


def usage_as_dict(used: tuple[int, int] | None) -> dict[str, int | None]:
    """`bytes` and `inodes` of a volume, null where they are not known."""
    size, inodes = used or (None, None)
    return {"bytes": size, "inodes": inodes}


def _as_dict(info: "VolumeInfo") -> dict[str, Any]:
    return {
        "name": info.name,
        "id": info.volume_id.hex(),
        "state": info.state,
        "params": dict(info.params),
    }
