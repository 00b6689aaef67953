"""A process of the register simulation: the real state machines in a shell of events, not tasks.

The shell carries out what `Coordinator`, `Registers` and the generators of anti-entropy, hints and
purging ask for, and decides nothing: requests for the writer (`dfs.testing.kv_writer`), and to
other nodes, that are answered, lost or given up on; a durable map; recovery after a crash.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from dfs.cluster.map import ClusterMap
from dfs.errors import Busy, DeadlineExceeded, DfsError, Unreachable
from dfs.testing.kv_store import Op
from dfs.testing.kv_writer import Writer
from metadata import hints as hintfile
from metadata import merkle, registers, steps, versions
from metadata.coordinator import ATTEMPT, DONE, OFFER, SEND
from metadata.merkle import REGISTERS
from metadata.quorum import Options

if TYPE_CHECKING:
    from dfs.testing.kv_node import Node

Callback = Callable[[Any], None]
SUSPECTED = 5.0  # seconds for which a node that did not answer counts as down
BACKGROUND = 60.0  # seconds a call of a background protocol is waited for
HOUR = 3600.0
LATE = ("sync.push", "hints.deliver")  # what looks at its age itself, and may be hours late


class _HintsNow:
    """The hints as a replica sees them, which does not know what time it is."""

    def __init__(self, node: "Node", hints: hintfile.Hints) -> None:
        self.node = node
        self.hints = hints

    def add(self, row: bytes, register: bytes, target: int, written: int) -> list[Op]:
        return self.hints.add(row, register, target, written, self.node.wall_us())

    def find(self, row: bytes) -> Sequence[bytes]:
        return self.hints.find(row)


class Shell:
    """What a crash destroys, and how it serves others; see `dfs.testing.kv_node.Process`."""

    def __init__(self, node: "Node") -> None:
        """Recover from the disk."""
        world = node.world
        self.node, self.world, self.number = node, world, node.number
        self.alive = True
        self.late = False  # time has jumped: deadlines are met late
        store, classes = node.store, world.classes
        self.map = node.saved_map
        self.digests = classes.digests(store)
        self.digests.load()
        self.hints = classes.hints(self.number, self.get_map, store, lambda: 1 << 24)
        self.pull_first = classes.pull_first(store)
        self.registers = classes.registers(
            store,
            self.number,
            self.map,
            digests=self.digests,
            hints=_HintsNow(node, self.hints),
            waiting=lambda partition: self.pull_first.waiting(partition),
        )
        self.coordinator = classes.coordinator(self.number, self.map, is_up=self.is_up)
        self.coordinator.wall_us = node.wall_us()
        self.anti = classes.antientropy(
            self.number,
            self.get_map,
            store,
            self.digests,
            self.pull_first,
            lambda data: versions.newest_hlc(world.oracle.decode(data)),
        )
        self.tombstones = classes.tombstones(
            self.number,
            self.get_map,
            store,
            self.pull_first,
            newest=lambda data: versions.newest_hlc(world.oracle.decode(data)),
            is_tombstone=lambda data: versions.is_tombstone(world.oracle.decode(data)),
            alive=self.is_up,
        )
        self.asked: dict[bytes, float] = {}  # request id -> when it was first asked
        self.wrote: dict[bytes, None] = {}  # those it minted for
        self.suspects: dict[int, float] = {}
        self.calls: dict[int, Callback] = {}
        self.answered: dict[tuple[int, int], Any] = {}
        self.writer = Writer(self)
        self.enqueue = self.writer.enqueue
        self.outgoing: dict[int, list[tuple[int, Any, Any]]] = {}
        self.outgoing_since = 0.0
        self.flushing = False
        self.tick_at = inf
        self.tokens: dict[Any, float] = {}  # answers that clients wait for, and their deadlines
        self.busy: dict[str, int] = {}  # background work under way
        first: list[Op] = []
        if not self.digests.built(REGISTERS):
            for table in merkle.TABLES:
                first = self.digests.mark_built(table)
        if node.restored:
            if world.mutant != "amnesia":
                self.registers.actors.renew()
            if world.mutant not in ("amnesia", "showsold"):
                first += self.pull_first.begin(range(world.partitions))
            node.restored = False
        first += self._followed(None, self.map)
        # durable before anything is served, as a node's start is
        ops, _ = self.registers.apply(node.wall_us(), [(self.map.epoch, ("o", first))])
        full, store.full = store.full, False
        store.batch(ops)
        store.sync()
        store.full = full
        self.registers.settle()
        for key, value in store.scan(b"r") + store.scan(b"h"):  # what outlived the crash
            self.writer.kept(key, value)
        for row in world.oracle.rows:  # what did not
            if store.get(row) is None:
                world.oracle.dropped(row, self.number, self.map.epoch)

    # -------------------------------------------------------------------------------- the basics

    def get_map(self) -> ClusterMap:
        """The map of this process."""
        return self.map

    def die(self) -> None:
        """Nothing that was under way goes on."""
        self.alive = False
        for token in self.tokens:
            self.world.orphaned(token)

    def is_up(self, number: int) -> bool:
        """What failed to answer lately counts as down."""
        return self.suspects.get(number, -1.0) < self.world.scheduler.now

    def adopt(self, cluster_map: ClusterMap) -> None:
        """Learn a newer map: durable first, then used."""
        old = self.map
        if cluster_map.epoch <= old.epoch:
            return
        self.node.saved_map = self.map = cluster_map
        self.registers.follow(cluster_map)
        marks = self._followed(old, cluster_map)
        if marks:
            self.enqueue(("o", marks), lambda _: None)
        self.do(self.coordinator.on_map(self.world.scheduler.now, cluster_map))

    def _followed(self, old: ClusterMap | None, new: ClusterMap) -> list[Op]:
        """A partition that comes back to a node with old rows is pulled before it is shown."""
        return self.pull_first.follow(old, new, self.number, self._holds)

    def _holds(self, partition: int) -> bool:
        return bool(self.digests.total(REGISTERS, partition))

    # ------------------------------------------------------------------------------------ requests

    def local(self, epoch: int, request: Any, callback: Callback, write: bytes = b"") -> None:
        """A request for this node's replica: a read at once if it can be, all else in line."""
        if request[0] == "g":
            try:
                found = self.registers.read(epoch, request[1])
            except DfsError as e:
                callback(e)
                return
            if found is not None:
                callback(found)
                return
        self.enqueue(request, callback, epoch, write)

    # ------------------------------------------------------------------------------- coordinating

    def begin(self, operation: Any, token: Any) -> None:
        """A client asks."""
        token = (*token, self.world.next_call())  # what the network doubles is a resend
        now = self.world.scheduler.now
        self.asked.setdefault(operation.options.get("request", b""), now)
        self.coordinator.wall_us = self.node.wall_us()
        deadline = now + operation.patience
        try:
            options = Options(operation.options)
            self.tokens[token] = deadline
            if operation.write is None:
                out = self.coordinator.start_get(now, token, operation.row, options, deadline)
            else:
                out = self.coordinator.start_put(
                    now,
                    token,
                    operation.row,
                    operation.context,
                    operation.write.value,
                    options,
                    deadline,
                )
        except DfsError as e:
            self.tokens.pop(token, None)
            self.world.answer(self, token, e)
            return
        self.do(out)

    def do(self, effects: Sequence[Any]) -> None:
        """Carry out what the coordinator wants."""
        for effect in effects:
            if effect[0] == SEND:
                _, node, epoch, request, ticket = effect
                self.outgoing.setdefault(node, []).append((epoch, request, ticket))
                if not self.flushing:
                    self.flushing = True
                    self.outgoing_since = self.world.scheduler.now
                    self.world.scheduler.after(0.0, self._flush)
            elif effect[0] == DONE:
                _, token, result = effect
                deadline = self.tokens.pop(token)
                self.world.done(self, token, result, deadline)
            elif effect[0] == OFFER:
                self.adopt(self.world.map_of(effect[1]))
        due = self.coordinator.next_tick()
        if due < self.tick_at:
            self.tick_at = due
            self.world.scheduler.after(max(0.0, due - self.world.scheduler.now), self._tick)

    def _tick(self) -> None:
        if not self.alive:
            return
        if self.world.network.stopped(self.number):
            self.world.when_continued(self.number, self._tick)
            return
        now = self.world.scheduler.now
        if now + 1e-9 < self.tick_at:
            return
        self.tick_at = inf
        self.coordinator.wall_us = self.node.wall_us()
        self.do(self.coordinator.tick(now + 1e-9))

    def _flush(self) -> None:
        self.flushing = False
        if not self.alive:
            return
        outgoing, self.outgoing = self.outgoing, {}
        tardy = self.world.scheduler.now > self.outgoing_since + BACKGROUND
        for node, requests in outgoing.items():
            if node == self.number:
                for epoch, request, ticket in requests:
                    write = ticket[0].options.request
                    self.local(epoch, request, partial(self._replied, ticket), write)
                continue
            if tardy:  # this node was stopped so long that its connections are gone
                for _, _, ticket in requests:
                    self._replied(ticket, Unreachable("the connection was closed meanwhile"))
                continue
            by_epoch: dict[int, list[tuple[Any, Any]]] = {}
            for epoch, request, ticket in requests:
                self.world.leaving(request)
                by_epoch.setdefault(epoch, []).append((request, ticket))
            for epoch, group in by_epoch.items():
                self._send_batch(node, epoch, group)

    def _send_batch(self, node: int, epoch: int, group: list[tuple[Any, Any]]) -> None:
        began = self.world.scheduler.now

        def replied(reply: Any) -> None:
            if isinstance(reply, DfsError):
                for _, ticket in group:
                    self._replied(ticket, reply)
                return
            self.coordinator.observe(node, self.world.scheduler.now - began)
            for (_, ticket), one in zip(group, reply, strict=True):
                self._replied(ticket, one)

        self.call(node, epoch, "reg.batch", tuple(r for r, _ in group), replied, ATTEMPT)

    def _replied(self, ticket: Any, reply: Any) -> None:
        if self.alive:
            self.do(self.coordinator.on_reply(self.world.scheduler.now, ticket, reply))

    # ------------------------------------------------------------------------------------- calls

    def call(
        self, node: int, epoch: int, method: str, args: Any, callback: Callback, timeout: float
    ) -> None:
        """Ask another node; `callback` gets its answer or an error, once."""
        world = self.world
        number = world.next_call()
        self.calls[number] = callback
        message = ("?", number, epoch, method, args, world.scheduler.now)
        world.network.send(self.number, node, message)
        if method in LATE and world.theme.late and not world.calm and world.random.random() < 0.4:
            delay = world.random.choice((0.02, 2.0, 3.5, 5.0, 30.0, 60.0)) * HOUR
            world.scheduler.after(delay, lambda: world.deliver(self.number, node, message))
        world.scheduler.after(timeout, lambda: self._timeout(number, node))

    def _timeout(self, number: int, node: int) -> None:
        if not self.alive or number not in self.calls:
            return
        if self.world.network.stopped(self.number):
            self.world.when_continued(self.number, lambda: self._timeout(number, node))
            return
        self.suspects[node] = self.world.scheduler.now + SUSPECTED
        self.calls.pop(number)(DeadlineExceeded("no answer in time"))

    def receive(self, source: int, message: Any) -> None:
        """A message arrives."""
        if message[0] == "!":
            callback = self.calls.pop(message[1], None)
            if callback is not None:
                if isinstance(message[2], Unreachable):
                    self.suspects[source] = self.world.scheduler.now + SUSPECTED
                else:
                    self.suspects.pop(source, None)
                callback(message[2])
            return
        _, number, epoch, method, args, sent = message
        if method not in LATE and self.world.scheduler.now > sent + BACKGROUND:
            return  # connections do not live so long without a sign of life
        if epoch > self.map.epoch:
            if self.world.random.random() < 0.1 and not self.world.calm:
                self._reply(source, number, Busy("the newer map cannot be had"))
                return
            self.adopt(self.world.chain.at(epoch))
        if method == "reg.batch":
            self._batch(source, number, epoch, args)
        else:
            self._protocol(source, number, epoch, method, args)

    def _batch(self, source: int, number: int, epoch: int, requests: Sequence[Any]) -> None:
        replies: list[Any] = [None] * len(requests)
        left = len(requests)

        def one(i: int, reply: Any) -> None:
            nonlocal left
            replies[i] = reply
            left -= 1
            if not left:
                self._reply(source, number, tuple(replies))

        for i, request in enumerate(requests):
            self.local(epoch, request, partial(one, i))

    def _protocol(self, source: int, number: int, epoch: int, method: str, args: Any) -> None:
        now = self.node.wall_us()
        try:
            if method.startswith("sync."):
                todo: Any = self.anti.handle(method, source, epoch, args, now)
            elif method == "hints.deliver":
                todo = self.hints.handle(source, epoch, args[0], now)
            else:
                todo = self.tombstones.handle(method, source, epoch, args)
        except DfsError as e:
            self._reply(source, number, e)
            return
        self.run(todo, lambda result: self._reply(source, number, result))

    def _reply(self, source: int, number: int, reply: Any) -> None:
        if self.alive:
            self.world.leaving(("reply", reply))
            self.world.network.send(self.number, source, ("!", number, reply))

    # -------------------------------------------------------------------------------- generators

    def run(self, todo: Any, callback: Callback) -> None:
        """Drive a protocol; `callback` gets its result, or the error it ended with."""

        def go_on(result: Any) -> None:
            if not self.alive:
                return
            if self.world.network.stopped(self.number):
                self.world.when_continued(self.number, lambda: go_on(result))
                return
            try:
                effect = todo.throw(result) if isinstance(result, DfsError) else todo.send(result)
            except StopIteration as e:
                callback(e.value)
                return
            except DfsError as e:
                callback(e)
                return
            self._perform(effect, go_on)

        go_on(None)

    def _perform(self, effect: Any, go_on: Callback) -> None:
        if isinstance(effect, steps.Call):
            if effect.node == self.number:
                raise AssertionError(f"a protocol calls its own node: {effect!r}")
            self.world.leaving(("call", effect.args))
            self.call(effect.node, effect.epoch, effect.method, effect.args, go_on, BACKGROUND)
        elif isinstance(effect, steps.Merge):
            self._merge(effect, go_on)
        elif isinstance(effect, steps.Purge):
            self._purge(effect, go_on)
        elif isinstance(effect, steps.Settle):
            requests = [(registers.SETTLE, *item) for item in effect.items]
            self._all(requests, go_on, go_on)
        elif isinstance(effect, steps.Write):
            self.enqueue(("o", tuple(effect.ops)), go_on)
        elif isinstance(effect, steps.Correct):
            table, partition, errors = effect.table, effect.partition, effect.errors
            self.enqueue(("o", lambda: self.digests.correct(table, partition, errors or {})), go_on)
        elif isinstance(effect, steps.Rest):
            self.world.scheduler.after(0.001, lambda: go_on(None))
        else:
            raise TypeError(f"no such effect: {effect!r}")

    def _all(self, requests: Sequence[Any], go_on: Callback, conclude: Callback) -> None:
        """Enqueue requests together; `conclude` takes the replies, `go_on` the first error."""
        left = len(requests)
        replies: list[Any] = [None] * left

        def one(i: int, reply: Any) -> None:
            nonlocal left
            replies[i] = reply
            left -= 1
            if not left:
                errors = [r for r in replies if isinstance(r, DfsError)]
                go_on(errors[0]) if errors else conclude(replies)

        for i, request in enumerate(requests):
            self.enqueue(request, partial(one, i))

    def _merge(self, effect: steps.Merge, go_on: Callback) -> None:
        if effect.table != REGISTERS or not effect.items:
            self.enqueue(("o", ()), go_on)
            return
        before = [self.node.store.get(row) for row, _ in effect.items]

        def conclude(_: Any) -> None:
            after = [self.node.store.get(row) for row, _ in effect.items]
            go_on(sum(a != b for a, b in zip(before, after, strict=True)))

        self._all([("m", row, data) for row, data in effect.items], go_on, conclude)

    def _purge(self, effect: steps.Purge, go_on: Callback) -> None:
        held = {row: self.node.store.get(row) for row, _ in effect.items}

        def conclude(replies: Any) -> None:
            gone = []
            for (row, _), reply in zip(effect.items, replies, strict=True):
                if reply and held[row] is not None and not effect.ghosts:
                    self.world.purged += 1
                gone.append(bool(reply) or held[row] is None)
            go_on(tuple(gone))

        kind = registers.DISCARD if effect.ghosts else registers.PURGE
        self._all([(kind, row, digest) for row, digest in effect.items], go_on, conclude)
