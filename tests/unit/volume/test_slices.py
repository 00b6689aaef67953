"""A fold in slices is the fold of all at once, and stores no node that the tree does not need."""

from random import Random

import pytest

from dfs.volume import tree
from dfs.volume.effects import DELETE, DELETE_RANGE, PATCH, PUT, SET
from dfs.volume.fold import fold
from dfs.volume.items import (
    EXTENT,
    F_SIZE,
    REG,
    Inode,
    encode_inline,
    extent_key,
    group,
    group_end,
    inode_key,
)
from dfs.volume.nodecache import NodeCache
from dfs.volume.slices import settle, slices

SALT = b"salt of a volume"
TARGET = 256  # bytes of a node: many nodes from few items


def effect(r):
    ino = r.randrange(1, 300)
    x = r.random()
    if x < 0.4:
        return (PUT, inode_key(ino), Inode(REG, 0o644, size=r.randrange(1 << 30)).encode())
    if x < 0.6:
        return (PUT, extent_key(ino, r.randrange(9)), encode_inline(bytes(r.randrange(1, 90))))
    if x < 0.7:
        return (PATCH, inode_key(ino), ((F_SIZE, SET, r.randrange(1 << 30)),))
    if x < 0.9:
        return (DELETE, inode_key(ino))
    return (DELETE_RANGE, group(ino, EXTENT), group_end(group(ino, EXTENT)))


def apart(cache, root, wanted, size, settle=settle):
    """The root of a fold in slices, and the nodes that it would store."""
    held, stored, most = {}, {}, 0
    for part, beyond in slices(wanted, size):
        root, nodes = fold(cache.get, root, SALT, part, TARGET)
        cache.add(nodes)
        held.update(nodes)
        final, held = settle(held, root, beyond)
        stored.update(final)
        most = max(most, len(held))
    assert held == {}
    return root, stored, most


def run(seed, size, settle=settle):
    """Whether nothing was stored that the tree does not need, after a random history."""
    r, cache, root, tidy = Random(seed), NodeCache(), b"", True
    for _ in range(4):
        wanted = [effect(r) for _ in range(r.randrange(1, 600))]
        old = {name for name, _ in tree.reachable(cache.get, root, set())}
        whole, _ = fold(cache.get, root, SALT, wanted, TARGET)
        root, stored, most = apart(cache, root, wanted, size, settle)
        assert root == whole
        needed = {name for name, _ in tree.reachable(cache.get, root, set())}
        assert needed - old <= set(stored), "a node is missing"
        tidy &= set(stored) <= needed
        assert most < 40
    return tidy


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_slices_make_the_same_tree_and_no_garbage(size):
    assert all(run(seed, size) for seed in range(3))


def settled_too_early(held, root, beyond):
    return settle(held, root, beyond + b"\xff" if beyond else b"")


def everything_is_final(held, root, beyond):
    return settle(held, root, b"")


def the_last_of_a_level_is_final(held, root, beyond):
    final, kept = settle(held, root, beyond)
    early = {n: d for n, d in kept.items() if tree.decode(d).keys[-1] < beyond}
    return final | early, {n: d for n, d in kept.items() if n not in early}


def nothing_is_dropped(held, root, beyond):
    final, kept = settle(held, root, beyond)
    return {**held, **final}, kept


@pytest.mark.parametrize(
    "broken",
    [
        settled_too_early,
        everything_is_final,
        the_last_of_a_level_is_final,
        nothing_is_dropped,
    ],
)
def test_what_is_settled_wrongly_is_found(broken):
    assert not all(run(seed, 7, broken) for seed in range(6))


def test_what_belongs_together_stays_together_in_order():
    a, b = inode_key(1), inode_key(2)
    span = (DELETE_RANGE, group(3, EXTENT), group_end(group(3, EXTENT)))
    wanted = [
        (PUT, b, b"1"),
        (PUT, extent_key(3, 9), b"early"),
        (DELETE, a),
        (DELETE, b),
        span,
        (PUT, a, b"2"),
        (PUT, extent_key(3, 5), b"late"),
    ]
    found = list(slices(wanted, 1))
    assert found == [
        ([(DELETE, a), (PUT, a, b"2")], b),
        ([(PUT, b, b"1"), (DELETE, b)], group(3, EXTENT)),
        ([(PUT, extent_key(3, 9), b"early"), span, (PUT, extent_key(3, 5), b"late")], b""),
    ]
    assert list(slices([])) == []


def test_a_large_directory_is_cut():
    wanted = [(PUT, inode_key(n), b"x") for n in range(100)]
    assert [len(part) for part, _ in slices(wanted, 30)] == [30, 30, 30, 10]
