"""An in-process network with faults, deterministic from one `Random`.

`SimNetwork` hands out `SimEndpoint`s that implement `dfs.env.Endpoint`.  Everything they exchange
is encoded with `dfs.codec` and decoded again, so only real wire types pass.  Faults are knobs that
a test may turn at any time:

    delay = (low, high)   seconds a message travels, uniform; messages of a pair keep their order
    reorder               probability that a message is overtaken (up to 10 x high later)
    drop                  probability that a request, reply or cast is lost: nobody is told
    duplicate             probability that it arrives twice; a handler may run twice for one call
    reset                 probability that a caller learns of a crashed peer at once (`Unreachable`)
                          rather than by its deadline
    block, partition      directed cuts by endpoint name; they swallow what is in flight as well

Closing an endpoint is a crash: whatever travels to or from it is lost, its handlers are cancelled.
The same name may then be given to a new endpoint: a restart.  A message to an address where nobody
serves is refused (`Unreachable`), as by a kernel without a listener.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from random import Random
from types import TracebackType
from typing import Any, Self

import trio
from outcome import Error, Value

from dfs.clock import Clock
from dfs.codec import pack, unpack
from dfs.env import Buffer, Buffers, Context, Deferred, Handler, Priority, Reply
from dfs.errors import (
    ConfigError,
    DeadlineExceeded,
    DfsError,
    LocalProtocolError,
    UnknownMethod,
    Unreachable,
    from_wire,
    to_wire,
)
from dfs.hashing import crc32
from dfs.rpc.timers import Timer, Timers

log = logging.getLogger(__name__)
OnReply = Callable[[tuple[Any, Buffer] | DfsError], None]


def _joined(data: Buffers) -> bytes:
    return bytes(data) if isinstance(data, Buffer) else b"".join(data)


def _encode(value: Any) -> bytes:
    try:
        return pack(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise LocalProtocolError(f"value cannot be sent: {e}") from e


class SimNetwork:
    """The network; use it as `async with SimNetwork(random, clock) as network:` or start `run`."""

    def __init__(
        self,
        random: Random,
        clock: Clock,
        *,
        delay: tuple[float, float] = (0.0002, 0.001),
        drop: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        reset: float = 0.5,
        strict: bool = True,
    ) -> None:
        """Build; `strict`: an exception that is no `DfsError` ends the test, not only the call."""
        self.random = random
        self.clock = clock
        self.delay = delay
        self.drop = drop
        self.duplicate = duplicate
        self.reorder = reorder
        self.reset = reset
        self.strict = strict
        self.fingerprint = 0  # of everything delivered so far: equal for equal seeds
        self.counts = {"sent": 0, "delivered": 0, "dropped": 0, "duplicated": 0, "refused": 0}
        self.timers = Timers()
        self._blocked: set[tuple[str, str]] = set()
        self._endpoints: dict[str, SimEndpoint] = {}
        self._listeners: dict[str, SimEndpoint] = {}
        self._owners: dict[str, str] = {}  # address -> name of who served it last
        self._last: dict[tuple[str, str], float] = {}  # arrival of the newest ordered message
        self._ports = 0
        self._manager: Any = None
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver messages until cancelled."""
        task_status.started()
        await self.timers.run()

    async def __aenter__(self) -> Self:
        """Start delivering in a nursery of its own."""
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        self._nursery.start_soon(self.timers.run)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        """Stop; messages still in flight are lost."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        result: bool | None = await self._manager.__aexit__(kind, error, trace)
        return result

    def endpoint(self, name: str, *, clock: Clock | None = None) -> "SimEndpoint":
        """Make the endpoint called `name`; one that has the name already is closed (a restart)."""
        if name in self._endpoints:
            self._endpoints[name].close()
        self._endpoints[name] = made = SimEndpoint(self, name, clock or self.clock)
        return made

    # ---------------------------------------------------------------------------------- faults

    def block(self, source: str, target: str) -> None:
        """Swallow everything from `source` to `target`; the other direction still works."""
        self._blocked.add((source, target))

    def unblock(self, source: str, target: str) -> None:
        """Undo `block`."""
        self._blocked.discard((source, target))

    def partition(self, groups: Sequence[Iterable[str]]) -> None:
        """Cut both directions between all groups; names in no group keep reaching everybody."""
        sets = [list(g) for g in groups]
        for i, group in enumerate(sets):
            for other in sets[:i] + sets[i + 1 :]:
                self._blocked.update((a, b) for a in group for b in other)

    def isolate(self, name: str) -> None:
        """Cut one endpoint off from all that exist, both ways."""
        self.partition([[name], [n for n in self._endpoints if n != name]])

    def heal(self) -> None:
        """Remove every block and partition; probabilities stay as they are."""
        self._blocked.clear()

    def blocked(self, source: str, target: str) -> bool:
        """Whether messages in this direction are swallowed now."""
        return (source, target) in self._blocked

    def statistics(self) -> dict[str, int]:
        """Counts of messages by fate."""
        return dict(self.counts)

    # --------------------------------------------------------------------------------- delivery

    def _travel(self) -> float:
        return self.random.uniform(*self.delay)

    def _post(
        self, source: "SimEndpoint", target: "SimEndpoint", label: str, fn: Any, *args: Any
    ) -> None:
        """Send one message: `fn(*args)` runs at the target, never, once or twice."""
        counts, random = self.counts, self.random
        counts["sent"] += 1
        copies = 1
        if source is not target:
            if self.blocked(source.name, target.name) or random.random() < self.drop:
                counts["dropped"] += 1
                return
            if random.random() < self.duplicate:
                counts["duplicated"] += 1
                copies = 2
        pair = (source.name, target.name)
        for _ in range(copies):
            when = trio.current_time() + self._travel()
            if random.random() < self.reorder:
                when += random.uniform(0, 10 * self.delay[1])
            else:
                self._last[pair] = when = max(when, self._last.get(pair, 0.0))
            self.timers.at(when, self._arrive, source, target, label, fn, args)

    def _arrive(
        self,
        source: "SimEndpoint",
        target: "SimEndpoint",
        label: str,
        fn: Callable[..., None],
        args: tuple[Any, ...],
    ) -> None:
        if source.closed or target.closed or self.blocked(source.name, target.name):
            self.counts["dropped"] += 1
            return
        self.counts["delivered"] += 1
        trace = f"{trio.current_time():.9f} {source.name} {target.name} {label}"
        self.fingerprint = crc32(trace.encode(), self.fingerprint)
        fn(*args)

    def _forget(self, gone: "SimEndpoint") -> None:
        """An endpoint crashed: unregister it and let some of its callers notice."""
        for address in [a for a, e in self._listeners.items() if e is gone]:
            del self._listeners[address]
        for other in self._endpoints.values():
            if other is not gone:
                other._peer_gone(gone)


def _unknown(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
    raise UnknownMethod("the server knows no such method; is it of another version?")


class _Pending:
    """A request that waits for its answer."""

    __slots__ = ("address", "method", "on_reply", "target", "timer")

    def __init__(
        self, address: str, method: str, target: "SimEndpoint | None", on_reply: OnReply
    ) -> None:
        self.address = address
        self.method = method
        self.target = target
        self.on_reply = on_reply
        self.timer: Timer = []


class SimEndpoint:
    """One node's end of a `SimNetwork`; implements `dfs.env.Endpoint`."""

    turns = False  # whether messages are handled in turns

    def __init__(self, network: SimNetwork, name: str, clock: Clock) -> None:
        """Use `SimNetwork.endpoint`."""
        self.network = network
        self.name = name
        self.clock = clock
        self.closed = False
        self._pending: dict[int, _Pending] = {}
        self._serial = 0
        self._services: dict[str, tuple[dict[str, Handler], trio.Nursery]] = {}

    def close(self) -> None:
        """Crash: lose what is in flight, cancel the handlers, fail the own calls."""
        if self.closed:
            return
        self.closed = True
        for _, nursery in self._services.values():
            nursery.cancel_scope.cancel()
        self._services.clear()
        for stream in list(self._pending):
            self.network.timers.soon(self._fail, stream, Unreachable(f"{self.name} is closed"))
        self.network._forget(self)

    # ------------------------------------------------------------------------------------ client

    async def call(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        timeout: float,
        priority: int = Priority.NORMAL,
        epoch: int = 0,
    ) -> tuple[Any, Buffer]:
        """See `dfs.env.Rpc.call`."""
        task = trio.lowlevel.current_task()

        def wake(answer: tuple[Any, Buffer] | DfsError) -> None:
            failed = isinstance(answer, DfsError)
            trio.lowlevel.reschedule(task, Error(answer) if failed else Value(answer))  # type: ignore[arg-type]  # narrowed by `failed`

        stream = self._send(to, method, args, data, timeout, wake, priority, epoch)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._take(stream)
            return trio.lowlevel.Abort.SUCCEEDED

        answer: tuple[Any, Buffer] = await trio.lowlevel.wait_task_rescheduled(abort)
        return answer

    def request(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        timeout: float,
        on_reply: OnReply,
        priority: int = Priority.NORMAL,
        epoch: int = 0,
    ) -> None:
        """See `dfs.env.Rpc.request`."""
        self._send(to, method, args, data, timeout, on_reply, priority, epoch)

    def cast(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        priority: int = Priority.HIGH,
        epoch: int = 0,
    ) -> None:
        """See `dfs.env.Rpc.cast`."""
        meta, raw = _encode((method, args)), _joined(data)
        target = self.network._listeners.get(to)
        if target is not None and not self.closed:
            deadline = trio.current_time() + 60.0
            self.network._post(
                self, target, method, target._serve_one,
                self, 0, to, meta, raw, deadline, priority, epoch,
            )  # fmt: skip

    def later(self, fn: Callable[[], None]) -> bool:
        """See `dfs.env.Rpc.later`: messages arrive one by one here, so it is the next step."""
        if self.turns:
            trio.lowlevel.current_trio_token().run_sync_soon(fn)
        return self.turns

    def _send(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...],
        data: Buffers,
        timeout: float,
        on_reply: OnReply,
        priority: int,
        epoch: int,
    ) -> int:
        meta, raw = _encode((method, args)), _joined(data)
        network = self.network
        self._serial = stream = self._serial + 1
        target = network._listeners.get(to)
        self._pending[stream] = pending = _Pending(to, method, target, on_reply)
        deadline = trio.current_time() + timeout
        late = DeadlineExceeded(f"{method} to {to}: no answer within {timeout:g} s")
        pending.timer = network.timers.at(deadline, self._fail, stream, late)
        if self.closed:
            network.timers.soon(self._fail, stream, Unreachable(f"{self.name} is closed"))
        elif target is not None:
            network._post(
                self, target, method, target._serve_one,
                self, stream, to, meta, raw, deadline, priority, epoch,
            )  # fmt: skip
        elif not network.blocked(self.name, network._owners.get(to, "")):
            network.counts["refused"] += 1
            error = Unreachable(f"{method} to {to}: connection refused; is the node running?")
            network.timers.at(trio.current_time() + network._travel(), self._fail, stream, error)
        return stream

    def _take(self, stream: int) -> _Pending | None:
        pending = self._pending.pop(stream, None)
        if pending is not None:
            self.network.timers.cancel(pending.timer)
        return pending

    def _fail(self, stream: int, error: DfsError) -> None:
        pending = self._take(stream)
        if pending is not None:
            pending.on_reply(error)

    def _peer_gone(self, gone: "SimEndpoint") -> None:
        network = self.network
        for stream, pending in list(self._pending.items()):
            if pending.target is gone and network.random.random() < network.reset:
                error = Unreachable(
                    f"{pending.method} to {pending.address}: the connection broke; outcome unknown"
                )
                when = trio.current_time() + network._travel()
                network.timers.at(when, self._fail, stream, error)

    def _answered(self, stream: int, ok: bool, meta: bytes, data: bytes) -> None:
        pending = self._take(stream)
        if pending is not None:  # else it is late, or the second copy
            value = unpack(meta)
            pending.on_reply((value, memoryview(data)) if ok else from_wire(*value))

    # ------------------------------------------------------------------------------------ server

    async def serve(
        self, address: str, handlers: dict[str, Handler], *, started: Callable[[str], None]
    ) -> None:
        """See `dfs.env.Endpoint.serve`; a port of 0 becomes a port that is free."""
        network = self.network
        if address.endswith(":0"):
            network._ports += 1
            address = f"{address[:-1]}{40000 + network._ports}"
        if address in network._listeners:
            raise ConfigError(f"address {address} is in use; choose another port")
        try:
            async with trio.open_nursery() as nursery:
                if not self.closed:
                    self._services[address] = (handlers, nursery)
                    network._listeners[address] = self
                    network._owners[address] = self.name
                    started(address)
                await trio.Event().wait()
        finally:
            if network._listeners.get(address) is self:
                del network._listeners[address]
            self._services.pop(address, None)
        await trio.Event().wait()  # crashed: dead until whoever runs the node cancels it

    def _serve_one(
        self,
        source: "SimEndpoint",
        stream: int,
        address: str,
        meta: bytes,
        data: bytes,
        deadline: float,
        priority: int,
        epoch: int,
    ) -> None:
        service = self._services.get(address)
        left = deadline - trio.current_time()
        if service is None or left <= 0:
            return
        handlers, nursery = service
        method, args = unpack(meta)
        handler = handlers.get(method)
        context = Context(source.name, epoch, self.clock.monotonic() + left, priority)
        try:
            made = (handler or _unknown)(context, args, memoryview(data))
        except Exception as e:
            self._refuse(source, stream, method, e)
            return
        if isinstance(made, Deferred):
            made.bind(lambda answer: self._settle(source, stream, method, answer))
        elif inspect.isawaitable(made):
            nursery.start_soon(self._finish, source, stream, method, made)
        else:
            self._reply(source, stream, method, made)

    def _settle(
        self, source: "SimEndpoint", stream: int, method: str, answer: Reply | Exception
    ) -> None:
        if isinstance(answer, Exception):
            self._refuse(source, stream, method, answer)
        else:
            self._reply(source, stream, method, answer)

    async def _finish(
        self, source: "SimEndpoint", stream: int, method: str, made: Awaitable[Reply]
    ) -> None:
        try:
            reply = await made
        except Exception as e:
            self._refuse(source, stream, method, e)
        else:
            self._reply(source, stream, method, reply)

    def _refuse(self, source: "SimEndpoint", stream: int, method: str, error: Exception) -> None:
        if not isinstance(error, DfsError):
            if self.network.strict:
                raise error
            log.error("%s: %s failed", self.name, method, exc_info=error)
        if stream:
            meta = _encode(to_wire(error))
            self._post_reply(source, stream, method, False, meta, b"")

    def _reply(self, source: "SimEndpoint", stream: int, method: str, reply: Reply) -> None:
        if stream:
            result, data = reply
            self._post_reply(source, stream, method, True, _encode(result), _joined(data))

    def _post_reply(
        self, source: "SimEndpoint", stream: int, method: str, ok: bool, meta: bytes, data: bytes
    ) -> None:
        if not self.closed:
            label = f"{method}{'=' if ok else '!'}"
            self.network._post(self, source, label, source._answered, stream, ok, meta, data)
