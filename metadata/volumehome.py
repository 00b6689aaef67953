"""One volume at one of its homes: the I/O around `metadata.volumes.HomeCore`.

Concurrency contract (one trio loop; what happens between two awaits is atomic):

- The journal calls `_chosen` for every chosen entry, in order, from the loop.  The core absorbs it
  in that very call and the requests it proves are answered there, so core and journal never differ
  when any other task runs.
- Batches are formed and proposed one at a time, in `_go`: by the request that finds none in flight,
  then by the end of each proposal.  Requests that arrive meanwhile queue in the core; the next
  batch takes all of them (group commit).  No task is woken for it: each would be a pass of the
  scheduler in which the request only waits.
- A request has one outcome, which its token (`metadata.waiter`) is told once: an answer, the error
  that leaves it unknown, or `OwnershipLost` when the ballot went to another home.
- Whatever is told a session is told in one piece with the look at who has the delegation
  (`Recall.admitted`); a request that may not be answered waits for its return, then fails `Busy`.
- The core lives from a take-over to the loss of the ballot (`_drop`).  Whoever awaited anything
  checks that `self.core` is still the core it started with.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from dfs.clock import Clock
from dfs.errors import Busy, Corrupt, DfsError, DiskFull, InvalidArgument, NotHome
from dfs.ids import SessionId
from dfs.volume import entries
from metadata.batches import Answer
from metadata.delegation import Delegated
from metadata.journals import Journal, Trimmed
from metadata.pace import Pace
from metadata.recall import RECALL_WAIT, Recall
from metadata.requests import (
    Checkpoint,
    Close,
    Commit,
    Configure,
    Request,
)
from metadata.tail import ANSWER_BYTES, Numbered, Tail, kind_of
from metadata.volumes import HomeCore
from metadata.waiter import Waiter

log = logging.getLogger(__name__)

PROPOSE_TIMEOUT = 4.0  # seconds
CONFIRM_TIMEOUT = 2.0
ACQUIRE_TIMEOUT = 1.5
TAKE_OVER_WAIT = 1.0  # seconds that a request waits for a take-over
SESSION_TTL = 24 * 3600.0  # seconds without a beat
EXPIRY_LOOK = 10.0  # seconds between looks for sessions that are silent
CHECKPOINT_BYTES = 16 << 20  # of journal, or a hundredth of the tree if that is more
CHECKPOINT_AGE = 300.0  # seconds, if there is anything to fold
REST_AFTER = 5.0  # seconds without any session: who opens the volume next wants a short journal
REST_BYTES = 256 << 10  # of journal that are worth that
FOLD_BYTES = 32 << 20  # of entries in one fold, at most: it takes some eight times that in memory
READ_BYTES = 128 << 10  # of entries read without giving others a turn: a millisecond or two
WINDOW_NAMES = 500_000  # keys and groups in the conflict window: fold to shorten it

Folder = Callable[[bytes, bytes, Sequence[bytes]], Awaitable[tuple[bytes, int]]]
# (root, salt, DATA entries) -> (new root, estimated bytes of the tree); its nodes are durable then


class OwnershipLost(NotHome):
    """The ballot went to another home before the outcome was known; ask again there."""


class _Attempt:
    """A take-over under way."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: DfsError | None = None


class VolumeHome:
    """A volume whose journal has a replica here; serves requests while it owns the ballot."""

    core_class: type[HomeCore] = HomeCore

    def __init__(
        self,
        volume: bytes,
        journal: Journal,
        number: int,
        clock: Clock,
        nursery: trio.Nursery,
        folder: Folder,
    ) -> None:
        """Follow the journal; nothing is served before `take_over`."""
        self.volume = volume
        self.journal = journal
        self.core: HomeCore | None = None
        self.take_overs = 0
        self._number = number
        self._clock = clock
        self._nursery = nursery
        self._folder = folder
        self._tail = Tail()
        self._watchers: dict[Waiter, SessionId] = {}
        self._holder_has = (0, 0)  # (session that held the delegation last, entries it has)
        self._taking: _Attempt | None = None
        self._recall: Recall  # there is one whenever there is a core
        self._backlog = 0
        self._covered = 0  # by the newest checkpoint seen here
        self._checkpoint_at = 0.0  # time of the last one
        self._pace = Pace()
        self._folding = False
        self._in_use_at = 0.0  # when there was a session last
        self._look_at = 0.0  # when to look for silent sessions
        self._configuring = False
        journal.subscribe(self._chosen, self._reset)

    def ready(self) -> bool:
        """Whether this node owns the ballot, as far as it knows, and knows the control state."""
        if self.core is not None and not self.journal.owned:
            self._drop(self.core, "the journal has another owner")
        return self.core is not None

    # ----------------------------------------------------------------------------- the journal

    def _chosen(self, seq: int, entry: bytes) -> None:
        """A journal entry was chosen; called by the journal, in order."""
        core = self.core
        own = 0
        try:
            if core is not None:
                self._tail.append(seq, entry)
                epoch = core.epoch
                answers = core.absorb(seq, entry)
                if (
                    core.holder
                    and answers
                    and all(type(r) is Commit and r.sid == core.holder for r, _ in answers)
                ):
                    own = core.holder
                for request, answer in answers:
                    request.token.set(answer)
                if core.epoch != epoch:
                    self._recall.changed()
            kind = kind_of(entry)
            if kind == entries.CHECKPOINT:
                self._checkpointed(entries.decode(entry).body[0])
            elif kind != entries.DATA:  # somebody came or went
                self._in_use_at = self._clock.monotonic()
        except DfsError as e:
            # Whoever takes over meets the same entry and says so to the clients.
            log.exception("volume %s: entry %d", self.volume.hex(), seq)
            if core is not None:
                self._drop(core, str(e))
        if self._watchers:
            self._news(own)

    def _reset(self, base: int) -> None:
        """This replica was so far behind that it got a snapshot: entries up to `base` are gone."""
        if self.core is not None:
            self._drop(self.core, f"entries up to {base} came as a snapshot")
        self._tail = Tail()
        self._news()

    def _news(self, own: SessionId = 0) -> None:
        """Answer every watch, but not those of session `own`, whose commit is the news."""
        watchers, self._watchers = self._watchers, {}
        for waiter, sid in watchers.items():
            if own and sid == own:
                self._watchers[waiter] = sid
            else:
                waiter.set(True)

    def _alert(self, sid: SessionId) -> None:
        """Answer the watches of one session."""
        for waiter, watching in self._watchers.items():
            if watching == sid:
                waiter.set(True)

    def _checkpointed(self, covered: int) -> None:
        """A checkpoint was chosen: forget what the one before it covers.

        One interval more than needed is kept, for clients that lag: they catch up by entries
        instead of comparing trees.
        """
        if covered <= self._covered:
            return
        before, self._covered = self._covered, covered
        self._tail.cover(covered)
        self._checkpoint_at = self._clock.monotonic()
        if before:
            self._nursery.start_soon(self._trim, before + 1)

    async def _trim(self, below: int) -> None:
        try:
            await self.journal.trim(below)
        except DfsError as e:
            log.warning("volume %s: cannot trim the journal: %s", self.volume.hex(), e)

    def entries_after(self, after: int, upto: int) -> tuple[Numbered, ...] | None:
        """Entries in (after, upto], or the oldest of them; None if some are no longer held."""
        found = self._tail.between(after, upto)
        if found is not None:
            return found
        try:
            held = self.journal.entries(after, ANSWER_BYTES)
        except Trimmed:
            return None
        return tuple(item for item in held if item[0] <= upto)

    # ------------------------------------------------------------------------------- ownership

    async def take_over(self) -> None:
        """Own the ballot and rebuild the core; callers at once share one attempt.

        Raises `NoQuorum`, `NotHome` or `OwnershipLost`; and `Busy` when it takes longer, which
        tells who forwarded a request here that this node is alive: the attempt goes on.
        """
        if self.ready():
            return
        if self._taking is None:
            self._taking = _Attempt()
            self._nursery.start_soon(self._take_over, self._taking)
        attempt = self._taking
        with trio.move_on_after(TAKE_OVER_WAIT):
            await attempt.done.wait()
        if self.ready():
            return
        if not attempt.done.is_set():
            raise Busy(f"node {self._number} is taking volume {self.volume.hex()} over")
        error = attempt.error
        if error is None:
            raise OwnershipLost(f"the ballot of volume {self.volume.hex()} was lost again")
        raise type(error)(str(error), *error.details) from error

    async def _take_over(self, attempt: "_Attempt") -> None:
        try:
            await self.journal.acquire(ACQUIRE_TIMEOUT)
            core = await self._rebuild()
            if self.journal.owned:
                self.core = core
                self.take_overs += 1
                self._recall = Recall(
                    core, self._clock, self._nursery, partial(self._run, core), self._alert
                )
                self._checkpoint_at = self._in_use_at = self._clock.monotonic()
                self._go(core)
        except DfsError as e:
            attempt.error = e
        finally:
            self._taking = None
            attempt.done.set()

    async def _rebuild(self) -> HomeCore:
        """The core as the journal held here makes it; ends at the last chosen entry."""
        journal = self.journal
        core = self.core_class(max(journal.base, self._covered))
        tail = Tail()
        while core.seq < journal.chosen:
            for seq, entry in journal.entries(core.seq, READ_BYTES):
                core.absorb(seq, entry)
                tail.append(seq, entry)
            tail.cover(core.covered)
            if core.seq < journal.chosen:
                await trio.lowlevel.checkpoint()
        # No await from here to the caller's assignment: the core would miss what is chosen then.
        if not core.complete:
            raise Corrupt(
                f"the journal of volume {self.volume.hex()} holds neither its genesis nor a"
                " checkpoint: restore this replica from another node"
            )
        self._tail = tail
        self._covered = max(self._covered, core.covered)
        return core

    def _drop(self, core: HomeCore, reason: str) -> None:
        """The ballot is lost: what waits has no known outcome and has to be asked elsewhere."""
        if self.core is not core:
            return
        self.core = None
        self._tail = Tail()
        self._backlog = 0
        lost = OwnershipLost(f"volume {self.volume.hex()}: {reason}", *self.journal.members)
        for request in core.abandon():
            request.token.set(lost)
        self._recall.end()
        self._news()

    # ------------------------------------------------------------------------------- the batches

    def _submit(self, core: HomeCore, request: Request) -> None:
        """Queue a request, which has a token, and let it go at once if nothing is in flight."""
        core.submit(request)
        self._go(core)

    def _go(self, core: HomeCore) -> None:
        """Form the next batch and propose it, unless one is in flight or nothing waits."""
        while self.core is core and not core.flying:
            self._recall.wake()  # what was queued or in flight may have come to nothing
            if core.idle:
                return
            formed = core.form(self._clock.time_ns())
            for request, answer in formed.answers:
                request.token.set(answer)
            if formed.confirm:
                self._nursery.start_soon(self._settle_all, core, formed.confirm)
            if formed.payload is not None:
                ended = partial(self._ended, core, core.launched)
                self.journal.launch(formed.payload, PROPOSE_TIMEOUT, ended)

    def _ended(self, core: HomeCore, number: int, outcome: int | DfsError) -> None:
        """The proposal of batch `number` has ended; what it proved was answered by `_chosen`."""
        if self.core is not core:
            return
        if isinstance(outcome, NotHome):
            self._drop(core, str(outcome))
        elif isinstance(outcome, DiskFull):
            for request in core.retract():
                request.token.set(outcome)
        elif isinstance(outcome, InvalidArgument):  # a config out of turn; it was not proposed
            for request in core.retract():
                request.token.set(Busy(str(outcome)))
        elif isinstance(outcome, DfsError):
            self._nursery.start_soon(self._undecided, core, outcome)
            return
        elif core.flying and core.launched == number:
            self._drop(core, "the journal did not report its own entry")
        self._go(core)

    async def _undecided(self, core: HomeCore, error: DfsError) -> None:
        """A proposal takes too long: tell who waits, and wait for the journal to decide it.

        No batch may be formed before that: it could be judged without the undecided one.
        """
        while self.core is core and core.flying:
            if not self.journal.owned:
                self._drop(core, str(error))
                return
            for request in core.give_up():
                request.token.set(error)
            await trio.sleep(0.05)
        self._go(core)

    async def _settle_all(self, core: HomeCore, requests: list[Request]) -> None:
        """Answer what is only known once the ballot is confirmed."""
        try:
            await self._confirm(core)
        except DfsError as e:
            for request in requests:
                request.token.set(e)
            return
        for request in requests:
            self._settle(core, request)

    def _settle(self, core: HomeCore, request: Request) -> None:
        answer = core.settle(request)
        if answer is None:
            self._go(core)
        else:
            request.token.set(answer)

    async def _confirm(self, core: HomeCore) -> None:
        """A majority confirms, from now on, that the ballot is ours; raises if it does not."""
        try:
            await self.journal.confirm(CONFIRM_TIMEOUT)
        except NotHome as e:
            self._drop(core, str(e))
        if self.core is not core:
            raise OwnershipLost(f"volume {self.volume.hex()} has another owner")

    async def _run(self, core: HomeCore, request: Request, sid: SessionId = 0) -> Answer:
        """Get a request of `sid` its outcome, if need be after another session's delegation."""
        give_up = 0.0
        while True:
            waiter = request.token = Waiter()
            if type(request) is Commit and not request.writing:
                await self._confirm(core)
                self._settle(core, request)
            else:
                self._submit(core, request)
            try:
                return await waiter.wait()
            except Delegated:
                give_up = give_up or self._clock.monotonic() + RECALL_WAIT
            await self._admitted(core, sid, give_up)

    async def _admitted(self, core: HomeCore, sid: SessionId, give_up: float) -> None:
        """Wait until `sid` may be told about now; see `Recall.admitted`."""
        if self.core is core:
            await self._recall.admitted(sid, give_up)
        if self.core is not core:
            raise OwnershipLost(f"volume {self.volume.hex()} has another owner")

    def _current(self) -> HomeCore:
        if self.core is None:
            raise OwnershipLost(f"volume {self.volume.hex()} has another owner")
        return self.core

    async def configure(self, members: tuple[int, ...]) -> None:
        """Make `members` the journal's; returns when that is chosen.  Raises like `commit`.

        The journal then prepares at the new members, and is lost here if this node is none.
        """
        core, journal = self._current(), self.journal
        if self._configuring or set(journal.members) == set(members):
            return
        self._configuring = True
        try:
            await self._run(core, Configure(journal.config_version + 1, members))
        finally:
            self._configuring = False

    # ---------------------------------------------------------------------------- housekeeping

    def tick(self, now: float) -> None:
        """Start what is due: closing silent sessions, a checkpoint."""
        core = self.core
        if core is None or not self.journal.owned:
            return
        if now >= self._look_at:
            self._look_at = now + EXPIRY_LOOK
            if self._recall.standing.expired(core.sessions, SESSION_TTL, now):
                self._nursery.start_soon(self._expire, core)
        if core.sessions:
            self._in_use_at = now
        if not self._folding and self._due(core, now):
            self._folding = True
            self._nursery.start_soon(self._checkpoint, core)

    async def _expire(self, core: HomeCore) -> None:
        now = self._clock.monotonic()
        sids = self._recall.standing.expired(core.sessions, SESSION_TTL, now)
        if self.core is not core or not sids:
            return
        log.info("volume %s: sessions %s are silent, closing", self.volume.hex(), sids)
        try:
            await self._run(core, Close(sids))
        except DfsError as e:
            log.info("volume %s: cannot close sessions now: %s", self.volume.hex(), e)

    def _due(self, core: HomeCore, now: float) -> bool:
        tail = self._tail
        age = now - self._checkpoint_at
        if not tail.loose or now < self._pace.retry_at:
            return False
        return (
            age >= CHECKPOINT_AGE
            or tail.loose_bytes >= fold_bytes(core)
            or core.window_names > WINDOW_NAMES
            or (now - self._in_use_at >= REST_AFTER and tail.loose_bytes >= REST_BYTES)
        )

    async def _to_fold(self, core: HomeCore) -> tuple[int, int, list[bytes]]:
        """The oldest entries after the last checkpoint: (seq of the last, bytes, DATA entries)."""
        upto, size, data = core.covered, 0, []
        most = fold_bytes(core)
        while upto < core.seq and size < most:
            for seq, entry in self.journal.entries(upto, READ_BYTES):
                upto = seq
                size += len(entry)
                if kind_of(entry) == entries.DATA:
                    data.append(entry)
            await trio.lowlevel.checkpoint()  # reading may touch the disk
        return upto, size, data

    async def _checkpoint(self, core: HomeCore) -> None:
        """Fold the oldest entries into the tree and record it; harmless if another home does."""
        pace, began, name = self._pace, self._clock.monotonic(), self.volume.hex()
        try:
            upto, size, data = await self._to_fold(core)
            root, tree_bytes = core.root, core.tree_bytes
            if data:
                root, tree_bytes = await self._folder(root, core.params.get("salt", b""), data)
            if self.core is core:
                await self._run(core, Checkpoint(upto, root, tree_bytes))
            took = self._clock.monotonic() - began
            pace.folded(size, took)
            left = self._tail.loose_bytes
            log.info("volume %s: %d bytes folded in %.2f s, %d to go", name, size, took, left)
        except DfsError as e:
            pause = pace.failed(self._clock.monotonic())
            log.warning("volume %s: no checkpoint, next try in %.0f s: %s", name, pause, e)
        finally:
            self._folding = False
        self.tick(self._clock.monotonic())  # the next may be due already


def fold_bytes(core: HomeCore) -> int:
    """Bytes of entries that are worth a fold, and that go into one."""
    return min(max(CHECKPOINT_BYTES, core.tree_bytes // 100), FOLD_BYTES)
