"""Damage that nobody reads is found by the scrubber, and repaired from the other homes."""

from random import Random

import trio
from synccluster import Cluster

from dfs.errors import Corrupt
from metadata.scrub import StoreScrub


async def damaged(cluster, *, keys=300, flips=3):
    """A cluster whose first node has flipped bits in its tables; what it held."""
    one, *_ = await cluster.start()
    for i in range(keys):
        await one.put(b"%d" % i, Random(i).randbytes(300))
        if i % 100 == 99:
            await one.store.flush()
    blobs = [b"blob %d" % i * 20 for i in range(40)]
    await one.sync.blobs.put(blobs)
    await one.store.flush()
    await trio.sleep(60)
    for node in cluster.nodes.values():
        await node.antientropy.run_once()
    before = one.rows()
    names = [n for n in one.disk.listdir("lsm") if n.endswith(".sst")]
    one.crash()  # its caches must not hide the damage
    for i in range(flips):
        name = names[i % len(names)]
        one.disk.flip(f"lsm/{name}", one.disk.open(f"lsm/{name}").size() // 2 - 40 * i)
    await cluster.nursery.start(one.start)
    return one, before


async def test_flipped_bits_are_found_repaired_and_cost_one_name():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, before = await damaged(cluster)
        scrub = StoreScrub(one.env, one.store)
        epoch = one.registers.actors.epoch
        told = []
        one.store.on_damage(lambda *loss: told.append(loss))
        assert one.store.lost() == []
        tables = one.store.statistics()["tables"]
        assert await scrub.run_once() == tables
        assert one.store.lost()
        assert told
        assert f"{tables} of {tables} tables read, " in scrub.progress
        assert "0 damaged" not in scrub.progress
        for _ in range(5):  # repairs, rebuilds digests, pulls
            await one.repair.run_once()
        assert one.repair.last_error == ""
        for _ in range(2):  # blobs come with the exchange
            await one.check.run_once()
            await one.antientropy.run_once()
        assert one.store.lost() == []
        assert one.sync.pull_first.partitions() == []
        assert one.rows() == before
        assert one.registers.actors.epoch == epoch + 1
        two = cluster.nodes[2]
        assert one.totals() == two.totals()
        scrub = StoreScrub(one.env, one.store)
        await scrub.run_once()
        assert one.store.lost() == []
        nursery.cancel_scope.cancel()


async def test_rows_stay_unreadable_until_they_are_repaired():
    """With the others away nothing is repaired, and no older or missing row is shown."""
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, before = await damaged(cluster)
        for n in (2, 3):
            cluster.nodes[n].crash()
            cluster.down.add(n)
        await StoreScrub(one.env, one.store).run_once()
        hidden = 0
        for row, value in before.items():
            try:
                assert one.store.get(row) == value
            except Corrupt:
                hidden += 1
        assert hidden
        await one.repair.run_once()
        assert one.sync.pull_first.partitions()
        nursery.cancel_scope.cancel()


async def test_the_scrubber_rests_and_can_be_paused():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, _ = await damaged(cluster, flips=0)
        scrub = StoreScrub(one.env, one.store, interval=1000.0)
        nursery.start_soon(scrub.run)
        scrub.pause()
        await trio.sleep(5000)
        assert scrub.status()["items"] == 0
        scrub.resume()
        await trio.sleep(5000)
        status = scrub.status()
        assert status["rounds"] >= 2
        assert status["items"] >= 2
        assert status["fraction"] is None
        assert status["last_error"] == ""
        assert one.store.quarantined == []
        nursery.cancel_scope.cancel()


async def test_an_empty_store_is_read_at_once():
    async with trio.open_nursery() as nursery:
        one, *_ = await Cluster(nursery).start()
        scrub = StoreScrub(one.env, one.store)
        assert await scrub.run_once() == 1
        assert "0 damaged" in scrub.progress
        nursery.cancel_scope.cancel()
