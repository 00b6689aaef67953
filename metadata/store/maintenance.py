"""Background work of a store: flush, merge, salvage, verify.

The heavy part runs in another process on immutable files; here is only the order of things: the
new table is durable, then the manifest names it, then what it replaces is removed.  A job that
fails changes nothing and is tried again after a pause; `StoreFailed` ends the store.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from dfs.errors import Corrupt, DfsError, DiskFull, StoreFailed
from metadata.store import compaction, policy
from metadata.store.memtable import Memtable
from metadata.store.reader import Run
from metadata.store.recovery import table_number
from metadata.store.state import State
from metadata.store.table import Meta, Table, open_table

JOBS = "metadata.store.compaction:"
MAX_PAUSE = 60.0  # seconds between attempts of a job that fails


class _Size:
    """A run as the policy sees it."""

    def __init__(self, run: Run) -> None:
        self.level = run.level
        self.entries = sum(t.meta.entries for t in run.tables)
        self.tombstones = sum(t.meta.tombstones for t in run.tables)


class Maintenance:
    """Flushes and merges the tables of one store, one flush and one merge at a time."""

    def __init__(self, state: State) -> None:
        """Work on `state`."""
        self._s = state
        self._flushing = trio.Lock()
        self._merging = trio.Lock()
        self.flushes = 0
        self.merges = 0

    async def run(self) -> None:
        """Work until cancelled; raises `StoreFailed` when the disk cannot be trusted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._loop, "flush", self.flush_oldest)
            nursery.start_soon(self._loop, "compaction", self.step)

    async def _loop(self, name: str, step: Callable[[], Awaitable[bool]]) -> None:
        pause = 0.0
        while True:
            try:
                busy = await step()
                pause = 0.0
            except StoreFailed:
                raise
            except DfsError as e:
                self._s.note(f"{name}: {e}")
                pause = min(MAX_PAUSE, 2 * pause or 1.0)
                await trio.sleep(pause)
                continue
            if not busy:
                await self._s.wait_work()

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
            await s.commit(lambda runs: [*new, *runs], flushed=memtable)
            self.flushes += 1
            await s.remove(segments)
            return True

    async def _write(self, memtable: Memtable, *, drop: bool) -> Meta | None:
        s = self._s
        o = s.options
        output = s.table_name()
        try:
            result, _ = await s.env.processes.run(
                f"{JOBS}flush_segments",
                s.env.disk.path(),
                s.prefix,
                tuple(memtable.segments),
                output,
                drop,
                o.block_bytes,
                o.compression,
            )
        except (DiskFull, StoreFailed):
            raise
        except DfsError as e:
            # The segments are damaged, or the process dies on them: what they hold is in memory.
            s.note(f"flush from the log failed, flushing from memory: {e}")
            result, _ = await s.env.disk.run(
                compaction.flush_memtable,
                s.env.disk,
                s.prefix,
                memtable,
                output,
                drop,
                o.block_bytes,
                o.compression,
            )
        return self._count(result)

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
            plan = policy.pick([_Size(r) for r in s.runs], s.options.fanout)
            if plan is None or not s.options.background:
                return False
            await self._merge(plan)
            return True

    async def merge_all(self) -> None:
        """Salvage what is damaged and merge everything into one run."""
        s = self._s
        async with self._merging:
            while s.runs:
                for name in list(s.damaged):
                    await self._salvage(name)
                try:
                    level = max(r.level for r in s.runs)
                    await self._merge(policy.Plan(0, len(s.runs), level))
                    break
                except Corrupt:
                    if not s.damaged:
                        raise

    async def _merge(self, plan: policy.Plan) -> None:
        s = self._s
        o = s.options
        inputs = s.runs[plan.start : plan.end]
        drop = plan.end == len(s.runs)
        metas: list[Meta] = []
        start: bytes | None = b""
        names: list[str] = []
        try:
            while start is not None:
                names.append(s.table_name())
                result, start = await s.env.processes.run(
                    f"{JOBS}merge_tables",
                    s.env.disk.path(),
                    s.prefix,
                    tuple((tuple(tuple(t.meta) for t in r.tables), r.lost) for r in inputs),
                    names[-1],
                    start,
                    drop,
                    o.block_bytes,
                    o.table_bytes,
                    o.compression,
                )
                meta = self._count(result)
                if meta is not None:
                    metas.append(meta)
        except DfsError as e:
            if isinstance(e, Corrupt) and e.details:
                self._found_damaged(e.details[0], str(e))
            with trio.CancelScope(shield=True):
                await s.remove(names)
            raise
        tables = [self._open(m) for m in metas]
        lost = tuple(dict.fromkeys(x for r in inputs for x in r.lost))
        new = [Run(plan.level, tables, lost)] if tables or lost else []

        def change(runs: list[Run]) -> list[Run]:
            i = runs.index(inputs[0])  # flushes may have added newer runs meanwhile
            return [*runs[:i], *new, *runs[i + len(inputs) :]]

        await s.commit(change)
        self.merges += 1
        await self._drop([t for r in inputs for t in r.tables])

    async def _drop(self, tables: list[Table]) -> None:
        for table in tables:
            self._s.indexes.forget(table)
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
        result, lost = await s.env.processes.run(
            f"{JOBS}salvage_table",
            s.env.disk.path(),
            s.prefix,
            tuple(table.meta),
            output,
            s.options.block_bytes,
            s.options.compression,
        )
        meta = self._count(result)
        copy = [] if meta is None else [self._open(meta)]
        i = run.tables.index(table)
        tables = [*run.tables[:i], *copy, *run.tables[i + 1 :]]

        def change(runs: list[Run]) -> list[Run]:
            # What the salvage could read after all (a passing read error) is not lost.
            known = [x for x in run.lost if x not in s.damaged[name]]
            new = Run(run.level, tables, tuple(dict.fromkeys((*known, *lost))))
            return [new if r is run else r for r in runs]

        await s.commit(change)
        s.damaged.pop(name, None)
        s.indexes.forget(table)
        path = f"{s.prefix}/{name}"
        disk = s.env.disk
        if disk.exists(path):
            await disk.run(disk.rename, path, f"{path}.bad")

    async def verify(self) -> list[str]:
        """Read every block of every table; returns what is wrong, and quarantines it."""
        s = self._s
        wrong = []
        for table in [t for r in s.runs for t in r.tables]:
            why = await s.env.processes.run(
                f"{JOBS}check_table", s.env.disk.path(), s.prefix, tuple(table.meta)
            )
            if why and any(table in r.tables for r in s.runs):  # not merged away meanwhile
                self._found_damaged(table.meta.name, why)
                wrong.append(why)
        s.wake()
        return wrong
