"""The duty to listen: taken by one, passed on by who waits, ended for all."""

import itertools
import os

import pytest
import trio

from fuse.listen import STREAK, Listener, devices, first_wait

pytestmark = pytest.mark.realtime


class Pipe:
    """A pipe for a FUSE device: a byte is a request."""

    def __init__(self):
        self.out, self.into = os.pipe()
        self.listener = Listener(self.out)
        self.served = []  # (worker, request)

    def send(self, data):
        os.write(self.into, data)

    async def work(self, name, handler=None):
        """What a worker of pyfuse3 does: wait, read (which must not block), handle."""
        while await self.listener.wait():
            os.set_blocking(self.out, False)
            request = os.read(self.out, 1)  # raises if somebody else took it
            self.served.append((name, request))
            if not request:
                return
            if handler is not None:
                await first_wait(handler(request), self.listener.pass_on)

    def close(self):
        for fd in (self.out, self.into):
            os.close(fd)


@pytest.fixture
def pipe():
    p = Pipe()
    yield p
    p.close()


async def settle():
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    await trio.sleep(0.02)


async def test_one_worker_takes_what_needs_no_waiting(pipe):
    async def at_once(request):
        return None

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(pipe.work, name, at_once)
        await settle()
        pipe.send(b"123456")
        await settle()
        assert [r for _, r in pipe.served] == [b"1", b"2", b"3", b"4", b"5", b"6"]
        assert len({name for name, _ in pipe.served}) == 1
        assert pipe.listener.statistics() == {
            "at_once": 5, "waited": 1, "passed_on": 0, "resting": 2,
        }  # fmt: skip
        nursery.cancel_scope.cancel()


async def test_who_waits_passes_the_duty_on(pipe):
    release = trio.Event()

    async def slow(request):
        if request == b"s":
            await release.wait()

    async with trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(pipe.work, name, slow)
        await settle()
        pipe.send(b"s")
        await settle()
        pipe.send(b"12")
        await settle()
        assert [r for _, r in pipe.served] == [b"s", b"1", b"2"]
        (first, _), (second, _), _ = pipe.served
        assert first != second
        pipe.send(b"s")  # both wait now: nobody listens
        await settle()
        pipe.send(b"3")
        await settle()
        assert len(pipe.served) == 4
        release.set()
        await settle()
        assert pipe.served[-1][1] == b"3"
        nursery.cancel_scope.cancel()


async def test_other_tasks_get_a_turn_while_requests_never_end(pipe):
    turns = []

    async def at_once(request):
        turns.append(len(pipe.served))

    async def other():
        for _ in range(5):
            turns.append("other")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        pipe.send(b"x" * 10 * STREAK)
        nursery.start_soon(pipe.work, "a", at_once)
        nursery.start_soon(other)
        await settle()
        nursery.cancel_scope.cancel()
    first = [i for i, x in enumerate(turns) if x == "other"]
    assert len(first) == 5
    # Of one turn each, in either order: at most two streaks between.
    assert all(b - a <= 2 * STREAK + 1 for a, b in itertools.pairwise(first))


async def test_a_cancelled_listener_leaves_the_duty_to_another(pipe):
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def first():
            with scope:
                await pipe.work("first")

        nursery.start_soon(first)
        await settle()
        nursery.start_soon(pipe.work, "second")
        await settle()
        scope.cancel()
        await settle()
        pipe.send(b"1")
        await settle()
        assert pipe.served == [("second", b"1")]
        nursery.cancel_scope.cancel()


async def test_a_cancelled_worker_at_rest_is_not_woken(pipe):
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(pipe.work, "listens")
        await settle()

        async def rests():
            with scope:
                await pipe.work("rests")

        nursery.start_soon(rests)
        await settle()
        assert pipe.listener.statistics()["resting"] == 1
        scope.cancel()
        await settle()
        assert pipe.listener.statistics()["resting"] == 0
        nursery.cancel_scope.cancel()


async def test_everybody_ends_with_the_connection(pipe):
    """As at an unmount: poll says error or hang-up, who listens reads that, the others just end."""
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(pipe.work, name)
            await settle()
            os.close(pipe.into)
            pipe.into = os.open("/dev/null", os.O_WRONLY)
    assert [r for _, r in pipe.served] == [b""]


async def test_everybody_ends_when_it_is_closed(pipe):
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(pipe.work, name)
            await settle()
            pipe.listener.close()
            trio.lowlevel.notify_closing(pipe.out)
    assert not await pipe.listener.wait()


async def test_first_wait_is_transparent():
    waited = []

    async def result():
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return 7

    async def fails():
        await trio.lowlevel.checkpoint()
        raise KeyError("x")

    async def at_once():
        return 8

    async def cleans_up():
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            waited.append("cancelled")
            raise

    assert await first_wait(result(), lambda: waited.append(1)) == 7
    assert waited == [1]
    assert await first_wait(at_once(), lambda: waited.append(2)) == 8
    assert waited == [1]
    with pytest.raises(KeyError):
        await first_wait(fails(), lambda: None)
    with trio.move_on_after(0.01) as scope:
        await first_wait(cleans_up(), lambda: None)
    assert scope.cancelled_caught
    assert waited == [1, "cancelled"]


def test_devices_are_those_of_fuse():
    before = devices()
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        assert devices() - before == {fd}
    finally:
        os.close(fd)


async def test_something_may_be_done_between_an_answer_and_the_next_request(pipe):
    seen = []

    async def at_once(request):
        seen.append(request)

    pipe.listener.answered = lambda: seen.append("answered")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.work, "a", at_once)
        await settle()
        pipe.send(b"12")
        await settle()
        assert seen == ["answered", b"1", "answered", b"2", "answered"]
        nursery.cancel_scope.cancel()
