"""The serving side: accepts connections and answers their requests.

A handler that is a plain function is answered inline, and all answers to one batch of requests
leave in one system call; so do those of `Deferred`s that are answered in one turn; a coroutine runs
in a task of the server, not of the connection, so that work once begun ends even if the caller goes
away.  Whatever is wrong with one connection closes that connection, with a logged reason, and
touches no other.

Limits: bytes of large requests in memory (`budget`), tasks per connection, bytes of answers that
the peer does not fetch (its next requests then stay in its own kernel).  A large request without
room for it within two seconds is read without being kept and refused with `Busy`.
"""

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import trio

from dfs.clock import Clock
from dfs.env import Context, Deferred, Handler, Reply
from dfs.errors import Busy, DfsError, LocalProtocolError, UnknownMethod, to_wire
from dfs.rpc.budget import Budget, Share
from dfs.rpc.client import FEW, first_error
from dfs.rpc.transport import Channel, accept, explain
from dfs.rpc.turn import Turn
from dfs.wire.connection import Connection, Event, State, encode_value
from dfs.wire.frame import ERROR, REPLY, REQUEST

log = logging.getLogger(__name__)

CONNECTION_LIMIT = 64 << 20  # bytes of large requests of one connection
ADMIT_WAIT = 2.0  # seconds a large request waits for room
HANDSHAKE_TIMEOUT = 10.0
REPLY_LIMIT = 64 << 20  # bytes of answers queued before no more requests are read
TASK_LIMIT = 4096  # coroutine handlers running for one connection


class Server:
    """Handlers behind one listening socket."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        greet: Callable[[], Connection],
        budget: Budget,
        clock: Clock,
        counts: dict[str, int],
        methods: dict[str, list[float]],
        turn: Turn,
    ) -> None:
        """`greet` makes the server side of a new connection.

        `methods` counts: method -> [requests, those served by a task, their seconds].
        """
        self.handlers = handlers
        self.greet = greet
        self.budget = budget
        self.clock = clock
        self.counts = counts
        self.methods = methods
        self.turn = turn

    async def run(self, listener: socket.socket) -> None:
        """Accept and serve until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, source = await accept(listener)
                except OSError as e:
                    if e.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    log.error("cannot accept a connection: %s", explain(e))  # noqa: TRY400 - no traceback: the system lacks something
                    await trio.sleep(0.2)
                    continue
                nursery.start_soon(_Session(self, nursery, sock, source).run)


class _Session:
    """One connection of a server."""

    __slots__ = (
        "_channel", "_charge", "_closed", "_drained", "_nursery", "_peer", "_server", "_share",
        "_tasks",
    )  # fmt: skip

    def __init__(
        self, server: Server, nursery: trio.Nursery, sock: socket.socket, source: str
    ) -> None:
        self._server = server
        self._nursery = nursery
        self._peer = source
        self._channel = Channel(sock, server.greet())
        self._channel.on_progress = self._progress
        self._share = Share(CONNECTION_LIMIT)
        self._charge = 0  # bytes taken from the budget for the frame that is being received
        self._tasks = 0
        self._closed = False
        self._drained: trio.Event | None = None

    async def run(self) -> None:
        """Serve the connection until it ends; raises nothing of its own."""
        server, channel = self._server, self._channel
        server.counts["accepted"] += 1
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                events: list[Event] = []
                while channel.connection.state is State.GREETING:
                    events = await channel.receive()
            peer = channel.connection.peer
            self._peer = f"{peer.name if peer else '?'}@{self._peer}"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.send_loop)
                await self._converse(events[1:])  # what came right behind HELLO
        except* EOFError:
            log.debug("%s closed its connection", self._peer)
        except* trio.TooSlowError:
            log.warning("closed the connection of %s: no greeting came", self._peer)
        except* OSError as group:
            log.info("lost the connection of %s: %s", self._peer, explain(first_error(group)))
        except* DfsError as group:
            log.warning("closed the connection of %s: %s", self._peer, first_error(group))
        except* Exception as group:
            log.exception("closed the connection of %s", self._peer, exc_info=group)
        finally:
            self._closed = True
            server.counts["closed"] += 1
            self._uncharge(self._charge)
            channel.flush()  # the GOODBYE, if there is one
            channel.close()

    async def _converse(self, events: list[Event]) -> None:
        channel = self._channel
        connection = channel.connection
        turn = self._server.turn
        self._handle(events)
        channel.flush()
        while True:
            if connection.waiting:
                await self._admit(connection)
            while connection.queue.size > REPLY_LIMIT:
                self._drained = trio.Event()
                await self._drained.wait()
            events = await channel.receive()
            if events:
                turn.begin()
                try:
                    self._handle(events)
                    channel.flush()
                finally:
                    turn.end()
                events = []  # a chunk that came last would stay until something else comes

    def _progress(self) -> None:
        drained = self._drained
        if drained is not None and self._channel.connection.queue.size <= REPLY_LIMIT // 2:
            self._drained = None
            drained.set()

    async def _admit(self, connection: Connection) -> None:
        """Take room for a large request, or have it discarded."""
        budget, size = self._server.budget, connection.waiting
        if not budget.acquire_nowait(self._share, size):
            patience = ADMIT_WAIT
            if connection.waiting_deadline:
                patience = min(patience, connection.waiting_deadline / 1000)
            with trio.move_on_after(patience) as scope:
                await budget.acquire(self._share, size)
            if scope.cancelled_caught:
                connection.discard()
                return
        self._charge = size

    def _uncharge(self, charge: int) -> None:
        if charge:
            self._server.budget.release(self._share, charge)

    # --------------------------------------------------------------------------------- requests

    def _handle(self, events: list[Event]) -> None:
        server = self._server
        handlers, counts, methods = server.handlers, server.counts, server.methods
        now = server.clock.monotonic()
        charge, self._charge = self._charge, 0  # a large frame is the only one in its batch
        for kind, stream, priority, epoch, milliseconds, value, data in events:
            counts["requests"] += 1
            wanted = kind == REQUEST
            if value is None:
                counts["refused"] += 1
                busy = Busy("the server has no memory for more large requests now; try again")
                self._refuse(wanted, stream, priority, "a large request", busy)
                continue
            method, args = value
            handler = handlers.get(method)
            if handler is None:
                error = UnknownMethod(
                    f"the server knows no method {method!r}; is it of another version or role?"
                )
                self._refuse(wanted, stream, priority, method, error)
                continue
            served = methods.get(method)
            if served is None:  # handlers may be added while serving
                served = methods[method] = [0, 0, 0.0]
            served[0] += 1
            deadline = now + milliseconds / 1000 if milliseconds else float("inf")
            context = Context(self._peer, epoch, deadline, priority)
            try:
                made = handler(context, args, data)
            except Exception as e:  # judged there
                self._refuse(wanted, stream, priority, method, e)
                continue
            if isinstance(made, tuple):
                if wanted:
                    self._reply(stream, priority, method, made)
            elif self._tasks >= TASK_LIMIT:
                if not isinstance(made, Deferred):
                    made.close()  # type: ignore[attr-defined]  # what is neither is a coroutine
                busy = Busy(f"{self._tasks} requests of this connection are under way; try again")
                self._refuse(wanted, stream, priority, method, busy)
            else:
                self._tasks += 1
                taken, charge = charge, 0
                if isinstance(made, Deferred):
                    made.bind(partial(self._settle, wanted, stream, priority, method, taken))
                    continue
                self._nursery.start_soon(
                    self._finish, made, wanted, stream, priority, method, taken
                )
        self._uncharge(charge)

    def _settle(
        self,
        wanted: bool,
        stream: int,
        priority: int,
        method: str,
        charge: int,
        answer: Reply | Exception,
    ) -> None:
        """Somebody answered a `Deferred`; where many are, they leave together in the next turn."""
        if isinstance(answer, Exception):
            self._refuse(wanted, stream, priority, method, answer)
        elif wanted:
            self._reply(stream, priority, method, answer)
        self._tasks -= 1
        self._uncharge(charge)
        if self._tasks < FEW:
            self._channel.flush()
        else:
            self._channel.wake()

    async def _finish(
        self,
        made: Awaitable[Reply],
        wanted: bool,
        stream: int,
        priority: int,
        method: str,
        charge: int,
    ) -> None:
        now = self._server.clock.monotonic
        began = now()
        try:
            reply = await made
        except Exception as e:  # judged there
            self._refuse(wanted, stream, priority, method, e)
        else:
            if wanted:
                self._reply(stream, priority, method, reply)
        finally:
            self._tasks -= 1
            self._uncharge(charge)
            counts = self._server.methods[method]
            counts[1] += 1
            counts[2] += now() - began
        if self._tasks <= FEW:
            self._channel.flush()
        else:
            self._channel.wake()

    def _reply(self, stream: int, priority: int, method: str, reply: Reply) -> None:
        if self._closed:
            return
        try:
            result, data = reply
            meta = encode_value(result)
            self._channel.connection.send(REPLY, stream, meta, data, priority=priority)
        except (TypeError, ValueError, LocalProtocolError) as e:
            self._refuse(True, stream, priority, method, e)

    def _refuse(
        self, wanted: bool, stream: int, priority: int, method: str, error: Exception
    ) -> None:
        """Answer with an error; one that nobody foresaw is logged with its traceback."""
        if not isinstance(error, DfsError) or isinstance(error, LocalProtocolError):
            log.error("%s of %s failed", method, self._peer, exc_info=error)
        if not wanted or self._closed:
            return
        try:
            meta = encode_value(to_wire(error))
        except LocalProtocolError:
            meta = encode_value(
                (type(error).code if isinstance(error, DfsError) else 1, str(error), ())
            )
        connection = self._channel.connection
        if connection.state is State.OPEN:
            connection.send(ERROR, stream, meta, priority=priority)
