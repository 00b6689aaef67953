"""New names after damage: one for each loss, none for a start."""

from random import Random

import pytest
import trio
from synccluster import Cluster

from dfs import codec
from dfs.clock import SystemClock
from dfs.env import Env
from dfs.errors import Corrupt
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from dfs.testing.sync_maps import first_map
from dfs.testing.sync_nodes import Rows
from metadata import versions
from metadata.kv import KV
from metadata.merkle import Digests
from metadata.renewals import ROW, renew_once
from metadata.steps import Write
from metadata.store.engine import Store
from metadata.syncworkers import StorageRepair


class Place:
    """A table, and how often a new name was taken."""

    def __init__(self):
        self.rows = Rows()
        self.taken = 0

    def renew(self):
        self.taken += 1
        yield Write(())

    def run(self, *losses):
        steps = renew_once(self.rows, losses, self.renew)
        try:
            while True:
                self.rows.apply(next(steps).ops)
        except StopIteration as e:
            return e.value


def test_one_name_for_each_damaged_table():
    place = Place()
    assert place.run((b"a", b"b", "1.sst"))
    assert not place.run((b"a", b"b", "1.sst"))
    assert not place.run((b"c", b"d", "1.sst"))  # another block of the same table
    assert place.run((b"c", b"d", "1.sst"), (b"e", b"f", "2.sst"))
    assert not place.run((b"e", b"f", "2.sst"))
    assert place.run((b"e", b"f", "3.sst"))
    assert place.run((b"e", b"f", ""))  # damage older than the record of names
    assert place.run((b"e", b"f", ""))
    assert place.taken == 5
    assert codec.unpack(place.rows.get(ROW)) == (1, ("",))


def test_a_row_of_a_later_format_is_refused():
    place = Place()
    place.rows.apply([(ROW, codec.pack((2, ())))])
    with pytest.raises(Corrupt, match="upgrade dfs"):
        place.run((b"a", b"b", "1.sst"))


class EveryTime(StorageRepair):
    """A mutant: another name at each attempt."""

    def _renew(self, losses):
        return self._lost_registers()


@pytest.mark.parametrize("mutant", [None, EveryTime])
async def test_repair_that_fails_again_and_again_takes_one_name(mutant, monkeypatch):
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, *_ = await cluster.start()
        for i in range(100):
            await one.put(b"%d" % i, Random(i).randbytes(300))
        await one.store.flush()
        one.crash()
        (name,) = [n for n in one.disk.listdir("lsm") if n.endswith(".sst")]
        one.disk.flip(f"lsm/{name}", one.disk.open(f"lsm/{name}").size() // 2)
        await nursery.start(one.start)
        await one.store.verify()
        if mutant:
            one.repair = mutant(one.env, one.sync, one.repair._lost_registers)
        epoch = one.writer.registers.actors.epoch

        async def refuse(first, last):
            raise Corrupt("no room to salvage")

        with monkeypatch.context() as patched:
            patched.setattr(one.store, "accept_losses", refuse)
            for _ in range(4):
                with pytest.raises(Corrupt):
                    await one.repair.run_once()
        await one.repair.run_once()
        assert one.store.lost() == []
        renewed = one.writer.registers.actors.epoch - epoch
        assert renewed == (5 if mutant else 1)
        nursery.cancel_scope.cancel()


async def test_a_start_beside_a_quarantined_table_takes_no_name():
    disk = SimDisk(Random(1))
    env = Env(SystemClock(), disk, None, SimProcesses(Random(1)), Random(1))
    store = await Store.open(env)
    await store.batch([(b"r%04d" % i, b"x" * 100) for i in range(100)])
    await store.flush()
    (name,) = [n for n in disk.listdir("lsm") if n.endswith(".sst")]
    disk.flip(f"lsm/{name}", 20)
    epochs = set()
    for accepted in (False, False, True, True):
        store = await Store.open(env)
        await store.verify()
        if accepted:
            await store.accept_losses()
        kv = KV(env, 1, lambda: first_map(3), store, digests=Digests(store))
        epochs.add(kv.registers.actors.epoch)
        assert store.quarantined == [name]
        store.close()
    assert epochs == {1}


async def test_version_vectors_do_not_grow_with_restarts_beside_a_quarantined_table():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, *_ = await cluster.start()
        for i in range(100):
            await one.put(b"%d" % i, Random(i).randbytes(300))
        await trio.sleep(60)
        await one.antientropy.run_once()
        await one.store.flush()
        one.crash()
        (name,) = [n for n in one.disk.listdir("lsm") if n.endswith(".sst")]
        one.disk.flip(f"lsm/{name}", one.disk.open(f"lsm/{name}").size() // 2)
        await nursery.start(one.start)
        await one.store.verify()
        await one.repair.run_once()
        assert one.store.lost() == []
        for _ in range(6):
            row, _ = await one.put(b"k")
            one.crash()
            await nursery.start(one.start)
            await one.repair.run_once()
            assert one.store.quarantined == [name]
        assert len(versions.decode(one.store.get(row))[0]) == 1
        nursery.cancel_scope.cancel()
