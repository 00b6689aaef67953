"""Which chunks this server holds and where: the index in memory, rebuilt at every start.

One dict per partition (the top 12 bits of the id), so that ids can be listed in order by sorting a
few hundred at a time, and a running summary per partition, so that two servers find out what one of
them lacks without listing anything.  About 250 bytes of memory a chunk.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from dfs.hashing import PARTITIONS, partition_of

SUMMARY = struct.Struct(">I16s")  # count, sum of the first 16 bytes of the ids mod 2**128
_MASK = (1 << 128) - 1


class Entry(NamedTuple):
    """One chunk: its PUT record and when it was last wanted."""

    segment: int
    offset: int  # of the encoded chunk in the segment
    stored: int  # length of the encoded chunk
    plain: int
    stamp: int  # ns; of the put or the last touch
    touched: int  # number of the segment that holds the stamp: the PUT's own or a TOUCH's


class Index:
    """Chunk id -> `Entry`, ordered by id, with one summary a partition."""

    def __init__(self) -> None:
        """Start empty."""
        self._parts: list[dict[bytes, Entry]] = [{} for _ in range(PARTITIONS)]
        self._summary = bytearray(SUMMARY.size * PARTITIONS)
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        """Number of chunks."""
        return self._count

    @property
    def stored_bytes(self) -> int:
        """Bytes of all the encoded chunks."""
        return self._bytes

    def get(self, chunk_id: bytes) -> Entry | None:
        """The chunk's entry."""
        return self._parts[partition_of(chunk_id)].get(chunk_id)

    def put(self, chunk_id: bytes, entry: Entry) -> None:
        """Add or replace an entry."""
        p = partition_of(chunk_id)
        old = self._parts[p].get(chunk_id)
        if old is None:
            self._count += 1
            self._add(p, 1, int.from_bytes(chunk_id[:16], "big"))
        else:
            self._bytes -= old.stored
        self._bytes += entry.stored
        self._parts[p][chunk_id] = entry

    def pop(self, chunk_id: bytes) -> Entry | None:
        """Remove an entry; return it."""
        p = partition_of(chunk_id)
        old = self._parts[p].pop(chunk_id, None)
        if old is not None:
            self._count -= 1
            self._bytes -= old.stored
            self._add(p, -1, -int.from_bytes(chunk_id[:16], "big"))
        return old

    def after(self, chunk_id: bytes, limit: int, last: int = 0) -> list[tuple[bytes, Entry]]:
        """Up to `limit` entries with larger ids, in order; `b""` starts at the beginning.

        Ends with partition `last`, if one is given.
        """
        out: list[tuple[bytes, Entry]] = []
        first = partition_of(chunk_id) if chunk_id else 0
        for p in range(first, last + 1 if last else PARTITIONS):
            part = self._parts[p]
            if part:
                out += [(i, part[i]) for i in sorted(part) if i > chunk_id]
                if len(out) >= limit:
                    return out[:limit]
        return out

    def partition(self, p: int) -> list[tuple[bytes, Entry]]:
        """The entries of one partition, in order."""
        part = self._parts[p]
        return [(i, part[i]) for i in sorted(part)]

    def count(self, p: int) -> int:
        """Number of chunks of one partition."""
        return len(self._parts[p])

    def __iter__(self) -> Iterator[bytes]:
        """All ids, in order; adding and removing meanwhile is fine and may be missed."""
        for part in self._parts:
            yield from sorted(part)

    def _add(self, p: int, count: int, number: int) -> None:
        at = p * SUMMARY.size
        old, total = SUMMARY.unpack_from(self._summary, at)
        total = (int.from_bytes(total, "big") + number) & _MASK
        SUMMARY.pack_into(self._summary, at, old + count, total.to_bytes(16, "big"))

    def summary(self) -> bytes:
        """Count and sum of ids for each of the 4096 partitions: equal if the ids are equal."""
        return bytes(self._summary)


def different_partitions(ours: bytes, theirs: bytes) -> list[int]:
    """Numbers of the partitions whose summaries differ."""
    size = SUMMARY.size
    if len(theirs) != size * PARTITIONS:
        return list(range(PARTITIONS))
    if ours == theirs:
        return []
    return [
        p
        for p in range(PARTITIONS)
        if ours[p * size : (p + 1) * size] != theirs[p * size : (p + 1) * size]
    ]
