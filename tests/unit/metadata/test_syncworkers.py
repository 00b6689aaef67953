"""Whole nodes: stores, writers and workers over a simulated network, made equal by their loops."""

from random import Random

import pytest
import trio
from synccluster import Clock, Cluster

from dfs.cluster.map import METADATA
from dfs.env import Env
from dfs.errors import Busy, Corrupt, InvalidArgument
from dfs.hashing import digest
from dfs.testing.processes import SimProcesses
from dfs.testing.sync_nodes import key_row
from metadata.merkle import BLOBS, REGISTERS
from metadata.registers import HINT, MERGE, RAW
from metadata.store.engine import Store


async def test_nodes_become_equal():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, two, three = await cluster.start()
        for i in range(30):
            await one.put(b"a%d" % i)
            await two.put(b"b%d" % i)
            await three.put(b"%d" % i, b"both %d" % i)
            await one.put(b"%d" % i, b"other")
        blobs = [b"blob %d" % i for i in range(20)]
        await two.sync.blobs.put(blobs)
        await one.antientropy.run_once()  # everything is fresh but the blobs
        assert one.antientropy.last_error == ""
        assert one.rows().keys() >= {b"b" + digest(b) for b in blobs}
        assert one.store.get(key_row(b"b1")) is None
        await trio.sleep(60)
        for node in (one, two, one):
            await node.antientropy.run_once()
            assert node.antientropy.last_error == ""
        assert one.rows() == two.rows() == three.rows()
        assert len(one.rows()) == 90 + 20
        assert one.totals() == two.totals() == three.totals()
        for node in (one, two, three):
            assert await node.check._check(REGISTERS, 0) == 0
            assert await node.check._check(BLOBS, 0) == 0
            assert node.sync.digests.drift == 0
        nursery.cancel_scope.cancel()


async def test_hints_are_delivered_and_survive_a_restart():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, two, three = await cluster.start()
        three.crash()
        cluster.down.add(3)
        row, register = await one.put(b"k")
        now = one.sync.now()
        await two.writer.write([(MERGE, row, register), (HINT, row, register, 3, now)])
        assert await two.hints.run_once() == 0
        two.crash()
        await nursery.start(two.start)
        (status,) = (
            await one.endpoint.call(cluster.map.address(METADATA, 2), "hints.list", timeout=5)
        )[0][0]
        assert status["node"] == 3
        assert status["count"] == 1
        await nursery.start(three.start)
        cluster.down.clear()
        two.hints.returned(3)
        await trio.sleep(10)
        assert await two.hints.run_once() == 1
        assert three.store.get(row) == register
        # over the limit of age: dropped, and left to anti-entropy
        row, register = await one.put(b"late")
        await two.writer.write([(HINT, row, register, 3, two.sync.now())])
        cluster.down.add(3)
        await trio.sleep(3 * 3600 + 10)
        cluster.down.clear()
        assert await two.hints.run_once() == 0
        assert two.sync.hints.dirty() == [3]
        (refused,) = await two.writer.write([(HINT, row, register, 3, two.sync.now())])
        assert isinstance(refused, Busy)
        await one.antientropy.run_once()
        assert three.store.get(row) == register
        for node in (one, two, three):
            if not node.sync.digests.built(BLOBS):
                await node.check.run_once()
        await two.antientropy.run_once()
        assert two.sync.hints.dirty() == []
        address = cluster.map.address(METADATA, 2)
        with pytest.raises(InvalidArgument, match="no hints for node 9"):
            await one.endpoint.call(address, "hints.drop", (9,), timeout=5)
        with pytest.raises(InvalidArgument, match="malformed"):
            await one.endpoint.call(address, "sync.buckets", (1,), timeout=5)
        nursery.cancel_scope.cancel()


async def test_deleted_registers_disappear_for_good():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        nodes = one, two, three = await cluster.start()
        for i in range(6):
            await one.put(b"%d" % i)
            await one.delete(b"%d" % i)
        await one.put(b"stays")
        for hours in (25, 5, 1):
            await trio.sleep(hours * 3600)
            for node in nodes:
                await node.antientropy.run_once()
                await node.purge.run_once()
        assert sum(n.sync.tombstones.purged for n in nodes) == 6
        assert [list(n.rows()) for n in nodes] == [[key_row(b"stays")]] * 3
        assert one.totals() == two.totals() == three.totals()
        nursery.cancel_scope.cancel()


async def test_damage_is_repaired_from_the_other_homes():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, two, three = await cluster.start()
        for i in range(300):
            await one.put(b"%d" % i, bytes(Random(i).randbytes(300)))
        await trio.sleep(60)
        await one.antientropy.run_once()
        await one.store.flush()
        before = one.rows()
        one.crash()
        (name,) = [n for n in one.disk.listdir("lsm") if n.endswith(".sst")]
        one.disk.flip(f"lsm/{name}", one.disk.open(f"lsm/{name}").size() // 2)
        await nursery.start(one.start)
        unreadable = 0
        for row in before:
            try:
                one.store.get(row)
            except Corrupt:
                unreadable += 1
        assert unreadable
        assert one.store.lost()
        epoch = one.writer.registers.actors.epoch
        done = await one.repair.run_once()
        assert done > 0
        assert one.store.lost() == []
        assert one.rows() == before
        assert one.writer.registers.actors.epoch > epoch
        assert one.sync.pull_first.partitions() == []
        await one.check.run_once()
        assert one.totals() == two.totals() == three.totals()
        assert one.sync.digests.drift == 0
        nursery.cancel_scope.cancel()


async def test_blobs_from_before_digests_are_counted_before_they_are_compared():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        node = cluster.nodes[1]
        env = Env(Clock(), node.disk, None, SimProcesses(Random(1)), Random(1))
        store = await Store.open(env)
        blobs = {b"b" + digest(b"%d" % i): b"%d" % i for i in range(50)}
        await store.batch(list(blobs.items()))
        store.close()
        one, two, _ = cluster.nodes.values()
        await nursery.start(one.start)
        assert not one.sync.digests.built(BLOBS)
        for n in (2, 3):
            await nursery.start(cluster.nodes[n].start)
            await cluster.nodes[n].check.run_once()
        await two.antientropy.run_once()
        assert "not complete" in two.antientropy.last_error
        await one.check.run_once()
        assert one.sync.digests.drift == 0
        await two.antientropy.run_once()
        assert two.rows() == blobs
        nursery.cancel_scope.cancel()


async def test_partitions_that_wait_are_pulled_at_once_and_again_soon():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, two, three = await cluster.start()
        await one.put(b"a")

        async def wait(partition):
            await two.writer.write([(RAW, two.sync.pull_first.begin([partition]))])

        nursery.start_soon(two.repair.run)
        await trio.sleep(5)  # its first round is over, the next one is a minute away
        await wait(7)
        two.repair.map_changed(cluster.map, cluster.map)
        await trio.sleep(1)
        assert two.sync.pull_first.partitions() == []

        one.crash()
        three.crash()
        await wait(7)
        two.repair.map_changed(cluster.map, cluster.map)
        await trio.sleep(20)
        assert two.sync.pull_first.partitions() == [7]
        assert "1 partitions wait" in two.repair.progress
        await nursery.start(one.start)
        await nursery.start(three.start)
        await trio.sleep(15)
        assert two.sync.pull_first.partitions() == []
        nursery.cancel_scope.cancel()
