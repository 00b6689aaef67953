"""The timer heap."""

import random

import trio
import trio.testing

from dfs.rpc.timers import Timers


async def test_order_and_time():
    timers = Timers()
    fired = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        delays = [random.Random(1).randrange(100) for _ in range(500)]
        for i, delay in enumerate(delays):
            timers.at(delay, lambda d, n: fired.append((trio.current_time(), d, n)), delay, i)
        await trio.sleep(50)
        assert len(fired) == sum(d <= 50 for d in delays)
        await trio.sleep(50)
        # The task sleeps without a deadline now; an earlier timer must wake it.
        early = []
        timers.at(200, early.append, 200)
        await trio.sleep(1)
        timers.at(150, early.append, 150)
        await trio.sleep(49)
        assert early == [150]
        nursery.cancel_scope.cancel()
    assert all(at == delay for at, delay, _ in fired)
    assert [f[1:] for f in fired] == sorted((d, n) for n, d in enumerate(delays))


async def test_cancelled_timers_do_not_fire_and_cost_no_memory():
    timers = Timers()
    fired = []
    kept = []
    for i in range(20_000):
        timer = timers.at(10.0 + i % 7, fired.append, i)
        if i % 100:
            timers.cancel(timer)
            timers.cancel(timer)  # twice is fine
        else:
            kept.append(i)
    assert len(timers) == len(kept)
    assert len(timers._heap) < 2000
    with trio.move_on_after(100):
        await timers.run()
    assert sorted(fired) == kept
    assert len(timers) == 0


async def test_soon_is_never_inline_and_starves_nobody():
    timers = Timers()
    fired = []

    def again(n):
        fired.append(n)
        if n < 1000:
            timers.soon(again, n + 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        await trio.testing.wait_all_tasks_blocked()
        timers.soon(again, 0)
        assert not fired
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert 0 < len(fired) < 1000
        await trio.sleep(1)
        assert fired == list(range(1001))
        nursery.cancel_scope.cancel()


async def test_a_function_may_cancel_and_add():
    timers = Timers()
    fired = []
    later = timers.at(1.0, fired.append, "never")
    timers.at(0.5, timers.cancel, later)
    timers.at(0.5, lambda: timers.at(0.1, fired.append, "past"))
    with trio.move_on_after(5):
        await timers.run()
    assert fired == ["past"]
