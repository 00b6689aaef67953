"""File data of one client: write-back, commit, read-ahead.

Writes go to the file's `WriteBuffer`.  Whole 4 MiB windows are uploaded at once, in the background;
the rest when the file is committed: by flush or fsync, by a task a second after the first write, or
because too much is uncommitted.  A commit is, in this order: upload what is left, packed into
shared chunks; a `sync` barrier, after which the chunks are durable on W servers; one transaction
with the extents, size and times.  So a commit never names a chunk that could be lost.  Up to 4 KiB
need no chunk at all: they are inline extents.

Concurrency contract.  One loop; code between awaits is atomic.  `File.lock` is held by commits and
truncation of a file, never by reads or writes.  While a commit waits, writes go on: they cut the
segments under commit, and `WriteBuffer.forget` afterwards drops only what is still as it was
committed.  A reader takes committed extents and dirty segments in one step, so it sees a write
either in the buffer or in the extents; chunk bytes are fetched afterwards and are immutable.

A failed write-back keeps the data, is tried again by the next commit, and its error is raised once,
by the next write, flush or fsync.
"""

import errno
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import trio

from dfs.client.attributes import Attr, fs_error, get_inode, patch_inode, without_privileges
from dfs.client.cache import BUDGET, ChunkCache, join
from dfs.client.handles import FileHandle
from dfs.client.namespace import Namespace
from dfs.client.session import Session
from dfs.client.writebuffer import WINDOW, Segment, Upload, WriteBuffer
from dfs.codec import Buffer
from dfs.env import Buffers
from dfs.errors import DfsError, FsError
from dfs.volume import effects as fx
from dfs.volume import extents, items
from dfs.volume.items import DIR, REG, Inode
from dfs.volume.view import Txn

log = logging.getLogger(__name__)

INLINE = 4 << 10  # bytes up to which a commit needs no chunk
MAX_DIRTY = 96 << 20  # uncommitted bytes of all files beyond which writers wait
UPLOADS = 4  # chunks on their way at once
AGE = 1.0  # seconds after which dirty data is committed without being asked
SPAN = 16 << 20  # bytes of a file whose extents are looked up at once
SMALL_READ = 128 << 10
MAX_SIZE = items.MAX_OFFSET


class ChunkStore(Protocol):
    """What is needed of `dfs.client.chunkio.ChunkClient`."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...  # noqa: D102

    async def put(self, data: Buffers, *, durable: bool = False) -> bytes:
        """Send a chunk to its servers; returns its id once W have it."""
        ...

    async def sync(self) -> int:
        """Make all chunks put so far durable on W servers; returns the oldest stamp."""
        ...

    async def read(self, chunk_id: bytes, offset: int, length: int) -> Buffer:
        """Verified bytes of a chunk."""
        ...


class File:
    """What this client knows of one regular file that is open or dirty."""

    __slots__ = (
        "buffer", "dirty_since", "error", "handles", "ino", "lock", "mtime", "orphan", "size",
        "span",
    )  # fmt: skip

    def __init__(self, ino: int) -> None:
        """A file without handles or dirty data."""
        self.ino = ino
        self.handles = 0
        self.buffer = WriteBuffer()
        self.lock = trio.Lock()
        self.error: FsError | None = None  # of a write-back, until it was raised
        self.mtime = 0  # of the newest write that is not committed
        self.dirty_since = 0.0
        self.orphan = False  # the last name is gone: purge at the last close
        self.size = -1  # committed size; -1 = ask the view
        self.span: tuple[int, int, list[extents.Extent]] | None = None  # cached committed extents


class Files:
    """All open and dirty files of a client; see the module's docstring."""

    def __init__(
        self,
        session: Session,
        chunks: ChunkStore,
        namespace: Namespace,
        *,
        cache_bytes: int = BUDGET,
        clear_privileges: bool = True,
    ) -> None:
        """Compose; nothing runs before `run`."""
        self._session = session
        self._chunks = chunks
        self._namespace = namespace
        self._clear_privileges = clear_privileges
        self._cache_bytes = cache_bytes
        self._files: dict[int, File] = {}
        self._dirty: dict[int, File] = {}  # in order of becoming dirty
        self._uncommitted = 0
        self._uploads: dict[Upload, trio.Event] = {}
        self._slots = trio.Semaphore(UPLOADS)
        self._wake = trio.Event()  # something became dirty
        self._nursery: trio.Nursery | None = None
        self._cache: ChunkCache | None = None
        self._clock = session.cluster.clock
        self._commits = 0
        session.on_change(self._on_change)
        session.on_fenced(self._on_fenced)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background uploads, fetches and commits of old dirty data; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._cache = ChunkCache(self._chunks, nursery, self._cache_bytes)
            task_status.started()
            await self._write_back()

    def statistics(self) -> dict[str, Any]:
        """Counters for people."""
        return {
            "open": sum(1 for f in self._files.values() if f.handles),
            "dirty": len(self._dirty),
            "uncommitted": self._uncommitted,
            "uploading": len(self._uploads),
            "commits": self._commits,
            "cache": self._cache.statistics() if self._cache else {},
        }

    # ------------------------------------------------------------------ open files

    def open(self, ino: int) -> File:
        """The file, with one more handle."""
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = File(ino)
        file.handles += 1
        return file

    def is_open(self, ino: int) -> bool:
        """Whether a handle is open or data of the file waits to be committed."""
        file = self._files.get(ino)
        return file is not None and file.handles > 0

    def is_dirty(self, ino: int) -> bool:
        """Whether the file has uncommitted data."""
        return ino in self._dirty

    async def close(self, file: File) -> None:
        """Give up a handle: commit what is left, and purge the file if that was its last hold."""
        if file.buffer and not file.orphan:
            try:
                await self.flush(file)
            except FsError as e:
                log.warning("data of inode %x is not committed yet: %s", file.ino, e)
        file.handles -= 1
        if file.handles:
            return
        if file.orphan:
            self._drop_dirty(file)
            try:
                await self._session.transact(lambda txn: self._namespace.purge(txn, file.ino))
            except FsError as e:
                log.warning("orphan %x stays for now: %s", file.ino, e)
        self._maybe_forget(file)

    async def unlinked(self, ino: int) -> None:
        """A name of the file was removed; find out whether it was the last."""
        file = self._files.get(ino)
        if file is None:
            return
        value = await self._session.read(lambda txn: txn.get(items.inode_key(ino)))
        if value is not None and Inode.decode(value).nlink:
            return
        if value is None:
            self._drop_dirty(file)
            self._maybe_forget(file)
            return
        file.orphan = True
        if not file.handles:  # closed while the transaction was on its way
            await self._session.transact(lambda txn: self._namespace.purge(txn, ino))
            self._maybe_forget(file)

    def _maybe_forget(self, file: File) -> None:
        if not file.handles and not file.buffer and self._files.get(file.ino) is file:
            del self._files[file.ino]

    def overlay(self, attr: Attr) -> Attr:
        """Put what is not committed yet over committed attributes, in place."""
        file = self._dirty.get(attr.ino)
        if file is not None:
            attr.size = max(attr.size, file.buffer.end)
            attr.mtime = attr.ctime = max(file.mtime, attr.mtime)
        return attr

    async def settle(self, ino: int) -> None:
        """Commit dirty data, so that the mode or time set next is not undone by it."""
        file = self._dirty.get(ino)
        if file is not None:
            await self.flush(file)

    def _on_change(self, keys: Sequence[bytes] | None) -> None:
        """Other sessions' commits: forget what was derived from the items they changed."""
        if keys is None:
            for file in self._files.values():
                file.span, file.size = None, -1
        elif self._files:
            for key in keys:
                file_or_none = self._files.get(int.from_bytes(key[:8], "big"))
                if file_or_none is not None:
                    file_or_none.span, file_or_none.size = None, -1

    def _on_fenced(self) -> None:
        for file in self._dirty.values():
            file.error = file.error or fs_error(errno.EIO, "the session was lost")

    # ------------------------------------------------------------------ writing

    async def write(self, file: File, offset: int, data: Buffer) -> int:
        """Buffer a write; waits only when too much is uncommitted."""
        if file.error is not None:
            error, file.error = file.error, None
            raise error
        length = len(data)
        if offset + length > MAX_SIZE:
            raise fs_error(errno.EFBIG)
        if not length:
            return 0
        buffer = file.buffer
        if not buffer:
            file.dirty_since = self._clock.monotonic()
            self._dirty[file.ino] = file
            self._wake.set()
        before = buffer.size
        buffer.write(offset, data)
        self._uncommitted += buffer.size - before
        file.mtime = self._clock.time_ns()
        if length > SMALL_READ or buffer.size >= WINDOW:
            for window in range(offset // WINDOW, (offset + length - 1) // WINDOW + 1):
                if buffer.loose.get(window, 0) == WINDOW:
                    self._upload_window(file, window)
        if self._uncommitted > MAX_DIRTY:
            await self._make_room(file)
        return length

    def _upload_window(self, file: File, window: int) -> None:
        start = window * WINDOW
        pieces = [
            piece
            for s in file.buffer.overlapping(start, start + WINDOW)
            for piece in s.read(
                max(s.start, start), min(s.end, start + WINDOW) - max(s.start, start)
            )
        ]
        upload = Upload(pieces)
        file.buffer.gather([(start, WINDOW)], upload, [0])
        self._send(upload)

    def _send(self, upload: Upload) -> None:
        upload.error = None
        self._uploads[upload] = trio.Event()
        if self._nursery is None:
            raise RuntimeError("Files.run is not running")
        self._nursery.start_soon(self._put, upload)

    async def _put(self, upload: Upload) -> None:
        try:
            async with self._slots:
                upload.chunk_id = await self._chunks.put(upload.pieces)
        except DfsError as e:
            upload.error = e  # the commit tries again and reports
        finally:
            self._uploads.pop(upload).set()

    async def _make_room(self, file: File) -> None:
        """Commit the writer's own file, or the one that is dirty longest, until there is room."""
        await self._commit(file)
        while self._uncommitted > MAX_DIRTY:
            await self._commit(next(iter(self._dirty.values())))

    def _drop_dirty(self, file: File) -> None:
        self._uncommitted -= file.buffer.size
        file.buffer = WriteBuffer()
        self._dirty.pop(file.ino, None)

    # ------------------------------------------------------------------ committing

    async def flush(self, file: File) -> None:
        """Commit the file's dirty data; raises what went wrong with it, now or before, once."""
        if file.buffer:
            await self._commit(file)
        if file.error is not None:
            error, file.error = file.error, None
            raise error

    async def flush_all(self) -> None:
        """Commit everything; raises the first error after having tried all files."""
        first: FsError | None = None
        for file in list(self._dirty.values()):
            try:
                await self.flush(file)
            except FsError as e:
                first = first or e
        if first is not None:
            raise first

    async def _commit(self, file: File) -> None:
        async with file.lock:
            if not file.buffer:
                return
            if file.orphan and not file.handles:
                self._drop_dirty(file)
                return
            began = self._clock.monotonic()
            try:
                segments, oldest = await self._store(file)
                await self._publish(file, segments, oldest)
            except FsError as e:
                if e.errno == errno.ESTALE:  # the file was removed by somebody else
                    self._drop_dirty(file)
                raise
            except DfsError as e:
                raise FsError(f"write-back of inode {file.ino:x}: {e}", e.errno) from e
            before = file.buffer.size
            file.buffer.forget(segments)
            self._uncommitted -= before - file.buffer.size
            self._dirty.pop(file.ino, None)
            if file.buffer:
                file.dirty_since = began
                self._dirty[file.ino] = file
            self._commits += 1
            self._maybe_forget(file)

    async def _store(self, file: File) -> tuple[list[Segment], int]:
        """Make the bytes of the dirty segments durable, unless they are few enough to be inline."""
        buffer = file.buffer
        if buffer.size <= INLINE and not any(isinstance(s.source, Upload) for s in buffer):
            return list(buffer), 0
        self._pack(file)
        wanted = list(dict.fromkeys(s.source for s in buffer if isinstance(s.source, Upload)))
        for upload in wanted:
            if upload.error is not None and upload not in self._uploads:
                self._send(upload)
        for upload in wanted:
            event = self._uploads.get(upload)
            if event is not None:
                await event.wait()
        for upload in wanted:
            if upload.error is not None:
                raise upload.error
        oldest = await self._chunks.sync()
        stored = set(wanted)
        return [s for s in buffer if s.source in stored and isinstance(s.source, Upload)], oldest

    def _pack(self, file: File) -> None:
        """Send what is in no chunk yet, adjacent pieces together, short ones in shared chunks."""
        ranges: list[tuple[int, int]] = []
        for s in file.buffer:
            if isinstance(s.source, Upload):
                continue
            if ranges and sum(ranges[-1]) == s.start:
                ranges[-1] = (ranges[-1][0], s.end - ranges[-1][0])
            else:
                ranges.append((s.start, s.length))
        for chunk in extents.plan_pack(ranges, WINDOW):
            pieces: list[memoryview] = []
            filled = 0
            for offset, length, at in chunk:
                if at > filled:
                    pieces.append(memoryview(bytes(at - filled)))
                for s in file.buffer.overlapping(offset, offset + length):
                    begin = max(s.start, offset)
                    pieces += s.read(begin, min(s.end, offset + length) - begin)
                filled = at + length
            upload = Upload(pieces)
            file.buffer.gather(
                [(offset, length) for offset, length, _ in chunk], upload, [c[2] for c in chunk]
            )
            self._send(upload)

    async def _publish(self, file: File, segments: list[Segment], oldest: int) -> None:
        """One transaction with the extents of stored segments, the size and the times."""
        ino, mtime = file.ino, file.mtime
        end = segments[-1].end
        new = [_extent_of(s) for s in segments]
        few = all(e.data is not None for e in new)

        def op(txn: Txn) -> int:
            inode = get_inode(txn, ino)
            size = max(inode.size, end)
            for run in _neighbours(new):
                old = scan_extents(txn, ino, run[0].offset, run[-1].end + 1)
                if few:
                    run = merge_inline(old, run)
                txn.extend(extents.plan_write(ino, old, run))
            self._change_data(txn, ino, inode, size, mtime)
            return size

        size = await self._session.transact(op, oldest=oldest)
        file.span, file.size = None, size

    def _change_data(self, txn: Txn, ino: int, inode: Inode, size: int, now: int) -> None:
        """What every change of content does to the inode and to the volume's usage."""
        changes: list[fx.Change] = [
            (items.F_MTIME, fx.LAST, now),
            (items.F_CTIME, fx.LAST, now),
            (items.F_DATAVER, fx.ADD, 1),
        ]
        if size != inode.size:
            changes.append((items.F_SIZE, fx.SET, size))
        mode = without_privileges(inode.mode) if self._clear_privileges else inode.mode
        if mode != inode.mode:
            changes.append((items.F_MODE, fx.SET, mode))
        patch_inode(txn, ino, *changes)
        self._namespace.charge(txn, size - inode.size, 0)

    async def truncate(self, ino: int, size: int) -> None:
        """Cut or extend (with zeros) a file to `size` bytes."""
        if size < 0:
            raise fs_error(errno.EINVAL)
        if size > MAX_SIZE:
            raise fs_error(errno.EFBIG)
        file = self._files.get(ino)
        now = self._clock.time_ns()

        def op(txn: Txn) -> None:
            inode = get_inode(txn, ino)
            if inode.kind != REG:
                raise fs_error(errno.EISDIR if inode.kind == DIR else errno.EINVAL)
            if size < inode.size:
                old = scan_extents(txn, ino, size, size)
                txn.extend(extents.plan_truncate(ino, old, size))
            self._change_data(txn, ino, inode, size, now)

        if file is None:
            await self._session.transact(op)
            return
        async with file.lock:
            before = file.buffer.size
            file.buffer.cut(size, sys.maxsize)
            self._uncommitted -= before - file.buffer.size
            if not file.buffer:
                self._dirty.pop(ino, None)
            await self._session.transact(op)
            file.span, file.size = None, size

    async def _write_back(self) -> None:
        """Commit what has been dirty for `AGE` seconds; sleeps while nothing is dirty."""
        while True:
            if not self._dirty:
                self._wake = trio.Event()
                await self._wake.wait()
            now = self._clock.monotonic()
            due = [f for f in self._dirty.values() if now - f.dirty_since >= AGE]
            for file in due:
                try:
                    await self._commit(file)
                except FsError as e:
                    file.error = file.error or e
                    file.dirty_since = self._clock.monotonic() + AGE  # not at once again
                    log.warning("write-back of inode %x: %s", file.ino, e)
            await trio.sleep(AGE / 4)

    # ------------------------------------------------------------------ reading

    async def read(self, handle: FileHandle, offset: int, length: int) -> Buffer:
        """Up to `length` bytes at `offset`: committed data under what is not committed yet."""
        file = handle.file
        buffer = file.buffer
        if buffer:
            dirty = buffer.overlapping(offset, offset + length)
            if len(dirty) == 1 and dirty[0].start <= offset and dirty[0].end >= offset + length:
                pieces: list[memoryview] = dirty[0].read(offset, length)
                return join(pieces, length)
        size, committed = await self._committed(file, offset, offset + length)
        # From here to the fetch nothing awaits: buffer and extents belong together.
        length = min(length, max(size, file.buffer.end) - offset)
        if length <= 0:
            return b""
        dirty = file.buffer.overlapping(offset, offset + length)
        small = not handle.run and length <= SMALL_READ
        ahead = handle.advance(offset, length)
        if ahead is not None and ahead[0] < size:
            self._read_ahead(file, ahead[0], min(ahead[1], size))
        plan = extents.plan_read(committed, offset, length)
        found = await self._gather(plan, small=small)
        if not dirty:
            return join(found, length)
        whole = bytearray(b"".join(found))
        for s in dirty:
            begin, end = max(s.start, offset), min(s.end, offset + length)
            whole[begin - offset : end - offset] = b"".join(s.read(begin, end - begin))
        return whole

    async def _committed(
        self, file: File, start: int, end: int
    ) -> tuple[int, list[extents.Extent]]:
        """Committed size and the extents of a range, from the view; cached per file."""
        span = file.span
        if span is None or file.size < 0 or start < span[0] or end > span[1]:
            ino = file.ino
            stop = end + SPAN

            def op(txn: Txn) -> tuple[int, list[extents.Extent]]:
                return get_inode(txn, ino).size, scan_extents(txn, ino, start, stop)

            file.size, found = await self._session.read(op)
            file.span = span = (start, stop, found)
        elif not self._session.fresh:
            await self._session.read(lambda _: None)
            return await self._committed(file, start, end)
        return file.size, span[2]

    async def _gather(self, plan: Sequence[extents.Piece], *, small: bool) -> list[memoryview]:
        """Bytes of a plan's pieces, as views."""
        cache = self._cache
        if cache is None:
            raise RuntimeError("Files.run is not running")
        if len(plan) > 1:  # have all of it on its way before waiting for the first
            for piece in plan:
                if piece.kind == extents.CHUNK:
                    cache.prefetch(
                        piece.chunk_id, piece.chunk_offset, piece.length, piece.chunk_length
                    )
        found: list[memoryview] = []
        for piece in plan:
            if piece.kind == extents.CHUNK:
                try:
                    found += await cache.read(
                        piece.chunk_id,
                        piece.chunk_offset,
                        piece.length,
                        piece.chunk_length,
                        small=small,
                    )
                except DfsError as e:
                    raise FsError(f"chunk {piece.chunk_id.hex()}: {e}", errno.EIO) from e
            elif piece.kind == extents.INLINE:
                found.append(memoryview(piece.data))
            else:
                found.append(memoryview(bytes(piece.length)))
        return found

    def _read_ahead(self, file: File, start: int, end: int) -> None:
        span = file.span
        if span is None or self._cache is None or start < span[0] or end > span[1]:
            return
        for piece in extents.plan_read(span[2], start, end - start):
            if piece.kind == extents.CHUNK:
                self._cache.prefetch(
                    piece.chunk_id, piece.chunk_offset, piece.length, piece.chunk_length
                )


def scan_extents(txn: Txn, ino: int, start: int, end: int) -> list[extents.Extent]:
    """Committed extents that may overlap a range of a file, in order."""
    return extents.decode(txn.scan_range(*extents.bounds(ino, start, end)))


def _extent_of(s: Segment) -> extents.Extent:
    if isinstance(s.source, Upload):
        return extents.in_chunk(s.start, s.length, s.source.chunk_id, s.at, s.source.length)
    return extents.inline(s.start, s.read(s.start, s.length)[0])


def _neighbours(new: Sequence[extents.Extent]) -> Iterator[list[extents.Extent]]:
    """Runs of extents that lie close enough for one look at what they replace."""
    run: list[extents.Extent] = []
    for extent in new:
        if run and extent.offset - run[-1].end > SPAN:
            yield run
            run = []
        run.append(extent)
    if run:
        yield run


def merge_inline(old: Sequence[extents.Extent], new: list[extents.Extent]) -> list[extents.Extent]:
    """A new inline extent joined with the old ones that it touches, as long as that stays short.

    So a file that grows by small appends has one item per `INLINE` bytes, not one per append.
    """
    if len(new) != 1:
        return new
    joined = new[0]
    for e in reversed(old):
        if e.data is None or e.end < joined.offset or e.offset > joined.end:
            continue
        start, end = min(e.offset, joined.offset), max(e.end, joined.end)
        if end - start <= INLINE:
            content = bytearray(end - start)
            content[e.offset - start : e.end - start] = e.data
            content[joined.offset - start : joined.end - start] = joined.data or b""
            joined = extents.inline(start, content)
    return [joined]
