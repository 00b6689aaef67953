"""Registers served by nodes on a simulated network and simulated disks."""

from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from smallkv import make_map, member

from dfs.cluster.map import METADATA
from dfs.env import Env
from dfs.errors import Busy, DiskFull, InvalidArgument, NoQuorum, NotHome, Unreachable
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.chunkcluster import SimClock
from dfs.testing.disk import SimDisk
from dfs.testing.network import SimNetwork
from dfs.testing.processes import SimProcesses
from metadata.kv import KV
from metadata.merkle import Digests
from metadata.registers import RAW, partition_of_row, row_of
from metadata.replica import GATHER, SIBLINGS
from metadata.store.engine import Store


class World:
    def __init__(self, network, cluster_map):
        self.network = network
        self.map = cluster_map
        self.keepers, self.kvs, self.stores, self.scopes = {}, {}, {}, {}
        self.disks = {}
        self.client = network.endpoint("client")

    async def call(self, node, method, *args, timeout=10.0):
        address = self.map.address(METADATA, node)
        result, _ = await self.client.call(
            address, method, args, timeout=timeout, epoch=self.map.epoch
        )
        return result

    def homes(self, key):
        return self.map.read_homes(METADATA, partition_of_row(row_of(0, key)))

    async def start(self, nursery, number, cluster_map, **given):
        env = Env(
            SimClock(),
            self.disks.setdefault(number, SimDisk(Random(number))),
            self.network.endpoint(f"n{number}"),
            SimProcesses(Random(1)),
            Random(number),
        )
        keeper = self.keepers[number] = MapKeeper(
            cluster_map, rpc=env.rpc, clock=env.clock, random=env.random
        )
        self.stores[number] = store = await Store.open(env)
        digests = Digests(store)
        digests.load()
        kv = self.kvs[number] = KV(env, number, keeper, store, digests=digests, **given)

        async def life(*, task_status):
            with trio.CancelScope() as self.scopes[number]:
                async with trio.open_nursery() as inner:
                    inner.start_soon(store.run)
                    await inner.start(kv.run)
                    handlers = {
                        **kv.handlers(),
                        "map.get": lambda c, a, d: ((keeper().encode(),), b""),
                    }
                    await env.rpc.serve(
                        cluster_map.address(METADATA, number), handlers, started=task_status.started
                    )

        await nursery.start(life)

    def crash(self, number):
        self.scopes[number].cancel()
        self.network.endpoint(f"n{number}")


@asynccontextmanager
async def running(count=3, **given):
    async with SimNetwork(Random(7), SimClock()) as network, trio.open_nursery() as nursery:
        world = World(network, make_map(count))
        world.nursery = nursery
        for node in world.map.nodes:
            await world.start(nursery, node.number, world.map, **given)
        yield world
        nursery.cancel_scope.cancel()


async def test_put_get_delete_through_any_node():
    async with running(5) as w:
        context, siblings, _ = await w.call(0, "kv.put", 0, b"k", b"v", None, {})
        assert siblings == 1
        for node in range(5):
            values, seen, told = await w.call(node, "kv.get", 0, b"k", {})
            assert (values, seen) == ((b"v",), context)
            assert told["coordinator"] in w.homes(b"k")
        assert await w.call(1, "kv.get", 1, b"k", {}) != await w.call(1, "kv.get", 0, b"k", {})
        await w.call(2, "kv.put", 0, b"k", None, context, {})
        assert (await w.call(3, "kv.get", 0, b"k", {}))[0] == ()


async def test_many_at_once_share_batches_and_syncs():
    async with running(3) as w:
        async with trio.open_nursery() as nursery:
            for i in range(200):
                nursery.start_soon(w.call, i % 3, "kv.put", 0, b"%d" % i, b"v", b"", {})
        await trio.sleep(1)  # the third copies
        totals = [kv.statistics() for kv in w.kvs.values()]
        assert sum(t["requests"] for t in totals) == 600
        assert sum(t["passes"] for t in totals) < 200
        assert sum(t["batches"] for t in totals) < 200
        assert all(t["under_way"] == 0 for t in totals)


async def test_a_pass_after_a_crowded_one_gathers_and_a_lone_writer_never_waits():
    async with running(3) as w:
        w.disks[0].sync_delay = 0.0
        replica = w.kvs[0].replica
        began = []  # (when, requests) of each pass
        apply = replica.registers.apply

        def spy(now_us, work):
            began.append((trio.current_time(), len(work)))
            return apply(now_us, work)

        replica.registers.apply = spy

        async def write(requests, after=0.0):
            await trio.sleep(after)
            await replica.write([(RAW, [(b"x", b"1")])] * requests)

        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(write, SIBLINGS - 1, i * GATHER / 10)
        lone = [when for when, _ in began]
        assert len(lone) == 4
        assert lone[-1] - lone[0] < GATHER
        began.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, SIBLINGS)
            for i in range(1, 10):
                nursery.start_soon(write, 1, i * GATHER / 10)
        assert [count for _, count in began] == [SIBLINGS, 9]
        assert began[1][0] - began[0][0] == pytest.approx(GATHER)
        began.clear()
        await trio.sleep(GATHER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, SIBLINGS)
            nursery.start_soon(write, SIBLINGS, GATHER / 10)  # as many: nobody else is awaited
        assert began[1][0] - began[0][0] == pytest.approx(GATHER / 10)


async def test_one_node_down_is_not_noticed_and_two_are_named():
    async with running(3) as w:
        first, second, third = w.homes(b"k")
        await w.call(first, "kv.put", 0, b"k", b"v", None, {})
        w.crash(third)
        context = (await w.call(first, "kv.put", 0, b"k", b"w", None, {}))[0]
        assert (await w.call(second, "kv.get", 0, b"k", {}))[:2] == ((b"w",), context)
        w.crash(second)
        with pytest.raises(NoQuorum, match=f"node {first} ok.*node {second} unreachable") as e:
            await w.call(first, "kv.get", 0, b"k", {})
        assert e.value.details[0] == "2 of 3"
        assert e.value.details[1][first] == "ok"
        with pytest.raises(NoQuorum, match=f"node {first} ok"):  # in time, however short it is
            await w.call(first, "kv.get", 0, b"k", {}, timeout=0.14)


async def test_nobody_forwards_twice():
    async with running(5) as w:
        stranger = next(n for n in range(5) if n not in w.homes(b"k"))
        with pytest.raises(NotHome):
            await w.call(stranger, "kv.get", 0, b"k", {}, True)
        for home in w.homes(b"k"):
            w.crash(home)
        with pytest.raises(Unreachable):
            await w.call(stranger, "kv.get", 0, b"k", {})


async def test_bad_arguments_are_refused():
    async with running(3) as w:
        for args in ((0, b"", {}), (256, b"k", {}), (0, b"k", {"level": "most"}), (0, b"k", 7)):
            with pytest.raises(InvalidArgument):
                await w.call(0, "kv.get", *args)
        with pytest.raises(InvalidArgument):
            await w.call(0, "kv.put", 0, b"k", "text", None, {})
        with pytest.raises(InvalidArgument):
            await w.call(0, "kv.put", 0, b"k", b"v", b"no context", {})
        with pytest.raises(InvalidArgument, match="between nodes"):
            await w.call(0, "reg.batch", 1, (("p", row_of(0, b"k"), b"", b"v"),))


async def test_values_are_refused_when_there_is_no_room_and_deletes_are_not():
    def admit(size):
        raise DiskFull("the disk is full; delete something")

    async with running(3, admit=admit) as w:
        with pytest.raises(DiskFull, match="delete something"):
            await w.call(0, "kv.put", 0, b"k", b"v", None, {})
        await w.call(0, "kv.put", 0, b"k", None, None, {})


async def test_scans_find_every_key_once_in_pages_and_no_deleted_one():
    async with running(5) as w:
        keys = {b"a/%d" % i for i in range(150)}
        for key in (*keys, b"b"):
            await w.call(0, "kv.put", 0, key, key, b"", {})
        for i in range(0, 150, 3):
            await w.call(0, "kv.put", 0, b"a/%d" % i, None, None, {})
        expected = {k for k in keys if int(k[2:]) % 3}
        for limit in (7, 1000):
            found, cursor, pages = [], b"", 0
            while True:
                items, cursor = await w.call(pages % 5, "kv.scan", 0, b"a/", cursor, limit, {})
                assert len(items) <= limit
                found += items
                pages += 1
                if not cursor:
                    break
            assert [k for k, _, _ in found] == sorted(expected, key=lambda k: row_of(0, k))
            assert all(values == (key,) for key, values, _ in found)
        w.crash(4)
        items, _ = await w.call(0, "kv.scan", 0, b"a/", b"", 1000, {})
        assert {k for k, _, _ in items} == expected


async def test_a_scan_reads_keys_that_differ_with_repair():
    async with running(3) as w:
        first, second, third = w.homes(b"k")
        w.crash(second)
        w.crash(third)
        with pytest.raises(NoQuorum):
            await w.call(first, "kv.put", 0, b"k", b"v", b"", {})
        for node in (second, third):
            await w.start(w.nursery, node, w.map)
        await trio.sleep(5)
        items, _ = await w.call(first, "kv.scan", 0, b"k", b"", 10, {})
        assert [(key, values) for key, values, _ in items] == [(b"k", (b"v",))]
        holding = [n for n in w.kvs if w.stores[n].get(row_of(0, b"k"))]
        assert len(holding) >= 2


async def test_a_node_with_an_old_map_learns_the_new_one_from_a_refusal():
    async with running(5) as w:
        partition = partition_of_row(row_of(0, b"k"))
        leaving = w.homes(b"k")[2]
        new = w.map.begin([member(n, weight=float(n != leaving)) for n in range(5)])
        assert new.old_homes(METADATA, partition)
        coordinator = w.homes(b"k")[0]
        for number, keeper in w.keepers.items():
            if number != coordinator:
                keeper.offer(new)
        await w.call(coordinator, "kv.put", 0, b"k", b"v", b"", {})
        assert w.keepers[coordinator]().epoch == new.epoch
        for row in new.write_sets(METADATA, partition):
            assert sum(w.stores[n].get(row_of(0, b"k")) is not None for n in row) >= 2


async def test_a_client_with_a_newer_map_makes_the_node_fetch_it():
    async with running(3) as w:
        w.map = new = w.map.begin(w.map.nodes)
        w.keepers[1].offer(new)
        await w.call(0, "kv.put", 0, b"k", b"v", b"", {})
        assert w.keepers[0]().epoch == new.epoch


async def test_a_forked_map_refuses_writes():
    async with running(3) as w:
        w.keepers[0].forked = True
        with pytest.raises(Busy):
            await w.call(0, "kv.put", 0, b"k", b"v", b"", {})


async def test_registers_survive_a_power_loss_of_everything():
    async with running(3) as w:
        context = (await w.call(0, "kv.put", 0, b"k", b"v", b"", {}))[0]
        for node in range(3):
            w.crash(node)
            w.disks[node].crash()
        for node in range(3):
            await w.start(w.nursery, node, w.map)
        assert (await w.call(0, "kv.get", 0, b"k", {}))[:2] == ((b"v",), context)
        await w.call(0, "kv.put", 0, b"k", b"w", context, {})
        assert (await w.call(1, "kv.get", 0, b"k", {}))[0] == (b"w",)
