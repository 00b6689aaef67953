"""Replicas of journals under a random scheduler: no tasks, no disk, no clock, thousands of faults.

Each `dfs.testing.journal_node.Node` drives the real replica.  The scheduler delivers, delays,
drops, duplicates and reorders their messages, crashes nodes at any record they write, cuts the
power, parts the network, changes the membership, lets nodes lose their state, trims; clients and an
operator follow stale maps.  Then the faults stop, old members are wiped, and everything must
finish.  Checked:

    agreement    every replica that calls an entry chosen calls the same one so, on the same chain
    durability   what a replica wrote folds back into a state; acknowledged entries stay
    order        an operation has one place for ever, after everything answered before it began
    confirm      whoever confirms ownership knows everything answered before he asked
    liveness     without faults every operation and every membership change ends
"""

from random import Random
from typing import Any

from dfs.errors import Corrupt
from dfs.testing.journal_mutants import replica_class
from dfs.testing.journal_node import Node, ViolationError, genesis, operation
from metadata.journalstate import ENTRY, NO_HASH, chain, config_of, replay

STEP = 0.01  # seconds of a node's clock per step of the scheduler
STEPS = 1200
CALM_ROUNDS = 120


class World:
    """Journals, nodes, network, clients and operator of one schedule."""

    def __init__(self, seed: int, mutant: str | None) -> None:
        """Choose the weather of this schedule."""
        self.random = random = Random(seed)
        self.mutant = mutant
        self.replica_class = replica_class(mutant)
        self.now = 0.0
        self.journals = range(1 + seed % 2)
        count = 3 if seed % 3 else 5
        self.old = self.new = tuple(range(count))
        self.version = 1
        self.fresh = count
        self.young: range = range(0)
        self.lost: set[int] = set()
        self.retire: set[int] = set()
        self.held: list[set[int]] = [set() for _ in self.journals]
        self.changes = self.amnesias = self.trims = 0
        self.calm = False
        self.patience = random.choice((0.5, 2.0))
        self.crash_at_write = random.choice((0.0, 0.002, 0.01))
        self.p_sync = random.choice((0.1, 0.3, 0.7))
        self.p_power = random.choice((0.0, 0.0, 0.005))
        self.net: list[tuple[int, int, int, Any]] = []
        self.late: dict[int, tuple[float, Any]] = {}
        self.side: dict[int, bool] = {}
        self.cut: set[tuple[int, int]] = set()
        self.storm = -1.0
        self.operations: dict[int, list[Any]] = {}  # number -> [began, where to, map it follows]
        self.results: dict[int, tuple[float, int]] = {}
        self.answered: list[list[int]] = [[0] for _ in self.journals]
        self.history: list[dict[int, bytes]] = [{} for _ in self.journals]
        self.heads: list[dict[int, bytes]] = [{0: NO_HASH} for _ in self.journals]
        self.config_at: dict[tuple[int, int], int] = {}
        first = genesis(self.new)
        record = (ENTRY, 1, (0, 0), NO_HASH, first, True)
        self.nodes = {(j, i): Node(self, j, i, [record]) for j in self.journals for i in self.new}

    # -------------------------------------------------------------------------------- properties

    def check(self, journal: int, seq: int, payload: bytes) -> None:
        """Somebody calls this entry chosen."""
        history = self.history[journal]
        if history.setdefault(seq, payload) != payload:
            raise ViolationError(f"agreement: two entries are chosen at seq {seq}")
        heads = self.heads[journal]
        if seq not in heads and seq - 1 in heads:
            heads[seq] = chain(heads[seq - 1], seq, payload)
        found = config_of(payload)
        if found and found[1] > 1 and (journal, found[1]) not in self.config_at:
            self.config_at[journal, found[1]] = seq
            self.storm = self.now + self.random.randrange(10, 80) * STEP

    def answer(self, node: Node, number: int, place: int) -> None:
        """A node answers a client; some answers get lost."""
        if not self.calm and self.random.random() < 0.15:
            return
        if self.results.setdefault(number, (self.now, place))[1] != place:
            raise ViolationError(f"operation {number} was answered twice, differently")
        self.answered[node.journal].append(place)

    def moved(self, item: Any, members: tuple[int, ...]) -> None:
        """A node says who the members are."""
        if isinstance(item, int):
            self.operations[item][1] = members or None

    def verify(self) -> None:
        """At the end: replicas, acknowledged operations and their order."""
        for j in self.journals:
            nodes = [self.nodes[j, i] for i in self.new if (j, i) in self.nodes]
            for node in nodes:
                if node.replica.head != self.heads[j][node.replica.chosen]:
                    raise ViolationError(f"node {node.me} has another chain")
            best = max(nodes, key=lambda n: n.replica.chosen)
            mine = []
            for number, (ended, place) in self.results.items():
                if number % len(self.journals) == j:
                    mine.append((self.operations[number][0], ended, place))
                    if best.places.get(number) != place:
                        raise ViolationError(f"acknowledged operation {number} is lost")
            if len({m[2] for m in mine}) < len(mine):
                raise ViolationError("two operations have one place")
            if any(a[1] < b[0] and a[2] > b[2] for a in mine for b in mine):
                raise ViolationError("real-time order")

    # -------------------------------------------------------------------------------- the others

    def client(self, number: int) -> None:
        """Ask for an operation: new members first, then old; Moved is followed once."""
        random = self.random
        state = self.operations[number]
        if random.random() < 0.2:
            state[2] = (self.new, self.old)
        to = state[1] or state[2][random.random() < 0.4]
        state[1] = None
        node = self.nodes.get((number % len(self.journals), random.choice(to)))
        if node is not None:
            node.submit(number)

    def operator(self) -> None:
        """Begin a change of members, or go on with the one under way."""
        random = self.random
        if self.old == self.new:
            self._plan()
            return
        for j in self.journals:
            to = random.choice(random.choice((self.old, self.new)))
            self.net.append((j, -1, to, ("config", self.version, self.new)))
        at = [self.config_at.get((j, self.version)) for j in self.journals]
        done = []
        for j in self.journals:
            seq = at[j]
            for i in self.new:
                node = self.nodes.get((j, i))
                if seq and node and self._holds(node, seq):
                    self.held[j].add(i)
            majority = len(self.held[j]) > len(self.new) // 2
            done.append(bool(seq) and (self.mutant == "early" or majority))
        if (any if self.mutant == "onejournal" else all)(done):
            self.retire |= set(self.old) - set(self.new)
            self.old = self.new

    def _holds(self, node: Node, seq: int) -> bool:
        """Whether the node would know after a power loss that the entry is chosen."""
        try:
            return replay(node.records[: node.durable]).chosen >= seq
        except Corrupt as e:
            raise ViolationError(f"the log of node {node.me}: {e}") from e

    def _plan(self) -> None:
        random = self.random
        stay = [i for i in self.new if i not in self.lost]
        gone = len(self.new) - len(stay)
        kind = random.choice(("add", "del", "swap", "swap", "all", "heal"))
        add = 0
        if kind in ("heal", "add") or self.calm:
            add = gone + (random.randint(1, 2) if kind == "add" and not self.calm else 0)
        elif kind == "swap":
            add = random.randint(1, max(1, len(stay) - 1))
            stay = random.sample(stay, len(stay) - add)
            add += gone
        elif kind == "all":
            stay, add = [], random.choice((2, 3, 5))
        elif not gone:
            stay.pop(random.randrange(len(stay)))
        if not 2 <= len(stay) + add <= 5 or (not add and len(stay) == len(self.new)):
            return
        self.young = range(self.fresh, self.fresh + add)
        self.fresh += add
        self.new = (*stay, *self.young)
        self.version += 1
        self.held = [set() for _ in self.journals]
        self.changes += 1
        for j in self.journals:
            for i in self.young:
                self.nodes[j, i] = Node(self, j, i, [])

    def wipe(self, me: int) -> None:
        """A node is gone for ever, maybe with its messages."""
        for j in self.journals:
            self.nodes.pop((j, me), None)
        self.net = [m for m in self.net if m[1] != me or self.random.random() < 0.5]

    def amnesia(self) -> None:
        """A node loses its state, at most a minority of each config does."""
        me = self.random.choice(self.old + self.new)
        lost = self.lost | {me}
        if me in self.lost or any(
            len(lost & set(c)) > (len(c) - 1) // 2 for c in (self.old, self.new)
        ):
            return
        self.lost.add(me)
        self.amnesias += 1
        self.wipe(me)
        if self.mutant == "vote":
            for j in self.journals:
                self.nodes[j, me] = Node(self, j, me, [])

    def deliver(self, message: tuple[int, int, int, Any]) -> None:
        """A message arrives."""
        journal, sender, to, body = message
        node = self.nodes.get((journal, to))
        if node is None:
            return
        if sender < 0:
            node.submit(body)
        else:
            node.handle(sender, body)

    # ---------------------------------------------------------------------------------- schedule

    def run(self, steps: int = STEPS) -> None:
        """Faults, then calm; raises `ViolationError`."""
        random = self.random
        p_new, p_again = random.choice((0.01, 0.03, 0.06)), random.choice((0.02, 0.06, 0.12))
        p_crash, p_operator = random.choice((0.002, 0.02)), random.choice((0.02, 0.06))
        p_drop, p_late = random.choice((0.01, 0.1, 0.3)), random.choice((0.0, 0.1, 0.3))
        for step in range(steps):
            self.now = now = step * STEP
            if step % 200 == 0:
                parted = random.random() < 0.4
                self.side = {i: parted and random.random() < 0.5 for i in range(self.fresh + 9)}
                share = random.choice((0.0, 0.0, 0.3)) if not parted else 0.0
                around = range(self.fresh + 9)
                self.cut = {(a, b) for a in around for b in around if random.random() < share}
            if 0 <= self.storm <= now:  # the worst moment: fresh members are cut off
                self.storm = -1.0
                self.side = {i: i in self.young for i in range(self.fresh + 9)}
            x = random.random()
            if x < p_new:
                number = len(self.operations)
                self.operations[number] = [now, None, (self.new, self.old)]
                self.client(number)
            elif x < p_new + p_again and self.operations:
                open_ = [n for n in self.operations if n not in self.results]
                self.client(random.choice(open_ or list(self.operations)))
            elif x < p_new + p_again + p_crash:
                random.choice(list(self.nodes.values())).crash()
            elif x < p_new + p_again + p_crash + 0.004:
                self.amnesia()
            elif x < p_new + p_again + p_crash + 0.004 + p_operator:
                self.operator()
                while self.retire and random.random() < 0.7:
                    self.wipe(self.retire.pop())
            else:
                self._exchange(now, p_drop, p_late)
            self._housekeeping()
        self._calm(steps)
        self.verify()

    def _exchange(self, now: float, p_drop: float, p_late: float) -> None:
        """A few messages travel."""
        random, net = self.random, self.net
        for _ in range(3):
            for _ in range(6):
                if not net:
                    return
                at = random.randrange(len(net))
                message = net[at]
                delay = random.randrange(400) * STEP * (random.random() < p_late)
                when = self.late.setdefault(id(message), (now + delay, message))[0]
                sender, to = message[1:3]
                if when <= now and (sender < 0 or self._linked(sender, to)):
                    if random.random() > 0.06:
                        net.pop(at)  # else a duplicate stays
                    if random.random() > p_drop:
                        self.deliver(message)  # else it is lost
                    break
        if len(net) > 300:
            del net[:60]

    def _linked(self, sender: int, to: int) -> bool:
        return self.side.get(sender) == self.side.get(to) and (sender, to) not in self.cut

    def _housekeeping(self) -> None:
        random = self.random
        nodes = list(self.nodes.values())
        for node in random.sample(nodes, min(3, len(nodes))):
            node.sync() if random.random() < self.p_sync else node.tick()
        if random.random() < self.p_power:
            for node in nodes:
                node.crash(0)
        owning = [n for n in nodes if n.replica.owned]
        if owning and random.random() < 0.2:
            random.choice(owning).confirm()
        node = random.choice(nodes)
        if random.random() < 0.01 and node.replica.chosen > node.replica.base.seq + 3:
            self.trims += 1
            seq = random.randint(node.replica.base.seq + 1, node.replica.chosen)
            node.run(node.replica.trim(seq, self.now))

    def _calm(self, steps: int) -> None:
        random = self.random
        self.calm = True
        self.crash_at_write = 0.0
        for me in self.retire:
            self.wipe(me)
        for _ in self.journals:  # one more each: a crash may just have put the last one in doubt
            self.operations[len(self.operations)] = [self.now, None, (self.new, self.old)]
        for turn in range(CALM_ROUNDS):
            self.now = (steps + turn * 20) * STEP
            self.operator()
            for me in self.retire:
                self.wipe(me)
            for number in random.sample(list(self.operations), len(self.operations)):
                if number not in self.results:
                    self.client(number)
                self._drain(30)
            for _ in range(4):
                self.now += 5 * STEP
                self._drain(10_000)
            done = len(self.results) == len(self.operations) and self.old == self.new
            if done and not (self.lost & set(self.new) and self.mutant != "vote"):
                return
        unanswered = len(self.operations) - len(self.results)
        raise ViolationError(
            f"liveness: {unanswered} operations unanswered, "
            f"membership change {'done' if self.old == self.new else 'unfinished'}"
        )

    def _drain(self, limit: int) -> None:
        random, net = self.random, self.net
        while limit:
            for node in list(self.nodes.values()):
                if node.durable < len(node.records) or node.replies:
                    node.sync()
                node.tick()
            if not net:
                return
            for _ in range(min(10, limit, len(net))):
                limit -= 1
                at = random.randrange(len(net))
                net[at], net[-1] = net[-1], net[at]
                self.deliver(net.pop())


def run_cores(seed: int, mutant: str | None = None, steps: int = STEPS) -> World:
    """One schedule; raises `ViolationError`."""
    world = World(seed, mutant)
    world.run(steps)
    return world


__all__ = ["ViolationError", "World", "genesis", "operation", "run_cores"]
