"""Removed ranges of an overlay: disjoint, newest first to count, forgotten in order."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.volume import items
from dfs.volume.overlay import Overlay

GROUP = items.group(5, items.EXTENT)


def key(offset):
    return items.extent_key(5, offset)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=25), st.integers(0, 26))
@settings(max_examples=300, deadline=None)
def test_ranges_hide_until_the_base_covers_them(spans, covered):
    overlay = Overlay(lambda key: b"base")
    newest = {}
    for seq, (start, end) in enumerate(spans, 1):
        overlay.seq = seq
        overlay.delete_range(key(start), key(end))
        newest.update(dict.fromkeys(range(start, end), seq))
    for cut in (0, covered):
        overlay.drop(cut)
        ranges = overlay.ranges.get(GROUP, [])
        for left, right in pairwise(ranges):
            assert left[0] < left[1] <= right[0] < right[1]
        for offset in range(31):
            hidden = newest.get(offset, 0) > cut
            assert overlay.hides(key(offset)) == hidden
            assert overlay.get(key(offset)) == (None if hidden else b"base")


def test_an_item_put_after_a_range_survives_it():
    overlay = Overlay(lambda key: b"base", 1)
    overlay.put(key(1), b"old")
    overlay.seq = 2
    overlay.delete_range(key(0), key(10))
    assert overlay.get(key(1)) is None
    overlay.seq = 3
    overlay.put(key(2), b"new")
    assert [overlay.get(key(i)) for i in (1, 2, 3, 10)] == [None, b"new", None, b"base"]
    overlay.drop(2)
    assert [overlay.get(key(i)) for i in (1, 2, 3, 10)] == [b"base", b"new", b"base", b"base"]
    assert len(overlay) == 1


def test_the_index_finds_changed_keys_of_a_group_in_order():
    overlay = Overlay(lambda key: None)
    for i in (5, 3, 9, 1, 7):
        overlay.put(key(i), b"v")
    overlay.put(items.inode_key(5), b"i")
    overlay.put(items.extent_key(6, 0), b"other")
    end = items.group_end(GROUP)
    assert overlay.keys(GROUP, end) == [key(i) for i in (1, 3, 5, 7, 9)]
    overlay.put(key(4), b"v")
    assert overlay.keys(key(2), key(5)) == [key(3), key(4)]
    inode = items.group(5, items.INODE)
    assert overlay.keys(inode, items.group_end(inode)) == [inode]
    assert overlay.keys(items.group(7, items.INODE), items.group(7, items.ENTRY)) == []
    assert overlay.keys(b"", None) == sorted(overlay.items)
