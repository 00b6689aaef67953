"""Background work of a store: flush, merge, salvage, verify.

The heavy part runs in another process on immutable files; here is only the order of things: the
new table is durable, then the manifest names it, then what it replaces is removed.  A job that
fails changes nothing, leaves no file and is tried again after a pause; `StoreFailed` ends the
store.

A merge is committed after every output table: the output holds the keys below some key, the inputs
from then on only the rest.  So it needs disk space for a few tables, not for a copy of everything,
and an interrupted one has lost little.
"""

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import trio

from dfs.errors import Corrupt, DfsError, DiskFull, StoreFailed
from metadata.store import compaction, filters, policy
from metadata.store.compaction import Target
from metadata.store.losses import clip, union, without
from metadata.store.memtable import Memtable
from metadata.store.reader import Run
from metadata.store.recovery import table_number
from metadata.store.state import State
from metadata.store.table import Meta, Table, open_table

JOBS = "metadata.store.compaction:"
MAX_PAUSE = 60.0  # seconds between attempts of a job that fails
LOOK = 600.0  # seconds after which to look whether time alone has made work
MIN_TABLE = 1 << 20  # bytes: smaller tables save no disk space worth having
FILTER_SHARE = 4  # filters may have one part in so many of `index_bytes`, twice that in memory


class _Size:
    """A run as the policy sees it."""

    def __init__(self, run: Run, expired: int) -> None:
        self.level = run.level
        metas = [t.meta for t in run.tables]
        self.entries = sum(m.entries for m in metas)
        self.tombstones = sum(m.tombstones for m in metas)
        self.tombstones += sum(m.expiring for m in metas if m.expires <= expired)


class Maintenance:
    """Flushes and merges the tables of one store, one flush and one merge at a time."""

    def __init__(self, state: State) -> None:
        """Work on `state`."""
        self._s = state
        self._flushing = trio.Lock()
        self._merging = trio.Lock()
        self.flushes = 0
        self.merges = 0
        self.verify_cursor = ""  # name of the table that `verify_step` checked last

    async def run(self) -> None:
        """Work until cancelled; raises `StoreFailed` when the disk cannot be trusted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._loop, "flush", self.flush_oldest)
            nursery.start_soon(self._loop, "compaction", self.step)

    async def _loop(self, name: str, step: Callable[[], Awaitable[bool]]) -> None:
        pause = 0.0
        while True:
            # Only the words of an error are kept: its frames hold tables that may have been removed
            # meanwhile, open, and so the space that a full disk waits for.
            failure, full, busy = "", False, False
            try:
                busy = await step()
            except StoreFailed:
                raise
            except DfsError as e:
                failure, full = f"{name}: {e}", isinstance(e, DiskFull)
            if failure:
                if full and await self._s.reserve.release():
                    self._s.note(f"{failure}; the reserve is released")
                    continue
                self._s.note(failure)
                pause = min(MAX_PAUSE, 2 * pause or 1.0)
                await trio.sleep(pause)
                continue
            pause = 0.0
            if not busy:
                with trio.move_on_after(LOOK if self._time_matters() else math.inf):
                    await self._s.wait_work()

    def _time_matters(self) -> bool:
        s = self._s
        return s.reserve.missing or any(t.meta.expiring for r in s.runs for t in r.tables)

    def _expired(self) -> int:
        """What expires at this second or before may be destroyed."""
        return max(0, self._s.now() - self._s.options.expiry_grace)

    def _target(self, merged: Sequence[Run], entries: int, *, drop: bool, expired: int) -> Target:
        """How to write a table of `entries` that takes the place of runs, none for a flush."""
        s = self._s
        others = [sum(t.meta.entries for t in r.tables) for r in s.runs if r not in merged]
        memory = s.options.index_bytes * 8 / FILTER_SHARE
        bits = filters.allocate([entries, *others], memory)[0]
        o = s.options
        return Target(s.table_name(), o.block_bytes, o.compression, bits, expired, drop)

    # -- flush

    async def flush_oldest(self) -> bool:
        """Make a table of the oldest frozen memtable; False if there is none."""
        s = self._s
        async with self._flushing:
            if not s.frozen:
                return False
            memtable = s.frozen[-1]
            meta = await self._write(memtable, drop=not s.runs)
            segments = [f"{n:08d}.wal" for n in memtable.segments]
            new = [] if meta is None else [Run(0, [self._open(meta)], ())]
            await self.rule_own_durable()
            with self._or_remove(meta):
                await s.commit(lambda runs: [*new, *runs], flushed=memtable)
            self.flushes += 1
            await s.remove(segments)
            return True

    async def rule_own_durable(self) -> None:
        """The next segment has all own rows, and is durable before those of a memtable go."""
        if self._s.own:
            await self._s.log.sync()

    async def _write(self, memtable: Memtable, *, drop: bool) -> Meta | None:
        s = self._s
        target = self._target((), len(memtable.data), drop=drop, expired=self._expired())
        try:
            result, _ = await s.env.processes.run(
                f"{JOBS}flush_segments",
                s.env.disk.path(),
                s.prefix,
                tuple(memtable.segments),
                tuple(target),
            )
        except DiskFull:
            self._remove_output(target.output)
            raise
        except StoreFailed:
            raise
        except DfsError as e:
            # The segments are damaged, or the process dies on them: what they hold is in memory.
            s.note(f"flush from the log failed, flushing from memory: {e}")
            try:
                result, _ = await s.env.disk.run(
                    compaction.flush_memtable, s.env.disk, s.prefix, memtable, tuple(target)
                )
            except DiskFull:
                self._remove_output(target.output)
                raise
        return self._count(result)

    def _remove_output(self, name: str) -> None:
        """Give back what a failed job has written of its table, before its error is passed on.

        Without an await: what waits while an error is handled keeps it, as the context of whatever
        is raised inside, until the garbage collector comes; and the error keeps tables open.
        """
        disk = self._s.env.disk
        with contextlib.suppress(DfsError):  # the first error is the one to tell
            disk.unlink(f"{self._s.prefix}/{name}")

    @contextlib.contextmanager
    def _or_remove(self, meta: Meta | None) -> Iterator[None]:
        """Remove a table that finds no room to be named in the manifest.

        After another error it may be named: it stays, and recovery removes it if it is not.
        """
        try:
            yield
        except DiskFull:
            if meta is not None:
                self._remove_output(meta.name)
            raise

    def _count(self, result: tuple[Any, ...] | None) -> Meta | None:
        if result is None:
            return None
        meta = Meta(*result)
        self._s.table_bytes_written += meta.size
        return meta

    def _open(self, meta: Meta) -> Table:
        s = self._s
        return open_table(s.env.disk, s.prefix, meta, table_number(meta.name))

    # -- merge and salvage

    async def step(self) -> bool:
        """One salvage or one merge; False if nothing is to be done."""
        s = self._s
        async with self._merging:
            for name in s.damaged:
                await self._salvage(name)
                return True
            await s.reserve.restore()
            plan = self.pending()
            if plan is None or not s.options.background:
                return False
            await self._merge(plan)
            return True

    def pending(self) -> policy.Plan | None:
        """The merge that is due, if any."""
        s = self._s
        sizes = [_Size(r, self._expired()) for r in s.runs]
        if s.reserve.missing and any(r.tombstones for r in sizes):
            return policy.everything(sizes)  # the disk is full: whatever gives space back
        return policy.pick(sizes, s.options.fanout)

    async def merge_all(self) -> None:
        """Salvage what is damaged and merge everything into one run."""
        s = self._s
        async with self._merging:
            while s.runs:
                for name in list(s.damaged):
                    await self._salvage(name)
                try:
                    await self._merge(policy.everything([_Size(r, 0) for r in s.runs]))
                    break
                except Corrupt:
                    if not s.damaged:
                        raise

    async def _merge(self, plan: policy.Plan) -> None:
        s = self._s
        inputs = s.runs[plan.start : plan.end]
        drop = plan.end == len(s.runs)
        done: Run | None = None  # what is merged so far: the keys below `start`
        start: bytes | None = b""
        while start is not None:
            merged = [*inputs, done] if done else inputs
            meta, rest = await self._merge_step(inputs, merged, start, drop=drop)
            tables = [*(done.tables if done else ()), *([self._open(meta)] if meta else ())]
            # No await up to `change`: a read may find more damage meanwhile.
            left = [] if rest is None else [_from(r, rest) for r in inputs]
            left = [r for r in left if r.tables or r.lost]
            lost = clip(union(x for r in merged for x in r.lost), b"", rest)
            done = Run(plan.level, tables, lost)
            with self._or_remove(meta):
                await s.commit(partial(_replace, merged, left, done, last=rest is None))
            kept = {t.meta.name for r in left for t in r.tables}
            await self._drop([t for r in inputs for t in r.tables if t.meta.name not in kept])
            inputs, start = left, rest
        self.merges += 1

    async def _merge_step(
        self, inputs: list[Run], merged: list[Run], start: bytes, *, drop: bool
    ) -> tuple[Meta | None, bytes | None]:
        """One table of a merge, from key `start` on; and where the next one begins."""
        s = self._s
        metas = [t.meta for r in inputs for t in r.tables]
        expired = self._expired() if any(m.expiring for m in metas) else 0
        entries = sum(t.meta.entries for r in merged for t in r.tables)
        target = self._target(merged, entries, drop=drop, expired=expired)
        room = s.env.disk.usage()[1] // (2 * len(inputs) + 2)
        try:
            result, rest = await s.env.processes.run(
                f"{JOBS}merge_tables",
                s.env.disk.path(),
                s.prefix,
                tuple((tuple(tuple(t.meta) for t in r.tables), r.lost) for r in inputs),
                start,
                min(s.options.table_bytes, max(MIN_TABLE, room)),
                tuple(target),
            )
        except DfsError as e:
            if isinstance(e, Corrupt) and e.details:
                self._found_damaged(e.details[0], str(e))
            self._remove_output(target.output)
            raise
        return self._count(result), rest

    async def _drop(self, tables: list[Table]) -> None:
        for table in tables:
            self._s.indexes.forget(table)
            self._s.retired.add(table)
        await self._s.remove([t.meta.name for t in tables])

    def _found_damaged(self, name: str, why: str) -> None:
        self._s.quarantine(name, why)
        self._s.damaged.setdefault(name, [])

    async def _salvage(self, name: str) -> None:
        """Replace a damaged table by a copy of its intact blocks; keep the original as `.bad`."""
        s = self._s
        found = [(r, t) for r in s.runs for t in r.tables if t.meta.name == name]
        if not found:
            s.damaged.pop(name, None)
            return
        run, table = found[0]
        output = s.table_name()
        bits = self._target([run], sum(t.meta.entries for t in run.tables), drop=False, expired=0)
        try:
            result, lost = await s.env.processes.run(
                f"{JOBS}salvage_table",
                s.env.disk.path(),
                s.prefix,
                tuple(table.meta),
                output,
                s.options.block_bytes,
                s.options.compression,
                bits.bits_per_key,
            )
        except DfsError:
            self._remove_output(output)
            raise
        meta = self._count(result)
        copy = [] if meta is None else [self._open(meta)]
        i = run.tables.index(table)
        tables = [*run.tables[:i], *copy, *run.tables[i + 1 :]]
        news = [x for x in lost if x not in run.lost]

        def change(runs: list[Run]) -> list[Run]:
            # What the salvage could read after all (a passing read error) is not lost.
            known = [x for x in run.lost if x not in s.damaged[name]]
            new = Run(run.level, tables, union((*known, *lost)))
            return [new if r is run else r for r in runs]

        with self._or_remove(meta):
            await s.commit(change)
        s.damaged.pop(name, None)
        s.indexes.forget(table)
        s.tell(news)
        path = f"{s.prefix}/{name}"
        disk = s.env.disk
        if disk.exists(path):
            await disk.run(disk.rename, path, f"{path}.bad")

    async def accept_losses(self, first: bytes, last: bytes | None) -> int:
        """Forget losses in a range; see `Store.accept_losses`."""
        s = self._s
        async with self._merging:
            for name in list(s.damaged):  # else the next read would find the same bad block
                await self._salvage(name)
            count = 0
            for run in s.runs:
                count += len(clip(run.lost, first, last))
                run.lost = without(run.lost, first, last)
            if count:
                await s.commit(lambda runs: runs)
        return count

    async def verify(self) -> list[str]:
        """Read every block of every table; returns what is wrong, and quarantines it."""
        s = self._s
        wrong = []
        for table in [t for r in s.runs for t in r.tables]:
            wrong += await self._check(table)
        return wrong

    async def verify_step(self) -> bool:
        """Check the table after `verify_cursor`, by name; True when that was the last one."""
        tables = {t.meta.name: t for r in self._s.runs for t in r.tables}
        names = sorted(n for n in tables if n > self.verify_cursor)
        if names:
            self.verify_cursor = names[0]
            await self._check(tables[names[0]])
        if len(names) > 1:
            return False
        self.verify_cursor = ""
        return True

    async def _check(self, table: Table) -> list[str]:
        """Read a table; what is bad counts as lost at once, as when a read had met it."""
        s = self._s
        bad = await s.env.processes.run(
            f"{JOBS}check_table", s.env.disk.path(), s.prefix, tuple(table.meta)
        )
        name = table.meta.name
        for run in s.runs:  # the table may have been merged away meanwhile, or in part
            for live in run.tables:
                if live.meta.name == name:
                    return [why for i, why in bad if self._mark(run, live, i, why)]
        return []

    def _mark(self, run: Run, table: Table, block: int, why: str) -> bool:
        """Let the keys of a bad block be lost; whether any of them is in use here."""
        try:
            if block >= 0 and table.range_of(block)[1] <= table.meta.first:
                return False
        except Corrupt:  # neither can its index be read any more
            block = -1
        self._s.on_damage(run, table, None if block < 0 else block, Corrupt(why, table.meta.name))
        return True


def _from(run: Run, start: bytes) -> Run:
    """The part of a run from key `start` on."""
    tables = [
        t if t.meta.first >= start else t.cut(start) for t in run.tables if t.meta.last >= start
    ]
    return Run(run.level, tables, clip(run.lost, start, None))


def _replace(
    merged: list[Run], left: list[Run], done: Run, runs: list[Run], *, last: bool
) -> list[Run]:
    """Put what a merge has left of its inputs, and after it its output, in the inputs' place.

    The order among them means nothing, their keys are disjoint; this one keeps levels ascending.
    Flushes may have added newer runs meanwhile.  A finished output joins the run after it if that
    is of its level and disjoint too: the rest of a merge that was interrupted, or data that came in
    key order and needs no merging.
    """
    i = runs.index(merged[0])
    older = runs[i + len(merged) :]
    new = [done] if done.tables or done.lost else []
    if last and new and older and older[0].level == done.level:
        joined = sorted((*done.tables, *older[0].tables), key=_first)
        apart = all(a.meta.last < b.meta.first for a, b in pairwise(joined))
        if apart and not done.lost and not older[0].lost:
            new, older = [Run(done.level, joined, ())], older[1:]
    return [*runs[:i], *left, *new, *older]


def _first(table: Table) -> bytes:
    return table.meta.first
