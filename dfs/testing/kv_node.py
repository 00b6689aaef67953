"""A node of the register simulation: a disk, and the process on it with what it does of itself."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dfs.cluster.joint import Progress, bitmap
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import DfsError
from dfs.hashing import digest
from dfs.testing.kv_shell import Callback, Shell
from dfs.testing.kv_store import DictStore
from metadata import merkle, registers
from metadata.antientropy import members
from metadata.merkle import REGISTERS
from metadata.pull import pull_partition
from metadata.rejoin import PullFirst

if TYPE_CHECKING:
    from dfs.testing.kv_cores import World

BASE_US = 1_700_000_000_000_000  # what clocks show at time 0 of a schedule


class Node:
    """A data directory, and the process on it while there is one."""

    def __init__(self, world: "World", number: int, cluster_map: ClusterMap) -> None:
        """A fresh disk; not started."""
        self.world = world
        self.number = number
        self.store = DictStore()
        self.saved_map = cluster_map
        self.skew = world.random.uniform(-1800.0, 1800.0)
        self.process: Process | None = None
        self.backup: tuple[dict[bytes, bytes], ClusterMap] | None = None
        self.batches = 0  # written so far
        self.restored = False
        self.pushed: dict[int, dict[int, None]] = {}  # durable claims: member of B -> partitions
        self.pushed_in = 0  # the transition (epoch of its phase 1) that they are about

    def wall_us(self) -> int:
        """What its clock shows."""
        return BASE_US + int((self.world.scheduler.now + self.skew) * 1e6)

    def start(self) -> None:
        """Start a process on what the disk holds."""
        if self.process is None:
            self.process = Process(self)

    def crash(self) -> None:
        """Lose power, or be killed: what was not synced may be gone."""
        if self.process is None:
            return
        self.process.die()
        self.process = None
        self.world.network.forget(self.number)
        self.store.crash(self.world.random)

    def waits(self) -> bool:
        """Whether it lacks what it once had."""
        if self.process is None:
            return self.restored or bool(PullFirst(self.store).partitions())
        return bool(self.process.pull_first.partitions())

    def restore(self) -> None:
        """Come back on an old copy of the disk; the boot counters notice that."""
        assert self.process is None  # the caller crashed it
        if self.backup is not None:
            rows, self.saved_map = self.backup
            self.store = DictStore(rows)
            self.restored = True
            self.pushed, self.pushed_in = {}, 0
            self.world.forgot(self.number)


class Process(Shell):
    """What a crash destroys, and the work that a node does without being asked."""

    # -------------------------------------------------------------------------------- background

    def background(self, kind: str, todo: Callable[[], Any], callback: Callback) -> None:
        """Drive a protocol of this node, at most one of a kind at a time."""
        if self.busy.get(kind):
            return
        self.busy[kind] = 1

        def ended(result: Any) -> None:
            self.busy[kind] = 0
            callback(result)

        self.run(todo(), ended)

    def exchange(self, peer: int) -> None:
        """Anti-entropy with another node."""
        began = self.node.wall_us()

        def ended(result: Any) -> None:
            if not isinstance(result, DfsError):
                ops = self.hints.cleaned(peer, began)
                if ops:
                    self.enqueue(("o", ops), lambda _: None)

        self.background("exchange", lambda: self.anti.exchange(peer, began), ended)

    def deliver_hints(self) -> None:
        """Hand over what is kept for others."""
        waiting = self.hints.waiting()
        if waiting:
            target = self.world.random.choice(waiting)
            now = self.node.wall_us()
            self.background("hints", lambda: self.hints.deliver(target, now), lambda _: None)

    def expire_hints(self) -> None:
        """Drop what is kept for too long."""
        now = self.node.wall_us()
        self.background("hints", lambda: self.hints.expire(now), lambda _: None)

    def prepare(self, partition: int) -> None:
        """First half of a purge."""
        now = self.node.wall_us()
        self.background("tomb", lambda: self.tombstones.prepare(partition, now), lambda _: None)

    def purge(self) -> None:
        """Second half."""
        now = self.node.wall_us()
        self.background("tomb", lambda: self.tombstones.purge(now), lambda _: None)

    def pull(self) -> None:
        """Catch up where this node has to before it is shown."""
        waiting = [p for p in self.pull_first.partitions() if p < self.world.partitions]
        mine = [p for p in waiting if self.world.used(p) and self.number in members(self.map, p)]
        others = [p for p in waiting if p not in mine]  # nobody wrote anything there
        if others:
            self.enqueue(("o", self.pull_first.finish(others)), lambda _: None)
        if not mine:
            return
        partition = self.world.random.choice(mine)

        def ended(result: Any) -> None:
            if result is True:
                self.enqueue(("o", self.pull_first.finish([partition])), lambda _: None)

        now = self.node.wall_us()
        self.background("pull", lambda: pull_partition(self.anti, partition, now), ended)

    # --------------------------------------------------------------------------- changes of homes

    def push(self) -> None:
        """Give a new home what it lacks, during a transition."""
        m = self.map
        if m.phase(METADATA) == 0:
            return
        node = self.node
        if node.pushed_in != self._transition():
            node.pushed, node.pushed_in = {}, self._transition()
        todo = []
        for partition in m.changed(METADATA):
            if self.number in m.old_homes(METADATA, partition):
                todo += [
                    (partition, b)
                    for b in m.homes(METADATA, partition)
                    if b != self.number and partition not in node.pushed.get(b, {})
                ]
        quiet = [x for x in todo if not self.world.used(x[0])]
        for partition, b in quiet:  # nothing to push
            node.pushed.setdefault(b, {})[partition] = None
        todo = [x for x in todo if self.world.used(x[0])]
        if not todo:
            return
        partition, b = self.world.random.choice(todo)
        began = self._transition()

        def ended(result: Any) -> None:
            failed = isinstance(result, DfsError) or bool(result.errors)
            if not failed and self.node.pushed_in == began:
                self.node.pushed.setdefault(b, {})[partition] = None
                self.push()  # on to the next

        now = node.wall_us()
        self.background("push", lambda: self.anti.push_partition(partition, b, now), ended)

    def _transition(self) -> int:
        """Names the transition under way: the epoch in which it began."""
        return self.map.epoch - (self.map.phase(METADATA) - 1)

    def report(self) -> Progress:
        """What this node vouches for."""
        node = self.node
        pushed = {}
        if self.map.phase(METADATA) and node.pushed_in == self._transition():
            pushed = {b: bitmap(ps) for b, ps in node.pushed.items()}
        return Progress(self.map.epoch, pushed)

    def discard(self) -> None:
        """An ex-home lets go of what it is no home of, in a stable map."""
        m = self.map
        if m.phase(METADATA):
            return
        for partition in range(self.world.partitions):
            if self.number in m.homes(METADATA, partition) or not self.world.used(partition):
                continue
            for row, value in merkle.rows_of(self.node.store, REGISTERS, partition)[0]:
                self.enqueue((registers.DISCARD, row, digest(value)), lambda _: None)
