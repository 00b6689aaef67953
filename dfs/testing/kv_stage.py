"""A stage for directed schedules: the nodes of the register simulation, without any chance.

What random schedules meet too seldom is played step by step here: a perfect network that can be
cut, messages that are held and released hours later, time that jumps, homes that change when the
rules allow it.  The nodes, the oracle and its checks are those of `dfs.testing.kv_cores`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dfs.cluster.joint import missing_for_phase_2, missing_for_stable
from dfs.cluster.map import METADATA
from dfs.testing.kv_clients import Client, Operation
from dfs.testing.kv_cores import World, small_world
from dfs.testing.kv_maps import keys_of
from dfs.testing.kv_mutants import Classes
from dfs.testing.kv_network import LIMIT, Weather
from dfs.testing.kv_node import Process
from dfs.testing.kv_shell import HOUR
from dfs.testing.kv_themes import Theme
from metadata.registers import row_of


class Stage(World):
    """One row in the partition of a chain whose homes change most."""

    def __init__(self, number: int, mutant: str | None = None) -> None:
        """Chain `number`, all nodes up, nothing written."""
        super().__init__(number, mutant)
        self.theme = Theme(faults={})
        self.network.weather = Weather()
        self.sync_time, self.p_crash_at_write = 0.001, 0.0
        self.laggards, self.pace = [], {}
        self.partition = self.chain.hot[0]
        self.row = row_of(0, keys_of(self.partition, 1)[0])
        self.rows, self.touched = [self.row], (self.partition,)
        self.handoffs = {self.partition: 0}
        self.clients = [Client(self, 0)]
        self.clients[0].pause()
        self.held: list[tuple[int, int, Any]] = []
        for node in self.nodes.values():
            node.skew = 0.0

    def process(self, number: int) -> Process:
        """The running process of a node."""
        process = self.nodes[number].process
        assert process is not None  # directed schedules know who runs
        return process

    def run_for(self, seconds: float = 5.0) -> None:
        """Let what is under way happen."""
        self.scheduler.run(self.scheduler.now + seconds, LIMIT)

    def hours(self, hours: float) -> None:
        """Time passes."""
        self.jump(hours * HOUR)

    def away(self, *numbers: int) -> None:
        """Cut these nodes off from all others."""
        self.network.cut((a, b) for a in numbers for b in self.nodes if a != b)
        self.network.cut((b, a) for a in numbers for b in self.nodes if a != b)

    def back(self) -> None:
        """All links work again; nobody is suspected."""
        self.network.heal()
        for node in self.nodes.values():
            if node.process is not None:
                node.process.suspects.clear()

    def get(self, via: int) -> bool:
        """Read at level quorum; whether it was answered, with what it must know."""
        floor = self.oracle.floor(self.row)
        return self._ask(
            via, Operation(self.row, {"level": "quorum"}, None, b"", 4.0, floor, True, tries=9)
        )

    def ask(self, via: int, value: bytes | None, context: bytes | None = None) -> bool:
        """Put `value` (None: delete) at level quorum; whether it was acknowledged."""
        client = self.clients[0]
        write = self.oracle.write(self.row, value, (0, 0) if context == b"" else None)
        request = b"%016d" % client.count
        options = {"level": "quorum", "request": request}
        self.writes[request] = write
        floor = self.oracle.floor(self.row)
        operation = Operation(self.row, options, write, context, 4.0, floor, True, tries=9)
        return self._ask(via, operation)

    def _ask(self, via: int, operation: Operation) -> bool:
        client = self.clients[0]
        token = (0, client.count)
        client.count += 1
        self.operations[token] = operation
        client.current = token, operation
        before = self.ended
        self.network.send(-1, via, ("kv", (token, 9), operation, 1))
        self.run_for()
        client.current = None
        return self.ended > before

    def exchange(self, one: int, other: int) -> None:
        """Anti-entropy."""
        self.process(one).exchange(other)
        self.run_for()

    def purge(self, leader: int, wait: float = 4.5) -> None:
        """Prepare, wait for `wait` hours, purge; then nothing purged may be back anywhere."""
        self.process(leader).prepare(self.partition)
        self.run_for()
        if wait:
            self.hours(wait)
        self.process(leader).purge()
        self.run_for()
        self.check_quorums(self.row)

    def forget(self, leader: int) -> None:
        """Wait until what was deleted may go, and purge it."""
        self.hours(25.5)
        self.purge(leader)

    def pull(self, number: int) -> None:
        """A node catches up where it waits."""
        self.process(number).pull()
        self.run_for()

    def deliver_hints(self, number: int) -> None:
        """A node hands over what it keeps for another."""
        self.process(number).deliver_hints()
        self.run_for()

    def back_up(self, number: int) -> None:
        """Keep a copy of a node's disk."""
        node = self.nodes[number]
        node.backup = (node.store.rows(), node.saved_map)

    def restore(self, number: int) -> None:
        """A node starts on the copy of its disk, and notices."""
        node = self.nodes[number]
        node.crash()
        node.restore()
        node.start()

    @contextmanager
    def holding(self, method: str) -> Iterator[None]:
        """Messages of a method are held meanwhile, as a slow network would."""
        send = self.network.send

        def hold(source: int, target: int, message: Any) -> None:
            if message[0] == "?" and message[3] == method:
                self.held.append((source, target, message))
            else:
                send(source, target, message)

        self.network.send = hold  # type: ignore[method-assign]  # a switch for one instance
        try:
            yield
        finally:
            self.network.send = send  # type: ignore[method-assign]  # back to the method

    def release(self) -> None:
        """What was held arrives."""
        assert self.held  # nothing was held: the schedule is not what it says
        for source, target, message in self.held:
            self.deliver(source, target, message)
        self.held.clear()
        self.run_for()
        self.check_quorums(self.row)

    def tell(self, numbers: Iterable[int]) -> None:
        """Nodes learn the newest map."""
        for number in numbers:
            self.process(number).adopt(self.chain.at(self.committed))
        self.run_for(1.0)

    def push(self, numbers: Iterable[int]) -> None:
        """Members of A push all they have, and report."""
        numbers = tuple(numbers)
        for number in numbers:
            for _ in range(8):  # one that is cut off is given up after a minute
                self.process(number).push()
                self.run_for(61.0)
        for number in numbers:
            self.reports[number] = self.process(number).report()

    def spread(self) -> None:
        """Nobody learns of a map unless told."""

    def advance(self) -> bool:
        """The next map, if the rules allow it; nobody is told."""
        m = self.chain.at(self.committed)
        phase = m.phase(METADATA)
        if phase:
            missing = missing_for_phase_2 if phase == 1 else missing_for_stable
            if missing(m, self.reports, self.classes.rules):
                return False
        self.commit()
        return True

    def move(self) -> None:
        """A whole transition, without any fault."""
        assert self.advance()  # it begins in a stable map
        for _ in range(2):
            m = self.chain.at(self.committed)
            self.tell(self.nodes)
            self.push(m.old_homes(METADATA, self.partition))
            for number in self.nodes:
                self.reports[number] = self.process(number).report()
            assert self.advance()  # everything was reported
        self.tell(self.nodes)


@contextmanager
def stage(number: int, mutant: str | None = None) -> Iterator[Stage]:
    """A stage on a chain of maps, with a broken rule or none; ends with calm and all checks."""
    with Classes(mutant).patched(), small_world():
        made = Stage(number, mutant)
        yield made
        made.back()
        made.settle()
