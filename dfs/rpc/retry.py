"""Trying again: exponential back-off with full jitter, bounded by a deadline.

Only for requests that may safely run twice.  See "Exponential Backoff And Jitter", AWS Architecture
Blog, 2015.
"""

from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import trio

from dfs.clock import Clock
from dfs.errors import Busy, DeadlineExceeded, DfsError, Unreachable

T = TypeVar("T")
TRANSIENT: tuple[type[DfsError], ...] = (Unreachable, Busy, DeadlineExceeded)


def pause(attempt: int, random: Random, *, first: float = 0.02, longest: float = 1.0) -> float:
    """Seconds to wait after attempt number `attempt` (from 0) failed."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(attempt, 30)))


async def retry(
    fn: Callable[[], Awaitable[T]],
    *,
    deadline: float,
    clock: Clock,
    random: Random,
    retry_on: tuple[type[DfsError], ...] = TRANSIENT,
    first: float = 0.02,
    longest: float = 1.0,
) -> T:
    """Await `fn()` until it succeeds, fails otherwise than `retry_on`, or `deadline` is near.

    `deadline` is in `clock.monotonic()` seconds; the last error is raised when the next pause would
    end after it.  `fn` gives its own requests a timeout that ends by then.
    """
    attempt = 0
    while True:
        try:
            return await fn()
        except retry_on:
            wait = pause(attempt, random, first=first, longest=longest)
            if clock.monotonic() + wait >= deadline:
                raise
        attempt += 1
        await trio.sleep(wait)
