"""Each fault of the simulated network does what it says, and one seed gives one history."""

import random

import pytest
import trio
from conftest import run_seeded

from dfs.clock import SystemClock
from dfs.errors import DeadlineExceeded, DfsError, Unreachable
from dfs.testing.network import SimNetwork


def make(seed=1, **knobs):
    return SimNetwork(random.Random(seed), SystemClock(), **knobs)


class Counter:
    """A node that counts what reaches it."""

    def __init__(self, network, name):
        self.endpoint = network.endpoint(name)
        self.address = f"tcp://{name}:1"
        self.seen = []

    async def run(self, *, task_status):
        def note(context, args, data):
            self.seen.append(args[0])
            return args, b""

        async def slow(context, args, data):
            await trio.sleep(args[0])
            self.seen.append("slept")
            return (), b""

        await self.endpoint.serve(
            self.address,
            {"note": note, "slow": slow},
            started=lambda address: task_status.started(),
        )


async def tally(network, caller, to, count=400, timeout=0.5):
    """Outcomes of `count` calls made at once."""
    outcomes = []

    async def one(i):
        try:
            await caller.call(to, "note", (i,), timeout=timeout)
            outcomes.append("ok")
        except DfsError as e:
            outcomes.append(type(e).__name__)

    async with trio.open_nursery() as nursery:
        for i in range(count):
            nursery.start_soon(one, i)
    return {name: outcomes.count(name) for name in sorted(set(outcomes))}


async def test_without_faults_everything_arrives_once_in_order_and_in_time():
    async with make(delay=(0.1, 0.3)) as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        a = network.endpoint("a")
        for i in range(100):
            a.cast(b.address, "note", (i,))
        await trio.sleep(0.05)
        assert b.seen == []
        await trio.sleep(0.3)
        assert b.seen == list(range(100))
        nursery.cancel_scope.cancel()


async def test_drop():
    async with make(drop=0.2) as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        outcome = await tally(network, network.endpoint("a"), b.address)
        # 0.8 of the requests arrive, 0.64 of the calls succeed
        assert 290 < len(b.seen) < 350
        assert 220 < outcome["ok"] < 290
        assert outcome["ok"] + outcome["DeadlineExceeded"] == 400
        nursery.cancel_scope.cancel()


async def test_duplicates_run_handlers_twice_and_answer_once():
    async with make(duplicate=0.3) as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        assert await tally(network, network.endpoint("a"), b.address) == {"ok": 400}
        assert 480 < len(b.seen) < 560
        nursery.cancel_scope.cancel()


async def test_reorder():
    async with make(reorder=0.2) as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        a = network.endpoint("a")
        for i in range(100):
            a.cast(b.address, "note", (i,))
        await trio.sleep(1)
        assert b.seen != sorted(b.seen)
        assert sorted(b.seen) == list(range(100))
        nursery.cancel_scope.cancel()


async def test_one_way_block():
    async with make() as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        a = network.endpoint("a")
        network.block("b", "a")
        with pytest.raises(DeadlineExceeded):
            await a.call(b.address, "note", (1,), timeout=1)
        assert b.seen == [1]  # it arrived; the answer did not
        network.block("a", "b")
        network.unblock("b", "a")
        with pytest.raises(DeadlineExceeded):
            await a.call(b.address, "note", (2,), timeout=1)
        assert b.seen == [1]
        network.heal()
        await a.call(b.address, "note", (3,), timeout=1)
        nursery.cancel_scope.cancel()


async def test_partition_swallows_what_is_in_flight():
    async with make(delay=(0.1, 0.2)) as network, trio.open_nursery() as nursery:
        nodes = {name: Counter(network, name) for name in "abc"}
        for node in nodes.values():
            await nursery.start(node.run)
        client = network.endpoint("client")
        nodes["a"].endpoint.cast("tcp://b:1", "note", ("early",))
        network.partition([["a"], ["b", "c"]])
        await trio.sleep(1)
        assert nodes["b"].seen == []
        with pytest.raises(DeadlineExceeded):
            await nodes["a"].endpoint.call("tcp://b:1", "note", (1,), timeout=1)
        await nodes["c"].endpoint.call("tcp://b:1", "note", (2,), timeout=1)
        await client.call("tcp://a:1", "note", (3,), timeout=1)  # in no group: reaches all
        network.heal()
        network.isolate("b")
        with pytest.raises(DeadlineExceeded):
            await client.call("tcp://b:1", "note", (4,), timeout=1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("reset", "error"), [(1.0, Unreachable), (0.0, DeadlineExceeded)])
async def test_crash(reset, error):
    async with make(reset=reset) as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        a = network.endpoint("a")
        caught = []

        async def doomed():
            try:
                await a.call(b.address, "slow", (1,), timeout=5)
            except DfsError as e:
                caught.append((type(e), trio.current_time()))

        nursery.start_soon(doomed)
        await trio.sleep(0.5)
        b.endpoint.close()
        await trio.sleep(10)
        ((kind, when),) = caught
        assert kind is error
        assert when < 1 if reset else when == 5
        assert b.seen == []  # its handler died with it
        with pytest.raises(Unreachable, match="running"):
            await a.call(b.address, "note", (1,), timeout=5)
        # A closed endpoint's own calls fail too.
        with pytest.raises(Unreachable, match="closed"):
            await b.endpoint.call(b.address, "note", (1,), timeout=5)
        # The same name and address come back: a restart.
        again = Counter(network, "b")
        await nursery.start(again.run)
        await a.call(again.address, "note", (1,), timeout=5)
        nursery.cancel_scope.cancel()


async def test_a_crashed_node_that_was_cut_off_does_not_refuse():
    async with make() as network, trio.open_nursery() as nursery:
        b = Counter(network, "b")
        await nursery.start(b.run)
        a = network.endpoint("a")
        b.endpoint.close()
        network.block("a", "b")
        with pytest.raises(DeadlineExceeded):
            await a.call(b.address, "note", (1,), timeout=1)
        nursery.cancel_scope.cancel()


async def test_a_bug_in_a_handler_ends_the_test():
    def bug(context, args, data):
        raise KeyError("oops")

    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        async with make() as network, trio.open_nursery() as nursery:
            b, a = network.endpoint("b"), network.endpoint("a")
            nursery.start_soon(lambda: b.serve("tcp://b:1", {"bug": bug}, started=print))
            await trio.testing.wait_all_tasks_blocked()
            await a.call("tcp://b:1", "bug", timeout=1)


def history(seed):
    trace = []

    async def main():
        async with (
            make(seed, drop=0.1, duplicate=0.1, reorder=0.1) as network,
            trio.open_nursery() as nursery,
        ):
            nodes = [Counter(network, name) for name in "abc"]
            for node in nodes:
                await nursery.start(node.run)
            trace.append(await tally(network, nodes[0].endpoint, "tcp://b:1", 50))
            nodes[1].endpoint.close()
            trace.append(await tally(network, nodes[0].endpoint, "tcp://c:1", 50))
            trace.append((network.fingerprint, trio.current_time(), network.statistics()))
            nursery.cancel_scope.cancel()

    run_seeded(main, seed=seed)
    return trace


def test_one_seed_one_history():
    assert history(1) == history(1)
    assert history(1) != history(2)
