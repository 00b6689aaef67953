"""Requests of the coordinator on their way to other nodes' replicas, a batch per peer and moment.

What is queued during one pass of the loop leaves in one `reg.batch` per peer, reads apart from
writes: the answer to a batch with a write waits for the peer's disk.

Copies under way are charged (`dfs.rpc.budget.InFlight`) until they are answered or given up.  Those
for a peer that has its share wait here; each answer lets the next ones go.  When the peer has been
full for five seconds they are refused with `Busy`, and the coordinator leaves hints instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from dfs.clock import Clock
from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Buffer, Rpc
from dfs.errors import Busy, ConfigError, DfsError, ProtocolError, Unreachable, from_wire
from dfs.rpc.budget import Flight, InFlight
from metadata.coordinator import ATTEMPT
from metadata.operation import Ticket
from metadata.registers import GET, Request

BATCH_REQUESTS = 256
BATCH_BYTES = 4 << 20
ERROR = "!"  # first of the reply to a request that was refused: code, text, details

_Lane = tuple[int, int, bool]  # node, map epoch, whether it is for reads
_Held = tuple[int, list[Request], list[Ticket]]  # map epoch


class Outbox:
    """Sends for node `number`; calls `on_reply(now, ticket, reply or DfsError)` for each request.

    `now` is monotonic, and the same for all replies of a batch.
    """

    def __init__(
        self,
        rpc: Rpc,
        clock: Clock,
        number: int,
        get_map: Callable[[], ClusterMap],
        *,
        on_reply: Callable[[float, Ticket, Any], None],
        observe: Callable[[int, float], None],
        inflight: InFlight | None = None,
    ) -> None:
        """`observe(node, seconds)` is told how long each batch took."""
        self.inflight = inflight or InFlight()
        self._held: dict[int, list[_Held]] = {}  # peer at its limit -> what waits for room
        self.inflight.on_ended(self._release)
        self._rpc = rpc
        self._clock = clock
        self._number = number
        self._get_map = get_map
        self._on_reply = on_reply
        self._observe = observe
        self._lanes: dict[_Lane, tuple[list[Request], list[Ticket]]] = {}
        self._flusher: Task | None = None  # parked: nothing is queued
        self.batches = 0
        self.refused = 0  # requests for peers that were slow
        self.requests = 0

    def put(self, node: int, epoch: int, request: Request, ticket: Ticket) -> None:
        """Queue a request."""
        lane = self._lanes.get((node, epoch, request[0] == GET))
        if lane is None:
            lane = self._lanes[node, epoch, request[0] == GET] = ([], [])
        lane[0].append(request)
        lane[1].append(ticket)
        flusher = self._flusher
        if flusher is not None:
            self._flusher = None
            reschedule(flusher)

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            if not self._lanes:
                self._flusher = current_task()
                await wait_task_rescheduled(self._unpark)
            lanes, self._lanes = self._lanes, {}
            for (node, epoch, _), (requests, tickets) in lanes.items():
                self._send(node, epoch, requests, tickets)

    def _unpark(self, _: object) -> Abort:
        self._flusher = None
        return Abort.SUCCEEDED

    def _send(self, node: int, epoch: int, requests: list[Request], tickets: list[Ticket]) -> None:
        if node in self._held and requests[0][0] != GET:
            self._held[node].append((epoch, requests, tickets))
            self.inflight.has_room(node, BATCH_BYTES, self._clock.monotonic())  # still wanted
            self._refuse_if_slow(node)
            return
        start = 0
        while start < len(requests):
            end = start
            size = 0
            while end < len(requests) and end - start < BATCH_REQUESTS and size < BATCH_BYTES:
                request = requests[end]
                if len(request) > 2:
                    size += len(request[2])
                end += 1
            if size and not self.inflight.has_room(node, size, self._clock.monotonic()):
                held = epoch, requests[start:], tickets[start:]
                self._held.setdefault(node, []).append(held)
                self._refuse_if_slow(node)
                return
            self._send_one(node, epoch, tuple(requests[start:end]), tickets[start:end], size)
            start = end

    def _refuse_if_slow(self, node: int) -> None:
        """Give up what waits for a peer that has been full for long; its answers wake us else."""
        now = self._clock.monotonic()
        if not self.inflight.slow(node, now):
            return
        error = Busy(f"node {node} is slow: too many bytes have waited for it for too long")
        for _, _, tickets in self._held.pop(node):
            self.refused += len(tickets)
            for ticket in tickets:
                self._on_reply(now, ticket, error)

    def _release(self, node: int) -> None:
        """A copy for the peer ended: let go what waits, as far as there is room."""
        if self._held and (held := self._held.pop(node, None)) is not None:
            for epoch, requests, tickets in held:
                self._send(node, epoch, requests, tickets)

    def _send_one(
        self,
        node: int,
        epoch: int,
        requests: tuple[Request, ...],
        tickets: list[Ticket],
        size: int,
    ) -> None:
        sent = self._clock.monotonic()
        flight: Flight | None = None
        if size:
            flight = self.inflight.charge(size)
            flight.send(node)
            flight.close()
        done = partial(self._answered, node, tickets, sent, flight)
        try:
            address = self._get_map().address(METADATA, node)
        except ConfigError:  # removed meanwhile; the operation is planned again by that map
            done(Unreachable(f"node {node} is not in the cluster any more"))
            return
        self.batches += 1
        self.requests += len(requests)
        self._rpc.request(
            address,
            "reg.batch",
            (self._number, requests),
            timeout=ATTEMPT,
            on_reply=done,
            epoch=epoch,
        )

    def _answered(
        self,
        node: int,
        tickets: list[Ticket],
        sent: float,
        flight: Flight | None,
        answer: tuple[Any, Buffer] | DfsError,
    ) -> None:
        if flight is not None:
            flight.ended(node)
        on_reply = self._on_reply
        now = self._clock.monotonic()
        self._observe(node, now - sent)
        if isinstance(answer, DfsError):
            for ticket in tickets:
                on_reply(now, ticket, answer)
            return
        replies = answer[0][0] if answer[0] else ()
        if len(replies) != len(tickets):
            error = ProtocolError(f"node {node} gave {len(replies)} replies to {len(tickets)}")
            replies = [error] * len(tickets)
        for ticket, reply in zip(tickets, replies, strict=True):
            if reply.__class__ is tuple:
                reply = from_wire(*reply[1:])
            on_reply(now, ticket, reply)

    def statistics(self) -> dict[str, int]:
        """Counters since the start."""
        return {
            "batches": self.batches,
            "batched": self.requests,
            "inflight_bytes": self.inflight.used,
            "held_back": sum(len(t) for held in self._held.values() for _, _, t in held),
            "refused_slow": self.refused,
        }
