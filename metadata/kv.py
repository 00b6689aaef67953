"""Registers as a service of a metadata node: `kv.*` for clients, `reg.*` between nodes.

The protocol is in `metadata.coordinator` and `metadata.registers`; this moves their effects.  No
operation has a task: handlers return `Deferred`s, replies come as callbacks, and three tasks do the
rest: one writes (`metadata.replica`), one sends (`metadata.outbox`), one looks at the time.  A
coordinator that is a home reads its own copy inline.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Context, Deferred, Env, Handler, Reply
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    InvalidArgument,
    NotHome,
    Unreachable,
    to_wire,
)
from dfs.rpc.budget import InFlight
from dfs.rpc.mapkeeper import MapKeeper
from metadata.coordinator import DONE, SEND, TICK, Coordinator, Effect
from metadata.operation import Ticket
from metadata.outbox import ERROR, Outbox
from metadata.quorum import DEFAULTS, REQUEST_SIZE, Options, defaults_with
from metadata.registers import GET, HINT, MERGE, Digests, Hints, Registers, Request, row_of
from metadata.replica import Replica
from metadata.scan import Scanner, scan_rows
from metadata.store.engine import Store

log = logging.getLogger(__name__)

LONGEST = 30.0  # seconds an operation may take, whatever its caller is ready to wait
MARGIN = (0.25, 0.2)  # seconds, share of the time given: what an answer needs to get back in time
_REMOTE = frozenset((GET, MERGE, HINT))
_ELSEWHERE = (Unreachable, DeadlineExceeded, Busy)

Answer = Reply | Deferred | Awaitable[Reply]


class KV:
    """The registers of one node.  `run` it, and serve `handlers`."""

    def __init__(
        self,
        env: Env,
        number: int,
        get_map: Callable[[], ClusterMap],
        store: Store,
        *,
        digests: Digests,
        hints: Hints | None = None,
        is_up: Callable[[int], bool] = lambda number: True,
        admit: Callable[[int], None] = lambda size: None,
        waiting: Callable[[int], bool] = lambda partition: False,
        inflight: InFlight | None = None,
    ) -> None:
        """Serve the registers in `store`.

        `get_map` may be a `MapKeeper`: then newer maps are learned and followed.  `is_up` is the
        liveness of nodes as gossip sees it; `admit(bytes)` raises `DiskFull` or `Busy` when values
        of that size are not taken now (deletes always are); `waiting` is for `Registers`.
        Copies on their way to other nodes are charged to `inflight`.
        """
        self._env = env
        self._number = number
        self._get_map = get_map
        self._keeper = get_map if isinstance(get_map, MapKeeper) else None
        self._admit = admit
        current = get_map()
        self.registers = Registers(
            store, number, current, digests=digests, hints=hints, waiting=waiting
        )
        self.replica = Replica(self.registers, store, env.clock, self._keeper)
        self.core = Coordinator(number, current, is_up=is_up)
        self._outbox = Outbox(
            env.rpc, env.clock, number, get_map, on_reply=self._on_reply,
            observe=self.core.observe, inflight=inflight,
        )  # fmt: skip
        self._scanner = Scanner(env.rpc, number, self.core, get_map, self._offer, self._read)
        self._ticker: Task | None = None  # parked: nothing is under way

    def handlers(self) -> dict[str, Handler]:
        """For the node's dispatch table; see `metadata/KV.md`."""
        return {
            "kv.get": self._get,
            "kv.put": self._put,
            "kv.scan": self._scan,
            "reg.batch": self._batch,
            "reg.scan": self._scan_rows,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; raises `StoreFailed`."""
        leave = self._keeper.subscribe(self._follow) if self._keeper is not None else None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.replica.run)
                nursery.start_soon(self._outbox.run)
                nursery.start_soon(self._tick)
                self._follow(self.registers.map, self._get_map())
                await self.replica.write(())  # the state of a new node, before anything is minted
                task_status.started()
        finally:
            if leave is not None:
                leave()

    async def submit(self, requests: Sequence[Request]) -> list[Any]:
        """Carry out requests of this node's background protocols; see `Replica.write`."""
        return await self.replica.write(requests)

    def statistics(self) -> dict[str, int]:
        """Counters of all parts."""
        return {
            **self.core.statistics(),
            **self.replica.statistics(),
            **self._outbox.statistics(),
        }

    # ------------------------------------------------------------------------------------ clients

    def _get(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Answer:
        space, key, given, *rest = args
        if self._keeper is not None and ctx.epoch > self._keeper.current.epoch:
            return self._late(self._get, ctx, args)
        answer = Deferred()
        now = self._env.clock.monotonic()
        try:
            effects = self.core.start_get(
                now, answer, row_of(space, key), _options(given), _answer_by(now, ctx.deadline)
            )
        except NotHome as e:
            return self._forward(ctx, "kv.get", args, rest, e)
        self._do(now, effects)
        self._wake_ticker()
        return answer

    def _put(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Answer:
        space, key, value, context, given, *rest = args
        keeper = self._keeper
        if keeper is not None:
            if ctx.epoch > keeper.current.epoch:
                return self._late(self._put, ctx, args)
            if keeper.forked:
                raise Busy(keeper.alarm)
        if value is not None:
            if value.__class__ is not bytes:
                raise InvalidArgument(f"a value is bytes, not {type(value).__name__}")
            self._admit(len(value))
        answer = Deferred()
        now = self._env.clock.monotonic()
        try:
            effects = self.core.start_put(
                now, answer, row_of(space, key), context, value, _options(given),
                _answer_by(now, ctx.deadline),
            )  # fmt: skip
        except NotHome as e:
            return self._forward(ctx, "kv.put", args, rest, e)
        self._do(now, effects)
        self._wake_ticker()
        return answer

    async def _late(
        self,
        handler: Callable[[Context, tuple[Any, ...], memoryview], Answer],
        ctx: Context,
        args: tuple[Any, ...],
    ) -> Reply:
        """The caller has a newer map: get it first."""
        assert self._keeper is not None  # noqa: S101 - only a keeper is late
        await self._keeper.catch_up(ctx.epoch)
        made = handler(ctx, args, memoryview(b""))
        if isinstance(made, tuple):
            return made
        if isinstance(made, Deferred):
            return await _wait(made)
        return await made

    async def _forward_on(
        self, ctx: Context, method: str, args: tuple[Any, ...], homes: tuple[int, ...]
    ) -> Reply:
        clock, core = self._env.clock, self.core
        cluster = self._get_map()
        error: DfsError = Unreachable("no home of the partition is known")
        for node in core.order(tuple(homes)):
            left = min(ctx.deadline - clock.monotonic(), LONGEST)
            if left <= 0:
                break
            try:
                result, _ = await self._env.rpc.call(
                    cluster.address(METADATA, node), method, (*args, True), timeout=left,
                    epoch=cluster.epoch,
                )  # fmt: skip
            except _ELSEWHERE as e:
                error = e
            else:
                return result, b""
        raise error

    def _forward(
        self, ctx: Context, method: str, args: tuple[Any, ...], rest: list[Any], error: NotHome
    ) -> Awaitable[Reply]:
        """Hand the operation to a home, once: who was forwarded to and is none has another map."""
        if rest:
            raise error
        return self._forward_on(ctx, method, args, error.details)

    async def _scan(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        space, prefix, after, limit, given = args
        deadline = min(ctx.deadline, self._env.clock.monotonic() + LONGEST)
        options = _options(given)
        items, cursor = await self._scanner.page(space, prefix, after, limit, options, deadline)
        return (items, cursor), b""

    async def _read(self, row: bytes, options: Options, deadline: float) -> Any:
        """A get of this node's own: (values, context, info)."""
        answer = Deferred()
        now = self._env.clock.monotonic()
        self._do(now, self.core.start_get(now, answer, row, options, deadline))
        self._wake_ticker()
        return (await _wait(answer))[0]

    # -------------------------------------------------------------------------------------- peers

    def _batch(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Answer:
        _from_node, requests = args
        keeper, epoch = self._keeper, ctx.epoch
        reads = True
        for request in requests:
            kind = request[0]
            if kind != GET:
                if kind not in _REMOTE:
                    raise InvalidArgument(f"no request {kind!r} between nodes")
                reads = False
        if keeper is not None:
            if epoch > keeper.current.epoch:
                return self._late(self._batch, ctx, args)
            if keeper.forked and not reads:
                raise Busy(keeper.alarm)
        if reads:
            replies = self._read_now(epoch, requests)
            if replies is not None:
                return (_encoded(replies),), b""
        answer = Deferred()
        self.replica.submit(epoch, requests, lambda found: answer.answer(((_encoded(found),), b"")))
        return answer

    def _read_now(self, epoch: int, requests: tuple[Request, ...]) -> list[Any] | None:
        """Answers from the store, None if one of the rows is just being written."""
        read = self.registers.read
        replies: list[Any] = []
        for request in requests:
            try:
                found = read(epoch, request[1])
            except DfsError as e:
                replies.append(e)
                continue
            if found is None:
                return None
            replies.append(found)
        return replies

    async def _scan_rows(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        _from_node, space, prefix, wanted, limit = args
        if self._keeper is not None and ctx.epoch > self._keeper.current.epoch:
            await self._keeper.catch_up(ctx.epoch)
        if self.registers.unsettled:
            await self.replica.write(())
        return await scan_rows(self.registers, ctx.epoch, space, prefix, wanted, limit), b""

    # ------------------------------------------------------------------------------------ effects

    def _do(self, now: float, effects: list[Effect]) -> None:
        """Carry out effects, and those that follow from them at once."""
        core, me = self.core, self._number
        for effect in effects:  # grows while it is worked off
            kind = effect[0]
            if kind == SEND:
                _, node, epoch, request, ticket = effect
                if node != me:
                    self._outbox.put(node, epoch, request, ticket)
                    continue
                if request[0] == GET:
                    found: Any
                    try:
                        found = self.registers.read(epoch, request[1])
                    except DfsError as e:
                        found = e
                    if found is not None:
                        effects += core.on_reply(now, ticket, found)
                        continue
                self.replica.submit(epoch, (request,), partial(self._on_own, ticket))
            elif kind == DONE:
                _, answer, result = effect
                answer.answer(result if isinstance(result, DfsError) else (result, b""))
            else:
                self._offer(effect[1])

    def _on_own(self, ticket: Ticket, replies: list[Any]) -> None:
        self._on_reply(self._env.clock.monotonic(), ticket, replies[0])

    def _on_reply(self, now: float, ticket: Ticket, reply: Any) -> None:
        effects = self.core.on_reply(now, ticket, reply)
        if effects:
            self._do(now, effects)
        if self._ticker is not None:
            self._wake_ticker()

    def _offer(self, data: bytes) -> None:
        """Somebody has another map."""
        if self._keeper is None:
            return
        try:
            self._keeper.offer(data)
        except DfsError as e:
            log.warning("a map that came with a refusal is not usable: %s", e)

    def _follow(self, _old: ClusterMap, new: ClusterMap) -> None:
        """The node has a newer map."""
        self.registers.follow(new)
        self.replica.submit(new.epoch, (), lambda replies: None)  # writes the state that changed
        now = self._env.clock.monotonic()
        self._do(now, self.core.on_map(now, new))

    # --------------------------------------------------------------------------------------- time

    def _wake_ticker(self) -> None:
        ticker = self._ticker
        if ticker is not None:
            self._ticker = None
            self.core.wall_us = self._env.clock.time_ns() // 1000
            reschedule(ticker)

    async def _tick(self) -> None:
        clock, core = self._env.clock, self.core
        while True:
            if core.next_tick() == inf:
                self._ticker = current_task()
                await wait_task_rescheduled(self._unpark)
            # not until `next_tick`: a reply that comes meanwhile may ask for an earlier one
            await trio.sleep(TICK)
            now = clock.monotonic()
            if core.next_tick() <= now:
                core.wall_us = clock.time_ns() // 1000
                self._do(now, core.tick(now))

    def _unpark(self, _: object) -> Abort:
        self._ticker = None
        return Abort.SUCCEEDED


def _answer_by(now: float, deadline: float) -> float:
    """When to give up, so that the caller still hears who was missing."""
    left = deadline - now
    return now + min(left - min(MARGIN[0], left * MARGIN[1]), LONGEST)


def _options(given: Any) -> Options:
    if not given:
        return DEFAULTS
    if given.__class__ is not dict:
        raise InvalidArgument(f"options are a map, not {given!r:.60}")
    if len(given) == 1:
        request = given.get("request")
        if request.__class__ is bytes and len(request) == REQUEST_SIZE:
            return defaults_with(request)
    return Options(given)


def _encoded(replies: list[Any]) -> tuple[Any, ...]:
    """Replies as they travel; a map travels once in a batch."""
    found = []
    told = False
    for reply in replies:
        if isinstance(reply, DfsError):
            code, text, details = to_wire(reply)
            if told:
                details = ()
            told = told or bool(details)
            found.append((ERROR, code, text, details))
        else:
            found.append(reply)
    return tuple(found)


async def _wait(answer: Deferred) -> Reply:
    """Until a deferred answer is there; for the few callers that are tasks."""
    done = trio.Event()
    found: list[Reply | Exception] = []

    def take(result: Reply | Exception) -> None:
        found.append(result)
        done.set()

    answer.bind(take)
    await done.wait()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
