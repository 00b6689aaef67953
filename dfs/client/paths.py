"""Paths on top of `FileSystem`: what a command line needs, in terms of inodes.

Paths are bytes, `/` separates, symbolic links are followed inside the volume (an absolute target
starts at the volume's root).  Nothing here is atomic beyond what the single operations are.
"""

import errno
from collections.abc import AsyncIterator
from typing import Any, Protocol

from dfs.client.attributes import Attr, fs_error
from dfs.client.filesystem import FileSystem
from dfs.codec import Buffer
from dfs.errors import FsError
from dfs.ids import ROOT_INO

MAX_LINKS = 40
BLOCK = 1 << 20


def split(path: bytes) -> list[bytes]:
    """Names of a path."""
    return [name for name in path.split(b"/") if name]


async def resolve(
    fs: FileSystem, path: bytes, *, follow: bool = True, start: int = ROOT_INO
) -> Attr:
    """The inode a path leads to; `follow`: through a symbolic link at its end, too.

    Raises ENOENT, ENOTDIR, ELOOP.
    """
    names = split(path)
    attr = await fs.getattr(ROOT_INO if path.startswith(b"/") else start)
    links = 0
    # The directories above, because `..` of a directory is where its path came from.
    while names:
        name = names.pop(0)
        parent = attr
        if not parent.is_dir:
            raise fs_error(errno.ENOTDIR, repr(path))
        if name == b".":
            continue
        attr = await fs.lookup(parent.ino, name)
        if attr.is_symlink and (names or follow):
            links += 1
            if links > MAX_LINKS:
                raise fs_error(errno.ELOOP, repr(path))
            target = await fs.readlink(attr.ino)
            names = [*split(target), *names]
            attr = await fs.getattr(ROOT_INO) if target.startswith(b"/") else parent
    return attr


async def resolve_parent(fs: FileSystem, path: bytes) -> tuple[int, bytes]:
    """(directory, last name) of a path; raises EINVAL for the root or a path that ends in `..`."""
    names = split(path)
    if not names or names[-1] in (b".", b".."):
        raise fs_error(errno.EINVAL, f"{path!r} names no entry")
    above = await resolve(fs, b"/" + b"/".join(names[:-1]))
    if not above.is_dir:
        raise fs_error(errno.ENOTDIR, repr(path))
    return above.ino, names[-1]


async def exists(fs: FileSystem, path: bytes) -> bool:
    """Whether a path leads anywhere, without following a symbolic link at its end."""
    try:
        await resolve(fs, path, follow=False)
    except FsError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    return True


async def list_directory(fs: FileSystem, ino: int) -> AsyncIterator[tuple[bytes, Attr]]:
    """Entries of a directory in the order of their cookies."""
    handle = await fs.opendir(ino)
    cookie = 0
    try:
        while entries := await fs.readdir(handle, cookie):
            for name, cookie, attr in entries:
                fs.returned(handle, name, cookie)
                yield name, attr
    finally:
        await fs.releasedir(handle)


async def walk(fs: FileSystem, path: bytes, attr: Attr) -> AsyncIterator[tuple[bytes, Attr]]:
    """Everything at and below a path, directories before their content, names sorted."""
    pending = [(path, attr)]
    while pending:
        place, found = pending.pop()
        yield place, found
        if found.is_dir:
            below = [(name, a) async for name, a in list_directory(fs, found.ino)]
            below.sort(key=lambda entry: entry[0], reverse=True)
            prefix = place if place.endswith(b"/") or not place else place + b"/"
            pending += [(prefix + name, a) for name, a in below]


async def make_directories(fs: FileSystem, path: bytes, mode: int = 0o755) -> Attr:
    """mkdir -p; returns the directory."""
    at = await fs.getattr(ROOT_INO)
    for name in split(path):
        try:
            at = await fs.mkdir(at.ino, name, mode)
        except FsError as e:
            if e.errno != errno.EEXIST:
                raise
            at = await resolve(fs, name, start=at.ino)
            if not at.is_dir:
                raise fs_error(errno.ENOTDIR, repr(path)) from None
    return at


async def remove_tree(fs: FileSystem, path: bytes) -> int:
    """rm -r; returns the number of names removed."""
    parent, name = await resolve_parent(fs, path)
    attr = await fs.lookup(parent, name)
    return await _remove(fs, parent, name, attr)


async def _remove(fs: FileSystem, parent: int, name: bytes, attr: Attr) -> int:
    if not attr.is_dir:
        await fs.unlink(parent, name)
        return 1
    removed = 0
    below = [entry async for entry in list_directory(fs, attr.ino)]
    for child, child_attr in below:
        removed += await _remove(fs, attr.ino, child, child_attr)
    await fs.rmdir(parent, name)
    return removed + 1


async def disk_usage(fs: FileSystem, path: bytes) -> tuple[int, int, int]:
    """(bytes in regular files, files and other nodes, directories) at and below a path.

    A file with several names counts once.
    """
    size = nodes = directories = 0
    seen: set[int] = set()
    attr = await resolve(fs, path, follow=False)
    async for _, found in walk(fs, path, attr):
        if found.is_dir:
            directories += 1
            continue
        if found.nlink > 1:
            if found.ino in seen:
                continue
            seen.add(found.ino)
        nodes += 1
        size += found.size if found.is_file else 0
    return size, nodes, directories


# -------------------------------------------------------------------------------- whole files


class Source(Protocol):
    """Where `put_file` reads: an open binary file will do."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, empty at the end."""
        ...


class Sink(Protocol):
    """Where `get_file` writes: an open binary file will do."""

    def write(self, data: Any, /) -> Any:
        """Take bytes."""
        ...


async def put_file(fs: FileSystem, path: bytes, source: Source, mode: int = 0o644) -> int:
    """Write a stream to a file, replacing what it held; returns the number of bytes."""
    parent, name = await resolve_parent(fs, path)
    _, handle = await fs.create(parent, name, mode, exclusive=False, truncate=True)
    at = 0
    try:
        while data := source.read(BLOCK):
            await fs.write(handle, at, data)
            at += len(data)
        await fs.flush(handle)
    finally:
        await fs.release(handle)
    return at


async def get_file(fs: FileSystem, path: bytes, sink: Sink) -> int:
    """Write a file's content to a stream; returns the number of bytes."""
    attr = await resolve(fs, path)
    handle = await fs.open(attr.ino)
    at = 0
    try:
        while data := await fs.read(handle, at, BLOCK):
            sink.write(data)
            at += len(data)
    finally:
        await fs.release(handle)
    return at


async def read_path(fs: FileSystem, path: bytes) -> bytes:
    """Content of a file, as one value."""
    parts: list[Buffer] = []

    class Parts:
        def write(self, data: Buffer) -> None:
            parts.append(data)

    await get_file(fs, path, Parts())
    return b"".join(parts)


async def write_path(fs: FileSystem, path: bytes, data: bytes, mode: int = 0o644) -> None:
    """Make a file hold exactly these bytes."""
    rest = memoryview(data)

    class Rest:
        def read(self, size: int) -> bytes:
            nonlocal rest
            part, rest = rest[:size], rest[size:]
            return bytes(part)

    await put_file(fs, path, Rest(), mode)
