"""Quorums of immutable blobs, on a simulated network with faults."""

import random
from contextlib import asynccontextmanager

import pytest
import trio

from dfs.clock import SystemClock
from dfs.cluster.map import METADATA, ClusterMap, Node
from dfs.errors import Busy, Corrupt, DiskFull, NoQuorum, NotFound, Unreachable
from dfs.hashing import digest, partition_of
from dfs.rpc import blobs as module
from dfs.rpc.blobs import BlobClient
from dfs.rpc.budget import InFlight
from dfs.testing.network import SimNetwork


class Store:
    """A metadata node's blobs, in memory, with faults."""

    def __init__(self, network, number):
        self.network = network
        self.number = number
        self.name = f"n{number}"
        self.address = f"tcp://{self.name}:1"
        self.blobs = {}
        self.error = None
        self.delay = 0.0
        self.requests = 0
        self.flip = False

    async def run(self, *, task_status):
        self.endpoint = self.network.endpoint(self.name)
        handlers = {"blob.put": self.put, "blob.get": self.get}
        await self.endpoint.serve(
            self.address, handlers, started=lambda address: task_status.started()
        )

    async def pause(self):
        self.requests += 1
        await trio.sleep(self.delay)
        if self.error is not None:
            error = self.error() if callable(self.error) else self.error
            if error is not None:
                raise error

    async def put(self, context, args, data):
        await self.pause()
        at = 0
        for name, length in args[0]:
            blob = bytes(data[at : at + length])
            assert digest(blob) == name
            self.blobs[name] = blob
            at += length
        assert at == len(data)
        return (len(args[0]),), b""

    async def get(self, context, args, data):
        await self.pause()
        found = [self.blobs.get(name) for name in args[0]]
        if self.flip:
            found = [blob and bytes([blob[0] ^ 1]) + blob[1:] for blob in found]
        lengths = tuple(-1 if blob is None else len(blob) for blob in found)
        return (lengths,), [blob for blob in found if blob is not None]


class World:
    def __init__(self, network, nodes, client, cluster):
        self.network, self.nodes, self.client, self.map = network, nodes, client, cluster

    def homes(self, name):
        return self.map.homes(METADATA, partition_of(name))

    def holders(self, name):
        return {number for number, node in self.nodes.items() if name in node.blobs}


@asynccontextmanager
async def world(count=5, **knobs):
    cluster = ClusterMap.create(
        b"c" * 16,
        [
            Node(i, bytes([i]) * 16, f"n{i}", f"z{i}", "r", "h", f"tcp://n{i}:1", f"tcp://n{i}:2")
            for i in range(1, count + 1)
        ],
    )
    network = SimNetwork(random.Random(7), SystemClock(), **knobs)
    async with network, trio.open_nursery() as nursery:
        nodes = {i: Store(network, i) for i in range(1, count + 1)}
        for node in nodes.values():
            await nursery.start(node.run)
        client = BlobClient(network.endpoint("client"), lambda: cluster, SystemClock())
        yield World(network, nodes, client, cluster)
        nursery.cancel_scope.cancel()


BLOBS = [b"blob %d" % i for i in range(200)]


async def test_put_reaches_all_homes_with_one_request_each():
    async with world() as w:
        names = await w.client.put_many(BLOBS)
        assert names == [digest(b) for b in BLOBS]
        await trio.sleep(1)
        for name in names:
            assert w.holders(name) == set(w.homes(name))
        assert [node.requests for node in w.nodes.values()] == [1] * 5
        assert await w.client.get_many(names) == dict(zip(names, BLOBS, strict=True))
        assert await w.client.get_many([]) == {}
        assert await w.client.put_many([]) == []
        assert await w.client.put_many([b"x", b"x"]) == [digest(b"x")] * 2


async def test_put_returns_at_w_and_finishes_the_rest():
    async with world() as w:
        w.nodes[2].delay = 5.0
        names = await w.client.put_many(BLOBS)
        assert trio.current_time() < 0.1
        slow = [n for n in names if 2 in w.homes(n)]
        assert slow
        assert all(len(w.holders(n)) == 2 for n in slow)
        await trio.sleep(6)
        assert all(w.holders(n) == set(w.homes(n)) for n in names)


async def test_large_puts_are_split(monkeypatch):
    monkeypatch.setattr(module, "PUT_BYTES", 100)
    async with world(3) as w:
        names = await w.client.put_many([*BLOBS[:50], b"x" * 1000])
        await trio.sleep(1)
        assert all(len(w.holders(n)) == 3 for n in names)
        assert w.nodes[1].requests > 4


async def test_put_with_one_home_down_and_with_two():
    async with world(3) as w:
        w.nodes[1].endpoint.close()
        names = await w.client.put_many(BLOBS)
        assert all(w.holders(n) == {2, 3} for n in names)
        w.nodes[2].endpoint.close()
        start = trio.current_time()
        with pytest.raises(NoQuorum, match=r"n1 \(node 1\).*n2 \(node 2\)") as caught:
            await w.client.put_many(BLOBS, timeout=3)
        assert "node 3" not in str(caught.value)
        assert trio.current_time() - start == pytest.approx(3, abs=0.1)


async def test_put_tries_again():
    async with world(3, drop=0.0) as w:
        for i, node in enumerate(w.nodes.values()):
            node.error = iter([Busy("later")] * (i + 2) + [None] * 99).__next__
        names = await w.client.put_many(BLOBS)
        assert all(len(w.holders(n)) >= 2 for n in names)
        assert 0.1 < trio.current_time() < 3


async def test_put_fails_at_once_when_homes_refuse_for_good():
    async with world(3) as w:
        w.nodes[1].error = DiskFull("disk full on n1")
        await w.client.put_many(BLOBS)
        w.nodes[3].error = DiskFull("disk full on n3")
        start = trio.current_time()
        with pytest.raises(DiskFull, match="node 3"):
            await w.client.put_many(BLOBS)
        assert trio.current_time() < start + 0.5


async def test_get_falls_back_to_other_homes():
    async with world() as w:
        names = await w.client.put_many(BLOBS)
        await trio.sleep(1)
        w.nodes[1].endpoint.close()  # refuses
        w.nodes[2].delay = 60.0  # hangs
        start = trio.current_time()
        assert len(await w.client.get_many(names)) == len(names)
        assert trio.current_time() - start < 2
        # Those that failed are asked last for a while.
        start = trio.current_time()
        assert len(await w.client.get_many(names)) == len(names)
        assert trio.current_time() - start < 0.1


async def test_get_finds_a_blob_off_its_homes():
    async with world() as w:
        name = digest(b"stray")
        stray = next(i for i in w.nodes if i not in w.homes(name))
        w.nodes[stray].blobs[name] = b"stray"
        assert await w.client.get_many([name]) == {name: b"stray"}


async def test_missing_blobs_are_named():
    async with world() as w:
        (name,) = await w.client.put_many([b"here"])
        lost = digest(b"lost")
        with pytest.raises(NotFound, match=lost.hex()[:16]) as caught:
            await w.client.get_many([name, lost])
        assert caught.value.details == (lost,)
        assert trio.current_time() < 1


async def test_missing_is_not_claimed_while_a_home_is_silent():
    async with world(3) as w:
        w.nodes[2].endpoint.close()
        with pytest.raises(NoQuorum, match=r"n2 \(node 2\)"):
            await w.client.get_many([digest(b"lost")], timeout=2)
        assert trio.current_time() == pytest.approx(2, abs=0.1)


async def test_a_home_that_comes_back_is_asked_again():
    async with world(3) as w:
        (name,) = await w.client.put_many([b"blob"])
        await trio.sleep(1)
        for number in w.nodes:
            w.network.block("client", f"n{number}")
        async with trio.open_nursery() as nursery:

            async def heal():
                await trio.sleep(1.2)
                w.network.heal()

            nursery.start_soon(heal)
            for node in w.nodes.values():
                node.error = iter([Unreachable("x")] * 2 + [None] * 99).__next__
            w.network.heal()
            assert await w.client.get_many([name], timeout=5) == {name: b"blob"}


async def test_corrupt_answers_are_never_returned():
    async with world(3) as w:
        names = await w.client.put_many(BLOBS)
        await trio.sleep(1)
        w.nodes[1].flip = True
        assert await w.client.get_many(names) == dict(zip(names, BLOBS, strict=True))
        for node in w.nodes.values():
            node.flip = True
        with pytest.raises(Corrupt, match="node 1"):
            await w.client.get_many(names)


async def test_lying_counts():
    async with world(3) as w:

        async def lie(context, args, data):
            return (0,), b""

        for number in (1, 2):
            w.nodes[number].endpoint._services[w.nodes[number].address][0]["blob.put"] = lie
        with pytest.raises(NoQuorum, match="stored"):
            await w.client.put_many([b"x"])


@pytest.mark.parametrize("seed", range(5))
async def test_lossy_network(seed):
    async with world(5, drop=0.05, duplicate=0.05, reorder=0.1) as w:
        w.network.random.seed(seed)
        done = 0
        for start in range(0, 200, 20):
            try:
                names = await w.client.put_many(BLOBS[start : start + 20], timeout=5)
            except NoQuorum:
                continue
            done += 1
            for name in names:
                assert len(w.holders(name) & set(w.homes(name))) >= 2
            got = await w.client.get_many(names, timeout=30)
            assert {digest(b) for b in got.values()} == set(names)
        assert done >= 8


async def test_puts_are_charged_until_the_last_copy_ended():
    async with world(3) as w:
        w.client.inflight = inflight = InFlight()
        slow = w.nodes[3]
        slow.delay = 1.5
        await w.client.put_many([b"x" * 1000, b"y" * 500])
        assert inflight.used == 1500  # W of N are enough to answer, not to forget
        assert inflight.statistics(trio.current_time())["peers"] == {slow.number: 1500}
        await trio.sleep(2)
        assert inflight.statistics(trio.current_time())["peers"] == {}
        assert inflight.used == 0


async def test_a_failed_put_gives_its_bytes_back():
    async with world(3) as w:
        w.client.inflight = inflight = InFlight()
        for store in w.nodes.values():
            store.error = DiskFull("full")
        with pytest.raises(DiskFull):
            await w.client.put_many([b"x" * 1000])
        await trio.sleep(2)
        assert inflight.used == 0


async def test_puts_wait_while_too_much_is_under_way_and_fail_in_words():
    async with world(3) as w:
        w.client.inflight = inflight = InFlight(limit=1000)
        other = inflight.charge(900)
        with pytest.raises(Busy, match="900 bytes of writes have been under way here for 3 s"):
            await w.client.put_many([b"x" * 200], timeout=3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.client.put_many, [b"x" * 200])
            await trio.sleep(2)
            assert [len(s.blobs) for s in w.nodes.values()] == [0, 0, 0]
            other.close()
        await trio.sleep(1)
        assert [len(s.blobs) for s in w.nodes.values()] == [1, 1, 1]


async def test_a_slow_home_is_left_out_of_puts():
    async with world(3) as w:
        w.client.inflight = inflight = InFlight(per_peer=1000)
        busy = w.nodes[1]
        stuck = inflight.charge(1000)
        stuck.send(busy.number)
        start = trio.current_time()
        for i in range(8):
            await w.client.put_many([b"%d" % i * 100])
            await trio.sleep(1)
        assert trio.current_time() - start < 9
        assert busy.blobs == {}
        assert inflight.slow(busy.number, trio.current_time())
        stuck.ended(busy.number)
        await w.client.put_many([b"last"])
        await trio.sleep(1)
        assert digest(b"last") in busy.blobs
