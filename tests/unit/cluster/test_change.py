from collections import Counter
from dataclasses import astuple, replace

import pytest

from dfs import codec
from dfs.cluster.change import (
    Add,
    Drain,
    NewNode,
    Remove,
    Replace,
    SetWeight,
    Undrain,
    apply_edits,
    describe,
    edit_fields,
    edit_from_fields,
    plan,
)
from dfs.cluster.edits import replacement_weights
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap
from dfs.errors import ConfigError, RemoteProtocolError
from dfs.hashing import PARTITIONS
from dfs.testing.joint_cores import member


def spread_out(i, **changes):
    fields = {
        "zone": f"z{i % 3}",
        "metadata_addr": f"tcp://10.0.0.{i}:7000",
        "chunk_addr": f"tcp://10.0.0.{i}:7001",
        **changes,
    }
    return replace(member(i), **fields)


def new(i, **changes):
    return NewNode(*astuple(spread_out(i, **changes))[1:])


MAP = ClusterMap.create(bytes(16), map(spread_out, range(1, 7)))
EDITS = [
    Add(new(7)),
    Drain("node1"),
    Undrain("node1"),
    Undrain("node1", 2.0),
    Remove("node2"),
    Replace("node3", new(8)),
    SetWeight("node4", CHUNK, 2.5),
]


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_codec_tuples(edit):
    assert edit_from_fields(codec.unpack(codec.pack(edit_fields(edit)))) == edit
    assert "node" in describe(edit)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        (),
        ("add",),
        ("add", (1, 2)),
        ("add", (*astuple(new(7))[:-1], "1.0")),
        ("drain",),
        ("drain", 5),
        ("undrain", "a", 1),
        ("weight", "a", 1.0),
        ("explode", "a"),
        (Drain, "a"),
    ],
)
def test_malformed_edits_are_refused(fields):
    with pytest.raises(RemoteProtocolError):
        edit_from_fields(fields)


def end(m):
    """The map when the transition is over."""
    while m.transition is not None:
        m = m.step(METADATA if m.phase(METADATA) else CHUNK)
    return m


def numbers(m):
    return [node.number for node in m.nodes]


def homes(m):
    return {x for role in ROLES for p in range(PARTITIONS) for x in m.homes(role, p)}


def test_add():
    m = apply_edits(MAP, [Add(new(7)), Add(new(8))])
    assert numbers(m) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert m.node(7).name == "node7"
    assert m.phase(METADATA) == 1
    assert homes(end(m)) == set(range(1, 9))


def test_drain_and_undrain():
    drained = apply_edits(MAP, [Drain("node2")])
    assert 2 not in homes(drained)
    done = end(drained)
    assert done.node(2).name == "node2"
    again = apply_edits(done, [Undrain("node2")])
    assert again.node(2).chunk_weight == 1.0
    assert end(again).tables == MAP.tables
    heavy = apply_edits(done, [SetWeight("node1", CHUNK, 4.0), Undrain("node2")])
    assert heavy.node(2).chunk_weight == pytest.approx(8 / 5)
    assert apply_edits(done, [Undrain("node2", 3.0)]).node(2).metadata_weight == 3.0


def test_remove_bans_for_ever():
    m = apply_edits(MAP, [Remove("node2")])
    assert m.transition.leaving == (2,)
    assert 2 not in homes(m)
    done = end(m)
    assert numbers(done) == [1, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="banned for ever"):
        apply_edits(done, [Add(new(2))])
    assert apply_edits(done, [Add(new(9))]).node(7).name == "node9"


def test_replace_is_one_move():
    m = apply_edits(MAP, [Replace("node2", new(7, zone="z2"))])
    assert m.transition.leaving == (2,)
    for role in ROLES:
        for p in m.changed(role):
            lost = set(m.old_homes(role, p)) - set(m.homes(role, p))
            assert len(lost) == 1
    assert m.address(METADATA, 2) == "tcp://10.0.0.2:7000"


def test_a_replacement_may_take_name_and_addresses():
    """A machine with a new disk: nobody must take the new process for the old node."""
    old = spread_out(2)
    fresh = new(7, name="node2", metadata_addr=old.metadata_addr, chunk_addr=old.chunk_addr)
    m = apply_edits(MAP, [Replace("node2", fresh)])
    assert m.node(7).name == "node2"
    assert m.address(METADATA, 7) == old.metadata_addr
    assert m.address(METADATA, 2).startswith("unix:///dev/null/")
    assert m.node(2).name == "node2 (replaced 2)"
    assert ClusterMap.decode(m.encode()) == m
    assert [x.name for x in end(m).nodes].count("node2") == 1


def test_a_replacement_has_the_capacity_of_the_old_one():
    changed = {
        1: spread_out(1, metadata_weight=2.0, chunk_weight=4.0),
        2: spread_out(2, metadata_weight=0.0, chunk_weight=0.0),  # drained
        3: spread_out(3, metadata_weight=3.0, chunk_addr=""),
        4: spread_out(4, metadata_weight=0.0, chunk_weight=5.0),  # emptied in one role on purpose
    }
    nodes = [changed.get(i, spread_out(i)) for i in range(1, 7)]
    m = ClusterMap.create(bytes(16), nodes)
    usual = (7 / 4, 11 / 4)  # the means of those that have any
    assert replacement_weights(m, "node1") == (2.0, 4.0)
    assert replacement_weights(m, "node2") == usual
    assert replacement_weights(m, "node3") == (3.0, usual[1])
    assert replacement_weights(m, "node4") == (0.0, 5.0)
    assert replacement_weights(m, "nobody") == usual


def test_set_weight():
    m = apply_edits(MAP, [SetWeight("node1", CHUNK, 0.5)])
    assert (m.node(1).chunk_weight, m.node(1).metadata_weight) == (0.5, 1.0)
    assert (m.phase(METADATA), m.phase(CHUNK)) == (0, 2)


def test_edits_in_one_go():
    m = apply_edits(MAP, [Add(new(7)), Remove("node1"), SetWeight("node7", CHUNK, 2.0)])
    assert m.epoch == 2
    assert m.node(7).chunk_weight == 2.0


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([], "nothing to change"),
        ([Drain("nobody")], "no node nobody.*node1"),
        ([Add(new(7, name="node1"))], "already"),
        ([Add(new(7)), Add(new(7))], "already"),
        ([Drain("node1"), Drain("node1")], "drained already"),
        ([Undrain("node1")], "not drained"),
        ([Remove("node1"), Drain("node1")], "another change"),
        ([SetWeight("node1", "cook", 1.0)], "no role"),
        ([SetWeight("node1", CHUNK, -1.0)], "weights"),
        ([Add(new(7, chunk_addr="tcp://10.0.0.1:7001"))], "same address"),
        ([Remove(f"node{i}") for i in range(1, 5)], "add nodes"),
    ],
)
def test_edits_that_cannot_be(edits, message):
    with pytest.raises(ConfigError, match=message):
        apply_edits(MAP, edits)


# ----------------------------------------------------------------------------------------- plan


def test_a_plan_counts_what_moves():
    used = {(role, x): 2048 * 1000 for role in ROLES for x in range(1, 7)}
    found = plan(MAP, [Add(new(7))], used)
    assert found.map == apply_edits(MAP, [Add(new(7))])
    assert len(found.shares) == 14
    for share in found.shares:
        role, x = share.role, share.number
        assert share.before == sum(x in row for row in MAP.tables[ROLES.index(role)])
        assert share.after == sum(x in row for row in found.map.tables[ROLES.index(role)])
        if x == 7:
            assert share.before == 0
            assert share.receive == share.after > 0
            # all nodes hold about as many bytes per partition
            assert share.move_bytes == pytest.approx(share.receive * 1000, rel=0.05)
        else:
            assert share.after - share.before <= share.receive
    by_role = Counter()
    for share in found.shares:
        by_role[share.role] += share.receive
    for spread in found.spreads:
        assert spread.moved == by_role[spread.role] / (3 * PARTITIONS)
        assert spread.moved == pytest.approx(spread.ideal, rel=0.15)
        assert (spread.shared_zone, spread.shared_host) == (0, 0)


def test_a_plan_shows_who_goes_and_knows_when_it_knows_nothing():
    found = plan(MAP, [Remove("node2")], {})
    gone = [share for share in found.shares if share.number == 2]
    assert [(s.after, s.weight, s.deviation) for s in gone] == [(0, 0.0, 0.0)] * 2
    assert all(share.move_bytes == 0 for share in found.shares)


def test_no_warnings_for_a_sound_cluster():
    assert plan(MAP, [Add(new(7)), Add(new(8)), Add(new(9))], {}).warnings == ()


def warned(m, edits):
    return "\n".join(plan(m, edits, {}).warnings)


def test_uneven_zones():
    text = warned(MAP, [Drain("node1")])
    assert "zone z1: its metadata nodes get up to" in text
    assert "more than their weight" in text


def test_fewer_zones_than_copies():
    flat = ClusterMap.create(bytes(16), [spread_out(i, zone="z") for i in range(1, 5)])
    assert "3 chunk copies but 1 zone (z)" in warned(flat, [Drain("node1")])


def test_labels_that_lie():
    assert "same host" not in warned(MAP, [Drain("node1")])
    text = warned(MAP, [Add(new(7, host="h2"))])
    assert "nodes node2, node7 are on the same host h2" in text
    text = warned(MAP, [Add(new(7, zone="z0", metadata_addr="tcp://10.0.0.2:9000"))])
    assert "node2, node7 are on the same host 10.0.0.2" in text


def test_removal_of_a_quorum():
    assert "fewer than" not in warned(MAP, [Remove("node1")])
    text = warned(MAP, [Remove("node1"), Remove("node2")])
    assert "metadata partitions have fewer than 2 homes without node1, node2" in text
    assert "none at all" not in text
    nine = ClusterMap.create(bytes(16), map(spread_out, range(1, 10)))
    text = warned(nine, [Remove(f"node{i}") for i in (1, 2, 3)])
    assert "of them none at all" in text
