"""One heap of timers for a whole endpoint, served by one task.

A deadline per request as a trio cancel scope costs 7 us; a heap entry costs 0.5 us.  Most timers
are cancelled long before they are due, so cancelling only marks the entry and the heap is rebuilt
once half of it is dead: memory stays proportional to the live timers, the cost is amortised.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

import trio

# [when, serial, function or None once cancelled or fired, arguments]; compared by (when, serial)
Timer = list[Any]
_MIN_DEAD = 512


class Timers:
    """Calls functions at given trio times, in order of (time, registration)."""

    __slots__ = ("_dead", "_heap", "_ready", "_scope", "_serial")

    def __init__(self) -> None:
        """Empty; nothing fires until `run`."""
        self._heap: list[Timer] = []
        self._ready: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._serial = 0
        self._dead = 0
        self._scope: trio.CancelScope | None = None

    def at(self, when: float, fn: Callable[..., object], *args: Any) -> Timer:
        """Call `fn(*args)` from the timer task once trio's clock reaches `when`."""
        self._serial = serial = self._serial + 1
        timer: Timer = [when, serial, fn, args]
        heappush(self._heap, timer)
        scope = self._scope
        if scope is not None and when < scope.deadline:
            scope.deadline = when
        return timer

    def soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn(*args)` from the timer task at its next turn; never inline."""
        self._ready.append((fn, args))
        if self._scope is not None:
            self._scope.cancel()

    def cancel(self, timer: Timer) -> None:
        """Forget a timer; fine if it fired already."""
        if timer[2] is None:
            return
        timer[2] = None
        timer[3] = ()
        self._dead = dead = self._dead + 1
        if dead > _MIN_DEAD and dead * 2 > len(self._heap):
            self._heap = [t for t in self._heap if t[2] is not None]
            heapify(self._heap)
            self._dead = 0

    def __len__(self) -> int:
        """Number of live timers."""
        return len(self._heap) - self._dead + len(self._ready)

    async def run(self) -> None:
        """Serve until cancelled; what a function raises ends it."""
        while True:
            # Only what was ready before this turn: one that calls `soon` cannot starve others.
            ready, self._ready = self._ready, []
            for fn, args in ready:
                fn(*args)
            now = trio.current_time()
            # `cancel` may replace the heap while a function runs, hence no local alias.
            while self._heap and self._heap[0][0] <= now:
                timer = heappop(self._heap)
                due = timer[2]
                if due is None:
                    self._dead -= 1
                else:
                    timer[2] = None
                    due(*timer[3])
            if self._ready:
                await trio.lowlevel.checkpoint()
                continue
            with trio.CancelScope(deadline=self._heap[0][0] if self._heap else inf) as scope:
                self._scope = scope
                try:
                    await trio.sleep_forever()
                finally:
                    self._scope = None
