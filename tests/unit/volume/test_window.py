"""The conflict window and the cache of nodes: bounds, and what they forget."""

import pytest

from dfs.errors import Corrupt
from dfs.volume import effects as fx
from dfs.volume import items, tree
from dfs.volume.effects import writes
from dfs.volume.node import Missing
from dfs.volume.nodecache import NodeCache
from dfs.volume.window import Window

A, B = items.entry_key(1, 10), items.entry_key(1, 20)
DIR = items.group(1, items.ENTRY)
INODE = items.inode_key(1)
EXTENT, EXTENTS = items.extent_key(1, 0), items.group(1, items.EXTENT)


def test_writes_counts_what_readers_must_hear_of():
    assert writes([(fx.PUT, A, b""), (fx.DELETE, B), (fx.PUT, A, b"")]) == ([A, B], [DIR])
    quiet = (fx.PATCH, INODE, ((1, fx.ADD, 1), (2, fx.LAST, 5)))
    assert writes([quiet]) == ([], [])
    assert writes([(fx.PATCH, INODE, ((1, fx.ADD, 1), (2, fx.SET, 5)))]) == ([INODE], [INODE])
    assert writes([(fx.DELETE_RANGE, EXTENT, items.group_end(EXTENTS))]) == ([], [EXTENTS])


def test_window_answers_for_keys_groups_and_ranges():
    w = Window(10)
    w.record(11, [(fx.PUT, A, b"")])
    w.record(12, [(fx.DELETE_RANGE, EXTENTS, items.group_end(EXTENTS))])
    assert w.changed_since(10, [A])
    assert not w.changed_since(11, [A])
    assert not w.changed_since(10, [B])
    assert w.changed_since(10, [], [DIR])
    assert not w.changed_since(11, [], [DIR])
    assert w.changed_since(11, [EXTENT])
    assert w.changed_since(11, [], [EXTENTS])
    assert not w.changed_since(12, [EXTENT, A, B], [EXTENTS, DIR])
    assert w.changed_since(9, [], [])  # nobody knows


def test_an_item_without_a_suffix_is_its_group_and_takes_one_place():
    w = Window(0)
    for seq in (1, 2, 5):
        w.record(seq, [(fx.PUT, INODE, b""), (fx.PUT, A, b"")])
        assert len(w) == 3  # the inode, the entry, the directory's entries
        for wanted in (([INODE], []), ([], [INODE]), ([], [DIR])):
            assert w.changed_since(seq - 1, *wanted)
            assert not w.changed_since(seq, *wanted)
    w.record(7, [(fx.DELETE_RANGE, INODE, items.group_end(INODE))])
    assert w.changed_since(6, [], [INODE])
    w.record(8, [(fx.PUT, INODE, b"")])
    w.forget(7)
    assert w.changed_since(7, [], [INODE])
    assert len(w) == 1


def test_two_creations_in_a_directory_do_not_conflict():
    touch = (fx.PATCH, INODE, ((items.F_MTIME, fx.LAST, 5), (items.F_NLINK, fx.ADD, 1)))
    w = Window(0)
    w.record(1, [(fx.PUT, A, b""), touch])
    assert not w.changed_since(0, [B, INODE])


def test_window_forgets_the_oldest_and_then_knows_nothing_of_them():
    w = Window(0, limit=100)
    for seq in range(1, 1000):
        w.record(seq, [(fx.PUT, items.inode_key(seq), b"")])
        assert len(w) <= 100
        for back in (1, 10, 60, 200):
            base = max(0, seq - back)
            assert w.changed_since(base, [items.inode_key(seq)])
            if base >= w.floor:
                assert not w.changed_since(base, [items.inode_key(base)])
            else:
                assert w.changed_since(base, [])
    assert 900 < w.floor < 999


def test_rewriting_one_key_keeps_the_window_small():
    w = Window(0, limit=10)
    for seq in range(1, 1000):
        w.record(seq, [(fx.PUT, A, b"")])
    assert w.floor == 0
    assert w.changed_since(998, [A])
    w.forget(999)
    assert len(w) == 0
    assert w.changed_since(998, [])
    assert not w.changed_since(999, [A])


def nodes(count):
    content = [(b"%06d" % i, b"v" * 50) for i in range(count)]
    return tree.build(content, b"s")


def test_cache_keeps_its_budget_and_the_nodes_used_last():
    root, blobs = nodes(20_000)
    cache = NodeCache(500_000, pack=False)
    cache.add({root: blobs[root]})
    for name, data in blobs.items():
        cache.get(root)
        cache.add({name: data})
        assert cache.used <= cache.budget
        assert name in cache
    assert root in cache
    statistics = cache.statistics()
    assert statistics["nodes"] == len(cache) < len(blobs)
    assert statistics["nodes"] + statistics["evicted"] == len(blobs)
    assert cache.used == sum(cache.get(name).cost for name in blobs if name in cache)
    cache.clear()
    assert (len(cache), cache.used) == (0, 0)


def test_cache_says_what_is_missing_and_refuses_wrong_bytes():
    root, blobs = nodes(10)
    cache = NodeCache()
    with pytest.raises(Missing) as e:
        cache.get(root)
    assert e.value.hashes == (root,)
    assert root.hex()[:16] in str(e.value)
    with pytest.raises(Corrupt):
        cache.add({b"\0" * 32: blobs[root]})
    with pytest.raises(Corrupt):
        cache.add({tree.node_id(b"junk"): b"junk"})
    assert len(cache) == 0
    cache.add({root: blobs[root]})
    cache.add({root: blobs[root]})
    assert cache.used == cache.get(root).cost
