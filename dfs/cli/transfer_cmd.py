"""`dfs put` and `dfs get`."""

import os
from pathlib import Path

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
from dfs.cli.place import PLACE, Place, is_place
from dfs.errors import InvalidArgument

_RECURSIVE = click.option("-r", "--recursive", is_flag=True, help="Copy directories, too.")
_FORCE = click.option("-f", "--force", is_flag=True, help="Replace files that exist.")


@click.command()
@cluster_option
@json_option
@_RECURSIVE
@_FORCE
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("target", type=PLACE)
def put(
    cluster_path: str | None,
    as_json: bool,
    recursive: bool,
    force: bool,
    sources: tuple[str, ...],
    target: Place,
) -> None:
    """Copy local files to TARGET in a volume, or into it if it is a directory.

    SOURCE `-` is standard input. Chunks that the cluster has already are not sent again. When the
    command returns, everything is on stable storage. What cannot be read here is named, and makes
    the exit status 1; the rest is copied all the same.

    \b
    Examples:
      dfs put report.pdf photos:/docs/
      dfs put -r ~/Pictures photos:/
      tar c src | dfs put - photos:/src.tar
      dfs put -- -odd-name photos:/
    """
    from dfs.cli.client import volume
    from dfs.cli.upload import Upload

    for source in sources:
        if is_place(source) and not Path(source).exists():
            raise click.UsageError(f"{source} is in a volume: dfs put copies local files")
    if "-" in sources and len(sources) > 1:
        raise click.UsageError("standard input can only be copied alone")
    if sources != ("-",):  # what is wrong here should not be found out only over there
        for source in sources:
            if Path(source).is_dir() and not recursive:
                raise InvalidArgument(f"{source} is a directory: use -r")
            os.lstat(source)
    file = cluster_file(cluster_path)

    async def work() -> Upload:
        async with volume(file, target.volume, adds=True) as (fs, chunks):
            upload = Upload(fs, chunks, recursive=recursive, force=force)
            await upload.run([os.fsencode(source) for source in sources], target)
        return upload

    upload = run_async(work)
    if as_json:
        echo_json({"files": upload.files, "bytes": upload.size, "bytes_known": upload.known_bytes})
    else:
        known = f", {human_size(upload.known_bytes)} of it were there already"
        click.echo(
            f"put {count(upload.files, 'file')}, {human_size(upload.size)}"
            f"{known if upload.known_bytes else ''}"
        )
    if upload.failed:
        raise ExceptionGroup("put", upload.failed)


@click.command()
@cluster_option
@json_option
@_RECURSIVE
@_FORCE
@click.argument("sources", type=PLACE, nargs=-1, required=True, metavar="VOLUME:/PATH...")
@click.argument("target", metavar="TARGET")
def get(
    cluster_path: str | None,
    as_json: bool,
    recursive: bool,
    force: bool,
    sources: tuple[Place, ...],
    target: str,
) -> None:
    """Copy files out of a volume to the local TARGET, or into it if it is a directory.

    TARGET `-` is standard output. Every byte is checked against the hash that names it.

    \b
    Examples:
      dfs get photos:/docs/report.pdf .
      dfs get -r photos:/Pictures /tmp/
      dfs get photos:/src.tar - | tar t
    """
    from dfs.cli.client import volume
    from dfs.cli.download import Download

    volumes = {source.volume for source in sources}
    if len(volumes) > 1:
        raise click.UsageError("dfs get copies from one volume at a time")
    if is_place(target) and not Path(target).parent.exists():
        raise click.UsageError(f"{target} is in a volume: dfs get copies to local files")
    if target == "-" and (recursive or len(sources) > 1):
        raise click.UsageError("only one file can be written to standard output")
    file = cluster_file(cluster_path)

    async def work() -> Download:
        async with volume(file, sources[0].volume, mode="ro") as (fs, _):
            download = Download(fs, recursive=recursive, force=force)
            await download.run(list(sources), os.fsencode(target))
        return download

    download = run_async(work)
    if target == "-":
        return
    if as_json:
        echo_json({"files": download.files, "bytes": download.size})
    else:
        click.echo(f"got {count(download.files, 'file')}, {human_size(download.size)}")
