"""The cache of tree nodes keeps to its budget however nodes come; those used longest ago go first."""

import tracemalloc
from random import Random

import pytest

from dfs.errors import Corrupt
from dfs.volume.node import Missing, encode, node_id
from dfs.volume.nodecache import NodeCache

BUDGET = 200_000


def blobs(first, count):
    made = {}
    for n in range(first, first + count):
        keys = tuple(b"%06d/%02d" % (n, i) for i in range(50))
        data = encode(0, keys, (b"v" * 20,) * 50)
        made[node_id(data)] = data
    return made


def test_what_was_used_longest_ago_goes_first():
    cache = NodeCache(BUDGET, pack=False)
    first = blobs(0, 10)
    cache.add(first)
    for n in range(10):
        cache.add(blobs(10 * (n + 1), 10))
        for name in first:
            cache.get(name)
        assert cache.used <= BUDGET
    assert cache.evicted > 0
    assert cache.used == sum(cache.get(name).cost for name in list(cache._nodes))


def test_kept_nodes_that_are_looked_at_later_do_not_exceed_the_budget():
    cache = NodeCache(BUDGET)
    kept = blobs(0, 100)
    cache.keep(kept)
    assert cache.used <= BUDGET
    held = [name for name in kept if name in cache]
    assert len(held) > 80
    for name in held:
        try:
            assert cache.get(name).keys
        except Missing:  # decoding those before it drove it out
            continue
        assert name in cache
        assert cache.used <= BUDGET * 9 / 8
    assert len(cache) < len(held)


def test_the_last_node_stays_even_if_it_is_too_large():
    cache = NodeCache(1000)
    (name,) = one = blobs(0, 1)
    cache.keep(one)
    assert cache.get(name).cost > 1000
    assert cache.get(name).level == 0


def used(cache):
    """Bytes of all that is held, counted anew."""
    held = [n if isinstance(n, bytes) else n.cost - 200 for n in cache._nodes.values()]
    held += cache._packed.values()
    return sum((len(n) if isinstance(n, bytes) else n) + 200 for n in held)


def test_what_does_not_fit_decoded_is_kept_compressed_and_comes_back_equal():
    cache = NodeCache(BUDGET)
    made = blobs(0, 150)  # 23 fit decoded
    for name, data in made.items():
        cache.add({name: data})
        assert cache.used == used(cache) <= BUDGET
    assert len(cache) == 150
    assert cache.evicted == 0
    rnd = Random(1)
    for _ in range(3):
        for name in rnd.sample(list(made), len(made)):
            node = cache.get(name)
            assert encode(node.level, node.keys, node.values) == made[name]
            assert cache.used == used(cache) <= BUDGET
    statistics = cache.statistics()
    assert (statistics["nodes"], statistics["evicted"], statistics["misses"]) == (150, 0, 0)
    assert 300 < statistics["unpacked"] <= 450


def test_compressed_nodes_take_the_memory_that_is_counted():
    made = blobs(0, 150)
    tracemalloc.start()
    try:
        cache = NodeCache(BUDGET)
        cache.add(made)
        took = sum(
            trace.size
            for trace in tracemalloc.take_snapshot().traces
            if trace.traceback[0].filename.endswith("nodecache.py")
        )
    finally:
        tracemalloc.stop()
    assert len(cache) == 150
    assert took < 2 * cache.packed


def test_compressed_nodes_have_a_share_and_those_used_longest_ago_go_first():
    cache = NodeCache(BUDGET)
    first, others = blobs(0, 10), blobs(10, 1500)
    cache.add(first)
    for n, (name, data) in enumerate(others.items()):
        cache.add({name: data})
        if n % 50 == 0:
            for old in first:
                cache.get(old)
        assert cache.packed <= 3 * BUDGET // 8
        assert cache.used <= BUDGET
    assert cache.used == used(cache)
    assert all(name in cache for name in first)
    assert cache.evicted == 1510 - len(cache) > 0
    held = [name in cache for name in others]
    assert held == sorted(held), "one is held although one that came later is not"
    with pytest.raises(Missing):
        cache.get(next(iter(others)))
    cache.clear()
    assert (len(cache), cache.used, cache.packed) == (0, 0, 0)


def test_what_nobody_looked_at_is_not_compressed():
    cache = NodeCache(BUDGET)
    cache.keep(blobs(0, 200))
    assert (cache.packed, len(cache) + cache.evicted) == (0, 200)
    made = blobs(200, 100)
    cache.add(made)  # drives out what was kept
    cache.keep(made)
    assert cache.used == used(cache) <= BUDGET
    cache.drop_unseen()
    assert set(made) == {*cache._nodes, *cache._packed}


def test_wrong_bytes_are_refused():
    cache = NodeCache()
    with pytest.raises(Corrupt, match="hash to"):
        cache.add({b"x" * 32: b"not its content"})
    cache.keep({b"x" * 32: b"no node"})
    with pytest.raises(Corrupt):
        cache.get(b"x" * 32)
    with pytest.raises(Missing):
        cache.get(b"x" * 32)
    assert cache.used == 0
