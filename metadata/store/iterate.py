"""Ordered reads across memtables and runs, in bounded memory: the merge behind scans and iterators.

Every source has a cursor with a little of it at hand: one block of a run, some keys of a memtable.
Up to the smallest last key at hand everything is known; that *stretch* is put into one dict, oldest
source first, sorted and handed out, and the cursors that are used up fill again.  So memory is one
block per run, however long the range is.

Damage does not stop a cursor: the bad block becomes a lost range of its run, and the merge raises
`Corrupt` when it gets there, or goes around it if it was told to.  Going around also leaves out the
values of older sources in that range: they may have been replaced by what is lost.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dfs.errors import Corrupt
from metadata.store.cache import BlockCache
from metadata.store.losses import in_ranges
from metadata.store.memtable import Memtable, Value

if TYPE_CHECKING:
    from metadata.store.reader import Run
    from metadata.store.table import Block, Table

CHUNK = 256  # keys of a memtable at hand

Item = tuple[bytes, bytes]
Report = Callable[["Run", "Table", Corrupt], Corrupt]
Fetch = Callable[["Table", int], "Block"]


class _MemtableCursor:
    """A place in a memtable nobody writes to meanwhile."""

    __slots__ = ("_all", "_chunk", "_data", "_from", "_to", "at", "keys", "newer", "values")

    def __init__(self, memtable: Memtable, start: bytes, end: bytes, want: int) -> None:
        self._all = memtable.sorted_keys()
        self._data = memtable.data
        self._from = bisect_left(self._all, start)
        self._to = bisect_left(self._all, end, self._from) if end else len(self._all)
        self._chunk = min(want, CHUNK)
        self.keys: Sequence[bytes] = ()
        self.values: Sequence[Value] = ()
        self.at = 0
        self.newer: list[Run] = []

    def fill(self) -> bool:
        if self.at < len(self.keys):
            return True
        if self._from >= self._to:
            return False
        data = self._data
        self.keys = self._all[self._from : min(self._to, self._from + self._chunk)]
        self.values = [data[k] for k in self.keys]
        self._from += len(self.keys)
        self._chunk = CHUNK
        self.at = 0
        return True


class _RunCursor:
    """A place in a run, with the block at hand; `newer` are the runs that come before it."""

    __slots__ = ("_blocks", "at", "keys", "newer", "values")

    def __init__(self, blocks: Iterator["Block"], newer: list["Run"]) -> None:
        self._blocks = blocks
        self.keys: Sequence[bytes] = ()
        self.values: Sequence[Value] = ()
        self.at = 0
        self.newer = newer

    def fill(self) -> bool:
        while self.at >= len(self.keys):
            block = next(self._blocks, None)
            if block is None:
                return False
            self.keys, self.values = block
            self.at = 0
        return True


def _blocks(
    run: "Run", start: bytes, end: bytes, fetch: Fetch, report: Report
) -> Iterator["Block"]:
    """Blocks of a run with keys in [start, end), the first and last cut; bad ones are reported."""
    for table in run.tables[max(0, bisect_right(run.first_keys, start) - 1) :]:
        if end and table.meta.first >= end:
            return
        if table.meta.last < start:
            continue
        try:
            first_keys = table.load().first_keys
        except Corrupt as e:
            report(run, table, e)
            continue
        begin = max(start, table.meta.first)
        for i in range(max(0, bisect_right(first_keys, begin) - 1), len(first_keys)):
            if end and first_keys[i] >= end:
                return
            try:
                block = fetch(table, i)
            except Corrupt as e:
                report(run, table, e)
                continue
            keys, values = block
            if keys[0] < begin or (end and keys[-1] >= end):
                a = bisect_left(keys, begin)
                b = bisect_left(keys, end) if end else len(keys)
                keys, values = keys[a:b], values[a:b]
            if keys:
                yield keys, values


def caching(cache: BlockCache) -> Fetch:
    """Blocks by way of the cache, which keeps them: for short scans."""
    return lambda table, i: cache.get(table.base + i) or table.cached_block(i, cache)


def passing(cache: BlockCache) -> Fetch:
    """Blocks from the cache if they are there, else past it: a long walk would empty it."""

    def fetch(table: "Table", i: int) -> "Block":
        block: Block | None = cache.peek(table.base + i)
        return table.block(i) if block is None else block

    return fetch


def stretches(
    memtables: Sequence[Memtable],
    runs: Sequence["Run"],
    start: bytes,
    end: bytes,
    *,
    fetch: Fetch,
    report: Report,
    now: int,
    want: int = CHUNK,
    skip_lost: bool = False,
) -> Iterator[list[Item]]:
    """Items in [start, end) in key order, a stretch at a time; an empty `end` is no end.

    Sources are newest first.  `want` is how many items the caller takes at least, `now` the time in
    seconds that decides what has expired.  Raises `Corrupt` at the first lost range, after
    everything before it; with `skip_lost` goes around.
    """
    errors: list[Corrupt] = []

    def tell(run: "Run", table: "Table", error: Corrupt) -> Corrupt:
        errors.append(report(run, table, error))
        return errors[-1]

    cursors: list[_MemtableCursor | _RunCursor] = [
        _RunCursor(_blocks(run, start, end, fetch, tell), list(runs[:i]))
        for i, run in enumerate(runs)
    ]
    cursors.reverse()  # oldest first: later updates of a dict win
    cursors += [_MemtableCursor(m, start, end, want) for m in reversed(memtables)]
    at = start
    while True:
        cursors = [c for c in cursors if c.fill()]
        bound = min([c.keys[-1] for c in cursors]) if cursors else None
        told = end if bound is None else bound + b"\0"
        damaged = any(run.lost and run.is_lost(at, told) for run in runs)
        merged: dict[bytes, Value] = {}
        for c in cursors:
            to = bisect_right(c.keys, bound, c.at)  # type: ignore[type-var]  # None: no cursors
            if to > c.at:
                part = zip(c.keys[c.at : to], c.values[c.at : to], strict=True)
                if damaged and skip_lost:
                    hidden = [x for run in c.newer for x in run.lost]
                    merged.update((k, v) for k, v in part if not in_ranges(k, hidden))
                else:
                    merged.update(part)
                c.at = to
        if damaged and not skip_lost:
            first = min([a for run in runs for a, b, _ in run.lost if b > at])
            if merged and first > at:
                yield _alive({k: v for k, v in merged.items() if k < first}, now)
            raise (
                errors[-1]
                if errors
                else Corrupt(f"items from {max(first, at)[:40]!r} on were in a damaged table")
            )
        if merged:
            yield _alive(merged, now)
        if bound is None:
            return
        at = told


def _alive(merged: dict[bytes, Value], now: int) -> list[Item]:
    """What is neither deleted nor expired, sorted."""
    items = [(k, v) for k in sorted(merged) if (v := merged[k]).__class__ is bytes]
    if len(items) < len(merged) and any(v.__class__ is tuple for v in merged.values()):
        for key, value in merged.items():
            if value.__class__ is tuple and value[1] > now:
                items.append((key, value[0]))
        items.sort()
    return items
