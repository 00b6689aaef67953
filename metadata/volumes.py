"""Home of a volume: the state machine that judges transactions and forms journal entries.

The home knows no POSIX.  A transaction names what it read (keys and whole groups), the sequence
number it read at and its effects.  It is accepted unless an entry after that number wrote something
it read: optimistic concurrency control with backward validation (Kung and Robinson, 1981), which
makes every history serializable in journal order.

Everything a verdict depends on is a function of the *chosen* journal: the conflict window reaches
back exactly to the last checkpoint's `covered` sequence number, and the last outcome of each
session is part of the entry that caused it.  So a verdict that was answered once is the verdict
that any other home would give, before and after any take-over: answers are final and a request may
be sent again, to anybody, until it is answered.

Three rules follow, and each has a mutant that breaks it (`dfs.testing.scenario_home`):

- An outcome that a chosen entry does not prove yet is not answered.  A transaction that clashes
  with the batch in flight, or with an earlier request of the batch being formed, waits and is
  judged again once that batch is chosen: if the batch is lost, there was no conflict.
- Whether a request was seen before is decided when the batch is formed, not when it arrives: its
  first copy may sit in the queue or in flight.
- What is said about *now* (a read is still valid, a session is unknown) needs a `Confirm` of the
  ballot begun after the request arrived; the core hands such requests back in `Formed.confirm`.

While a session holds the volume's *delegation* (`metadata.delegation`), its commits that name the
epoch are accepted as they are: nobody else can have written since it last looked.  Other sessions
are told nothing and commit nothing until it is back; `form` and `settle` see to that, since the
holder may change while a request waits.

There is one batch in flight at most.  `absorb` must see every chosen entry, in order, before the
next batch is formed; nothing here waits or does I/O.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

from dfs.errors import Busy, Corrupt, DfsError, Fenced, InvalidArgument
from dfs.ids import SessionId
from dfs.volume import entries
from dfs.volume.effects import Effect
from dfs.volume.window import Window
from metadata.batches import Answer, Answers, Flight, Formed, Verdicts
from metadata.delegation import busy, change, refuse
from metadata.exclusion import Excluded, rivals
from metadata.requests import (
    Checkpoint,
    Close,
    Commit,
    Configure,
    Delegate,
    DelegationChange,
    Open,
    Request,
    Revoke,
)
from metadata.sessions import Control, Session

BATCH_BYTES = 1 << 20  # of effects in one entry; a larger request has an entry to itself
MAX_SESSIONS = 4096
MAX_CHUNK_AGE = 12 * 3600 * 10**9  # ns; half of the time that unreferenced chunks are kept
_KINDS = frozenset(range(entries.DELEGATION + 1))
UNBOUNDED = 1 << 62  # the window forgets by checkpoint only, see the module's docstring


class HomeCore:
    """One volume at the home that owns its ballot; see the module's docstring.

    Feed it the journal from a genesis or from anywhere at or before the `covered` number of a
    checkpoint entry; it is `complete` once it knows the control state.
    """

    def __init__(self, seq: int = 0) -> None:
        """Know nothing; the first entry to absorb is `seq + 1`."""
        self.seq = seq
        self.stamp = 0
        self.complete = seq == 0
        self.covered = 0
        self.root = b""
        self.params: dict[str, Any] = {}
        self.tree_bytes = 0
        self.sessions: dict[SessionId, Session] = {}
        self.epoch = 0  # of the delegation
        self.holder = 0  # session that holds it, 0 for nobody
        self.launched = 0  # batches that were handed out to be proposed
        self.proved = 0  # number of the last of them that was chosen
        self._nonces: dict[bytes, SessionId] = {}
        self._window = Window(seq, UNBOUNDED)
        self._data: deque[Commit] = deque()
        self._control: deque[Request] = deque()
        self._flight: Flight | None = None

    # -------------------------------------------------------------------------- chosen entries

    def absorb(self, seq: int, entry: bytes) -> Answers:
        """Take the next chosen entry; the outcomes it proves.

        Raises `Corrupt` for an entry that is not ours to understand: the core is then of no use.
        """
        if seq != self.seq + 1:
            raise Corrupt(f"journal entry {seq} follows {self.seq}")
        flight = self._flight
        if flight is not None and (entry is flight.payload or entry == flight.payload):
            self._flight = None
            self.proved = self.launched
            if flight.parts is not None:
                self.seq = seq
                self._absorb_data(flight.parts)
                return self._proved(flight)
            self._absorb(seq, entry)
            return self._proved(flight)
        self._absorb(seq, entry)
        return []

    def _proved(self, flight: Flight) -> Answers:
        seq = self.seq
        return [
            (request, (seq, answer) if type(request) is Commit else answer)
            for request, answer in flight.answers
        ]

    def _absorb(self, seq: int, entry: bytes) -> None:
        try:
            self._apply(seq, *entries.decode(entry))
        except (TypeError, ValueError, IndexError, AttributeError) as e:
            raise Corrupt(f"journal entry {seq} is malformed: {e}") from e

    def _apply(self, seq: int, kind: int, stamp: int, body: tuple[Any, ...]) -> None:
        self.seq = seq
        self.stamp = max(self.stamp, stamp)
        if kind == entries.DATA:
            self._absorb_data(body[0])
        elif kind == entries.CHECKPOINT:
            self._absorb_checkpoint(*body)
        elif kind not in _KINDS:
            raise Corrupt(
                f"journal entry {seq} is of kind {kind}, which this program does not know:"
                " a newer version wrote it, upgrade this node"
            )
        elif not self.complete:
            return  # the checkpoint to come repeats what control entries did before it
        elif kind == entries.SESSION:
            self._add(Session(*body))
        elif kind == entries.CLOSE:
            self._end(body[0])
            if self.holder in body[0]:
                self.epoch, self.holder = self.epoch + 1, 0
        elif kind == entries.DELEGATION:
            self.epoch, self.holder, *closed = body
            self._end(closed)
        elif kind == entries.GENESIS:
            self.params = body[0]
            self.root = body[0].get("root", b"")

    def _absorb_data(self, parts: tuple[tuple[Any, ...], ...]) -> None:
        seq, sessions, record = self.seq, self.sessions, self._window.record
        for sid, no, verdicts, effects in parts:
            session = sessions.get(sid)
            if session is not None:
                session.no = no
                session.seq = seq
                session.verdicts = verdicts
            record(seq, effects)

    def _absorb_checkpoint(self, covered: int, root: bytes, control: Any) -> None:
        if not self.complete:
            state = Control.decode(control)
            self.params = state.params
            self.epoch, self.holder = state.epoch, state.holder
            for session in state.sessions:
                self._add(session)
            self.complete = True
        if covered > self.covered:
            self.covered = covered
            self.root = root
            self.tree_bytes = Control.decode(control).tree_bytes
            self._window.forget(covered)

    def _add(self, session: Session) -> None:
        self.sessions[session.sid] = session
        self._nonces[session.nonce] = session.sid

    def _end(self, sids: Iterable[SessionId]) -> None:
        for sid in sids:
            session = self.sessions.pop(sid, None)
            if session is not None:
                self._nonces.pop(session.nonce, None)

    # -------------------------------------------------------------------------- the delegation

    @property
    def claimant(self) -> SessionId:
        """Who has the delegation, or may have it by an entry that is not chosen yet; 0: nobody."""
        if self.holder:
            return self.holder
        return next((r.sid for r in self._undone() if isinstance(r, Delegate)), 0)

    def losing(self, sid: SessionId) -> bool:
        """Whether an entry that is not chosen yet ends `sid`, or takes the delegation from it.

        Until that is decided it must not be told about now, or that it has the delegation: its
        answer would arrive after others were told that they may go on, or were given the
        delegation.  A holder that returns it knows what it does.
        """
        return bool(sid) and any(
            (isinstance(r, Revoke) and sid == self.holder and r.epoch == self.epoch)
            or (isinstance(r, Close) and sid in r.sids)
            for r in self._undone()
        )

    def _undone(self) -> list[Request]:
        flight = self._flight
        if flight is None or flight.control is None:
            return list(self._control)
        return [flight.control, *self._control]

    # ------------------------------------------------------------------------------- the queue

    def submit(self, request: Request) -> None:
        """Queue a request for the next batch."""
        if type(request) is Commit:
            self._data.append(request)
        else:
            self._control.append(request)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not (self._data or self._control or self._flight)

    @property
    def flying(self) -> bool:
        """Whether a batch is in flight."""
        return self._flight is not None

    @property
    def window_names(self) -> int:
        """Number of keys and groups in the conflict window."""
        return len(self._window)

    def give_up(self) -> list[Request]:
        """Every request without an outcome, to be told so; a batch in flight stays in flight."""
        left: list[Request] = [*self._control, *self._data]
        self._data.clear()
        self._control.clear()
        if self._flight is not None:
            left += [request for request, _ in self._flight.answers]
            self._flight.answers = []
        return left

    def retract(self) -> list[Request]:
        """Every request without an outcome; the batch in flight was never proposed."""
        left = self.give_up()
        self._flight = None
        return left

    def abandon(self) -> list[Request]:
        """Every request without an outcome, when the ballot is lost; the core is over."""
        return self.retract()

    def form(self, now: int) -> Formed:
        """Form the next batch from what waits; `now` is the wall clock in ns.

        Must not be called while a batch is in flight.  Control requests go first: they are rare
        and each has an entry to itself.
        """
        if self._flight is not None or not self.complete:
            raise RuntimeError("a batch is in flight or the core is incomplete")
        formed = Formed(None, [], [])
        while self._control and formed.payload is None:
            self._form_control(self._control.popleft(), now, formed)
        if formed.payload is None and self._data:
            self._form_data(now, formed)
        return formed

    def _launch(
        self,
        formed: Formed,
        kind: int,
        now: int,
        body: tuple[Any, ...],
        answers: Answers,
    ) -> None:
        # Stamps grow strictly along the journal, whatever the clocks of its proposers do.
        self.stamp = max(now, self.stamp + 1)
        formed.payload = entries.encode(kind, self.stamp, *body)
        parts = body[0] if kind == entries.DATA else None
        self.launched += 1
        self._flight = Flight(formed.payload, answers, parts)

    # --------------------------------------------------------------------------- data requests

    def _form_data(self, now: int, formed: Formed) -> None:
        parts: list[tuple[Any, ...]] = []
        answers: Answers = []
        waiting: deque[Commit] = deque()
        seen: set[SessionId] = set()
        batch = _brief()  # what this batch writes, all of it at sequence number 1
        size = 0
        queue = self._data
        while queue:
            request = queue.popleft()
            if size + request.size > BATCH_BYTES and parts:
                queue.appendleft(request)
                break
            if request.sid in seen:
                waiting.append(request)
                continue
            session = self.sessions.get(request.sid)
            if session is None or request.epoch > self.epoch:
                formed.confirm.append(request)
                continue
            answer = self._recall(session, request) or self._refuse(session, request, now)
            if answer is not None:
                formed.answers.append((request, answer))
                continue
            verdicts = self._judge(request, batch)
            if verdicts is None:
                waiting.append(request)
                continue
            effects = _accepted(request, verdicts)
            if effects:
                batch.record(1, effects)
                parts.append((request.sid, request.no, verdicts, effects))
                answers.append((request, verdicts))
                seen.add(request.sid)
                size += request.size
            elif True in verdicts:
                formed.confirm.append(request)
            else:
                formed.answers.append((request, (self.seq, verdicts)))
        queue.extendleft(reversed(waiting))
        if parts:
            self._launch(formed, entries.DATA, now, (tuple(parts),), answers)

    def _recall(self, session: Session, request: Commit) -> Answer:
        """The outcome of a request that the journal holds already; None if it does not."""
        if request.no > session.no:
            return None
        if request.no == session.no:
            return session.seq, session.verdicts
        return InvalidArgument(
            f"request {request.no} of session {request.sid} was answered before its"
            f" request {session.no}"
        )

    def _refuse(self, session: Session, request: Commit, now: int) -> DfsError | None:
        if request.writing and not session.writes:
            return InvalidArgument(f"session {request.sid} is read-only")
        oldest = request.oldest
        if oldest and (age := now - oldest if oldest > 0 else -oldest) > MAX_CHUNK_AGE:
            return InvalidArgument(
                f"the oldest chunk of this commit was put or touched {age // 10**9} s ago,"
                f" more than {MAX_CHUNK_AGE // 10**9}: touch its chunks again"
            )
        return refuse(request, self.epoch, self.holder)

    def _judge(self, request: Commit, batch: Window) -> Verdicts | None:
        """One verdict per transaction; None if one depends on an entry that is not chosen yet.

        Transactions of one request read the same base, so a later one that read what an earlier
        one writes is in conflict with it, whatever happens to the batch: they share its fate.
        What the holder of the delegation read is what it wrote itself.
        """
        if request.epoch:
            return (True,) * len(request.txns)
        base, changed, clashes = request.base, self._changed, batch.changed_since
        own: Window | None = None
        verdicts = []
        for keys, groups, effects in request.txns:
            if changed(base, keys, groups):
                verdicts.append(False)
                continue
            if clashes(0, keys, groups):
                return None
            ok = own is None or not own.changed_since(0, keys, groups)
            if ok and effects and len(request.txns) > 1:
                own = own or _brief()
                own.record(1, effects)
            verdicts.append(ok)
        return tuple(verdicts)

    def _changed(self, base: int, keys: Iterable[bytes], groups: Iterable[bytes]) -> bool:
        """Whether a chosen entry after `base` wrote what was read, or nobody can know."""
        return self._window.changed_since(base, keys, groups)

    def settle(self, request: Request) -> Answer:
        """The outcome of a request of `Formed.confirm`, or one without effects, once confirmed.

        None: the request has work for the journal after all and was queued again.
        """
        if type(request) is Commit:
            session = self.sessions.get(request.sid)
            if session is None:
                return Fenced(f"session {request.sid} is over or never was: open the volume again")
            known = self._recall(session, request)
            known = known or refuse(request, self.epoch, self.holder)
            if known is not None:
                return known
            changed, base, guarded = self._changed, request.base, request.epoch
            verdicts = tuple(bool(guarded) or not changed(base, t[0], t[1]) for t in request.txns)
            if _accepted(request, verdicts):
                self.submit(request)
                return None
            return self.seq, verdicts
        if isinstance(request, Open):
            sid = self._nonces.get(request.nonce)
            if self.holder not in (0, sid):
                return busy(self.holder)
            if sid is None:
                self.submit(request)
            return sid
        if isinstance(request, DelegationChange):
            if change(request, self.epoch, self.holder, self.sessions) is not None:
                self.submit(request)
                return None
            return Busy(_NOT_NOW) if isinstance(request, Delegate) else self.epoch
        if isinstance(request, Close):
            if any(sid in self.sessions for sid in request.sids):
                self.submit(request)
                return None
            return ()
        raise TypeError(f"{type(request).__name__} needs no confirmation")

    # ------------------------------------------------------------------------ control requests

    def _form_control(self, request: Request, now: int, formed: Formed) -> None:
        if isinstance(request, Open):
            sid = self._nonces.get(request.nonce)
            excluding = self._rivals(request) if sid is None else ()
            if excluding:  # before the delegation: who is refused anyway does not recall it
                formed.answers.append((request, Excluded(excluding)))
            elif self.holder not in (0, sid):
                formed.answers.append((request, busy(self.holder)))
            elif sid is not None:
                formed.confirm.append(request)
            elif len(self.sessions) >= MAX_SESSIONS:
                formed.answers.append((request, Busy(_TOO_MANY_SESSIONS)))
            else:
                body: tuple[Any, ...] = (request.sid, request.mode, request.nonce, request.name)
                self._launch(formed, entries.SESSION, now, body, [(request, request.sid)])
        elif isinstance(request, Close):
            sids = tuple(sid for sid in request.sids if sid in self.sessions)
            if sids:
                self._launch(formed, entries.CLOSE, now, (sids,), [(request, ())])
            else:
                formed.confirm.append(request)
        elif isinstance(request, DelegationChange):
            delegation = change(request, self.epoch, self.holder, self.sessions)
            if delegation is None:
                formed.confirm.append(request)
            else:
                answers: Answers = [(request, delegation[0])]
                self._launch(formed, entries.DELEGATION, now, delegation, answers)
        elif isinstance(request, Checkpoint):
            if request.covered <= self.covered:
                formed.answers.append((request, ()))
            else:
                body = (request.covered, request.root, self.control(request.tree_bytes))
                self._launch(formed, entries.CHECKPOINT, now, body, [(request, ())])
        elif isinstance(request, Configure):
            config = (request.version, request.members)
            self._launch(formed, entries.CONFIG, now, config, [(request, ())])
        else:
            raise TypeError(f"unknown request {type(request).__name__}")

    def _rivals(self, request: Open) -> tuple[Session, ...]:
        """Sessions beside which this one may not be opened."""
        return rivals(request.mode, self.sessions.values())

    def control(self, tree_bytes: int) -> tuple[Any, ...]:
        """Control state after the last entry, for a checkpoint entry."""
        state = Control(self.params, self.sessions.values(), self.epoch, self.holder, tree_bytes)
        return state.encode()


_NOT_NOW = "the delegation went to another session, or the session ended: ask again"
_TOO_MANY_SESSIONS = (
    f"the volume has {MAX_SESSIONS} open sessions, which is the limit: unmount some; sessions of"
    " clients that died end after a day"
)


def _brief() -> Window:
    """A window of one batch: nothing in it is indexed unless somebody asks."""
    return Window(0, brief=True)


def _accepted(request: Commit, verdicts: Verdicts) -> tuple[Effect, ...]:
    """Effects of the accepted transactions, in order."""
    txns = request.txns
    if len(txns) == 1:
        return txns[0][2] if verdicts[0] else ()
    return tuple(effect for txn, ok in zip(txns, verdicts, strict=True) if ok for effect in txn[2])
