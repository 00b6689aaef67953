"""The map keeper: where a process has its cluster map from, and how it comes to know newer ones.

A newer map is taken from any member of the cluster, after it was decoded, validated and found to
belong to this cluster; nothing in a message can make an older one come back.  It is *persisted
before it is used*: a node that refused an old epoch refuses it after a restart too, which is what
makes "this node is fenced at epoch e" a statement others may build on.

Maps form a chain.  Two maps of one epoch, or a successor that does not name the map here as its
predecessor, cannot come out of the consensus; seeing one means that a disk was restored, that
somebody edited a file, or a defect.  It sets `forked`: writes are refused from then on, in words,
restarts included, until an operator has settled which map is right.  Guessing would be worse.

A *guard* around a handler compares the epoch of each request with the map here: newer means that
this node is behind and fetches the map first; older than the last change of what the request
touches is refused with `StaleEpoch`, which carries the map, so that the caller needs no other node
to learn it.  Requests that are under way while the map changes were judged by the map before, so
`fenced` counts them: it is the epoch below which nothing is being worked on here any more.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import trio

from dfs.clock import Clock
from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Buffer, Context, Deferred, Handler, Priority, Reply, Rpc
from dfs.errors import Busy, DfsError, ForkedMap, StaleEpoch, WrongCluster
from dfs.hashing import DIGEST_SIZE

log = logging.getLogger(__name__)

CATCH_UP = 2.0  # seconds a request waits for the map it was made with
ASK_EVERY = 0.25  # seconds between two rounds of asking others for the map
ASK_COUNT = 3  # of them at once
FETCH_TIMEOUT = 3.0
POLL = 5.0  # seconds between looks at a random member: a net below gossip
REMEMBERED = 64  # digests of recent epochs, to notice a fork in the past

Subscriber = Callable[[ClusterMap, ClusterMap], None]


class MapKeeper:
    """Holds the newest known map; calling the keeper returns it.

    `save` makes the encoded map durable and returns when it is; None: nothing to keep (clients).
    Without `rpc`, `clock` and `random` the keeper cannot ask others, which tests of single parts
    do not need.  `seeds` are addresses to ask besides those in the map.
    """

    def __init__(
        self,
        initial: ClusterMap,
        *,
        save: Callable[[bytes], None] | None = None,
        rpc: Rpc | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
        seeds: Sequence[str] = (),
        own: str = "",
        alarm: str = "",
        note: Callable[[str], None] | None = None,
    ) -> None:
        """Begin with `initial`, which is durable already; `own` is an address never asked.

        `note` keeps the words about a fork where the next start finds them and gives them back as
        `alarm`: a restart alone settles nothing.
        """
        self.current = initial
        self.forked = bool(alarm)
        self.alarm = alarm  # what is wrong, for people; "" when nothing is
        self._note = note
        self.behind = 0  # newest epoch heard of
        self.seeds = tuple(seeds)
        self.own = own
        self._save = save
        self._rpc = rpc
        self._clock = clock
        self._random = random
        self._digests = {initial.epoch: initial.digest}
        self._subscribers: list[Subscriber] = []
        self._switched = trio.Event()
        self._asked_at = float("-inf")
        self._working: dict[int, int] = {}  # map epoch -> requests admitted under it, still running

    def __call__(self) -> ClusterMap:
        """The newest map known here."""
        return self.current

    # ---------------------------------------------------------------------------------- learning

    def offer(self, new: ClusterMap | Buffer) -> bool:
        """Take a map that somebody has; whether it became the current one.

        Raises `Corrupt`, `WrongVersion` or `WrongCluster` for what is no map of this cluster,
        `ForkedMap` when it contradicts the chain (and refuses writes from then on), and what `save`
        raises: then the old map stays.
        """
        old = self.current
        if not isinstance(new, ClusterMap):
            if bytes(new[-DIGEST_SIZE:]) == old.digest:
                return False
            new = ClusterMap.decode(new)
        if new.cluster_id != old.cluster_id:
            raise WrongCluster(
                f"a map of cluster {new.cluster_id.hex()} was offered to a member of "
                f"{old.cluster_id.hex()}: some address leads to another cluster"
            )
        self._check_chain(new)
        if new.epoch <= old.epoch:
            return False
        if self._save is not None:
            self._save(new.encode())
        self.current = new
        self._digests[new.epoch] = new.digest
        self._digests.setdefault(new.epoch - 1, new.prev_hash)
        while len(self._digests) > REMEMBERED:
            del self._digests[min(self._digests)]
        log.info("cluster map of epoch %d (was %d)", new.epoch, old.epoch)
        switched, self._switched = self._switched, trio.Event()
        switched.set()
        for subscriber in tuple(self._subscribers):
            subscriber(old, new)
        return True

    def heard(self, epoch: int, map_digest: bytes, source: str = "") -> bool:
        """Somebody says which map it has; whether that one is newer than the one here.

        Another map of an epoch that is known here sets `forked`; it raises nothing, because what
        carries such news (gossip, pings) must not fail for it.
        """
        known = self._digests.get(epoch)
        if known is not None and map_digest and known != map_digest:
            self._fork(epoch, map_digest, source)
        self.behind = max(self.behind, epoch)
        return epoch > self.current.epoch

    def learn(self, error: DfsError) -> bool:
        """Take the map out of a `StaleEpoch`; whether it was newer, so that a retry makes sense.

        What is wrong with such a map is logged, not raised: the caller already has an error.
        """
        if not isinstance(error, StaleEpoch) or not error.details:
            return False
        data = error.details[0]
        if not isinstance(data, bytes | bytearray | memoryview):
            return False
        try:
            return self.offer(data)
        except DfsError as e:
            log.warning("the map that came with %r is not usable: %s", str(error), e)
            return False

    def subscribe(self, fn: Subscriber) -> Callable[[], None]:
        """Call `fn(old, new)` after each switch, from the loop; returns what ends it.

        `fn` must not raise.
        """
        self._subscribers.append(fn)
        return lambda: self._subscribers.remove(fn)

    def _check_chain(self, new: ClusterMap) -> None:
        if not self.rule_one_chain(new):
            self._fork(new.epoch, new.digest, "")
            raise ForkedMap(self.alarm)

    def rule_one_chain(self, new: ClusterMap) -> bool:
        """Whether a map agrees with every map known here, as both name their predecessors."""
        digests = self._digests
        return (
            digests.get(new.epoch, new.digest) == new.digest
            and digests.get(new.epoch - 1, new.prev_hash) == new.prev_hash
        )

    def _fork(self, epoch: int, other: bytes, source: str) -> None:
        here = self._digests.get(epoch, b"").hex()[:16] or "none"
        text = (
            f"two different cluster maps of epoch {epoch} exist: {here} here, {other.hex()[:16]} "
            f"{'at ' + source if source else 'elsewhere'}. Writes are refused. Find out which one "
            "most voters have (`dfs cluster map --history` shows the digests that they agreed on). "
            "Stop every node that says this, remove its file `fork`, where the map is the other "
            "one its file `map` too, and start it again"
        )
        if not self.forked:
            log.error("%s", text)
            self.forked, self.alarm = True, text
            if self._note is not None:
                try:
                    self._note(text)
                except (DfsError, OSError) as e:  # it is forked all the same, until a restart
                    log.error("the fork cannot be noted on the disk: %s", e)  # noqa: TRY400 - no traceback: the disk's fault

    # ---------------------------------------------------------------------------------- catching up

    async def fetch(self, address: str, *, timeout: float = FETCH_TIMEOUT) -> bool:
        """Ask one node for its map; whether it was newer.  Raises the call's or `offer`'s error."""
        if self._rpc is None:
            return False
        (data,), _ = await self._rpc.call(
            address, "map.get", (), timeout=timeout, priority=Priority.HIGH
        )
        return self.offer(data)

    async def wait_for(self, epoch: int) -> ClusterMap:
        """Wait until the map is of `epoch` at least; asks nobody."""
        while self.current.epoch < epoch:
            await self._switched.wait()
        return self.current

    async def catch_up(
        self, epoch: int, addresses: Iterable[str] = (), *, timeout: float = CATCH_UP
    ) -> None:
        """Ask `addresses` and then other members until the map is of `epoch` at least.

        Raises `Busy` after `timeout` seconds.  Any number of callers share what is asked.
        """
        self.behind = max(self.behind, epoch)
        first = list(addresses)
        with trio.move_on_after(timeout):
            while self.current.epoch < epoch:
                self._ask(first)
                first = []
                switched = self._switched
                with trio.move_on_after(ASK_EVERY):
                    await switched.wait()
        if self.current.epoch < epoch:
            raise Busy(
                f"this node has the cluster map of epoch {self.current.epoch} and cannot get the "
                f"one of epoch {epoch}, which the request was made with; try again"
            )

    def _ask(self, first: list[str]) -> None:
        """Send a round of `map.get`, unless one is under way."""
        if self._rpc is None or self._clock is None or self._random is None:
            return
        now = self._clock.monotonic()
        if now < self._asked_at + ASK_EVERY and not first:
            return
        self._asked_at = now
        for address in (first + self._others())[: max(ASK_COUNT, len(first))]:
            self._rpc.request(
                address,
                "map.get",
                timeout=FETCH_TIMEOUT,
                on_reply=self._answered,
                priority=Priority.HIGH,
            )

    def _others(self) -> list[str]:
        """Addresses to ask: a voter first, who are the first to know, then anybody."""
        assert self._random is not None  # noqa: S101 - the caller checked
        nodes = self.current.nodes
        voters = [n.metadata_addr for n in nodes if n.number in self.current.voters]
        rest = [n.metadata_addr or n.chunk_addr for n in nodes]
        rest += self.seeds
        self._random.shuffle(voters)
        self._random.shuffle(rest)
        found = dict.fromkeys((*voters[: ASK_COUNT - 1], *rest))
        found.pop(self.own, None)
        return list(found)

    def _answered(self, answer: tuple[Any, Buffer] | DfsError) -> None:
        if isinstance(answer, DfsError):
            log.debug("asked for the map: %s", answer)
            return
        try:
            self.offer(answer[0][0])
        except (DfsError, IndexError, TypeError) as e:
            log.warning("a map that was asked for is not usable: %s", e)

    async def poll(self, every: float = POLL) -> None:
        """Until cancelled: ask a random member for its map now and then."""
        assert self._random is not None  # noqa: S101 - who polls gave a source of randomness
        while True:
            await trio.sleep(self._random.uniform(0.5, 1.5) * every)
            addresses = self._others()
            if not addresses:
                continue
            try:
                await self.fetch(self._random.choice(addresses))
            except ForkedMap:
                pass  # noted and told by `offer`
            except DfsError as e:
                log.debug("asked for the map: %s", e)

    # ------------------------------------------------------------------------------------ fencing

    @property
    def fenced(self) -> int:
        """Epoch of the map by which every request that is being worked on here was judged."""
        return min((*self._working, self.current.epoch))

    @contextmanager
    def admitted(self) -> Iterator[ClusterMap]:
        """Work of this node's own that depends on the map, as `fenced` has to know of it."""
        epoch = self._enter()
        try:
            yield self.current
        finally:
            self._leave(epoch)

    def _enter(self) -> int:
        epoch = self.current.epoch
        self._working[epoch] = self._working.get(epoch, 0) + 1
        return epoch

    def _leave(self, epoch: int) -> None:
        left = self._working[epoch] - 1
        if left:
            self._working[epoch] = left
        else:
            del self._working[epoch]

    def _follow(self, made: Deferred, epoch: int) -> Deferred:
        """An answer that comes later, counted until it is there."""
        outer = Deferred()

        def answered(answer: Reply | Exception) -> None:
            self._leave(epoch)
            outer.answer(answer)

        made.bind(answered)
        return outer

    def check(
        self, epoch: int, partitions: Iterable[int], role: str = METADATA, *, writes: bool = True
    ) -> None:
        """Refuse a request of `epoch` (0 = none given) that touches `partitions`.

        Raises `StaleEpoch` with the map, `Busy` for writes while the maps are forked.
        """
        if writes and self.forked:
            raise Busy(self.alarm)
        current = self.current
        if not epoch or epoch >= current.epoch:
            return
        for partition in partitions:
            changed = current.last_change(role, partition)
            if self.rule_stale(epoch, changed):
                raise stale(current, epoch, changed)

    def rule_stale(self, epoch: int, changed: int) -> bool:
        """A caller that does not know the last change of the homes counts the wrong ones."""
        return epoch < changed

    def guard(
        self,
        handler: Handler,
        partitions_of: Callable[[tuple[Any, ...]], Iterable[int]],
        *,
        role: str = METADATA,
        writes: bool = True,
    ) -> Handler:
        """`handler`, called only for requests that this map and the caller's agree about.

        `partitions_of(args)` names the partitions a request touches; it may raise what is wrong
        with the arguments.  Plain functions stay plain as long as nothing has to be awaited.
        """

        def guarded(ctx: Context, args: tuple[Any, ...], data: memoryview) -> Any:
            if ctx.epoch > self.current.epoch:
                return late(ctx, args, data)
            if self.forked or ctx.epoch < self.current.epoch:
                self.check(ctx.epoch, partitions_of(args), role, writes=writes)
            epoch = self._enter()
            made: Any = ()
            try:
                made = handler(ctx, args, data)
            finally:
                if isinstance(made, tuple):
                    self._leave(epoch)
            if isinstance(made, tuple):
                return made
            if isinstance(made, Deferred):
                return self._follow(made, epoch)
            return _Admitted(self, made, epoch)

        async def late(ctx: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
            await self.catch_up(ctx.epoch)
            return await settled(guarded(ctx, args, data))

        return guarded

    # ------------------------------------------------------------------------------------- status

    def errors(self) -> list[tuple[str, int]]:
        """For the `errors` of `node.status`."""
        found = [(self.alarm, 1)] if self.forked else []
        if self.behind > self.current.epoch:
            found.append((f"the map is of epoch {self.current.epoch}, others have newer ones", 1))
        return found


async def settled(made: Any) -> Reply:
    """Wait for what a handler returned, whatever it is: a reply, a `Deferred` or an awaitable."""
    if isinstance(made, Deferred):
        done = trio.Event()
        found: list[Reply | Exception] = []

        def answered(answer: Reply | Exception) -> None:
            found.append(answer)
            done.set()

        made.bind(answered)
        await done.wait()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]
    reply: Reply = made if isinstance(made, tuple) else await made
    return reply


class _Admitted:
    """The coroutine of a handler, counted until it has ended; a server may also close it unrun."""

    __slots__ = ("_epoch", "_keeper", "_made")

    def __init__(self, keeper: MapKeeper, made: Any, epoch: int) -> None:
        self._keeper = keeper
        self._made = made
        self._epoch = epoch

    def __await__(self) -> Generator[Any, Any, Reply]:
        """Await the handler."""
        try:
            reply: Reply = yield from self._made.__await__()
            return reply
        finally:
            self._keeper._leave(self._epoch)

    def close(self) -> None:
        """Drop a handler that was not started."""
        self._made.close()
        self._keeper._leave(self._epoch)


def stale(current: ClusterMap, epoch: int, changed: int) -> StaleEpoch:
    """The refusal of a request of `epoch`, with the map that the caller lacks."""
    return StaleEpoch(
        f"epoch {epoch} is older than the last change of the homes, in epoch {changed}: "
        "the newer map comes with this error",
        current.encode(),
    )
