"""A session: one client's standing at one volume, and the loop that keeps its view true.

Concurrency contract.  Everything runs on one trio loop, so code between two awaits is atomic.
Three tasks serve a session: *commit* (the only sender of `vol.commit`, one request in flight),
*watch* (long poll; also the session's beat, and the only one that opens and reopens) and *sync*
(confirmed reads on demand).  All three hand journal entries to the `Feed`, which applies them in
order.  An operation is a pure function on a `Txn` of the view and may be run any number of times.
The module is longer than most because these three share one state, and their order is the point.

A *verdict* for a transaction is final.  Anything else than a verdict means "unknown", so the
identical request is sent again, to any home, until the deadline; then the session is over, because
whether its last request took effect can no longer be learned.  A new one is opened in its place.

The view is *fresh* while the last confirmed answer was asked for less than 1.5 s ago.  A
view that is not fresh answers nothing: operations wait for freshness until the deadline, then EIO.
"""

import contextlib
import errno
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import trio

from dfs import ids
from dfs.client.connect import Cluster
from dfs.client.feed import Entries, Feed
from dfs.client.freshness import Freshness
from dfs.client.homes import Homes
from dfs.client.submission import Submission, Waiter, form
from dfs.client.writers import Writers
from dfs.errors import DfsError, Fenced, FsError, InvalidArgument, NotFound
from dfs.volume import entries
from dfs.volume.tree import Missing
from dfs.volume.view import NodeCache, Txn, View

log = logging.getLogger(__name__)

T = TypeVar("T")
WATCH_WAIT = 0.5  # seconds the home may hold a watch
FRAME = 0.02  # seconds between watches while there is news
QUIET = 0.05  # seconds between watches that bring nothing new
LAZY = 0.02  # seconds that a lazy transaction waits for company
LAZY_MAX = 64  # of them that may wait
ATTEMPT = 3.0  # seconds one home is given to answer before another is asked
DEADLINE = 30.0  # seconds until an operation gives up with EIO

OnChange = Callable[[Sequence[bytes] | None], None]


class Session:
    """One client's session at one volume.

    `view` is the volume as this session knows it, `params` the volume's genesis parameters, `sid`
    the session's id (it changes when the session is replaced after a loss).  `mode` is "rw" or
    "ro".
    """

    def __init__(
        self,
        cluster: Cluster,
        volume: bytes,
        *,
        mode: str = "rw",
        name: str = "",
        deadline: float = DEADLINE,
    ) -> None:
        """Prepare; `run` opens it."""
        self.cluster = cluster
        self.volume = volume
        self.mode = mode
        self.name = name
        self.deadline = deadline
        self.sid: ids.SessionId = 0
        self.params: dict[str, Any] = {}
        self._clock = cluster.clock
        self._no = 0
        self._minted = 0
        self._generation = 0  # counts opens; answers to an older generation are dropped
        self._over = True
        self._closing = False
        self._freshness = Freshness(self._clock)
        self._homes = Homes(cluster, volume)
        self._queue: deque[Submission] = deque()
        self._feed = Feed(cluster.blobs, volume, self._note, deadline)
        self._work = trio.lowlevel.ParkingLot()  # the commit task, when it is idle
        self._sync_work = trio.lowlevel.ParkingLot()
        self._sync_waiters: list[Waiter] = []
        self._on_change: list[OnChange] = []
        self._on_fenced: list[Callable[[], None]] = []
        self._on_closed: list[Callable[[Sequence[int]], None]] = []
        self._writers = Writers()
        self._hurry = False
        self._counts = dict.fromkeys(
            ("commits", "transactions", "conflicts", "local_conflicts", "resends", "opens"), 0
        )

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open, report started, then serve until cancelled.

        Raises what the first open raises: `VolumeNotFound`/`NotFound`, or `FsError` EIO when no
        home answers within the deadline.
        """
        await self._open(self._clock.monotonic() + self.deadline)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_loop)
            nursery.start_soon(self._commit_loop)
            nursery.start_soon(self._sync_loop)

    async def close(self) -> None:
        """Tell the home that the session ends; best effort, the home also notices silence."""
        if self._over:
            return
        self._closing = True
        with contextlib.suppress(DfsError):
            await self._homes.ask("vol.close", (self.volume, self.sid), timeout=ATTEMPT)

    def on_change(self, fn: OnChange) -> None:
        """Call `fn(keys)` after others' effects were applied; None = anything may differ."""
        self._on_change.append(fn)

    def on_fenced(self, fn: Callable[[], None]) -> None:
        """Call `fn()` when the session was lost; a new one is opened by itself."""
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

    @property
    def fresh(self) -> bool:
        """Whether the view may answer right now."""
        return self._freshness.now

    @property
    def alone(self) -> bool:
        """Whether this is known to be the only session that is open for writing."""
        return self._writers.only(self.sid) and not self._over

    @property
    def solitary(self) -> bool:
        """Whether this is known to be the volume's only session, readers included."""
        return self._writers.solitary(self.sid) and not self._over

    def mint_ino(self) -> ids.Ino:
        """A fresh inode number; never used before and never again."""
        if self._minted >= (1 << ids.COUNTER_BITS) - 1:
            self._lose("the session has used up its inode numbers")  # the next one has new ones
        self._minted += 1
        return ids.first_ino(self.sid) + self._minted

    def statistics(self) -> dict[str, Any]:
        """Counters and the present state, for people."""
        return {
            **self._counts,
            "fetched": self._feed.fetched,
            "sid": self.sid,
            "seq": self.view.seq,
            "owner": self._homes.owner,
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
                return op(self.view.begin())
            except Missing as e:
                await self._feed.fetch(e.hashes)

    async def transact(self, op: Callable[[Txn], T], *, oldest: int = 0, lazy: bool = False) -> T:
        """Run a mutating operation and commit it; returns once a majority holds it.

        `op` is pure and is run again after a conflict.  A `DfsError` that it raises is only raised
        here once the home has confirmed that what the operation read is still so.  Raises `FsError`
        EIO when no quorum answered until the deadline.  `oldest`: stamp of the oldest chunk the
        effects rely on.
        """
        give_up = self._clock.monotonic() + self.deadline
        conflicts = 0
        while True:
            if not self._freshness.now:
                await self._wait_fresh(give_up)
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
            submission: Submission = Submission(txn, oldest)
            self._queue.append(submission)
            self._work.unpark_all()
            if await submission.wait():
                if error is not None:
                    raise error
                return result
            conflicts += 1
            self._counts["conflicts"] += 1
            if self._clock.monotonic() > give_up:
                raise FsError(f"{conflicts} conflicts on volume {self.volume.hex()}", errno.EIO)
            if conflicts > 4:  # others are faster than our round trip: spread out
                await trio.sleep(self.cluster.random.uniform(0, 0.002 * min(conflicts, 50)))

    def transact_behind(self, op: Callable[[Txn], T]) -> tuple[Submission, T] | None:
        """Queue a mutating operation whose answer nobody waits for; None if it cannot run now.

        It travels with the next transaction that somebody waits for, ahead of it, or alone after
        `LAZY` seconds, or when somebody is in a `hurry`.  Wait for the submission to learn whether
        it was committed.
        """
        if not self._freshness.now or self._over or self.mode != "rw":
            return None
        txn = self.view.begin()
        try:
            result = op(txn)
        except (Missing, DfsError):
            return None  # whoever waits for it will meet this again, and can handle it
        submission = Submission(txn, 0, lazy=True)
        self._queue.append(submission)
        self._work.unpark_all()
        return submission, result

    def hurry(self) -> None:
        """Somebody waits for what is queued after all."""
        if self._queue and not self._hurry:
            self._hurry = True
            self._work.unpark_all()

    async def refresh(self) -> None:
        """Wait until the view holds everything that was committed before this call."""
        waiter = Waiter()
        self._sync_waiters.append(waiter)
        self._sync_work.unpark_all()
        await waiter.wait()

    async def _wait_fresh(self, give_up: float) -> None:
        if not await self._freshness.wait(give_up):
            raise FsError(self._homes.no_quorum(self.deadline), errno.EIO)

    # ------------------------------------------------------------------ entries

    async def _absorb(self, received: Entries) -> None:
        if await self._feed.absorb(received):
            self._freshness.wake()

    def _note(self, entry: entries.Entry, changed: list[bytes]) -> None:
        kind, _, body = entry
        if kind != entries.DATA:
            self._writers.note(entry)
        if kind == entries.DATA:
            if changed and any(part[0] != self.sid for part in body[0]):
                for fn in self._on_change:
                    fn(changed)
        elif kind == entries.CLOSE:
            if self.sid in body[0]:
                self._lose("the volume's home closed it")
            for told in self._on_closed:
                told(body[0])

    def _heard(self, asked_at: float, owner: int | None) -> None:
        """Note a confirmed answer to a question asked at `asked_at`."""
        self._homes.heard(owner)
        if not self._over:
            self._freshness.confirm(asked_at)

    # ------------------------------------------------------------------ open and loss

    async def _open(self, give_up: float) -> None:
        nonce = self.cluster.random.randbytes(16)
        attempt = 0
        while True:
            asked_at = self._clock.monotonic()
            try:
                answer = await self._homes.ask(
                    "vol.open", (self.volume, self.mode, nonce, self.name), timeout=2 * ATTEMPT
                )
                break
            except (NotFound, InvalidArgument):
                raise
            except DfsError as e:
                if self._clock.monotonic() > give_up:
                    raise FsError(
                        f"{self._homes.no_quorum(self.deadline)}; last: {e}", errno.EIO
                    ) from e
                attempt += 1
                await self._homes.pause(attempt)
        sid, seq, base, root, tail, owner, params = answer
        self.params = dict(params)
        self._writers.forget()
        self._feed.start(root, base, self.params["salt"])
        self._generation += 1
        self._counts["opens"] += 1
        self.sid, self._no, self._minted = sid, 0, 0
        self._over = False
        await self._absorb(tail)
        if self.view.seq >= seq:
            self._heard(asked_at, owner)
        else:  # a long tail comes in parts: the watch task fetches the rest, then we are up to date
            self._homes.heard(owner)
        self._work.unpark_all()
        self._sync_work.unpark_all()
        if self._generation > 1:
            for fn in self._on_change:
                fn(None)

    def _lose(self, why: str) -> None:
        """The session is over; the watch task opens the next one."""
        if self._over or self._closing:
            return
        log.warning("session %x at volume %s is over: %s", self.sid, self.volume.hex(), why)
        self._over = True
        self._freshness.lose()
        self._homes.owner = None
        for fn in self._on_fenced:
            fn()
        # Transactions that never left the queue are as good as never run: run them again.
        while self._queue:
            self._queue.popleft().resolve(False)

    # ------------------------------------------------------------------ tasks

    async def _watch_loop(self) -> None:
        attempt = 0
        while True:
            if self._over:
                try:
                    await self._open(self._clock.monotonic() + self.deadline)
                except DfsError as e:
                    log.warning("volume %s cannot be opened again: %s", self.volume.hex(), e)
                    await trio.sleep(1)
                continue
            generation, asked_at = self._generation, self._clock.monotonic()
            try:
                seq, received, reset, owner = await self._homes.ask(
                    "vol.watch",
                    (self.volume, self.sid, self.view.seq, WATCH_WAIT),
                    timeout=WATCH_WAIT + 1.0,
                )
                if generation == self._generation and not self._over:
                    known = self.view.seq
                    await self._follow(seq, received, reset, asked_at, owner)
                    if received:
                        # Frames of news rather than one answer an entry; and our own commits bring
                        # all news with their answers, no need to be told twice.
                        await trio.sleep(QUIET if known >= seq else FRAME)
                attempt = 0
            except Fenced as e:
                if generation == self._generation:
                    self._lose(str(e))
            except DfsError as e:
                log.debug("watch of volume %s: %s", self.volume.hex(), e)
                attempt += 1
                await self._homes.pause(attempt)

    async def _follow(
        self, seq: int, received: Entries, reset: Any, asked_at: float, owner: int | None
    ) -> None:
        if reset is not None and reset[0] > self.view.seq:
            self._feed.reset(reset[1], reset[0])
            self._writers.forget()
            for fn in self._on_change:
                fn(None)
        await self._absorb(received)
        if self.view.seq >= seq:
            self._heard(asked_at, owner)

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
            asked_at = self._clock.monotonic()
            try:
                if self._over:
                    await self._wait_fresh(give_up)
                # A watch that does not wait is confirmed and brings the entries along.
                seq, received, reset, owner = await self._homes.ask(
                    "vol.watch", (self.volume, self.sid, self.view.seq, 0.0), timeout=ATTEMPT
                )
                if not self._over:
                    await self._follow(seq, received, reset, asked_at, owner)
                    if self.view.seq >= seq:
                        return None
            except FsError as e:
                return e
            except DfsError as e:
                log.debug("sync of volume %s: %s", self.volume.hex(), e)
                if self._clock.monotonic() > give_up:
                    return FsError(f"{self._homes.no_quorum(self.deadline)}; last: {e}", errno.EIO)
                if isinstance(e, Fenced):
                    self._lose(str(e))
                attempt += 1
                await self._homes.pause(attempt)

    async def _commit_loop(self) -> None:
        while True:
            if not self._queue or self._over:
                await self._work.park()
                continue
            if self._lingers():
                with trio.move_on_after(LAZY) as late:
                    while self._lingers():
                        await self._work.park()
                if self._over or not (late.cancelled_caught or self._queue):
                    continue
            batch, self._queue, lost = form(self._queue, self.view)
            self._hurry = self._hurry and bool(self._queue)
            for submission in lost:
                self._counts["local_conflicts"] += 1
                submission.resolve(False)
            if batch:
                await self._send(batch)

    def _lingers(self) -> bool:
        """Whether all that is queued may wait for company."""
        queue = self._queue
        return 0 < len(queue) < LAZY_MAX and not self._hurry and all(s.lazy for s in queue)

    async def _send(self, batch: list[Submission]) -> None:
        self._no += 1
        no, generation, seq = self._no, self._generation, self.view.seq
        oldest = min((s.oldest for s in batch if s.oldest), default=0)
        txns = tuple((tuple(s.txn.keys), tuple(s.txn.groups), tuple(s.txn.effects)) for s in batch)
        # Every read of the batch was just found unchanged up to the view's seq: that is its base.
        request = (self.volume, self.sid, no, seq, seq, txns, oldest)
        give_up = self._clock.monotonic() + self.deadline
        attempt = 0
        failure: DfsError
        asked_at = self._clock.monotonic()
        while True:
            if generation != self._generation or self._over:
                failure = Fenced("the session was lost while a commit was on its way")
                break
            try:
                _, seq, verdicts, received, owner = await self._homes.ask(
                    "vol.commit", request, timeout=ATTEMPT
                )
                await self._absorb(received)
            except Fenced as e:
                self._lose(str(e))
                failure = e
                break
            except InvalidArgument as e:
                failure = e
                break
            except DfsError as e:
                log.debug("commit to volume %s: %s", self.volume.hex(), e)
                if self._clock.monotonic() > give_up:
                    self._lose(f"no verdict for a commit within {self.deadline:g} s: {e}")
                    failure = e
                    break
                attempt += 1
                self._counts["resends"] += 1
                await self._homes.pause(attempt)
                continue
            self._counts["commits"] += 1
            self._counts["transactions"] += len(batch)
            while self.view.seq < seq and generation == self._generation:
                await (
                    self._freshness.wait_news()
                )  # the tail was cut: the watch task resets the view
            if True in verdicts:  # otherwise the answer says nothing about now
                self._heard(asked_at, owner)
            for submission, verdict in zip(batch, verdicts, strict=True):
                submission.resolve(bool(verdict))
            return
        if isinstance(failure, InvalidArgument):
            error = FsError(f"commit refused: {failure}", errno.EINVAL)
        elif isinstance(failure, Fenced):
            error = FsError(
                f"it is not known whether the operation took place: {failure}", errno.EIO
            )
        else:
            error = FsError(f"{self._homes.no_quorum(self.deadline)}; last: {failure}", errno.EIO)
        for submission in batch:
            submission.resolve(error)


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
