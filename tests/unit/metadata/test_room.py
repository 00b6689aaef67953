"""What a metadata node takes on a disk that fills up: never others' copies, always deletes."""

import pytest
import trio
from synccluster import Cluster

from dfs.cluster.map import METADATA
from dfs.errors import DfsError, DiskFull
from dfs.hashing import digest
from dfs.limits import DiskWatch, Limits
from dfs.testing.sync_nodes import key_row
from metadata.merkle import BLOBS, REGISTERS
from metadata.registers import HINT, MERGE

TOTAL = 1_000_000
LIMITS = Limits(near=85, backfill=90, full=95, floor=0)


class Disk:
    """A disk as full as a test says, in per cent."""

    def __init__(self, node):
        self.percent = 86.0  # a disk that is emptier is looked at seldom
        watch = DiskWatch(LIMITS, self.usage, "/data")
        node.sync.admit_write, node.sync.admit_move = watch.check_write, watch.check_move

    def usage(self):
        return TOTAL, int(TOTAL * (100 - self.percent) / 100)


async def start(nursery):
    cluster = Cluster(nursery)
    one, two, *_ = await cluster.start()
    disk = Disk(two)

    async def call(method, *args, data=()):
        address = cluster.map.address(METADATA, 2)
        found, _ = await one.endpoint.call(address, method, args, data, timeout=5, epoch=1)
        return found

    return cluster, one, two, disk, call


async def test_new_blobs_are_refused_at_95_per_cent_and_held_ones_are_not():
    async with trio.open_nursery() as nursery:
        _, _, two, disk, call = await start(nursery)
        old, new = b"old" * 100, b"new" * 100

        async def put(*blobs):
            wanted = tuple((digest(b), len(b)) for b in blobs)
            return await call("blob.put", wanted, data=list(blobs))

        await put(old)
        disk.percent = 94.9
        await put(new[:10])
        disk.percent = 95.0
        assert await put(old) == (1,)
        for blobs in ((new,), (old, new)):
            with pytest.raises(DiskFull, match="/data: "):
                await put(*blobs)
        assert two.sync.blobs.get(digest(new)) is None
        assert await two.sync.blobs.put([new]) == [digest(new)]  # the node's own
        disk.percent = 94.5
        with pytest.raises(DiskFull):  # within the hysteresis of one per cent
            await put(b"another")
        disk.percent = 93.9
        await put(b"another")
        disk.percent = 94.0
        with pytest.raises(DiskFull):  # judged as if it were there
            await put(bytes(20_000))
        nursery.cancel_scope.cancel()


async def test_hints_are_refused_at_90_per_cent_and_those_of_deletes_are_not():
    async with trio.open_nursery() as nursery:
        _, one, two, disk, _ = await start(nursery)
        row, register = await one.put(b"k", b"v" * 100)
        gone, tombstone = await one.delete(b"k")
        now = one.sync.now()
        for percent, taken in ((89.9, True), (90.0, False)):
            disk.percent = percent
            (reply,) = await two.writer.write([(HINT, row, register, 3, now)])
            assert isinstance(reply, DiskFull) is not taken
            (reply,) = await two.writer.write([(HINT, gone, tombstone, 3, now)])
            assert reply is None
        assert two.sync.hints.targets[3].count == 3
        nursery.cancel_scope.cancel()


async def test_pushes_are_refused_at_90_per_cent_and_deletes_in_them_are_taken():
    async with trio.open_nursery() as nursery:
        _, one, two, disk, call = await start(nursery)
        live, value = await one.put(b"live", b"v" * 100)
        await one.put(b"dead")
        dead, tombstone = await one.delete(b"dead")
        now = one.sync.now()
        disk.percent = 90.0
        with pytest.raises(DiskFull, match="takes no data from other nodes"):
            await call("sync.push", 1, REGISTERS, ((live, value), (dead, tombstone)), now)
        assert two.store.get(live) is None
        assert two.store.get(dead) == tombstone
        blob = b"blob" * 10
        with pytest.raises(DiskFull):
            await call("sync.push", 1, BLOBS, ((b"b" + digest(blob), blob),), now)
        await call("sync.push", 1, REGISTERS, ((dead, tombstone),), now)
        await call("sync.push", 1, REGISTERS, (), now)  # the barrier of a rebalance
        with pytest.raises(DiskFull):
            await call("hints.deliver", 1, ((live, value, now), (dead, tombstone, now)))
        assert two.store.get(live) is None
        # its own exchange names the cause, and brings the rows once there is room
        await trio.sleep(60)
        await one.antientropy.run_once()
        assert "takes no data from other nodes" in one.antientropy.last_error
        disk.percent = 80.0
        await one.antientropy.run_once()
        assert two.store.get(live) == value
        assert await call("hints.deliver", 1, ((live, value, now),)) == (1, 0)
        nursery.cancel_scope.cancel()


async def test_writes_of_coordinators_and_removals_go_on():
    """They were admitted where they began; what frees space is never refused."""
    async with trio.open_nursery() as nursery:
        _, one, two, disk, _ = await start(nursery)
        disk.percent = 97.0
        row, register = await one.put(b"k")
        (reply,) = await two.writer.write([(MERGE, row, register)])
        assert not isinstance(reply, DfsError)
        await two.delete(b"k")
        await two.sync.blobs.put([b"x"])
        assert await two.sync.blobs.discard([digest(b"x")], lambda: True) == 1
        assert two.store.get(key_row(b"k"))
        nursery.cancel_scope.cancel()
