"""The prolly tree against a dict: canonical whatever the history, complete in what it asks for."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.errors import Corrupt
from dfs.volume import tree
from dfs.volume.node import Missing, decode, encode, node_id
from dfs.volume.nodecache import NodeCache

GOLDEN = Path(__file__).parents[1] / "data" / "tree_nodes.txt"
TARGETS = st.sampled_from([24, 60, 150, 400, 8192])
SALTS = st.sampled_from([b"", b"a" * 16, b"b" * 16])
KEYS = st.one_of(
    st.binary(min_size=1, max_size=3),
    st.integers(0, 300).map(lambda n: b"key%06d" % n),
)
VALUES = st.one_of(st.just(b""), st.binary(max_size=6), st.integers(1, 90).map(lambda n: b"x" * n))
EDITS = st.dictionaries(KEYS, st.one_of(st.none(), VALUES), max_size=60)
LEFT = st.one_of(
    st.none(), st.none(), st.integers(0, 5)
)  # how many items a batch leaves; None: all
CONTENT = st.dictionaries(KEYS, VALUES, max_size=150)
HISTORIES = (CONTENT, st.lists(st.tuples(EDITS, LEFT), max_size=4), SALTS, TARGETS)


class Blobs(dict):
    """All nodes ever made; decoded on demand."""

    def node(self, name):
        return decode(self[name])


def built(content, salt, target):
    root, nodes = tree.build(sorted(content.items()), salt, target)
    return root, Blobs(nodes)


def reach(blobs, root):
    return {name for name, _ in tree.reachable(blobs.node, root, set())}


@given(*HISTORIES)
@settings(max_examples=200, deadline=None)
def test_incremental_equals_from_scratch(content, batches, salt, target):
    root, blobs = built(content, salt, target)
    content = dict(content)
    for batch, left in batches:
        if left is not None:
            batch = dict.fromkeys(sorted(content)[left:]) | batch
        before = reach(blobs, root)
        root, new = tree.apply(blobs.node, root, sorted(batch.items()), salt, target)
        assert all(node_id(data) == name for name, data in new.items())
        blobs.update(new)
        for key, value in batch.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        fresh, _ = built(content, salt, target)
        assert root == fresh
        assert tree.check(blobs.node, root, salt, target) == len(content)
        assert set(new) <= reach(blobs, root)
        assert reach(blobs, root) <= before | set(new)
        assert list(tree.scan(blobs.node, root)) == sorted(content.items())


@given(CONTENT, SALTS, TARGETS, st.data())
@settings(max_examples=100, deadline=None)
def test_deleting_boundaries_merges_nodes(content, salt, target, data):
    root, blobs = built(content, salt, target)
    ends = [n.keys[-1] for _, n in tree.reachable(blobs.node, root, set()) if n.level == 0]
    gone = data.draw(st.sets(st.sampled_from(ends), max_size=len(ends))) if ends else set()
    root, new = tree.apply(blobs.node, root, [(k, None) for k in sorted(gone)], salt, target)
    blobs.update(new)
    left = {k: v for k, v in content.items() if k not in gone}
    assert root == built(left, salt, target)[0]
    root, new = tree.apply(blobs.node, root, [(k, None) for k in sorted(left)], salt, target)
    assert (root, new) == (b"", {})


@given(CONTENT, KEYS, st.one_of(st.none(), KEYS), TARGETS)
@settings(max_examples=100, deadline=None)
def test_get_and_scan(content, start, end, target):
    root, blobs = built(content, b"s", target)
    for key in [*content, start]:
        assert tree.get(blobs.node, root, key) == content.get(key)
    want = [(k, v) for k, v in sorted(content.items()) if k >= start and (end is None or k < end)]
    assert list(tree.scan(blobs.node, root, start, end)) == want


@given(CONTENT, EDITS, st.one_of(st.none(), CONTENT), TARGETS)
@settings(max_examples=150, deadline=None)
def test_diff(content, edits, other, target):
    root, blobs = built(content, b"s", target)
    after = dict(other) if other is not None else {**content, **edits}
    after = {k: v for k, v in after.items() if v is not None}
    new_root, nodes = built(after, b"s", target)
    blobs.update(nodes)
    keys = sorted(set(content) | set(after))
    want = [(k, content.get(k), after.get(k)) for k in keys if content.get(k) != after.get(k)]
    assert tree.diff(blobs.node, root, new_root) == want


def fetching(blobs, call):
    """Run `call(cache)` from a cold cache, fetching what it misses: (result, round trips, nodes)."""
    cache = NodeCache()
    for rounds in range(10_000):
        try:
            return call(cache), rounds, len(cache)
        except Missing as e:
            wanted = e.hashes
        assert len(set(wanted)) == len(wanted) > 0
        assert not any(name in cache for name in wanted)
        cache.add({name: blobs[name] for name in wanted})
    raise AssertionError


@given(CONTENT, EDITS, SALTS, TARGETS)
@settings(max_examples=100, deadline=None)
def test_missing_nodes_are_asked_for(content, edits, salt, target):
    root, blobs = built(content, salt, target)
    edits = sorted(edits.items())
    want = tree.apply(blobs.node, root, edits, salt, target)
    assert fetching(blobs, lambda c: tree.apply(c.get, root, edits, salt, target))[0] == want
    items = sorted(content.items())
    assert fetching(blobs, lambda c: list(tree.scan(c.get, root)))[0] == items
    assert fetching(blobs, lambda c: list(tree.scan(c.get, root, ahead=1)))[0] == items
    blobs.update(want[1])
    changed = tree.diff(blobs.node, root, want[0])
    assert fetching(blobs, lambda c: tree.diff(c.get, root, want[0]))[0] == changed


def test_round_trips_follow_the_height():
    content = {b"key%06d" % i: b"v" * 20 for i in range(3000)}
    root, blobs = built(content, b"s", 600)
    height = blobs.node(root).level + 1
    assert height >= 3
    edits = [(k, b"w") for k in sorted(content)[::50]]
    _, rounds, _ = fetching(blobs, lambda c: tree.apply(c.get, root, edits, b"s", 600))
    assert rounds <= height + 2  # neighbours of nodes that lost their boundary
    _, rounds, _ = fetching(blobs, lambda c: list(tree.scan(c.get, root)))
    interior = sum(n.level > 0 for _, n in tree.reachable(blobs.node, root, set()))
    assert rounds <= interior + 1
    other, new = tree.apply(blobs.node, root, edits[:1], b"s", 600)
    blobs.update(new)
    _, rounds, nodes = fetching(blobs, lambda c: tree.diff(c.get, root, other))
    assert rounds <= height
    assert nodes <= 3 * height  # equal subtrees are not read
    _, rounds, _ = fetching(blobs, lambda c: tree.check(c.get, root, b"s", 600))
    assert rounds == height


def test_encoding_and_cutting_are_those_on_disk():
    """The golden file holds a root and all its nodes; a changed rule would orphan every volume."""
    lines = GOLDEN.read_text().split()
    root, blobs = lines[0], [bytes.fromhex(line) for line in lines[1:]]
    content = {b"key%06d" % i: b"v" * (i % 90) for i in range(120)}
    made, nodes = tree.build(sorted(content.items()), b"salt", 1024)
    assert made.hex() == root
    assert sorted(nodes.values()) == sorted(blobs)
    stored = Blobs({node_id(data): data for data in blobs})
    assert dict(tree.scan(stored.node, made)) == content


def test_nodes_are_about_as_long_as_the_target():
    content = {b"key%06d" % i: b"v" * (i % 200) for i in range(20_000)}
    _, nodes = tree.build(sorted(content.items()), b"s")
    leaves = [len(d) for d in nodes.values() if decode(d).level == 0]
    assert 7000 < sum(leaves) / len(leaves) < 9500
    assert len(nodes) - len(leaves) < len(leaves) / 50


def test_long_keys_do_not_make_the_tree_tall():
    """Interior items as long as the target would all be boundaries: the tree would never end."""
    content = {b"k" * 500 + b"%06d" % i: b"" for i in range(2000)}
    root, blobs = built(content, b"s", 100)
    assert blobs.node(root).level <= 9
    assert tree.check(blobs.node, root, b"s", 100) == 2000


def test_unreadable_nodes_are_refused():
    root, blobs = built({b"k%d" % i: b"v" for i in range(50)}, b"s", 60)
    for bad in (b"", b"\xc0", encode(0, [], []), encode(0, [b"a"], []), b"\x00" * 40):
        with pytest.raises(Corrupt):
            decode(bad)
    data = blobs[root].replace(b"dfst\x01", b"dfst\x02")
    with pytest.raises(Corrupt):
        decode(data)
    with pytest.raises(Corrupt):
        NodeCache().add({root: blobs[root] + b"x"})


def test_check_finds_a_tree_cut_by_another_rule():
    content = {b"key%06d" % i: b"v" * 20 for i in range(300)}
    root, blobs = built(content, b"s", 200)
    tree.check(blobs.node, root, b"s", 200)
    with pytest.raises(Corrupt):
        tree.check(blobs.node, root, b"t", 200)
    with pytest.raises(Corrupt):
        tree.check(blobs.node, root, b"s", 210)
