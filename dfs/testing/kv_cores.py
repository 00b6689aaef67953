"""Registers under a random scheduler: no tasks, no disks, no clocks, thousands of faults.

Each `dfs.testing.kv_node.Node` drives the real coordinator, replica, anti-entropy, hints, purging
and digests; the map is a chain of real maps whose transitions advance by the real thresholds on
real reports.  Clients put, delete and get a few keys, resend, and follow contexts; faults of every
kind go on meanwhile; then they stop and everything must be equal, durable and readable.  What is
checked is in `dfs.testing.kv_oracle`, and here:

    copies      an acknowledged write is durable on W nodes of every set of homes, PW of them homes
    answers     every operation that a living coordinator began ends by its deadline
    digests     equal copies have equal digests, and those are what a recomputation gives
    converged   without faults all homes come to hold the same bytes, and quorums answer
    actors      a version vector has no more actors than ever were homes of its partition
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from dfs.cluster.joint import missing_for_phase_2, missing_for_stable
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import DfsError, NotHome, Unreachable
from dfs.testing.kv_clients import Client, Operation
from dfs.testing.kv_maps import CHAINS, PARTITIONS, chain, keys_of
from dfs.testing.kv_mutants import Classes
from dfs.testing.kv_network import Network, Scheduler, Weather
from dfs.testing.kv_node import Node, Process
from dfs.testing.kv_oracle import Dot, Oracle, ViolationError, Write
from dfs.testing.kv_themes import Theme
from metadata import actors, antientropy, merkle, rejoin, versions
from metadata.antientropy import members
from metadata.coordinator import MEMORY_AGE
from metadata.merkle import REGISTERS, bucket_of, recompute
from metadata.quorum import majority
from metadata.registers import row_of

LIMIT = 60_000  # events of a schedule
HOUR = 3600.0
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
        self._used = tuple(dict.fromkeys(int.from_bytes(row[1:3], "big") for row in self.rows))
        first = self.chain.at(1)
        self.nodes = {n.number: Node(self, n.number, first) for n in first.nodes if n.metadata_addr}
        for node in self.nodes.values():
            node.start()
        self.laggards = random.sample(sorted(self.nodes), theme.laggards)
        self.pace = {n: theme.news * random.choice((0.1, 1.0, 1.0)) for n in self.nodes}
        self.pace |= dict.fromkeys(self.laggards, 0.0)
        self.names: dict[int, set[bytes]] = {}  # partition -> actors that minted there
        self.handoffs = dict.fromkeys(self._used, 0)  # times that a node came to be a home
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
        return partition in self._used

    # -------------------------------------------------------------------------------- operations

    def minted(self, process: Process, write: bytes, context: bytes, reply: Any) -> None:
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

    def done(self, process: Process, token: Any, result: Any, deadline: float) -> None:
        """A coordinator has an answer."""
        operation = self.operations[token[0]]
        if self.scheduler.now > deadline + 0.1 and not process.late:
            raise ViolationError(
                f"answers: operation {token} ended {self.scheduler.now - deadline} s late"
            )
        if operation.write is not None and not isinstance(result, DfsError):
            self._check_copies(process, operation)
        self.answer(process, token, result)

    def answer(self, process: Process, token: Any, result: Any) -> None:
        """Tell the client, whom the message may never reach."""
        self.network.send(process.number, -1 - token[0][0], (token, result))

    def orphaned(self, token: Any) -> None:
        """The coordinator of an operation died."""

    def forgot(self, number: int) -> None:
        """A node lost part of what it durably had."""
        for history in self.oracle.rows.values():
            for dot in history.dots.values():
                if number in dot.homes:
                    dot.homes.discard(number)
                    dot.lost.add(number)

    def _check_copies(self, process: Process, operation: Operation) -> None:
        write = operation.write
        if write is None or write.counted:
            return
        write.counted = True
        history = self.oracle.history(operation.row)
        for members_, total, homes in operation.quotas(process.map, process.number):
            best = (-1, -1)
            for name in sorted(write.dots):
                dot = history.dots[name]
                held = sum(
                    n in dot.homes or n in dot.lost or self._left(process, operation.row, dot, n)
                    for n in members_
                )
                hinted = len(dot.hints - set(members_))
                best = max(best, (held, hinted))
            if best[0] < homes or best[0] + best[1] < total:
                raise ViolationError(
                    f"copies: write {write.number} was acknowledged with {best} copies on homes "
                    f"{members_} and as hints, {total} and {homes} on homes are needed"
                )

    def _left(self, process: Process, row: bytes, dot: Dot, number: int) -> bool:
        """Whether a node had a copy, and let go of it by homes this coordinator has not heard of.

        Nothing tells a coordinator with an old map that a home which acknowledged is one no more.
        It need not know: the transition that ended it has taken the write to quorums of the homes
        that followed, and `check_quorums` asks for it there.
        """
        epoch = dot.left.get(number)
        if epoch is None:
            return False
        partition = int.from_bytes(row[1:3], "big")
        return self.chain.at(epoch).last_change(METADATA, partition) > process.map.epoch

    def check_quorums(self, row: bytes) -> None:
        """No quorum that would answer a read now, by a map of any epoch, may miss what is known.

        Stronger than to wait for a read that does: what matters is whether one could.
        """
        partition = int.from_bytes(row[1:3], "big")
        for epoch in range(self.committed, max(0, self.committed - 3), -1):
            m = self.chain.at(epoch)
            homes = m.read_homes(METADATA, partition)
            able = [n for n in homes if self._serves(n, epoch, partition)]
            missed = self.oracle.missed(row, able, majority(len(homes)))
            if missed:
                raise ViolationError(
                    f"fresh: {row!r}: quorums of {able} of epoch {epoch} (newest "
                    f"{self.committed}) do not know writes {missed:b}"
                )
            if epoch != self.committed:
                continue
            for n in able:
                data = self.nodes[n].store.get(row)
                if data and (back := self.oracle.risen(row, data)):
                    raise ViolationError(f"dead: {row!r} is back at node {n}: writes {back:b}")

    def _serves(self, number: int, epoch: int, partition: int) -> bool:
        """Whether a node would answer a read of that epoch, once it runs and is reached."""
        node = self.nodes.get(number)
        if node is None or node.restored:
            return False
        process = node.process
        if process is None:
            known, waits = node.saved_map, self.classes.pull_first(node.store)
            stale = epoch < known.last_change(METADATA, partition)
        else:
            known, waits = process.map, process.pull_first
            last = known.last_change(METADATA, partition)
            stale = process.registers.rule_stale(epoch, last)
        if stale or waits.waiting(partition):
            return False
        if known.epoch >= epoch or self.chain.at(epoch).last_change(METADATA, partition) <= (
            known.epoch
        ):
            return True
        # it learns of the map first, and may have to pull then
        there = epoch == known.epoch + 1 and number in members(known, partition)
        return there or not merkle.rows_of(node.store, REGISTERS, partition)[0]

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
                self._fault(random.choices(names, weights)[0])
                self.scheduler.run(
                    self.scheduler.now + random.random() * random.choice((0.2, 1.0, 2.0)), LIMIT
                )
                self._housekeeping()
                if step in cycles:
                    self._purge_cycle()
                for row in self.rows:
                    self.check_quorums(row)
            self._settle()

    def _fault(self, kind: str) -> None:
        random = self.random
        numbers = list(self.nodes)
        some = random.choice(numbers)
        node = self.nodes[some]
        if kind == "cut":
            self.network.heal()
            if random.random() < 0.6:
                side = {n: random.random() < 0.5 for n in numbers}
                pairs = [(a, b) for a in numbers for b in numbers if side[a] != side[b]]
                if random.random() < 0.3:
                    pairs = [(a, b) for a, b in pairs if side[a]]  # one way
                self.network.cut(pairs)
        elif kind == "links":
            self.network.cut((random.choice(numbers), random.choice(numbers)) for _ in range(4))
        elif kind == "crash":
            self.crashes += 1
            node.crash()
        elif kind == "start":
            for n in numbers:
                if random.random() < 0.7:
                    self.nodes[n].start()
        elif kind == "stop":
            self.network.stop(some)
        elif kind == "continue":
            for n in numbers:
                if random.random() < 0.7:
                    self.carry_on(n)
        elif kind == "full":
            node.store.full = not node.store.full
        elif kind == "skew":
            node.skew = random.uniform(-1800.0, 1800.0)
        elif kind == "restore":
            homes = self.chain.at(self.committed).homes(METADATA, random.choice(self._used))
            self._restore(self.nodes[random.choice([n for n in homes if n in self.nodes])])
        elif kind == "age":
            self._jump(random.choice((600.0, 4 * HOUR, 30 * HOUR, 80 * HOUR)))

    def _purge_cycle(self) -> None:
        """A day and five hours, in which tombstones may go."""
        random = self.random
        quiet = random.random() < 0.8
        if quiet:
            for client in self.clients:
                client.pause()
            if random.random() < 0.8:
                self._delete_all()
        if random.random() < 0.9:
            self.network.heal()
        for number, node in self.nodes.items():
            if random.random() < 0.95:
                node.store.full = False
                self.carry_on(number)
                node.start()
        for _ in range(random.choice((0, 1, 3))):
            self._some_repair()
        self._jump(random.choice((3.0, 23.5, 25.5, 25.5, 26.0, 30.0)) * HOUR)
        self._some_repair()
        leaders = self._leaders()
        for partition, process in leaders:
            process.prepare(partition)
            self.scheduler.run(self.scheduler.now + 1.0, LIMIT)
        if not quiet or random.random() < 0.2:
            self._fault(random.choice(("crash", "start", "nothing", "restore")))
        if random.random() < 0.3:
            self._operator()
        if random.random() < 0.85:
            self._jump(random.choice((3.0, 4.5, 5.5, 6.0)) * HOUR)
        for _, leader in leaders:
            if leader.alive:
                leader.purge()
                self.scheduler.run(self.scheduler.now + 1.0, LIMIT)
        for row in self.rows:
            self.check_quorums(row)
        for client in self.clients:
            client.resume()
        for number in self.nodes:
            keeper = self.nodes[number].process
            if keeper is not None and not self.network.stopped(number):
                keeper.deliver_hints()
        self._some_repair()

    def _delete_all(self) -> None:
        """Clients delete every row that they can."""
        self.scheduler.run(self.scheduler.now + 11.0, LIMIT)
        rows = list(self.rows)
        for _ in range(3):
            for client in self.clients:
                if rows and client.current is None:
                    client.delete(rows.pop())
            self.scheduler.run(self.scheduler.now + 2.0, LIMIT)

    def _leaders(self) -> list[tuple[int, Process]]:
        m = self.chain.at(self.committed)
        found = []
        for partition in self._used:
            process = self.nodes[m.homes(METADATA, partition)[0]].process
            if process is not None and not self.network.stopped(process.number):
                found.append((partition, process))
        return found

    def _some_repair(self) -> None:
        """Homes, and some who were, exchange what they have."""
        m = self.chain.at(self.committed)
        homes = sorted({n for p in self._used for n in members(m, p)})
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

    def _jump(self, seconds: float) -> None:
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

    def _restore(self, node: Node) -> None:
        """An old state comes back, or is kept for later."""
        if node.backup is None:
            if not node.store.dirty:
                node.backup = (node.store.rows(), node.saved_map)
            return
        if any(n.waits() for n in self.nodes.values()):
            return  # two at once are more than any quorum forgives
        self.restores += 1
        node.crash()
        node.restore()
        if self.random.random() < 0.7:
            node.start()

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
                for partition, leader in self._leaders():
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
                self._operator()
                self.scheduler.run(self.scheduler.now + random.random() * 0.3, LIMIT)

    def _operator(self) -> None:
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
                self._commit()
                self.changes += 1
            return
        lacking = missing_for_phase_2 if phase == 1 else missing_for_stable
        if not lacking(m, self.reports, self.classes.rules):
            self._commit()

    def _commit(self) -> None:
        """The voters agreed on the next map."""
        before = self.chain.at(self.committed)
        self.committed += 1
        m = self.chain.at(self.committed)
        for partition in self._used:
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

    def _settle(self) -> None:
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
        self._jump(7200.0)  # rows from clocks that are ahead count as fresh until then
        for _ in range(ROUNDS):
            self._repair_round()
            if not self.chain.at(self.committed).phase(METADATA):
                why = self._differing()
                if not why:
                    break
            else:
                self._operator()
                why = f"phase {self.chain.at(self.committed).phase(METADATA)} is not left"
        else:
            raise ViolationError(f"converged: {why}")
        self._verify()

    def _repair_round(self) -> None:
        m = self.chain.at(self.committed)
        numbers = sorted({n for p in self._used for n in members(m, p)})
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

    def _differing(self) -> str:
        m = self.chain.at(self.committed)
        for row in self.rows:
            homes = m.homes(METADATA, int.from_bytes(row[1:3], "big"))
            if len({self.nodes[n].store.get(row) for n in homes}) > 1:
                return f"{row!r} differs between homes {homes}"
            for n in homes:
                process = self.nodes[n].process
                if process is None or process.pull_first.waiting(int.from_bytes(row[1:3], "big")):
                    return f"node {n} still waits"
        return ""

    def _verify(self) -> None:
        m = self.chain.at(self.committed)
        for row in self.rows:
            partition = int.from_bytes(row[1:3], "big")
            homes = m.homes(METADATA, partition)
            data = self.nodes[homes[0]].store.get(row)
            register = self.oracle.decode(data) if data else versions.EMPTY
            self.oracle.final(row, register)
            if data and versions.encode(register) != data:
                raise ViolationError(f"canonical: {row!r} has other bytes than its value")
            totals = set()
            for n in homes:
                process = self.nodes[n].process
                if process is not None:
                    totals.add(tuple(process.digests.buckets(REGISTERS, partition)))
            if len(totals) > 1:
                raise ViolationError(f"digests: partition {partition} differs while its rows agree")
            self._check_actors(partition, register)
            self._check_merges(row)
        for node in self.nodes.values():
            for partition in self._used:
                steps = recompute(node.store, REGISTERS, partition)
                try:
                    while True:
                        next(steps)
                except StopIteration as e:
                    if e.value:
                        raise ViolationError(
                            f"digests: those of node {node.number} drifted"
                        ) from None
        self._read_all()

    def _check_actors(self, partition: int, register: versions.Register) -> None:
        """No more actors than homes there were, and than nodes that forgot what they had been."""
        renewed = self.renewals
        for node in self.nodes.values():
            if node.process is not None:
                renewed += node.process.registers.actors.epoch - 1
        bound = self.chain.at(1).n + self.handoffs[partition] + renewed
        if len(register[0]) > bound or not {a for a, _ in register[0]} <= self.names.get(
            partition, set()
        ):
            raise ViolationError(
                f"actors: {len(register[0])} in a register of partition {partition}, bound {bound}"
            )

    def _check_merges(self, row: bytes) -> None:
        """Whatever registers of a row there ever were merge to the same bytes in any order."""
        seen = self.oracle.seen_registers(row, 12)
        results = set()
        for _ in range(3):
            self.random.shuffle(seen)
            merged = versions.EMPTY
            for data in seen:
                merged = versions.merge(merged, self.oracle.decode(data))
                merged = versions.merge(merged, self.oracle.decode(data))
            results.add(versions.encode(merged))
        if len(results) > 1:
            raise ViolationError(f"merge: the order in which copies of {row!r} meet matters")

    def _read_all(self) -> None:
        """At the end every quorum read succeeds and knows all."""
        client = self.clients[0]
        wanted = len(self.rows)
        for row in self.rows:
            client.last_read(row)
        self.scheduler.run(self.scheduler.now + 30.0, LIMIT * 3)
        if client.read_back != wanted:
            raise ViolationError(f"liveness: {client.read_back} of {wanted} reads succeeded")


def run_cores(seed: int, mutant: str | None = None) -> World:
    """One schedule; raises `ViolationError`."""
    world = World.__new__(World)
    with Classes(mutant).patched(), small_world():
        world.__init__(seed, mutant)  # type: ignore[misc]  # nodes start in the small world
    world.run()
    return world


__all__ = ["NotHome", "ViolationError", "World", "run_cores"]
