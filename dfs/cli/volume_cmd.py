"""`dfs volume`: the volumes of a cluster."""

from typing import TYPE_CHECKING, Any

import click

from dfs.cli.context import cluster_file, cluster_option, echo_json, human_size, json_option
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
    """Create the volume NAME."""
    from dfs.cli.client import connected
    from dfs.client.registry import create_volume

    async def work() -> "VolumeInfo":
        async with connected(cluster_file(cluster_path)) as cluster:
            return await create_volume(cluster, name, {"compress": False} if no_compress else {})

    info = run_async(work)
    if as_json:
        echo_json(_as_dict(info))
    else:
        click.echo(f"created volume {name}, {info.params['n']} copies")


@volume.command("list")
@cluster_option
@json_option
def list_(cluster_path: str | None, as_json: bool) -> None:
    """List the volumes."""
    from dfs.cli.client import connected
    from dfs.client.registry import list_volumes

    async def work() -> "list[VolumeInfo]":
        async with connected(cluster_file(cluster_path)) as cluster:
            return await list_volumes(cluster)

    found = run_async(work)
    if as_json:
        echo_json([_as_dict(info) for info in found])
        return
    for info in found:
        state = "" if info.state == "created" else f"  ({info.state})"
        made = local_time(info.params["created"])
        click.echo(f"{info.name:30}  {info.params['n']} copies  {made}{state}")


@volume.command()
@cluster_option
@json_option
@click.argument("name")
def info(cluster_path: str | None, as_json: bool, name: str) -> None:
    """Show what is known about the volume NAME."""
    from dfs.cli.client import volume as open_volume
    from dfs.client.registry import open_volume_by_name

    async def work() -> dict[str, Any]:
        file = cluster_file(cluster_path)
        async with open_volume(file, name, mode="ro") as (fs, _):
            stats = await fs.statfs()
            cluster = fs.session.cluster
            found = _as_dict(await open_volume_by_name(cluster, name))
            found.update(
                bytes=stats.used,
                inodes=stats.inodes - stats.free_inodes,
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
    click.echo(f"  contents    {human_size(found['bytes'])} in {found['inodes']} inodes")
    click.echo(f"  commits     {found['seq']}, checkpoint at {found['checkpoint']}")
    click.echo(f"  homes       {', '.join(found['homes'])}")


@volume.command()
@cluster_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("name")
def delete(cluster_path: str | None, yes: bool, name: str) -> None:
    """Delete the volume NAME with everything in it."""
    from dfs.cli.client import connected
    from dfs.client.registry import delete_volume

    file = cluster_file(cluster_path)
    if not yes:
        click.confirm(f"Delete volume {name} and everything in it?", abort=True)

    async def work() -> None:
        async with connected(file) as cluster:
            await delete_volume(cluster, name)

    run_async(work)
    click.echo(f"deleted volume {name}")


def _as_dict(info: "VolumeInfo") -> dict[str, Any]:
    return {
        "name": info.name,
        "id": info.volume_id.hex(),
        "state": info.state,
        "params": dict(info.params),
    }
