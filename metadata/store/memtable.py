"""Memtable: the newest writes, as a dict with keys that are sorted when somebody asks.

A dict insert is ten times cheaper than one into a sorted container.  Sorting is left to the first
scan or flush after a write: timsort merges the sorted old keys with the few new ones in one pass.
"""

from collections.abc import Iterable
from typing import Any

OVERHEAD = 120  # bytes of a dict slot, two object headers and a place in the key list
_EXPIRY = 90  # bytes of the pair and the number of a value that expires

Value = bytes | None | tuple[bytes, int]  # None: deleted; with seconds since the epoch: expires


class Memtable:
    """Keys to values, deletions included; `segments` are the log segments that hold the same."""

    __slots__ = ("__weakref__", "_new", "_sorted", "bytes", "data", "end", "expiring", "segments")

    def __init__(self, segments: list[int]) -> None:
        """Start empty."""
        self.data: dict[bytes, Value] = {}
        self.bytes = 0
        self.expiring = False  # whether any value may expire
        self.segments = segments
        self.end = 0  # log position after the last of them, known once the memtable is frozen
        self._sorted: list[bytes] = []
        self._new: list[bytes] = []

    def apply(self, ops: Iterable[tuple[bytes, Any]]) -> None:
        """Apply one batch."""
        data = self.data
        new = self._new
        size = self.bytes
        for key, value in ops:
            if key in data:
                old = data[key]
                if old is not None:
                    size -= len(old) if isinstance(old, bytes) else _EXPIRY + len(old[0])
            else:
                new.append(key)
                size += len(key) + OVERHEAD
            if value.__class__ is bytes:
                size += len(value)
            elif value is not None:
                size += _EXPIRY + len(value[0])
                self.expiring = True
            data[key] = value
        self.bytes = size

    def sorted_keys(self) -> list[bytes]:
        """All keys, ascending; the list is replaced, never changed, by later calls."""
        if self._new:
            self._sorted = self._sorted + self._new
            self._sorted.sort()
            self._new = []
        return self._sorted

    def copy(self) -> "Memtable":
        """The state of now, for a snapshot."""
        other = Memtable(self.segments)
        other.data = self.data.copy()
        other.bytes = self.bytes
        other.expiring = self.expiring
        other._sorted = self.sorted_keys()
        return other
