"""The log of all journals of a node: append-only segments, one sync for everybody, recovery.

Records of all journals go, in the order they were made, to the end of the active segment; one
writer task appends what has gathered, syncs it, and then releases everything that waited for it.
On a quick medium that is done at the end of the turn of messages that brought the records, and the
task sleeps on.
An index per journal finds an entry in its segment.

`metadata.journalformat` holds the format and says what recovery makes of a bad record.

The active segment ends in zeros, written ahead, so that a sync does not have to make a new file
size durable too, which takes the file system a second flush.  `make_room` does that: a task of its
own, on a thread, a step each time a step of the room was used, so that no record waits for it.
Nothing is written beyond the room while a step is under way: what does not fit waits for it.  When
none is, because that task does not run, found the disk full, or a batch is larger than the room, a
batch brings its own zeros; it is the one to meet a full disk.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import trio

from dfs.env import Disk
from dfs.errors import Busy, Corrupt, DiskFull, StoreFailed
from dfs.groupsync import GroupSync
from metadata.journalformat import (
    HEADER,
    MAGIC,
    MARK_SIZE,
    RECORD,
    decode,
    encode,
    header,
    mark,
    parse,
    record_at,
)
from metadata.journalindex import Index, Segment
from metadata.journalstate import ENTRY, PROMISED, Record, State, replay

SEGMENT_BYTES = 64 << 20
AHEAD = 1 << 20  # bytes of zeros after the last record, at most 1/4 of a segment
STEPS = 4  # in which they are written: small ones, since a sync meanwhile has to wait for one
RETRY_FULL = 0.5  # seconds between attempts to write to a full disk
IDLE_MARK = 0.2  # seconds of idleness before the last sync is marked
CARRY_SHARE = 4  # a sealed segment with less than 1/4 live bytes is emptied


class JournalLog:
    """The open log; made by `open`, driven by `run`."""

    def __init__(self, disk: Disk, prefix: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Use `open`."""
        self._disk = disk
        self._prefix = prefix
        self._limit = segment_bytes
        self._step = bytes(min(AHEAD, segment_bytes // 4) // STEPS)
        self._ahead = len(self._step) * STEPS
        self._segments: dict[int, Segment] = {}  # oldest first; the last one is active
        self._index: dict[bytes, Index] = {}
        self._active: Segment
        self._sync = GroupSync(disk, lambda: self._active.file)
        self._buffer: list[tuple[bytes, Record, list[bytes]]] = []  # the last: as it is written
        self._gathered = 0  # bytes of them
        self._extending = False  # a step of room is being made: nothing is written beyond the room
        self._extender: trio.lowlevel.Task | None = None  # parked: there is room
        self._made_room = trio.Event()  # when the step under way has ended
        self._hurry = False  # records wait for that: no other step begins before they are written
        self._waiting: dict[int, list[tuple[Callable[..., Any], tuple[Any, ...]]]] = {}
        self._parked: trio.lowlevel.Task | None = None
        self._failure: StoreFailed | None = None  # for the task to raise
        self.later: Callable[[Callable[[], None]], bool] | None = None  # see `dfs.env.Rpc.later`
        self._synced = 0  # offset in the active segment
        self._marked = 0
        self._idle_since = 0.0
        self.batch = 1  # the batch that gathers now
        self.durable = 0  # the last batch that is durable
        self.full: DiskFull | None = None
        self.cut: list[str] = []  # torn tails found by recovery, for people

    # -------------------------------------------------------------------------------- recovery

    @classmethod
    async def open(
        cls, disk: Disk, prefix: str = "journals", *, segment_bytes: int = SEGMENT_BYTES
    ) -> tuple["JournalLog", dict[bytes, State]]:
        """Recover the log under a directory: the log and the state of every journal in it.

        Raises `StoreFailed`, naming file and offset, when records that were durable are missing.
        """
        log = cls(disk, prefix, segment_bytes=segment_bytes)
        return log, await disk.run(log._recover)

    def _fail(self, where: str, error: object) -> StoreFailed:
        path = self._disk.path(where)
        return StoreFailed(
            f"journal log {path} {error}; promises may be lost, so this node must not vote: "
            "keep the directory for inspection and replace the node under a new id"
        )

    def _recover(self) -> dict[bytes, State]:
        disk, prefix = self._disk, self._prefix
        disk.mkdir(prefix)
        names = sorted(n for n in disk.listdir(prefix) if n.endswith(".log"))
        numbers = [int(n[:-4]) for n in names]
        if any(b != a + 1 for a, b in pairwise(numbers)):
            raise self._fail(prefix, f"has gaps between its segments {numbers}")
        if numbers and not self._usable(names[-1]):
            disk.unlink(f"{prefix}/{names[-1]}")  # made just before a crash, never used
            del numbers[-1], names[-1]
        records: dict[bytes, list[Record]] = {}
        segments = self._segments
        for number, name in zip(numbers, names, strict=True):
            path = f"{prefix}/{name}"
            file = disk.open(path)
            size = file.size()
            data = file.pread(size, 0)
            try:
                found, end = parse(data, number, last=number == numbers[-1])
            except Corrupt as e:
                raise self._fail(path, e) from e
            segment = segments[number] = Segment(number, path, file, end)
            for volume, record, start, stop in found:
                records.setdefault(volume, []).append(record)
                self._indexed(volume).enter(record, segment, start, stop, segments, loose=True)
            if end < size:
                if data.count(0, end) < size - end:
                    self.cut.append(f"{disk.path(path)} was cut from {size} to {end} bytes")
                file.truncate(end)
            # What survived without having been synced is about to be relied on.
            file.fdatasync()
        states = {}
        for volume, mine in records.items():
            try:
                states[volume] = replay(mine)
            except Corrupt as e:
                raise self._fail(prefix, f"volume {volume.hex()}: {e}") from e
        made = f"{prefix}.made"
        if numbers:
            self._active = self._segments[numbers[-1]]
        elif disk.exists(made):
            raise self._fail(prefix, "is empty, but it was not")
        else:
            self._create(1)
        disk.sync_dir(prefix)
        if not disk.exists(made):
            disk.write_atomic(made, MAGIC)
        self._synced = self._active.end
        return states

    def _usable(self, name: str) -> bool:
        file = self._disk.open(f"{self._prefix}/{name}")
        try:
            size = file.size()
            return size > HEADER.size or file.pread(size, 0) == header(int(name[:-4]))
        finally:
            file.close()

    def _create(self, number: int) -> None:
        name = f"{self._prefix}/{number:012d}.log"
        file = self._disk.open(name, create=True, truncate=True)
        file.append([header(number)])
        file.fdatasync()  # before there is anything behind it: see `_usable`
        self._disk.sync_dir(self._prefix)
        segment = Segment(number, name, file, HEADER.size)
        try:
            file.pwrite(self._step * STEPS, HEADER.size)
            file.fdatasync()
            segment.size += self._ahead
        except DiskFull:
            segment.cramped = True  # whether there is room for records, they will see
        self._active = self._segments[number] = segment
        self._synced = self._marked = HEADER.size

    # ---------------------------------------------------------------------------------- reading

    def _indexed(self, volume: bytes) -> Index:
        index = self._index.get(volume)
        if index is None:
            index = self._index[volume] = Index()
        return index

    def read(self, volume: bytes, seq: int) -> tuple[bytes, bytes]:
        """(prev_hash, payload) of an entry; raises `StoreFailed` when it is damaged."""
        for owner, record, _ in reversed(self._buffer):
            if owner == volume and record[0] == ENTRY and record[1] == seq:
                return record[3], record[4]
        index = self._index[volume]
        at = seq - index.first
        segment = self._segments[index.segments[at]]
        start, end = index.starts[at], index.ends[at]
        data = segment.file.pread(end - start, start)
        found = record_at(memoryview(data), 0)
        if found is None or found[:2] != (ENTRY, volume):
            raise self._fail(segment.name, f"at offset {start}: entry {seq} is damaged")
        record = decode(ENTRY, data[RECORD.size :])
        return record[3], record[4]

    # ---------------------------------------------------------------------------------- writing

    def append(self, volume: bytes, record: Record) -> int:
        """Add a record to the batch that gathers; the number of that batch."""
        made = encode(volume, record)
        self._buffer.append((volume, record, made))
        self._gathered += sum(map(len, made))
        if self._parked is not None and (self.later is None or not self.later(self._write_now)):
            self._wake()
        return self.batch

    def _wake(self) -> None:
        parked = self._parked
        if parked is not None:
            self._parked = None
            trio.lowlevel.reschedule(parked)

    def when_durable(self, batch: int, fn: Callable[..., Any], *args: Any) -> None:
        """Call `fn(*args)` from the loop once the batch, which is not durable yet, is."""
        self._waiting.setdefault(batch, []).append((fn, args))

    async def sync(self) -> None:
        """Return when everything appended so far is durable."""
        batch = self.batch if self._buffer else self.batch - 1
        if batch > self.durable:
            done = trio.Event()
            self.when_durable(batch, done.set)
            await done.wait()

    def _fits(self) -> bool:
        """Whether what has gathered may be written now.

        It may not while room is being made beyond which it would reach: those zeros would go over
        it.
        """
        segment = self._active
        return not self._extending or segment.end + MARK_SIZE + self._gathered <= segment.size

    async def make_room(self) -> None:
        """Keep zeros ahead of the records until cancelled; raises `StoreFailed` as `run` does."""
        while True:
            segment = self._active
            if not self._lacks_room(segment):
                self._extender = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._unpark_extender)
                continue
            self._extending = True
            size = segment.size
            try:
                await self._disk.run(self._extend, segment, size)
                segment.size = size + len(self._step)
            except (DiskFull, Busy):  # or there are no descriptors
                segment.cramped = True
            finally:
                self._extending = False
                made, self._made_room = self._made_room, trio.Event()
                made.set()

    def _lacks_room(self, segment: Segment) -> bool:
        """Whether a step is to be made; not in a segment that is about to be sealed."""
        return (
            segment.size + len(self._step) <= segment.end + self._ahead
            and segment.end < self._limit
            and not (segment.cramped or self._hurry)
        )

    def _extend(self, segment: Segment, size: int) -> None:
        """On a thread: write a step of zeros at `size`, and make the new size durable.

        By a descriptor of its own: the kernel tells each of an error of writing back once, and who
        syncs records must not miss it.  As some media forget what failed however often it is asked
        for, what fails here fails everybody from then on.
        """
        try:
            file = self._disk.open(segment.name)
            try:
                file.pwrite(self._step, size)
                file.fdatasync()
            finally:
                file.close()
        except StoreFailed as e:
            self._failure = e
            raise

    def _unpark_extender(self, _: object) -> trio.lowlevel.Abort:
        self._extender = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def run(self) -> None:
        """Write and sync until cancelled; raises `StoreFailed` when the disk failed."""
        while True:
            # Who woke us has sent what was to be sent along; before another batch all have a turn.
            woken = False
            while not self._buffer and self._failure is None:
                woken = True
                self._parked = trio.lowlevel.current_task()
                self._idle_since = trio.current_time()
                await trio.lowlevel.wait_task_rescheduled(self._unpark)
            if self._failure is not None:
                raise self._failure
            try:
                full = self._active.end >= self._limit
                if self._extending and (full or not self._fits()):
                    self._hurry = True
                    await self._made_room.wait()
                    self._hurry = False
                    continue
                if full:
                    await self._rotate()
                self._write()
            except DiskFull as e:
                self.full = e
                await trio.sleep(RETRY_FULL)
                continue
            self.full = None
            batch, end = self.batch, self._active.end
            self.batch = batch + 1
            await self._sync.sync(turn=not woken)
            if self._failure is not None:
                raise self._failure
            self._tell(batch, end)

    def _tell(self, batch: int, end: int) -> None:
        """A batch is durable, and with it the active segment up to `end`."""
        self._synced = end
        self.durable = batch
        for fn, args in self._waiting.pop(batch, ()):
            fn(*args)

    def _write_now(self) -> None:
        """Write and sync what has gathered if the task waits for it and the medium is quick.

        What is not as simple as that is left to the task.
        """
        if self._parked is None or not self._buffer:
            return
        try:
            done = (
                self._active.end < self._limit
                and self._fits()
                and self._disk.sync_nowait(self._write_through)
            )
        except DiskFull:
            done = False  # the task meets it again
        except StoreFailed as e:
            done, self._failure = False, e
        if not done:
            self._wake()
            return
        batch = self.batch
        self.batch = batch + 1
        self._idle_since = trio.current_time()
        self._tell(batch, self._active.end)

    def _write_through(self) -> None:
        self._write()
        self._active.file.fdatasync()
        if self._failure is not None:
            raise self._failure

    def _unpark(self, _: object) -> trio.lowlevel.Abort:
        self._parked = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _write(self) -> None:
        segment = self._active
        start = segment.end
        buffers = [mark(segment.number, start, self._synced)]
        at = start + MARK_SIZE
        for _, _, made in self._buffer:
            buffers += made
        end = at + self._gathered
        if end > segment.size:
            buffers.append(self._step)
            segment.file.pwrite(b"".join(buffers), start)
            segment.size = end + len(self._step)
            segment.cramped = False
        else:
            segment.file.pwrite(b"".join(buffers), start)
        gathered, self._buffer, self._gathered = self._buffer, [], 0
        segment.end = end
        self._marked = self._synced
        for volume, record, made in gathered:
            begin = at
            for part in made:
                at += len(part)
            self._indexed(volume).enter(record, segment, begin, at, self._segments)
        if self._extender is not None and self._lacks_room(segment):
            trio.lowlevel.reschedule(self._extender)
            self._extender = None

    async def _rotate(self) -> None:
        old = self._active

        def rotate() -> None:
            old.file.truncate(old.end)
            old.size = old.end
            old.file.fdatasync()
            self._create(old.number + 1)

        await self._disk.run(rotate)
        if self._extender is not None:
            trio.lowlevel.reschedule(self._extender)
            self._extender = None

    def idle(self, now: float) -> bool:
        """Mark the last sync once the log is idle; whether there is nothing more to mark."""
        if self._parked is None:
            return False  # there will be
        if self._marked >= self._synced:
            return True
        if now < self._idle_since + IDLE_MARK:
            return False
        segment = self._active
        synced = self._synced
        if self._extending and segment.end + MARK_SIZE > segment.size:
            return False
        try:
            segment.file.pwrite(mark(segment.number, segment.end, synced), segment.end)
        except DiskFull:
            return True  # the next batch meets the full disk and says so
        segment.end += MARK_SIZE
        segment.size = max(segment.size, segment.end)
        self._marked = synced
        return True

    def idle_at(self, now: float) -> float:
        """When to ask `idle` again that has just said no."""
        since = now if self._parked is None else self._idle_since
        return max(since + IDLE_MARK, now + IDLE_MARK / 10)

    # ------------------------------------------------------------------------------- collection

    async def collect(self) -> int:
        """Remove old segments that hold little of use, after copying that; returns how many."""
        removed = 0
        if len(self._segments) > 1:
            await self.sync()  # a base counts when it is written
        while len(self._segments) > 1:
            oldest = next(iter(self._segments.values()))
            if oldest.live * CARRY_SHARE > oldest.end:
                break
            # An entry that gathers in the buffer supersedes the one in the segment: copying that
            # one behind it would undo an acceptance.
            fresh = {(v, r[1]) for v, r, _ in self._buffer if r[0] == ENTRY}
            for volume, index in list(self._index.items()):
                self._carry(volume, index, oldest.number, fresh)
            await self.sync()  # the copies, and the bases that made the originals superfluous
            del self._segments[oldest.number]
            await self._disk.run(self._remove, oldest)
            removed += 1
        return removed

    def _carry(
        self, volume: bytes, index: Index, number: int, fresh: set[tuple[bytes, int]]
    ) -> None:
        if index.base is not None and index.base_at == number:
            self.append(volume, index.base)
        if index.promise_at == number:
            self.append(volume, (PROMISED, index.promised))
        for at, segment in enumerate(index.segments):
            if segment == number and (volume, index.first + at) not in fresh:
                start, end = index.starts[at], index.ends[at]
                data = self._segments[number].file.pread(end - start, start)
                if record_at(memoryview(data), 0) is None:
                    name = self._segments[number].name
                    raise self._fail(name, f"at offset {start}: a live record is damaged")
                self.append(volume, decode(ENTRY, data[RECORD.size :]))

    def _remove(self, segment: Segment) -> None:
        segment.file.close()
        self._disk.unlink(segment.name)
        self._disk.sync_dir(self._prefix)

    def statistics(self) -> dict[str, int]:
        """Segments, bytes in them, bytes of live entries, batches written."""
        size = sum(s.end for s in self._segments.values())
        live = sum(s.live for s in self._segments.values())
        count = len(self._segments)
        return {"segments": count, "bytes": size, "live": live, "batches": self.batch - 1}
