"""The one task of a session that changes the volume: commits, and the delegation.

One request is in flight at most.  What it carries depends on who may write: transactions that the
home judges (`Submission`), or, while the session holds the volume's delegation, batches of what was
done here already (`dfs.client.delegation`).  The switch from one to the other happens here, between
two requests, so a transaction is never judged by both rules.

Who waits for a batch (`settle`) sends it at once if nothing is in flight, and its answer tells all
who waited for it: no task has to be woken for either (`_launch`).  What is not as simple as that,
above all an answer that did not come, is left to the task, with the request as it was sent.

A *verdict* is final.  Anything else than a verdict means "unknown", so the identical request is
sent again, to any home.  A transaction that somebody waits for has a deadline: then the session is
over, because whether its last request took effect can no longer be learned, and a new one is opened
in its place.  A batch has none; its operations were acknowledged, and only `Fenced` ends the hope.

While the homes' disks are full there is no verdict either, and no session could be opened in place
of this one.  So when a request has waited for `STALLED`, the homes are asked whether that is why
(`explain`).  Then those who need no verdict are told ENOSPC: who waits for a batch, which is kept
and goes on being sent; whose transaction never left the queue; and who keeps what the transaction
commits, and commits it again.  Sending goes on, and ends with a verdict once there is room.

Both ways of committing and the switch between them share one request, which makes the module longer
than most.
"""

import errno
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import trio

from dfs.client.capacity import stalled_by_disks
from dfs.client.delegation import LINGER, Batch, Delegation
from dfs.client.submission import Submission, Waiter, form
from dfs.errors import DfsError, Fenced, FsError, InvalidArgument
from dfs.volume import entries

if TYPE_CHECKING:
    from dfs.client.session import Session

log = logging.getLogger(__name__)

ATTEMPT = 3.0  # seconds one home is given to answer before another is asked
ASK_AGAIN = 1.0  # seconds after a recall
ASK_AFTER = 3  # transactions of a session after which it asks for the delegation
STALLED = 0.5  # seconds without a verdict after which, and between which, the reason is looked for


class Committer:
    """The queue and its task; a part of `Session`, which it serves."""

    def __init__(self, session: "Session", *, delegate: bool) -> None:
        """`delegate`: whether to ask for the volume's delegation at all."""
        self.delegation = Delegation()
        self.counts = dict.fromkeys(
            ("commits", "transactions", "conflicts", "local_conflicts", "resends", "batches"), 0
        )
        self._session = session
        self._delegate = delegate
        self._clock = session.cluster.clock
        self._queue: deque[Submission] = deque()
        self._work = trio.lowlevel.ParkingLot()
        self._no = 0
        self._sent: Batch | None = None  # the batch in flight, and its request's number is `_no`
        self._flight: object | None = None  # a request without the task is under way
        self._sending = False  # the task has a request under way
        self._unsure: tuple[Any, ...] | None = None  # the request of `_sent`, to be sent again
        self.settled_at = float("-inf")  # when somebody last waited for stable storage
        self._hurry = False
        self._lingering = False
        self._ask_at = 0.0
        self._stray = 0  # epoch of a delegation that we were granted without learning of it
        self._since_open = 0
        self.full = ""  # why no home can accept anything, as far as that is known
        self._open_since: float | None = None  # when the request was made that has no verdict
        self._judged: list[Submission] = []  # the transactions in it
        self._calm = False  # `explain` waits for a request
        self._requested = trio.lowlevel.ParkingLot()

    # ------------------------------------------------------------------ the session's calls

    def submit(self, submission: Submission) -> None:
        """Queue a transaction to be judged."""
        self._queue.append(submission)
        self._work.unpark_all()

    def looked(self) -> None:
        """A look had to be confirmed by the home: the delegation would spare the next ones."""
        self._since_open += 1
        if self._wants():
            self._work.unpark_all()

    def began(self) -> None:
        """A session was opened."""
        self._no = self._since_open = self._stray = 0
        self._sent = self._flight = self._unsure = None
        self._decided()
        self._ask_at = 0.0
        self._work.unpark_all()

    def lost(self) -> set[int]:
        """The session is over; returns the inodes whose acknowledged changes are lost with it."""
        # Transactions that never left the queue are as good as never run: run them again.
        while self._queue:
            self._queue.popleft().resolve(False)
        self._sent = self._flight = self._unsure = None
        self._decided()
        error = FsError(
            "the session was lost, and with it what was not on stable storage", errno.EIO
        )
        return self.delegation.lose(error)

    def wake(self) -> None:
        """An operation was done here: let its batch be sent, in time.

        A batch that has been given time for company already needs no turn for each that comes.
        """
        if not self._lingering or len(self.delegation.batches) > 1:
            self._work.unpark_all()

    def hear(self, epoch: int, holder: int, wanted: bool) -> bool:
        """Note what a confirmed answer says of the delegation; whether it renews our lease."""
        held, ours = self.delegation, holder == self._session.sid
        if not held.held:
            if ours and wanted and not self._stray:  # the answer that granted it was lost
                self._stray = epoch
                self._work.unpark_all()
            return False
        if epoch < held.epoch or (held.recalled and not held.batches):
            return False  # older than the grant; or we have given it back, or are about to
        if epoch > held.epoch or not ours:
            self._session.lose("its delegation was revoked")
            return False
        if wanted and held.recall():
            log.info("volume %s: the delegation is recalled", self._session.volume.hex())
            self._work.unpark_all()
        return True

    def confirm(self, decoded: entries.Entry, seq: int) -> bool:
        """Whether entry `seq`, the view's next, is the batch in flight; then the view has it."""
        batch = self._sent
        if batch is None or decoded.kind != entries.DATA:
            return False
        part = decoded.body[0][0]
        if part[0] != self._session.sid or part[1] != self._no:
            return False
        self._confirm(batch, seq)
        return True

    def _confirm(self, batch: Batch, seq: int) -> None:
        view = self._session.view
        if seq == view.seq + 1:
            view.confirm_local(seq, batch.keys, batch.ranges, batch.number)
        else:  # a checkpoint holds it, to which the view has jumped
            view.confirm_covered(batch.keys, batch.ranges, batch.number)
        self._sent = self._unsure = None
        self.delegation.confirmed(batch)
        self.counts["batches"] += 1

    async def settle(self) -> None:
        """Wait until all that was done here is in the journal; raises `FsError`."""
        held = self.delegation
        if not held.batches:
            return
        self.settled_at = self._clock.monotonic()
        waiter = Waiter()
        held.batches[-1].waiters.append(waiter)
        if self._launch():
            if await waiter.wait():
                return
            if not held.batches:
                return
            waiter = Waiter()
            held.batches[-1].waiters.append(waiter)
        self._hurry = True
        self._work.unpark_all()
        deadline = self._session.deadline
        with trio.move_on_after(deadline):
            await waiter.wait()
            return
        raise FsError(f"no quorum took what was written for {deadline:g} s", errno.EIO)

    # ------------------------------------------------------------------ without the task

    def hasten(self) -> None:
        """Send the oldest batch if nothing is on its way, or see that it is sent in time."""
        if not self._launch():
            self._work.unpark_all()

    def _launch(self) -> bool:
        """Send the oldest batch unless one is on its way; False: that is for the task to do.

        If not, everybody who waits for a batch is told: True once it is in the journal, False when
        it is left to the task after all, or the error when the session is lost.
        """
        session, held = self._session, self.delegation
        if self._flight is not None:
            return True
        if self._sending or self._unsure is not None or session.over or not held.batches:
            return False
        batch = self._sent = held.first(session.view)
        request = self._request((((), (), batch.effects),), batch.oldest, held.epoch)
        flight = self._flight = object()
        asked_at = self._clock.monotonic()

        def answered(answer: Any) -> None:
            if flight is self._flight:  # else the session has ended meanwhile
                self._flight = None
                self._landed(batch, request, asked_at, answer)

        try:
            session.homes.launch("vol.commit", request, timeout=ATTEMPT, then=answered)
        except DfsError:
            self._flight, self._unsure = None, request
            return False
        return True

    def _landed(self, batch: Batch, request: tuple[Any, ...], asked_at: float, answer: Any) -> None:
        """What was sent without the task was answered; never called for a session that is over."""
        session, held = self._session, self.delegation
        if not isinstance(answer, DfsError):
            _, seq, verdicts, received, owner, state = answer
            ours = batch is self._sent  # else its entry came by a watch
            at = session.view.seq
            alone = all(other == seq for other, _ in received)  # no entry came in between
            if verdicts == (True,) and alone and (at == seq - 1 if ours else at >= seq):
                if ours:
                    self._confirm(batch, seq)
                self._decided()
                self.counts["commits"] += 1
                session.heard(asked_at, owner, state)
                if any(b.waiters for b in held.batches) and self._launch():
                    return
                if held.batches or held.recalled:
                    self._work.unpark_all()
                return
        if batch is self._sent:
            self._unsure = request
        self._hurry = True
        for waiting in held.batches:
            waiters, waiting.waiters = waiting.waiters, []
            for waiter in waiters:
                waiter.resolve(False)
        self._work.unpark_all()

    # ------------------------------------------------------------------ the task

    async def run(self) -> None:
        """Until cancelled."""
        held = self.delegation
        while True:
            if self._session.over or self._flight is not None:
                await self._work.park()
            elif held.batches:
                await self._linger()
                if held.batches and not self._session.over and self._flight is None:
                    self._sending = True
                    await self._send_batch(held.first(self._session.view))
                    self._sending = False
            elif held.recalled:
                await self._give_back(held.epoch)
            elif held.held:
                self._hurry = False
                while self._queue:  # from before the grant
                    self._queue.popleft().resolve(False)
                await self._work.park()
            elif self._stray:
                await self._give_back(self._stray)
            elif self._queue:
                await self._send_transactions()
            elif self._wants():
                await self._ask()
            else:
                await self._work.park()

    async def _linger(self) -> None:
        """Give a batch that nobody waits for a little company."""
        held = self.delegation
        until = held.batches[0].since + LINGER
        while len(held.batches) == 1 and not (
            self._hurry or held.recalled or self._session.over or self._flight is not None
        ):
            left = until - self._clock.monotonic()
            if left <= 0:
                return
            self._lingering = True
            try:
                with trio.move_on_after(left):
                    await self._work.park()
            finally:
                self._lingering = False

    async def _send_transactions(self) -> None:
        batch, self._queue, lost = form(self._queue, self._session.view)
        for submission in lost:
            self.counts["local_conflicts"] += 1
            submission.resolve(False)
        if not batch:
            return
        oldest = min((s.oldest for s in batch if s.oldest), default=0)
        txns = tuple((tuple(s.txn.keys), tuple(s.txn.groups), tuple(s.txn.effects)) for s in batch)
        self._judged = batch
        try:
            verdicts = await self._send(self._request(txns, oldest, 0))
        except DfsError as e:
            for submission in batch:
                submission.resolve(e)
            return
        finally:
            self._judged = []
            self._decided()
        self.counts["transactions"] += len(batch)
        self._since_open += len(batch)
        for submission, verdict in zip(batch, verdicts, strict=True):
            submission.resolve(bool(verdict))

    async def _send_batch(self, batch: Batch) -> None:
        self._sent = batch
        session, generation = self._session, self._session.generation
        # One that was sent already, and not answered, is to be sent as it was.
        request, self._unsure = self._unsure, None
        if request is None:
            epoch = self.delegation.epoch
            request = self._request((((), (), batch.effects),), batch.oldest, epoch)
        try:
            verdicts = await self._send(request, batch)
        except DfsError as e:  # nothing that was acknowledged may be left out
            session.lose(f"its home refused what was done here: {e}", generation)
            return
        if verdicts != (True,):
            why = "its home found a conflict in what was done under the delegation"
            session.lose(why, generation)

    def _request(self, txns: tuple[Any, ...], oldest: int, epoch: int) -> tuple[Any, ...]:
        """The next request of the session; `epoch`: of the delegation, if that is what permits it.

        Every read was just found unchanged up to the view's seq: that is its base.
        """
        session = self._session
        # Clocks of other machines may tell anything: what is sent is an age.
        age = max(1, self._clock.elapsed_ns() - oldest) if oldest else 0
        self._no += 1
        self._open_since = self._clock.monotonic()
        if self._calm:
            self._requested.unpark_all()
        seq = session.view.seq
        return (session.volume, session.sid, self._no, seq, seq, txns, -age, epoch)

    async def _send(self, request: tuple[Any, ...], batch: Batch | None = None) -> tuple[bool, ...]:
        """Send one request until there is a verdict; raises `FsError` when there will be none."""
        session = self._session
        generation = session.generation
        give_up = self._clock.monotonic() + session.deadline
        attempt = 0
        while True:
            if generation != session.generation or session.over:
                raise _unknown("the session was lost while a commit was on its way")
            asked_at = self._clock.monotonic()
            try:
                _, seq, verdicts, received, owner, state = await session.homes.ask(
                    "vol.commit", request, timeout=ATTEMPT
                )
                if generation != session.generation:
                    continue
                if batch is not None and batch is self._sent and session.view.seq == seq - 1:
                    self._confirm(batch, seq)
                await session.absorb(received)
            except Fenced as e:
                session.lose(str(e), generation)
                raise _unknown(str(e)) from e
            except InvalidArgument as e:
                raise FsError(f"commit refused: {e}", errno.EINVAL) from e
            except DfsError as e:
                log.debug("commit to volume %s: %s", session.volume.hex(), e)
                if batch is None and self._clock.monotonic() > give_up and self.full:
                    for submission in self._judged:
                        submission.resolve(_unknown(self.full))
                elif batch is None and self._clock.monotonic() > give_up:
                    why = f"no verdict for a commit within {session.deadline:g} s: {e}"
                    session.lose(why, generation)
                    text = f"{session.homes.no_quorum(session.deadline)}; last: {e}"
                    raise FsError(text, errno.EIO) from e
                attempt += 1
                self.counts["resends"] += 1
                await session.homes.pause(attempt)
                continue
            self.counts["commits"] += 1
            self._decided()
            while session.view.seq < seq and generation == session.generation:
                await session.wait_news()  # the tail was cut: the watch task resets the view
            # An answer without a commit says nothing about now, one to an older session neither.
            if True in verdicts and generation == session.generation:
                if batch is not None and batch is self._sent:
                    self._confirm(batch, seq)
                session.heard(asked_at, owner, state)
            return tuple(map(bool, verdicts))

    # ------------------------------------------------------------------ full disks

    async def explain(self) -> None:
        """Look why a request has no verdict, and tell who need not wait for one; until cancelled.

        It costs two passes a second while requests are made, and nothing while none is.
        """
        while True:
            since = self._open_since
            if since is None:
                self._calm = True
                await self._requested.park()
                self._calm = False
                continue
            await trio.sleep(STALLED)
            if since == self._open_since:
                session = self._session
                full = await stalled_by_disks(session.cluster, session.volume)
                if since == self._open_since:
                    self._note_full(full)

    def _decided(self) -> None:
        """There is no request without a verdict now."""
        self._open_since, self.full = None, ""

    def _note_full(self, full: str) -> None:
        if full and not self.full:
            log.warning("volume %s: commits wait: %s", self._session.volume.hex(), full)
        self.full = full
        if not full:
            return
        error = FsError(f"no space left: {full}", errno.ENOSPC)
        for batch in self.delegation.batches:
            waiters, batch.waiters = batch.waiters, []
            for waiter in waiters:
                waiter.resolve(error)
        while self._queue:
            self._queue.popleft().resolve(error)
        for submission in self._judged:
            if submission.kept:
                submission.resolve(error)
        self.delegation.stir()

    # ------------------------------------------------------------------ the delegation

    def _wants(self) -> bool:
        return (
            self._delegate
            and self._session.mode == "rw"
            and self._since_open >= ASK_AFTER
            and self._clock.monotonic() >= self._ask_at
        )

    async def _ask(self) -> None:
        session = self._session
        self._since_open = 0
        generation, asked_at = session.generation, self._clock.monotonic()
        try:
            epoch, seq, wait, owner = await session.homes.ask(
                "vol.delegate", (session.volume, session.sid), timeout=ATTEMPT
            )
            if generation != session.generation or session.over:
                return
            if not epoch:
                self._ask_at = self._clock.monotonic() + wait
                return
            while session.view.seq < seq and generation == session.generation:
                await session.refresh()
        except Fenced as e:
            session.lose(str(e), generation)
            return
        except DfsError as e:
            # Should it have been granted all the same, asking again says so, or the home revokes.
            log.debug("delegation of volume %s: %s", session.volume.hex(), e)
            self._ask_at = self._clock.monotonic() + ATTEMPT
            return
        if generation == session.generation and not session.over:
            self._stray = 0
            self.delegation.grant(epoch)
            session.lease(asked_at, owner)
            log.info("volume %s: delegated to us, epoch %d", session.volume.hex(), epoch)

    async def _give_back(self, epoch: int) -> None:
        session, generation = self._session, self._session.generation
        self.delegation.returning = self.delegation.held
        session.end_lease()
        attempt = 0
        while generation == session.generation and not session.over:
            try:
                await session.homes.ask(
                    "vol.return", (session.volume, session.sid, epoch), timeout=ATTEMPT
                )
            except Fenced as e:
                session.lose(str(e), generation)
                return
            except DfsError as e:
                log.debug("return of volume %s: %s", session.volume.hex(), e)
                attempt += 1
                await session.homes.pause(attempt)
            else:
                break
        if generation == session.generation and not session.over:
            session.returned()
            self._ask_at = self._clock.monotonic() + ASK_AGAIN
            self._stray = 0
            self.delegation.end()
            log.info("volume %s: the delegation is given back", session.volume.hex())


def _unknown(why: str) -> FsError:
    return FsError(f"it is not known whether the operation took place: {why}", errno.EIO)
