"""The store: what it answers, how it is kept up, what it refuses."""

from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.errors import ConfigError, Corrupt, DfsError, DiskFull, InvalidArgument, StoreFailed
from dfs.rpc.processes import WorkerProcesses
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store.engine import Store
from metadata.store.options import MAX_KEY, MAX_VALUE, StoreOptions
from metadata.store.policy import Plan, pick
from metadata.store.snapshot import prefix_end

SMALL = StoreOptions(
    memtable_bytes=8000, block_bytes=500, table_bytes=4000, fanout=3, cache_bytes=20000
)


def make_env(seed=1, disk=None, processes=None):
    random = Random(seed)
    disk = disk or SimDisk(random)
    return Env(SystemClock(), disk, None, processes or SimProcesses(random), random)


async def fill(store, model, random, count, *, keys=500, size=100, each=1, deletes=0.3):
    for _ in range(count):
        ops = []
        for _ in range(each):
            key = b"k%04d" % random.randrange(keys)
            value = None if random.random() < deletes else random.randbytes(random.randrange(size))
            ops.append((key, value))
            model[key] = value
        await store.batch(ops)


def live(model, prefix=b""):
    return sorted((k, v) for k, v in model.items() if v is not None and k.startswith(prefix))


def check(store, model):
    for key, value in model.items():
        assert store.get(key) == value
    assert store.scan(b"", limit=10**6) == live(model)


async def test_puts_deletes_and_scans():
    store = await Store.open(make_env())
    await store.batch([(b"a", b"1"), (b"b", b""), (b"c", b"3")])
    await store.batch([(b"a", b"2"), (b"c", None), (b"d", None), (b"e", b"x"), (b"e", b"y")])
    assert store.get_many([b"a", b"b", b"c", b"d", b"e", b"f"]) == [
        b"2", b"", None, None, b"y", None,
    ]  # fmt: skip
    assert store.scan(b"") == [(b"a", b"2"), (b"b", b""), (b"e", b"y")]
    assert store.scan(b"", after=b"a", limit=1) == [(b"b", b"")]
    assert store.scan(b"b") == [(b"b", b"")]
    assert store.scan(b"b", after=b"b") == []
    assert store.scan(b"c", after=b"a") == []
    assert store.scan(b"b", after=b"c") == []


@pytest.mark.parametrize("seed", range(4))
async def test_like_a_dict_through_flushes_and_merges(seed):
    random = Random(seed)
    env = make_env(seed)
    store = await Store.open(env, options=SMALL)
    model = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        for _ in range(5):
            await fill(store, model, random, 150, each=2)
            check(store, model)
            prefix = b"k0%d" % random.randrange(10)
            after = b"k0%03d" % random.randrange(1000)
            wanted = [p for p in live(model, prefix) if p[0] > after]
            assert store.scan(prefix, after=after, limit=7) == wanted[:7]
        nursery.cancel_scope.cancel()
    s = store.statistics()
    assert s["flushes"] > 5
    assert s["merges"] > 2
    assert s["levels"] >= 2
    assert s["runs"] <= SMALL.max_runs
    assert s["cache_bytes"] <= SMALL.cache_bytes
    assert s["write_amplification"] > 1
    assert store.errors == []
    again = await Store.open(env, options=SMALL)
    check(again, model)
    await again.compact()
    check(again, model)
    s = again.statistics()
    assert s["runs"] == 1
    assert s["tombstones"] == 0
    assert s["entries"] == len(live(model))
    assert len([n for n in env.disk.listdir("lsm") if n.endswith(".sst")]) == s["tables"]
    assert len([n for n in env.disk.listdir("lsm") if n.endswith(".wal")]) == 1


async def test_writers_do_the_work_when_nobody_else_does():
    store = await Store.open(make_env(), options=SMALL)
    model = {}
    await fill(store, model, Random(1), 600, each=3)
    s = store.statistics()
    assert s["memtable_bytes"] < SMALL.memtable_bytes * (SMALL.max_frozen + 2)
    assert s["runs"] <= SMALL.max_runs
    check(store, model)


async def test_concurrent_writers_share_syncs():
    store = await Store.open(make_env(), options=SMALL)
    model = {}
    async with trio.open_nursery() as nursery:
        for i in range(50):
            nursery.start_soon(fill, store, model, Random(i), 10)
    check(store, model)
    s = store.statistics()
    assert s["sync_calls"] == 500
    assert s["syncs"] < 100


async def test_deletions_disappear_when_they_are_many():
    store = await Store.open(make_env(), options=SMALL)
    for i in range(3000):
        await store.batch([(b"%06d" % i, b"x" * 50)], sync=False)
    for i in range(2000):
        await store.batch([(b"%06d" % i, None)], sync=False)
    await store.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    assert store.statistics()["entries"] < 2500
    assert len(store.scan(b"", limit=9999)) == 1000


async def test_snapshot_stays_what_it_was():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    random, model = Random(1), {}
    await fill(store, model, random, 300)
    snapshot, then = store.snapshot(), dict(model)
    await fill(store, model, random, 300)
    await store.compact()
    await fill(store, model, random, 100)
    assert snapshot.scan(b"", limit=10**6) == live(then)
    assert all(snapshot.get(k) == v for k, v in then.items())
    assert (
        snapshot.scan(b"k00", after=b"k005", limit=3)
        == [p for p in live(then, b"k00") if p[0] > b"k005"][:3]
    )
    check(store, model)


async def test_large_values_and_many_indexes():
    random = Random(1)
    options = StoreOptions(memtable_bytes=1 << 20, index_bytes=2000, cache_bytes=1 << 20)
    store = await Store.open(make_env(), options=options)
    model = {b"%d" % i: random.randbytes(1 << 20) for i in range(6)}
    for item in model.items():
        await store.batch([item])
    check(store, model)
    await fill(store, model, random, 60, each=100, size=600, keys=5000)
    await store.flush()
    check(store, model)
    assert store.statistics()["tables"] > 3
    assert store.statistics()["index_bytes"] < 100_000


async def test_refusals():
    store = await Store.open(make_env())
    bad = [
        (b"", b"x"), (b"k" * (MAX_KEY + 1), b""), ("k", b""), (b"k", "v"), (b"k", bytearray(1)),
        (b"k", bytes(MAX_VALUE + 1)),
    ]  # fmt: skip
    for op in bad:
        with pytest.raises(InvalidArgument):
            await store.batch([(b"good", b"1"), op])
    with pytest.raises(InvalidArgument, match="over the limit"):
        await store.batch([(b"%d" % i, bytes(MAX_VALUE)) for i in range(4)])
    assert store.scan(b"") == []
    with pytest.raises(ConfigError):
        StoreOptions(fanout=1)
    store.close()
    with pytest.raises(StoreFailed):
        await store.batch([(b"a", b"")])


async def test_full_disk_refuses_writes_and_recovers():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    model = {}
    await fill(store, model, Random(1), 100)
    env.disk.full = True
    with pytest.raises(DiskFull):
        await fill(store, dict(model), Random(2), 100)
    check(store, model)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(5)
        env.disk.full = False
        await fill(store, model, Random(3), 500)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    check(store, model)
    check(await Store.open(env, options=SMALL), model)


@pytest.mark.parametrize("name", ["lsm/MANIFEST", "lsm/0"])
async def test_failed_sync_ends_the_store(name):
    """Whatever file it is, what was acknowledged before is there after a power loss."""
    env = make_env()
    store = await Store.open(env, options=SMALL)
    acked = {}
    await fill(store, acked, Random(1), 50)
    env.disk.fail_next("sync", name)

    async def fill_and_run():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            await fill(store, {}, Random(2), 500)

    with pytest.raises(ExceptionGroup) as caught:
        await fill_and_run()
    assert caught.value.split(StoreFailed)[1] is None
    with pytest.raises(StoreFailed):
        await store.batch([(b"a", b"")])


async def test_jobs_that_die_are_repeated():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    model = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        for _ in range(10):
            env.processes.fail_next(2)
            await fill(store, model, Random(1), 100)
            await trio.sleep(30)
        nursery.cancel_scope.cancel()
    check(store, model)
    assert any("died" in e for e in store.errors)
    assert (
        len([n for n in env.disk.listdir("lsm") if n.endswith(".sst")])
        == (store.statistics()["tables"])
    )


async def test_cancelled_jobs_change_nothing():
    for seed in range(6):
        env = make_env(seed)
        env.processes._delay = 1
        random, model = Random(seed), {}
        store = await Store.open(env, options=SMALL)
        with trio.move_on_after(random.random() * 20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.run)
                for _ in range(100):
                    with trio.CancelScope(shield=True):
                        await fill(store, model, random, 10)
        await fill(store, model, random, 10)
        check(store, model)
        check(await Store.open(env, options=SMALL), model)


async def test_missing_manifest_is_refused():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    await fill(store, {}, Random(1), 300)
    env.disk.unlink("lsm/MANIFEST")
    with pytest.raises(Corrupt, match="MANIFEST is missing"):
        await Store.open(env, options=SMALL)


async def test_two_stores_on_one_disk():
    env = make_env()
    one, two = await Store.open(env, "one"), await Store.open(env, "two")
    await one.batch([(b"a", b"1")])
    await two.batch([(b"a", b"2")])
    assert (one.get(b"a"), two.get(b"a")) == (b"1", b"2")


@pytest.mark.realtime
async def test_on_a_real_disk_with_a_real_process(tmp_path):
    disk = RealDisk(tmp_path)
    async with WorkerProcesses() as processes:
        env = make_env(disk=disk, processes=processes)
        store = await Store.open(env, options=SMALL)
        model = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            await fill(store, model, Random(1), 200, each=10)
            check(store, model)
            nursery.cancel_scope.cancel()
        assert processes.statistics()["jobs"] > 5
        await store.compact()
        check(store, model)
        assert await store.verify() == []
        again = await Store.open(env, options=SMALL)
        check(again, model)
    disk.close()


async def test_failing_worker_falls_back_to_memory():
    """A flush needs no worker: the memtable has everything."""

    class Broken:
        async def run(self, function, *args):
            raise DfsError("no process today")

    env = make_env(processes=Broken())
    store = await Store.open(env, options=SMALL)
    model = {}
    await fill(store, model, Random(1), 100)
    await store.flush()
    check(store, model)
    check(await Store.open(env, options=SMALL), model)


def test_prefix_end():
    assert prefix_end(b"a") == b"b"
    assert prefix_end(b"a\xff\xff") == b"b"
    assert prefix_end(b"\xff") == b""
    assert prefix_end(b"") == b""


class Size:
    def __init__(self, level, entries=100, tombstones=0):
        self.level, self.entries, self.tombstones = level, entries, tombstones


@pytest.mark.parametrize(
    ("levels", "plan"),
    [
        ([], None),
        ([0, 0, 0], None),
        ([0, 0, 0, 0], Plan(0, 4, 1)),
        ([0, 0, 0, 0, 0, 1], Plan(0, 5, 1)),
        ([0, 1, 1, 1, 1, 2], Plan(1, 5, 2)),
        ([0, 2, 2, 2], None),
    ],
)
def test_policy(levels, plan):
    assert pick([Size(level) for level in levels], 4) == plan


def test_policy_on_deletions():
    assert pick([Size(0, 900, 900), Size(3, 10000, 10)], 4) is None
    assert pick([Size(0, 4000, 4000), Size(3, 10000, 10)], 4) == Plan(0, 2, 3)
