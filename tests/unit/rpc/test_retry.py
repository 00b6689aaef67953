"""Trying again."""

import random

import pytest
import trio
import trio.lowlevel

from dfs.clock import SystemClock
from dfs.errors import Busy, Corrupt, Unreachable
from dfs.rpc.retry import pause, retry


async def attempt(failures, deadline=10.0, error=Unreachable, **options):
    times = []

    async def once():
        times.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if len(times) <= failures:
            raise error("not yet")
        return len(times)

    result = None
    try:
        result = await retry(
            once, deadline=deadline, clock=SystemClock(), random=random.Random(5), **options
        )
    finally:
        attempt.times = times
    return result


async def test_succeeds_after_failures():
    assert await attempt(0) == 1
    assert await attempt(6) == 7
    gaps = [b - a for a, b in zip(attempt.times, attempt.times[1:], strict=False)]
    assert all(gap <= 0.02 * 2**i for i, gap in enumerate(gaps))


async def test_ends_by_the_deadline_with_the_last_error():
    with pytest.raises(Busy):
        await attempt(10**9, deadline=3.0, error=Busy)
    assert 1.0 < trio.current_time() <= 3.0
    assert len(attempt.times) > 5


async def test_other_errors_pass():
    with pytest.raises(Corrupt):
        await attempt(1, error=Corrupt)
    assert len(attempt.times) == 1
    assert await attempt(1, error=Corrupt, retry_on=(Corrupt,)) == 2


def test_pauses_stay_bounded():
    source = random.Random(1)
    assert max(pause(10**6, source, longest=0.5) for _ in range(100)) <= 0.5
