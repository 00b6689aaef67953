"""Write-ahead log: segments of checksummed records, group commit, recovery that cannot be fooled.

A segment starts with `magic | version u32 | number u32 | base u64 | crc32 u32`; `base` is the log
position of its first record, so positions run through all segments.  A record is

    "rec1" | length u32 | durable u64 | crc32 u32 | payload

`durable` is the log position that was known to be on stable storage when the record was written.
It tells a torn tail from damage: the first bad record ends the replay (what follows was never
acknowledged, since a sync covers everything before it), unless a later intact record says that the
bad place had been durable.  Then acknowledged data is gone and recovery stops with `Corrupt`.
The crc covers the header and the payload and is seeded with the segment's number.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dfs.codec import Buffer, pack, unpack
from dfs.env import Disk, DiskFile
from dfs.errors import Corrupt, DiskFull, RemoteProtocolError, StoreFailed
from dfs.groupsync import GroupSync
from dfs.hashing import crc32
from metadata.store.memtable import Value

MAGIC = b"dfs-wal\0"
VERSION = 2  # 1, which is still read, has no values that expire
_SEGMENT = struct.Struct("<8sIIQ")  # magic, version, number, base
_RECORD = struct.Struct("<4sIQ")  # magic, length, durable; then the crc
_CRC = struct.Struct("<I")
HEADER = _RECORD.size + _CRC.size
SEGMENT_HEADER = _SEGMENT.size + _CRC.size
RECORD_MAGIC = b"rec1"


def segment_name(prefix: str, number: int) -> str:
    """File name of a segment."""
    return f"{prefix}/{number:08d}.wal"


def encode_segment_header(number: int, base: int) -> bytes:
    """First bytes of a segment."""
    head = _SEGMENT.pack(MAGIC, VERSION, number, base)
    return head + _CRC.pack(crc32(head))


def pack_batch(ops: Sequence[tuple[bytes, Value]]) -> bytes:
    """Payload of the record of a batch: the MessagePack array of its (key, value).

    A deletion's value is nil, one that expires is the pair (bytes, seconds since the epoch).
    """
    return pack(ops)


def encode_record(number: int, durable: int, payload: Buffer) -> bytes:
    """Header of a record of segment `number`; the payload follows it."""
    head = _RECORD.pack(RECORD_MAGIC, len(payload), durable)
    return head + _CRC.pack(crc32(payload, crc32(head, number)))


class _Segment:
    """One open segment."""

    __slots__ = ("base", "end", "file", "number", "synced")

    def __init__(self, file: DiskFile, number: int, base: int, end: int) -> None:
        self.file = file
        self.number = number
        self.base = base  # position of the first record
        self.end = end  # position after the last record
        self.synced = -1  # below any position: an empty segment's header must be synced too


class _Sync:
    """What one group sync covers: the state of the log when it began."""

    __slots__ = ("_log", "_segments")

    def __init__(self, log: "Log", segments: list[tuple[_Segment, int]]) -> None:
        self._log = log
        self._segments = segments

    def fdatasync(self) -> None:
        """Sync oldest first, so that a crash half-way leaves a prefix.  Runs on a thread."""
        for segment, end in self._segments:
            segment.file.fdatasync()
            segment.synced = end
            self._log.durable = end  # only one sync runs at a time, so this only grows


class Log:
    """The log being written: the current segment, and earlier ones that are not synced yet."""

    def __init__(self, disk: Disk, prefix: str, number: int, position: int) -> None:
        """Continue at a position; `rotate` makes segment `number` + 1 before the first append."""
        self._disk = disk
        self._prefix = prefix
        self._current: _Segment | None = None
        self._unsynced: list[_Segment] = []
        self._group = GroupSync(disk, self._begin)
        self.number = number
        self.written = position  # log position after the last record
        self.durable = position  # log position that is on stable storage
        self.failed: StoreFailed | None = None

    def append(self, payload: bytes) -> None:
        """Write one record; raises `DiskFull` (nothing is written) or `StoreFailed`."""
        segment = self._current
        if segment is None or self.failed is not None:
            raise StoreFailed(f"the log takes no more writes: {self.failed or 'closed'}")
        try:
            segment.file.append((encode_record(segment.number, self.durable, payload), payload))
        except DiskFull:
            raise
        except StoreFailed as e:
            self.failed = e
            raise
        segment.end += HEADER + len(payload)
        self.written = segment.end

    async def sync(self) -> None:
        """Return when every record appended before is durable; raises `StoreFailed`."""
        if self.durable < self.written:
            try:
                await self._group.sync()
            except StoreFailed as e:
                self.failed = self.failed or e
                raise
            if self._unsynced:  # held open they would keep their space when a flush removes them
                self._unsynced = [s for s in self._unsynced if s.synced < s.end]
        elif self.failed is not None:
            raise StoreFailed(f"the log failed: {self.failed}")

    def _begin(self) -> _Sync:
        current = self._current
        self._unsynced = [s for s in self._unsynced if s.synced < s.end]
        segments = [(s, s.end) for s in self._unsynced]
        if current is not None:
            segments.append((current, current.end))
        return _Sync(self, segments)

    async def rotate(self) -> int:
        """Begin another segment and return its number; appends may go on meanwhile."""
        number = self.number + 1
        file = await self._disk.run(self._make, number)
        # No await from here on: records land in one segment or the other, in order.
        base = self.written
        file.append((encode_segment_header(number, base),))
        if self._current is not None:
            self._unsynced.append(self._current)
        self._current = _Segment(file, number, base, base)
        self.number = number
        return number

    def _make(self, number: int) -> DiskFile:
        file = self._disk.open(segment_name(self._prefix, number), create=True, truncate=True)
        self._disk.sync_dir(self._prefix)
        return file

    def close(self) -> None:
        """Refuse further writes."""
        self._current = None

    def statistics(self) -> dict[str, int]:
        """Calls of `sync` that waited, and the syncs they took."""
        return self._group.statistics()


# ----------------------------------------------------------------------------------- recovery


@dataclass(frozen=True, slots=True)
class Recovered:
    """One segment read back: its batches, and how far it is good."""

    number: int
    base: int
    end: int  # position after the last good record
    batches: list[tuple[tuple[bytes, Value], ...]]
    bad: str  # why the replay of this segment ended early; empty: it did not
    proof: int  # highest `durable` of any intact record, the ones after the bad place included


def read_segment(data: bytes, number: int, expected: int | None) -> Recovered:
    """Decode a segment; `expected` is where the one before ended, None if any base will do.

    Raises `Corrupt` for another format version.
    """
    base = expected or 0
    if len(data) < SEGMENT_HEADER:
        return Recovered(number, base, base, [], f"a header of {len(data)} bytes", 0)
    magic, version, stored, found = _SEGMENT.unpack_from(data)
    (crc,) = _CRC.unpack_from(data, _SEGMENT.size)
    if magic != MAGIC or crc != crc32(data[: _SEGMENT.size]) or stored != number:
        proof = max(_proof(data, 0, number), _proof(data, 0, stored))
        return Recovered(number, base, base, [], "a damaged header", proof)
    if version not in (1, VERSION):
        raise Corrupt(f"log segment {number} has format version {version}, this is {VERSION}")
    at = SEGMENT_HEADER
    proof = 0
    batches = []
    bad = ""
    if expected is None:
        base = found
    elif found != expected:
        bad = f"position {found} where {expected} was expected"
    while not bad and at < len(data):
        record = _record(data, at, number)
        if record is None:
            bad = f"a bad record at offset {at}"
            break
        durable, payload, end = record
        try:
            batches.append(unpack(payload))
        except RemoteProtocolError as e:
            raise Corrupt(f"log segment {number}, offset {at}: intact record, {e}") from e
        proof = max(proof, durable)
        at = end
    if bad:
        proof = max(proof, _proof(data, at, number))
    return Recovered(number, base, base + at - SEGMENT_HEADER, batches, bad, proof)


def _record(data: bytes, at: int, number: int) -> tuple[int, memoryview, int] | None:
    start = at + HEADER
    if start > len(data):
        return None
    magic, length, durable = _RECORD.unpack_from(data, at)
    if magic != RECORD_MAGIC or start + length > len(data):
        return None
    payload = memoryview(data)[start : start + length]
    (crc,) = _CRC.unpack_from(data, at + _RECORD.size)
    if crc != crc32(payload, crc32(data[at : at + _RECORD.size], number)):
        return None
    return durable, payload, start + length


def _proof(data: bytes, at: int, number: int) -> int:
    """Highest `durable` of the intact records anywhere after a bad place."""
    best = 0
    while (at := data.find(RECORD_MAGIC, at)) >= 0:
        record = _record(data, at, number)
        if record is None:
            at += 1
        else:
            best = max(best, record[0])
            at = record[2]
    return best


def numbers(disk: Disk, prefix: str) -> list[int]:
    """Numbers of the segments that exist, ascending."""
    return [int(n[:-4]) for n in disk.listdir(prefix) if n.endswith(".wal") and n[:-4].isdigit()]


def replay(disk: Disk, prefix: str, first: int, base: int) -> Iterator[Recovered]:
    """Read the segments from `first` on, in order; ends after the first that is cut short.

    `base` is the log position at which `first` begins.
    Raises `Corrupt` when acknowledged records are damaged or a segment is missing.  Whoever
    consumes everything may then `cut` the log at the end of the last one.
    """
    present = [n for n in numbers(disk, prefix) if n >= first]
    if present and present[0] != first:
        raise Corrupt(f"log segment {first} is missing from {disk.path(prefix)}; restore it")
    expected = base
    for i, number in enumerate(present):
        later = present[i + 1 :]
        if number == first + i:
            found = read_segment(_read(disk, prefix, number), number, expected)
        else:
            number, later = first + i, present[i:]
            found = Recovered(number, expected, expected, [], "the segment is missing", 0)
        if not found.bad:
            expected = found.end
            yield found
            continue
        proof = found.proof
        for other in later:
            proof = max(proof, _proof(_read(disk, prefix, other), 0, other))
        if proof > found.end:
            raise Corrupt(
                f"{disk.path(segment_name(prefix, number))}: {found.bad}, but later records prove "
                "that it was acknowledged; acknowledged writes are lost. "
                "Treat this data directory as a lost disk"
            )
        yield found
        return


def cut(disk: Disk, prefix: str, first: int, last: Recovered) -> int:
    """Make a torn tail as if it had never been written; returns the bytes dropped.

    Everything that was replayed is synced: a process that was killed leaves records that only the
    page cache holds.
    """
    dropped = 0
    for number in reversed(numbers(disk, prefix)):
        if number <= last.number:
            break
        dropped += disk.open(segment_name(prefix, number)).size()
        disk.unlink(segment_name(prefix, number))
    for number in range(first, last.number + 1):
        file = disk.open(segment_name(prefix, number), create=True)
        if number == last.number and last.bad:
            keep = SEGMENT_HEADER + last.end - last.base
            dropped += max(0, file.size() - keep)
            file.truncate(keep if last.batches else 0)
            if not last.batches:
                file.append((encode_segment_header(number, last.base),))
        file.fdatasync()
        file.close()
    disk.sync_dir(prefix)
    return dropped


def _read(disk: Disk, prefix: str, number: int) -> bytes:
    file = disk.open(segment_name(prefix, number))
    data = file.pread(file.size(), 0)
    file.close()
    return data


def read_batches(disk: Disk, prefix: str, segments: list[int]) -> Iterator[Any]:
    """Batches of complete segments, for a flush; raises `Corrupt` when any record is bad."""
    for number in segments:
        found = read_segment(_read(disk, prefix, number), number, None)
        if found.bad:
            raise Corrupt(f"{disk.path(segment_name(prefix, number))}: {found.bad}")
        yield from found.batches
