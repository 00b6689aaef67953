"""The recall of a volume's delegation: who waits for it, and the pressure on its holder.

One `Recall` lives as long as its home owns the ballot.  The rules and their times are those of
`metadata.delegation`; here are the tasks and the waiting.  What is looked at and what follows from
it happen without an await in between: whether a session may be told something, whether everybody
else is silent, whether the holder is.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from dfs.clock import Clock
from dfs.errors import DfsError
from dfs.ids import SessionId
from metadata.delegation import BACKOFF_MIN, SILENCE, Standing, busy
from metadata.requests import Request, Revoke
from metadata.volumes import HomeCore
from metadata.waiter import Waiter

log = logging.getLogger(__name__)

RECALL_WAIT = 1.0  # seconds that a request waits; a home that forwarded it waits longer than that
LOOK = 1.0  # seconds between looks at a holder that is asked to return the delegation
RETRY = 1.0  # seconds after a revocation that failed


class Recall:
    """One volume's delegation at the home that owns the ballot; see the module's docstring."""

    def __init__(
        self,
        core: HomeCore,
        clock: Clock,
        nursery: trio.Nursery,
        submit: Callable[[Request], Awaitable[Any]],
        alert: Callable[[SessionId], None],
    ) -> None:
        """`submit` gets a request into the journal; `alert` answers a session's watches now."""
        self.standing = Standing(clock.monotonic())
        self._core = core
        self._clock = clock
        self._nursery = nursery
        self._submit = submit
        self._alert = alert
        self._waiting: dict[Waiter, None] = {}
        self._pressing = False
        self._over = False

    def heard(self, sid: SessionId) -> None:
        """A request of a session arrived or is answered."""
        self.standing.heard(sid, self._clock.monotonic())

    # ------------------------------------------------------------------------------- answering

    def state(self, sid: SessionId) -> tuple[int, SessionId, bool]:
        """What an answer to `sid` says: (epoch, holder, whether it is wanted)."""
        core, wanted = self._core, self.standing.wanted_at is not None
        if wanted and sid == core.holder:
            self.standing.told = True
        return core.epoch, core.holder, wanted

    def untold(self, sid: SessionId) -> bool:
        """Whether `sid` shall return the delegation and no answer has said so yet."""
        standing = self.standing
        return standing.wanted_at is not None and not standing.told and sid == self._core.holder

    def wait(self, sid: SessionId) -> float:
        """Seconds until `sid` may be granted the delegation if nobody stirs; 0 for now."""
        if self._core.claimant:
            return SILENCE
        wait = self.standing.wait(sid, self._core.sessions, self._clock.monotonic())
        return max(wait, BACKOFF_MIN) if self._waiting else wait

    def admits(self, sid: SessionId) -> bool:
        """Whether `sid` may be told about now, without a wait; see `admitted`."""
        core = self._core
        return not self._over and core.claimant in (0, sid) and not core.losing(sid)

    async def admitted(self, sid: SessionId, give_up: float) -> None:
        """Wait until `sid` may be told about now: then this does not yield any more.

        That is when no other session has the delegation or is about to get it, and when nothing
        that is under way takes it from `sid`.  Returns as well when the ballot is lost.  Raises
        `Busy` at the time `give_up`.
        """
        core = self._core
        while not self._over:
            claimant = core.claimant
            if claimant in (0, sid) and not core.losing(sid):
                return
            if claimant != sid:
                self._want()
            left = give_up - self._clock.monotonic()
            if left <= 0:
                raise busy(claimant)
            waiter = Waiter()
            self._waiting[waiter] = None
            try:
                with trio.move_on_after(left):
                    await waiter.wait()
            finally:
                self._waiting.pop(waiter, None)

    # -------------------------------------------------------------------------------- recalling

    def wake(self) -> None:
        """Let those who wait look again."""
        for waiter in self._waiting:
            waiter.set(True)

    def changed(self) -> None:
        """The delegation changed hands."""
        self.standing.ended(self._clock.monotonic())
        self.wake()

    def end(self) -> None:
        """The ballot is lost."""
        self._over = True
        self.wake()

    def _progress(self) -> int:
        session = self._core.sessions.get(self._core.holder)
        return 0 if session is None else session.no

    def _want(self) -> None:
        core = self._core
        if core.holder and self.standing.want(self._progress(), self._clock.monotonic()):
            self._alert(core.holder)
            if not self._pressing:
                self._pressing = True
                self._nursery.start_soon(self._press)

    async def _press(self) -> None:
        """Revoke the delegation when its holder is silent or does not get on."""
        core, standing = self._core, self.standing
        try:
            while not self._over and standing.wanted_at is not None:
                now = self._clock.monotonic()
                due = standing.due(core.holder, self._progress(), now)
                if due > 0:
                    # Not less than a clock can show: a sleep that ends at once would look again.
                    await trio.sleep(min(max(due, 0.001), LOOK))
                    continue
                silence = standing.silence(core.holder, now)
                log.warning(
                    "session %x did not return its delegation in %.1f s, last heard of %.1f s ago:"
                    " its session ends",
                    core.holder,
                    now - standing.wanted_at,
                    silence,
                )
                try:
                    await self._submit(Revoke(core.epoch))
                except DfsError as e:
                    log.info("cannot revoke a delegation now: %s", e)
                    await trio.sleep(RETRY)
        finally:
            self._pressing = False
