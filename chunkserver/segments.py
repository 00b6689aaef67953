"""The chunks on one disk: append-only segment files, one index in memory, group commit.

Who holds what.  All state is changed by the loop, between awaits.  Appends take turns by `_turn`;
whatever an append decides from the index (is this chunk here already?) it decides while it has the
turn.  Blocking work runs through `Disk.run`, small appends run inline: a page-cache write of one
block is cheaper than the way to a thread and back.  A read holds its segment open by a count, so
that unlinking it meanwhile is harmless.

`put` and `touch` return when the record is in the page cache, `sync` when everything before it is
on the disk.  A failed write or sync makes the store refuse writes for good: what the kernel has
after an fsync error is unknown.  Reads go on, since a chunk proves itself.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from chunkserver import records
from chunkserver.index import Entry, Index
from chunkserver.ledger import Ledger, Usage
from chunkserver.quarantine import Quarantine
from chunkserver.records import DROP, PUT, TOMBSTONE, TOUCH, Record
from chunkserver.recovery import SEGMENTS, Recovery, Segment, hint_name, recover, segment_name
from dfs.buffers import allocate_aligned
from dfs.chunks import format as chunks
from dfs.env import Buffer, Disk, DiskFile, Env
from dfs.errors import Corrupt, DiskFull, NotFound, StoreFailed
from dfs.groupsync import GroupSync
from dfs.limits import DiskWatch, Limits


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Sizes and limits of a chunk store."""

    segment_size: int = 1 << 30  # a segment ends before it grows over this
    near: float = 85.0  # per cent of the disk, see `dfs.limits`: a warning,
    backfill: float = 90.0  # nothing from other servers,
    full: float = 95.0  # no puts ...
    reserve: int = 256 << 20  # ... nor with fewer bytes free; deletes and compaction need room
    hint_every: int = 64 << 20  # synced bytes after which the active segment gets a new hint
    inline: int = 80 << 10  # appends up to this size are written without a thread
    remember: int = 72 * 3600 * 10**9  # ns for which verdicts of the collector are known

    @property
    def limits(self) -> Limits:
        """Of the disk."""
        return Limits(self.near, self.backfill, self.full, self.reserve)


class _Write(NamedTuple):
    kind: int
    chunk_id: bytes
    extra: int
    stamp: int
    buffers: Sequence[Buffer] = ()
    size: int = 0
    pages: memoryview | None = None  # the payload behind room for the header, see `room_for`


class Segments:
    """A store of encoded chunks; made by `open`."""

    def __init__(self, env: Env, options: StoreOptions, ledger: Ledger, found: Recovery) -> None:
        """Use `open`."""
        self._disk = env.disk
        self._random = env.random
        self._clock = env.clock
        self._options = options
        self._ledger = ledger
        self._segments = found.segments
        self._active: Segment = max(found.segments.values(), key=lambda s: s.number)
        self._turn = trio.Lock()  # who appends
        self._hinting = trio.Lock()  # who writes a hint file
        self._reaping = trio.Lock()  # who unlinks segments
        self._group = GroupSync(env.disk, self._active_file)
        self.index: Index = ledger.index
        self.room = DiskWatch(options.limits, env.disk.usage, env.disk.path())
        self.quarantine = Quarantine(env.disk)
        self.recovery = found
        self.failed = ""  # why writes are refused
        self.on_unlink: Callable[[int], None] | None = None  # told the number of a removed segment
        self._puts = self._touches = self._bytes = 0

    @classmethod
    async def open(cls, env: Env, options: StoreOptions | None = None) -> "Segments":
        """Recover the store under the disk's `segments/`; an empty directory is an empty store.

        `.recovery` tells what was found.  Raises `StoreFailed` or `DiskFull`.
        """
        options = options or StoreOptions()
        ledger = Ledger(options.remember)
        found = await env.disk.run(recover, env.disk, ledger)
        ledger.prune(env.clock.time_ns())
        if not found.segments:
            nonce = env.random.randbytes(records.NONCE)
            first = await env.disk.run(_create, env.disk, 1, nonce)
            found.segments[1] = first
            ledger.segments[1] = Usage()
        store = cls(env, options, ledger, found)
        for segment in list(found.segments.values()):
            if segment is store._active:
                continue
            if segment.covered < segment.size:
                await env.disk.run(segment.file.fdatasync)
                await store._write_hint(segment, segment.size, len(segment.log))
            segment.log = bytearray()
        for entry in found.garbage:
            await store._punch(entry)
        await store._reap()
        return store

    # ------------------------------------------------------------------------------------ writing

    def held(self, chunk_id: bytes) -> bool:
        """Whether the chunk is here."""
        return self.index.get(chunk_id) is not None

    def condemned(self, chunk_id: bytes, stamp: int) -> bool:
        """See `Ledger.condemned`."""
        return self._ledger.condemned(chunk_id, stamp)

    async def put(
        self,
        chunk_id: bytes,
        buffers: Sequence[Buffer],
        size: int,
        plain: int,
        stamp: int,
        *,
        moved: bool = False,
        pages: memoryview | None = None,
    ) -> bool:
        """Append a verified encoded chunk of `size` bytes; False if it was held (and is touched).

        `pages`: what `room_for` gave, with the chunk in its place; then `buffers` are not used.
        `moved`: others could keep it instead, so that a disk which is nearly full refuses it.
        Raises `DiskFull` naming the disk and what is free, `StoreFailed`.
        """
        if self.index.get(chunk_id) is None:
            if moved:
                self.room.check_move(size)
            else:
                self.room.check_write(size)
        write = _Write(PUT, chunk_id, plain, stamp, buffers, size, pages)
        new = await self._append([write])
        self._puts += new
        self._bytes += size * new
        return bool(new)

    async def renew(self, chunk_id: bytes, stamp: int) -> bool:
        """Renew the stamp of a chunk, as a put of it does; False if it is not here."""
        if self.index.get(chunk_id) is None:
            return False
        await self._append([_Write(TOUCH, chunk_id, 0, stamp)])
        return self.index.get(chunk_id) is not None

    async def touch(self, chunk_ids: Iterable[bytes], stamps: int | Sequence[int]) -> list[bool]:
        """Renew the stamps of chunks, durably; False for those that are not here.

        `stamps`: one for all, or one for each.
        """
        ids = list(chunk_ids)
        each = [stamps] * len(ids) if isinstance(stamps, int) else stamps
        await self._append([_Write(TOUCH, i, 0, s) for i, s in zip(ids, each, strict=True)])
        await self.sync()
        self._touches += len(ids)
        return [self.index.get(i) is not None for i in ids]

    async def delete(self, chunk_ids: Iterable[bytes], stamp: int) -> None:
        """Condemn chunks, held or not: tombstones, durable, then their space is given back."""
        await self._kill(TOMBSTONE, chunk_ids, stamp)

    async def drop(self, chunk_ids: Iterable[bytes]) -> None:
        """Remove copies without a verdict on the chunks; durable, the space is given back."""
        await self._kill(DROP, [i for i in chunk_ids if self.held(i)], 0)

    async def set_aside(self, chunk_id: bytes, reason: str) -> bool:
        """Quarantine the copy that is held: listed, out of the index; False if there was none."""
        entry = self.index.get(chunk_id)
        if entry is None:
            return False
        segment = self._segments[entry.segment]
        segment.readers += 1
        try:
            await self._disk.run(self._list_bad, segment, chunk_id, entry, reason)
        finally:
            segment.release()
        now = self.index.get(chunk_id)
        if now is not None and (now.segment, now.offset) == (entry.segment, entry.offset):
            await self._kill(DROP, [chunk_id], 0)
        return True

    def _list_bad(self, segment: Segment, chunk_id: bytes, entry: Entry, reason: str) -> None:
        try:
            data = segment.file.pread(entry.stored, entry.offset)
        except StoreFailed:  # the reason says so already
            data = b""
        self.quarantine.add(chunk_id, entry.segment, entry.offset, reason, data)

    async def healed(self, chunk_id: bytes) -> None:
        """A good copy is here again: take the bad one off the listing."""
        if chunk_id in self.quarantine.ids and self.held(chunk_id):
            await self._disk.run(self.quarantine.remove, chunk_id)

    async def sync(self) -> None:
        """Return when everything put, touched or deleted so far is durable."""
        self._check_failed()
        segment = self._active
        mark, entries = segment.size, len(segment.log)
        try:
            await self._group.sync()
        except StoreFailed as e:
            self.failed = str(e)
            raise
        if mark - segment.covered >= self._options.hint_every and segment is self._active:
            await self._write_hint(segment, mark, entries)

    async def close(self) -> None:
        """Sync, write the hint of the active segment, close the files: the next start is quick."""
        if not self.failed:
            async with self._turn:
                await self.sync()
                active = self._active
                if active.covered < active.size:
                    await self._write_hint(active, active.size, len(active.log))
        for segment in self._segments.values():
            segment.file.close()

    def _active_file(self) -> DiskFile:
        return self._active.file

    def _check_failed(self) -> None:
        if self.failed:
            raise StoreFailed(f"the chunk store accepts no writes any more: {self.failed}")

    async def _append(self, writes: list[_Write]) -> int:
        """Write records in one append and account for them; returns how many were new chunks."""
        self._check_failed()
        total = sum(w.size for w in writes) + len(writes) * records.RECORD_HEADER
        inline = total <= self._options.inline
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            writes = [w for w in map(self._as_needed, writes) if w is not None]
            if not writes:
                return 0
            self._check_failed()
            active = self._active
            pages = writes[0].pages
            if pages is not None:
                total = len(pages) + records.aligned(active.size) - active.size
            if active.size + total > self._options.segment_size and active.log:
                await self._roll()
                active = self._active
            buffers: list[Buffer] = []
            for kind, chunk_id, extra, stamp, payload, size, _ in writes:
                head = records.record_header(active.seed, kind, chunk_id, size, extra, stamp)
                buffers.append(head)
                buffers += payload
            try:
                expected = active.size
                if pages is not None:
                    expected = records.aligned(expected)
                    pages[: records.RECORD_HEADER] = buffers[0]
                    at = await self._disk.run(active.file.append_pages, pages)
                elif inline:
                    at = active.file.append(buffers)
                else:
                    at = await self._disk.run(_stream, active.file, buffers)
            except StoreFailed as e:
                self.failed = str(e)
                raise
            if at != expected:
                self.failed = f"segment {active.number} was changed by somebody else"
                raise StoreFailed(self.failed)
            active.size = at
            new = self._account(active, writes)
            if pages is not None:
                active.size = at + len(pages)
            return new
        finally:
            self._turn.release()

    def _as_needed(self, write: _Write) -> _Write | None:
        """The record that a write comes to, now that it is its turn; None for none at all."""
        if write.kind not in (PUT, TOUCH):
            entry = self.index.get(write.chunk_id)
            return write._replace(extra=entry.segment if entry else 0)
        entry = self.index.get(write.chunk_id)
        if entry is None:
            return write if write.kind == PUT else None
        if write.stamp <= entry.stamp:
            return None
        return _Write(TOUCH, write.chunk_id, 0, write.stamp)

    def _account(self, active: Segment, writes: list[_Write]) -> int:
        new = 0
        for kind, chunk_id, extra, stamp, _, size, _ in writes:
            record = Record(kind, active.size, chunk_id, size, extra, stamp)
            self._ledger.apply(active.number, record)
            active.log += records.entry(*record)
            active.size = record.end
            new += kind == PUT
        return new

    # ----------------------------------------------------------------------- segments and space

    async def _roll(self) -> None:
        """Seal the active segment and start the next; the caller has the turn."""
        old = self._active
        try:
            await self._disk.run(old.file.fdatasync)
            await self._write_hint(old, old.size, len(old.log))
            nonce = self._random.randbytes(records.NONCE)
            number = old.number + 1
            new = await self._disk.run(_create, self._disk, number, nonce)
        except StoreFailed as e:
            self.failed = str(e)
            raise
        old.log = bytearray()
        self._segments[number] = new
        self._ledger.segments[number] = Usage()
        self._active = new

    async def _write_hint(self, segment: Segment, covered: int, entries: int) -> None:
        """Hint the first `covered` bytes, which are synced; a full disk leaves the old hint."""
        async with self._hinting:
            if covered <= segment.covered:
                return
            data = records.encode_hint(
                segment.number, segment.nonce, covered, segment.log[:entries]
            )
            try:
                await self._disk.run(self._disk.write_atomic, hint_name(segment.number), data)
            except DiskFull as e:  # costs time at the next start, nothing else
                self.recovery.notes.append(f"no hint for segment {segment.number}: {e}")
                return
            segment.covered = covered

    async def _kill(self, kind: int, chunk_ids: Iterable[bytes], stamp: int) -> None:
        ids = list(dict.fromkeys(chunk_ids))
        if not ids:
            return
        writes = [_Write(kind, i, 0, stamp) for i in ids]
        freed = [e for i in ids if (e := self.index.get(i)) is not None]
        try:
            await self._append(writes)
        except DiskFull:
            # The disk is full to the last byte: make room first.  A crash now leaves chunks that
            # fail verification, and the collector condemns them again at the other homes.
            for entry in freed:
                await self._punch(entry)
            await self._append(writes)
        await self.sync()
        for entry in freed:
            await self._punch(entry)
        await self._reap()

    async def _punch(self, entry: Entry) -> None:
        segment = self._segments.get(entry.segment)
        if segment is not None:
            segment.readers += 1
            try:
                await self._disk.run(segment.file.punch, entry.offset, entry.stored)
            finally:
                segment.release()

    async def _reap(self) -> None:
        """Unlink segments that nothing needs, one after the other: a tombstone outlives its PUT."""
        async with self._reaping:
            now = self._clock.time_ns()
            self._ledger.prune(now)
            for number in self._ledger.removable(self._active.number, now):
                await self._disk.run(self._unlink, number)
                self._ledger.forget(number)
                if self.on_unlink is not None:
                    self.on_unlink(number)
                segment = self._segments.pop(number)
                segment.readers += 1
                segment.doomed = True
                segment.release()

    def _unlink(self, number: int) -> None:
        self._disk.unlink(hint_name(number))
        self._disk.sync_dir(SEGMENTS)  # a hint without its segment would mean loss
        self._disk.unlink(segment_name(number))
        self._disk.sync_dir(SEGMENTS)

    # ------------------------------------------------------------------------------------ reading

    async def read(
        self, chunk_id: bytes, first: int = 0, count: int = -1
    ) -> tuple[int, list[Buffer]]:
        """`(plain length, [header, blocks])` of `count` blocks from `first`; -1 = to the end.

        Not verified: the reader does that.  Raises `NotFound`, or `Corrupt` when the header's form
        is wrong or the disk cannot read.
        """
        entry = self.index.get(chunk_id)
        if entry is None:
            raise NotFound(f"chunk {chunk_id.hex()[:16]} is not here")
        segment = self._segments[entry.segment]
        segment.readers += 1
        try:
            return entry.plain, await self._disk.run(_read, segment.file, entry, first, count)
        except StoreFailed as e:
            raise Corrupt(f"chunk {chunk_id.hex()[:16]} cannot be read: {e}") from e
        finally:
            segment.release()

    async def check(self, chunk_id: bytes) -> int:
        """Read and verify the whole copy; returns its stored length.  Raises as `read`."""
        _, buffers = await self.read(chunk_id)
        await self._disk.run(chunks.verify, buffers[0], chunk_id)
        return len(buffers[0])

    def statistics(self) -> dict[str, int]:
        """Counts for status pages."""
        return {
            "chunks": len(self.index),
            "stored_bytes": self.index.stored_bytes,
            "segments": len(self._segments),
            "quarantined": len(self.quarantine.ids),
            "puts": self._puts,
            "put_bytes": self._bytes,
            "touches": self._touches,
            "syncs": self._group.statistics()["syncs"],
        }


def _create(disk: Disk, number: int, nonce: bytes) -> Segment:
    """Make a durable, empty segment file; blocking."""
    file = disk.open(segment_name(number), create=True, truncate=True)
    file.append([records.segment_header(number, nonce)])
    file.fdatasync()
    disk.sync_dir(SEGMENTS)
    return Segment(number, file, nonce, records.SEGMENT_HEADER)


def room_for(size: int) -> tuple[memoryview, memoryview]:
    """Pages for the record of a chunk of `size` bytes, and the part of them that is the chunk.

    Give the pages to `Segments.put` when the chunk is there.
    """
    end = records.RECORD_HEADER + size
    pages = allocate_aligned(records.aligned(end))
    pages[end:] = bytes(len(pages) - end)
    return pages, pages[records.RECORD_HEADER : end]


def _stream(file: DiskFile, buffers: Sequence[Buffer]) -> int:
    """Append what is large: several servers have it, and few of them are ever asked for it."""
    return file.append(buffers, cached=False)


def _read(file: DiskFile, entry: Entry, first: int, count: int) -> list[Buffer]:
    """Header and blocks of a stored chunk, in one or two reads; blocking."""
    blocks = chunks.block_count(entry.plain)
    last = blocks if count < 0 else min(blocks, first + count)
    if first == 0 and last == blocks:
        whole = file.pread(entry.stored, entry.offset)
        if len(whole) != entry.stored:
            raise Corrupt(f"segment {entry.segment} ends in the middle of a chunk")
        return [whole]
    head = file.pread(chunks.header_size(entry.plain), entry.offset)
    header = chunks.Header.parse(head)
    if header.length != entry.plain:
        raise Corrupt(f"chunk at {entry.offset} of segment {entry.segment} has another length")
    if not 0 <= first < last:
        return [head]
    start, end = header.offsets[first], header.offsets[last]
    return [head, file.pread(end - start, entry.offset + header.size + start)]
