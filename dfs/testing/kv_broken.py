"""The broken rules of the register simulation: subclasses and functions, as small as the rule.

What each of them breaks is said in `dfs.testing.kv_mutants.MUTANTS`, under the names of the tables
at the end.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from dfs.cluster.joint import Rules
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import DfsError, StaleEpoch
from metadata import coordinator, operation, quorum, registers, steps, tombstones, versions
from metadata.actors import Actors
from metadata.antientropy import AntiEntropy, members
from metadata.coordinator import Coordinator
from metadata.hints import Hints
from metadata.merkle import REGISTERS, Change, Digests, Op, value_digest
from metadata.operation import Operation
from metadata.quorum import Plan, Quota
from metadata.regained import Regained
from metadata.registers import Registers
from metadata.rejoin import PullFirst
from metadata.tombstones import Tombstones
from metadata.versions import Register, Vector


class _Keeps(Regained):
    def take(self, touched: Iterable[int]) -> list[int]:
        self.cleared(list(self.pending))
        return []


class _MixesOld(Registers):
    def rule_unjudged(self, now_us: int, partition: int, own: Any) -> bool:
        return False


class _KeepsOld(Registers):
    regained_class: type[Regained] = _Keeps


class _AnyEpoch(Registers):
    def rule_stale(self, epoch: int, changed: int) -> bool:
        return False


class _AnyWrite(Registers):
    reading = True

    def _one(self, now_us: int, epoch: int, request: Any, *rest: Any) -> Any:
        self.reading = request[0] == registers.GET
        try:
            return super()._one(now_us, epoch, request, *rest)
        finally:
            self.reading = True

    def rule_stale(self, epoch: int, changed: int) -> bool:
        return self.reading and epoch < changed


class _AnyRead(Registers):
    writing = False

    def _one(self, now_us: int, epoch: int, request: Any, *rest: Any) -> Any:
        self.writing = request[0] != registers.GET
        try:
            return super()._one(now_us, epoch, request, *rest)
        finally:
            self.writing = False

    def rule_stale(self, epoch: int, changed: int) -> bool:
        return self.writing and epoch < changed


class _NoRepair(Operation):
    __slots__ = ()

    def _weak(self) -> bool:
        return True


class _Repair1(Operation):
    __slots__ = ()

    def _durable(self) -> bool:
        return bool(self.acked) if not self.mints else super()._durable()


class _RepairPW(Operation):
    __slots__ = ()

    def _durable(self) -> bool:
        if self.mints:
            return super()._durable()
        return _any_copy(self.plan.writes, self.acked, self.hinted)


class _M3(Operation):
    __slots__ = ()

    def _on_failure(self, now: float, node: int, kind: str, target: int, error: DfsError) -> None:
        if kind == registers.MERGE and isinstance(error, StaleEpoch):
            self._on_copy(node)
        else:
            super()._on_failure(now, node, kind, target, error)


class _MintB(Coordinator):
    def _plan_for(self, partition: int, options: Any) -> Plan:
        plan = self.plan(partition, options)
        return plan if self.number in plan.writers else super()._plan_for(partition, options)


class _Forgetful(Coordinator):
    def start_put(self, now: float, token: Any, *rest: Any) -> Any:
        self._memory.clear()
        return super().start_put(now, token, *rest)


class _MintAgain(Coordinator):
    def finish(self, operation: Operation, result: Any) -> None:
        super().finish(operation, result)
        known = self._memory.get(operation.options.request)
        if known is not None and not known.register and isinstance(result, Exception):
            del self._memory[operation.options.request]


class _NoMap(Coordinator):
    def changed_since(self, operation: Operation) -> bool:
        return False


class _Fence1(Rules):
    def fenced(self, m: ClusterMap) -> int:
        return super().fenced(m) - 1

    def witnesses(self, m: ClusterMap) -> int:
        return 0


class _Push1(Rules):
    def pushed(self, m: ClusterMap) -> int:
        return super().pushed(m) - 1


class _ReadFence1(Rules):
    def read_fenced(self, m: ClusterMap) -> int:
        return 0


class _AnyReport(Rules):
    def since(self, m: ClusterMap, role: str, partition: int) -> int:
        return 0


class _ExPush(AntiEntropy):
    def may_send(self, *_: Any) -> bool:
        return True

    def _check(self, *_: Any) -> None:
        pass

    def peers(self, cluster: ClusterMap) -> list[int]:
        return [n.number for n in cluster.nodes if n.metadata_addr and n.number != self.me]

    def shared(self, cluster: ClusterMap, peer: int) -> list[int]:
        return [p for p in range(64) if peer in cluster.write_sets(METADATA, p)[-1]]


class _PushWaiting(AntiEntropy):
    def rule_vouches(self, partition: int) -> bool:
        return True


class _OldHints(Hints):
    ttl = 1 << 62


class _HintSender(Hints):
    def deliver(self, target: int, now: int) -> Any:
        return super().deliver(target, 0)

    def expire(self, now: int) -> Any:
        return super().expire(0)


class _HintReceiver(Hints):
    def handle(self, sender: int, epoch: int, items: Any, now: int) -> Any:
        return super().handle(sender, epoch, items, 0)


class _Grace0(Tombstones):
    grace = -(1 << 62)


class _Settle0(Tombstones):
    settle = -(1 << 62)


class _OneHome:
    """A map in which every partition has one home."""

    def __init__(self, cluster: ClusterMap, me: int) -> None:
        self._cluster = cluster
        self._me = me

    def homes(self, _role: str, _partition: int) -> tuple[int, ...]:
        return (self._me,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)


def one_home(cluster: ClusterMap, me: int) -> Any:
    """`cluster` as it would be if `me` were the only home of everything."""
    return _OneHome(cluster, me)


class _NotAll(Tombstones):
    def allowed(self, cluster: ClusterMap, partition: int) -> bool:
        return cluster.phase(METADATA) == 0 and cluster.homes(METADATA, partition)[0] == self.me

    def _confirm(self, cluster: Any, partition: int, items: Any, now: int) -> Any:
        try:
            return (yield from super()._confirm(cluster, partition, items, now))
        except DfsError:
            alone = one_home(cluster, self.me)
            return (yield from super()._confirm(alone, partition, items, now))

    def _purge(self, cluster: Any, batch: Any) -> Any:
        try:
            return (yield from super()._purge(cluster, batch))
        except DfsError:
            alone = one_home(cluster, self.me)
            return (yield from super()._purge(alone, batch))


class _NoPull(PullFirst):
    def waiting(self, partition: int) -> bool:
        return False


class _NoGrace(Tombstones):
    grace = -(1 << 62)
    settle = -(1 << 62)


class _PurgeEarly(Tombstones):
    settle = -(1 << 62)

    def allowed(self, cluster: ClusterMap, partition: int) -> bool:
        return cluster.phase(METADATA) == 0 and cluster.homes(METADATA, partition)[0] == self.me

    def _confirm(self, cluster: Any, partition: int, items: Any, now: int) -> Any:
        doomed = [(row, value_digest(REGISTERS, row, value)) for row, value in items]
        yield steps.Rest(0)
        return tombstones.Batch(partition, cluster.epoch, now, doomed)

    def _purge(self, cluster: ClusterMap, batch: Any) -> Generator[Any, Any, int]:
        gone = yield steps.Purge(batch.rows)
        return sum(map(bool, gone))


class _PurgeMoving(Tombstones):
    settle = 0

    def allowed(self, cluster: ClusterMap, partition: int) -> bool:
        return cluster.homes(METADATA, partition)[0] == self.me

    def purge(self, now: int) -> Generator[Any, Any, int]:
        for batch in self.batches:
            batch.epoch = self.get_map().epoch
        return super().purge(now)

    def _check(self, *_: Any) -> None:
        pass


class _NoDigest(Digests):
    def ops(self, changes: Sequence[Change]) -> list[Op]:
        return super().ops(changes[1:] if len(changes) > 1 else changes[:0])


_merge, _put = versions.merge, versions.put


def _merge_newer(a: Register, b: Register) -> Register:
    vector, siblings = _merge(a, b)
    return vector, siblings[:1]


def _merge_sees(a: Register, b: Register) -> Register:
    vector, siblings = _merge(a, b)
    both = {x[:2] for x in a[1]} & {x[:2] for x in b[1]}
    if a[1] and b[1]:
        siblings = tuple(x for x in siblings if x[:2] in both) or siblings
    return vector, siblings


def _merge_three(a: Register, b: Register) -> Register:
    vector, siblings = _merge(a, b)
    return vector, siblings[:3]


def _put_nodot(
    register: Register, context: Vector, actor: bytes, hlc: int, value: bytes | None
) -> Register:
    vector, siblings = _put(register, context, actor, hlc, value)
    if value is None:
        vector = versions.join(register[0], context) or vector
    return vector, siblings


def _put_nothing(
    register: Register, context: Vector, actor: bytes, hlc: int, value: bytes | None
) -> Register:
    return _put(register, (), actor, hlc, value)


def _put_all(
    register: Register, context: Vector, actor: bytes, hlc: int, value: bytes | None
) -> Register:
    return _put(register, versions.join(register[0], context), actor, hlc, value)


def _fewer(quotas: tuple[Quota, ...], holders: Any, hinted: Any) -> bool:
    less = tuple((row, max(1, total - 1), max(0, homes - 1)) for row, total, homes in quotas)
    return quorum.satisfied(less, holders, hinted)


def _any_copy(quotas: tuple[Quota, ...], holders: Any, hinted: Any) -> bool:
    return quorum.satisfied(tuple((row, total, 0) for row, total, _ in quotas), holders, hinted)


class _FewerReads(Plan):
    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads = tuple((row, max(1, r - 1), max(0, pr - 1)) for row, r, pr in self.reads)


class _NoPR(Plan):
    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads = tuple((row, r, 0) for row, r, _ in self.reads)


class _WriteA(Plan):
    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.writes = self.writes[:1]
        self.writers = self.writes[0][0]


class _WriteB(Plan):
    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.writes = self.writes[-1:]


class _ReadB(Plan):
    __slots__ = ()

    def __init__(self, cluster_map: ClusterMap, me: int, partition: int, *rest: Any) -> None:
        super().__init__(cluster_map, me, partition, *rest)
        homes = cluster_map.homes(METADATA, partition)
        if me in homes and len(self.reads) == 1:
            self.readers = homes
            self.reads = tuple((homes, r, pr) for _, r, pr in self.reads)


class _SameActor(Actors):
    def actor(self, partition: int) -> bytes | None:
        since = self._since[partition]
        if since:
            self._since[partition] = 1
        try:
            return super().actor(partition)
        finally:
            self._since[partition] = since

    def recognise(self, partition: int, theirs: Vector, own: Vector) -> None:
        pass


class _MintsInB(Actors):
    """A home as soon as it takes writes."""

    def follow(self, cluster_map: ClusterMap) -> None:
        super().follow(cluster_map)
        for partition in range(len(self._since)):
            if not self._since[partition] and self._number in members(cluster_map, partition):
                self._since[partition] = cluster_map.epoch


class _OldClock(Actors):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.last = 0

    def tick(self, now_us: int, actor: bytes, seen: Vector) -> int:
        return super().tick(now_us, actor, ())


class _NoNotice(Actors):
    """Keeps its actors whatever it forgot."""

    def recognise(self, partition: int, theirs: Vector, own: Vector) -> None:
        pass


# mutant -> what it replaces, by the names of `dfs.testing.kv_mutants.Classes`
CLASSES: dict[str, dict[str, Any]] = {
    "nofence": {"registers": _AnyEpoch},
    "nowritefence": {"registers": _AnyWrite},
    "noreadfence": {"registers": _AnyRead},
    "resend": {"coordinator": _Forgetful},
    "mintagain": {"coordinator": _MintAgain},
    "nomap": {"coordinator": _NoMap},
    "fence-1": {"rules": _Fence1()},
    "push-1": {"rules": _Push1()},
    "readfence-1": {"rules": _ReadFence1()},
    "anyreport": {"rules": _AnyReport()},
    "expush": {"antientropy": _ExPush},
    "pushwaiting": {"antientropy": _PushWaiting},
    "oldhints": {"hints": _OldHints},
    "nograce": {"tombstones": _NoGrace},
    "purgeearly": {"tombstones": _PurgeEarly},
    "purgemoving": {"tombstones": _PurgeMoving},
    "nodigest": {"digests": _NoDigest},
    "norepair": {"operation": _NoRepair},
    "repair1": {"operation": _Repair1},
    "repairpw": {"operation": _RepairPW},
    "m3": {"operation": _M3},
    "mintb": {"coordinator": _MintB},
    "hintsender": {"hints": _HintSender},
    "hintreceiver": {"hints": _HintReceiver},
    "grace0": {"tombstones": _Grace0},
    "settle0": {"tombstones": _Settle0},
    "notall": {"tombstones": _NotAll},
    "mixesold": {"registers": _MixesOld},
    "keepsold": {"registers": _KeepsOld},
    "nopull": {"pull_first": _NoPull},
}
# mutant -> what it replaces by name, in a module that reaches it so
PATCHES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "w-1": (operation, "satisfied", _fewer),
    "nopw": (operation, "satisfied", _any_copy),
    "r-1": (coordinator, "Plan", _FewerReads),
    "writea": (coordinator, "Plan", _WriteA),
    "writeb": (coordinator, "Plan", _WriteB),
    "readb": (coordinator, "Plan", _ReadB),
    "mergenewer": (versions, "merge", _merge_newer),
    "mergesees": (versions, "merge", _merge_sees),
    "limitmerge": (versions, "merge", _merge_three),
    "nodot": (versions, "put", _put_nodot),
    "nocontext": (versions, "put", _put_nothing),
    "allcontext": (versions, "put", _put_all),
    "nopr": (coordinator, "Plan", _NoPR),
    "mintb": (registers, "Actors", _MintsInB),
    "sameactor": (registers, "Actors", _SameActor),
    "oldclock": (registers, "Actors", _OldClock),
    "amnesia": (registers, "Actors", _NoNotice),
}
