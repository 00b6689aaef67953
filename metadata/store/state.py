"""The sources of a store and their changes: what reads, writes and maintenance share.

All of it is changed on the loop, between awaits.  `commit` is the only writer of the manifest.
"""

from collections.abc import Callable, Sequence
from weakref import WeakSet, ref

import trio

from dfs.env import Env
from dfs.errors import Busy, Corrupt, DiskFull, StoreFailed
from metadata.store import expiry
from metadata.store import manifest as manifests
from metadata.store import own as own_rows
from metadata.store.cache import BlockCache
from metadata.store.losses import Loss
from metadata.store.manifest import Manifest
from metadata.store.memtable import Memtable
from metadata.store.options import StoreOptions
from metadata.store.reader import IndexBudget, Reader, Run
from metadata.store.recovery import Loaded
from metadata.store.reserve import Reserve
from metadata.store.table import FilterReads, Table
from metadata.store.wal import Log, pack_batch

MAX_ERRORS = 100  # texts kept

OnLoss = Callable[[bytes, bytes, str], None]  # first key, end of the range, table


class State:
    """Memtables, runs, log and manifest of one open store."""

    def __init__(self, env: Env, prefix: str, options: StoreOptions, loaded: Loaded) -> None:
        """Take over what recovery found."""
        self.env = env
        self.prefix = prefix
        self.options = options
        self.cache = BlockCache(options.cache_bytes)
        self.indexes = IndexBudget(options.index_bytes)
        self.log = Log(env.disk, prefix, loaded.segment, loaded.position)
        self.memtable, *frozen = loaded.memtables
        self.frozen: list[Memtable] = frozen  # newest first
        self.runs: list[Run] = loaded.runs  # newest first
        self.own = b""  # first bytes of the keys whose rows are all in `memtable`; `keep_own`
        self.limit = options.memtable_bytes  # bytes at which the memtable is frozen
        self.begun = -1  # log position at which the memtable had nothing but own rows
        self.next_table = loaded.manifest.next_table
        self.first_segment = loaded.manifest.first_segment
        self.first_base = loaded.manifest.first_base
        self.quarantined: list[str] = list(loaded.manifest.quarantined)
        self.errors: list[str] = []
        self.damaged: dict[str, list[Loss]] = {}  # tables to salvage, ranges suspected lost
        self.listeners: list[OnLoss] = []
        self.table_bytes_written = 0
        self.reserve = Reserve(env.disk, prefix, options.reserve_bytes)
        self.reads: dict[int, FilterReads] = {}  # by level
        self.retired: WeakSet[Table] = WeakSet()  # removed, but readers still hold them
        self._held: WeakSet[Memtable] = WeakSet()  # copies, and flushed ones; readers hold them
        self._copy: tuple[ref[Memtable], ref[Memtable], int] | None = None  # the last copy, of what
        self._lock = trio.Lock()
        self._work = trio.Event()
        self._count()
        self.reader = self._reader()
        for name, why in loaded.missing:
            self.quarantine(name, why)

    def now(self) -> int:
        """Seconds since the epoch, as this node's clock tells them."""
        return expiry.seconds(self.env.clock)

    def _reader(self) -> Reader:
        memtables = (self.memtable, *self.frozen)
        return Reader(memtables, self.runs, self.cache, self.on_damage, self.now, self.own)

    def _count(self) -> None:
        """Let tables count their reads for the level they are in, and their indexes here."""
        for run in self.runs:
            reads = self.reads.setdefault(run.level, FilterReads())
            for table in run.tables:
                table.reads = reads
                table.on_load = self.indexes.loaded

    def refresh(self) -> None:
        """Read from the present memtables and runs from now on, and look for work."""
        self.reader = self._reader()
        self.wake()

    def snapshot(self) -> Reader:
        """A reader of the state of now that later writes, merges and the clock do not change.

        Raises `Busy` when snapshots hold more than `snapshot_bytes` of memory.
        """
        held = self.snapshot_bytes()
        if held > self.options.snapshot_bytes:
            raise Busy(
                f"open snapshots hold {held} bytes of memory, over the limit of "
                f"{self.options.snapshot_bytes}; close some"
            )
        memtables = (self._copied(), *self.frozen)
        now = self.now()
        return Reader(memtables, self.runs, self.cache, self.on_damage, lambda: now, self.own)

    # -- own rows and the memtable

    def keep_own(self) -> None:
        """Have all own rows in the memtable from now on; of an older store they are in tables.

        Raises `Corrupt` when those are damaged, and what appending to the log raises.
        """
        own = self.options.own
        found = own_rows.gather((self.memtable, *self.frozen), own)
        if found is None:
            found = [own_rows.mark(own)]
            for first in own:
                found += self.reader.scan(bytes((first,)), bytes((first + 1,)), 1 << 62)
        missing = [item for item in found if item[0] not in self.memtable.data]
        empty = not self.memtable.data
        if missing:
            self._restate(missing)
        if empty:
            self.begun = self.log.written
        self.own = own
        self.limit = self.options.memtable_bytes + own_rows.size(found)
        self.refresh()

    def _restate(self, rows: Sequence[own_rows.Pair]) -> None:
        self.log.append(pack_batch(rows))
        self.memtable.apply(rows)

    async def freeze(self) -> None:
        """Put the memtable aside for a flush; the next one begins with the own rows.

        Raises `DiskFull` when there is no room for these; then nothing has changed.
        """
        number = await self.log.rotate()  # switches segments just before it returns: no await here
        memtable = self.memtable
        end = self.log.written
        kept = own_rows.rows_of(memtable, self.own) if self.own else []
        if kept:
            try:
                self.log.append(pack_batch(kept))
            except DiskFull:
                memtable.segments.append(number)
                raise
        memtable.end = end
        self.frozen.insert(0, memtable)
        self.memtable = Memtable([number])
        self.memtable.apply(kept)
        self.limit = self.options.memtable_bytes + self.memtable.bytes
        self.begun = self.log.written
        self.refresh()

    def _copied(self) -> Memtable:
        """A copy of the memtable, the last one if nothing was written since."""
        at = self.log.written
        if self._copy is not None and self._copy[1]() is self.memtable and self._copy[2] == at:
            last = self._copy[0]()
            if last is not None:
                return last
        copy = self.memtable.copy()
        self._held.add(copy)
        self._copy = ref(copy), ref(self.memtable), at
        return copy

    def snapshot_bytes(self) -> int:
        """Memory that only snapshots hold."""
        return sum([m.bytes for m in self._held])

    # -- work for the background

    def wake(self) -> None:
        """Tell those who wait for work to look again."""
        self._work.set()
        self._work = trio.Event()

    async def wait_work(self) -> None:
        """Wait for the next `wake`."""
        await self._work.wait()

    # -- trouble

    def note(self, text: str) -> None:
        """Keep an error for the operator."""
        if text not in self.errors:
            del self.errors[: len(self.errors) - MAX_ERRORS + 1]
            self.errors.append(text)

    def quarantine(self, name: str, why: str) -> None:
        """List a table as damaged."""
        if name not in self.quarantined:
            self.quarantined.append(name)
        self.note(why)

    def on_damage(self, run: Run, table: Table, block: int | None, error: Corrupt) -> None:
        """A read met a bad block (None: the whole table): its keys are lost from now on."""
        meta = table.meta
        first, last = (meta.first, meta.last + b"\0") if block is None else table.range_of(block)
        lost = first, last, meta.name
        suspected = self.damaged.setdefault(meta.name, [])
        if lost not in run.lost:
            run.lost = (*run.lost, lost)
            suspected.append(lost)
            self.tell([lost])
        self.quarantine(meta.name, str(error))
        self.wake()

    def tell(self, losses: Sequence[Loss]) -> None:
        """Tell the listeners of new losses."""
        for loss in losses:
            for listener in self.listeners:
                listener(*loss)

    # -- changes of the manifest

    def table_name(self) -> str:
        """A name for a new table, never used before, whatever an interrupted job left."""
        number = self.next_table
        self.next_table += 1
        return f"{number:08d}-{self.env.random.getrandbits(32):08x}.sst"

    async def commit(
        self,
        change: Callable[[list[Run]], Sequence[Run]],
        *,
        flushed: Memtable | None = None,
    ) -> None:
        """Durably replace the runs by `change(runs)`; `flushed` is the memtable now in a table.

        Raises `StoreFailed` when the manifest cannot be written safely, `DiskFull` when there is
        no room; then nothing has changed.
        """
        async with self._lock:
            runs = list(change(self.runs))
            first, base = self.first_segment, self.first_base
            if flushed is not None:
                first, base = max(flushed.segments) + 1, flushed.end
            manifest = Manifest(
                self.next_table,
                first,
                base,
                tuple(r.meta() for r in runs),
                tuple(self.quarantined),
            )
            try:
                await self.env.disk.run(manifests.write, self.env.disk, self.prefix, manifest)
            except StoreFailed as e:
                self.log.failed = e
                raise
            # No await from here on: readers see all of the change or nothing.
            self.runs = runs
            self._count()
            self.first_segment, self.first_base = first, base
            if flushed is not None:
                self.frozen.remove(flushed)
                self._held.add(flushed)
            self.refresh()

    async def remove(self, names: Sequence[str]) -> None:
        """Unlink files that the manifest no longer names; open readers keep their content."""
        disk = self.env.disk

        def unlink() -> None:
            for name in names:
                disk.unlink(f"{self.prefix}/{name}")

        await disk.run(unlink)
