"""A session: one client's standing at one volume, and the loop that keeps its view true.

Concurrency contract.  Everything runs on one trio loop, so code between two awaits is atomic.
Three tasks serve a session: *commit* (`dfs.client.committer`: the only one that changes the volume,
one request in flight), *watch* (long poll; also the session's beat, and the only one that opens and
reopens) and *sync* (confirmed reads on demand).  All three hand journal entries to the `Feed`,
which applies them in order; a fourth looks why commits wait when they do.  An operation is a pure
function on a `Txn` of the view and may be run any number of times.

The view is *fresh* while the last confirmed answer was asked for less than 1.5 s ago, or 12 s while
the session holds the volume's delegation (`dfs.client.delegation`): then nobody else can change it,
and operations are committed here first.  A view that is not fresh answers nothing: operations wait
for freshness until the deadline, then EIO.

The module is longer than most because watch, sync and the operations share one state, and their
order is the point.
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import trio

from dfs import ids
from dfs.client.capacity import stalled_by_disks
from dfs.client.committer import ATTEMPT, STALLED, Committer
from dfs.client.connect import Cluster
from dfs.client.delegation import LEASE
from dfs.client.feed import Entries, Feed
from dfs.client.freshness import FRESH, Freshness
from dfs.client.homes import Homes
from dfs.client.submission import Submission, Waiter
from dfs.client.writers import Writers
from dfs.errors import DfsError, Fenced, FsError, InUse, InvalidArgument, NotFound
from dfs.volume import entries
from dfs.volume.localtxn import LocalTxn
from dfs.volume.tree import Missing
from dfs.volume.view import NodeCache, Txn, View

log = logging.getLogger(__name__)

T = TypeVar("T")
WATCH_WAIT = 0.5  # seconds the home may hold a watch
FRAME = 0.02  # seconds between watches while there is news
QUIET = 0.05  # seconds between watches that bring nothing new
DEADLINE = 30.0  # seconds until an operation gives up with EIO
ALIVE = 1.0  # seconds after we asked: a session heard of later than that has not just died

NOBODY = (0, 0, False)  # holds the delegation: what an answer says that does not tell

OnChange = Callable[[Sequence[bytes] | None], None]


class Session:
    """One client's session at one volume.

    `view` is the volume as this session knows it, `params` the volume's genesis parameters, `sid`
    the session's id (it changes when the session is replaced after a loss).  `mode` is "rw" or
    "ro".

    An *exclusive* session is the only one that writes, so whoever uses it may keep what it writes
    for longer than the session knows of.  Hence it is not replaced when it is lost: what is written
    later could undo what others did in between.  Every operation fails from then on.
    """

    def __init__(
        self,
        cluster: Cluster,
        volume: bytes,
        *,
        mode: str = "rw",
        name: str = "",
        deadline: float = DEADLINE,
        delegate: bool = False,
    ) -> None:
        """Prepare; `run` opens it.  `delegate`: ask for the volume's delegation when it is busy.

        `mode`: "rw", "ro", or "rwx" for an exclusive session that reads and writes.
        """
        self.cluster = cluster
        self.volume = volume
        self.exclusive = mode == "rwx"
        self.mode = "rw" if self.exclusive else mode
        self.name = name
        self.deadline = deadline
        self.sid: ids.SessionId = 0
        self.params: dict[str, Any] = {}
        self._clock = cluster.clock
        self._minted = 0
        self.generation = 0  # counts opens; answers to an older generation are dropped
        self.over = True  # until the next open
        self._closing = False
        self._freshness = Freshness(self._clock)
        self.homes = Homes(cluster, volume)
        self._feed = Feed(cluster.blobs, volume, self._known, self._note, deadline)
        self._sync_work = trio.lowlevel.ParkingLot()
        self._sync_waiters: list[Waiter] = []
        self._on_change: list[OnChange] = []
        self._on_fenced: list[Callable[[bool, set[int]], None]] = []
        self._on_closed: list[Callable[[Sequence[int]], None]] = []
        self._writers = Writers()
        self._committer = Committer(self, delegate=delegate)
        self._delegation = self._committer.delegation
        self._opens = 0

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open, report started, then serve until cancelled.

        Raises what the first open raises: `VolumeNotFound`/`NotFound`, `InUse` when a session that
        lives keeps this one out, or `FsError`: EIO when no home answers within the deadline, ENOSPC
        when the homes' disks are full.
        """
        await self._open(self._clock.monotonic() + self.deadline)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_loop)
            nursery.start_soon(self._committer.run)
            nursery.start_soon(self._committer.explain)
            nursery.start_soon(self._sync_loop)

    async def close(self) -> None:
        """Tell the home that the session ends; best effort, the home also notices silence."""
        if self.over:
            return
        self._closing = True
        with contextlib.suppress(DfsError):
            await self.homes.ask("vol.close", (self.volume, self.sid), timeout=ATTEMPT)

    def on_change(self, fn: OnChange) -> None:
        """Call `fn(keys)` after others' effects were applied; None = anything may differ."""
        self._on_change.append(fn)

    def on_fenced(self, fn: Callable[[bool, set[int]], None]) -> None:
        """Call `fn(held, inos)` when the session was lost; a new one is opened by itself.

        `held`: it had the delegation.  `inos`: inodes with acknowledged changes that are lost,
        because they were not committed.
        """
        self._on_fenced.append(fn)

    def on_closed(self, fn: Callable[[Sequence[int]], None]) -> None:
        """Call `fn(sids)` when the journal says that sessions ended."""
        self._on_closed.append(fn)

    @property
    def view(self) -> View:
        """The volume as this session knows it."""
        return self._feed.view

    @property
    def nodes(self) -> NodeCache:
        """The cache of the view's tree nodes; may be replaced by one of another size."""
        return self._feed.nodes

    @nodes.setter
    def nodes(self, nodes: NodeCache) -> None:
        self._feed.nodes = self._feed.view.nodes = nodes

    async def fetch(self, hashes: Sequence[bytes]) -> None:
        """Get tree nodes into the cache; raises `FsError` EIO when one cannot be had."""
        await self._feed.fetch(hashes)

    async def keep_warm(self) -> None:
        """Fetch tree nodes before anybody asks for them, until cancelled; see `warmup`."""
        await self._feed.warmup.run()

    async def wait_warm(self) -> None:
        """Until `keep_warm` has fetched what it wants of a volume that was just opened."""
        await self._feed.warmup.wait_warm()

    @property
    def fresh(self) -> bool:
        """Whether the view may answer right now."""
        return self._freshness.now

    @property
    def alone(self) -> bool:
        """Whether this is known to be the only session that writes."""
        held = self._delegation
        return not self.over and (held.sole if held.held else self._writers.only(self.sid))

    @property
    def last(self) -> bool:
        """Whether no other session is open for writing, not even a silent one."""
        return not self.over and self._writers.only(self.sid)

    @property
    def here(self) -> bool:
        """Whether operations are committed here now, and sent later."""
        return self._delegation.held and not self._delegation.recalled and self._freshness.now

    @property
    def full(self) -> str:
        """Why nothing can be committed: too few homes have room on their disks; "" if they do."""
        return self._committer.full

    def mint_ino(self) -> ids.Ino:
        """A fresh inode number; never used before and never again."""
        if self._minted >= (1 << ids.COUNTER_BITS) - 1:
            if self.exclusive:
                raise FsError(
                    "all inode numbers of the session are used: mount again", errno.ENOSPC
                )
            self.lose("the session has used up its inode numbers")  # the next one has new ones
        self._minted += 1
        return ids.first_ino(self.sid) + self._minted

    def statistics(self) -> dict[str, Any]:
        """Counters and the present state, for people."""
        return {
            **self._committer.counts,
            "opens": self._opens,
            "delegation": self._delegation.epoch,
            "pending": self._delegation.pending,
            "fetched": self._feed.fetched,
            "warmed": self._feed.warmup.fetched,
            "sid": self.sid,
            "seq": self.view.seq,
            "owner": self.homes.owner,
            "age": round(self._freshness.age, 3),
        }

    # ------------------------------------------------------------------ operations

    async def read(self, op: Callable[[Txn], T]) -> T:
        """Run a read-only operation on a fresh view; at most 1.5 s old, no round trip.

        Does not yield to other tasks when the view is fresh and all tree nodes are cached.
        """
        give_up = 0.0
        while True:
            if not self._freshness.now:
                give_up = give_up or self._clock.monotonic() + self.deadline
                await self._wait_fresh(give_up)
            try:
                return op(LocalTxn(self._feed.view))
            except Missing as e:
                await self._feed.fetch(e.hashes)

    async def transact(self, op: Callable[[Txn], T], *, oldest: int = 0, kept: bool = False) -> T:
        """Run a mutating operation and commit it; returns once a majority holds it.

        While the session holds the delegation it returns at once, without yielding unless tree
        nodes are missing or too much is pending; `settle` then waits for the majority.

        `op` is pure and is run again after a conflict.  A `DfsError` that it raises is only raised
        here once the home has confirmed that what the operation read is still so.  Raises `FsError`
        EIO when no quorum answered until the deadline, ENOSPC when the homes' disks are full.
        `oldest`: when the first of the chunks that the effects rely on was sent
        (`Clock.elapsed_ns`), 0 if there are none.  `kept`: the caller keeps what it
        commits, and commits it again after an error; so it may be told ENOSPC before it is known
        whether it was committed.
        """
        held = self._delegation
        give_up = 0.0
        conflicts = 0
        while True:
            if not self._freshness.now:
                give_up = give_up or self._clock.monotonic() + self.deadline
                await self._wait_fresh(give_up)
            if held.held:
                if held.recalled or held.crowded:
                    give_up = give_up or self._clock.monotonic() + self.deadline
                    await self._wait_turn(give_up)
                    continue
                local = LocalTxn(self._feed.view)
                try:
                    result = op(local)
                except Missing as e:
                    await self._feed.fetch(e.hashes)
                    continue
                self._commit_here(local, oldest)
                return result
            give_up = give_up or self._clock.monotonic() + self.deadline
            txn = self.view.begin()
            error: DfsError | None = None
            try:
                result = op(txn)
            except Missing as e:
                await self._feed.fetch(e.hashes)
                continue
            except DfsError as e:
                error = e
                txn.effects.clear()
            if txn.effects and self.mode != "rw":
                raise FsError("volume is mounted read-only", errno.EROFS)
            submission: Submission = Submission(txn, oldest, kept=kept)
            self._committer.submit(submission)
            if await submission.wait():
                if error is not None:
                    raise error
                return result
            conflicts += 1
            self._committer.counts["conflicts"] += 1
            if self._clock.monotonic() > give_up:
                raise FsError(f"{conflicts} conflicts on volume {self.volume.hex()}", errno.EIO)
            if conflicts > 4:  # others are faster than our round trip: spread out
                await trio.sleep(self.cluster.random.uniform(0, 0.002 * min(conflicts, 50)))

    def transact_here(
        self, op: Callable[[Txn], T], *, oldest: int = 0, settling: bool = False
    ) -> tuple[T] | None:
        """`transact` without a wait, for who holds the delegation; None where that cannot be.

        Raises what `op` raises.  `settling`: the caller waits for it (`settle`) in the same step.
        """
        if not self.here or self._delegation.crowded:
            return None
        txn = LocalTxn(self._feed.view)
        try:
            result = op(txn)
        except Missing:
            return None  # whoever may wait will fetch it
        self._commit_here(txn, oldest, wake=not settling)
        return (result,)

    def _commit_here(self, txn: LocalTxn, oldest: int, *, wake: bool = True) -> None:
        """Commit under the delegation."""
        if txn.changes or txn.ranges:
            self._delegation.commit(self._feed.view, txn, oldest, self._clock.monotonic())
            if wake:
                self._committer.wake()

    async def settle(self) -> None:
        """Wait until a majority holds all that was committed here.

        Raises `FsError` EIO, or ENOSPC when the homes' disks are full: it is kept then, and
        committed once there is room.
        """
        await self._committer.settle()

    def hasten(self) -> None:
        """Somebody is about to `settle`: send what was done here, if nothing is on its way."""
        self._committer.hasten()

    @property
    def calm(self) -> float:
        """Seconds since somebody last waited for stable storage."""
        return self._clock.monotonic() - self._committer.settled_at

    async def refresh(self) -> None:
        """Wait until the view holds everything that was committed before this call."""
        if self._delegation.sole and self._freshness.now:
            return
        self._committer.looked()
        waiter = Waiter()
        self._sync_waiters.append(waiter)
        self._sync_work.unpark_all()
        await waiter.wait()

    async def _wait_turn(self, give_up: float) -> None:
        """Wait until the delegation is given back, or less is pending."""
        held = self._delegation
        with trio.move_on_at(give_up):
            while held.recalled or held.crowded:
                if self.full:
                    raise FsError(f"no space left: {self.full}", errno.ENOSPC)
                await held.wait_change()
            return
        raise FsError(self.homes.no_quorum(self.deadline), errno.EIO)

    async def _wait_fresh(self, give_up: float) -> None:
        if not await self._freshness.wait(give_up):
            if self.exclusive and self.over:
                raise FsError("the exclusive session is over: mount again", errno.EIO)
            raise FsError(self.homes.no_quorum(self.deadline), errno.EIO)

    # ------------------------------------------------------------------ entries

    async def absorb(self, received: Entries) -> None:
        """Apply entries that came from a home."""
        if await self._feed.absorb(received):
            self._freshness.wake()

    def _known(self, entry: entries.Entry, seq: int) -> bool:
        if self._committer.confirm(entry, seq):
            return True
        if entry.kind == entries.DATA and self._delegation.batches:
            self.lose("somebody else changed the volume under its delegation")
        return False

    def _note(self, entry: entries.Entry, changed: list[bytes]) -> None:
        if entry.kind == entries.DATA:
            if changed and any(part[0] != self.sid for part in entry.body[0]):
                for fn in self._on_change:
                    fn(changed)
            return
        self._writers.note(entry)
        ended = entries.closed(entry)
        if self.sid in ended:
            self.lose("the volume's home closed it")
        if ended:
            for told in self._on_closed:
                told(ended)

    def heard(self, asked_at: float, owner: int | None, state: tuple[int, int, bool]) -> None:
        """Note a confirmed answer to a question asked at `asked_at`; `state`: the delegation."""
        self.homes.heard(owner)
        if self.over:
            return
        renewed = self._committer.hear(*state)
        if not self.over and (renewed or not self._delegation.held):
            self._freshness.confirm(asked_at)

    def lease(self, asked_at: float, owner: int | None) -> None:
        """The delegation was granted, in answer to a question asked at `asked_at`."""
        self.homes.heard(owner)
        self._freshness.limit = LEASE
        self._freshness.confirm(asked_at)

    def end_lease(self) -> None:
        """The delegation is on its way back."""
        self._freshness.limit = FRESH

    def returned(self) -> None:
        """The delegation was given back: others may have changed something already, so look."""
        self._freshness.lose()
        self._sync_waiters.append(Waiter())
        self._sync_work.unpark_all()

    async def wait_news(self) -> None:
        """Until the view has moved, or was confirmed."""
        await self._freshness.wait_news()

    # ------------------------------------------------------------------ open and loss

    async def _open(self, give_up: float) -> None:
        """Open the session, or raise why it cannot be: that is known soon if disks are full."""
        answer: tuple[float, Any] | DfsError

        async def ask(scope: trio.CancelScope) -> None:
            nonlocal answer
            try:
                answer = await self._ask_open(give_up)
            except DfsError as e:
                answer = e
            scope.cancel()

        async def look(scope: trio.CancelScope) -> None:
            nonlocal answer
            full = ""
            while not full:
                await trio.sleep(STALLED)
                full = await stalled_by_disks(self.cluster, self.volume)
            answer = FsError(f"no space left: {full}", errno.ENOSPC)
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, nursery.cancel_scope)
            nursery.start_soon(look, nursery.cancel_scope)
        if isinstance(answer, DfsError):
            raise answer
        asked_at, (sid, seq, base, root, tail, owner, params) = answer
        self.params = dict(params)
        self._writers.forget()
        self._feed.start(root, base, self.params["salt"])
        self.generation += 1
        self._opens += 1
        self.sid, self._minted = sid, 0
        self.over = False
        await self.absorb(tail)
        if self.view.seq >= seq:
            self.heard(asked_at, owner, NOBODY)
        else:  # a long tail comes in parts: the watch task fetches the rest, then we are up to date
            self.homes.heard(owner)
        self._committer.began()
        self._sync_work.unpark_all()
        if self.generation > 1:
            for fn in self._on_change:
                fn(None)

    async def _ask_open(self, give_up: float) -> tuple[float, Any]:
        """(when the question was asked that was answered, the answer)."""
        nonce = self.cluster.random.randbytes(16)
        mode = "rwx" if self.exclusive else self.mode
        attempt, began = 0, self._clock.monotonic()
        while True:
            asked_at = self._clock.monotonic()
            try:
                return asked_at, await self.homes.ask(
                    "vol.open", (self.volume, mode, nonce, self.name), timeout=2 * ATTEMPT
                )
            except (NotFound, InvalidArgument):
                raise
            except DfsError as e:
                late = self._clock.monotonic() > give_up
                if isinstance(e, InUse) and (late or self._alive(e, began)):
                    raise
                if late:
                    raise FsError(
                        f"{self.homes.no_quorum(self.deadline)}; last: {e}", errno.EIO
                    ) from e
                attempt += 1
                await self.homes.pause(attempt)

    def _alive(self, e: InUse, began: float) -> bool:
        """Whether the session that keeps us out was heard of since we asked; else it may be dead.

        The home closes it for us when it was silent for longer than any delegation lasts.
        """
        silence = e.details[1] if len(e.details) > 1 else None
        return silence is not None and self._clock.monotonic() - silence > began + ALIVE

    def lose(self, why: str, generation: int = 0) -> None:
        """The session is over; the watch task opens the next one, unless it was exclusive.

        `generation`: what the session was when the question was asked whose answer says so; that
        answer is no news when the next one is open already.
        """
        if self.over or self._closing or generation not in (0, self.generation):
            return
        log.warning("session %x at volume %s is over: %s", self.sid, self.volume.hex(), why)
        self.over = True
        self._freshness.lose()
        if self.exclusive:
            self._freshness.end()
        self.end_lease()
        self.homes.owner = None
        held = self._delegation.held
        lost = self._committer.lost()
        for fn in self._on_fenced:
            fn(held, lost)

    # ------------------------------------------------------------------ tasks

    async def _watch_loop(self) -> None:
        attempt = 0
        while True:
            if self.over:
                if self.exclusive:
                    await trio.sleep_forever()
                try:
                    await self._open(self._clock.monotonic() + self.deadline)
                except DfsError as e:
                    log.warning("volume %s cannot be opened again: %s", self.volume.hex(), e)
                    await trio.sleep(1)
                continue
            generation, asked_at = self.generation, self._clock.monotonic()
            try:
                seq, received, reset, owner, state = await self.homes.ask(
                    "vol.watch",
                    (self.volume, self.sid, self.view.seq, WATCH_WAIT),
                    timeout=WATCH_WAIT + 1.0,
                )
                if generation == self.generation and not self.over:
                    known = self.view.seq
                    await self._follow(seq, received, reset, asked_at, owner, state)
                    if received:
                        # Frames of news rather than one answer an entry; and our own commits bring
                        # all news with their answers, no need to be told twice.
                        await trio.sleep(QUIET if known >= seq else FRAME)
                attempt = 0
            except Fenced as e:
                self.lose(str(e), generation)
            except DfsError as e:
                log.debug("watch of volume %s: %s", self.volume.hex(), e)
                attempt += 1
                await self.homes.pause(attempt)

    async def _follow(
        self,
        seq: int,
        received: Entries,
        reset: Any,
        asked_at: float,
        owner: int | None,
        state: tuple[int, int, bool],
    ) -> None:
        if reset is not None and reset[0] > self.view.seq:
            self._feed.reset(reset[1], reset[0])
            self._writers.forget()
            for fn in self._on_change:
                fn(None)
        await self.absorb(received)
        if self.view.seq >= seq:
            self.heard(asked_at, owner, state)

    async def _sync_loop(self) -> None:
        while True:
            if not self._sync_waiters:
                await self._sync_work.park()
                continue
            # Whoever arrives after the request has left needs the next one.
            waiting, self._sync_waiters = self._sync_waiters, []
            error = await self._sync(self._clock.monotonic() + self.deadline)
            for waiter in waiting:
                waiter.resolve(error or True)

    async def _sync(self, give_up: float) -> FsError | None:
        attempt = 0
        while True:
            try:
                if self.over:
                    await self._wait_fresh(give_up)
                generation, asked_at = self.generation, self._clock.monotonic()
                # A watch that does not wait is confirmed and brings the entries along.
                seq, received, reset, owner, state = await self.homes.ask(
                    "vol.watch", (self.volume, self.sid, self.view.seq, 0.0), timeout=ATTEMPT
                )
                if generation == self.generation and not self.over:
                    await self._follow(seq, received, reset, asked_at, owner, state)
                    if self.view.seq >= seq:
                        return None
            except FsError as e:
                return e
            except DfsError as e:
                log.debug("sync of volume %s: %s", self.volume.hex(), e)
                if self._clock.monotonic() > give_up:
                    return FsError(f"{self.homes.no_quorum(self.deadline)}; last: {e}", errno.EIO)
                if isinstance(e, Fenced):
                    self.lose(str(e), generation)
                attempt += 1
                await self.homes.pause(attempt)


@contextlib.asynccontextmanager
async def open_session(
    cluster: Cluster, volume: bytes, *, mode: str = "rw", name: str = "", deadline: float = DEADLINE
) -> AsyncIterator[Session]:
    """A session for the length of the block; closed at its end.

    Errors of the open and of the block are raised as they are, not wrapped in a group.
    """
    session = Session(cluster, volume, mode=mode, name=name, deadline=deadline)
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(session.run)
            yield session
        except trio.Cancelled:
            raise
        except BaseException as e:
            error = e
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(DfsError):
                await session.close()
            nursery.cancel_scope.cancel()
    if error is not None:
        raise error
