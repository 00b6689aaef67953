"""Jobs on immutable files, run in another process: flush, merge, salvage.

They are given a directory (`dfs.disk.disk_at`), names and numbers, and return `Meta` tuples, so
that nothing but names crosses the process border.  A job writes only files that the manifest does
not know yet; one that dies leaves garbage, no damage.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dfs.disk import disk_at
from dfs.env import Disk
from dfs.errors import Corrupt
from metadata.store.losses import Loss, in_ranges
from metadata.store.memtable import Memtable, Value
from metadata.store.table import Block, Meta, Table, open_table
from metadata.store.tablewriter import write_table
from metadata.store.wal import read_batches

Result = tuple[tuple[Any, ...] | None, bytes | None]  # a table's Meta; the first key that is left


class Target(NamedTuple):
    """How a job writes its table."""

    output: str  # name of the new file
    block_bytes: int
    compression: int
    bits_per_key: float  # of the filter
    expired: int  # what expires at this second or before is as good as deleted; 0: nothing
    drop: bool  # nothing older exists: deletions hide nothing and are left out


def flush_segments(
    root: str, prefix: str, segments: Sequence[int], target: tuple[Any, ...]
) -> Result:
    """Make a table of the batches in complete log segments; raises `Corrupt` for a bad record."""
    disk = disk_at(root)
    memtable = Memtable([])
    for batch in read_batches(disk, prefix, list(segments)):
        memtable.apply(batch)
    return flush_memtable(disk, prefix, memtable, target)


def flush_memtable(disk: Disk, prefix: str, memtable: Memtable, target: tuple[Any, ...]) -> Result:
    """Make a table of a memtable that nobody writes to."""
    data = memtable.data
    items = ((k, data[k]) for k in memtable.sorted_keys())
    wanted = Target(*target)
    if not memtable.expiring:
        wanted = wanted._replace(expired=0)
    return _write(disk, prefix, items, wanted)


def _write(
    disk: Disk,
    prefix: str,
    items: Iterator[tuple[bytes, Value]],
    target: Target,
    table_bytes: int = 1 << 62,
) -> Result:
    if target.expired:
        items = bury(items, target.expired)
    if target.drop:
        items = ((k, v) for k, v in items if v is not None)
    meta, rest = write_table(
        disk,
        f"{prefix}/{target.output}",
        items,
        block_bytes=target.block_bytes,
        compression=target.compression,
        table_bytes=table_bytes,
        bits_per_key=target.bits_per_key,
    )
    return (None if meta is None else tuple(meta)), rest


def bury(items: Iterator[tuple[bytes, Value]], expired: int) -> Iterator[tuple[bytes, Value]]:
    """Make deletions of what has expired: it must go on hiding older values of its key."""
    for key, value in items:
        if value.__class__ is tuple and value[1] <= expired:
            yield key, None
        else:
            yield key, value


def merge_tables(
    root: str,
    prefix: str,
    runs: Sequence[tuple[Sequence[tuple[Any, ...]], Sequence[Loss]]],
    start: bytes,
    table_bytes: int,
    target: tuple[Any, ...],
) -> Result:
    """Merge runs (tables, losses), newest first, from key `start` on, into one table.

    Stops when the table is full and says where to go on.  A key in a lost range of a newer run is
    left out: its newest value is unknown, an older one would be wrong.  A damaged input raises
    `Corrupt` whose detail is the table's name.
    """
    disk = disk_at(root)
    cursors = []
    for rank, (tables, _) in enumerate(runs):
        metas = [Meta(*m) for m in tables]
        cursors.append(_Cursor(disk, prefix, [m for m in metas if m.last >= start], start))
        cursors[-1].skip = [x for _, losses in runs[:rank] for x in losses]
    items = _merge(list(reversed(cursors)))
    return _write(disk, prefix, items, Target(*target), table_bytes)


class _Cursor:
    """A place in one run, with the block at hand."""

    def __init__(self, disk: Disk, prefix: str, metas: list[Meta], start: bytes) -> None:
        self.skip: list[Loss] = []
        self.keys: Sequence[bytes] = ()
        self.values: Sequence[Value] = ()
        self.at = 0
        self._blocks = self._read(disk, prefix, metas, start)

    @staticmethod
    def _read(disk: Disk, prefix: str, metas: list[Meta], start: bytes) -> Iterator[Block]:
        for meta in metas:
            try:
                yield from open_table(disk, prefix, meta, 0).scan(start)
            except Corrupt as e:
                raise Corrupt(str(e), meta.name) from e

    def fill(self) -> bool:
        """Have at least one item at hand; False at the end of the run."""
        while self.at >= len(self.keys):
            block = next(self._blocks, None)
            if block is None:
                return False
            self.keys, self.values = block
            self.at = 0
            if self.skip:
                kept = [
                    (k, v)
                    for k, v in zip(self.keys, self.values, strict=True)
                    if not in_ranges(k, self.skip)
                ]
                self.keys = [k for k, _ in kept]
                self.values = [v for _, v in kept]
        return True


def _merge(cursors: list[_Cursor]) -> Iterator[tuple[bytes, Value]]:
    """Items of all cursors in key order; of equal keys the one of the last cursor (the newest).

    In rounds: up to the smallest last key at hand everything is known, so that stretch is put in
    one dict, oldest first, and sorted; a heap would cost three times as much per key.
    """
    while True:
        cursors = [c for c in cursors if c.fill()]
        if not cursors:
            return
        bound = min([c.keys[-1] for c in cursors])
        merged: dict[bytes, Value] = {}
        for c in cursors:
            end = bisect_right(c.keys, bound, c.at)
            merged.update(zip(c.keys[c.at : end], c.values[c.at : end], strict=True))
            c.at = end
        for key in sorted(merged):
            yield key, merged[key]


def salvage_table(
    root: str,
    prefix: str,
    table: tuple[Any, ...],
    output: str,
    block_bytes: int,
    compression: int,
    bits_per_key: float,
) -> tuple[tuple[Any, ...] | None, tuple[Loss, ...]]:
    """Copy the intact blocks of a damaged table; returns the copy and the ranges that are lost."""
    disk = disk_at(root)
    meta = Meta(*table)
    whole = ((meta.first, meta.last + b"\0", meta.name),)
    try:
        source = open_table(disk, prefix, meta, 0)
        count = len(source.load().first_keys)
    except Corrupt:
        return None, whole
    lost: list[Loss] = []

    def intact() -> Iterator[tuple[bytes, Value]]:
        for i in range(source.first_block(meta.first), count):
            try:
                block = source.block(i)
            except Corrupt:
                lost.append((*source.range_of(i), meta.name))
                continue
            for key, value in zip(*block, strict=True):
                if key >= meta.first:
                    yield key, value

    copy, _ = write_table(
        disk,
        f"{prefix}/{output}",
        intact(),
        block_bytes=block_bytes,
        compression=compression,
        bits_per_key=bits_per_key,
    )
    return (None if copy is None else tuple(copy)), tuple(lost)


def check_table(root: str, prefix: str, table: tuple[Any, ...]) -> tuple[tuple[int, str], ...]:
    """Read every block of a table; returns (block, what is wrong) of the bad ones.

    Block -1 is the whole table: it cannot be opened.
    """
    meta = Meta(*table)
    try:
        source: Table = open_table(disk_at(root), prefix, meta, 0)
        count = len(source.load().first_keys)
    except Corrupt as e:
        return ((-1, str(e)),)
    bad: list[tuple[int, str]] = []
    for i in range(source.first_block(meta.first), count):
        try:
            source.block(i)
        except Corrupt as e:
            bad.append((i, str(e)))
    return tuple(bad)
