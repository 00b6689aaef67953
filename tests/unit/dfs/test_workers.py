"""Background loops: rounds, pauses, rates, errors, and the list of them."""

import random
from types import SimpleNamespace

import pytest
import trio

from dfs import codec
from dfs.clock import SystemClock
from dfs.env import Context
from dfs.errors import Busy, InvalidArgument, NotFound
from dfs.pace import Bandwidth
from dfs.workers import STATUS, Observed, Worker, handlers, lines

ENV = SimpleNamespace(clock=SystemClock(), random=random.Random(1))
CONTEXT = Context("test", 0, float("inf"), 1)


class Counter(Worker):
    name = "counter"

    def __init__(self, interval=100.0, steps=1, size=0, **options):
        super().__init__(ENV, interval, **options)
        self.steps = steps
        self.size = size
        self.done = 0
        self.error = None

    async def run_once(self):
        for _ in range(self.steps):
            if self.error:
                raise self.error
            self.done += 1
            self.did(1, self.size)
            await self.rest(size=self.size)
        return self.steps


async def test_rounds_come_at_the_interval_and_when_woken():
    w = Counter(first=0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.run)
        await trio.sleep(1)
        assert w.done == 1
        assert 70 < w.status()["next_in"] < 125
        await trio.sleep(1000)
        assert 8 <= w.done <= 14
        before = w.done
        w.wake()
        await trio.sleep(0.1)
        assert w.done == before + 1 == w.rounds
        nursery.cancel_scope.cancel()


async def test_a_paused_worker_stops_between_steps_and_goes_on():
    w = Counter(first=0.0, steps=10, size=1000)
    w.bandwidth = Bandwidth(1000.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.run)
        await trio.sleep(4.5)
        assert w.state == "running"
        w.pause()
        await trio.sleep(500)
        done = w.done
        assert w.state == "paused"
        assert done < 10
        w.wake()
        await trio.sleep(500)
        assert w.done == done
        w.resume()
        await trio.sleep(20)
        assert w.done >= 10
        nursery.cancel_scope.cancel()


async def test_bandwidth_holds_a_round_back():
    w = Counter(first=0.0, steps=100, size=1 << 20)
    w.bandwidth = Bandwidth(10 << 20)
    start = trio.current_time()
    await w.round()
    took = trio.current_time() - start
    assert 8.5 <= took <= 10.1
    status = w.status()
    assert status["items"] == 100
    assert status["bytes_per_s"] == pytest.approx((100 << 20) / took, rel=0.1)


async def test_what_a_round_returns_is_not_counted_twice():
    w = Counter(steps=3)
    await w.round()
    await w.round()
    assert w.meter.items == 6

    class Quiet(Counter):
        async def run_once(self):
            return 5

    w = Quiet()
    await w.round()
    assert w.meter.items == 5


async def test_an_error_is_told_with_its_time_and_the_loop_goes_on():
    w = Counter(first=0.0)
    w.error = Busy("try again")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.run)
        await trio.sleep(1)
        status = w.status()
        assert (status["state"], status["last_error"]) == ("failed", "try again")
        assert status["last_error_at"] > 10**18
        w.error = None
        await trio.sleep(200)
        assert w.state == "waiting"
        assert w.last_error == "try again"  # when it was is told with it
        w.last_error = ""
        assert w.status()["last_error_at"] == 0
        nursery.cancel_scope.cancel()


async def test_an_error_that_is_none_of_ours_ends_the_loop():
    w = Counter(first=0.0)
    w.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await w.run()


async def test_the_list_and_the_steering():
    w = Counter()
    counts = {"items": 1000, "bytes": 0}
    other = Observed("flush", ENV.clock, lambda: {**counts, "progress": "3 tables"})
    methods = handlers(lambda: (w, other))
    (listed,), _ = methods["node.workers"](CONTEXT, (), b"")
    assert codec.unpack(codec.pack(listed)) == listed
    for status in listed:
        assert all(field in STATUS for field in status)
        assert set(status) == set(listed[0])
    assert listed[1]["items_per_s"] == 0  # what was before the first look is no rate
    await trio.sleep(10)
    counts["items"] += 50
    (listed,), _ = methods["node.workers"](CONTEXT, (), b"")
    assert listed[1]["items_per_s"] == pytest.approx(5.0)
    assert lines((w, other))[1] == ("flush", "waiting", "3 tables", "")

    def steer(*args):
        return methods["node.steer"](CONTEXT, args, b"")[0][0]

    assert steer("counter", "pause")["state"] == "paused"
    assert steer("counter", "pause")["state"] == "paused"
    assert steer("counter", "resume")["state"] == "waiting"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.run)
        await trio.sleep(1)
        assert w.done == 0
        steer("counter", "pause")
        steer("counter", "run")
        await trio.sleep(1)
        assert w.done == 1
        nursery.cancel_scope.cancel()
    with pytest.raises(NotFound, match="counter, flush"):
        steer("nonsense", "run")
    with pytest.raises(InvalidArgument, match="cannot be steered"):
        steer("flush", "run")
    with pytest.raises(InvalidArgument):
        steer("counter", "dance")
