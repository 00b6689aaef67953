"""A table in memory with the durability of a disk: batches are visible at once, durable by `sync`.

Stands for `metadata.store.Store` in simulations that run without tasks: `get` and `scan` see every
batch, a crash keeps what was synced and any prefix of what was not, a full disk refuses batches.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from random import Random

from dfs.errors import DiskFull

Op = tuple[bytes, bytes | None]  # None: delete


class DictStore:
    """Rows in key order, and how to undo the batches that no sync has covered."""

    def __init__(self, rows: dict[bytes, bytes] | None = None) -> None:
        """Starts with durable `rows`."""
        self._rows = dict(rows or {})
        self._keys = sorted(self._rows)
        self._undo: list[list[Op]] = []  # per batch since the last sync, in order
        self.full = False

    def get(self, key: bytes) -> bytes | None:
        """The value, None if there is none."""
        return self._rows.get(key)

    def scan(
        self, prefix: bytes, after: bytes = b"", limit: int = 1000
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` rows of the prefix with keys greater than `after`."""
        keys, rows = self._keys, self._rows
        at = bisect_left(keys, prefix) if after < prefix else bisect_right(keys, after)
        found = []
        for key in keys[at : at + limit]:
            if not key.startswith(prefix):
                break
            found.append((key, rows[key]))
        return found

    def rows(self) -> dict[bytes, bytes]:
        """All rows, durable or not."""
        return dict(self._rows)

    def batch(self, ops: Sequence[Op]) -> None:
        """Apply at once; raises `DiskFull` and changes nothing while the disk is full."""
        if self.full:
            raise DiskFull("the simulated disk is full: wait until it has room again")
        undo = [(key, self._rows.get(key)) for key, _ in ops]
        for key, value in ops:
            self._set(key, value)
        self._undo.append(undo)

    @property
    def dirty(self) -> bool:
        """Whether a crash now could lose something."""
        return bool(self._undo)

    def mark(self) -> int:
        """How many batches wait for a sync."""
        return len(self._undo)

    def sync(self, upto: int | None = None) -> None:
        """The first `upto` waiting batches survive from now on; all of them by default."""
        del self._undo[:upto]

    def crash(self, random: Random) -> int:
        """Lose power: some suffix of what waits for a sync is gone; returns how many batches."""
        keep = random.randint(0, len(self._undo))
        lost = self._undo[keep:]
        for undo in reversed(lost):
            for key, value in reversed(undo):
                self._set(key, value)
        self._undo.clear()
        return len(lost)

    def _set(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            if self._rows.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
        else:
            if key not in self._rows:
                insort(self._keys, key)
            self._rows[key] = value
