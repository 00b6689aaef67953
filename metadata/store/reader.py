"""Reading across memtables and runs: one consistent state of a store.

A `Reader` holds memtables and runs, newest first, and answers from the first source that knows the
key.  The engine makes a new one whenever the set of sources changes; a snapshot is a reader whose
newest memtable is a copy.  Tables stay open while a reader holds them, so compaction may remove
their files at any time.

Damage: a block whose checksum is wrong makes its key range *lost* in that run.  Newer sources still
answer; where the answer would come from the lost block or from something older, the read raises
`Corrupt`, because an older value or "absent" would be a wrong answer.  A later write of the key
ends the loss for that key.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from dfs.errors import Corrupt
from metadata.store.bloom import key_hash
from metadata.store.cache import BlockCache
from metadata.store.manifest import Range, RunMeta
from metadata.store.memtable import Memtable, Value
from metadata.store.table import MISSING, Index, Table

SLICE = 256  # items read at once from each source of a scan


class Run:
    """A sorted run, open: tables with disjoint ranges, ascending, and the ranges that are lost."""

    __slots__ = ("first_keys", "level", "lost", "tables")

    def __init__(self, level: int, tables: Sequence[Table], lost: tuple[Range, ...]) -> None:
        """Of open tables."""
        self.level = level
        self.tables = tuple(tables)
        self.lost = lost
        self.first_keys = [t.meta.first for t in tables]

    def meta(self) -> RunMeta:
        """For the manifest."""
        return RunMeta(self.level, tuple(t.meta for t in self.tables), self.lost)

    def is_lost(self, start: bytes, end: bytes) -> bool:
        """Whether a lost range touches [start, end); an empty end is the end of the key space."""
        return any(a < end or not end for a, b in self.lost if b > start)


OnDamage = Callable[[Run, Table, int | None, Corrupt], None]  # block index, None: the whole table


class IndexBudget:
    """Bounds the memory of loaded indexes and filters: the one loaded first goes first."""

    __slots__ = ("_budget", "_loaded", "bytes")

    def __init__(self, budget: int) -> None:
        """At most `budget` bytes, but always the one in use."""
        self._budget = budget
        self._loaded: dict[Table, int] = {}
        self.bytes = 0

    def load(self, table: Table) -> Index:
        """Load a table's index, and drop others'; raises `Corrupt`."""
        index = table.load()
        self._loaded[table] = index.size
        self.bytes += index.size
        while self.bytes > self._budget and len(self._loaded) > 1:
            oldest = next(iter(self._loaded))
            self.forget(oldest)
        return index

    def forget(self, table: Table) -> None:
        """Drop a table's index."""
        self.bytes -= self._loaded.pop(table, 0)
        table.index = None


class Reader:
    """Point reads and scans over sources, newest first."""

    __slots__ = ("_cache", "_damaged", "_indexes", "memtables", "runs")

    def __init__(
        self,
        memtables: Sequence[Memtable],
        runs: Sequence[Run],
        cache: BlockCache,
        indexes: IndexBudget,
        damaged: OnDamage,
    ) -> None:
        """`damaged` is told of every bad block before the read raises."""
        self.memtables = tuple(memtables)
        self.runs = tuple(runs)
        self._cache = cache
        self._indexes = indexes
        self._damaged = damaged

    def get(self, key: bytes) -> bytes | None:
        """The value, None if absent or deleted; raises `Corrupt` when it is lost."""
        for memtable in self.memtables:
            if key in memtable.data:
                return memtable.data[key]
        hashed = None
        for run in self.runs:
            i = bisect_right(run.first_keys, key) - 1
            if i >= 0:
                table = run.tables[i]
                if key <= table.meta.last:
                    if hashed is None:
                        hashed = key_hash(key)
                    try:
                        if table.index is None:
                            self._indexes.load(table)
                        value = table.find(key, hashed, self._cache)
                    except Corrupt as e:
                        raise self._report(run, table, e) from e
                    if value is not MISSING:
                        found: bytes | None = value
                        return found
            if run.lost and run.is_lost(key, key + b"\0"):
                raise Corrupt(f"the newest value of key {key[:40]!r} was in a damaged table")
        return None

    def _report(self, run: Run, table: Table, error: Corrupt) -> Corrupt:
        number = error.details[0] if error.details else None
        self._damaged(run, table, number, error)
        return Corrupt(f"{error}; the table is quarantined")

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to `limit` items in [start, end), ascending, without deleted ones.

        An empty `end` is the end of the key space.  Raises `Corrupt` when any item of the part
        that was looked at may be lost.
        """
        result: list[tuple[bytes, bytes]] = []
        while len(result) < limit:
            want = min(SLICE, limit - len(result))
            merged: dict[bytes, Value] = {}
            bound: bytes | None = None  # up to here every source has told all it knows
            for run in reversed(self.runs):
                items, last = self._slice(run, start, end, want)
                merged.update(items)
                if last is not None and (bound is None or last < bound):
                    bound = last
            for memtable in reversed(self.memtables):
                items, more = memtable.slice(start, end, want)
                merged.update(items)
                if more and (bound is None or items[-1][0] < bound):
                    bound = items[-1][0]
            told = end if bound is None else bound + b"\0"
            if any(run.lost and run.is_lost(start, told) for run in self.runs):
                raise Corrupt(f"items from {start[:40]!r} on were in a damaged table")
            for key in sorted(merged):
                if bound is not None and key > bound:
                    break
                value = merged[key]
                if value is not None:
                    result.append((key, value))
            if bound is None:
                break
            start = told
        del result[limit:]
        return result

    def _slice(
        self, run: Run, start: bytes, end: bytes, want: int
    ) -> tuple[list[tuple[bytes, Value]], bytes | None]:
        """Items of one run from `start` on; the last of their keys if there may be more."""
        items: list[tuple[bytes, Value]] = []
        for table in run.tables[max(0, bisect_right(run.first_keys, start) - 1) :]:
            if end and table.meta.first >= end:
                break
            try:
                if table.index is None:
                    self._indexes.load(table)
                found, more = table.slice(start, end, want - len(items), self._cache)
            except Corrupt as e:
                raise self._report(run, table, e) from e
            items += found
            if len(items) >= want:
                return items, items[-1][0] if more or table is not run.tables[-1] else None
        return items, None
