"""The one writer of a node's registers: takes what waits, applies it, makes it durable, answers.

Requests come from peers (a `reg.batch` at a time), from this node's coordinator and from background
protocols.  One task works them off in passes: all that is waiting becomes one store batch and one
sync, so under load a sync is shared by whatever arrived during the one before.  Where the disk is
quick that is little, and what a pass costs by itself (the sync, its frames and the wake-ups of
every process they go to, half a millisecond of processor time in all) is shared by few.  So after
a pass of several requests, unless as many wait already, the next begins `GATHER` later; a lone
writer never waits.  (PostgreSQL's `commit_delay` and `commit_siblings`.)

A pass is *admitted* under the map that it was judged by (`MapKeeper.fenced`), which is what a
rebalancer waits for before it reads what it pushes: nothing that an older map allowed comes later.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from dfs.clock import Clock
from dfs.errors import DfsError
from dfs.rpc.mapkeeper import MapKeeper
from metadata.registers import GET, Registers, Reply, Request
from metadata.store.engine import Store

log = logging.getLogger(__name__)

PASS_REQUESTS = 1024
PASS_BYTES = 8 << 20
SIBLINGS = 8  # requests of a pass that make it likely that more are on their way
GATHER = 0.002  # seconds from the end of such a pass to the next

OnReplies = Callable[[list[Reply]], None]


def _nothing(_replies: list[Reply]) -> None:
    """For requests nobody waits for."""


class Replica:
    """Serves `registers` out of `store`; nothing is written before `run`."""

    def __init__(
        self, registers: Registers, store: Store, clock: Clock, keeper: MapKeeper | None = None
    ) -> None:
        """`keeper` is told which passes run by which map."""
        self.registers = registers
        self._store = store
        self._clock = clock
        self._keeper = keeper
        self._waiting: list[tuple[int, Sequence[Request], OnReplies]] = []
        self._writer: Task | None = None  # parked: nothing waits
        self._crowd = 0  # requests of the last pass, 0 if they were few
        self._ended = 0.0  # when that was; monotonic seconds
        self.passes = 0
        self.requests = 0

    def submit(self, epoch: int, requests: Sequence[Request], on_replies: OnReplies) -> None:
        """Queue requests made with the map of `epoch`; `on_replies` is called from the writer.

        It gets a reply, or a `DfsError`, for each of them, once they are durable.
        """
        self._waiting.append((epoch, requests, on_replies))
        writer = self._writer
        if writer is not None:
            self._writer = None
            reschedule(writer)

    async def write(self, requests: Sequence[Request]) -> list[Reply]:
        """Carry out requests of this node by its own newest map; returns when they are durable.

        The replies, in order; a refused request's is its `DfsError`.  With no requests: returns
        when everything submitted before is durable.
        """
        done = trio.Event()
        replies: list[Reply] = []

        def finish(found: list[Reply]) -> None:
            replies.extend(found)
            done.set()

        self.submit(self.registers.map.epoch, requests, finish)
        await done.wait()
        return replies

    async def run(self) -> None:
        """Work until cancelled; raises `StoreFailed` when the store does."""
        while True:
            if not self._waiting:
                self._writer = current_task()
                await wait_task_rescheduled(self._unpark)
            if self._crowd and sum(len(w[1]) for w in self._waiting) < self._crowd:
                pause = self._ended + GATHER - self._clock.monotonic()
                if pause > 0:
                    await trio.sleep(pause)
            await self._pass()

    def _unpark(self, _: object) -> Abort:
        self._writer = None
        return Abort.SUCCEEDED

    def _take(self) -> list[tuple[int, Sequence[Request], OnReplies]]:
        waiting = self._waiting
        if len(waiting) <= 64 and sum(len(w[1]) for w in waiting) <= 64:
            self._waiting = []  # the usual case; 64 requests are 64 MiB at the very worst
            return waiting
        count = size = taken = 0
        for _, requests, _ in waiting:
            if taken and (count >= PASS_REQUESTS or size >= PASS_BYTES):
                break
            taken += 1
            count += len(requests)
            for request in requests:
                for part in request:
                    if part.__class__ is bytes:
                        size += len(part)
        self._waiting = waiting[taken:]
        return waiting[:taken]

    async def _pass(self) -> None:
        taken = self._take()
        registers, keeper = self.registers, self._keeper
        with keeper.admitted() if keeper is not None else nullcontext():
            work = [(epoch, request) for epoch, requests, _ in taken for request in requests]
            ops, replies = registers.apply(self._clock.time_ns() // 1000, work)
            stored = True
            if ops:
                try:
                    await self._store.batch(ops)
                except DfsError as e:
                    registers.abandon(ops)
                    stored = False
                    replies = self._refused(work, e)
                    log.warning("%d requests to registers failed: %s", len(work), e)
                except BaseException:
                    registers.abandon(ops)
                    raise
            registers.settle()
        self._crowd = len(work) if len(work) >= SIBLINGS else 0
        self._ended = self._clock.monotonic()
        self.passes += 1
        self.requests += len(work)
        start = 0
        for _, requests, on_replies in taken:
            end = start + len(requests)
            try:
                on_replies(replies[start:end])
            except Exception:  # one bad callback must not stop the writer of all the others
                log.exception("a callback of the registers failed")
            start = end
        if ops and stored and registers.regained.pending and not self._waiting:
            self.submit(registers.map.epoch, (), _nothing)  # goes on clearing

    def _refused(self, work: Sequence[tuple[int, Request]], error: DfsError) -> list[Reply]:
        """Nothing of a pass was stored: reads are answered from what is there."""
        replies: list[Reply] = []
        for epoch, request in work:
            if request[0] != GET:
                replies.append(type(error)(str(error), *error.details))
                continue
            try:
                replies.append(self.registers.read(epoch, request[1]))
            except DfsError as e:
                replies.append(e)
        return replies

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and what waits."""
        registers = self.registers
        return {
            "passes": self.passes,
            "requests": self.requests,
            "waiting": len(self._waiting),
            "merges": registers.merges,
            "mints": registers.mints,
            "stale": registers.stale,
            "siblings_max": registers.siblings_max,
            "forgotten": registers.actors.forgotten,
        }
