"""Freshness: how old the newest confirmed answer is, and waiting for a newer one."""

import trio

from dfs.clock import Clock

FRESH = 1.5  # seconds a confirmed answer keeps a view fresh


class Freshness:
    """A view is fresh while the last confirmed answer was asked for `FRESH` seconds ago or less.

    Counting from the question, not the answer, makes it a promise: nothing older than that is
    shown, however long the answer took.
    """

    __slots__ = ("_clock", "_confirmed", "_news", "_over", "limit")

    def __init__(self, clock: Clock) -> None:
        """Not fresh.  `limit` may be raised for as long as nobody else can change anything."""
        self._clock = clock
        self.limit = FRESH
        self._confirmed = float("-inf")
        self._over = False
        self._news = trio.lowlevel.ParkingLot()

    @property
    def now(self) -> bool:
        """Whether the view may answer."""
        return self._clock.monotonic() - self._confirmed <= self.limit

    @property
    def age(self) -> float:
        """Seconds since the last confirmed answer was asked for."""
        return self._clock.monotonic() - self._confirmed

    def confirm(self, asked_at: float) -> None:
        """A confirmed answer came to a question asked at `asked_at`."""
        self._confirmed = max(self._confirmed, asked_at)
        self._news.unpark_all()

    def lose(self) -> None:
        """Not fresh until the next answer."""
        self._confirmed = float("-inf")

    def end(self) -> None:
        """Never fresh again: there is nothing to wait for."""
        self._over = True
        self._news.unpark_all()

    def wake(self) -> None:
        """The view moved: let those who wait look again."""
        self._news.unpark_all()

    async def wait_news(self) -> None:
        """Until the next `confirm` or `wake`."""
        await self._news.park()

    async def wait(self, give_up: float) -> bool:
        """Until fresh, or the monotonic time `give_up`; whether it is."""
        with trio.move_on_at(give_up):
            while not self.now and not self._over:
                await self._news.park()
        return self.now
