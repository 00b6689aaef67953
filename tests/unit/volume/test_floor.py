"""Items in places, and the last before them: what a scan finds, of a tree with changes on top."""

import random

import pytest

from dfs.volume import floor, items, tree
from dfs.volume.floor import Stretch, before, last_before
from dfs.volume.node import Missing
from dfs.volume.view import NodeCache, View

SALT = b"s" * 16
TARGET = 200  # bytes of a node: a few items
SPOTS = 60


def key_of(at, ino=5):
    return items.extent_key(ino, at)


def view_of(rng, *, removed=0.3, ranges=2):
    """A view whose tree and overlay both have something, and its items as a scan finds them."""
    in_tree = {key_of(at, ino): b"t%d" % at for ino in (4, 5, 6) for at in range(SPOTS)}
    in_tree = {key: value for key, value in in_tree.items() if rng.random() < 0.5}
    root, blobs = tree.build(sorted(in_tree.items()), SALT, TARGET)
    nodes = NodeCache()
    nodes.add(blobs)
    view = View(nodes, root, 1, SALT)
    overlay = view._overlay
    for _ in range(ranges):
        low, high = sorted(rng.choices(range(SPOTS), k=2))
        overlay.delete_range(key_of(low), key_of(high))
    for at in range(SPOTS):
        if rng.random() < 0.4:
            overlay.put(key_of(at), None if rng.random() < removed else b"o%d" % at)
    return view, blobs


def by_scan(view, low, key):
    found = list(view.scan(low, key))
    return found[-1] if found else None


def compare(seeds, **options):
    for seed in seeds:
        rng = random.Random(seed)
        view, _ = view_of(rng, **options)
        for _ in range(60):
            low, high = sorted(rng.choices(range(SPOTS + 1), k=2))
            assert last_before(view, key_of(low), key_of(high)) == by_scan(
                view, key_of(low), key_of(high)
            ), f"seed {seed}: {low} to {high}"


def test_it_is_what_a_scan_finds_last():
    compare(range(60))


def test_many_removed_items_are_passed_over(monkeypatch):
    monkeypatch.setattr(floor, "PATIENCE", 2)
    compare(range(40), removed=0.9, ranges=0)


def test_the_comparison_sees_removed_items_of_the_tree(monkeypatch):
    monkeypatch.setattr(floor, "_counts", lambda _view, _key: True)
    with pytest.raises(AssertionError, match="seed"):
        compare(range(60))


def test_of_a_tree_one_path_is_read():
    rng = random.Random(1)
    view, blobs = view_of(rng)
    levels = view.nodes.get(view.root).level + 1
    cold, rounds = NodeCache(), 0
    while True:
        try:
            found = before(cold.get, view.root, key_of(30))
            break
        except Missing as e:
            (wanted,) = e.hashes
            cold.add({wanted: blobs[wanted]})
            rounds += 1
    assert found == max(i for i in tree.scan(view.nodes.get, view.root, b"", key_of(30)))
    assert levels <= rounds < 2 * levels
    assert before(cold.get, b"", key_of(1)) is None


def compare_stretches(seeds, **options):
    for seed in seeds:
        rng = random.Random(seed)
        view, _ = view_of(rng, **options)
        for _ in range(20):
            low, high = sorted(rng.choices(range(SPOTS + 1), k=2))
            whole = list(view.scan(key_of(low), key_of(high)))
            count = rng.randrange(1, 6)
            edges = [key_of(at) for at in sorted(rng.choices(range(low, high + 1), k=2 * count))]
            ranges = list(zip(edges[::2], edges[1::2], strict=True))
            wanted = {item for a, b in ranges for item in whole if a <= item[0] < b}
            for start, _ in ranges:
                wanted.update([item for item in whole if item[0] < start][-1:])
            stretch = Stretch(view, key_of(low), key_of(high))
            assert stretch.near(ranges) == sorted(wanted), f"seed {seed}: {low} to {high}"
            items, each = stretch.sample()
            assert (sorted(items), each) == (whole, 1), f"seed {seed}: {low} to {high}"


def test_a_stretch_is_what_a_scan_finds():
    compare_stretches(range(100))
    compare_stretches(range(40), removed=0.9, ranges=0)


def test_keys_far_from_each_other_are_found(monkeypatch):
    monkeypatch.setattr(floor, "AT_HAND", 2)
    compare_stretches(range(40))


def looks_at_the_last_range(self, ranges, _near=Stretch.near):
    return _near(self, [(low, low) for low, _ in ranges] + ranges[-1:])


def forgets_what_is_before(self, ranges):
    return [item for a, b in ranges for item in self.sample()[0] if a <= item[0] < b]


@pytest.mark.parametrize("mutant", [looks_at_the_last_range, forgets_what_is_before])
def test_the_comparison_of_stretches_can_fail(monkeypatch, mutant):
    monkeypatch.setattr(Stretch, "near", mutant)
    with pytest.raises(AssertionError, match="seed"):
        compare_stretches(range(20))


def test_of_many_items_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(floor, "SAMPLE", 10)
    for seed in range(30):
        view, _ = view_of(random.Random(seed), removed=0, ranges=0)
        whole = dict(view.scan(key_of(0), key_of(SPOTS)))
        sample, each = Stretch(view, key_of(0), key_of(SPOTS)).sample()
        assert each > 1
        assert len(sample) <= floor.SAMPLE + 1
        assert dict(sample).items() <= whole.items()
        assert len(whole) / 2 < each * len(sample) < 2 * len(whole)
