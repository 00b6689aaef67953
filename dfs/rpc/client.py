"""The calling side: one `Link` per peer and class of traffic, and the requests that wait on it.

A link connects when the first request needs it and stays.  Requests wait in `_held` until the
connection is open and the send queue has room; what waits there is dropped at its deadline, so a
peer that stopped reading costs its callers' timeouts and no memory.  When connecting fails or the
connection breaks, everything that waits fails with `Unreachable` at once; while the back-off runs
new requests fail with the reason of the last failure.
"""

import logging
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import trio
from outcome import Error, Value
from trio.lowlevel import Task, reschedule

from dfs.env import Buffer, Buffers, Priority
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    InvalidArgument,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    Unreachable,
    WrongCluster,
    WrongVersion,
)
from dfs.rpc.breaker import BRIEF, CLOSED, Breaker
from dfs.rpc.timers import Timer, Timers
from dfs.rpc.transport import Channel, connect, explain, unacknowledged
from dfs.wire.connection import Connection, Event, State
from dfs.wire.frame import CAST, ERROR, REPLY, REQUEST

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 3.0  # seconds for connecting and greeting
QUEUE_LIMIT = 64 << 20  # bytes in the send queue before requests are held back
HELD_LIMIT = 256 << 20  # bytes held back before requests are refused with `Busy`
STUCK = 1.0  # seconds without an acknowledged byte below which a lossy network is given time
_JIFFIES = 0.01  # seconds, how coarse the kernel tells that
_BACKOFF = (0.05, 1.0)  # seconds: first and longest pause after a failed connect

OnReply = Callable[[tuple[Any, Buffer] | DfsError], None]


class Pending:
    """A request that waits for its answer, or a cast that waits to be sent.

    Exactly one of `task` and `on_reply` is set for a request, none for a cast.
    """

    __slots__ = (
        "cast",
        "data",
        "deadline",
        "epoch",
        "link",
        "meta",
        "method",
        "on_reply",
        "priority",
        "size",
        "stream",
        "task",
        "timeout",
        "timer",
    )  # fmt: skip

    def __init__(
        self, method: str, meta: bytes, data: Buffers, size: int, timeout: float, priority: int,
        epoch: int, *, cast: bool = False,
    ) -> None:  # fmt: skip
        """Describe the request; `Link.submit` sends it."""
        self.cast = cast
        self.method = method
        self.meta = meta
        self.data = data
        self.size = size
        self.timeout = timeout
        self.priority = priority
        self.epoch = epoch
        self.deadline = 0.0
        self.stream = 0  # 0 = not sent
        self.timer: Timer | None = None  # None = answered
        self.task: Task | None = None
        self.on_reply: OnReply | None = None
        self.link: Link | None = None

    def finish(self, answer: tuple[Any, Buffer] | DfsError) -> None:
        """Hand the answer to whoever waits."""
        self.timer = None
        self.data = self.meta = b""
        task = self.task
        if task is not None:
            self.task = None
            reschedule(task, Error(answer) if isinstance(answer, DfsError) else Value(answer))
        elif self.on_reply is not None:
            on_reply, self.on_reply = self.on_reply, None
            try:
                on_reply(answer)
            except Exception:  # one bad callback must not break the connection of the others
                log.exception("the callback of %s failed", self.method)


FEW = 3  # requests under way up to which each is sent at once instead of with others


class Link:
    """A connection to one peer for one class of traffic, made when needed."""

    def __init__(
        self,
        address: str,
        *,
        bulk: bool,
        greet: Callable[[], Connection],
        timers: Timers,
        nursery: trio.Nursery,
        random: Random,
        counts: dict[str, int],
        breaker: Breaker,
    ) -> None:
        """Not connected; `greet` makes the client side of a new connection."""
        self.address = address
        self.bulk = bulk
        self._greet = greet
        self._timers = timers
        self._nursery = nursery
        self._random = random
        self._counts = counts
        self._breaker = breaker
        self._answers = 0
        self._seconds = 0.0  # from request to answer, summed up
        self._channel: Channel | None = None  # open and greeted
        self._running = False
        self._streams: dict[int, Pending] = {}
        self._held: deque[Pending] = deque()
        self._held_bytes = 0
        self._stream = 0
        self._failures = 0
        self._retry_at = 0.0
        self._why: DfsError = Unreachable(f"{address} was not tried")

    def statistics(self) -> dict[str, Any]:
        """State of the link, for status pages."""
        channel = self._channel
        return {
            "address": self.address,
            "bulk": self.bulk,
            "connected": channel is not None,
            "in_flight": len(self._streams),
            "held": len(self._held),
            "queued_bytes": channel.connection.queue.size if channel else 0,
            "failures": self._failures,
            "breaker": self._breaker.state,
            "answers": self._answers,
            "seconds": self._seconds,
        }

    # -------------------------------------------------------------------------------- requests

    def submit(self, pending: Pending) -> None:
        """Send, or hold back, or fail from the timer task; raises `LocalProtocolError` only."""
        now = trio.current_time()
        pending.link = self
        pending.deadline = deadline = now + pending.timeout
        channel = self._channel
        wanted = not pending.cast
        breaker = self._breaker
        if (
            breaker.state is not CLOSED
            and pending.priority != Priority.HIGH
            and (why := breaker.refuse(now))
        ):
            if wanted:
                refused = Unreachable(f"{self.address} is left alone: {why}")
                pending.timer = self._timers.at(now, self._fail, pending, refused)
            return
        if channel is not None and not self._held and channel.connection.queue.size < QUEUE_LIMIT:
            self._send(channel, pending, now)
            if len(self._streams) <= FEW:
                channel.flush()
            else:
                channel.wake()
            if wanted:
                pending.timer = self._timers.at(deadline, self._expire, pending)
            return
        if not self._running and now < self._retry_at:
            if wanted:
                pending.timer = self._timers.at(now, self._fail, pending, self._reason())
            return
        if self._held_bytes + pending.size > HELD_LIMIT:
            if wanted:
                busy = Busy(f"{self.address} is slow: {self._held_bytes} bytes wait for it already")
                pending.timer = self._timers.at(now, self._fail, pending, busy)
            return
        if wanted:
            pending.timer = self._timers.at(deadline, self._expire, pending)
        self._held.append(pending)
        self._held_bytes += pending.size
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run)

    def _send(self, channel: Channel, pending: Pending, now: float) -> None:
        milliseconds = min(max(int((pending.deadline - now) * 1000), 1), 0xFFFFFFFF)
        if pending.cast:
            channel.connection.send(
                CAST, 0, pending.meta, pending.data,
                priority=pending.priority, epoch=pending.epoch, deadline=milliseconds,
            )  # fmt: skip
            return
        stream = self._stream + 1
        channel.connection.send(
            REQUEST, stream, pending.meta, pending.data,
            priority=pending.priority, epoch=pending.epoch, deadline=milliseconds,
        )  # fmt: skip
        self._stream = pending.stream = stream
        self._streams[stream] = pending

    def _promote(self) -> None:
        """Send what was held back, as far as there is room."""
        channel = self._channel
        if channel is None:
            return
        held, queue = self._held, channel.connection.queue
        now = trio.current_time()
        while held and queue.size < QUEUE_LIMIT:
            pending = held.popleft()
            self._held_bytes -= pending.size
            pending.size = 0
            if pending.deadline > now and (pending.cast or pending.timer is not None):
                try:
                    self._send(channel, pending, now)
                except LocalProtocolError as e:
                    self._fail(pending, e)
        channel.wake()

    def _expire(self, pending: Pending) -> None:
        state = (
            "" if pending.stream else "; it was not even sent: still connecting, or a full queue"
        )
        self.forget(pending)
        if pending.timeout >= BRIEF:
            self._breaker.failed(trio.current_time())
        if pending.stream and self._channel is not None:
            self._give_up_what_is_stuck(pending.deadline - pending.timeout, self._channel)
        pending.finish(
            DeadlineExceeded(
                f"{pending.method} to {self.address}: no answer within {pending.timeout:g} s{state}"
            )
        )

    def _give_up_what_is_stuck(self, since: float, channel: Channel) -> None:
        """End the connection if the peer's host acknowledged nothing after the time `since`.

        Else the kernel would deliver a request when the network heals, long after the caller was
        told that it failed: a late put without a context then supersedes what others wrote.
        """
        if channel is not self._channel:
            return
        now = trio.current_time()
        silent = unacknowledged(channel.sock)
        if silent + _JIFFIES < now - since:
            return
        if silent < STUCK:
            again = now + STUCK - silent + _JIFFIES
            self._timers.at(again, self._give_up_what_is_stuck, since, channel)
            return
        log.info("%s acknowledged nothing for %.1f s", self.address, silent)
        channel.abort()

    def _fail(self, pending: Pending, error: DfsError) -> None:
        if pending.timer is not None:
            self.forget(pending)
            pending.finish(error)

    def forget(self, pending: Pending) -> None:
        """Nobody waits for this request any more; a late answer is dropped."""
        if pending.timer is not None:
            self._timers.cancel(pending.timer)
            pending.timer = None
        if pending.stream:
            self._streams.pop(pending.stream, None)
            return
        held = self._held
        self._held_bytes -= pending.size
        pending.size = 0
        pending.data = b""
        while held and held[0].timer is None and not held[0].cast:
            held.popleft()

    def _reason(self) -> DfsError:
        """A fresh copy of the last failure: an exception is raised in one place only."""
        return type(self._why)(str(self._why), *self._why.details)

    # ------------------------------------------------------------------------------ connection

    async def _run(self) -> None:
        """Connect, move bytes until the connection ends, then fail what still waits."""
        why: DfsError = Unreachable(f"{self.address}: this node is shutting down")
        try:
            why = await self._converse()
        finally:
            self._running = False
            self._channel = None
            self._why = why
            self._fail_all()

    async def _converse(self) -> DfsError:
        channel: Channel | None = None
        opened = silent = False
        why: DfsError = Unreachable(f"the connection to {self.address} ended")
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                sock = await connect(self.address, bulk=self.bulk)
                channel = Channel(sock, self._greet())
                await self._handshake(channel)
            opened = True
            self._failures = 0
            self._counts["connects"] += 1
            channel.on_progress = self._progress
            self._channel = channel
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.send_loop)
                self._promote()
                while True:
                    self._handle(await channel.receive())
        except* trio.TooSlowError:
            silent = True
            why = Unreachable(
                f"cannot reach {self.address}: no answer within {CONNECT_TIMEOUT:g} s; check the "
                "host, the network and its firewalls, and whether the node hangs"
            )
        except* EOFError:
            why = Unreachable(f"{self.address} closed the connection; did the node stop?")
        except* OSError as group:
            why = Unreachable(
                f"the connection to {self.address} broke: {explain(first_error(group))}"
            )
        except* DfsError as group:
            why = self._judge(first_error(group))
        finally:
            self._channel = None
            if channel is not None:
                channel.close()
        if not opened:
            low, high = _BACKOFF
            pause = min(high, low * 2.0**self._failures) * self._random.uniform(0.5, 1.0)
            self._failures += 1
            self._retry_at = trio.current_time() + pause
            self._counts["failures"] += 1
        if opened or silent:  # a refused connection costs nobody anything; the back-off is enough
            self._breaker.failed(trio.current_time())
        log.debug("%s: %s", self.address, why)
        return why

    def _judge(self, error: DfsError) -> DfsError:
        if isinstance(error, WrongCluster | WrongVersion | Unreachable | InvalidArgument):
            return error
        if isinstance(error, ProtocolError):
            log.warning("closed the connection to %s: %s", self.address, error)
            return Unreachable(f"closed the connection to {self.address}: {error}")
        return Unreachable(f"{self.address} ended the connection: {error}")

    async def _handshake(self, channel: Channel) -> None:
        channel.flush()  # HELLO always fits into an empty socket buffer
        while channel.connection.state is State.GREETING:
            await channel.receive()

    def _progress(self) -> None:
        if self._held:
            self._promote()

    def _handle(self, events: list[Event]) -> None:
        streams, cancel = self._streams, self._timers.cancel
        breaker = self._breaker
        now = trio.current_time()
        for kind, stream, _, _, _, value, data in events:
            pending = streams.pop(stream, None)
            if pending is None or pending.timer is None:
                self._counts["late"] += 1
                continue
            cancel(pending.timer)
            breaker.answers += 1
            self._answers += 1
            self._seconds += now - pending.deadline + pending.timeout
            if breaker.state is not CLOSED:
                breaker.answered(now, urgent=pending.priority == Priority.HIGH)
            if kind == REPLY:
                pending.finish((value, data))
            elif kind == ERROR:
                pending.finish(value)
            else:
                raise RemoteProtocolError(f"unexpected frame of kind {kind}")

    def _fail_all(self) -> None:
        streams, held = self._streams, self._held
        self._streams, self._held, self._held_bytes = {}, deque(), 0
        for pending in streams.values():
            text = f"{pending.method}: {self._why} (the outcome of the request is unknown)"
            self._fail(pending, Unreachable(text))
        for pending in held:
            self._fail(pending, self._reason())


def first_error(group: BaseExceptionGroup[Any]) -> Any:
    """A leaf of an exception group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
