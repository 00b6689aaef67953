"""Copying files out of a volume."""

import os
import secrets
import stat
from typing import Any

import click
import trio

from dfs.cli.client import naming
from dfs.cli.context import printable, standard_stream, writing_stdout
from dfs.cli.place import Place
from dfs.cli.progress import Meter
from dfs.client.attributes import Attr
from dfs.client.filesystem import FileSystem
from dfs.client.paths import resolve, walk
from dfs.errors import AlreadyExists, InvalidArgument

WORKERS = 8  # files on their way at once
PIECE = 4 << 20  # bytes asked for at once
SMALL = 1 << 20  # bytes up to which a local write needs no thread


class Download:
    """One `dfs get`; afterwards `files` and `size` tell what it did."""

    def __init__(self, fs: FileSystem, *, recursive: bool, force: bool) -> None:
        """`force`: replace local files that exist, each in one step."""
        self._fs = fs
        self._recursive = recursive
        self._force = force
        self._meter = Meter("get")

    @property
    def files(self) -> int:
        """Files and symbolic links copied."""
        return self._meter.files

    @property
    def size(self) -> int:
        """Their bytes."""
        return self._meter.bytes

    async def run(self, sources: list[Place], target: bytes) -> None:
        """Copy the sources to or into the target; raises the first error."""
        with self._meter:
            if target == b"-":
                await self._to_stdout(sources[0])
                return
            into = _is_directory(target)
            if not into and (len(sources) > 1 or target.endswith(b"/")):
                raise InvalidArgument(f"{os.fsdecode(target)} is no directory")
            above = os.path.dirname(target.rstrip(b"/")) or b"."
            if not into and not _is_directory(above):
                raise InvalidArgument(f"{os.fsdecode(above)} is no directory: make it first")
            send, receive = trio.open_memory_channel[tuple[Attr, Place, bytes]](WORKERS)
            async with trio.open_nursery() as nursery:
                for _ in range(WORKERS):
                    nursery.start_soon(self._work, receive.clone())
                receive.close()
                async with send:
                    for source in sources:
                        to = os.path.join(target, source.name) if into else target
                        await self._plan(source, to, send)

    async def _to_stdout(self, source: Place) -> None:
        with naming(source):
            attr = await resolve(self._fs, source.path)
            self._meter.expect(attr.size)
            if attr.is_dir:
                raise InvalidArgument(f"{source} is a directory: it cannot go to standard output")
            out = standard_stream("stdout")
            with writing_stdout():
                await self._copy(attr.ino, out)
                out.flush()

    async def _plan(
        self,
        source: Place,
        to: bytes,
        send: "trio.MemorySendChannel[tuple[Attr, Place, bytes]]",
    ) -> None:
        """Make directories at once, in order, and hand out files to the workers."""
        with naming(source):
            attr = await resolve(self._fs, source.path)
            if attr.is_dir and not self._recursive:
                raise InvalidArgument(f"{source} is a directory: use -r")
            cut = len(source.path.rstrip(b"/"))
            async for path, found in walk(self._fs, source.path, attr):
                local = to + path.rstrip(b"/")[cut:]
                place = Place(source.volume, path, directory=False)
                if found.is_dir:
                    os.makedirs(local, exist_ok=True)
                    # so that we can write into it ourselves
                    os.chmod(local, found.mode | stat.S_IRWXU)
                elif found.is_file or found.is_symlink:
                    self._meter.expect(found.size if found.is_file else 0)
                    await send.send((found, place, local))
                else:
                    click.echo(f"dfs: {place} is a device or pipe, skipped", err=True)

    async def _work(self, receive: "trio.MemoryReceiveChannel[tuple[Attr, Place, bytes]]") -> None:
        async with receive:
            async for attr, place, local in receive:
                with naming(place):
                    await self._fetch(attr, local)
                self._meter.files += 1

    async def _fetch(self, attr: Attr, local: bytes) -> None:
        """Write under another name first, so that no half a file ever has the right one."""
        if not self._force and _exists(local):
            raise AlreadyExists(f"{printable(os.fsdecode(local))} exists already: -f replaces it")
        if _is_special(local):
            raise AlreadyExists(
                f"{printable(os.fsdecode(local))} is a device, pipe or socket, which dfs get does"
                " not replace: `-` as the target is standard output"
            )
        directory, _ = os.path.split(local)
        part = os.path.join(directory, b".dfs-get-" + secrets.token_hex(8).encode())
        try:
            await self._make(attr, local, part)
        except OSError as e:
            if e.filename in (None, part):  # nobody knows that name
                raise OSError(e.errno, e.strerror, local) from e
            raise

    async def _make(self, attr: Attr, local: bytes, part: bytes) -> None:
        try:
            if attr.is_symlink:
                os.symlink(await self._fs.readlink(attr.ino), part)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with open(os.open(part, flags, 0o600), "wb", buffering=0) as out:
                    await self._copy(attr.ino, out)
                    os.fchmod(out.fileno(), attr.mode & 0o777)
            os.rename(part, local)
        except BaseException:
            if _exists(part):
                os.unlink(part)
            raise

    async def _copy(self, ino: int, out: Any) -> None:
        handle = await self._fs.open(ino)
        at = 0
        try:
            while data := await self._fs.read(handle, at, PIECE):
                if len(data) < SMALL:
                    _write_all(out, data)
                else:
                    await trio.to_thread.run_sync(_write_all, out, data)
                at += len(data)
                self._meter.done(len(data))
        finally:
            await self._fs.release(handle)


def _is_directory(path: bytes) -> bool:
    return os.path.isdir(path)


def _exists(path: bytes) -> bool:
    return os.path.lexists(path)


def _is_special(path: bytes) -> bool:
    """Whether something is there that a file must not take the place of, such as /dev/null."""
    if not _exists(path):
        return False
    mode = os.lstat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))


def _write_all(out: Any, data: Any) -> None:
    """Write everything to an unbuffered file, which may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
