"""Learning newer maps, noticing forks, and judging requests by their epoch."""

import random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.cluster.map import METADATA, ClusterMap, Node
from dfs.daemon import FORK, read_alarm
from dfs.disk import RealDisk
from dfs.env import Context
from dfs.errors import Busy, Corrupt, ForkedMap, StaleEpoch, WrongCluster
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.network import SimNetwork

CLUSTER = bytes(16)


def node(number):
    address = f"tcp://n{number}:1"
    return Node(number, bytes([number + 1]) * 16, f"n{number}", "z", "r", f"h{number}", address, "")


def chain(length=3, extra=None):
    """Maps 1..length that grow by one node each; `extra` makes the last one another."""
    nodes = [node(n) for n in range(3)]
    chunk = Node(90, b"c" * 16, "c", "z", "r", "hc", "", "tcp://c:1")
    maps = [ClusterMap.create(CLUSTER, [*nodes, chunk])]
    for n in range(1, length):
        number = extra if extra and n == length - 1 else 2 + n
        nodes = [*nodes, node(number)]
        maps.append(maps[-1].successor([*nodes, chunk]))
    return maps


def changed_and_not(new):
    """(a partition whose homes changed in the map's epoch, one whose did not)."""
    changes = [new.last_change(METADATA, p) for p in range(4096)]
    return changes.index(new.epoch), next(p for p, e in enumerate(changes) if e < new.epoch)


def context(epoch):
    return Context("client", epoch, float("inf"), 0)


def test_persists_before_it_switches_and_tells():
    one, two, three = chain()
    order = []
    keeper = MapKeeper(one, save=lambda data: order.append((data, keeper().epoch)))
    keeper.subscribe(lambda old, new: order.append((old.epoch, new.epoch, keeper().epoch)))
    assert keeper.offer(two.encode())
    assert order == [(two.encode(), 1), (1, 2, 2)]
    assert not keeper.offer(one)
    assert not keeper.offer(two)
    assert keeper.offer(three)
    assert keeper() is three


def test_a_failed_save_keeps_the_old_map():
    one, two, _ = chain()

    def save(_data):
        raise OSError("no space")

    keeper = MapKeeper(one, save=save)
    with pytest.raises(OSError, match="no space"):
        keeper.offer(two)
    assert keeper() is one
    assert not keeper.forked


def test_takes_only_valid_maps_of_its_cluster():
    one, two, _ = chain()
    keeper = MapKeeper(one)
    damaged = bytearray(two.encode())
    damaged[100] ^= 1
    with pytest.raises(Corrupt):
        keeper.offer(damaged)
    stranger = ClusterMap.create(b"x" * 16, one.nodes)
    with pytest.raises(WrongCluster):
        keeper.offer(stranger)
    assert keeper() is one


@pytest.mark.parametrize("late", [False, True])
def test_two_maps_of_one_epoch_stop_writes(late):
    one, two = chain(2)
    other = chain(2, extra=7)[1]
    assert other.digest != two.digest
    keeper = MapKeeper(two)
    if late:  # the fork is in the past
        keeper.offer(two.successor([*two.nodes, node(9)]))
    with pytest.raises(ForkedMap, match="epoch 2"):
        keeper.offer(other)
    assert keeper.forked
    assert keeper.errors()
    done = []
    handler = keeper.guard(lambda *_: done.append(1) or ((), b""), lambda args: args)
    with pytest.raises(Busy, match="two different cluster maps"):
        handler(context(2), (), memoryview(b""))
    reader = keeper.guard(lambda *_: ((), b""), lambda args: args, writes=False)
    assert reader(context(2), (), memoryview(b"")) == ((), b"")
    assert not done
    assert one.epoch == 1


def test_a_successor_of_another_map_is_a_fork():
    _, two = chain(2)
    other = chain(3, extra=9)
    third = chain(2, extra=7)[1].successor([*other[1].nodes, node(8)])
    keeper = MapKeeper(two)
    with pytest.raises(ForkedMap):
        keeper.offer(third)


def test_a_fork_is_still_there_after_a_restart(tmp_path):
    one, _ = chain(2)
    disk = RealDisk(tmp_path)

    def started():
        return MapKeeper(
            one, alarm=read_alarm(disk), note=lambda text: disk.write_atomic(FORK, text.encode())
        )

    keeper = started()
    assert not keeper.forked
    keeper.heard(1, b"x" * 32, "tcp://a:1")
    for process in (keeper, started()):
        assert process.forked
        with pytest.raises(Busy, match="7878787878787878 at tcp://a:1") as caught:
            process.check(1, ())
        assert one.digest.hex()[:16] in str(caught.value)
        assert "remove its file `fork`" in str(caught.value)
    (tmp_path / FORK).unlink()
    assert not started().forked


def test_a_fork_that_cannot_be_noted_is_one_all_the_same(caplog):
    def full(_text):
        raise OSError("disk full")

    keeper = MapKeeper(chain(2)[0], note=full)
    keeper.heard(1, b"x" * 32)
    assert keeper.forked
    assert "cannot be noted" in caplog.text


def test_gossip_shows_forks_and_news_without_raising():
    one, two = chain(2)
    keeper = MapKeeper(one)
    assert keeper.heard(2, two.digest)
    assert keeper.errors()
    assert not keeper.heard(1, one.digest)
    assert not keeper.forked
    keeper.heard(1, b"x" * 32, "node n2")
    assert keeper.forked
    assert "node n2" in keeper.alarm


def test_a_request_that_missed_a_change_is_refused_with_the_map():
    one, two = chain(2)
    changed, same = changed_and_not(two)
    keeper = MapKeeper(two)
    handler = keeper.guard(lambda _c, args, _d: (args, b""), lambda args: args)
    assert handler(context(1), (same,), memoryview(b""))[0] == (same,)
    assert handler(context(0), (changed,), memoryview(b""))[0] == (changed,)
    with pytest.raises(StaleEpoch) as caught:
        handler(context(1), (same, changed), memoryview(b""))
    client = MapKeeper(one)
    assert client.learn(caught.value)
    assert client() == two
    assert not client.learn(caught.value)
    assert not client.learn(StaleEpoch("an old server's", 7))
    assert not client.learn(StaleEpoch("damaged", b"abc"))


async def test_fenced_waits_for_what_was_admitted_before():
    one, two = chain(2)
    keeper = MapKeeper(one)
    go = trio.Event()

    async def slow(_ctx, args, _data):
        await go.wait()
        return args, b""

    handler = keeper.guard(slow, lambda _args: ())
    async with trio.open_nursery() as nursery:

        async def call():
            assert await handler(context(1), (5,), memoryview(b"")) == ((5,), b"")

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        keeper.offer(two)
        assert keeper.fenced == 1
        dropped = handler(context(2), (), memoryview(b""))
        dropped.close()
        with keeper.admitted() as current:
            assert current is two
        assert keeper.fenced == 1
        go.set()
    assert keeper.fenced == 2
    never = keeper.guard(slow, lambda _args: ())(context(2), (), memoryview(b""))
    third = two.successor([*two.nodes, node(8)])
    keeper.offer(third)
    assert keeper.fenced == 2
    never.close()
    assert keeper.fenced == 3


async def test_a_newer_request_makes_the_node_fetch_the_map_first():
    one, two = chain(2)
    clock = SystemClock()
    async with SimNetwork(random.Random(1), clock) as network, trio.open_nursery() as nursery:
        asked = []

        async def serve(number, task_status):
            endpoint = network.endpoint(f"n{number}")

            def get(_ctx, _args, _data):
                asked.append(number)
                return (two.encode(),), b""

            await endpoint.serve(
                f"tcp://n{number}:1", {"map.get": get}, started=lambda _a: task_status.started()
            )

        late = network.endpoint("n0")
        await nursery.start(serve, 1)
        keeper = MapKeeper(one, rpc=late, clock=clock, random=random.Random(2), own="tcp://n0:1")
        seen = []
        handler = keeper.guard(lambda *_: seen.append(keeper().epoch) or ((), b""), lambda _a: ())
        async with trio.open_nursery() as calls:
            for _ in range(20):
                calls.start_soon(handler, context(2), (), memoryview(b""))
        assert seen == [2] * 20
        assert 1 <= len(asked) <= 2
        with pytest.raises(Busy, match="epoch 9"):
            await handler(context(9), (), memoryview(b""))
        nursery.cancel_scope.cancel()


async def test_polling_is_enough_to_hear_of_a_map():
    one, two = chain(2)
    clock = SystemClock()
    async with SimNetwork(random.Random(1), clock) as network, trio.open_nursery() as nursery:
        keeper = MapKeeper(
            one, rpc=network.endpoint("n0"), clock=clock, random=random.Random(2), own="tcp://n0:1"
        )
        nursery.start_soon(keeper.poll)

        async def serve(number):
            await network.endpoint(f"n{number}").serve(
                f"tcp://n{number}:1",
                {"map.get": lambda *_: ((two.encode(),), b"")},
                started=lambda _a: None,
            )

        nursery.start_soon(serve, 2)
        with trio.fail_after(120):
            assert await keeper.wait_for(2) == two
        nursery.cancel_scope.cancel()
