"""Memtable: the newest writes, as a dict with keys that are sorted when somebody asks.

A dict insert is ten times cheaper than one into a sorted container.  Sorting is left to the first
scan or flush after a write: timsort merges the sorted old keys with the few new ones in one pass.
"""

from bisect import bisect_left
from collections.abc import Iterable

OVERHEAD = 120  # bytes of a dict slot, two object headers and a place in the key list

Value = bytes | None  # None: deleted


class Memtable:
    """Keys to values, deletions included; `segments` are the log segments that hold the same."""

    __slots__ = ("_new", "_sorted", "bytes", "data", "end", "segments")

    def __init__(self, segments: list[int]) -> None:
        """Start empty."""
        self.data: dict[bytes, Value] = {}
        self.bytes = 0
        self.segments = segments
        self.end = 0  # log position after the last of them, known once the memtable is frozen
        self._sorted: list[bytes] = []
        self._new: list[bytes] = []

    def apply(self, ops: Iterable[tuple[bytes, Value]]) -> None:
        """Apply one batch."""
        data = self.data
        new = self._new
        size = self.bytes
        for key, value in ops:
            if key in data:
                old = data[key]
                if old is not None:
                    size -= len(old)
            else:
                new.append(key)
                size += len(key) + OVERHEAD
            if value is not None:
                size += len(value)
            data[key] = value
        self.bytes = size

    def sorted_keys(self) -> list[bytes]:
        """All keys, ascending; the list is replaced, never changed, by later calls."""
        if self._new:
            self._sorted = self._sorted + self._new
            self._sorted.sort()
            self._new = []
        return self._sorted

    def slice(self, start: bytes, end: bytes, limit: int) -> tuple[list[tuple[bytes, Value]], bool]:
        """Up to `limit` items in [start, end), and whether there are more."""
        keys = self.sorted_keys()
        i = bisect_left(keys, start)
        j = bisect_left(keys, end, i) if end else len(keys)
        data = self.data
        return [(k, data[k]) for k in keys[i : min(j, i + limit)]], i + limit < j

    def copy(self) -> "Memtable":
        """The state of now, for a snapshot."""
        other = Memtable(self.segments)
        other.data = self.data.copy()
        other.bytes = self.bytes
        other._sorted = self.sorted_keys()
        return other
