"""The cache of tree nodes keeps to its budget however nodes come, and drops those used longest ago."""

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
    cache = NodeCache(BUDGET)
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
