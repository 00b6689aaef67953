"""Random traces of one partition whose homes move, over the real map and the real thresholds.

One register (its value a growing number, so that a merge is the maximum) and one journal live
through the four epochs of a transition.  Clients know any epoch up to the present one; requests,
pushes and reports are lost or come late; a member of A may die.  After every step a quorum of the
homes that the present map reads from must contain every acknowledged write: not "some read saw it"
but "no read could miss it".

Of the journal only its configs are modelled: who knows which version, and who holds it with
everything before.  It may be born during the transition, and new homes may have a replica left
over from an older config.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random

from dfs.cluster.joint import (
    RULES,
    Journal,
    Progress,
    Rules,
    bitmap,
    missing_for_phase_2,
    missing_for_stable,
)
from dfs.cluster.map import METADATA, ClusterMap, Node, Params
from dfs.cluster.node import Row
from dfs.hashing import PARTITIONS, digest, partition_of

VOLUME = bytes(15) + b"v"
PARTITION = partition_of(digest(VOLUME))
_ALL = bitmap(range(PARTITIONS))


@dataclass(frozen=True, slots=True)
class Shape:
    """Members before and after, and the quorums."""

    old: Row
    new: Row
    params: Params


SHAPES = {
    "disjoint": Shape((1, 2, 3), (4, 5, 6), Params(3, 2, 2, 2)),
    "overlapping": Shape((1, 2, 3), (2, 3, 4), Params(3, 2, 2, 2)),
    "five": Shape((1, 2, 3, 4, 5), (3, 4, 5, 6, 7), Params(5, 3, 3, 3)),
    "write-all": Shape((1, 2, 3), (4, 5, 6), Params(3, 3, 1, 3)),
    "read-all": Shape((1, 2, 3), (3, 4, 5), Params(3, 1, 3, 1)),
    "four": Shape((1, 2, 3, 4), (4, 5, 6, 7), Params(4, 3, 2, 3)),
}


def member(number: int) -> Node:
    """A node with both roles, alone in its zone."""
    return Node(
        number=number,
        node_id=digest(b"joint %d" % number)[:16],
        name=f"node{number}",
        zone=f"z{number}",
        rack="r",
        host=f"h{number}",
        metadata_addr=f"tcp://127.0.0.1:{7000 + 2 * number}",
        chunk_addr=f"tcp://127.0.0.1:{7001 + 2 * number}",
    )


@cache
def epochs(name: str) -> tuple[ClusterMap, ...]:
    """The maps of the four epochs of a shape; they look at one changed partition only."""
    shape = SHAPES[name]
    first = ClusterMap.create(bytes(16), map(member, shape.old), params=shape.params)
    going = [x for x in shape.old if x not in shape.new]
    second = first.begin(map(member, shape.new), leaving=going)
    third = second.advance()
    for m in (second, third):
        # every partition has the same homes: one stands for all, a thousand times faster
        # (this fills the cache of a value made here)
        m._changed[METADATA] = (PARTITION,)
    return first, second, third, third.advance()


@dataclass(slots=True)
class _Op:
    write: bool
    epoch: int  # index of the map that the client knows
    sets: tuple[Row, ...]
    todo: list[int]
    value: int  # to write; the best one read so far
    floor: int  # acknowledged when a read began
    ok: set[int]
    done: bool = False


@dataclass(slots=True)
class _Replica:
    """A node: its map, its register, what it pushed, and what it knows of the journal."""

    epoch: int = 0
    value: int = 0
    pushed: tuple[int, ...] = ()
    version: int = 0  # of the newest journal config it knows; 0 = no journal
    members: Row = ()
    held: bool = True


class World:
    """One trace.  `violations` counts by invariant; subclasses break one rule each."""

    def __init__(self, rng: Random, shape: str, rules: Rules = RULES, *, deaths: int = 1) -> None:
        """All at the map before the change; the journal may exist already."""
        self.rng = rng
        self.maps = epochs(shape)
        self.rules = rules
        self.params = SHAPES[shape].params
        self.old = self.maps[0].homes(METADATA, PARTITION)
        self.new = self.maps[3].homes(METADATA, PARTITION)
        self.numbers = sorted({*self.old, *self.new})
        self.replicas = {x: _Replica() for x in self.numbers}
        self.present = 0  # index of the newest map
        self.acked = 0
        self.stamp = 0
        self.ops: list[_Op] = []
        self.pushes: list[tuple[int, int, int, int]] = []  # from, to, value, epoch of the sender
        self.reports: dict[int, Progress] = {}
        self.dead: set[int] = set()
        # one dead member of A leaves N - 1: too few where W = 1 or R = 1 asks for all N
        self.deaths = deaths if self.params.r > 1 and self.params.w > 1 else 0
        self.has_journal = rng.random() < 0.5
        # what differs from trace to trace: who lags behind, and how many messages are lost
        self.pace = {x: rng.choice((0.03, 1, 1)) for x in self.numbers}
        self.loss = rng.choice((0.0, 0.1, 0.4))
        self.chosen = 0  # version of the newest journal config that a majority has accepted
        self.violations: Counter[str] = Counter()
        self._born()

    def _born(self) -> None:
        """Half of the journals exist before, some of those with replicas of an older config."""
        if not self.has_journal or self.rng.random() < 0.5:
            return
        self.chosen = 2
        quorum = self.rng.sample(self.old, len(self.old) // 2 + 1)
        for x in quorum:
            self._learn(x, 2, self.old, held=True)
        for x in self.new:
            if x not in quorum and self.rng.random() < 0.5:
                self._learn(x, 1, self.new, held=True)

    # ----------------------------------------------------------------------------- one step

    def run(self, steps: int = 200) -> None:
        """Random steps, then the rest of the transition without further faults."""
        rng = self.rng
        actions: tuple[Callable[[], None], ...] = (
            self._write,
            self._write_at_once,
            self._read,
            self._deliver,
            self._learn_map,
            self._push,
            self._journal,
            self._report,
            self._die,
        )
        # each trace has its own mix (swarm testing: Groce et al., ISSTA 2012)
        mix = [w * rng.choice((0.1, 1, 1, 4)) for w in (3, 8, 3, 16, 10, 30, 14, 20, 0.3)]
        begin = rng.randrange(steps // 4)
        for at, action in enumerate(rng.choices(actions, mix, k=steps)):
            if at == begin:
                self._advance()
            action()
        self._finish()

    def _write(self) -> None:
        self.stamp += 1
        epoch = self._client_epoch()
        sets = self.rule_write_sets(self.maps[epoch])
        self._send(_Op(True, epoch, sets, _members(sets), self.stamp, 0, set()))

    def _write_at_once(self) -> None:
        """A write of any epoch that reaches as few nodes as it may, none of them late."""
        epoch = self._client_epoch()
        reached: set[int] = set()
        for row in self.rule_write_sets(self.maps[epoch]):
            able = [x for x in row if x not in self.dead and self._serves(x, epoch, write=True)]
            if len(able) < self.params.w:
                return
            reached.update(self.rng.sample(able, self.params.w))
        self.stamp += 1
        for x in sorted(reached):
            self.replicas[x].value = self.stamp
            self.replicas[x].epoch = max(self.replicas[x].epoch, epoch)
        self.acked = self.stamp
        self._check()

    def _read(self) -> None:
        epoch = self._client_epoch()
        sets = (self.rule_read_homes(self.maps[epoch]),)
        self._send(_Op(False, epoch, sets, _members(sets), 0, self.acked, set()))

    def _client_epoch(self) -> int:
        return self.rng.randint(0, self.present)

    def _send(self, op: _Op) -> None:
        self.rng.shuffle(op.todo)
        self.ops.append(op)

    def _deliver(self) -> None:
        if not self.ops:
            return
        # mostly recent requests, sometimes one from long ago
        late = self.rng.random() < 0.4
        op = self.rng.choice(self.ops if late else self.ops[-4:])
        if not op.todo or (op.done and not op.write):
            return
        x = op.todo.pop()
        if x in self.dead or self.rng.random() < self.loss:
            return
        replica = self.replicas[x]
        replica.epoch = max(replica.epoch, op.epoch)  # a newer request: fetch its map first
        last_change = self.rule_last_change(self.maps[replica.epoch])
        stale = self.maps[op.epoch].epoch < last_change
        if stale and self.rule_refuses(op.write):
            return
        if stale:
            self.violations["M3 a stale request counted"] += 1
        if op.write:
            replica.value = max(replica.value, op.value)
        else:
            op.value = max(op.value, replica.value)
        op.ok.add(x)
        quorum = self.params.w if op.write else self.params.r
        if not op.done and all(sum(x in op.ok for x in row) >= quorum for row in op.sets):
            op.done = True
            if op.write:
                self.acked = max(self.acked, op.value)
                self._check()
            elif op.value < op.floor:
                self.violations["stale read"] += 1

    def _any(self, nodes: Sequence[int]) -> int:
        return self.rng.choices(nodes, [self.pace[x] for x in nodes])[0]

    def _learn_map(self) -> None:
        x = self._any(self.numbers)
        if x not in self.dead:
            self.replicas[x].epoch = max(self.replicas[x].epoch, self.present)

    def _push(self) -> None:
        """Start a push, or let one arrive."""
        late = bool(self.pushes) and self.rng.random() < 0.3
        if not late and self.present in (1, 2):
            a, b = self._any(self.old), self._any(self.new)
            if a != b and a not in self.dead:
                self.pushes.append((a, b, self.replicas[a].value, self.replicas[a].epoch))
        if self.pushes and (late or self.rng.random() < 0.6):
            at = self.rng.randrange(len(self.pushes)) if late else -1
            a, b, value, epoch = self.pushes.pop(at)
            if b not in self.dead and self.rng.random() >= self.loss:
                self.replicas[b].value = max(self.replicas[b].value, value)
                if self.rule_push_counts(epoch) and b not in self.replicas[a].pushed:
                    self.replicas[a].pushed += (b,)

    def _report(self) -> None:
        x = self._any(self.numbers)
        if x not in self.dead and self.present:
            self.reports[x] = self.report(x, complete=self.rng.random() < 0.8)
            self._advance()  # at the first moment that the rules allow

    def report(self, x: int, *, complete: bool = True) -> Progress:
        """What node x would say now."""
        replica = self.replicas[x]
        journals: tuple[Journal, ...] = ()
        if replica.version and complete:
            journals = ((VOLUME, replica.members, replica.version, replica.held),)
        return Progress(
            self.maps[replica.epoch].epoch,
            dict.fromkeys(replica.pushed, _ALL),
            journals,
            complete,
        )

    def _die(self) -> None:
        if len(self.dead) < self.deaths:
            self.dead.add(self.rng.choice([x for x in self.old if x not in self.new]))

    def _advance(self) -> None:
        m = self.maps[self.present]
        if self.present == 0:
            self.present = 1
        elif self.present == 1 and not missing_for_phase_2(m, self.reports, self.rules):
            self.present = 2
            self._check_journal()
        elif self.present == 2 and not missing_for_stable(m, self.reports, self.rules):
            self.present = 3
            self._check_journal()
        self._check()

    # ------------------------------------------------------------------------------ journal

    def _journal(self) -> None:
        """One step of the journal: to be born, to choose the config of B, to fetch it."""
        x = self._any(self.numbers)
        if x in self.dead or not self.has_journal:
            return
        replica = self.replicas[x]
        if not self.chosen:
            # a proposer that knows only A makes a genesis there
            if x in self.old and not (self.rule_genesis_fenced() and replica.epoch >= 1):
                self._learn(x, 1, self.old, held=True)
                self._choose(1, self.old)
        elif self.chosen < 3:
            if self.present >= 1 and x in self.old and replica.version:
                self._learn(x, 3, self.new, held=True)
                self._choose(3, self.old)
        elif x in self.new:
            if replica.version < 3:
                self._learn(x, 3, self.new, held=False)
            else:
                replica.held = True

    def _learn(self, x: int, version: int, members: Row, *, held: bool) -> None:
        replica = self.replicas[x]
        if version > replica.version:
            replica.version, replica.members = version, members
            replica.held = held

    def _choose(self, version: int, voters: Row) -> None:
        if sum(self.replicas[x].version >= version for x in voters) > len(voters) // 2:
            self.chosen = max(self.chosen, version)
            if self.present == 3:
                self._check_journal()

    def _check_journal(self) -> None:
        """A journal that was chosen is held by a majority of B, with all of it, before A goes."""
        held = sum(self.replicas[x].version == 3 and self.replicas[x].held for x in self.new)
        if self.chosen and held <= len(self.new) // 2:
            self.violations["journal lost"] += 1

    # ------------------------------------------------------------------------------- checks

    def _check(self) -> None:
        """No read that begins now, by a client of any epoch, can miss an acknowledged write.

        Dead members count as slow ones: they might answer one day.
        """
        for epoch in range(self.present + 1):
            m = self.maps[epoch]
            homes = [x for x in self.rule_read_homes(m) if self._serves(x, epoch)]
            for quorum in combinations(homes, self.params.r):
                if max(self.replicas[x].value for x in quorum) < self.acked:
                    self.violations["write lost" if epoch == self.present else "stale read"] += 1
                    break

    def _serves(self, x: int, epoch: int, *, write: bool = False) -> bool:
        """Whether node x would answer a request of that epoch."""
        known = self.maps[max(epoch, self.replicas[x].epoch)]
        stale = self.maps[epoch].epoch < self.rule_last_change(known)
        return not (stale and self.rule_refuses(write))

    def _finish(self) -> None:
        """M4: whatever happened, those that live bring the transition to its end."""
        for _ in range(3):
            for op in list(self.ops):
                while op.todo and not op.done:
                    before = len(op.todo)
                    self._deliver()
                    if len(op.todo) == before:
                        break
            for x in self.numbers:
                if x not in self.dead:
                    self._settle(x)
            self._advance_now()
        if self.present != 3:
            self.violations["M4 stuck"] += 1
        self._check()

    def _settle(self, x: int) -> None:
        replica = self.replicas[x]
        replica.epoch = self.present
        if self.present and x in self.old:
            for b in self.new:
                if b != x and b not in self.dead:
                    self.replicas[b].value = max(self.replicas[b].value, replica.value)
            replica.pushed = tuple(b for b in self.new if b != x and b not in self.dead)

    def _advance_now(self) -> None:
        known = any(self.replicas[x].version for x in self.numbers if x not in self.dead)
        if self.present and known:
            # the mover finishes the journal it finds, chosen or not
            self.chosen = 3
            for x in self.numbers:
                if x not in self.dead:
                    self._learn(x, 3, self.new, held=True)
                    self.replicas[x].held = True
        self.reports = {x: self.report(x) for x in self.numbers if x not in self.dead}
        before = self.present
        for _ in range(60):
            if self.present == before:
                self._advance()

    # -------------------------------------------------------------------------------- rules

    def rule_write_sets(self, m: ClusterMap) -> tuple[Row, ...]:
        """Where a client writes."""
        return m.write_sets(METADATA, PARTITION)

    def rule_read_homes(self, m: ClusterMap) -> Row:
        """Where a client reads."""
        return m.read_homes(METADATA, PARTITION)

    def rule_last_change(self, m: ClusterMap) -> int:
        """The epoch of which a request must be at least."""
        return m.last_change(METADATA, PARTITION)

    def rule_refuses(self, write: bool) -> bool:
        """Whether a node refuses a request older than the last change."""
        return True

    def rule_push_counts(self, epoch: int) -> bool:
        """Whether a push begun by a sender that knew this epoch may be reported."""
        return epoch >= 1

    def rule_genesis_fenced(self) -> bool:
        """Whether a fenced member refuses a genesis of an older epoch."""
        return True


def _members(sets: Sequence[Row]) -> list[int]:
    return sorted({x for row in sets for x in row})
