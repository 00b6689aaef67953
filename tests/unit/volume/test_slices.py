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


def apart(cache, root, wanted, size, settle=settle, share=50_000):
    """The root of a fold in slices, and the nodes that it would store."""
    held, stored, most = {}, {}, 0
    for part, beyond in slices(wanted, size, share):
        root, nodes = fold(cache.get, root, SALT, part, TARGET)
        cache.add(nodes)
        held.update(nodes)
        final, held = settle(held, root, beyond)
        stored.update(final)
        most = max(most, len(held))
    assert held == {}
    return root, stored, most


def run(seed, size, settle=settle, part=50_000):
    """Whether nothing was stored that the tree does not need, after a random history."""
    r, cache, root, tidy = Random(seed), NodeCache(), b"", True
    for _ in range(4):
        wanted = [effect(r) for _ in range(r.randrange(1, 600))]
        old = {name for name, _ in tree.reachable(cache.get, root, set())}
        whole, _ = fold(cache.get, root, SALT, wanted, TARGET)
        root, stored, most = apart(cache, root, wanted, size, settle, part)
        assert root == whole
        needed = {name for name, _ in tree.reachable(cache.get, root, set())}
        assert needed - old <= set(stored), "a node is missing"
        tidy &= set(stored) <= needed
        assert most < 40
    return tidy


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_slices_make_the_same_tree_and_no_garbage(size):
    assert all(run(seed, size) for seed in range(3))


@pytest.mark.parametrize("part", [1, 70, 200])
def test_parts_that_are_read_one_after_the_other_make_the_same_tree(part, monkeypatch):
    monkeypatch.setattr("dfs.volume.slices.STEP", 3)
    assert all(run(seed, 20, part=part) for seed in range(3))


class Counted:
    """Effects that can be read several times, and how many were held at a time."""

    def __init__(self, wanted, times=1 << 30):
        self.wanted, self.times, self.read = wanted, times, 0

    def __iter__(self):
        self.read += 1
        return iter(self.wanted if self.read <= self.times else ())


def test_samples_that_keep_step_with_the_effects_are_found(monkeypatch):
    monkeypatch.setattr("dfs.volume.slices.STEP", 60)  # a mutant: inodes only
    with pytest.raises(AssertionError):
        test_of_many_effects_a_part_is_held_at_a_time()


def test_of_many_effects_a_part_is_held_at_a_time():
    r = Random(1)
    wanted = []
    for n in range(3000):  # as when files are made: a name anywhere, an inode after the last one
        wanted.append((PUT, extent_key(1, r.randrange(1 << 60)), b""))
        wanted.append((PUT, inode_key(1000 + n), b""))
    source = Counted(wanted)
    found = list(slices(source, 100_000, 1000))  # so a slice is a part
    assert source.read == 7  # to count, and for each of six parts
    assert [e for part, _ in found for e in part] == sorted(wanted, key=lambda e: e[1])
    assert all(500 < len(part) < 1500 for part, _ in found)
    assert all(part[-1][1] < beyond for part, beyond in found[:-1])
    assert found[-1][1] == b""
    with pytest.raises(ValueError, match="not there any more"):
        list(slices(Counted(wanted, 3), 100, 1000))


def test_a_group_with_a_removed_range_is_in_one_part(monkeypatch):
    monkeypatch.setattr("dfs.volume.slices.STEP", 1)
    span = (DELETE_RANGE, group(3, EXTENT), group_end(group(3, EXTENT)))
    several = [(PUT, extent_key(3, n), b"") for n in range(40)]
    wanted = [(PUT, inode_key(2), b""), *several, span, *several, (DELETE, inode_key(4))]
    found = [part for part, _ in slices(wanted, 1, 10)]
    assert found == [[wanted[0]], [*several, span, *several], [wanted[-1]]]


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
