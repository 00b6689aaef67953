"""File data of one client: write-back, commit, read-ahead.

Writes go to the file's `WriteBuffer`.  Whole 4 MiB windows are uploaded at once, in the background;
the rest when the file is committed: by flush or fsync, by a task a second after the first write or
once there are many pieces, or because too much is uncommitted.  A commit is, in this order: upload
what is left, packed into shared chunks; a `sync` barrier, after which the chunks are durable on W
servers; one transaction with the extents, size and times.  So a commit never names a chunk that
could be lost.  Up to 4 KiB need no chunk at all: they are inline extents.

Concurrency contract.  One loop; code between awaits is atomic.  `File.lock` is held by commits and
truncation of a file, never by reads or writes.  While a commit waits, writes go on: they cut the
segments under commit, and `WriteBuffer.forget` afterwards drops only what is still as it was
committed.  A reader takes committed extents and dirty segments in one step, so it sees a write
either in the buffer or in the extents; chunk bytes are fetched afterwards and are immutable.  What
a commit or truncation looked at before it waited may be gone afterwards: the buffer is another
object if its data was given up, and the `File` if it was closed and opened (`pins` prevent that).

What a write adds to its file is taken from the volume's quota when the write is accepted (`quota`).

A failed write-back keeps the data and is tried again; its error is raised once, by the next write,
flush or fsync, unless all of the data was committed before anybody asked.  When the session was
lost the error is raised in any case: what others saw in between may have been something else.

The module is longer than most: write-back, commit and truncation share the state of a file, and
their order is the contract above.  What is pure is elsewhere (`contents`, `writebuffer`).
"""

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import trio

from dfs.client.attributes import Attr, fs_error
from dfs.client.cache import BUDGET, ChunkCache
from dfs.client.compaction import Compactor
from dfs.client.contents import INLINE, Contents, extents_of
from dfs.client.foresight import Foresight
from dfs.client.handles import FileHandle
from dfs.client.namespace import Namespace
from dfs.client.openfile import File
from dfs.client.reader import Reader
from dfs.client.session import Session
from dfs.client.store import ChunkStore
from dfs.client.writebuffer import WINDOW, Segment, Upload, WriteBuffer
from dfs.codec import Buffer
from dfs.errors import DfsError, FsError
from dfs.volume import items
from dfs.volume.items import Inode
from dfs.volume.view import Txn

log = logging.getLogger(__name__)

MAX_DIRTY = 96 << 20  # bytes of all files, uncommitted or on their way, beyond which writers wait
UPLOADS = 4  # chunks on their way at once
PARALLEL = 64  # files that the write-back commits at once
AGE = 1.0  # seconds after which dirty data is committed without being asked
# Pieces of dirty data that are committed earlier: nobody is answered while a commit works them out.
MANY = 2000
MAX_SIZE = items.MAX_OFFSET
RENEW = 6 * 3600.0  # seconds after which a chunk is put again before it is named; homes take twice
LOOK = 32  # commits of a file, of which one looks whether it is cut to pieces
INLINE_HERE = 16 << 10  # bytes that need no chunk under the delegation: many share one entry


class _Dropped(FsError):
    """The data of a commit was dropped before the commit took place."""


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
        kernel_times: bool = False,
    ) -> None:
        """Compose; nothing runs before `run`."""
        self._kernel_times = kernel_times
        self._session = session
        self._chunks = chunks
        self._namespace = namespace
        self._quota = namespace.quota
        self._contents = Contents(namespace, clear_privileges=clear_privileges)
        self._cache_bytes = cache_bytes
        self._files: dict[int, File] = {}
        self._dirty: dict[int, File] = {}  # in order of becoming dirty
        self._cutting: dict[int, int] = {}  # sizes that truncations under way give to files
        self._uncommitted = 0
        self._losses: set[int] = set()  # inodes not open here with lost changes, not told yet
        self._uploads: dict[Upload, trio.Event] = {}  # the oldest first
        self._sending = 0  # bytes in them; what was written over since is only there
        self._slots = trio.Semaphore(UPLOADS)
        self._wake = trio.Event()  # something became dirty
        self._foresight = Foresight()
        self._nursery: trio.Nursery | None = None
        self._cache: ChunkCache | None = None
        self._reader: Reader | None = None
        self._compactor: Compactor | None = None
        self._clock = session.cluster.clock
        self._commits = 0
        session.on_change(self._on_change)
        session.on_fenced(self._on_fenced)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background uploads, fetches and commits of old dirty data; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._cache = ChunkCache(self._chunks, nursery, self._cache_bytes)
            self._reader = Reader(self._session, self._cache)
            self._compactor = Compactor(
                self._session,
                self._chunks,
                self._reader,
                self._contents,
                nursery,
                self._files.get,
            )
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
            "compacted": self._compactor.saved if self._compactor else 0,
            "cache": self._cache.statistics() if self._cache else {},
        }

    # ------------------------------------------------------------------ open files

    def open(self, ino: int) -> File:
        """The file, with one more handle."""
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = File(ino)
            self._foresight.made(file)
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
        if file.buffer and not file.orphan and not self.flush_here(file):
            try:  # what went wrong before is left for who has it open still
                await self._commit(file)
            except FsError as e:
                log.warning("data of inode %x is not committed yet: %s", file.ino, e)
        file.handles -= 1
        if file.handles:
            return
        self._foresight.closed(file)
        if file.orphan:
            await self._purge(file.ino)
        self._maybe_forget(file)

    async def unlinked(self, ino: int) -> None:
        """A name of the file was removed; find out whether it was the last."""
        value = await self._session.read(lambda txn: txn.get(items.inode_key(ino)))
        if value is not None and Inode.decode(value).nlink:
            return
        file = self._files.get(ino)
        if file is not None:
            file.orphan = value is not None
            if not file.orphan:
                self._drop_dirty(file)
                self._maybe_forget(file)
        if value is not None and not self.is_open(ino):  # closed while that was on its way
            await self._purge(ino)

    async def _purge(self, ino: int) -> None:
        """Remove an orphan that nobody has open here any more."""
        file = self._files.get(ino)
        if file is not None:
            self._drop_dirty(file)
            self._maybe_forget(file)
        try:
            await self._session.transact(lambda txn: self._namespace.purge(txn, ino))
        except FsError as e:
            log.warning("orphan %x stays for now: %s", ino, e)

    def _maybe_forget(self, file: File) -> None:
        held = file.handles or file.pins or file.buffer
        if not held and self._files.get(file.ino) is file:
            del self._files[file.ino]

    def overlay(self, attr: Attr) -> Attr:
        """Put what is not committed yet over committed attributes, in place."""
        if self._cutting and (size := self._cutting.get(attr.ino)) is not None:
            attr.size = size
        file = self._dirty.get(attr.ino)
        if file is not None:
            attr.size = max(attr.size, file.buffer.end)
            attr.mtime = max(file.mtime, attr.mtime)
            attr.ctime = max(file.mtime, attr.ctime)
            attr.mode = self._contents.mode_after(attr.mode)
        return attr

    async def settle(self, ino: int) -> None:
        """Commit dirty data, so that the mode or time set next is not undone by it."""
        file = self._dirty.get(ino)
        if file is not None and not self.flush_here(file):
            await self._commit(file)  # what went wrong before is left for who syncs

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

    def _on_fenced(self, held: bool, lost: set[int]) -> None:
        """The session is over; nothing of before may overwrite what others did under delegation."""
        self._losses |= lost - self._files.keys()
        for file in list(self._files.values()):
            if file.ino in self._dirty or file.ino in lost:
                file.error, file.lost = fs_error(errno.EIO, "the session was lost"), True
                if held:
                    self._drop_dirty(file)
                    self._maybe_forget(file)

    # ------------------------------------------------------------------ writing

    async def write(self, file: File, offset: int, data: Buffer) -> int:
        """Buffer a write; waits only when too much is uncommitted."""
        self._raise_error(file)
        length = len(data)
        if offset < 0:
            raise fs_error(errno.EINVAL, f"offset {offset}")
        if offset + length > MAX_SIZE:
            raise fs_error(errno.EFBIG)
        if not length:
            return 0
        if self._quota.limited:
            await self._quota.hold(file, offset + length)
        buffer = file.buffer
        if not buffer:
            file.dirty_since = self._clock.monotonic()
            self._dirty[file.ino] = file
            self._wake.set()
        before = buffer.size
        buffer.write(offset, data)
        self._uncommitted += buffer.size - before
        self._foresight.wrote(file)
        if not self._kernel_times:
            file.mtime = self._clock.time_ns()
        if buffer.size >= WINDOW:
            for window in range(offset // WINDOW, (offset + length - 1) // WINDOW + 1):
                if buffer.loose.get(window, 0) == WINDOW:
                    self._upload_window(file, window)
        if self._uncommitted > MAX_DIRTY or self._sending > MAX_DIRTY:
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

    def _send(self, upload: Upload, *, durable: bool = False) -> None:
        upload.error = None
        self._uploads[upload] = trio.Event()
        self._sending += upload.length
        if self._nursery is None:
            raise RuntimeError("Files.run is not running")
        self._nursery.start_soon(self._put, upload, durable)

    async def _put(self, upload: Upload, durable: bool) -> None:
        try:
            async with self._slots:
                upload.stamp = self._clock.elapsed_ns()
                prepared = await self._chunks.prepare(upload.pieces)
                upload.exchange(prepared)
                await self._chunks.put_prepared(prepared, durable=durable)
                upload.chunk_id = prepared.chunk_id
        except DfsError as e:
            upload.error = e  # the commit tries again and reports
        except BaseException:  # the end of the client: nobody may commit what is not stored
            upload.error = fs_error(errno.EIO, "the client has ended")
            raise
        finally:
            self._sending -= upload.length
            self._uploads.pop(upload).set()

    async def _make_room(self, file: File) -> None:
        """Commit the writer's own file, then those that are dirty longest, until there is room.

        What goes wrong with another file is told to who uses that.  The writer is told, too, if
        there is no room for that: what it wrote is kept, but it had better not write more.
        """
        await self._commit(file)
        while self._uncommitted > MAX_DIRTY and self._dirty:
            failed: FsError | None = None
            for other in list(self._dirty.values()):
                if self._uncommitted > MAX_DIRTY:
                    failed = await self._commit_quietly(other) or failed
            if failed is not None and self._uncommitted > MAX_DIRTY:
                raise FsError(f"too much waits to be committed: {failed}", failed.errno)
        while self._sending > MAX_DIRTY:
            await next(iter(self._uploads.values())).wait()

    def _drop_dirty(self, file: File) -> None:
        self._uncommitted -= file.buffer.size
        self._quota.release(file)
        file.buffer = WriteBuffer()
        self._dirty.pop(file.ino, None)

    # ------------------------------------------------------------------ committing

    async def flush(self, file: File) -> None:
        """Commit the file's dirty data; raises what went wrong with it, now or before, once."""
        if file.buffer or file.cut >= 0:
            await self._commit(file)
        self._raise_error(file)

    def flush_here(self, file: File, *, settling: bool = False) -> bool:
        """Commit a few dirty bytes without waiting, under the delegation; False where it cannot be.

        `settling`: the caller then waits for the session to `settle`, in the same step.
        A crash still leaves a prefix of what was done here: see `dfs.client.delegation`.
        """
        buffer = file.buffer
        if not buffer:
            return file.error is None and file.cut < 0
        if (
            not self._session.here
            or file.error is not None
            or file.orphan
            or file.lock.locked()
            or buffer.size > INLINE_HERE
            or any(isinstance(s.source, Upload) for s in buffer)
        ):
            return False
        segments = list(buffer)
        try:
            done = self._session.transact_here(
                self._publication(file, buffer, segments, here=True), settling=settling
            )
        except FsError:
            return False  # whoever waits for it will meet this again, and can handle it
        if done is None:
            return False
        self._committed(file, segments, 0.0, *done[0])
        return True

    def begin_expected(self) -> None:
        """Begin the commits that somebody is about to wait for; see `dfs.client.foresight`.

        To be called when what was written is answered.
        """
        due = self._foresight.due
        while due:
            file = due.popleft()
            if file.buffer and self.flush_here(file, settling=True):
                self._session.hasten()

    def synced(self, file: File) -> None:
        """Somebody waits for what was written to the file: more may come in the same way."""
        self._foresight.synced(file)

    def raise_loss(self, ino: int) -> None:
        """Raise, once, that changes of a directory or a closed file went with a lost session."""
        if ino in self._losses:
            self._losses.discard(ino)
            raise fs_error(errno.EIO, f"what was done to inode {ino:x} was lost with the session")

    def told(self, ino: int) -> None:
        """What went wrong with the inode was told in another way."""
        self._losses.discard(ino)
        file = self._files.get(ino)
        if file is not None:
            file.error, file.lost = None, False

    def _raise_error(self, file: File) -> None:
        if file.error is not None:
            error, file.error, file.lost = file.error, None, False
            raise error

    async def flush_all(self) -> None:
        """Commit everything, many files at a time; raises the first error there is."""
        failures: dict[int, FsError] = {}

        async def flush(file: File) -> None:
            try:
                await self.flush(file)
            except FsError as e:
                failures[file.ino] = e

        while due := [f for f in self._dirty.values() if f.ino not in failures]:
            async with trio.open_nursery() as nursery:
                for file in due[:PARALLEL]:
                    nursery.start_soon(flush, file)
        for error in failures.values():
            raise error

    async def _commit(self, file: File) -> None:
        async with file.lock:
            if not file.buffer:
                return
            if file.orphan and not file.handles:
                self._drop_dirty(file)
                self._maybe_forget(file)
                return
            began, buffer = self._clock.monotonic(), file.buffer
            try:
                segments, oldest = await self._store(buffer)
                publication = self._publication(file, buffer, segments)
                size, crowded = await self._session.transact(publication, oldest=oldest, kept=True)
            except _Dropped:  # and that is told, if there is anything to tell
                return
            except FsError as e:
                if e.errno == errno.ESTALE:  # the file was removed by somebody else
                    self._drop_dirty(file)
                    self._maybe_forget(file)
                raise
            except DfsError as e:
                raise FsError(f"write-back of inode {file.ino:x}: {e}", e.errno) from e
            self._committed(file, segments, began, size, crowded)

    def _committed(
        self, file: File, segments: list[Segment], began: float, size: int, crowded: bool
    ) -> None:
        """Note that segments were committed by a transaction begun at `began`."""
        before = file.buffer.size
        file.buffer.forget(segments)
        self._uncommitted -= before - file.buffer.size
        if file.held:
            self._quota.settle(file, size)
        self._dirty.pop(file.ino, None)
        if file.buffer:
            file.dirty_since = began
            self._dirty[file.ino] = file
        elif not file.lost:
            file.error = None  # what failed before has been made up for
        self._commits += 1
        file.span, file.size = None, size
        if crowded and self._compactor:
            bulk = isinstance(segments[0].source, Upload)
            self._compactor.want(file, segments[0].start, segments[-1].end, bulk=bulk)
        self._maybe_forget(file)

    async def _store(self, buffer: WriteBuffer) -> tuple[list[Segment], int]:
        """Make the bytes of the dirty segments durable, unless they are few enough to be inline.

        Returns the segments, and the stamp of the chunk among them that was sent first, 0 for none.
        """
        limit = INLINE_HERE if self._session.here else INLINE
        if buffer.size <= limit and not any(isinstance(s.source, Upload) for s in buffer):
            return list(buffer), 0
        self._pack(buffer)
        # All of them, though some may be written over before the last chunk is stored: what is
        # committed is the file as it was at one moment, and never nothing, however fast it changes.
        segments = list(buffer)
        wanted = list(dict.fromkeys(s.source for s in segments if isinstance(s.source, Upload)))
        late = self._clock.elapsed_ns() - int(RENEW * 1e9)
        for upload in wanted:
            if (upload.error is not None or upload.stamp < late) and upload not in self._uploads:
                self._send(upload)
        for upload in wanted:
            event = self._uploads.get(upload)
            if event is not None:
                await event.wait()
        for upload in wanted:
            if upload.error is not None:
                raise upload.error
        await self._chunks.sync()
        return segments, min(upload.stamp for upload in wanted)

    def _pack(self, buffer: WriteBuffer) -> None:
        """Send what is in no chunk yet, adjacent pieces together, short ones in shared chunks."""
        lone = not any(isinstance(s.source, Upload) for s in buffer)
        uploads = buffer.pack()
        for upload in uploads:
            # A lone chunk is synced by its put, which saves the round trip of a barrier.
            self._send(upload, durable=lone and len(uploads) == 1)

    def _publication(
        self, file: File, buffer: WriteBuffer, segments: list[Segment], *, here: bool = False
    ) -> Callable[[Txn], tuple[int, bool]]:
        """The transaction with the extents of stored segments of a buffer, the size and the times.

        `here`: it is committed under the delegation; then only one of `LOOK` commits counts the
        extents that are there.
        """
        ino, mtime = file.ino, file.mtime
        new = extents_of(segments)
        file.looks += 1
        look = not here or file.looks % LOOK == 0

        def publish(txn: Txn) -> tuple[int, bool]:
            if file.buffer is not buffer:  # a transaction may wait for another session
                raise _Dropped("what was written is given up", errno.EIO)
            return self._contents.publish(txn, ino, new, mtime, look=look)

        return publish

    async def truncate(self, ino: int, size: int) -> None:
        """Cut or extend (with zeros) a file to `size` bytes."""
        if size < 0:
            raise fs_error(errno.EINVAL)
        if size > MAX_SIZE:
            raise fs_error(errno.EFBIG)
        file = self._files.get(ino)
        if self._truncate_here(file, ino, size):
            return
        if file is None:  # whoever opens it meanwhile shall know of this
            file = self._files[ino] = File(ino)
        file.pins += 1
        try:
            async with file.lock:
                await self._truncate(file, size)
        finally:
            file.pins -= 1
            self._maybe_forget(file)

    def _truncate_here(self, file: File | None, ino: int, size: int) -> bool:
        """Truncate under the delegation, where nothing of the file waits to be committed."""
        if not self._session.here or (
            file is not None and (file.buffer or file.held or file.lock.locked())
        ):
            return False
        truncate, now = self._contents.truncate, self._clock.time_ns()
        if self._session.transact_here(lambda txn: truncate(txn, ino, size, now)) is None:
            return False
        if file is not None:
            file.size, file.span = size, None
        return True

    async def _truncate(self, file: File, size: int) -> None:
        """From its first step on the file is shown as it will be, and written as if it were so.

        In between it would be neither as before nor as after: what is not committed is cut at once,
        what is committed when the transaction is.  If that fails, all of it is as it was before.
        """
        ino, buffer, truncate = file.ino, file.buffer, self._contents.truncate
        now = self._clock.time_ns()
        quota = self._quota
        if quota.limited:
            await quota.reserve(file, size)

        def op(txn: Txn) -> None:
            held = quota.release(file)  # or what this adds would count twice
            try:
                truncate(txn, ino, size, now)
            finally:
                quota.regain(file, held)

        # What is held for more than the new size is held on, should the transaction fail.
        before = file.size if 0 <= file.size < size else size
        file.counted = before - (file.held - (size - before))
        cut = buffer.overlapping(size, sys.maxsize)
        self._resize(file, lambda: buffer.cut(size, sys.maxsize))
        file.cut = self._cutting[ino] = size
        try:
            await self._session.transact(op)
        except BaseException:
            if file.buffer is buffer:
                self._resize(file, lambda: buffer.restore(size, cut))
            file.size = -1
            if not file.buffer:
                quota.release(file)
            raise
        else:
            file.size = size
            quota.settle(file, size)
            if file.buffer and not self._kernel_times:
                file.mtime = max(file.mtime, now)  # or the next commit would set it back
        finally:
            file.cut = -1
            del self._cutting[ino]
            file.span = None

    def _resize(self, file: File, change: Callable[[], None]) -> None:
        """Change what is in a file's buffer by other means than a write or a commit."""
        before = file.buffer.size
        change()
        self._uncommitted += file.buffer.size - before
        if not file.buffer:
            self._dirty.pop(file.ino, None)
        elif file.ino not in self._dirty:
            file.dirty_since = self._clock.monotonic()
            self._dirty[file.ino] = file
            self._wake.set()

    async def _write_back(self) -> None:
        """Commit what was dirty for `AGE` seconds, or is much; sleeps while nothing is dirty."""
        while True:
            if not self._dirty:
                self._wake = trio.Event()
                await self._wake.wait()
            now = self._clock.monotonic()
            due = [
                f
                for f in self._dirty.values()
                if (age := now - f.dirty_since) >= AGE or (age >= 0 and len(f.buffer) >= MANY)
            ]
            async with trio.open_nursery() as nursery:
                for file in due[:PARALLEL]:
                    nursery.start_soon(self._commit_quietly, file)
            await trio.sleep(AGE / 4)

    async def _commit_quietly(self, file: File) -> FsError | None:
        """Commit; an error is kept for the next write, flush or fsync, and returned."""
        try:
            await self._commit(file)
        except FsError as e:
            file.error = file.error or e
            file.dirty_since = self._clock.monotonic() + AGE  # not at once again
            log.warning("write-back of inode %x: %s", file.ino, e)
            return e
        return None

    # ------------------------------------------------------------------ reading

    async def read(self, handle: FileHandle, offset: int, length: int) -> Buffer:
        """Up to `length` bytes at `offset`: committed data under what is not committed yet."""
        if self._reader is None:
            raise RuntimeError("Files.run is not running")
        if offset < 0 or length < 0:
            raise fs_error(errno.EINVAL, f"{length} bytes at {offset}")
        if offset + length > MAX_SIZE:
            length = max(0, MAX_SIZE - offset)
            offset = min(offset, MAX_SIZE)
        return await self._reader.read(handle, offset, length)

    def whole_nowait(self, handle: FileHandle, limit: int) -> Buffer | None:
        """All of a small file whose only handle this is, if it is at hand and committed."""
        file = handle.file
        if file.handles != 1 or self._reader is None:
            return None
        return self._reader.whole_nowait(file, limit)
