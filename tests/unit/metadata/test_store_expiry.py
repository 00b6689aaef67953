"""Values that expire, and what snapshots hold on to."""

import gc
from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.errors import Busy, InvalidArgument
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store.engine import Store
from metadata.store.options import StoreOptions

SMALL = StoreOptions(
    memtable_bytes=8000, block_bytes=500, table_bytes=4000, fanout=3, expiry_grace=100
)


class Wall(SystemClock):
    now = 1_900_000_000

    def time_ns(self):
        return int(self.now * 10**9)


def make_env(seed=1):
    random = Random(seed)
    return Env(Wall(), SimDisk(random), None, SimProcesses(random), random)


def tables(env):
    return [n for n in env.disk.listdir("lsm") if n.endswith(".sst")]


async def test_expired_is_absent_everywhere_and_through_restarts():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    until = env.clock.now + 10
    await store.batch([(b"a", b"1", until), (b"b", b"2"), (b"c", b"3", until + 1)])
    await store.put(b"d", b"4", ttl=10)
    await store.put(b"e", b"5", ttl=0.5)

    async def check(expected):
        nonlocal store
        for step in ("memory", "replay", "table", "merged"):
            if step == "replay":
                store = await Store.open(env, options=SMALL)
            elif step == "table":
                await store.flush()
            elif step == "merged":
                await store.compact()
            assert dict(store.scan(b"")) == expected, step
            assert dict(store.iterate()) == expected, step
            for key in (b"a", b"b", b"c", b"d", b"e"):
                assert store.get(key) == expected.get(key), step

    await check({b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"4", b"e": b"5"})
    env.clock.now += 9
    await check({b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"4"})
    env.clock.now += 1
    await check({b"b": b"2", b"c": b"3"})
    env.clock.now += 1
    await check({b"b": b"2"})
    env.clock.now -= 1.5  # a clock set right again: nothing was destroyed yet
    await check({b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"4"})
    env.clock.now += 200
    await check({b"b": b"2"})
    env.clock.now -= 200  # further back than the grace
    await check({b"b": b"2"})
    assert store.statistics()["entries"] == 1


async def test_what_expires_hides_older_values_until_they_are_gone():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    await store.batch([(b"a", b"old"), (b"b", b"old")])
    await store.flush()
    await store.put(b"a", b"new", ttl=10)
    await store.flush()
    env.clock.now += 1000
    assert store.scan(b"") == [(b"b", b"old")]
    await store.put(b"b", b"newer", ttl=1)
    env.clock.now += 1000
    await store.flush()  # writes it as a deletion
    assert store.statistics()["tombstones"] == 1
    assert store.scan(b"") == []
    assert store.get(b"a") is store.get(b"b") is None
    await store.batch([(b"a", b"again")])
    assert store.get(b"a") == b"again"
    await store.compact()
    assert store.scan(b"") == [(b"a", b"again")]
    assert store.statistics()["entries"] == 1


async def test_expired_data_gives_its_space_back_without_a_write():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    until = env.clock.now + 10
    for i in range(2000):
        await store.batch([(b"%06d" % i, b"x" * 50, until)], sync=False)
    await store.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(100)
        before = store.statistics()["entries"]
        env.clock.now += 200
        await trio.sleep(1300)
        nursery.cancel_scope.cancel()
    assert before == 2000
    assert store.statistics()["entries"] < 500
    assert store.lsm()["pending_merge"] == 0


@pytest.mark.parametrize(
    "op",
    [
        (b"k", b"v", 0),
        (b"k", b"v", -5),
        (b"k", b"v", 1 << 64),
        (b"k", b"v", 1.5),
        (b"k", b"v", None),
        (b"k", None, 1_900_000_000),
        (b"k", "v", 1_900_000_000),
        (b"k",),
        (b"k", b"v", 5, 5),
    ],
)
async def test_bad_operations_are_refused(op):
    store = await Store.open(make_env())
    with pytest.raises(InvalidArgument):
        await store.batch([(b"good", b"1"), op])
    assert store.scan(b"") == []


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), 1e300])
async def test_bad_ttl_is_refused(ttl):
    store = await Store.open(make_env())
    with pytest.raises(InvalidArgument, match="time to live"):
        await store.put(b"k", b"v", ttl=ttl)


# -------------------------------------------------------------------------------- snapshots


async def test_a_snapshot_keeps_its_tables_until_it_is_closed():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    then = {b"%04d" % i: b"old" * 20 for i in range(300)}
    for item in then.items():
        await store.batch([item], sync=False)
    await store.flush()
    snapshot = store.snapshot()
    iterator = snapshot.iterate()
    first = [next(iterator) for _ in range(10)]
    for key in then:
        await store.batch([(key, b"new")], sync=False)
    await store.compact()
    assert len(tables(env)) == store.statistics()["tables"]  # no names are left
    assert store.lsm()["retired_bytes"] > 4_000
    assert dict(snapshot.iterate()) == then
    snapshot.close()
    with pytest.raises(InvalidArgument, match="closed"):
        snapshot.get(b"0000")
    assert first + list(iterator) == list(then.items())  # its iterators go on
    del iterator
    gc.collect()
    lsm = store.lsm()
    assert lsm["retired_bytes"] == 0
    assert lsm["memory"]["snapshots"] == 0
    assert store.statistics()["index_bytes"] < 20_000


async def test_a_snapshot_ignores_the_clock():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    await store.put(b"a", b"1", ttl=10)
    with store.snapshot() as snapshot:
        env.clock.now += 1000
        await store.compact()
        assert store.get(b"a") is None
        assert snapshot.get(b"a") == b"1"
        assert list(snapshot.iterate()) == [(b"a", b"1")]


async def test_snapshots_of_the_same_state_share_memory_and_all_are_bounded():
    env = make_env()
    options = StoreOptions(memtable_bytes=20_000, snapshot_bytes=50_000)
    store = await Store.open(env, options=options)
    await store.batch([(b"%d" % i, b"x" * 100) for i in range(50)])
    same = [store.snapshot() for _ in range(1000)]
    assert 0 < store.statistics()["snapshot_bytes"] < 20_000
    held = []

    async def write_and_hold():
        for i in range(100):
            await store.batch([(b"%d" % i, b"y" * 100)])
            held.append(store.snapshot())

    with pytest.raises(Busy, match="close some"):
        await write_and_hold()
    assert store.statistics()["snapshot_bytes"] < 70_000
    held.clear()
    same.clear()
    store.snapshot()
    assert store.statistics()["snapshot_bytes"] == 0


async def test_iterators_with_bounds():
    store = await Store.open(make_env(), options=SMALL)
    keys = [b"%s%02d" % (p, i) for p in (b"a", b"b", b"b\xff") for i in range(99)]
    for key in keys:
        await store.batch([(key, b"v" * 50)], sync=False)
    keys.sort()

    def got(**bounds):
        return [k for k, _ in store.iterate(**bounds)]

    assert got() == keys
    assert got(prefix=b"a") == [k for k in keys if k[:1] == b"a"]
    assert got(prefix=b"b", after=b"b07") == [k for k in keys if k[:1] == b"b" and k > b"b07"]
    assert got(after=b"a98") == [k for k in keys if k > b"a98"]
    assert got(prefix=b"b", end=b"b05") == [k for k in keys if b"b" <= k < b"b05"]
    assert got(prefix=b"a", end=b"c") == got(prefix=b"a")
    assert got(after=b"b05", end=b"b05") == []
    assert got(prefix=b"a", after=b"b") == []
    assert got(end=b"a") == []
