"""Pushing partitions to new homes: batches, failures, restarts, lost messages."""

import random

import trio

from dfs.clock import SystemClock
from dfs.cluster.joint import has
from dfs.cluster.map import METADATA
from dfs.env import Env
from dfs.errors import Unreachable
from dfs.hashing import PARTITIONS
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.mapcluster import MapCluster, first_map, member
from dfs.testing.network import SimNetwork
from metadata.exchange import Outcome
from metadata.rebalance import BATCH, Rebalance

FIRST = first_map(3)
MOVING = FIRST.begin([*FIRST.nodes, member(4)])


class Rows(dict):
    async def batch(self, ops):
        self.update(ops)


class Peer:
    """Takes batches; some calls fail, some partitions fail the first time."""

    def __init__(self, *, seconds=0.001, broken=(), down=0):
        self.seconds = seconds
        self.broken = set(broken)
        self.down = down
        self.batches = []
        self.held = {}

    async def __call__(self, partitions, to, rest):
        await trio.sleep(self.seconds)
        if self.down:
            self.down -= 1
            raise Unreachable("down")
        self.batches.append(len(partitions))
        failed = [p for p in partitions if p in self.broken]
        self.broken.difference_update(failed)
        self.held.setdefault(to, set()).update(set(partitions) - set(failed))
        await rest(10 * len(partitions), 0)
        return Outcome(failed=failed, errors=[f"partition {p}: damaged" for p in failed])


def worker(keeper, push, rows):
    env = Env(SystemClock(), None, None, None, random.Random(1))
    return Rebalance(env, 1, keeper, rows, push)


async def pushed_by(push, rows, within=60.0):
    """Run for a while; the worker, and how long it pushed."""
    took = 0.0

    async def timed(partitions, to, rest):
        nonlocal took
        try:
            return await push(partitions, to, rest)
        finally:
            took = trio.current_time() - began

    made = worker(MapKeeper(MOVING), timed, rows)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.sleep(within)
        nursery.cancel_scope.cancel()
    assert not made.todo(MOVING)
    return made, took


def wanted():
    return worker(MapKeeper(MOVING), None, Rows()).todo(MOVING)


async def test_everything_arrives_in_few_batches_and_is_told():
    peer, rows = Peer(), Rows()
    made, took = await pushed_by(peer, rows)
    assert {to: sorted(held) for to, held in peer.held.items()} == wanted()
    assert took < 1
    assert len(peer.batches) < PARTITIONS / BATCH[1]
    assert made.left == 0
    assert made.sent == 10 * sum(peer.batches)
    told = made.pushed
    assert all(has(told[to], p) for to, held in peer.held.items() for p in held)


async def test_a_peer_that_is_down_for_a_while_gets_it_later():
    peer = Peer(down=20)
    made, took = await pushed_by(peer, Rows())
    assert {to: sorted(held) for to, held in peer.held.items()} == wanted()
    assert made.errors == {}
    assert took < 30


async def test_partitions_that_fail_are_pushed_again_and_not_told_before():
    broken = [p for ps in wanted().values() for p in ps][::50]
    peer = Peer(broken=broken)
    told = []

    async def push(partitions, to, rest):
        outcome = await peer(partitions, to, rest)
        told.append((to, set(outcome.failed)))
        return outcome

    made, _ = await pushed_by(push, Rows())
    assert any(failed for _, failed in told)
    assert {to: sorted(held) for to, held in peer.held.items()} == wanted()
    assert made.errors == {}


async def test_slow_batches_become_small():
    peer = Peer(seconds=3.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker(MapKeeper(MOVING), peer, Rows()).run)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert peer.batches[0] == BATCH[1]
    assert peer.batches[-1] == BATCH[0]


async def test_after_a_restart_only_the_rest_is_pushed():
    first, rows = Peer(), Rows()
    await pushed_by(first, rows)
    again = Peer()
    made, _ = await pushed_by(again, rows)
    assert again.batches == []
    assert made.pushed


class NeverFenced(MapKeeper):
    fenced = 1


async def test_nothing_is_pushed_before_older_requests_have_ended():
    peer = Peer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker(NeverFenced(MOVING), peer, Rows()).run)
        await trio.sleep(5)
        assert peer.batches == []
        nursery.cancel_scope.cancel()


async def test_a_move_of_empty_partitions_ends_soon_though_messages_are_lost():
    async with SimNetwork(random.Random(3), SystemClock()) as network, trio.open_nursery() as n:
        cluster = MapCluster(1, network, n)
        await cluster.start()
        await trio.sleep(5)
        new = cluster.newest.begin([*cluster.newest.nodes, member(4)])
        network.drop = 0.02
        await cluster.propose(network.endpoint("operator"), new)
        await cluster.add_machine(4)
        began = trio.current_time()
        while cluster.newest.transition is not None:
            await trio.sleep(0.1)
            assert trio.current_time() < began + 40
        assert len(new.changed(METADATA)) > PARTITIONS // 2
        n.cancel_scope.cancel()
