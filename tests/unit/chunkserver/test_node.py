"""A chunkserver's answers, its workers, and the client against a few of them."""

import random
from contextlib import asynccontextmanager

import pytest
import trio

from chunkserver.segments import StoreOptions
from dfs.chunks import format as chunks
from dfs.client import chunkio
from dfs.cluster.map import CHUNK
from dfs.errors import (
    Corrupt,
    DfsError,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    NotFound,
    StaleEpoch,
    StoreFailed,
)
from dfs.hashing import partition_of
from dfs.testing.chunkcluster import SALT, ChunkCluster, SimClock
from dfs.testing.network import SimNetwork


@asynccontextmanager
async def chunk_cluster(count=4, **options):
    rng = random.Random(1)
    clock = SimClock()
    async with SimNetwork(rng, clock) as network, trio.open_nursery() as nursery:
        cluster = ChunkCluster(rng, network, clock, nursery, count, **options)
        await cluster.start_all()
        yield cluster
        nursery.cancel_scope.cancel()


async def connected(cluster):
    client = cluster.client()
    await cluster.nursery.start(client.run)
    return client


def encoded(data, **options):
    chunk_id, buffers = chunks.encode(data, SALT, **options)
    return chunk_id, b"".join(buffers)


def data_for(cluster, home, *, size=3000):
    """Random data whose chunk has `home` among its homes."""
    while True:
        data = cluster.random.randbytes(size)
        chunk_id, _ = encoded(data)
        if home in cluster.map.homes(CHUNK, partition_of(chunk_id)):
            return chunk_id, data


class Caller:
    """Calls one node by hand."""

    def __init__(self, cluster, number=1):
        self.rpc = cluster.network.endpoint("caller")
        self.address = cluster.map.address(CHUNK, number)

    async def __call__(self, method, *args, data=b"", epoch=0):
        return await self.rpc.call(self.address, method, args, data, timeout=5, epoch=epoch)


async def test_every_answer_has_the_form_of_the_catalogue():
    async with chunk_cluster(1, n=1, w=1) as cluster:
        call = Caller(cluster)
        node = cluster.nodes[1]
        data = b"some text " * 20_000
        chunk_id, raw = encoded(data)
        assert await call("ping") == (("chunkserver", 1, b"\1" * 16, 1), b"")
        assert (await call("map.get"))[0] == (cluster.map.encode(),)
        assert (await call("chunk.put", chunk_id, False, 1, data=raw))[0] == (True, node.boot)
        assert (await call("chunk.put", chunk_id, True, 1, data=raw))[0] == (False, node.boot)
        assert (await call("chunk.sync"))[0] == (node.boot,)
        put_at = node.store.index.get(chunk_id).stamp
        await trio.sleep(1)
        assert (await call("chunk.touch", (chunk_id, bytes(32)), 5))[0] == ((True, False),)
        touched = node.store.index.get(chunk_id).stamp  # by the server's clock, not the caller's
        assert 10**9 <= touched - put_at < 2 * 10**9
        (plain, stamp), answer = await call("chunk.get", chunk_id, 1, 1)
        assert (plain, stamp) == (len(data), touched)
        got = chunks.decode_range(answer, chunk_id, 65536, 65536)
        assert bytes(got) == data[65536:131072]
        assert (await call("chunk.get", chunk_id, 0, -1))[1] == raw
        assert (await call("chunk.report", chunk_id))[0] == ("ok",)
        listed = (chunk_id, len(data), len(raw), touched)
        assert (await call("chunk.list", b"", 10))[0] == ((listed,),)
        assert (await call("chunk.summary"))[1] == node.store.index.summary()
        (status,), _ = await call("node.status")
        assert (status["chunks"], status["errors"], status["quarantined"]) == (1, (), 0)
        assert {w[0] for w in status["workers"]} == {"repair", "catch-up", "hand-over", "scrub"}
        assert (await call("chunk.touch", (chunk_id, bytes(32)), 0, (5, 6)))[0] == ((True, False),)
        assert (await call("chunk.fence", 1))[0] == (1, ())
        assert (await call("chunk.progress"))[0] == (1, bytes(512))
        (workers,), _ = await call("node.workers")
        assert [w["name"] for w in workers] == [w[0] for w in status["workers"]]
        (paused,), _ = await call("node.steer", "scrub", "pause")
        assert paused["state"] == "paused"
        assert (await call("chunk.delete", (chunk_id,), touched))[0] == ()  # no older: it stays
        assert node.store.held(chunk_id)
        assert (await call("chunk.delete", (chunk_id,)))[0] == ()
        with pytest.raises(NotFound):
            await call("chunk.get", chunk_id, 0, -1)
        assert (await call("chunk.report", chunk_id))[0] == ("absent",)


async def test_nothing_unverified_is_stored():
    async with chunk_cluster(1, n=1, w=1) as cluster:
        call = Caller(cluster)
        for size in (3000, 300_000):
            chunk_id, raw = encoded(cluster.random.randbytes(size))
            bad = bytearray(raw)
            bad[-1] ^= 1
            for wrong in (bytes(bad), raw[:-1], raw + b"x", b"", encoded(b"other")[1]):
                with pytest.raises(Corrupt):
                    await call("chunk.put", chunk_id, False, 1, data=wrong)
        with pytest.raises(InvalidArgument):
            await call("chunk.put", b"short", False, 1, data=raw)
        assert len(cluster.nodes[1].store.index) == 0


async def test_a_stale_epoch_is_refused():
    async with chunk_cluster(3) as cluster:
        call = Caller(cluster)
        chunk_id, raw = encoded(b"data")
        cluster.map = cluster.map.successor(cluster.map.nodes[:3])
        await call(
            "chunk.put", chunk_id, False, 1, data=raw, epoch=1
        )  # this partition is as it was
        newer = cluster.map.last_change

        class Changed:
            def __getattr__(self, name):
                return getattr(real, name)

            def last_change(self, role, partition):
                return 2 if partition == partition_of(chunk_id) else newer(role, partition)

        real = cluster.map
        cluster.map = Changed()
        with pytest.raises(StaleEpoch) as caught:
            await call("chunk.put", chunk_id, False, 1, data=raw, epoch=1)
        assert caught.value.details == (real.encode(),)  # the caller needs nobody else for it
        assert (await call("chunk.get", chunk_id, 0, -1, epoch=1))[1] == raw  # it cannot be wrong
        await call("chunk.put", chunk_id, False, 1, data=raw, epoch=2)
        await call("chunk.delete", (chunk_id,))
        with pytest.raises(StaleEpoch):  # but it may be where an old map does not lead
            await call("chunk.get", chunk_id, 0, -1, epoch=1)
        with pytest.raises(NotFound):
            await call("chunk.get", chunk_id, 0, -1, epoch=2)


@pytest.mark.parametrize("length", [500, 5000, 100_000])
async def test_short_pieces_of_a_chunk_are_sent_as_one(length):
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        whole = [cluster.random.randbytes(length) for _ in range(30)]
        pieces = [memoryview(piece) for piece in whole]
        pieces[3] = pieces[3][10:-10]  # a part only
        plain = b"".join(pieces)
        prepared = await client.prepare(pieces)
        short = length < chunkio.SHORT
        assert len(prepared.pieces) == (1 if short else len(pieces))
        assert len(prepared.buffers) == 1 + len(prepared.pieces)
        assert all(p.obj is w for p, w in zip(prepared.pieces, whole, strict=True)) or short
        assert prepared.read(0, len(plain)) == plain
        await client.put_prepared(prepared, durable=True)
        del prepared
        assert bytes(await client.read(await client.put(plain), 0, len(plain))) == plain
        assert client.statistics()["puts"] == 2


async def test_a_bad_copy_is_never_returned_and_heals():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        data = cluster.random.randbytes(100_000)
        chunk_id = await client.put(data, durable=True)
        await trio.sleep(1)
        for number, node in cluster.nodes.items():
            if number < 3:
                offset = node.store.index.get(chunk_id).offset
                cluster.disks[number].flip("segments/00000001.seg", offset + 50_000)
        for _ in range(10):
            assert bytes(await client.read(chunk_id, 0, 100_000)) == data
            await trio.sleep(6)
        assert client.statistics()["corrupt"] == 2
        await trio.sleep(20)
        for node in cluster.nodes.values():
            await node.store.check(chunk_id)
            assert node.status()["quarantined"] == 0
        assert sum(n.repair.repaired for n in cluster.nodes.values()) == 2
        assert "was bad" in cluster.nodes[1].status()["errors"][0][0]


async def test_scrub_finds_what_nobody_reads_and_goes_on_after_a_restart():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        ids = sorted([await client.put(cluster.random.randbytes(20_000)) for _ in range(10)])
        await client.sync()
        await trio.sleep(1)
        node = cluster.nodes[1]
        entry = node.store.index.get(ids[4])
        cluster.disks[1].flip("segments/00000001.seg", entry.offset + 10_000)
        await node.scrub.run_once()
        assert node.scrub.found == 1
        await trio.sleep(5)
        assert await node.scrub.run_once() == 10
        assert node.scrub.found == 1
        node.scrub._save(ids[6])
        await cluster.stop(1)
        node = await cluster.start(1)
        assert await node.scrub.run_once() == 3


async def test_a_chunk_that_nobody_has_is_told_as_lost():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        chunk_id = await client.put(b"precious" * 1000, durable=True)
        await trio.sleep(1)
        for number, node in cluster.nodes.items():
            offset = node.store.index.get(chunk_id).offset
            cluster.disks[number].flip("segments/00000001.seg", offset + 70)
        with pytest.raises((Corrupt, NotFound, NoQuorum), match="node 1"):
            await client.read(chunk_id, 0, 10)
        await trio.sleep(30)
        with pytest.raises(NotFound, match=r"node 1: .*not here"):
            await client.read(chunk_id, 0, 10)
        texts = [text for text, _ in cluster.nodes[1].status()["errors"]]
        assert "chunks of which no server has a good copy" in texts
        assert cluster.nodes[1].status()["quarantined"] == 1


async def test_a_home_that_was_down_catches_up_and_the_fallback_hands_over():
    async with chunk_cluster(4) as cluster:
        client = await connected(cluster)
        cluster.crash(1)
        ids = []
        for _ in range(10):
            chunk_id, data = data_for(cluster, 1)
            assert await client.put(data, durable=True) == chunk_id
            ids.append(chunk_id)
        await trio.sleep(30)
        for chunk_id in ids:  # a fallback stands in: three copies without node 1
            assert sum(n.store.held(chunk_id) for n in cluster.nodes.values()) == 3
        node = await cluster.start(1)
        await trio.sleep(400)
        for chunk_id in ids:
            homes = cluster.map.homes(CHUNK, partition_of(chunk_id))
            holders = {i for i, n in cluster.nodes.items() if n.store.held(chunk_id)}
            assert holders == set(homes)
        moved = node.catch_up.pulled + sum(n.hand_over.pushed for n in cluster.nodes.values())
        assert moved >= 10
        assert sum(n.hand_over.handed_over for n in cluster.nodes.values()) == 10


async def test_catch_up_copies_nothing_that_was_condemned():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        chunk_id = await client.put(b"garbage" * 100, durable=True)
        await trio.sleep(1)
        for number in (1, 2):
            await Caller(cluster, number)("chunk.delete", (chunk_id,))
        await trio.sleep(400)
        assert [n.store.held(chunk_id) for n in cluster.nodes.values()] == [False, False, True]
        await client.put(b"garbage" * 100, durable=True)  # a writer wants it again
        await trio.sleep(1)
        assert all(n.store.held(chunk_id) for n in cluster.nodes.values())


# ---------------------------------------------------------------------------------------- client


async def test_put_survives_servers_that_are_down_and_fails_loudly_without_w():
    async with chunk_cluster(4) as cluster:
        client = await connected(cluster)
        cluster.crash(1)
        cluster.crash(2)
        data = b"x" * 10_000
        chunk_id = await client.put(data)
        await client.sync()
        assert bytes(await client.read(chunk_id, 5, 10)) == data[5:15]
        cluster.crash(3)
        with pytest.raises(NoQuorum, match=r"1 of 2 servers have it.*node"):
            await client.put(b"y" * 10_000)


async def test_a_silent_server_delays_nobody_for_long():
    async with chunk_cluster(4) as cluster:
        client = await connected(cluster)
        for number in (1, 2):
            cluster.network.isolate(f"n{number}")
        began = trio.current_time()
        chunk_id = await client.put(b"z" * 1000)
        await client.sync()
        assert trio.current_time() - began < 2 * chunkio.PATIENCE + 1
        began = trio.current_time()
        assert bytes(await client.read(chunk_id, 0, 1000)) == b"z" * 1000
        assert trio.current_time() - began < 1


async def test_a_server_that_is_far_behind_is_passed_over(monkeypatch):
    monkeypatch.setattr(chunkio, "PER_SERVER", 100_000)
    monkeypatch.setattr(chunkio, "IN_FLIGHT", 1_000_000)
    async with chunk_cluster(4) as cluster:
        client = await connected(cluster)
        cluster.network.isolate("n1")
        began = trio.current_time()
        for _ in range(60):
            await client.put(cluster.random.randbytes(30_000))
        assert trio.current_time() - began < 5
        assert client.statistics()["in_flight"] < 200_000
        await client.sync()


async def test_memory_is_bounded_when_every_server_is_silent(monkeypatch):
    monkeypatch.setattr(chunkio, "IN_FLIGHT", 100_000)
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        for number in (1, 2, 3):
            cluster.network.isolate(f"n{number}")

        async def put():
            with pytest.raises(DfsError):
                await client.put(cluster.random.randbytes(40_000))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(put)
            await trio.sleep(1)
            assert client.statistics()["in_flight"] <= 120_000


async def test_sync_puts_again_what_a_restart_lost():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        chunk_id = await client.put(b"fleeting" * 1000)
        await trio.sleep(0.5)
        for number in (1, 2, 3):
            cluster.crash(number)
        for number in (1, 2, 3):
            await cluster.start(number)
        await client.sync()
        assert client.statistics()["reputs"] == 1
        held = [n.store.held(chunk_id) for n in cluster.nodes.values()]
        assert sum(held) >= 2
        for number in (1, 2, 3):
            cluster.crash(number)
        for number in (1, 2, 3):
            await cluster.start(number)
        assert bytes(await client.read(chunk_id, 0, 8)) == b"fleeting"


async def test_many_kept_buffers_start_a_barrier(monkeypatch):
    monkeypatch.setattr(chunkio, "KEEP", 100_000)
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        for _ in range(20):
            await client.put(cluster.random.randbytes(30_000))
            assert client.statistics()["unsynced_bytes"] <= 300_000
        assert client.statistics()["syncs"] > 1
        await client.sync()
        assert client.statistics()["unsynced_bytes"] == 0


async def test_full_servers_are_told_as_such():
    options = StoreOptions(reserve=0)
    async with chunk_cluster(3, options=options, capacity=200_000) as cluster:
        client = await connected(cluster)

        async def fill():
            while True:
                await client.put(cluster.random.randbytes(20_000))

        with pytest.raises(DiskFull, match=r"bytes free"):
            await fill()


async def test_sync_raises_while_disks_fail_and_keeps_the_chunks():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        chunk_id = await client.put(b"keep me" * 1000)
        await trio.sleep(0.5)
        for number in (1, 2):
            cluster.disks[number].fail_next("sync", "segments/")
        with pytest.raises(DfsError):
            await client.sync()
        with pytest.raises(StoreFailed):
            await cluster.nodes[1].store.sync()
        for number in (1, 2):
            cluster.crash(number)
            await cluster.start(number)
        await client.sync()
        assert sum(n.store.held(chunk_id) for n in cluster.nodes.values()) >= 2


async def test_touch_counts_servers_that_hold_the_chunk():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        chunk_id = await client.put(b"dedup", durable=True)
        await trio.sleep(0.1)
        assert await client.touch([chunk_id, bytes(32), chunk_id]) == [True, False, True]
        assert await client.touch([]) == []
        cluster.crash(1)
        assert await client.touch([chunk_id]) == [True]
        cluster.crash(2)
        assert await client.touch([chunk_id]) == [False]


async def test_reads_outside_a_chunk_are_refused():
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        chunk_id = await client.put(b"12345")
        assert await client.read(chunk_id, 5, 0) == b""
        for offset, length in ((0, 6), (5, 1), (-1, 2), (100_000, 1)):
            with pytest.raises(InvalidArgument):
                await client.read(chunk_id, offset, length)


async def test_the_own_host_is_read_first_and_a_slow_home_last():
    async with chunk_cluster(4) as cluster:
        chunk_id, data = data_for(cluster, 3)
        client = await connected(cluster)
        client._reader._host = "h3"
        await client.put(data, durable=True)
        assert {client._reader.order(chunk_id)[0] for _ in range(20)} == {3}
        client._reader._host = ""
        homes = cluster.map.homes(CHUNK, partition_of(chunk_id))
        client._reader._latency = {homes[0]: 1.0, homes[1]: 0.001, homes[2]: 0.5}
        order = client._reader.order(chunk_id)
        assert order[0] == homes[1]
        assert order[3] not in homes


async def test_what_a_crash_tore_is_fetched_again_or_forgotten():
    """A record whose data is bad in front of good ones, newer than the last hint."""
    async with chunk_cluster(3) as cluster:
        client = await connected(cluster)
        shared = await client.put(b"shared" * 1000, durable=True)
        await trio.sleep(1)
        call = Caller(cluster)
        alone, raw = encoded(b"alone" * 1000)
        await call("chunk.put", alone, True, 1, data=raw)
        await call("chunk.put", encoded(b"last")[0], True, 1, data=encoded(b"last")[1])
        index = cluster.nodes[1].store.index
        places = [index.get(i).offset for i in (shared, alone)]
        cluster.crash(1)
        for offset in places:
            cluster.disks[1].flip("segments/00000001.seg", offset + 70)
        node = await cluster.start(1)
        assert len(node.store.recovery.suspects) == 2
        await trio.sleep(30)
        assert node.store.held(shared)
        assert not node.store.held(alone)
        assert node.status()["errors"] == ()
        assert not node.repair.queue
