"""Clocks as values: whoever needs the time takes a `Clock`, so that tests own it."""

import time
from typing import Protocol

import trio


class Clock(Protocol):
    """Source of time."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; only differences mean anything."""
        ...

    def elapsed_ns(self) -> int:
        """Nanoseconds on a clock like `monotonic`, which goes on while the machine is suspended."""
        ...

    def time_ns(self) -> int:
        """Nanoseconds since the epoch, as wall clocks tell them: may jump, or be wrong."""
        ...


class SystemClock:
    """The machine's clocks; `monotonic` is trio's, so that it follows a test's `MockClock`."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`; must be called inside a trio run."""
        return trio.current_time()

    def elapsed_ns(self) -> int:
        """See `Clock.elapsed_ns`; must be called inside a trio run."""
        suspended = -time.monotonic_ns() + time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return int(trio.current_time() * 1e9) + suspended

    def time_ns(self) -> int:
        """See `Clock.time_ns`."""
        return time.time_ns()
