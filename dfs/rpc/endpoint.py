"""`RpcEndpoint`: the `dfs.env.Endpoint` of production, over TCP and unix sockets."""

from collections.abc import Callable
from random import Random
from typing import Any

import trio
from trio.lowlevel import Abort, current_task, wait_task_rescheduled

from dfs.clock import Clock
from dfs.cluster.address import is_local
from dfs.env import Buffer, Buffers, Handler, Priority
from dfs.errors import ConfigError, LocalProtocolError, Unreachable
from dfs.rpc.budget import Budget
from dfs.rpc.client import OnReply, Pending
from dfs.rpc.pool import Pool
from dfs.rpc.server import Server
from dfs.rpc.timers import Timers
from dfs.rpc.transport import listening
from dfs.rpc.turn import Turn
from dfs.wire.connection import Connection, Role, encode_value
from dfs.wire.frame import gather

SERVER_LIMIT = 256 << 20  # bytes of large requests in memory, all connections together
_CAST_PATIENCE = 5.0  # seconds a cast may wait for a connection before it is dropped


def _no_epoch() -> int:
    return 0


class RpcEndpoint:
    """Calls other nodes and serves them; start `run` before use.

    `epoch` gives the map epoch for requests whose caller names none.  `secret` must be the same at
    both ends; a server without one listens on loopback and unix sockets only, unless `insecure`.
    """

    def __init__(
        self,
        *,
        cluster_id: bytes,
        name: str,
        clock: Clock,
        random: Random,
        epoch: Callable[[], int] = _no_epoch,
        secret: bytes = b"",
        insecure: bool = False,
    ) -> None:
        """Build; opens nothing."""
        self.cluster_id = cluster_id
        self.name = name
        self._clock = clock
        self._random = random
        self._epoch = epoch
        self._secret = secret
        self._insecure = insecure
        self._timers = Timers()
        self._turn = Turn()
        self._budget = Budget(SERVER_LIMIT)
        self._pool: Pool | None = None
        self._closed = False
        self._methods: dict[str, list[float]] = {}  # see `Server`
        self._counts = dict.fromkeys(
            ("calls", "connects", "failures", "late", "accepted", "closed", "requests", "refused"),
            0,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connections until cancelled; what waits then fails with `Unreachable`."""
        if self._pool is not None or self._closed:
            raise LocalProtocolError("an RpcEndpoint runs once")
        try:
            async with trio.open_nursery() as nursery:
                self._pool = Pool(
                    greet=lambda: self._connection(Role.CLIENT),
                    timers=self._timers,
                    nursery=nursery,
                    random=self._random,
                    counts=self._counts,
                )
                task_status.started()
                try:
                    await self._timers.run()
                finally:
                    # At once: the nursery takes no new links from here on, and nothing would end
                    # what is submitted now.
                    self._closed = True
        finally:
            self._closed = True  # also when the run was cancelled before it began

    def _connection(self, role: Role) -> Connection:
        return Connection(role, self.cluster_id, self.name, self._secret)

    def statistics(self) -> dict[str, Any]:
        """Counters and the state of every link, for status pages."""
        return {
            **self._counts,
            "server_bytes": self._budget.used,
            "timers": len(self._timers),
            "methods": {m: tuple(counts) for m, counts in self._methods.items()},
            "breakers": self._pool.breakers() if self._pool else {},
            "links": self._pool.statistics() if self._pool else [],
        }

    # ----------------------------------------------------------------------------------- calling

    def _submit(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...],
        data: Buffers,
        timeout: float,
        priority: int,
        epoch: int,
        task: trio.lowlevel.Task | None,
        on_reply: OnReply | None,
    ) -> Pending:
        pool = self._pool
        if pool is None or self._closed:
            if self._closed:
                raise Unreachable(f"{method} to {to}: this node is shutting down")
            raise LocalProtocolError("start RpcEndpoint.run before making requests")
        meta = encode_value((method, args))
        size = 0
        if data:
            data, size = gather(data)
        pending = Pending(
            method, meta, data, size, timeout, priority, epoch or self._epoch(),
            cast=task is None and on_reply is None,
        )  # fmt: skip
        pending.task = task
        pending.on_reply = on_reply
        self._counts["calls"] += 1
        pool.link(to, priority, size).submit(pending)
        return pending

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
        """See `dfs.env.Rpc.call`; `data` must not change until the call is over."""
        pending = self._submit(
            to, method, args, data, timeout, priority, epoch, current_task(), None
        )

        def abandon(_: object) -> Abort:
            pending.task = None
            if pending.link is not None:
                pending.link.forget(pending)
            return Abort.SUCCEEDED

        answer: tuple[Any, Buffer] = await wait_task_rescheduled(abandon)
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
        """See `dfs.env.Rpc.request`; `data` must not change until `on_reply` was called."""
        try:
            self._submit(to, method, args, data, timeout, priority, epoch, None, on_reply)
        except Unreachable as e:
            trio.lowlevel.current_trio_token().run_sync_soon(on_reply, e)

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
        """See `dfs.env.Rpc.cast`; raises only for values that have no encoding."""
        if not self._closed:
            self._submit(to, method, args, data, _CAST_PATIENCE, priority, epoch, None, None)

    def later(self, fn: Callable[[], None]) -> bool:
        """See `dfs.env.Rpc.later`; requests and casts count, answers do not."""
        return self._turn.later(fn)

    # ----------------------------------------------------------------------------------- serving

    async def serve(
        self, address: str, handlers: dict[str, Handler], *, started: Callable[[str], None]
    ) -> None:
        """See `dfs.env.Endpoint.serve`."""
        with listening(address) as (listener, actual):
            if not (self._secret or self._insecure or is_local(actual)):
                raise ConfigError(
                    f"refusing to listen at {actual} without a cluster secret: anybody there could "
                    "read and delete data; set a secret, or listen at 127.0.0.1"
                )
            server = Server(
                handlers,
                greet=lambda: self._connection(Role.SERVER),
                budget=self._budget,
                clock=self._clock,
                counts=self._counts,
                methods=self._methods,
                turn=self._turn,
            )
            started(actual)
            await server.run(listener)
