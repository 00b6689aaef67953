"""The store: an ordered map of bytes to bytes on one disk, durable and checked.

A log-structured merge tree (O'Neil et al. 1996).  `batch` is the only mutation: it appends one log
record, applies it to the memtable and waits for the group commit.  Reads are synchronous and never
wait for a write: they see a batch from the moment it is logged, which may be shortly before it is
durable; who must not act on what a power loss could undo awaits `sync` first.

Concurrency: everything runs on one loop; between awaits there is mutual exclusion.  In `batch` no
await may come between the log append and the memtable: their order must be the same.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Self

import trio

from dfs.env import Env
from dfs.errors import Corrupt, DiskFull
from metadata.store import expiry, recovery, report
from metadata.store.losses import Loss, clip, union
from metadata.store.maintenance import Maintenance
from metadata.store.manifest import note_made
from metadata.store.ops import Op, measure
from metadata.store.options import StoreOptions
from metadata.store.snapshot import SCAN_LIMIT, Item, Snapshot, bounds
from metadata.store.state import OnLoss, State
from metadata.store.wal import pack_batch

DEFAULTS = StoreOptions()
FREED = 4  # times that deletes wait for a merge to give space back


class Store:
    """An open store; made by `Store.open`."""

    def __init__(self, state: State, tail_cut: int) -> None:
        """Use `Store.open`."""
        self._state = state
        self._maintenance = Maintenance(state)
        self._rotating = trio.Lock()
        self._counts = report.Counts(tail_cut)
        self.refuse_puts: Callable[[], bool] | None = None

    @classmethod
    async def open(cls, env: Env, prefix: str = "lsm", options: StoreOptions = DEFAULTS) -> Self:
        """Open or create the store in directory `prefix` of the disk.

        Raises `Corrupt` when acknowledged data is damaged beyond what can be named key by key.
        """
        loaded = await env.disk.run(recovery.load, env.disk, prefix, options)
        state = State(env, prefix, options, loaded)
        state.memtable.segments.append(await state.log.rotate())
        await env.disk.run(note_made, env.disk, prefix)
        await state.reserve.restore()
        if options.own:
            try:
                state.keep_own()
            except DiskFull:
                if not await state.reserve.release():
                    raise
                state.keep_own()
            await state.log.sync()
        return cls(state, loaded.cut)

    async def run(self) -> None:
        """Flush and merge in the background until cancelled; raises `StoreFailed`."""
        await self._maintenance.run()

    def close(self) -> None:
        """Refuse further writes; nothing is lost, what is in memory is also in the log."""
        self._state.log.close()

    # -- writes

    async def batch(self, ops: Sequence[Op], *, sync: bool = True) -> None:
        """Apply puts and deletes atomically; with `sync` they are durable on return.

        An operation is (key, value), (key, None) to delete, or (key, value, expires): such a key is
        absent from that second since the epoch on.  Later operations of a batch win over earlier
        ones.  Raises `InvalidArgument`, `DiskFull` (nothing was applied), or `StoreFailed` (whether
        it is durable is unknown; the store takes no more writes).  A cancelled batch may have been
        applied.

        While `refuse_puts()` is true (a node sets it, to stop before its disk is full), or the
        disk has been full and the reserve is not restored yet, batches with puts are refused with
        `DiskFull`; deletes pass, and may use the reserve.
        """
        pairs, size, puts = measure(ops)
        state = self._state
        if puts and (state.reserve.missing or (self.refuse_puts and self.refuse_puts())):
            raise DiskFull(
                f"{state.env.disk.path(state.prefix)}: the disk is nearly full, only deletes are "
                "taken; delete data or add capacity"
            )
        if state.memtable.bytes >= state.limit:
            await self._retried(self._make_room)
        if pairs:
            payload = pack_batch(pairs)
            if puts:
                state.log.append(payload)
            else:
                await self._append_deletes(payload)
            state.memtable.apply(pairs)
            self._counts.user_bytes += size
            self._counts.ops += len(pairs)
        if sync:
            await state.log.sync()

    async def put(self, key: bytes, value: bytes, *, ttl: float) -> None:
        """Write one value durably that is absent `ttl` seconds from now, by this node's clock."""
        await self.batch([(key, value, expiry.after(self._state.env.clock, ttl))])

    async def sync(self) -> None:
        """Return when everything that reads see is durable; free when it is already."""
        await self._state.log.sync()

    async def _append_deletes(self, payload: bytes) -> None:
        """Append to the log, on a full disk with the space of the reserve.

        When merges have that, wait until they give back what they replace.
        """
        state = self._state
        for _ in range(FREED):
            with suppress(DiskFull):
                state.log.append(payload)
                return
            if not await state.reserve.release():
                try:
                    freed = await self._maintenance.step() or await self._maintenance.flush_oldest()
                except DiskFull:
                    break
                if not freed:
                    break
        state.log.append(payload)

    async def _retried(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it, on a full disk once more with the space of the reserve."""
        try:
            await work()
        except DiskFull:
            if not self._state.reserve.held:
                raise
        else:
            return
        # Out here the error is gone, and with its frames the removed tables that they hold open.
        await self._state.reserve.release()
        await work()

    async def _make_room(self) -> None:
        s = self._state
        async with self._rotating:
            while s.memtable.bytes >= s.limit:
                if len(s.frozen) >= s.options.max_frozen:
                    await self._maintenance.flush_oldest()
                elif not await self._merged():
                    await s.freeze()

    async def _merged(self) -> bool:
        """Merge some of too many runs; whether that changed anything.

        Damage that this meets is told of, and salvaged by the next step: no reason to refuse a
        batch.  Many runs of different levels may leave nothing to merge.
        """
        s = self._state
        if not s.options.background or len(s.runs) < s.options.max_runs:
            return False
        try:
            return await self._maintenance.step()
        except Corrupt:
            if not s.damaged:
                raise
            return True

    async def flush(self) -> None:
        """Put everything that is in memory into tables."""
        await self._retried(self._flush)

    async def _flush(self) -> None:
        s = self._state
        async with self._rotating:
            if s.memtable.data and s.log.written != s.begun:
                await s.freeze()
        while await self._maintenance.flush_oldest():
            pass

    async def compact(self) -> None:
        """Flush, salvage what is damaged, and merge everything into one run."""
        await self.flush()
        await self._retried(self._maintenance.merge_all)

    async def verify(self) -> list[str]:
        """Read every table completely; returns what is wrong, which is then quarantined."""
        return await self._maintenance.verify()

    async def verify_step(self) -> bool:
        """Like `verify` for the table after `verify_cursor`; True when a round is complete."""
        return await self._maintenance.verify_step()

    @property
    def verify_cursor(self) -> str:
        """Where the next `verify_step` goes on; set it to resume a round after a restart."""
        return self._maintenance.verify_cursor

    @verify_cursor.setter
    def verify_cursor(self, cursor: str) -> None:
        self._maintenance.verify_cursor = cursor

    # -- reads

    def get(self, key: bytes) -> bytes | None:
        """The value, None if absent; raises `Corrupt` when damage hides it."""
        return self._state.reader.get(key)

    def get_many(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """The values in the order of the keys; see `get`."""
        get = self._state.reader.get
        return [get(key) for key in keys]

    def scan(
        self,
        prefix: bytes,
        after: bytes = b"",
        limit: int = SCAN_LIMIT,
        *,
        end: bytes = b"",
        skip_lost: bool = False,
    ) -> list[Item]:
        """Up to `limit` items whose keys start with `prefix` and are greater than key `after`.

        They are below key `end` if that is given.  Raises `Corrupt` when damage hides any of the
        part that was looked at; with `skip_lost` goes around, see `lost`.
        """
        start, stop = bounds(prefix, after, end)
        return self._state.reader.scan(start, stop, limit, skip_lost=skip_lost)

    def iterate(
        self,
        prefix: bytes = b"",
        after: bytes = b"",
        end: bytes = b"",
        *,
        skip_lost: bool = False,
    ) -> Iterator[Item]:
        """All such items on a snapshot of now, whatever is written meanwhile; see `scan`.

        Holds one block per run in memory, and the snapshot until it is exhausted or dropped.
        """
        return self.snapshot().iterate(prefix, after, end, skip_lost=skip_lost)

    def snapshot(self) -> Snapshot:
        """A consistent view of now; costs a copy of the memtable's dict if there were writes.

        Raises `Busy` when open snapshots hold more memory than `snapshot_bytes`.
        """
        return Snapshot(self._state.snapshot())

    # -- damage

    @property
    def quarantined(self) -> list[str]:
        """Names of damaged tables; their intact part stays in use, the original is `NAME.bad`."""
        return list(self._state.quarantined)

    @property
    def errors(self) -> list[str]:
        """What went wrong since the store was opened."""
        return list(self._state.errors)

    def lost(self, first: bytes = b"", last: bytes | None = None) -> list[Loss]:
        """What damage hides of the keys in [first, last): (first key, end, table), ascending.

        Keys that were written again since are listed too; they read well.  None is the end of the
        key space; an empty table name means that the damage is older than the record of names.
        """
        return sorted(union(clip((x for r in self._state.runs for x in r.lost), first, last)))

    async def accept_losses(self, first: bytes = b"", last: bytes | None = None) -> int:
        """Let lost keys in [first, last) read as absent or older; returns how many ranges.

        For whoever has restored the data from replicas, or gives it up.  Takes damaged tables out
        of use first; durable on return.
        """
        return await self._maintenance.accept_losses(first, last)

    def on_damage(self, listener: OnLoss) -> None:
        """Call `listener(first key, end, table)` for every loss found from now on.

        It runs in the middle of a read, so it must only take note; `lost` has the earlier ones.
        """
        self._state.listeners.append(listener)

    # -- what operators see

    def statistics(self) -> dict[str, Any]:
        """Sizes in bytes and counts since the store was opened."""
        return report.statistics(self._state, self._maintenance, self._counts)

    def lsm(self) -> dict[str, Any]:
        """The tree as `dfs kv lsm` shows it, in values of `dfs.codec`; see `report.lsm`."""
        return report.lsm(self._state, self._maintenance, self._counts)
