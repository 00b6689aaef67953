"""Synchronisation of a metadata node with its peers: the shell that drives the generators.

`Synchroniser` carries out the effects of `metadata.steps` with real calls and the real store, and
serves `sync.*`, `tomb.*`, `hints.*`.  The loops are in `metadata.syncworkers`.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Context, Env, Handler, Priority, Reply
from dfs.errors import DeadlineExceeded, DfsError, DiskFull, InvalidArgument
from dfs.rpc.mapkeeper import MapKeeper
from metadata import versions
from metadata.antientropy import AntiEntropy
from metadata.blobs import Blobs
from metadata.exchange import Outcome
from metadata.hints import DISK_SHARE, Hints
from metadata.merkle import BLOBS, REGISTERS, Digests, Op
from metadata.registers import DISCARD, MERGE, PURGE, RAW, SETTLE, Request
from metadata.rejoin import PullFirst
from metadata.steps import Accept, Call, Correct, Item, Merge, Purge, Rest, Settle, Steps, Write
from metadata.store.engine import Store
from metadata.tombstones import Tombstones

T = TypeVar("T")
TIMEOUT = 60.0  # seconds for one call; what is late counts as never
# seconds for the attempts of one call of a push, which a whole transition waits for: a lost message
# costs the first of them; a home that is slow gets longer ones
ATTEMPTS = (2.0, 4.0, 8.0, 16.0, TIMEOUT)
Resting = Callable[[int, int], Awaitable[None]]  # bytes moved, bytes to go


class Writer(Protocol):
    """The node's one way to change registers; `metadata.replica.Replica`."""

    async def write(self, requests: Sequence[Request]) -> list[Any]:
        """Carry out requests of `metadata.registers` by the node's own map; durable on return.

        The replies, in order; a refused request's is its `DfsError`.
        """
        ...


def newest(register: bytes) -> int:
    """Time of the newest write in an encoded register, us."""
    return versions.newest_hlc(versions.decode(register))


def is_tombstone(register: bytes) -> bool:
    """Whether an encoded register is deleted."""
    return versions.is_tombstone(versions.decode(register))


class HintKeeper:
    """`Hints` as the replica of registers wants them: with this node's clock."""

    def __init__(self, hints: Hints, now: Callable[[], int], admit: Callable[[int], None]) -> None:
        """`now` gives wall time in microseconds; `admit` is for bytes of values."""
        self._hints = hints
        self._now = now
        self._admit = admit

    def add(self, row: bytes, register: bytes, target: int, written: int) -> list[Op]:
        """See `Hints.add`; values are refused with `DiskFull`, deletes are not."""
        if not is_tombstone(register):
            self._admit(len(register))
        return self._hints.add(row, register, target, written, self._now())

    def find(self, row: bytes) -> Sequence[bytes]:
        """See `Hints.find`."""
        return self._hints.find(row)


class Synchroniser:
    """A node's digests, hints, anti-entropy and purging, over its store and network.

    Make it after the store is open and before the registers, whose `digests` and `hints` it has;
    set `writer` and `load` before anything is driven.  `alive` says whether a peer answers, as
    gossip has it.
    """

    def __init__(
        self,
        env: Env,
        me: int,
        get_map: Callable[[], ClusterMap],
        store: Store,
        *,
        alive: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Reads small state only."""
        self._env = env
        self.me = me
        self.get_map = get_map
        self.store = store
        self.alive = alive
        self.writer: Writer
        # Raise `DiskFull` when so many bytes of values are not taken: at all, or from other nodes.
        self.admit_write: Callable[[int], None] = lambda size: None
        self.admit_move: Callable[[int], None] = lambda size: None
        self._marks: list[Op] = []
        self.digests = Digests(store)
        self.blobs = Blobs(store, self.digests, admit=lambda size: self.admit_write(size))
        self.pull_first = PullFirst(store)
        self.hints = Hints(me, get_map, store, lambda: env.disk.usage()[0] // DISK_SHARE)
        self.keeper = HintKeeper(self.hints, self.now, lambda size: self.admit_move(size))
        self.antientropy = AntiEntropy(me, get_map, store, self.digests, self.pull_first, newest)
        self.tombstones = Tombstones(
            me,
            get_map,
            store,
            self.pull_first,
            newest=newest,
            is_tombstone=is_tombstone,
            alive=lambda node: self.alive(node),
        )

    def load(self) -> None:
        """Sum up the digests; before anything is written."""
        self.digests.load()

    async def start(self) -> None:
        """Judge the partitions by the node's map, and follow newer ones; `writer` must run."""
        self.map_changed(None, self.get_map())
        if isinstance(self.get_map, MapKeeper):
            self.get_map.subscribe(self.map_changed)
        await self.settle_marks()

    def map_changed(self, old: ClusterMap | None, new: ClusterMap) -> None:
        """Note which partitions this node must pull first; for `MapKeeper.subscribe`.

        It takes effect at once.  If the node stops before `settle_marks`, it finds out again.
        """
        self._marks = self.pull_first.follow(old, new, self.me, self._holds)

    async def settle_marks(self) -> None:
        """Make what `map_changed` found durable."""
        if self._marks:
            ops, self._marks = self._marks, []
            await self._submit([(RAW, ops)])

    def statistics(self) -> dict[str, Any]:
        """Sums over all targets of hints, and what synchronisation counted since the start."""
        hints = self.hints.status(self.now())
        return {
            "hints": sum(t["count"] for t in hints),
            "hints_bytes": sum(t["bytes"] for t in hints),
            "hints_age": max((t["age"] for t in hints), default=0.0),
            "hints_stored": sum(t["stored"] for t in hints),
            "hints_delivered": sum(t["delivered"] for t in hints),
            "hints_dropped": sum(t["dropped"] for t in hints),
            "merkle_drift": self.digests.drift,
            "waiting_partitions": len(self.pull_first.partitions()),
        }

    def _holds(self, partition: int) -> bool:
        digests = self.digests
        return (REGISTERS, partition) in digests.damaged or digests.total(REGISTERS, partition) != 0

    def now(self) -> int:
        """Wall time in microseconds."""
        return self._env.clock.time_ns() // 1000

    # -- driving

    async def run(
        self,
        steps: Steps[T],
        rest: Resting | None = None,
        *,
        attempts: Sequence[float] = (TIMEOUT,),
    ) -> T:
        """Drive a protocol to its end; raises what it raises.

        A call that is not answered within the first of `attempts` (seconds) is made again with the
        next one; all calls of these protocols may be made twice.
        """
        send: Any = None
        error: DfsError | None = None
        try:
            while True:
                try:
                    effect = steps.throw(error) if error is not None else steps.send(send)
                except StopIteration as e:
                    result: T = e.value
                    return result
                send = error = None
                try:
                    if isinstance(effect, Rest):
                        if rest is not None:
                            await rest(effect.size, effect.backlog)
                    else:
                        send = await self._execute(effect, attempts)
                except DfsError as e:
                    error = e
        finally:
            steps.close()

    async def _call(self, call: Call, attempts: Sequence[float]) -> Any:
        for timeout in attempts:
            try:
                result, _ = await self._env.rpc.call(
                    self.get_map().address(METADATA, call.node),
                    call.method,
                    (self.me, *call.args),
                    timeout=timeout,
                    priority=Priority.BACKGROUND,
                    epoch=call.epoch,
                )
            except DeadlineExceeded:
                if timeout == attempts[-1]:
                    raise
            else:
                return result
        raise ValueError("no attempts")

    async def _execute(self, effect: Any, attempts: Sequence[float]) -> Any:
        if isinstance(effect, Call):
            return await self._call(effect, attempts)
        if isinstance(effect, Merge):
            return await self._merge(effect)
        if isinstance(effect, Purge):
            kind = DISCARD if effect.ghosts else PURGE
            there = [self.store.get(row) is not None for row, _ in effect.items]
            replies = await self._submit([(kind, row, wanted) for row, wanted in effect.items])
            return [not was or bool(reply) for was, reply in zip(there, replies, strict=True)]
        if isinstance(effect, Settle):
            return await self._submit([(SETTLE, *item) for item in effect.items])
        if isinstance(effect, Write):
            await self._submit([(RAW, tuple(effect.ops))])
            return None
        if isinstance(effect, Correct):
            return await self._correct(effect)
        if isinstance(effect, Accept):
            await self.store.accept_losses(effect.first, effect.last)
            return None
        raise TypeError(f"no such effect: {effect!r}")

    async def _merge(self, effect: Merge) -> int:
        if not effect.items:
            await self.store.sync()
            return 0
        if effect.table == BLOBS:
            return await self.blobs.merge(effect.items)
        await self._submit([(MERGE, row, register) for row, register in effect.items])
        return len(effect.items)

    async def _correct(self, effect: Correct) -> None:
        def make() -> list[Op]:
            where = effect.table, effect.partition
            if effect.errors is None:
                return self.digests.replace_lost(*where)
            return self.digests.correct(*where, effect.errors)

        if effect.table == REGISTERS:
            await self._submit([(RAW, make)])
        else:
            await self.blobs.change_digests(make)

    async def _submit(self, requests: Sequence[Request]) -> list[Any]:
        replies = await self.writer.write(requests)
        for reply in replies:
            if isinstance(reply, DfsError):
                raise reply
        return replies

    async def push(self, partitions: Sequence[int], to: int, rest: Resting) -> Outcome:
        """Give a new home all of some partitions; it has those that are not in `failed`."""
        steps = self.antientropy.push_partitions(partitions, to, self.now())
        return await self.run(steps, rest, attempts=ATTEMPTS)

    # -- answering

    def handlers(self) -> dict[str, Handler]:
        """For the node's dispatch table; see `dfs.wire.messages`."""
        found: dict[str, Handler] = {
            "hints.list": self._list_hints,
            "hints.drop": self._drop_hints,
            "hints.deliver": self._serve(self._take_hints),
        }
        for name in ("sync.totals", "sync.buckets", "sync.keys", "sync.items", "sync.push"):
            found[name] = self._serve(partial(self._answer, name))
        for name in ("tomb.prepare", "tomb.purge"):
            found[name] = self._serve(partial(self._purge, name))
        return found

    def _serve(self, begin: Callable[..., Steps[tuple[Any, ...]]]) -> Handler:
        """A handler that drives a protocol; it learns of newer maps first, and counts as work."""

        async def answer(ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
            try:
                return await self.run(begin(ctx.epoch, *args)), b""
            except (TypeError, ValueError, IndexError) as e:
                raise InvalidArgument(f"malformed request: {e}") from e

        keeper = self.get_map
        if isinstance(keeper, MapKeeper):  # the protocols compare epochs themselves
            return keeper.guard(answer, lambda _: ())
        return answer

    def _answer(self, method: str, epoch: int, sender: int, *args: Any) -> Steps[tuple[Any, ...]]:
        if method == "sync.push":
            return self._take_push(epoch, sender, *args)
        return self.antientropy.handle(method, sender, epoch, args, self.now())

    def _take_push(
        self, epoch: int, sender: int, table: int, items: Sequence[Item], sent: int
    ) -> Steps[tuple[Any, ...]]:
        """What others push is refused on a disk that fills up, but for deletes: they free space."""

        def take(some: Sequence[Item]) -> Steps[tuple[Any, ...]]:
            return self.antientropy.handle(
                "sync.push", sender, epoch, (table, some, sent), self.now()
            )

        deletes = [item for item in items if table == REGISTERS and is_tombstone(item[1])]
        size = sum(len(value) for _, value in items) - sum(len(value) for _, value in deletes)
        try:
            if size:
                self.admit_move(size)
        except DiskFull:
            if deletes:
                yield from take(deletes)
            raise
        return (yield from take(items))

    def _purge(self, method: str, epoch: int, sender: int, *args: Any) -> Steps[tuple[Any, ...]]:
        return self.tombstones.handle(method, sender, epoch, args)

    def _take_hints(self, epoch: int, sender: int, items: Any) -> Steps[tuple[Any, ...]]:
        deletes = [item for item in items if is_tombstone(item[1])]
        size = sum(len(item[1]) for item in items) - sum(len(item[1]) for item in deletes)
        try:
            if size:
                self.admit_move(size)
        except DiskFull:
            if deletes:
                yield from self.hints.handle(sender, epoch, deletes, self.now())
            raise
        return (yield from self.hints.handle(sender, epoch, items, self.now()))

    def _list_hints(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (tuple(self.hints.status(self.now())),), b""

    async def _drop_hints(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        (target,) = args
        if target not in self.hints.targets:
            known = ", ".join(map(str, sorted(self.hints.targets))) or "nobody"
            raise InvalidArgument(f"no hints for node {target!r} are kept here, only for {known}")
        return (await self.run(self.hints.drop(target, self.now())),), b""
