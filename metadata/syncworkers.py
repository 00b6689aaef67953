"""The loops that keep a metadata node equal to its peers; `metadata/SYNC.md` has the promises.

| worker | when |
|---|---|
| `anti-entropy` | every pair of homes each 10 min; at once when a peer came back, or a new map |
| `hints` | looks every 10 s for targets that are alive and came back 0 to 10 s ago |
| `tombstones` | every hour |
| `digests` | builds what is missing at the start, and recomputes everything once a week |
| `storage-repair` | at once when a read meets damage or a map is new; each 3 s while any wait |
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from dfs import codec
from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Env
from dfs.errors import Corrupt, DeadlineExceeded, DfsError, Unreachable
from dfs.hashing import PARTITIONS
from dfs.pace import Bandwidth
from dfs.workers import Worker
from metadata.antientropy import members
from metadata.exchange import Outcome
from metadata.merkle import BLOBS, REGISTERS, TABLES, Table
from metadata.pull import enough, pull_partition
from metadata.renewals import Loss, renew_once
from metadata.repair import ROW as REBUILD
from metadata.repair import rebuild, recall, remember, repair_lost
from metadata.steps import Correct, Steps, Write
from metadata.store.engine import Store
from metadata.synchronise import Synchroniser

log = logging.getLogger(__name__)
MIB = 1 << 20
SLICE = 256  # partitions exchanged under one time stamp
JITTER = 10.0  # seconds within which a node that came back gets its hints
_FIRST_BYTE = {REGISTERS: b"r", BLOBS: b"b"}
CHECK = b"ndigestcheck"  # row: (format, when the last check ended, table, partition to go on with)
AGAIN = 45.0  # seconds until rows that were too young to compare are compared
PULL_AGAIN = 3.0  # seconds until partitions that could not be compared yet are tried again
AFTER_ERROR = 10.0  # seconds until a repair that failed is tried again
SNAPSHOT_USES = 64  # partitions recomputed on one snapshot
ACCEPTANCES = 8  # of losses in one round: the first finds more, later ones what reads just met


class SyncWorker(Worker):
    """A worker that drives protocols and rests between their steps."""

    def __init__(
        self, env: Env, sync: Synchroniser, interval: float, *, first: float | None = None
    ) -> None:
        """Over `sync`."""
        super().__init__(env, interval, first=first)
        self.sync = sync

    async def _rest(self, size: int, backlog: int) -> None:
        self.did(0, size)
        await self.rest(size=size, backlog=backlog)

    async def _recompute(
        self, snapshots: "_Snapshots", table: int, partition: int, *, prepared: bool = False
    ) -> int:
        """Rebuild the digests of a partition (see `rebuild`); returns how many sums were wrong."""
        damaged = self.sync.digests.damaged
        where = table, partition
        was = where in damaged
        try:
            steps = rebuild(snapshots, *where, damaged=was, prepared=prepared)
            return await self.sync.run(steps, self._rest)
        except DfsError:
            if was:  # a correction that the store refused does not count
                damaged[where] = None
            raise


class AntiEntropyWorker(SyncWorker):
    """Exchanges with every node that shares a partition; dirty ones and returned ones first."""

    name = "anti-entropy"

    def __init__(
        self, env: Env, sync: Synchroniser, *, interval: float = 600.0, first: float = 20.0
    ) -> None:
        """Every pair is driven from both sides, each at half the rate."""
        super().__init__(env, sync, interval, first=first)
        self._usual = interval
        self._urgent: dict[int, None] = {}
        self.total = Outcome()

    def returned(self, node: int) -> None:
        """Gossip says that a node is alive again: exchange with it at once."""
        self._urgent[node] = None
        self.wake()

    def map_changed(self, _old: ClusterMap, _new: ClusterMap) -> None:
        """Homes may have changed: exchange with everybody at once; for `MapKeeper.subscribe`."""
        self.wake()

    async def run_once(self) -> int:
        """Exchange with everybody who is alive; returns the rows moved."""
        sync = self.sync
        peers = sync.antientropy.peers(sync.get_map())
        first = [*sync.hints.dirty(), *self._urgent]
        self._urgent.clear()
        order = [p for p in dict.fromkeys((*first, *peers)) if p in peers and sync.alive(p)]
        problems: list[str] = []
        moved = 0
        young = False
        for i, peer in enumerate(order):
            self.progress = f"node {peer} ({i + 1} of {len(order)})"
            self.fraction = i / len(order)
            try:
                outcome = await self._exchange(peer)
            except DfsError as e:
                problems.append(f"node {peer}: {e}")
                continue
            self.total.add(outcome)
            del self.total.errors[:-10]
            problems += [f"node {peer}: {e}" for e in outcome.errors[:3]]
            moved += outcome.pulled + outcome.pushed
            if outcome.fresh:
                young = True
                self._urgent[peer] = None
        # what was left alone because it was young is looked at again when it is not
        self._interval = min(AGAIN, self._usual) if young else self._usual
        done = self.total
        self.progress = f"{done.pulled} pulled, {done.pushed} pushed in all"
        if problems:
            self.last_error = "; ".join(problems[:3])
        return moved

    async def _exchange(self, peer: int) -> Outcome:
        sync = self.sync
        node = sync.antientropy
        since = sync.now()
        outcome = Outcome()
        for table in TABLES:
            differing = await sync.run(node.differing(peer, table))
            for i in range(0, len(differing), SLICE):
                part = tuple(differing[i : i + SLICE])
                steps = node.exchange(peer, sync.now(), tables=(table,), partitions=part)
                outcome.add(await sync.run(steps, self._rest))
        complete = all(sync.digests.built(table) for table in TABLES) and not outcome.errors
        if complete and (ops := sync.hints.cleaned(peer, since)):
            await sync.run(_write(ops))
        return outcome


class HintDelivery(SyncWorker):
    """Hands hints to nodes that are alive again, and drops those that are too old."""

    name = "hints"

    def __init__(self, env: Env, sync: Synchroniser, *, interval: float = 10.0) -> None:
        """8 MiB/s, more as they pile up."""
        super().__init__(env, sync, interval)
        self.bandwidth = Bandwidth(8 * MIB, deep=64 * MIB)
        self._from: dict[int, float] = {}  # target -> when to begin

    def returned(self, node: int) -> None:
        """Gossip says that a node is alive again: begin 0 to 10 s from now."""
        if node in self.sync.hints.waiting():
            self._from[node] = self._env.clock.monotonic() + self._env.random.uniform(0, JITTER)

    async def run_once(self) -> int:
        """Deliver to everybody who is alive; returns the hints delivered."""
        sync = self.sync
        await sync.run(sync.hints.expire(sync.now()), self._rest)
        delivered = 0
        for target in sync.hints.waiting():
            if not sync.alive(target):
                self._from.pop(target, None)
                continue
            if self._env.clock.monotonic() < self._from.get(target, 0.0):
                continue
            try:
                delivered += await sync.run(sync.hints.deliver(target, sync.now()), self._rest)
            except DfsError as e:
                self.last_error = f"node {target}: {e}"
        waiting = sync.hints.waiting()
        self.progress = f"{sync.hints.size()} bytes for {len(waiting)} nodes"
        return delivered


class TombstonePurge(SyncWorker):
    """Purges what was deleted long ago, in the partitions this node is first home of."""

    name = "tombstones"

    def __init__(self, env: Env, sync: Synchroniser, *, interval: float = 3600.0) -> None:
        """Scanning is paced; a pass over everything takes what it takes."""
        super().__init__(env, sync, interval)

    async def run_once(self) -> int:
        """Purge what is prepared, prepare more; returns the rows purged."""
        sync = self.sync
        tombstones = sync.tombstones
        purged = await sync.run(tombstones.purge(sync.now()), self._rest)
        for partition in range(PARTITIONS):
            self.fraction = partition / PARTITIONS
            if not sync.digests.total(0, partition):
                continue  # no registers
            try:
                await sync.run(tombstones.prepare(partition, sync.now()), self._rest)
            except DfsError as e:
                self.last_error = f"partition {partition}: {e}"
        self.progress = f"{tombstones.purged} purged, {tombstones.prepared} prepared in all"
        return purged


class _Snapshots:
    """Snapshots that are used for a while."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uses = 0
        self._snapshot: Table | None = None

    def __call__(self, fresh: bool) -> Table:
        self._uses += 1
        if self._snapshot is None or fresh or self._uses > SNAPSHOT_USES:
            self._snapshot = self._store.snapshot()
            self._uses = 0
        return self._snapshot

    def drop(self) -> None:
        self._snapshot = None


class DigestCheck(SyncWorker):
    """Recomputes digests from the data: once for tables that have none, then every week."""

    name = "digests"

    def __init__(
        self, env: Env, sync: Synchroniser, *, interval: float = 3600.0, every: float = 7 * 86400.0
    ) -> None:
        """Looks each `interval` whether a check is due; where one is survives a restart."""
        super().__init__(env, sync, interval, first=0.0)
        self._every = int(every * 1e6)
        self._finished, self._table, self._next = 0, 0, 0
        if (raw := sync.store.get(CHECK)) is not None:
            form, self._finished, self._table, self._next = codec.unpack(raw)
            if form != 1:
                raise Corrupt(f"the state of the check of digests has format {form}: upgrade dfs")

    async def run_once(self) -> int:
        """Check what is due; returns the buckets found wrong."""
        sync = self.sync
        found = 0
        for table in TABLES:
            if not sync.digests.built(table):
                if sync.store.scan(_FIRST_BYTE[table], b"", 1):
                    found += await self._check(table, 0)
                await sync.run(_write(sync.digests.mark_built(table)))
        if not self._finished:  # what was built just now needs no check
            self._finished = sync.now()
            await self._save()
        if sync.now() - self._finished > self._every:
            for table in TABLES[self._table :]:
                found += await self._check(table, self._next)
                self._table, self._next = table + 1, 0
            self._finished, self._table = sync.now(), 0
            await self._save()
        drift = sync.digests.drift
        self.progress = f"{drift} sums found wrong since the start"
        if drift:
            self.last_error = (
                f"{drift} digests did not match their rows and were corrected: a defect, please "
                "report it with the node's log"
            )
            log.error("%s", self.last_error)
        return found

    async def _check(self, table: int, first: int) -> int:
        sync = self.sync
        snapshots = _Snapshots(sync.store)
        found = 0
        for partition in range(first, PARTITIONS):
            self.fraction = partition / PARTITIONS
            try:
                found += await self._recompute(snapshots, table, partition)
            except Corrupt as e:
                self.last_error = f"partition {partition}: {e}"
            if partition % SNAPSHOT_USES == 0:
                await trio.lowlevel.checkpoint()
                if sync.digests.built(table):
                    self._table, self._next = table, partition
                    await self._save()
        return found

    async def _save(self) -> None:
        state = codec.pack((1, self._finished, self._table, self._next))
        await self.sync.run(_write([(CHECK, state)]))


class StorageRepair(SyncWorker):
    """Repairs what the store lost, and pulls the partitions that wait."""

    name = "storage-repair"

    def __init__(
        self,
        env: Env,
        sync: Synchroniser,
        lost_registers: Callable[[], Steps[None]],
        *,
        interval: float = 60.0,
    ) -> None:
        """`lost_registers` gives the node another name to mint under (`metadata.actors`)."""
        super().__init__(env, sync, interval, first=1.0)
        self._usual = interval
        self._lost_registers = lost_registers
        recall(sync.store, sync.digests)
        sync.store.on_damage(self._damage)

    def _damage(self, _first: bytes, _end: bytes, _table: str) -> None:
        """A read met damage: until it is repaired this node is a copy less for every reader."""
        self.wake()

    def map_changed(self, _old: ClusterMap, _new: ClusterMap) -> None:
        """Partitions may wait here since: pull them at once; for `MapKeeper.subscribe`."""
        self.wake()

    async def run_once(self) -> int:
        """Repair, rebuild, pull; returns the partitions that became whole."""
        sync = self.sync
        self._interval = min(AFTER_ERROR, self._usual)
        try:
            await sync.settle_marks()
            await self._accept()
            rebuilt = await self._rebuild()
            done = await self._pull()
        finally:
            left = len(sync.pull_first.partitions())
            self.progress = f"{left} partitions wait for their other homes" if left else ""
        if left:  # while they wait they are a copy less for every reader
            self._interval = min(PULL_AGAIN, self._usual)
        elif rebuilt:
            self._interval = self._usual
        return done

    async def _accept(self) -> None:
        """Let go of what the store lost, so that others can give it.

        The first acceptance reads the damaged tables to their ends, and so finds more: nothing can
        be rebuilt before all of that is accepted, too.
        """
        sync = self.sync
        for _ in range(ACCEPTANCES):
            losses = sync.store.lost()
            if not losses:
                break
            steps = repair_lost(
                sync.antientropy,
                sync.pull_first,
                losses,
                lost_registers=partial(self._renew, losses),
            )
            await sync.run(steps)

    async def _rebuild(self) -> bool:
        """Rebuild all damaged digests, also what an error left undone; whether none is left.

        All partitions may be damaged, if one bad block had their sums, and each needs a snapshot
        that is younger than its preparation, which copies the memtable: so many share one.
        """
        sync = self.sync
        damaged = sorted(sync.digests.damaged)
        for i in range(0, len(damaged), SNAPSHOT_USES):
            self.fraction = i / len(damaged)
            prepared = [
                where
                for where in damaged[i : i + SNAPSHOT_USES]
                if await self._rebuilt(where[1], sync.run(_prepare(*where)))
            ]
            snapshots = _Snapshots(sync.store)
            for where in prepared:
                steps = self._recompute(snapshots, *where, prepared=True)
                await self._rebuilt(where[1], steps)
        ops = remember(sync.digests)
        if sync.store.get(REBUILD) != ops[0][1]:
            await sync.run(_write(ops))
        return not sync.digests.damaged

    async def _rebuilt(self, partition: int, work: Awaitable[object]) -> bool:
        """Whether a part of a rebuild succeeds; others may fare better."""
        try:
            await work
        except DfsError as e:
            self.last_error = f"partition {partition}: {e}"
            return False
        return True

    def _ready(self) -> list[int]:
        """Partitions that wait, and whose digests say what is here.

        Others look as if they had rows that are lost: they would be taken for equal.
        """
        sync = self.sync
        damaged = sync.digests.damaged
        return [p for p in sync.pull_first.partitions() if (REGISTERS, p) not in damaged]

    async def _pull(self) -> int:
        """Let partitions wait no more that were compared."""
        sync = self.sync
        cluster = sync.get_map()
        away = {n.number for n in cluster.nodes if n.number != sync.me and not sync.alive(n.number)}
        done = await self._finish_equal(away)
        waiting = self._ready()
        told: list[str] = []
        for i, partition in enumerate(waiting):
            self.fraction = i / len(waiting)
            try:
                steps = pull_partition(sync.antientropy, partition, sync.now(), told, away)
                if await sync.run(steps, self._rest):
                    await sync.run(_write(sync.pull_first.finish([partition])))
                    done += 1
            except DfsError as e:  # of this partition; the others may fare better
                told.append(f"partition {partition}: {e}")
        if told:
            self.last_error = "; ".join(told[:3])
        return done

    def returned(self, _node: int) -> None:
        """A home that may be needed is alive again."""
        if self.sync.pull_first.partitions():
            self.wake()

    async def _finish_equal(self, away: set[int]) -> int:
        """Let partitions wait no more that are equal at enough other homes; one call for each.

        The usual outcome for a node that comes back: it took part in all that happened.
        """
        sync = self.sync
        waiting = self._ready()
        if not waiting or not sync.digests.built(REGISTERS):
            return 0
        cluster = sync.get_map()
        homes = {p: members(cluster, p) for p in waiting}
        equal: dict[int, list[int]] = {p: [] for p in waiting}
        # Nobody asks a node that is no home; becoming one again begins with empty hands.
        strange = [p for p in waiting if sync.me not in homes[p]]
        for peer in sorted({x for row in homes.values() for x in row} - {sync.me} - away):
            shared = [p for p in waiting if peer in homes[p] and sync.me in homes[p]]
            try:
                found = await sync.run(sync.antientropy.differing(peer, REGISTERS, shared))
            except DfsError as e:
                if isinstance(e, (Unreachable, DeadlineExceeded)):
                    away.add(peer)
                self.last_error = f"node {peer}: {e}"
                continue
            differing = set(found)
            for p in shared:
                if p not in differing:
                    equal[p].append(peer)
        changed = sync.get_map()
        done = strange + [
            p
            for p in waiting
            if sync.me in homes[p]
            and enough(cluster, p, sync.me, equal[p])
            and changed.last_change(METADATA, p) == cluster.last_change(METADATA, p)
        ]
        if done:
            await sync.run(_write(sync.pull_first.finish(done)))
        return len(done)

    def _renew(self, losses: Sequence[Loss]) -> Steps[None]:
        yield from renew_once(self.sync.store, losses, self._lost_registers)


def _prepare(table: int, partition: int) -> Steps[None]:
    yield Correct(table, partition, None)


def _write(ops: Sequence[tuple[bytes, bytes | None]]) -> Steps[None]:
    yield Write(ops)


def workers(
    env: Env, sync: Synchroniser, lost_registers: Callable[[], Steps[None]]
) -> tuple[AntiEntropyWorker, HintDelivery, TombstonePurge, DigestCheck, StorageRepair]:
    """All of them."""
    return (
        AntiEntropyWorker(env, sync),
        HintDelivery(env, sync),
        TombstonePurge(env, sync),
        DigestCheck(env, sync),
        StorageRepair(env, sync, lost_registers),
    )
