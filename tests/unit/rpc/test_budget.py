"""The byte semaphore."""

import trio
import trio.testing

from dfs.rpc.budget import Budget, Share


async def test_limits_and_order():
    budget = Budget(100)
    a, b = Share(60), Share(60)
    assert budget.acquire_nowait(a, 50)
    assert not budget.acquire_nowait(a, 20)  # over its share
    assert budget.acquire_nowait(b, 40)
    got = []

    async def wait(share, size, name):
        await budget.acquire(share, size)
        got.append(name)

    async with trio.open_nursery() as nursery:
        for share, size, name in [(a, 20, "a"), (b, 15, "b1"), (b, 5, "b2")]:
            nursery.start_soon(wait, share, size, name)
            await trio.testing.wait_all_tasks_blocked()
        budget.release(b, 40)  # a stays over its share and must not hold up b
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(got) == ["b1", "b2"]
        assert not budget.acquire_nowait(Share(60), 1)  # nobody overtakes those who wait
        budget.release(a, 50)
    assert got[2] == "a"
    assert (a.used, b.used, budget.used) == (20, 20, 40)


async def test_something_larger_than_the_limit_passes_alone():
    budget = Budget(10)
    share = Share(5)
    assert budget.acquire_nowait(share, 100)
    assert not budget.acquire_nowait(Share(5), 1)
    budget.release(share, 100)
    assert budget.acquire_nowait(Share(5), 1)


async def test_giving_up():
    budget = Budget(10)
    share = Share(10)
    assert budget.acquire_nowait(share, 10)
    with trio.move_on_after(1) as scope:
        await budget.acquire(share, 5)
    assert scope.cancelled_caught
    budget.release(share, 10)
    assert (budget.used, share.used) == (0, 0)
    assert budget.acquire_nowait(share, 10)
