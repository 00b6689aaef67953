"""The coordinator of gets and puts: a state machine without I/O, clocks or tasks.

Every method that takes `now` (monotonic seconds) returns the effects to carry out:

    (SEND, node, epoch, request, ticket)   one request of `metadata.registers` for a node's replica,
                                           the own node included; its answer goes to `on_reply`
    (DONE, token, result or DfsError)      the caller's answer; comes once for each token
    (OFFER, map bytes)                     somebody has this map: give it to the map keeper, and if
                                           it is newer, call `on_map` with it

The driver calls `tick` when `next_tick` is reached, keeps `wall_us` at the wall clock (in
microseconds; a few seconds old is fine), tells with `observe` how long nodes take to answer, and
gives up on a request after `ATTEMPT` seconds by answering it with an error.  A request for the own
node (MINT among them) goes to its `Registers`; its answer comes when it is durable.

A resent put (`Options.request`) is the same write: while it is under way its answer goes to both,
afterwards it is repeated from memory, and after a failure the identical register is sent again.
"""

from collections import deque
from collections.abc import Callable, Iterable
from math import inf
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap, Row
from dfs.errors import Busy, DfsError, InvalidArgument, NotHome
from metadata import versions
from metadata.operation import MINTING, OVER, Operation, Ticket
from metadata.quorum import Options, Plan
from metadata.registers import Request, partition_of_row

SEND, DONE, OFFER = range(3)
Effect = tuple[Any, ...]

ATTEMPT = 2.0  # seconds after which the driver gives up on one request
TICK = 0.01  # seconds: how exact times are
HEDGE = (0.01, 0.5)  # seconds: bounds of the patience with a node
_LOOK = 0.5  # seconds until an operation that waits for the own replica is looked at
_ORDER_AGE = 0.5  # seconds that an order of nodes is kept
MEMORY_AGE = 600.0  # seconds a put is remembered
MEMORY_COUNT = 100_000
MEMORY_BYTES = 32 << 20  # registers of failed puts


class _Memory:
    """What is remembered of a put with a request id: its operation, then its result or register."""

    __slots__ = ("expires", "operation", "register", "reply", "row")

    def __init__(self, row: bytes, operation: Operation, expires: float) -> None:
        self.row = row
        self.operation: Operation | None = operation
        self.expires = expires
        self.register = b""
        self.reply: Any = None


class Coordinator:
    """Coordinates on node `number`; `is_up` is its view of who is alive."""

    operation_class = Operation

    def __init__(
        self,
        number: int,
        cluster_map: ClusterMap,
        *,
        is_up: Callable[[int], bool] = lambda number: True,
    ) -> None:
        """Start with nothing under way."""
        self.number = number
        self.map = cluster_map
        self.is_up = is_up
        self.wall_us = 0
        self.latency: dict[int, float] = {}  # usual seconds until a node answers
        self._out: list[Effect] = []
        self._operations: dict[Operation, None] = {}
        self._plans: dict[tuple[int, Any], Plan] = {}
        self._wheel: dict[int, list[Operation]] = {}
        self._orders: dict[Row, tuple[int, ...]] = {}
        self._orders_until = 0.0
        self._zones = {node.number: node.zone for node in cluster_map.nodes}
        self._memory: dict[bytes, _Memory] = {}
        self._memory_order: deque[tuple[float, bytes]] = deque()
        self._memory_bytes = 0
        self.gets = self.puts = self.repairs = self.hedges = self.replans = self.failures = 0

    # ---------------------------------------------------------------------------------- stimuli

    def start_get(
        self, now: float, token: Any, row: bytes, options: Options, deadline: float
    ) -> list[Effect]:
        """Read a register: DONE has (values, context, info).

        Raises `NotHome` (details: who is) when this node must not coordinate, `InvalidArgument`.
        """
        partition = partition_of_row(row)
        plan = self._plan_for(partition, options)
        self.gets += 1
        operation = self._begin(now, token, row, partition, plan, options, deadline)
        operation.read(now)
        return self._effects()

    def start_put(
        self,
        now: float,
        token: Any,
        row: bytes,
        context: bytes | None,
        value: bytes | None,
        options: Options,
        deadline: float,
    ) -> list[Effect]:
        """Write a register: DONE has (context, siblings, info); see `metadata/KV.md`.

        Raises as `start_get` does.
        """
        partition = partition_of_row(row)
        request = options.request
        known = self._memory.get(request) if request else None
        if known is not None:
            if known.row != row:
                raise InvalidArgument("the request id was used for another key")
            if known.operation is not None:
                if known.operation.done and known.operation.phase == MINTING:
                    raise Busy("the first attempt of this put is still being written: try again")
                known.operation.tokens.append(token)
                return []
            if known.reply is not None:
                return [(DONE, token, known.reply)]
        plan = self._plan_for(partition, options)
        self.puts += 1
        operation = self._begin(now, token, row, partition, plan, options, deadline)
        operation.mints = True
        operation.value = value
        operation.context = context
        if known is not None:
            known.operation = operation
            if known.register:
                self._resume(now, operation, known.register)
                return self._effects()
        elif request:
            self._remember(now, request, row, operation)
        if context is None:
            operation.read(now)
        else:
            operation.mint()
            self.wake(operation, min(deadline, now + _LOOK))
        return self._effects()

    def on_reply(self, now: float, ticket: Ticket, answer: Any) -> list[Effect]:
        """The answer to a request, or the `DfsError` that came instead."""
        operation = ticket[0]
        operation.on_reply(now, ticket, answer)
        if operation.phase == OVER:
            self._close(operation)
        return self._effects()

    def on_map(self, now: float, cluster_map: ClusterMap) -> list[Effect]:
        """A newer map: what it changes is planned again."""
        if cluster_map.epoch <= self.map.epoch:
            return []
        self.map = cluster_map
        self._zones = {node.number: node.zone for node in cluster_map.nodes}
        self._plans.clear()
        self._orders.clear()
        for operation in list(self._operations):
            if self.changed_since(operation):
                operation.replan(now)
                if operation.phase == OVER:
                    self._close(operation)
        return self._effects()

    def next_tick(self) -> float:
        """When `tick` is due; `inf` when nothing is under way."""
        return min(self._wheel) * TICK if self._wheel else inf

    def tick(self, now: float) -> list[Effect]:
        """Deadlines, retries and hedges that are due."""
        wheel, operations = self._wheel, self._operations
        slot = int(now / TICK)
        for due in sorted(s for s in wheel if s <= slot):
            for operation in wheel.pop(due):
                if operation.phase != OVER:
                    operation.tick(now)
                # most are over, and closed, long before their time comes
                if operation.phase == OVER and operation in operations:
                    self._close(operation)
        self._forget(now)
        return self._effects()

    def observe(self, node: int, seconds: float) -> None:
        """A node took this long to answer; the estimate moves towards the median."""
        usual = self.latency.get(node)
        if usual is None:
            self.latency[node] = seconds
        else:
            self.latency[node] = usual * (1.05 if seconds > usual else 0.95)

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and what is under way."""
        return {
            "gets": self.gets,
            "puts": self.puts,
            "repairs": self.repairs,
            "hedges": self.hedges,
            "replans": self.replans,
            "failures": self.failures,
            "under_way": len(self._operations),
            "remembered": len(self._memory),
        }

    # ---------------------------------------------------------------------- for the operations

    def send(self, node: int, epoch: int, request: Request, ticket: Ticket) -> None:
        """Emit SEND."""
        self._out.append((SEND, node, epoch, request, ticket))

    def offer(self, data: bytes) -> None:
        """Emit OFFER."""
        self._out.append((OFFER, data))

    def finish(self, operation: Operation, result: Any) -> None:
        """Emit DONE for everybody who waits for the operation."""
        for token in operation.tokens:
            self._out.append((DONE, token, result))
        operation.tokens = []
        request = operation.options.request
        if request and operation.mints:
            self._conclude(request, operation, result)

    def plan(self, partition: int, options: Options) -> Plan:
        """The plan by the current map; raises `InvalidArgument`."""
        key = (partition, options.key)
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) > 20_000:
                self._plans.clear()
            found = self._plans[key] = Plan(self.map, self.number, partition, options)
        return found

    def order(self, members: Row) -> tuple[int, ...]:
        """Nodes in the order in which to ask them: self, alive, same zone, quickest."""
        found = self._orders.get(members)
        if found is None:
            zones, me, latency, is_up = self._zones, self.number, self.latency, self.is_up
            zone = zones.get(me)
            found = self._orders[members] = tuple(
                sorted(
                    members,
                    key=lambda n: (
                        n != me,
                        not is_up(n),
                        zones.get(n) != zone,
                        latency.get(n, 0.0),
                    ),
                )
            )
        return found

    def patience(self, nodes: Iterable[int]) -> float:
        """Seconds after which these nodes are slow: twice what the slowest usually takes."""
        latency = self.latency
        usual = 0.0
        for node in nodes:
            took = latency.get(node, HEDGE[1])
            if node != self.number and took > usual:
                usual = took
        low, high = HEDGE
        return min(max(2 * usual, low), high)

    def changed_since(self, operation: Operation) -> bool:
        """Whether the homes of the operation's partition changed after it was planned."""
        return self.map.last_change(METADATA, operation.partition) > operation.plan.epoch

    def wake(self, operation: Operation, when: float) -> None:
        """Call the operation's `tick` at a time."""
        slot = int(when / TICK) + 1
        waiting = self._wheel.get(slot)
        if waiting is None:
            self._wheel[slot] = [operation]
        else:
            waiting.append(operation)

    def minted(self, now: float, operation: Operation) -> None:
        """The operation has its register now: a resend must send the same."""
        known = self._memory.get(operation.options.request)
        if known is not None:
            known.register = operation.register
            self._memory_bytes += len(operation.register)
            if operation.done:
                known.operation = None

    def unminted(self, operation: Operation) -> None:
        """The mint of an operation, answered before, failed: the next attempt is the first."""
        self._memory.pop(operation.options.request, None)

    # ------------------------------------------------------------------------------------ inside

    def _plan_for(self, partition: int, options: Options) -> Plan:
        plan = self.plan(partition, options)
        if self.number not in plan.readers:
            raise NotHome(f"node {self.number} is no home of partition {partition}", *plan.readers)
        return plan

    def _begin(
        self,
        now: float,
        token: Any,
        row: bytes,
        partition: int,
        plan: Plan,
        options: Options,
        deadline: float,
    ) -> Operation:
        if now >= self._orders_until:
            self._orders_until = now + _ORDER_AGE
            self._orders.clear()
        operation = self.operation_class(self, token, row, partition, plan, options, deadline)
        self._operations[operation] = None
        return operation

    def _close(self, operation: Operation) -> None:
        """Forget an operation; timers may still hold it for a while, but not what it carried."""
        self._operations.pop(operation, None)
        operation.value = None
        operation.register = b""
        operation.answers = {}

    def _effects(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    def _resume(self, now: float, operation: Operation, register: bytes) -> None:
        decoded = versions.decode(register)
        context = versions.encode_context(decoded[0])
        operation.register = register
        operation.reply = (context, len(decoded[1]), {"coordinator": self.number})
        operation.write(now)

    # ------------------------------------------------------------------------------------ memory

    def _remember(self, now: float, request: bytes, row: bytes, operation: Operation) -> None:
        self._memory[request] = _Memory(row, operation, now + MEMORY_AGE)
        self._memory_order.append((now + MEMORY_AGE, request))

    def _conclude(self, request: bytes, operation: Operation, result: Any) -> None:
        known = self._memory.get(request)
        if known is None or known.operation is not operation:
            return
        if operation.phase == MINTING and operation.waiting:
            return  # it happens yet, or not: until then a resend must not be a second write
        known.operation = None
        if isinstance(result, DfsError):
            if not known.register:  # nothing was minted: the next attempt is the first
                del self._memory[request]
        else:
            known.reply = result
            self._memory_bytes -= len(known.register)
            known.register = b""

    def _forget(self, now: float) -> None:
        order, memory = self._memory_order, self._memory
        while order and (
            order[0][0] <= now or len(memory) > MEMORY_COUNT or self._memory_bytes > MEMORY_BYTES
        ):
            _, request = order.popleft()
            known = memory.pop(request, None)
            if known is not None:
                self._memory_bytes -= len(known.register)
