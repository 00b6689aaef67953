"""The delegation of a volume: what each request does to it, and when it is given and taken.

A volume is delegated to its only active session, which then answers and acknowledges from its own
view and commits behind.  Who has it is control state of the volume: an *epoch*, one higher with
each change, and a *holder*.  So every home that takes over knows the holder, and a commit of a
holder that was fenced names an epoch that no home accepts any more (a fencing token, as in Gray and
Cheriton's leases, 1989, and Burrows' Chubby, 2006).

Times are one-sided.  The holder serves until 12 s after it *sent* the last request whose answer
named it; a home takes the delegation away when it has heard nothing for `SILENCE` since then, or
since it took over, because what the owner before it heard is not known.  That leaves room for
clocks that differ by a tenth in rate.  A recall that makes no progress is longer than any lease,
because each answer since told the holder to stop.

Nothing here waits, reads a clock or does I/O: `now` is seconds of the home's monotonic clock.
"""

from collections.abc import Collection, Container, Iterable

from dfs.errors import Busy, DfsError, Fenced
from dfs.ids import SessionId
from metadata.requests import Commit, Delegate, DelegationChange, Return, Revoke

SILENCE = 15.0  # seconds without a sign of a session after which it serves nothing any more
NO_PROGRESS = 30.0  # seconds of a recall in which the holder commits nothing
RECALL_MAX = 120.0  # seconds of a recall, whatever the holder commits
BACKOFF_MIN = 1.0  # seconds after a recall until the volume is delegated again
BACKOFF_MAX = 60.0
CALM = 60.0  # seconds without a recall, after the back-off, that make the next one the first again


class Delegated(Busy):
    """Another session has the volume's delegation: it is asked to return it; try again."""


def change(
    request: DelegationChange, epoch: int, holder: SessionId, sessions: Container[SessionId]
) -> tuple[int, ...] | None:
    """Body of the DELEGATION entry that a request makes; None if it changes nothing."""
    if isinstance(request, Delegate):
        return None if holder or request.sid not in sessions else (epoch + 1, request.sid)
    if isinstance(request, Return):
        return (epoch + 1, 0) if (holder, epoch) == (request.sid, request.epoch) else None
    if isinstance(request, Revoke):
        return (epoch + 1, 0, holder) if holder and epoch == request.epoch else None
    raise TypeError(f"{type(request).__name__} does not change a delegation")


def refuse(request: Commit, epoch: int, holder: SessionId) -> DfsError | None:
    """Why a commit may not be judged now; None if it may.

    Final when the request's epoch is not above `epoch`: epochs only grow.
    """
    if request.epoch:
        if (holder, epoch) == (request.sid, request.epoch):
            return None
        return Fenced(
            f"the delegation of epoch {request.epoch} is not session {request.sid}'s any more:"
            f" the epoch is {epoch}; what was not committed under it is lost"
        )
    return busy(holder) if holder not in (0, request.sid) else None


def busy(holder: SessionId) -> Delegated:
    """What a session is told while another one has the delegation."""
    return Delegated(f"session {holder} has the volume's delegation and is asked for it: try again")


class Standing:
    """What the owner of a ballot remembers of its sessions; it is lost with the ballot.

    Signs of life (*beats*) of all sessions, and the recall of the delegation: since when it is
    wanted, whether the holder makes progress, and how long it is kept back afterwards.
    """

    __slots__ = (
        "_backoff",
        "_beats",
        "_calm_at",
        "_moved_at",
        "_not_before",
        "_progress",
        "since",
        "told",
        "wanted_at",
    )

    def __init__(self, now: float) -> None:
        """The ballot was just won: every session may have been heard of a moment ago."""
        self.since = now
        self.wanted_at: float | None = None  # when the present delegation was recalled
        self.told = False  # whether an answer to the holder said so
        self._beats: dict[SessionId, float] = {}
        self._progress = 0
        self._moved_at = 0.0
        self._not_before = now
        self._backoff = BACKOFF_MIN
        self._calm_at = now

    # ---------------------------------------------------------------------------------- beats

    def heard(self, sid: SessionId, now: float) -> None:
        """A request of a session arrived or was answered."""
        self._beats[sid] = now

    def expired(
        self, sessions: Collection[SessionId], ttl: float, now: float
    ) -> tuple[SessionId, ...]:
        """Sessions without a beat for `ttl` seconds; beats of those that ended are forgotten."""
        self._beats = {sid: at for sid, at in self._beats.items() if sid in sessions}
        return tuple(sid for sid in sessions if self.silence(sid, now) > ttl)

    def heard_ago(self, sid: SessionId, now: float) -> float | None:
        """Seconds since a sign of a session; None if this owner has had none."""
        at = self._beats.get(sid)
        return None if at is None else now - at

    def silence(self, sid: SessionId, now: float) -> float:
        """Seconds since the last sign of a session that this owner can vouch for."""
        return now - max(self.since, self._beats.get(sid, self.since))

    # ---------------------------------------------------------------------------------- grants

    def wait(self, sid: SessionId, sessions: Iterable[SessionId], now: float) -> float:
        """Seconds until `sid` may be granted the delegation if nobody stirs; 0 for now.

        Another session may have been told something that it still relies on: it has to be silent.
        """
        wait = self._not_before - now
        for other in sessions:
            if other != sid:
                wait = max(wait, SILENCE - self.silence(other, now))
        return max(0.0, wait)

    # ---------------------------------------------------------------------------------- recalls

    def want(self, progress: int, now: float) -> bool:
        """Somebody else needs the volume; whether this begins a recall.

        `progress` is the number of the holder's last request in the journal.
        """
        if self.wanted_at is not None:
            return False
        self.wanted_at = self._moved_at = now
        self._progress = progress
        return True

    def ended(self, now: float) -> None:
        """The delegation changed hands."""
        if self.wanted_at is not None:
            again = now < self._calm_at
            self._backoff = min(2 * self._backoff, BACKOFF_MAX) if again else BACKOFF_MIN
            self._not_before = now + self._backoff
            self._calm_at = self._not_before + CALM
        self.wanted_at = None
        self.told = False

    def due(self, holder: SessionId, progress: int, now: float) -> float:
        """Seconds until the recalled delegation may be revoked if nothing happens; <= 0: now."""
        if self.wanted_at is None:
            return RECALL_MAX
        if progress != self._progress:
            self._progress, self._moved_at = progress, now
        silent = SILENCE - self.silence(holder, now)
        stuck = min(self._moved_at + NO_PROGRESS, self.wanted_at + RECALL_MAX) - now
        return min(silent, stuck)
