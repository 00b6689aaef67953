"""Random traces of the background protocols over days: does a deleted register ever come back?

Four nodes of dicts, one partition that moves from node 1 to node 4, and every kind of delay: nodes
sleep for hours, messages of hints and pushes arrive a day late, homes change in the middle of it.
Each seed ends in peace: everything is exchanged, everything due is purged.  Then no register may
show a value that was deleted or superseded, no acknowledged value may be missing, and equal copies
must have equal digests.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import DfsError, Unreachable
from dfs.testing.kv_broken import one_home
from dfs.testing.sync_maps import NOW, moved_row, transition
from dfs.testing.sync_nodes import SyncNode, row_in
from dfs.testing.sync_nodes import run as drive
from metadata.antientropy import AntiEntropy, members
from metadata.hints import Hints
from metadata.merkle import Change, Digests, Op, partition_of_row
from metadata.steps import Call, Steps
from metadata.tombstones import Tombstones

NAME = "sync"
HOUR = 3600_000_000
MUTANTS = {
    "notall": "a tombstone is purged though a home did not answer",
    "moving": "a tombstone is purged while the homes change",
    "oldhint": "the receiver of a hint does not look at its age",
    "former": "a former home pushes its registers",
    "nograce": "no grace and no wait before a purge",
    "nodigest": "a merge forgets the digest",
}


class ViolationError(Exception):
    """A promise was broken."""


class _NotAll(Tombstones):
    def _confirm(self, cluster: ClusterMap, partition: int, items: Any, now: int) -> Any:
        try:
            return (yield from super()._confirm(cluster, partition, items, now))
        except Unreachable:
            alone = one_home(cluster, self.me)
            return (yield from super()._confirm(alone, partition, items, now))

    def allowed(self, cluster: ClusterMap, partition: int) -> bool:
        return cluster.phase(METADATA) == 0 and cluster.homes(METADATA, partition)[0] == self.me

    def _purge(self, cluster: ClusterMap, batch: Any) -> Any:
        try:
            return (yield from super()._purge(cluster, batch))
        except Unreachable:
            return (yield from super()._purge(one_home(cluster, self.me), batch))


class _Moving(Tombstones):
    def allowed(self, cluster: ClusterMap, partition: int) -> bool:
        return cluster.homes(METADATA, partition)[0] == self.me

    def _check(self, *_args: Any) -> None:
        pass


class _NoGrace(Tombstones):
    grace = 0
    settle = 0


class _OldHint(Hints):
    def handle(self, sender: int, epoch: int, items: Sequence[Any], now: int) -> Any:
        fresh = tuple((row, register, now) for row, register, _ in items)
        return super().handle(sender, epoch, fresh, now)


class _Former(AntiEntropy):
    def _check(self, *_args: Any) -> None:
        pass

    def shared(self, cluster: ClusterMap, peer: int) -> list[int]:
        return [p for p in range(4096) if peer in members(cluster, p)]

    def may_send(self, *_args: Any) -> bool:
        return True


class _NoDigest(Digests):
    count = 0

    def ops(self, changes: Sequence[Change]) -> list[Op]:
        _NoDigest.count += 1
        return super().ops(changes) if _NoDigest.count % 7 else []


def node_class(mutant: str) -> type[SyncNode]:
    """The nodes of a mutant; "" = none."""

    class Node(SyncNode):
        digests_class = _NoDigest if mutant == "nodigest" else Digests
        sync_class = _Former if mutant == "former" else AntiEntropy
        hints_class = _OldHint if mutant == "oldhint" else Hints
        tombstones_class = {
            "notall": _NotAll,
            "moving": _Moving,
            "nograce": _NoGrace,
        }.get(mutant, Tombstones)

    return Node


@cache
def _partition() -> int:
    _, moving, _, after = transition()
    return partition_of_row(0, moved_row(moving, after))


class Scenario:
    """One seed."""

    def __init__(self, seed: int, mutant: str = "") -> None:
        """Nothing has happened."""
        self.random = Random(seed)
        self.mutant = mutant
        self.maps = transition()
        self.stage = 0
        self.now = NOW
        self.down: set[int] = set()
        self.partition = _partition()
        self.keys = [row_in(self.partition, b"%d" % i) for i in range(4)]
        cls = node_class(mutant)
        self.nodes = {
            n: cls(n, lambda: self.maps[self.stage], alive=lambda x: x not in self.down)
            for n in (1, 2, 3, 4)
        }
        self.serial = 0
        self.live: dict[bytes, set[bytes]] = {k: set() for k in self.keys}  # acknowledged, not dead
        self.dead: dict[bytes, set[bytes]] = {k: set() for k in self.keys}
        self.late: list[tuple[int, int, Call]] = []  # due, sender, message

    def homes(self) -> list[int]:
        """Those that take writes now."""
        return list(members(self.maps[self.stage], self.partition))

    def drive(self, number: int, steps: Steps[Any]) -> Any:
        """Run a protocol; some of its messages get a twin that arrives much later."""
        return drive(self.nodes, number, self._watched(number, steps), self.now, down=[*self.down])

    def _watched(self, number: int, steps: Steps[Any]) -> Steps[Any]:
        send, error = None, None
        while True:
            try:
                effect = steps.throw(error) if error is not None else steps.send(send)
            except StopIteration as e:
                return e.value
            send = error = None
            late = isinstance(effect, Call) and effect.method in {"sync.push", "hints.deliver"}
            if late and self.random.random() < 0.6:
                delay = self.random.choice((0.02, 3.5, 30, 60))
                self.late.append((self.now + int(delay * HOUR), number, effect))
            try:
                send = yield effect
            except DfsError as e:
                error = e

    def step(self) -> None:
        """Something happens."""
        r = self.random
        event = r.choice(
            ("put", "put", "delete", "delete", "sleep", "down", "up", "exchange", "hints", "hints",
             "prepare", "purge", "day", "day", "map", "arrive")
        )  # fmt: skip
        up = [n for n in self.nodes if n not in self.down]
        number = r.choice(up) if up else 0
        if event == "sleep":
            self.now += int(r.choice((0.01, 0.5, 2, 5, 26)) * HOUR)
        elif event == "day":
            self.day(number)
        elif event == "down" and len(self.down) < 1:
            self.down.add(r.choice((1, 2, 3, 4)))
        elif event == "up":
            self.down.clear()
        elif event in {"put", "delete"}:
            self.write(event)
        elif event == "map":
            self.change_homes()
        elif event == "arrive":
            self.arrive(self.now)
        elif number:
            self.background(event, number)

    def day(self, number: int) -> None:
        """Nothing but purging, for long enough."""
        for hours, event in ((26, "prepare"), (5, "purge")):
            self.now += hours * HOUR
            if number:
                self.background(event, number)

    def background(self, event: str, number: int) -> None:
        """A round of a worker."""
        node = self.nodes[number]
        peer = self.random.choice([n for n in self.nodes if n != number])
        try:
            if event == "exchange":
                options: dict[str, Any] = {"forced": True, "partitions": (self.partition,)}
                if self._exchange_with(number, peer):
                    self.drive(number, node.sync.exchange(peer, self.now, **options))
            elif event == "hints":
                self.drive(number, node.hints.expire(self.now))
                for target in node.hints.waiting():
                    self.drive(number, node.hints.deliver(target, self.now))
            elif event in {"prepare", "purge"}:
                leader = self.maps[self.stage].homes(METADATA, self.partition)[0]
                if leader not in self.down:
                    tombstones = self.nodes[leader].tombstones
                    if event == "prepare":
                        self.drive(leader, tombstones.prepare(self.partition, self.now))
                    else:
                        self.drive(leader, tombstones.purge(self.now))
        except DfsError:
            pass  # somebody is down or refuses, which is what this is about

    def _exchange_with(self, number: int, peer: int) -> bool:
        homes = self.homes()
        return peer in homes and (number in homes or self.mutant == "former")

    def write(self, event: str) -> None:
        """A put or delete of a client that has read a quorum."""
        row, r = self.random.choice(self.keys), self.random
        homes = [n for n in self.homes() if n not in self.down]
        cluster = self.maps[self.stage]
        sets = cluster.write_sets(METADATA, self.partition)
        readers = [n for n in homes if n in cluster.read_homes(METADATA, self.partition)]
        if len(readers) < 2 or any(len([n for n in row if n in homes]) < 2 for row in sets):
            return
        first = readers[0]
        merges = [("m", row, x) for n in readers if (x := self.nodes[n].store.get(row))]
        self.nodes[first].write(merges, self.now)  # what a read at a quorum does
        seen = set(self.nodes[first].values(row))
        context = self.nodes[first].context(row)
        if event == "delete" and not seen:
            return
        self.serial += 1
        value = None if event == "delete" else b"%d" % self.serial
        data = self.nodes[first].put(row, value, self.now, context)
        self.dead[row] |= seen
        self.live[row] -= seen
        if value is not None:
            self.live[row].add(value)
        reached = {first}
        for n in [x for x in self.homes() if x != first]:
            missed = n in self.down or (r.random() < 0.3 and self._enough(sets, reached, n))
            if not missed:
                self.nodes[n].write([("m", row, data)], self.now)
                reached.add(n)
            elif r.random() < 0.6:
                keeper = self.nodes[first]
                try:
                    keeper.store.apply(keeper.hints.add(row, data, n, self.now, self.now))
                except DfsError:
                    continue

    def _enough(self, sets: Sequence[Sequence[int]], reached: set[int], without: int) -> bool:
        """Whether every set gets its two copies though `without` misses the write."""
        later = [n for n in self.homes() if n not in self.down and n > without]
        return all(len({n for n in (*reached, *later) if n in row}) >= 2 for row in sets)

    def change_homes(self) -> None:
        """One step of the transition; the first one ends with all of A having pushed to B."""
        cluster = self.maps[self.stage]
        if self.stage == 3:
            return
        if self.stage == 1:
            if self.down:
                return
            for old in cluster.old_homes(METADATA, self.partition):
                for new in cluster.homes(METADATA, self.partition):
                    if new != old:
                        steps = self.nodes[old].sync.push_partition(self.partition, new, self.now)
                        self.drive(old, steps)
        elif self.random.random() < 0.7:
            return
        self.stage += 1

    def arrive(self, until: int) -> None:
        """Messages that were on their way for long."""
        due = [x for x in self.late if x[0] <= until]
        self.late = [x for x in self.late if x[0] > until]
        for _, sender, call in due:
            if call.node in self.down:
                continue
            steps = self.nodes[call.node].answer(
                call.method, sender, call.epoch, call.args, self.now
            )
            try:
                drive(self.nodes, call.node, steps, self.now)
            except DfsError:
                continue

    def finish(self) -> None:
        """Peace; raises `ViolationError`."""
        self.down.clear()
        for hours in (0, 25, 6, 70):
            self.now += hours * HOUR
            self.arrive(self.now)
            for _ in range(2):
                for number in self.nodes:
                    for peer in self.nodes:
                        if number != peer and self._exchange_with(number, peer):
                            options: dict[str, Any] = {"forced": True}
                            node = self.nodes[number]
                            steps = node.sync.exchange(
                                peer, self.now, partitions=(self.partition,), **options
                            )
                            self.drive(number, steps)
            for event in ("hints", "prepare", "purge"):
                for number in self.nodes:
                    self.background(event, number)
        self.check()

    def check(self) -> None:
        """Compare the homes with what clients were told."""
        homes = self.homes()
        for row in self.keys:
            shown = [set(self.nodes[n].values(row)) for n in homes]
            if any(x != shown[0] for x in shown):
                raise ViolationError(f"homes differ: {row!r} is {shown}")
            if back := shown[0] & self.dead[row]:
                raise ViolationError(f"{row!r}: deleted values are back: {back}")
            if missing := self.live[row] - shown[0]:
                raise ViolationError(f"{row!r}: acknowledged values are gone: {missing}")
        totals = [self.nodes[n].total(self.partition) for n in homes]
        if len(set(totals)) > 1:
            raise ViolationError("equal copies have different digests")


def play(seed: int, mutant: str = "", steps: int = 60) -> None:
    """One trace; raises `ViolationError`."""
    scenario = Scenario(seed, mutant)
    for _ in range(steps):
        scenario.step()
    scenario.finish()


def find(mutant: str, seeds: range) -> int | None:
    """The first seed that finds a mutant."""
    for seed in seeds:
        try:
            play(seed, mutant)
        except ViolationError:
            return seed
    return None


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of the trace of a seed; empty is good."""
    try:
        play(seed, mutant or "")
    except ViolationError as e:
        return [str(e)]
    return []
