"""A full disk: puts are refused, deletes and merges go on and give space back."""

import contextlib
import subprocess
import weakref
from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.errors import DiskFull
from dfs.rpc.processes import WorkerProcesses
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store.engine import Store
from metadata.store.options import StoreOptions
from metadata.store.reserve import Reserve

RESERVE = 100_000
SMALL = StoreOptions(
    memtable_bytes=20_000,
    block_bytes=1000,
    table_bytes=15_000,
    fanout=3,
    compression=0,
    reserve_bytes=RESERVE,
)


def make_env(seed=1, **disk):
    random = Random(seed)
    return Env(SystemClock(), SimDisk(random, **disk), None, SimProcesses(random), random)


def value(key, size=200):
    return Random(key).randbytes(size)


async def fill_up(store, start=0, size=200):
    """Put until the disk is full; returns the keys that were acknowledged."""
    keys = []
    with contextlib.suppress(DiskFull):
        for i in range(start, start + 10**6):
            key = b"%08d" % i
            await store.batch([(key, value(key, size))])
            keys.append(key)
    return keys


async def delete_all(store, keys, each=20):
    for i in range(0, len(keys), each):
        await store.batch([(k, None) for k in keys[i : i + each]])


async def test_deletes_and_merges_work_on_a_full_disk():
    env = make_env(capacity=1_000_000)
    store = await Store.open(env, options=SMALL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        keys = await fill_up(store)
        assert len(keys) > 1500
        await trio.sleep(100)
        with pytest.raises(DiskFull):
            await store.batch([(b"x", b"y" * 200)])
        assert dict(store.iterate()) == {k: value(k) for k in keys}
        gone, kept = keys[: -len(keys) // 5], keys[-len(keys) // 5 :]
        await delete_all(store, gone)
        assert dict(store.iterate()) == {k: value(k) for k in kept}
        await trio.sleep(2000)
        used = env.disk.capacity - env.disk.usage()[1]
        assert used < 2 * 220 * len(kept) + RESERVE + 60_000  # the deleted values are off the disk
        assert not store.lsm()["reserve"]["missing"]
        more = await fill_up(store, 10**7)  # and there is room again
        assert len(more) > 500
        nursery.cancel_scope.cancel()
    store = await Store.open(env, options=SMALL)
    assert dict(store.iterate()) == {k: value(k) for k in [*kept, *more]}


def unnamed(disk, store):
    """Tables on the disk that the store does not use."""
    used = {t.meta.name for r in store._state.runs for t in r.tables}
    return {n for n in disk.listdir("lsm") if n.endswith(".sst")} - used


async def test_a_job_without_room_leaves_nothing_behind():
    """Neither the part of a table that had room, nor one for which the manifest has none."""
    env = make_env()
    store = await Store.open(env, options=SMALL)
    disk, keys = env.disk, []
    for i in range(200):
        keys.append(b"%08d" % i)
        await store.batch([(keys[-1], value(keys[-1]))])
    await store.flush()
    await delete_all(store, keys[::2])
    capacity, outcomes = disk.capacity, set()
    for room in range(0, 70_000, 500):  # every place where it may end, and the first that does not
        for work in (store._maintenance.merge_all, store._flush):
            disk.capacity = capacity - disk.usage()[1] + room
            try:
                await work()
            except DiskFull:
                outcomes.add((work.__name__, "full"))
            else:
                outcomes.add((work.__name__, "done"))
            disk.capacity = capacity
            assert not unnamed(disk, store), (work.__name__, room)
    assert len(outcomes) == 4
    assert dict(store.iterate()) == {k: value(k) for k in keys[1::2]}


@pytest.mark.parametrize("gives", [0, 10_000])
async def test_deletes_wait_while_a_merge_has_the_reserve(gives):
    env = make_env(capacity=1_000_000)
    store = await Store.open(env, options=SMALL)
    keys = [b"%08d" % i for i in range(10)]
    await store.batch([(key, value(key)) for key in keys])
    merges = []

    async def step():
        merges.append(env.disk.usage()[1])
        env.disk.capacity += gives
        return len(merges) == 1

    store._maintenance.step = step
    assert await store._state.reserve.release()
    env.disk.capacity -= env.disk.usage()[1]  # a merge has it
    with contextlib.nullcontext() if gives else pytest.raises(DiskFull):
        await store.batch([(key, None) for key in keys[:5]])
    assert merges
    assert (store.get(keys[0]) is None) is bool(gives)


class Job:
    """A job that meets a full disk, with something in its frame."""

    def __init__(self, times):
        self.times = times
        self.held = []
        self.seen = []  # how much of it was still held at the next try

    async def __call__(self):
        self.seen.append(sum(ref() is not None for ref in self.held))
        table = Job(0)
        self.held.append(weakref.ref(table))
        await trio.lowlevel.checkpoint()
        if len(self.held) <= self.times:
            raise DiskFull(f"no room for {table}")
        return False


async def test_a_failed_job_holds_no_table_while_it_waits():
    """A removed table takes space as long as it is open: a pause is up to a minute."""
    store = await Store.open(make_env(), options=SMALL)
    job = store._maintenance.step = Job(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert job.seen == [0] * 6
    await store._state.reserve.restore()
    again = Job(1)
    await store._retried(again)
    assert again.seen == [0, 0]
    with pytest.raises(DiskFull):  # and without a reserve, the error
        await store._retried(Job(1))


async def test_without_a_reserve_deletes_on_a_full_disk_fail():
    """What the reserve is for: this is the test above with it switched off."""
    env = make_env(capacity=1_000_000)
    store = await Store.open(env, options=StoreOptions(memtable_bytes=20_000, compression=0))
    keys = await fill_up(store)
    with pytest.raises(DiskFull):
        await delete_all(store, keys)


async def test_the_reserve_is_for_deletes_not_for_puts():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    await store.batch([(b"a", b"1"), (b"b", b"2")])
    env.disk.capacity = env.disk.capacity - env.disk.usage()[1]  # not one byte is left
    with pytest.raises(DiskFull):
        await store.batch([(b"c", b"3")])
    assert not store.lsm()["reserve"]["missing"]
    with pytest.raises(DiskFull):
        await store.batch([(b"a", None), (b"c", b"3")])
    await store.batch([(b"a", None)])
    assert store.lsm()["reserve"]["missing"]
    with pytest.raises(DiskFull, match="only deletes"):
        await store.batch([(b"c", b"3")])
    assert store.scan(b"") == [(b"b", b"2")]
    again = await Store.open(env, options=SMALL)
    assert again.scan(b"") == [(b"b", b"2")]
    assert again.lsm()["reserve"]["missing"]
    env.disk.capacity += 10 * RESERVE
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    assert not again.lsm()["reserve"]["missing"]
    await again.batch([(b"c", b"3")])


async def test_a_node_may_refuse_puts_before_the_disk_is_full():
    store = await Store.open(make_env())
    await store.batch([(b"a", b"1")])
    store.refuse_puts = lambda: True
    with pytest.raises(DiskFull, match="only deletes"):
        await store.batch([(b"b", b"2")])
    with pytest.raises(DiskFull):
        await store.put(b"b", b"2", ttl=5)
    await store.batch([(b"a", None)])
    await store.batch([])
    store.refuse_puts = lambda: False
    await store.batch([(b"b", b"2")])
    assert store.scan(b"") == [(b"b", b"2")]


@pytest.mark.parametrize("seed", range(5))
async def test_a_full_disk_and_power_losses(seed):
    """Acknowledged deletes and puts survive whatever was under way on the full disk."""
    random = Random(seed)
    env = make_env(seed, capacity=400_000)
    expected, doubt = {}, {}
    for _ in range(6):
        store = await Store.open(env, options=SMALL)
        found = dict(store.iterate())
        for key, old in doubt.items():  # those under way may have been applied or not
            assert found.get(key) in (old, expected.pop(key, None))
            if key in found:
                expected[key] = found[key]
        doubt.clear()
        assert found == expected
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)

            async def write(store=store):
                while True:
                    key = b"%04d" % random.randrange(3000)
                    new = None if random.random() < 0.3 else value(key)
                    doubt[key] = expected.get(key)
                    if new is None:
                        expected.pop(key, None)
                    else:
                        expected[key] = new
                    try:
                        await store.batch([(key, new)])
                    except DiskFull:
                        expected[key] = doubt.pop(key)
                        if expected[key] is None:
                            del expected[key]
                        await trio.sleep(0.01)
                    else:
                        doubt.pop(key)

            nursery.start_soon(write)
            await trio.sleep(random.random() * 10)
            env.disk.crash()
            nursery.cancel_scope.cancel()
    assert len(expected) > 100


async def test_reserve_comes_and_goes():
    disk = SimDisk(Random(1), capacity=10_000)
    disk.mkdir("d")
    reserve = Reserve(disk, "d", 4000)
    assert reserve.missing
    await reserve.restore()
    assert not reserve.missing
    assert disk.usage()[1] == 6000
    assert await reserve.release()
    assert not await reserve.release()
    assert disk.usage()[1] == 10_000
    disk.open("other", create=True).append([bytes(5000)])
    await reserve.restore()
    assert reserve.missing  # there is room, but not twice
    disk.unlink("other")
    await reserve.restore()
    assert not reserve.missing
    again = Reserve(disk, "d", 4000)
    await again.restore()
    assert not again.missing
    assert disk.usage()[1] == 6000
    nothing = Reserve(disk, "d", 0)
    assert not nothing.missing
    assert not await nothing.release()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 24 MiB."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path], check=True, timeout=10
    )
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True, timeout=10)


@pytest.mark.mount
async def test_on_a_real_full_file_system(small_disk):
    options = StoreOptions(
        memtable_bytes=500_000,
        table_bytes=1 << 20,
        compression=0,
        reserve_bytes=5 << 20,
        fanout=3,
    )
    disk = RealDisk(small_disk)
    random = Random(1)
    async with WorkerProcesses() as processes:
        env = Env(SystemClock(), disk, None, processes, random)
        store = await Store.open(env, options=options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            keys = await fill_up(store, size=8000)
            assert len(keys) > 1000
            gone, kept = keys[:-200], keys[-200:]
            await delete_all(store, gone)
            await store.compact()
            assert disk.usage()[1] > 16 << 20
            assert not unnamed(disk, store)
            assert not store._state.retired  # removed, but open
            with trio.fail_after(30):
                while store.lsm()["reserve"]["missing"]:
                    await trio.sleep(0.1)
                    await store.batch([(b"x", None)])
                    await store.flush()
            await store.batch([(b"new", b"x" * 8000)])
            nursery.cancel_scope.cancel()
        store = await Store.open(env, options=options)
        assert dict(store.iterate()) == {b"new": b"x" * 8000} | {k: value(k, 8000) for k in kept}
    disk.close()
