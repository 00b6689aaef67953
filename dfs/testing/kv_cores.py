"""Registers under a random scheduler: no tasks, no disks, no clocks, thousands of faults.

Each `dfs.testing.kv_node.Node` drives the real coordinator, replica, anti-entropy, hints, purging
and digests; the map is a chain of real maps whose transitions advance by the real thresholds on
real reports.  Clients put, delete and get a few keys, resend, and follow contexts; faults of every
kind (`dfs.testing.kv_faults`) go on meanwhile; then they stop and everything must be equal, durable
and readable.  What is checked is in `dfs.testing.kv_oracle` and `dfs.testing.kv_checks`, and here:

    answers     every operation that a living coordinator began ends by its deadline
    converged   without faults all homes come to hold the same bytes
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from dfs.cluster.joint import missing_for_phase_2, missing_for_stable
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import DfsError, NotHome, Unreachable
from dfs.testing.kv_checks import check_copies, check_quorums, differing, verify
from dfs.testing.kv_clients import Client, Operation
from dfs.testing.kv_faults import fault, purge_cycle
from dfs.testing.kv_maps import CHAINS, PARTITIONS, chain, keys_of
from dfs.testing.kv_mutants import Classes
from dfs.testing.kv_network import LIMIT, Network, Scheduler, Weather
from dfs.testing.kv_node import Node, Process
from dfs.testing.kv_oracle import Oracle, ViolationError, Write
from dfs.testing.kv_shell import Shell
from dfs.testing.kv_themes import Theme
from metadata import actors, antientropy, rejoin, versions
from metadata.antientropy import members
from metadata.coordinator import MEMORY_AGE
from metadata.merkle import bucket_of
from metadata.registers import row_of

ROUNDS = 60  # of repair without faults


@contextmanager
def small_world() -> Iterator[None]:
    """Let the modules that walk through all partitions see as many as the simulation uses."""
    modules: tuple[Any, ...] = (actors, antientropy, rejoin)
    before = [m.PARTITIONS for m in modules]
    for m in modules:
        m.PARTITIONS = PARTITIONS
    try:
        yield
    finally:
        for m, count in zip(modules, before, strict=True):
            m.PARTITIONS = count


class World:
    """Nodes, network, clients, operator and weather of one schedule."""

    def __init__(self, seed: int, mutant: str | None = None) -> None:
        """Choose the weather."""
        self.random = random = Random(seed)
        self.seed = seed
        self.mutant = mutant
        self.classes = Classes(mutant)
        self.partitions = PARTITIONS
        self.theme = theme = Theme.random(random)
        self.chain = chain(seed % CHAINS)
        self.scheduler = Scheduler(random)
        self.network = Network(self.scheduler, Weather.random(random), self.deliver)
        self.oracle = Oracle()
        self.calm = False
        self.sync_time = random.choice((0.5, 2.0) if theme.impatient else (0.001, 0.02, 0.2))
        self.p_crash_at_write = random.choice((0.0, 0.0, 0.003, 0.02))
        self.committed = 1
        self.reports: dict[int, Any] = {}
        self._calls = 0
        self._waiting: dict[int, list[Callable[[], None]]] = {}
        self.rows = self._choose_rows()
        self.touched = tuple(dict.fromkeys(int.from_bytes(row[1:3], "big") for row in self.rows))
        first = self.chain.at(1)
        self.nodes = {n.number: Node(self, n.number, first) for n in first.nodes if n.metadata_addr}
        for node in self.nodes.values():
            node.start()
        self.laggards = random.sample(sorted(self.nodes), theme.laggards)
        self.pace = {n: theme.news * random.choice((0.1, 1.0, 1.0)) for n in self.nodes}
        self.pace |= dict.fromkeys(self.laggards, 0.0)
        self.names: dict[int, set[bytes]] = {}  # partition -> actors that minted there
        self.handoffs = dict.fromkeys(self.touched, 0)  # times that a node came to be a home
        self.renewals = 0  # of nodes that are gone
        self.purged = 0
        self.clients = [Client(self, i) for i in range(random.choice((2, 3, 5)))]
        self.operations: dict[Any, Operation] = {}
        self.writes: dict[bytes, Write] = {}  # by request id
        self.ended = self.failed = self.changes = self.crashes = self.restores = 0

    def _choose_rows(self) -> list[bytes]:
        random, theme = self.random, self.theme
        hot = random.sample(self.chain.hot, 2)
        partitions = (*hot, random.choice(self.chain.cold))
        if theme.rows == "one":
            return [row_of(0, keys_of(hot[0], 1)[0])]
        if theme.rows == "bucket":
            for p in self.chain.hot:
                buckets: dict[int, bytes] = {}
                for key in keys_of(p, 16):
                    row = row_of(0, key)
                    other = buckets.setdefault(bucket_of(row), row)
                    if other != row:
                        return [other, row]
        rows = [row_of(0, key) for p in partitions for key in keys_of(p, 2)]
        return rows[: random.choice((2, 3, 4, 5))]

    # --------------------------------------------------------------------------------- messages

    def deliver(self, source: int, target: int, message: Any) -> None:
        """A message arrives at a node or a client."""
        if target < 0:
            self.clients[-1 - target].answered(source, message)
            return
        node = self.nodes.get(target)
        process = node.process if node is not None else None
        if process is None:
            if message[0] == "?" and self.random.random() < 0.7:
                self.network.send(target, source, ("!", message[1], Unreachable("nobody there")))
            elif message[0] == "kv":
                self.network.send(target, source, (message[1], Unreachable("nobody there")))
            return
        if message[0] == "kv":
            _, token, operation, epoch = message
            if epoch > process.map.epoch:
                process.adopt(self.chain.at(epoch))
            process.begin(operation, token)
        else:
            process.receive(source, message)

    def leaving(self, request: Any) -> None:
        """Registers in a message are known elsewhere from now on."""
        if request[0] in ("m", "h"):
            self.oracle.exposed(request[1], request[2])
        elif (request[0] == "call" and request[1]) or (
            request[0] == "reply" and isinstance(request[1], tuple)
        ):
            for part in request[1]:
                self._expose(part)

    def _expose(self, part: Any) -> None:
        if not isinstance(part, tuple | list) or not part or not isinstance(part[0], tuple):
            return
        for item in part:
            if len(item) < 2 or not isinstance(item[0], bytes) or item[0][:1] != b"r":
                continue
            data = item[1]
            if isinstance(data, bytes) and data[:1] == versions.FORMAT and len(data) != 32:
                self.oracle.exposed(item[0], data)

    def next_call(self) -> int:
        """A number for a call, never used before."""
        self._calls += 1
        return self._calls

    def when_continued(self, number: int, fn: Callable[[], None]) -> None:
        """Do it when the stopped node goes on."""
        self._waiting.setdefault(number, []).append(fn)

    def carry_on(self, number: int) -> None:
        """SIGCONT."""
        if not self.network.stopped(number):
            return
        self.network.carry_on(number)
        process = self.nodes[number].process
        if process is not None:
            process.late = True
        for fn in self._waiting.pop(number, ()):
            self.scheduler.after(0.0, fn)

    def map_of(self, data: bytes) -> ClusterMap:
        """The map of these bytes, without decoding them."""
        for m in self.chain.maps:
            if m.digest == data[-32:]:
                return m
        raise ViolationError("maps: a map that nobody made")

    def crash_at_write(self) -> bool:
        """Whether a node dies at this very write."""
        if self.calm or self.random.random() >= self.p_crash_at_write:
            return False
        self.crashes += 1
        return True

    def used(self, partition: int) -> bool:
        """Whether any key of the schedule is in the partition."""
        return partition in self.touched

    # -------------------------------------------------------------------------------- operations

    def minted(self, process: Shell, write: bytes, context: bytes, reply: Any) -> None:
        """A replica minted a dot for the write of that request id."""
        found = self.writes[write]
        partition = int.from_bytes(found.row[1:3], "big")
        actor = process.registers.actors.actor(partition)
        homes = process.map.read_homes(METADATA, partition)
        if actor is None or process.number not in homes:
            raise ViolationError(f"actors: node {process.number} minted and is none of {homes}")
        self.names.setdefault(partition, set()).add(actor)
        if write in process.wrote and self.scheduler.now - process.asked[write] < MEMORY_AGE - 1.0:
            raise ViolationError(f"resend: write {found.number} was minted twice by one node")
        process.wrote[write] = None
        if found.sees:
            self.oracle.seen(found, versions.decode_context(context))
        hlc = dict(self.oracle.decode(reply[0])[0])[actor]
        self.oracle.minted(found, actor, hlc, (process.number, process.node.batches))

    def done(self, process: Shell, token: Any, result: Any, deadline: float) -> None:
        """A coordinator has an answer."""
        operation = self.operations[token[0]]
        if self.scheduler.now > deadline + 0.1 and not process.late:
            raise ViolationError(
                f"answers: operation {token} ended {self.scheduler.now - deadline} s late"
            )
        if operation.write is not None and not isinstance(result, DfsError):
            check_copies(self, process, operation)
        self.answer(process, token, result)

    def answer(self, process: Shell, token: Any, result: Any) -> None:
        """Tell the client, whom the message may never reach."""
        self.network.send(process.number, -1 - token[0][0], (token, result))

    def orphaned(self, token: Any) -> None:
        """The coordinator of an operation died."""

    def check_quorums(self, row: bytes) -> None:
        """No quorum may miss what is known; see `dfs.testing.kv_checks.check_quorums`."""
        check_quorums(self, row)

    def forgot(self, number: int) -> None:
        """A node lost part of what it durably had."""
        for history in self.oracle.rows.values():
            for dot in history.dots.values():
                if number in dot.homes:
                    dot.homes.discard(number)
                    dot.lost.add(number)

    # ------------------------------------------------------------------------------------ faults

    def run(self) -> None:
        """Faults, then calm; raises `ViolationError`."""
        with self.classes.patched(), small_world():
            random = self.random
            for client in self.clients:
                client.begin()
            names, weights = zip(*self.theme.faults.items(), strict=True)
            cycles = random.sample(range(self.theme.steps), 3 if self.theme.purges else 0)
            for step in range(self.theme.steps):
                fault(self, random.choices(names, weights)[0])
                self.scheduler.run(
                    self.scheduler.now + random.random() * random.choice((0.2, 1.0, 2.0)), LIMIT
                )
                self._housekeeping()
                if step in cycles:
                    purge_cycle(self)
                for row in self.rows:
                    self.check_quorums(row)
            self.settle()

    def leaders(self) -> list[tuple[int, Process]]:
        """First homes that run: (partition, process)."""
        m = self.chain.at(self.committed)
        found = []
        for partition in self.touched:
            process = self.nodes[m.homes(METADATA, partition)[0]].process
            if process is not None and not self.network.stopped(process.number):
                found.append((partition, process))
        return found

    def some_repair(self) -> None:
        """Homes, and some who were, exchange what they have."""
        m = self.chain.at(self.committed)
        homes = sorted({n for p in self.touched for n in members(m, p)})
        others = [n for n in self.nodes if n not in homes]
        homes += self.random.sample(others, min(2, len(others)))
        for number in homes:
            node = self.nodes.get(number)
            process = node.process if node is not None else None
            if process is None or self.network.stopped(number):
                continue
            if self.random.random() < self.theme.news:
                process.adopt(m)
            process.pull()
            peers = [n for n in process.anti.peers(process.map) if n in self.nodes]
            if peers:
                process.exchange(self.random.choice(peers))
        self.scheduler.run(self.scheduler.now + 2.0, LIMIT)

    def jump(self, seconds: float) -> None:
        """Time passes, and what was due meanwhile is late.

        Usual messages arrive, or their callers give up, first: only what a stopped node holds, and
        what is meant to come hours late, is older than a minute.
        """
        if not self.calm:
            active = [client for client in self.clients if not client.paused]
            for client in active:
                client.pause()
            self.scheduler.run(self.scheduler.now + 61.0, LIMIT)
            for client in active:
                client.resume()
        self.scheduler.jump(seconds)
        for node in self.nodes.values():
            if node.process is not None:
                node.process.late = True

    def _housekeeping(self) -> None:
        random = self.random
        numbers = list(self.nodes)
        for _ in range(2):
            process = self.nodes[random.choice(numbers)].process
            if process is None or self.network.stopped(process.number):
                continue
            x = random.random()
            if x < 0.35:
                peers = [n for n in process.anti.peers(process.map) if n in self.nodes]
                if peers:
                    process.exchange(random.choice(peers))
            elif x < 0.6:
                if not self.theme.withheld:
                    process.deliver_hints()
            elif x < 0.7:
                process.expire_hints()
            elif x < 0.8:
                for partition, leader in self.leaders():
                    leader.prepare(partition)
                    leader.purge()
            else:
                process.pull()
        for number in numbers:
            process = self.nodes[number].process
            if process is not None and random.random() < 0.3:
                process.pull()
            if process is not None and random.random() < 0.25:
                process.discard()
        if self.theme.moves:
            for _ in range(random.choice((1, 1, 2, 4))):
                self.operator()
                self.scheduler.run(self.scheduler.now + random.random() * 0.3, LIMIT)

    def operator(self) -> None:
        """News of the map, reports of nodes, and the next phase as soon as it may begin."""
        random, theme = self.random, self.theme
        m = self.chain.at(self.committed)
        phase = m.phase(METADATA)
        for number, node in self.nodes.items():
            process = node.process
            if process is None or self.network.stopped(number):
                continue
            if self.calm or random.random() < self.pace.get(number, theme.news):
                process.adopt(m)
            if phase and random.random() < max(0.3, theme.news):
                process.push()
                self.reports[number] = process.report()
        if self.committed == len(self.chain.maps):
            return
        if not phase:
            if random.random() < theme.moves * 0.5:
                self.commit()
                self.changes += 1
            return
        lacking = missing_for_phase_2 if phase == 1 else missing_for_stable
        if not lacking(m, self.reports, self.classes.rules):
            self.commit()

    def commit(self) -> None:
        """The voters agreed on the next map."""
        before = self.chain.at(self.committed)
        self.committed += 1
        m = self.chain.at(self.committed)
        for partition in self.touched:
            if m.last_change(METADATA, partition) == self.committed:
                homes = before.read_homes(METADATA, partition)
                self.handoffs[partition] += len(
                    {*homes, *m.read_homes(METADATA, partition)}
                )  # those that skip an epoch come to be homes anew
        present = [n.number for n in m.nodes if n.metadata_addr]
        for number in present:
            if number not in self.nodes:
                self.nodes[number] = Node(self, number, m)
                self.nodes[number].start()
        for number in [n for n in self.nodes if n not in present]:
            process = self.nodes[number].process
            if process is not None:
                self.renewals += process.registers.actors.epoch
            self.nodes[number].crash()  # banned: what it still has to say is nobody's business
            del self.nodes[number]
            self.reports.pop(number, None)
        self.spread()
        for row in self.rows:
            self.check_quorums(row)

    def spread(self) -> None:
        """Two nodes learn the newest map at once."""
        for number in self.random.sample(list(self.nodes), 2):
            process = self.nodes[number].process
            if process is not None and not self.network.stopped(number):
                process.adopt(self.chain.at(self.committed))

    # -------------------------------------------------------------------------------------- calm

    def settle(self) -> None:
        """No more faults: repair until nothing differs, then check it all."""
        self.calm = self.network.calm = True
        self.network.heal()
        for number, node in self.nodes.items():
            node.store.full = False
            self.carry_on(number)
            node.start()
        for client in self.clients:
            client.stop()
        self.scheduler.run(self.scheduler.now + 70.0, LIMIT * 2)
        for node in self.nodes.values():
            if node.process is not None and node.process.tokens:
                raise ViolationError(f"answers: {list(node.process.tokens)} never ended")
        self.jump(7200.0)  # rows from clocks that are ahead count as fresh until then
        for _ in range(ROUNDS):
            self._repair_round()
            if not self.chain.at(self.committed).phase(METADATA):
                why = differing(self)
                if not why:
                    break
            else:
                self.operator()
                why = f"phase {self.chain.at(self.committed).phase(METADATA)} is not left"
        else:
            raise ViolationError(f"converged: {why}")
        verify(self)

    def _repair_round(self) -> None:
        m = self.chain.at(self.committed)
        numbers = sorted({n for p in self.touched for n in members(m, p)})
        numbers += [n for n in self.nodes if n not in numbers][:3]
        for number in numbers:
            process = self.nodes[number].process
            if process is None:
                raise AssertionError("a node died in the calm")
            process.adopt(m)
            process.deliver_hints()
            process.pull()
            process.push()
            peers = process.anti.peers(m)
            if peers:
                process.exchange(self.random.choice(peers))
            self.reports[number] = process.report()
        self.scheduler.run(self.scheduler.now + 31.0, LIMIT * 3)


def run_cores(seed: int, mutant: str | None = None) -> World:
    """One schedule; raises `ViolationError`."""
    world = World.__new__(World)
    with Classes(mutant).patched(), small_world():
        world.__init__(seed, mutant)  # type: ignore[misc]  # nodes start in the small world
    world.run()
    return world


__all__ = ["NotHome", "ViolationError", "World", "run_cores"]
