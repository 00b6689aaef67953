"""Chunks follow the map: new homes pull and know when they have everything, old ones let go."""

import random
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from chunkserver.catchup import CatchUp
from chunkserver.handover import HandOver
from chunkserver.service import ChunkNode
from dfs.client.chunkio import ChunkClient
from dfs.cluster.joint import ChunkProgress, chunks_missing, has
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.hashing import partition_of
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.chunkcluster import SALT, ChunkCluster, SimClock, inline
from dfs.testing.network import SimNetwork


class Quiet(ChunkNode):
    """Without gossip, which costs time and is a test of its own."""

    presence_class = None


class KeptCluster(ChunkCluster):
    """Nodes with map keepers; `publish` gives a new map to some of them."""

    def __init__(self, *args, spare=1, **options):
        super().__init__(*args, **options)
        self.everybody = self.map.nodes
        nodes = tuple(replace(n, chunk_weight=0.0) for n in self.map.nodes[-spare:])
        self.map = ClusterMap.create(
            self.map.cluster_id, (*self.map.nodes[:-spare], *nodes), params=self.map.params
        )
        self.keepers = {}

    def keeper(self, name, rpc):
        return MapKeeper(self.map, rpc=rpc, clock=self.clock, random=self.random, own=name)

    def map_source(self, number, env):
        return self.keepers.setdefault(number, self.keeper(f"tcp://10.0.0.{number}:7402", env.rpc))

    def publish(self, new, numbers=None):
        self.map = new
        for number, keeper in self.keepers.items():
            if numbers is None or number in numbers:
                keeper.offer(new)

    def client(self, name="client"):
        rpc = self.network.endpoint(name)
        rpc.keeper = MapKeeper(self.map)
        return ChunkClient(
            rpc, rpc.keeper, self.clock, salt=SALT, random=self.random, offload=inline
        )

    def weights(self, **weights):
        """The next map, with these weights of the nodes n1, n2, ..."""
        return self.map.begin(
            replace(n, chunk_weight=weights.get(n.name, n.chunk_weight)) for n in self.map.nodes
        )

    def lacking(self):
        reports = {
            i: ChunkProgress.from_fields(node.catch_up.complete()) for i, node in self.nodes.items()
        }
        return chunks_missing(self.map, reports)

    def misplaced(self, ids):
        """Chunks that are not exactly at their homes."""
        return [
            i
            for i in ids
            if {n for n, node in self.nodes.items() if node.store.held(i)}
            != set(self.map.homes(CHUNK, partition_of(i)))
        ]


@asynccontextmanager
async def kept_cluster(count=5, *, node_class=Quiet, **options):
    rng = random.Random(7)
    clock = SimClock()
    async with SimNetwork(rng, clock) as network, trio.open_nursery() as nursery:
        cluster = KeptCluster(rng, network, clock, nursery, count, node_class=node_class, **options)
        await cluster.start_all()
        client = cluster.client()
        await nursery.start(client.run)
        yield cluster, client
        nursery.cancel_scope.cancel()


async def put_some(cluster, client, count=60):
    ids = {}
    for _ in range(count):
        data = cluster.random.randbytes(2000)
        ids[await client.put(data, durable=True)] = data
    await trio.sleep(1)
    return ids


async def test_a_new_home_gets_everything_and_says_so_and_the_old_ones_let_go():
    async with kept_cluster() as (cluster, client):
        ids = await put_some(cluster, client)
        assert not cluster.misplaced(ids)
        assert not len(cluster.nodes[5].store.index)
        cluster.publish(cluster.weights(n5=1.0))
        assert cluster.lacking()
        before = cluster.nodes[1].hand_over.foreign()
        assert before > 0
        await trio.sleep(60)  # woken by the map, not by the clock
        assert not cluster.lacking()
        moved = [i for i in ids if 5 in cluster.map.homes(CHUNK, partition_of(i))]
        assert len(moved) > 10
        assert all(cluster.nodes[5].store.held(i) for i in moved)
        assert cluster.nodes[1].hand_over.foreign() == before  # readers may come with old maps
        cluster.publish(cluster.map.finish_chunks())
        await trio.sleep(60)
        assert not cluster.misplaced(ids)
        assert all(n.to_move() == 0 for n in cluster.nodes.values())
        assert sum(n.hand_over.pushed for n in cluster.nodes.values()) == 0  # all were there
        for chunk_id, data in ids.items():
            assert bytes(await client.read(chunk_id, 0, 2000)) == data


async def test_a_drained_server_empties_itself():
    async with kept_cluster() as (cluster, client):
        ids = await put_some(cluster, client)
        cluster.publish(cluster.weights(n5=1.0, n1=0.0))
        await trio.sleep(60)
        assert cluster.nodes[1].status()["to_move"] > 0
        assert not cluster.lacking()
        cluster.publish(cluster.map.finish_chunks())
        await trio.sleep(60)
        assert not len(cluster.nodes[1].store.index)
        assert cluster.nodes[1].status()["to_move"] == 0
        assert not cluster.misplaced(ids)


async def test_it_is_not_complete_before_the_old_homes_refuse_old_writes():
    """Work of before goes on at nodes 1 to 3: only one old home of any partition is fenced."""
    async with kept_cluster() as (cluster, client):
        await put_some(cluster, client, 10)
        new = cluster.weights(n5=1.0)
        working = [cluster.keepers[i].admitted() for i in (1, 2, 3)]
        for work in working:
            work.__enter__()
        cluster.publish(new)
        await trio.sleep(100)
        _, complete = cluster.nodes[5].catch_up.complete()
        assert not any(has(complete, p) for p in new.changed(CHUNK))
        working[0].__exit__(None, None, None)
        await trio.sleep(100)
        _, complete = cluster.nodes[5].catch_up.complete()
        for p in new.changed(CHUNK):
            if 5 in new.homes(CHUNK, p):
                assert has(complete, p) == ({1, 4} <= set(new.old_homes(CHUNK, p)))
        for work in working[1:]:
            work.__exit__(None, None, None)
        await trio.sleep(100)
        assert not cluster.lacking()


async def test_a_server_without_the_map_is_no_witness():
    async with kept_cluster() as (cluster, client):
        await put_some(cluster, client, 10)
        new = cluster.weights(n5=1.0)
        for keeper in cluster.keepers.values():
            keeper._rpc = None  # nobody can ask for the map
        cluster.publish(new, {5})
        await trio.sleep(100)
        _, complete = cluster.nodes[5].catch_up.complete()
        assert not any(has(complete, p) for p in new.changed(CHUNK))
        cluster.publish(new)
        await trio.sleep(100)
        assert not cluster.lacking()


async def test_one_dead_old_home_blocks_nothing():
    async with kept_cluster() as (cluster, client):
        ids = await put_some(cluster, client)
        cluster.crash(2)
        cluster.publish(cluster.weights(n5=1.0))
        await trio.sleep(100)
        assert not cluster.lacking()
        for chunk_id, data in ids.items():
            assert bytes(await client.read(chunk_id, 0, 2000)) == data


async def test_clients_learn_the_map_from_those_who_refuse_them():
    async with kept_cluster() as (cluster, client):
        await put_some(cluster, client, 5)
        cluster.publish(cluster.weights(n5=1.0, n1=0.0))  # the client is not told
        assert client.get_map().epoch == 1
        start = trio.current_time()
        ids = await put_some(cluster, client, 30)
        assert trio.current_time() - start < 5
        assert client.get_map().epoch == 2
        await trio.sleep(60)
        cluster.publish(cluster.map.finish_chunks())
        await trio.sleep(60)
        assert not cluster.misplaced(ids)
        old = cluster.client("old")
        old.get_map.current = client.get_map()  # of epoch 2
        for chunk_id, data in ids.items():
            assert bytes(await old.read(chunk_id, 0, 2000)) == data


async def test_a_reader_with_a_map_from_before_finds_what_moved_away():
    async with kept_cluster(7, spare=3) as (cluster, client):
        ids = await put_some(cluster, client)
        reader = cluster.client("reader")
        cluster.publish(cluster.weights(n5=1.0, n6=1.0, n7=1.0, n1=0.0, n2=0.0, n3=0.0))
        await trio.sleep(100)
        assert not cluster.lacking()
        cluster.publish(cluster.map.finish_chunks())
        await trio.sleep(100)
        assert not cluster.misplaced(ids)
        for chunk_id, data in ids.items():
            assert bytes(await reader.read(chunk_id, 0, 2000)) == data


async def test_moves_keep_to_their_bandwidth():
    async with kept_cluster() as (cluster, client):
        await put_some(cluster, client, 100)
        node = cluster.nodes[5]
        node.catch_up.bandwidth.rate = 4000.0  # two chunks a second
        cluster.publish(cluster.weights(n5=1.0))
        await trio.sleep(10)
        got = node.catch_up.meter.bytes
        assert 0 < got <= 4000 * 12
        assert node.catch_up.status()["bytes_per_s"] <= 4800
        assert node.status()["to_move"] > 0


async def test_a_copy_that_somebody_counts_meanwhile_stays():
    """A put that renews the copy between the homes' answers and the drop: it is not dropped."""
    async with kept_cluster() as (cluster, client):
        ids = await put_some(cluster, client, 30)
        node = cluster.nodes[1]
        chunk_id = next(i for i in ids if 1 not in cluster.map.homes(CHUNK, partition_of(i)))
        homes = cluster.map.homes(CHUNK, partition_of(chunk_id))
        _, raw = await cluster.nodes[homes[0]].peers.call(homes[1], "chunk.get", (chunk_id, 0, -1))
        stamp = cluster.nodes[homes[0]].store.index.get(chunk_id).stamp
        address = cluster.map.address(CHUNK, 1)
        rpc = cluster.network.endpoint("writer")
        await rpc.call(address, "chunk.put", (chunk_id, True, stamp), raw, timeout=5)
        push, renewed = node.hand_over._push, []

        async def slow_push(home, entries, queue):
            await push(home, entries, queue)
            await rpc.call(address, "chunk.put", (chunk_id, True, stamp), raw, timeout=5)
            renewed.append(node.store.index.get(chunk_id).stamp)

        node.hand_over._push = slow_push
        await node.hand_over.run_once()
        assert node.store.held(chunk_id)
        node.hand_over._push = push
        await node.hand_over.run_once()
        assert not node.store.held(chunk_id)
        for home in homes:  # and the stamp went with it
            assert cluster.nodes[home].store.index.get(chunk_id).stamp == renewed[-1] > stamp


async def test_a_nearly_full_server_takes_clients_chunks_but_no_moved_ones():
    async with kept_cluster(capacity=400_000) as (cluster, client):
        cluster.nodes[5].store.room.limits = replace(
            cluster.nodes[5].store.room.limits, backfill=1, near=1
        )
        cluster.nodes[4].store.room.limits = replace(
            cluster.nodes[4].store.room.limits, backfill=1, near=1
        )
        ids = await put_some(cluster, client, 20)
        assert any(cluster.nodes[4].store.held(i) for i in ids)
        cluster.publish(cluster.weights(n5=1.0))
        await trio.sleep(60)
        assert cluster.nodes[5].status()["disk_level"] in ("ok", "backfill")
        taken = len(cluster.nodes[5].store.index)
        assert taken <= 3
        assert "no data from other nodes" in cluster.nodes[5].catch_up.last_error
        assert cluster.lacking()


# Each threshold broken on purpose, and the test that finds it.
MUTANTS = [
    (
        CatchUp,
        "fence_counts",
        lambda *_: True,
        test_it_is_not_complete_before_the_old_homes_refuse_old_writes,
    ),
    (CatchUp, "enough", lambda _, m: m.params.n, test_one_dead_old_home_blocks_nothing),
    (
        CatchUp,
        "enough",
        lambda _, m: m.params.n - m.params.w,
        test_it_is_not_complete_before_the_old_homes_refuse_old_writes,
    ),
    (
        HandOver,
        "_leave_to_others",
        lambda *_: False,
        test_a_new_home_gets_everything_and_says_so_and_the_old_ones_let_go,
    ),
    (HandOver, "unchanged", lambda *_: True, test_a_copy_that_somebody_counts_meanwhile_stays),
]


@pytest.mark.parametrize(("cls", "name", "broken", "check"), MUTANTS)
async def test_the_tests_find_mutants(monkeypatch, cls, name, broken, check):
    assert hasattr(cls, name)
    monkeypatch.setattr(cls, name, broken)
    red = False
    try:
        await check()
    except* AssertionError:
        red = True
    assert red


async def test_gossip_spreads_the_map_and_who_is_there():
    async with kept_cluster(node_class=ChunkNode) as (cluster, _client):
        await trio.sleep(20)
        gossip = cluster.nodes[1].presence.gossip
        assert all(gossip.is_up(i, CHUNK) for i in (2, 3, 4, 5))
        new = cluster.weights(n5=1.0)
        cluster.publish(new, {3})  # one node has it
        await trio.sleep(10)
        assert [k.current.epoch for k in cluster.keepers.values()] == [2] * 5
        cluster.crash(2)
        await trio.sleep(60)
        assert not gossip.is_up(2, CHUNK)
        rounds = cluster.nodes[1].catch_up.rounds
        await cluster.start(2)  # with a higher boot number: believed at once
        await trio.sleep(20)
        assert gossip.is_up(2, CHUNK)
        assert cluster.nodes[1].catch_up.rounds > rounds
