"""Copying local files into a volume."""

import errno
import io
import os
import stat
from collections.abc import Callable

import click
import trio

from dfs.cli.client import DedupChunks, naming
from dfs.cli.context import printable, standard_stream
from dfs.cli.place import Place
from dfs.cli.progress import Meter
from dfs.client.filesystem import FileSystem
from dfs.client.namespace import RENAME_NOREPLACE
from dfs.client.paths import resolve, resolve_parent
from dfs.errors import AlreadyExists, FsError, InvalidArgument

WORKERS = 12  # files on their way at once: their commits go out together
PIECE = 4 << 20  # bytes read at once: what becomes a chunk
SMALL = 64 << 10  # bytes read first, without a thread


class Upload:
    """One `dfs put`; afterwards `files`, `size`, `known_bytes` and `failed` tell what it did."""

    def __init__(
        self, fs: FileSystem, chunks: DedupChunks, *, recursive: bool, force: bool
    ) -> None:
        """`force`: replace files that exist, each in one step."""
        self._fs = fs
        self._chunks = chunks
        self._recursive = recursive
        self._force = force
        self._meter = Meter("put")
        self.failed: list[OSError] = []  # what could not be read here; the rest was copied

    @property
    def files(self) -> int:
        """Files and symbolic links copied."""
        return self._meter.files

    @property
    def size(self) -> int:
        """Their bytes."""
        return self._meter.bytes

    @property
    def known_bytes(self) -> int:
        """Bytes of chunks that the cluster had already."""
        return self._chunks.known_bytes

    async def run(self, sources: list[bytes], target: Place) -> None:
        """Copy the sources to or into the target; raises the first error over there.

        A local file that cannot be read does not keep the others from being copied.
        """
        into = await self._is_directory(target)
        if len(sources) > 1 and not into:
            raise InvalidArgument(f"{target} is no directory: several files need one")
        with self._meter:
            send, receive = trio.open_memory_channel[tuple[bytes, Place]](WORKERS)
            async with trio.open_nursery() as nursery:
                for _ in range(WORKERS):
                    nursery.start_soon(self._work, receive.clone())
                receive.close()
                async with send:
                    for source in sources:
                        name = _name(source)
                        place = target / name if into else target
                        if source == b"-":
                            if into:
                                raise InvalidArgument(f"{target} is a directory: name the file")
                            try:
                                await self._stream(_stdin(), place, 0o644)
                            except OSError as e:
                                raise _named(e, b"standard input") from e
                        else:
                            await self._plan(source, place, send)

    async def _is_directory(self, target: Place) -> bool:
        try:
            attr = await resolve(self._fs, target.path)
        except FsError as e:
            if e.errno == errno.ENOENT and not target.directory:
                return False
            with naming(target):
                raise
        if target.directory and not attr.is_dir:
            raise FsError(f"{target}: Not a directory", errno.ENOTDIR)
        return attr.is_dir

    async def _plan(
        self, source: bytes, place: Place, send: "trio.MemorySendChannel[tuple[bytes, Place]]"
    ) -> None:
        """Make directories at once, in order, and hand out files to the workers."""
        pending = [(source, place)]
        while pending:
            path, to = pending.pop()
            try:
                found = os.lstat(path)
            except OSError as e:
                self.failed.append(_named(e, path))
                continue
            if stat.S_ISDIR(found.st_mode):
                if not self._recursive:
                    raise InvalidArgument(f"{_shown(path)} is a directory: use -r")
                await self._make_directory(to, stat.S_IMODE(found.st_mode))
                try:
                    names = sorted(os.listdir(path), reverse=True)
                except OSError as e:
                    self.failed.append(_named(e, path))
                    continue
                pending += [(os.path.join(path, name), to / name) for name in names]
            elif stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                self._meter.expect(found.st_size)
                await send.send((path, to))
            elif path == source:
                raise InvalidArgument(
                    f"{_shown(path)} is a device, pipe or socket: dfs put copies files, directories"
                    " and symbolic links, and with `-` what comes from standard input"
                )
            else:
                click.echo(f"dfs: {_shown(path)} is no file or directory, skipped", err=True)

    async def _make_directory(self, place: Place, mode: int) -> None:
        if place.path == b"/":
            return
        with naming(place):
            parent, name = await resolve_parent(self._fs, place.path)
            try:
                await self._fs.mkdir(parent, name, mode)
            except FsError as e:
                if e.errno != errno.EEXIST or not (await self._fs.lookup(parent, name)).is_dir:
                    raise

    async def _work(self, receive: "trio.MemoryReceiveChannel[tuple[bytes, Place]]") -> None:
        async with receive:
            async for path, place in receive:
                try:
                    if stat.S_ISLNK(os.lstat(path).st_mode):
                        await self._symlink(os.readlink(path), place)
                    else:
                        with open(path, "rb", buffering=0) as source:
                            mode = stat.S_IMODE(os.fstat(source.fileno()).st_mode)
                            await self._stream(Source(source.read), place, mode)
                except OSError as e:
                    self.failed.append(_named(e, path))

    async def _symlink(self, target: bytes, place: Place) -> None:
        with naming(place):
            parent, name = await resolve_parent(self._fs, place.path)
            try:
                await self._fs.symlink(parent, name, target)
            except FsError as e:
                if e.errno != errno.EEXIST:
                    raise
                if not self._force:
                    raise _exists(place) from e
                await self._fs.unlink(parent, name)
                await self._fs.symlink(parent, name, target)
        self._meter.files += 1

    async def _stream(self, source: "Source", place: Place, mode: int) -> None:
        """Write a file under another name first, so that no half a file ever has the right one."""
        with naming(place):
            parent, name = await resolve_parent(self._fs, place.path)
            if not self._force:
                await self._refuse_existing(parent, name, place)
            temporary = b".dfs-put-%016x" % self._fs.session.cluster.random.getrandbits(64)
            with _finishing():
                _, handle = await self._fs.create(parent, temporary, mode)
            try:
                await self._copy(source, handle)
                flags = 0 if self._force else RENAME_NOREPLACE
                await self._fs.rename(parent, temporary, parent, name, flags)
            except BaseException as e:
                with _finishing():
                    await self._abandon(parent, temporary)
                if isinstance(e, FsError) and e.errno == errno.EEXIST:
                    raise _exists(place) from e
                raise
            finally:
                with _finishing():
                    await self._fs.release(handle)
        self._meter.files += 1

    async def _refuse_existing(self, parent: int, name: bytes, place: Place) -> None:
        try:
            await self._fs.lookup(parent, name)
        except FsError as e:
            if e.errno != errno.ENOENT:
                raise
        else:
            raise _exists(place)

    async def _copy(self, source: "Source", handle: int) -> None:
        at = 0
        data = await source.first()
        while data:
            await self._fs.write(handle, at, data)
            at += len(data)
            self._meter.done(len(data))
            data = await source.next(PIECE - at % PIECE)
        await self._fs.flush(handle)

    async def _abandon(self, parent: int, name: bytes) -> None:
        try:
            await self._fs.unlink(parent, name)
        except FsError as e:
            if e.errno != errno.ENOENT:
                click.echo(f"dfs: an incomplete {os.fsdecode(name)} stays behind: {e}", err=True)


class Source:
    """A file to read: its first piece at once, since a thread costs 0.1 ms, the rest in one."""

    def __init__(self, read: Callable[[int], bytes], *, patient: bool = False) -> None:
        """`patient`: reading may wait for ever, for whoever writes to a pipe."""
        self._read = read
        self._patient = patient

    async def first(self) -> bytes:
        """The first bytes."""
        return await self.next(SMALL) if self._patient else self._read(SMALL)

    async def next(self, size: int) -> bytes:
        """More bytes; none at the end."""
        # a read that nobody waits for any more ends with the process
        return await trio.to_thread.run_sync(self._read, size, abandon_on_cancel=self._patient)


def _stdin() -> Source:
    stream = standard_stream("stdin")
    try:
        number = stream.fileno()
    except io.UnsupportedOperation:  # of a test
        return Source(stream.read)
    # not through the buffer, whose lock a waiting thread would hold when the process ends
    return Source(lambda size: os.read(number, size), patient=True)


def _finishing() -> trio.CancelScope:
    """For what must be done although the command is cancelled, but not at any price."""
    return trio.CancelScope(deadline=trio.current_time() + 5, shield=True)


def _exists(place: Place) -> AlreadyExists:
    return AlreadyExists(f"{place} exists already: -f replaces it")


def _named(error: OSError, path: bytes) -> OSError:
    """The error with the name of the file that it is about, which reading leaves out."""
    return OSError(error.errno, error.strerror, path)


def _shown(path: bytes) -> str:
    return printable(os.fsdecode(path))


def _name(source: bytes) -> bytes:
    """What a copy of a local path is called, also for `.` and `..`."""
    return os.path.basename(os.path.abspath(source))
