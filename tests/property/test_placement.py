"""Laws of placement: pure, distinct, spread, in proportion, and moving only what must move."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.cluster import placement
from dfs.cluster.placement import TOLERANCE, Candidate, Placer, achievable, balance, calibrate
from dfs.hashing import PARTITIONS, digest

PROBES = range(0, PARTITIONS, 61)  # enough partitions for laws that hold for each of them


def node(i, zone, rack="r", host=None, weight=1.0):
    return Candidate(digest(b"node %d" % i)[:16], zone, rack, host or f"h{i}", weight)


def cluster(count, zones, weight=1.0):
    return [node(i, f"z{i % zones}", f"r{i % (2 * zones)}", weight=weight) for i in range(count)]


domains = st.builds(
    lambda i, z, r, h, w: node(i, f"z{z}", f"r{r}", f"h{h}", w),
    st.integers(0, 1 << 20),
    st.integers(0, 4),
    st.integers(0, 2),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, 1.0, 4.0]),
)
clusters = st.lists(domains, min_size=1, max_size=9, unique_by=lambda c: c.node_id)


def ids(nodes, row):
    return [nodes[i].node_id for i in row]


@settings(max_examples=25, deadline=None)
@given(clusters, st.randoms(use_true_random=False), st.integers(1, 5))
def test_the_order_of_the_candidates_changes_nothing(nodes, random, count):
    other = random.sample(nodes, len(nodes))
    a, b = Placer(nodes), Placer(other)
    for p in PROBES:
        assert ids(nodes, a.place(p, count)) == ids(other, b.place(p, count))


@settings(max_examples=25, deadline=None)
@given(clusters, st.integers(1, 5))
def test_distinct_spread_and_never_weight_zero(nodes, count):
    live = [c for c in nodes if c.weight > 0]
    placer = Placer(nodes)
    for p in PROBES:
        row = [nodes[i] for i in placer.place(p, count)]
        assert len({c.node_id for c in row}) == len(row) == min(count, len(live))
        assert all(c.weight > 0 for c in row)
        zones = Counter(c.zone for c in row)
        for zone in {c.zone for c in live}:
            # one more in some zone than in another only if that other one has no more nodes
            full = zones[zone] == sum(c.zone == zone for c in live)
            assert full or max(zones.values(), default=0) <= zones[zone] + 1


@settings(max_examples=25, deadline=None)
@given(clusters)
def test_a_longer_list_starts_with_the_shorter_one(nodes):
    placer = Placer(nodes)
    for p in PROBES:
        whole = placer.place(p, len(nodes))
        assert sorted(whole) == [i for i, c in enumerate(nodes) if c.weight > 0]
        assert placer.place(p, 3) == whole[:3]
        assert placer.place(p, len(nodes), whole[:2]) == whole


def test_balance_of_twelve_equal_nodes():
    nodes = cluster(12, 3)
    found = balance(nodes, Placer(nodes).table(3))
    assert max(map(abs, found.deviation.values())) < 0.08
    assert found.shared_zone == found.shared_rack == found.shared_host == 0


def test_weights_are_shares():
    nodes = [node(i, f"z{i % 4}", weight=2.0 if i < 8 else 1.0) for i in range(16)]
    found = balance(nodes, Placer(nodes).table(3))
    assert max(map(abs, found.deviation.values())) < 0.12


@pytest.mark.parametrize(("count", "zones"), [(12, 3), (15, 5), (10, 1), (10, 2)])
def test_a_node_that_comes_or_goes_moves_little(count, zones):
    nodes = cluster(count, zones)
    before = Placer(nodes).table(3)
    added = [*nodes, node(99, "z0", "r0")]
    in_zone = len([c for c in added if c.zone == "z0"])
    # every zone holds 3 / zones of the replicas; in its zone the new node takes an equal share
    share = 1 / len(added) if zones in (1, 5) else 1 / zones / in_zone
    assert_moves(nodes, before, added, share)
    removed = nodes[:4] + nodes[5:]
    gone = Counter(i for row in before for i in row)[4] / (PARTITIONS * 3)
    assert_moves(nodes, before, removed, gone)


def assert_moves(nodes, before, other, ideal):
    after = Placer(other).table(3)
    moved = [
        len(set(ids(other, b)) - set(ids(nodes, a))) for a, b in zip(before, after, strict=True)
    ]
    assert max(moved) == 1
    assert sum(moved) / (PARTITIONS * 3) <= 1.15 * ideal


def test_the_law_of_movement_catches_a_hash_without_stable_draws(monkeypatch):
    """A mutant: draws that depend on how many nodes there are move nearly everything."""
    nodes = cluster(12, 3)
    before = Placer(nodes).table(3)
    draws = placement.draws
    monkeypatch.setattr(placement, "draws", lambda node_id: draws(node_id + b"13"))
    with pytest.raises(AssertionError):
        assert_moves(nodes, before, [*nodes, node(99, "z0")], 1 / 15)


def test_a_zone_that_dies_leaves_the_other_replicas_where_they_are():
    nodes = cluster(12, 4)
    before = Placer(nodes).table(3)
    left = [c for c in nodes if c.zone != "z1"]
    after = Placer(left).table(3)
    for a, b in zip(before, after, strict=True):
        kept = [i for i in ids(nodes, a) if i in {c.node_id for c in left}]
        assert set(kept) <= set(ids(left, b))


# ---------------------------------------------------------------------------------- calibration


def uneven():
    return [node(0, "z0", weight=5.0)] + [node(i, f"z{i}") for i in range(1, 10)]


def worst(nodes, table):
    counts = Counter(i for row in table for i in row)
    shares = achievable(nodes, len(table[0]))
    return max(abs(counts[i] / (share * PARTITIONS) - 1) for i, share in enumerate(shares))


@settings(max_examples=100, deadline=None)
@given(clusters, st.integers(1, 5))
def test_achievable_shares_add_up_and_nobody_gets_more_than_its_turn(nodes, count):
    live = [c for c in nodes if c.weight > 0]
    if not live:
        return
    shares = achievable(live, count)
    assert sum(shares) == pytest.approx(min(count, len(live)))
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
    zones = Counter()
    for c, share in zip(live, shares, strict=True):
        zones[c.zone] += share
    if len(zones) >= count:
        assert all(share <= 1 + 1e-9 for share in zones.values())


def test_achievable_shares_by_hand():
    assert achievable(uneven(), 2) == pytest.approx([10 / 14] + [2 / 14] * 9)
    # a zone of one node holds a copy of everything if there are as many zones as copies
    zones = [node(0, "a"), node(1, "b"), node(2, "b", weight=3.0), node(3, "c"), node(4, "c")]
    assert achievable(zones, 3) == pytest.approx([1, 0.25, 0.75, 0.5, 0.5])
    # a node that weighs too much holds a copy of everything, the others share the rest
    heavy = [node(0, "a", weight=9.0), node(1, "a"), node(2, "a"), node(3, "a")]
    assert achievable(heavy, 2) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


def test_uneven_weights_are_calibrated():
    nodes = uneven()
    assert worst(nodes, Placer(nodes).table(2)) > 0.12
    table, weights = calibrate(nodes, 2, [c.weight for c in nodes])
    assert worst(nodes, table) < 0.02
    assert (table, weights) == calibrate(nodes, 2, [c.weight for c in nodes])
    # what was found stands: it is where the next change starts from
    assert calibrate(nodes, 2, weights) == (table, weights)


def test_even_weights_are_left_alone():
    nodes = cluster(12, 3)
    table, weights = calibrate(nodes, 3, [1.0] * 12)
    assert weights == [1.0] * 12
    assert table == Placer(nodes).table(3)
    assert worst(nodes, table) <= TOLERANCE


def test_calibrated_weights_do_not_depend_on_the_order_of_the_candidates():
    nodes = uneven()
    table, weights = calibrate(nodes, 2, [c.weight for c in nodes])
    back = nodes[::-1]
    other, others = calibrate(back, 2, [c.weight for c in back])
    assert others[::-1] == pytest.approx(weights)
    assert [ids(back, row) for row in other] == [ids(nodes, row) for row in table]


def test_a_node_added_to_calibrated_ones_moves_little():
    nodes = uneven()
    table, weights = calibrate(nodes, 2, [c.weight for c in nodes])
    more = [*nodes, node(99, "z99")]
    after, _ = calibrate(more, 2, [*weights, 1.0])
    moved = sum(len(set(b) - set(a)) for a, b in zip(table, after, strict=True))
    assert moved / (PARTITIONS * 2) <= 1.3 / 15
    assert worst(more, after) <= TOLERANCE
