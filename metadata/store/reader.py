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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

from dfs.errors import Corrupt
from metadata.store import iterate
from metadata.store.cache import BlockCache
from metadata.store.iterate import CHUNK, Item
from metadata.store.losses import Loss
from metadata.store.manifest import RunMeta
from metadata.store.memtable import Memtable
from metadata.store.own import is_own
from metadata.store.table import MISSING, Table


class Run:
    """A sorted run, open: tables with disjoint ranges, ascending, and the ranges that are lost."""

    __slots__ = ("first_keys", "level", "lost", "tables")

    def __init__(self, level: int, tables: Sequence[Table], lost: tuple[Loss, ...]) -> None:
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
        return any(a < end or not end for a, b, _ in self.lost if b > start)


if TYPE_CHECKING:
    from metadata.store.bloom import KeyHash

OnDamage = Callable[[Run, Table, int | None, Corrupt], None]  # block index, None: the whole table


class IndexBudget:
    """Bounds the memory of loaded indexes and filters: the one loaded first goes first.

    Holds tables weakly: one that no reader holds any more takes its index along.
    """

    __slots__ = ("_budget", "_loaded", "bytes")

    def __init__(self, budget: int) -> None:
        """At most `budget` bytes, but always the one in use."""
        self._budget = budget
        self._loaded: dict[ref[Table], int] = {}
        self.bytes = 0

    def loaded(self, table: Table, size: int) -> None:
        """Count the index of a table, and drop others'; it is the table's `on_load`."""
        self._loaded[ref(table, self._gone)] = size
        self.bytes += size
        while self.bytes > self._budget and len(self._loaded) > 1:
            oldest = next(iter(self._loaded))
            other = oldest()
            self._gone(oldest)
            if other is not None:
                other.index = None

    def _gone(self, table: "ref[Table]") -> None:
        self.bytes -= self._loaded.pop(table, 0)

    def forget(self, table: Table) -> None:
        """Drop a table's index."""
        self._gone(ref(table))
        table.index = None


class Reader:
    """Point reads and scans over sources, newest first."""

    __slots__ = ("_cache", "_damaged", "_now", "_own", "memtables", "runs")

    def __init__(
        self,
        memtables: Sequence[Memtable],
        runs: Sequence[Run],
        cache: BlockCache,
        damaged: OnDamage,
        now: Callable[[], int],
        own: bytes = b"",
    ) -> None:
        """`damaged` is told of every bad block before the read raises; `now` decides what expired.

        `now` returns seconds since the epoch and is asked only when there is an expiry to judge.
        Rows whose keys begin with a byte of `own` are all in the memtables.
        """
        self.memtables = tuple(memtables)
        self.runs = tuple(runs)
        self._cache = cache
        self._damaged = damaged
        self._now = now
        self._own = own

    def get(self, key: bytes) -> bytes | None:
        """The value, None if absent or deleted; raises `Corrupt` when it is lost."""
        for memtable in self.memtables:
            data = memtable.data
            if key in data:
                value = data[key]
                return self._alive(value) if isinstance(value, tuple) else value
        if self._own and key[:1] in self._own:
            return None
        hashed: list[KeyHash] = []
        for run in self.runs:
            i = bisect_right(run.first_keys, key) - 1
            if i >= 0:
                table = run.tables[i]
                if key <= table.last:
                    try:
                        value = table.find(key, hashed, self._cache)
                    except Corrupt as e:
                        raise self._report(run, table, e) from e
                    if value is not MISSING:
                        return self._alive(value) if isinstance(value, tuple) else value
            if run.lost and run.is_lost(key, key + b"\0"):
                raise Corrupt(f"the newest value of key {key[:40]!r} was in a damaged table")
        return None

    def _report(self, run: Run, table: Table, error: Corrupt) -> Corrupt:
        number = error.details[0] if error.details else None
        self._damaged(run, table, number, error)
        return Corrupt(f"{error}; the table is quarantined")

    def _alive(self, value: Any) -> bytes | None:
        """The bytes of a value that expires, None if it has."""
        data: bytes
        data, expires = value
        return data if expires > self._now() else None

    def scan(
        self, start: bytes, end: bytes, limit: int, *, skip_lost: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` items in [start, end), ascending, without deleted ones.

        An empty `end` is the end of the key space.  Raises `Corrupt` when any item of the part
        that was looked at may be lost; with `skip_lost` those are left out.
        """
        result: list[tuple[bytes, bytes]] = []
        if limit > 0:
            for stretch in self.stretches(start, end, limit, skip_lost=skip_lost, keep=True):
                result += stretch
                if len(result) >= limit:
                    break
        del result[max(0, limit) :]
        return result

    def stretches(
        self,
        start: bytes,
        end: bytes,
        want: int = CHUNK,
        *,
        skip_lost: bool = False,
        keep: bool = False,
    ) -> Iterator[list[Item]]:
        """Like `scan` without a limit, piece by piece; `keep`: the blocks go to the cache."""
        return iterate.stretches(
            self.memtables,
            () if is_own(self._own, start, end) else self.runs,
            start,
            end,
            fetch=(iterate.caching if keep else iterate.passing)(self._cache),
            report=self._report,
            now=self._now(),
            want=want,
            skip_lost=skip_lost,
        )
