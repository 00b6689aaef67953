"""What a store costs: memory within its budget, filters sized per level, the numbers of `lsm`."""

import tracemalloc
from itertools import pairwise
from math import exp, log
from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.codec import pack, unpack
from dfs.env import Env
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store import bloom
from metadata.store.engine import Store
from metadata.store.filters import MAX_BITS, MIN_BITS, allocate
from metadata.store.options import StoreOptions

SMALL = StoreOptions(memtable_bytes=8000, block_bytes=500, table_bytes=4000, fanout=3)


def make_env(seed=1):
    random = Random(seed)
    return Env(SystemClock(), SimDisk(random), None, SimProcesses(random), random)


async def load(store, count, *, size=200, seed=1, each=20):
    """Write `count` random keys in batches with the background at work; returns them."""
    random = Random(seed)
    keys = [b"%012d" % random.randrange(10**12) for _ in range(count)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        for i in range(0, count, each):
            await store.batch([(k, random.randbytes(size)) for k in keys[i : i + each]])
        await store.flush()
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    return keys


# --------------------------------------------------------------------------------------- memory


async def test_memory_stays_within_the_budget_whatever_the_size():
    options = StoreOptions(
        memtable_bytes=100_000,
        block_bytes=2000,
        table_bytes=200_000,
        cache_bytes=150_000,
        index_bytes=60_000,
        snapshot_bytes=200_000,
        compression=0,
    )
    env = make_env()
    store = await Store.open(env, options=options)
    highest = {}

    def look():
        memory = store.lsm()["memory"]
        for name, size in memory.items():
            highest[name] = max(size, highest.get(name, 0))
        assert memory["total"] <= memory["budget"] == options.memory_bytes
        assert memory["cache"] <= options.cache_bytes
        assert memory["memtables"] <= options.memtable_bytes * (options.max_frozen + 2)
        tables = [t for r in store._state.runs for t in r.tables]
        assert memory["indexes"] == sum(t.index.size for t in tables if t.index is not None)
        assert memory["indexes"] <= options.index_bytes + 20_000  # always the one in use

    random = Random(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        for n in range(1200):
            keys = [b"%012d" % random.randrange(10**12) for _ in range(25)]
            await store.batch([(k, random.randbytes(200)) for k in keys])
            store.get(random.choice(keys))
            if n % 100 == 0:
                assert sum(1 for _ in store.iterate()) > 25 * n * 0.99
            if n % 20 == 0:
                look()
                store.scan(b"", after=random.choice(keys), limit=300)
                look()
        nursery.cancel_scope.cancel()
    written = store.statistics()["user_bytes"]
    assert written > 6 * options.memory_bytes
    assert highest["cache"] > options.cache_bytes / 4  # they were used
    assert highest["indexes"] > options.index_bytes / 2
    assert store.lsm()["write_amplification"] < 8


async def test_an_iterator_needs_a_block_per_run_not_the_range():
    options = StoreOptions(memtable_bytes=1 << 20, table_bytes=1 << 20, compression=0)
    store = await Store.open(make_env(), options=options)
    keys = await load(store, 12_000, size=1000)
    count = 0
    tracemalloc.start()
    try:
        for _ in store.iterate():
            count += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == len(set(keys))
    assert store.statistics()["bytes"] > 12_000_000
    assert peak < 2 << 20
    assert store.statistics()["cache_bytes"] == 0  # a long walk does not empty the cache


async def test_large_values_are_iterated_one_at_a_time():
    env = make_env()
    store = await Store.open(env, options=StoreOptions(memtable_bytes=4 << 20, compression=0))
    for i in range(24):
        await store.batch([(b"%02d" % i, env.random.randbytes(1 << 20))])
    await store.compact()
    tracemalloc.start()
    try:
        assert [k for k, _ in store.iterate()] == [b"%02d" % i for i in range(24)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


async def test_a_merge_needs_little_disk_and_is_committed_in_steps():
    options = StoreOptions(memtable_bytes=60_000, table_bytes=40_000, compression=0, fanout=4)
    env = make_env()
    store = await Store.open(env, options=options)
    await load(store, 6000)
    before = store.statistics()["bytes"]
    used = []
    take = env.disk.take

    def watch(growth, name):
        used.append(env.disk.capacity - env.disk.usage()[1])
        take(growth, name)

    env.disk.take = watch
    await store.compact()
    assert max(used) < before * 1.4  # a copy of everything would be twice
    assert store.statistics()["runs"] == 1


# -------------------------------------------------------------------------------------- filters


def test_memory_is_divided_as_monkey_says():
    sizes = [1000, 4000, 16_000, 64_000]
    bits = allocate(sizes, 1e12)
    assert bits == sorted(bits, reverse=True)
    assert sum(n * b for n, b in zip(sizes, bits, strict=True)) == pytest.approx(
        bloom.BITS_PER_KEY * sum(sizes), rel=0.02
    )
    for small, large in pairwise(bits):
        assert small - large == pytest.approx(log(4) / log(2) ** 2, abs=0.2) or small == MAX_BITS

    def lookup_cost(bits):
        return sum(exp(-b * log(2) ** 2) for b in bits)

    assert lookup_cost(bits) < 0.6 * lookup_cost([bloom.BITS_PER_KEY] * 4)


def test_memory_of_filters_is_bounded():
    sizes = [1000, 4000, 16_000, 64_000]
    bits = allocate(sizes, 8 * sum(sizes))
    assert sum(n * b for n, b in zip(sizes, bits, strict=True)) <= 8.1 * sum(sizes)
    assert allocate(sizes, 1) == [MIN_BITS] * 4
    assert allocate([10], 1e12) == [pytest.approx(bloom.BITS_PER_KEY, abs=0.1)]
    assert allocate([0], 1e12)
    assert max(allocate([1, 10**9], 1e12)) == MAX_BITS


async def test_young_levels_have_more_bits_and_fewer_false_positives():
    options = StoreOptions(
        memtable_bytes=30_000, table_bytes=1 << 20, fanout=4, compression=0, cache_bytes=4000
    )
    store = await Store.open(make_env(), options=options)
    keys = await load(store, 8000, size=50)
    random = Random(5)
    for _ in range(6000):
        store.get(b"%012d" % random.randrange(10**12) + b"x")
    for key in random.sample(keys, 1000):
        assert store.get(key) is not None
    levels = store.lsm()["levels"]
    assert len(levels) >= 3
    bits = [level["filter_bits_per_key"] for level in levels]
    assert bits[0] > bits[-1] + 2
    assert bits[-1] > 8
    young, oldest = levels[0], levels[-1]
    assert oldest["filter_negatives"] > 4000
    assert oldest["filter_hits"] > 100
    assert 0 < oldest["filter_false_positive_rate"] < 0.03
    assert young["filter_false_positive_rate"] < oldest["filter_false_positive_rate"]


# ------------------------------------------------------------------------------------------ lsm


async def test_what_lsm_shows():
    env = make_env()
    store = await Store.open(env, options=SMALL)
    assert store.lsm()["levels"] == []
    keys = await load(store, 1000, size=100)
    await store.batch([(k, None) for k in keys[:40]])
    lsm = store.lsm()
    assert unpack(pack(lsm))["merges"] == lsm["merges"] > 0
    s = store.statistics()
    for name in ("runs", "tables", "bytes", "entries", "tombstones"):
        assert sum(level[name] for level in lsm["levels"]) == s[name], name
    files = [n for n in env.disk.listdir("lsm") if n.endswith(".sst")]
    assert s["bytes"] == sum(env.disk.open(f"lsm/{n}").size() for n in files)
    assert 1 < lsm["write_amplification"] < 10
    assert 1 <= lsm["space_amplification"] < 4
    logs = [n for n in env.disk.listdir("lsm") if n.endswith(".wal")]
    assert lsm["log"]["segments"] == len(logs)
    assert 0 < lsm["log"]["bytes"] < sum(env.disk.open(f"lsm/{n}").size() for n in logs)
    assert lsm["log"]["unsynced_bytes"] == 0
    await store.batch([(b"k", b"v")], sync=False)
    assert store.lsm()["log"]["unsynced_bytes"] > 0
    assert (lsm["quarantined"], lsm["lost"], lsm["pending_merge"]) == ([], [], 0)
    for key in keys[40:60] * 3:
        store.get(key)
    assert store.lsm()["cache_hit_rate"] > 0.5

    name = min(files)
    env.disk.flip(f"lsm/{name}", 700)
    await store.verify()
    store = await Store.open(env, options=SMALL)
    list(store.iterate(skip_lost=True))
    lsm = store.lsm()
    assert lsm["quarantined"] == [name]
    assert [table for _, _, table in lsm["lost"]] == [name]
    assert unpack(pack(lsm))["lost"] == tuple(map(tuple, lsm["lost"]))


async def test_data_in_key_order_is_not_rewritten_again_and_again():
    """Runs that do not overlap are joined, so a sequential load costs two writes of a byte."""
    store = await Store.open(make_env(), options=SMALL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        for i in range(6000):
            await store.batch([(b"%08d" % i, b"%08d" % i * 10)], sync=False)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    lsm = store.lsm()
    assert sum(level["runs"] for level in lsm["levels"]) < 2 * SMALL.fanout
    assert lsm["write_amplification"] < 3.5
    assert len(list(store.iterate())) == 6000
