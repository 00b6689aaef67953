"""Commands on files of a volume without a mount: ls, cat, stat, mkdir, mv, rm, du."""

import os
import stat as stat_bits
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dfs.cli.context import (
    cluster_file,
    cluster_option,
    echo_json,
    human_size,
    json_option,
    printable,
    standard_stream,
    writing_stdout,
)
from dfs.cli.context import run as run_async
from dfs.cli.place import PLACE, Place
from dfs.cli.times import local_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dfs.client.attributes import Attr
    from dfs.client.filesystem import FileSystem

T = TypeVar("T")


def _on_volume(
    cluster_path: str | None,
    name: str,
    fn: "Callable[[FileSystem], Awaitable[T]]",
    *,
    mode: str = "ro",
    adds: bool = False,
) -> T:
    """Run `fn(file system)` on a volume; see `dfs.cli.client.volume`."""
    from dfs.cli.client import volume

    file = cluster_file(cluster_path)

    async def work() -> T:
        async with volume(file, name, mode=mode, adds=adds) as (fs, _):
            return await fn(fs)

    return run_async(work)


@click.command()
@cluster_option
@json_option
@click.option("-l", "long", is_flag=True, help="Show mode, links, owner, size and time.")
@click.option("-d", "--directory", is_flag=True, help="Show the directory itself.")
@click.argument("place", type=PLACE)
def ls(cluster_path: str | None, as_json: bool, long: bool, directory: bool, place: Place) -> None:
    """List a directory, or show a file, of a volume.

    \b
    Example:
      dfs ls -l photos:/docs
    """
    from dfs.cli.client import found, naming
    from dfs.client.paths import list_directory

    async def work(fs: "FileSystem") -> "list[tuple[bytes, Attr]]":
        with naming(place):
            attr = await found(fs, place, follow=not directory)
            if directory or not attr.is_dir:
                return [(place.name or b"/", attr)]
            return sorted([entry async for entry in list_directory(fs, attr.ino)])

    entries = _on_volume(cluster_path, place.volume, work)
    if as_json:
        echo_json([{"name": os.fsdecode(name), **_as_dict(attr)} for name, attr in entries])
        return
    width = max((len(str(attr.size)) for _, attr in entries), default=0)
    for name, attr in entries:
        if long:
            click.echo(
                f"{stat_bits.filemode(attr.st_mode)} {attr.nlink:3} {attr.uid:5} {attr.gid:5} "
                f"{attr.size:{width}} {local_time(attr.mtime)} ",
                nl=False,
            )
        click.echo(printable(os.fsdecode(name)) if sys.stdout.isatty() else name)


@click.command()
@cluster_option
@click.argument("places", type=PLACE, nargs=-1, required=True)
def cat(cluster_path: str | None, places: tuple[Place, ...]) -> None:
    """Write files of a volume to standard output, one after the other."""
    from dfs.cli.client import found, naming
    from dfs.client.paths import get_file

    out = standard_stream("stdout")

    async def work(fs: "FileSystem") -> None:
        with naming(place), writing_stdout():
            await found(fs, place)
            await get_file(fs, place.path, out)
            out.flush()

    for place in places:
        _on_volume(cluster_path, place.volume, work)


@click.command()
@cluster_option
@json_option
@click.argument("place", type=PLACE)
def stat(cluster_path: str | None, as_json: bool, place: Place) -> None:
    """Show what is known about a file of a volume."""
    from dfs.cli.client import found, naming

    async def work(fs: "FileSystem") -> "tuple[Attr, bytes]":
        with naming(place):
            attr = await found(fs, place, follow=False)
            return attr, await fs.readlink(attr.ino) if attr.is_symlink else b""

    attr, target = _on_volume(cluster_path, place.volume, work)
    if as_json:
        extra = {"target": os.fsdecode(target)} if attr.is_symlink else {}
        echo_json({"path": place.text, **_as_dict(attr), **extra})
        return
    arrow = f" -> {os.fsdecode(target)}" if attr.is_symlink else ""
    click.echo(f"{place}{arrow}")
    click.echo(
        f"  {stat_bits.filemode(attr.st_mode)} ({attr.mode:04o})  "
        f"owner {attr.uid}:{attr.gid}  links {attr.nlink}  inode {attr.ino}"
    )
    click.echo(f"  size     {attr.size} ({human_size(attr.size)})")
    for name in ("atime", "mtime", "ctime", "btime"):
        click.echo(f"  {name}    {local_time(getattr(attr, name))}")


@click.command()
@cluster_option
@click.option("-p", "--parents", is_flag=True, help="Make what is missing above, too.")
@click.argument("places", type=PLACE, nargs=-1, required=True)
def mkdir(cluster_path: str | None, parents: bool, places: tuple[Place, ...]) -> None:
    """Make directories in a volume."""
    from dfs.cli.client import naming
    from dfs.client.paths import make_directories, resolve_parent
    from dfs.errors import AlreadyExists

    async def work(fs: "FileSystem") -> None:
        with naming(place):
            if parents:
                await make_directories(fs, place.path)
            else:
                if place.path == b"/":
                    raise AlreadyExists(f"{place} is the root of the volume: it is always there")
                parent, name = await resolve_parent(fs, place.path)
                await fs.mkdir(parent, name, 0o755)

    for place in places:
        _on_volume(cluster_path, place.volume, work, mode="rw", adds=True)


@click.command()
@cluster_option
@click.argument("source", type=PLACE)
@click.argument("target", type=PLACE)
def mv(cluster_path: str | None, source: Place, target: Place) -> None:
    """Rename SOURCE to TARGET, or into TARGET if that is a directory."""
    from dfs.cli.client import found, naming
    from dfs.client.paths import resolve, resolve_parent
    from dfs.errors import FsError, InvalidArgument

    if source.volume != target.volume:
        raise click.UsageError("mv works within one volume: between two, use dfs get and dfs put")

    if source.path == b"/":
        raise InvalidArgument(f"{source} is the root of the volume: it has no other place")

    async def work(fs: "FileSystem") -> None:
        with naming(source):
            await found(fs, source, follow=False)
            parent, name = await resolve_parent(fs, source.path)
        with naming(target):
            try:
                into = await resolve(fs, target.path)
            except FsError:
                into = None  # a new name; what is wrong with its parents shows below
            if into is not None and into.is_dir:
                new_parent, new_name = into.ino, name
            else:
                new_parent, new_name = await resolve_parent(fs, target.path)
            await fs.rename(parent, name, new_parent, new_name)

    _on_volume(cluster_path, source.volume, work, mode="rw")


@click.command()
@cluster_option
@click.option("-r", "--recursive", is_flag=True, help="Remove directories with their content.")
@click.option("-f", "--force", is_flag=True, help="What does not exist is no error.")
@click.argument("places", type=PLACE, nargs=-1, required=True)
def rm(cluster_path: str | None, recursive: bool, force: bool, places: tuple[Place, ...]) -> None:
    """Remove files, and with -r directories, of a volume.

    \b
    Example:
      dfs rm -r photos:/docs photos:/old.txt
    """
    import errno

    from dfs.cli.client import found, naming
    from dfs.client.paths import remove_tree, resolve_parent
    from dfs.errors import FsError, InvalidArgument

    async def work(fs: "FileSystem") -> None:
        try:
            with naming(place):
                if place.directory:
                    await found(fs, place)
                if recursive:
                    await remove_tree(fs, place.path)
                else:
                    await fs.unlink(*await resolve_parent(fs, place.path))
        except FsError as e:
            if e.errno == errno.EISDIR:
                raise FsError(f"{place} is a directory: use -r", e.errno) from e
            if not (force and e.errno == errno.ENOENT):
                raise

    for place in places:
        if place.path == b"/":
            raise InvalidArgument(
                f"{place} is the root of the volume: name what is in it, or use "
                f"`dfs volume delete {place.volume}`"
            )
    for place in places:
        _on_volume(cluster_path, place.volume, work, mode="rw")


@click.command()
@cluster_option
@json_option
@click.argument("places", type=PLACE, nargs=-1, required=True)
def du(cluster_path: str | None, as_json: bool, places: tuple[Place, ...]) -> None:
    """Add up the sizes of all files at and below a path of a volume."""
    from dfs.cli.client import naming
    from dfs.client.paths import disk_usage

    async def work(fs: "FileSystem") -> tuple[int, int, int]:
        with naming(place):
            return await disk_usage(fs, place.path)

    found = []
    for place in places:
        size, files, directories = _on_volume(cluster_path, place.volume, work)
        found.append(
            {"path": place.text, "bytes": size, "files": files, "directories": directories}
        )
        if not as_json:
            click.echo(f"{human_size(size):>10}  {files} files, {directories} directories  {place}")
    if as_json:
        echo_json(found)


def _as_dict(attr: "Attr") -> dict[str, Any]:
    return {
        "type": {8: "file", 4: "directory", 10: "symlink"}.get(attr.kind, "special"),
        "mode": attr.mode,
        "uid": attr.uid,
        "gid": attr.gid,
        "nlink": attr.nlink,
        "size": attr.size,
        "ino": attr.ino,
        "atime_ns": attr.atime,
        "mtime_ns": attr.mtime,
        "ctime_ns": attr.ctime,
        "btime_ns": attr.btime,
    }
