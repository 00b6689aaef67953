from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from struct import pack

import pytest

from dfs import codec
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap, Node, Params, Transition
from dfs.errors import ConfigError, Corrupt
from dfs.hashing import PARTITIONS, digest
from dfs.ids import NODE_BITS

GOLDEN = Path(__file__).parents[2] / "data" / "cluster-map-2.bin"
CLUSTER = digest(b"cluster")[:16]


def node(i, **changes):
    fields = {
        "number": i,
        "node_id": digest(b"%d" % i)[:16],
        "name": f"node{i}",
        "zone": f"z{i % 3}",
        "rack": "r",
        "host": f"h{i}",
        "metadata_addr": f"tcp://127.0.0.1:{7000 + 2 * i}",
        "chunk_addr": f"tcp://127.0.0.1:{7001 + 2 * i}",
    }
    return Node(**{**fields, **changes})


NODES = [node(i) for i in range(1, 6)]
MAP = ClusterMap.create(CLUSTER, NODES)
ONE = MAP.begin([*NODES[1:], node(6)], leaving=[1])
TWO = ONE.advance()
DONE = TWO.advance()
END = DONE.finish_chunks()
CHAIN = (MAP, ONE, TWO, DONE, END)
MOVED = ONE.changed(METADATA)[0]
SAME = next(p for p in range(PARTITIONS) if p not in set(ONE.changed(METADATA)))


def resealed(body, version=2):
    head = b"dfsmap" + pack(">H", version) + codec.pack(body)
    return head + digest(head)


def test_golden_file_of_format_2_is_still_read_and_written():
    data = GOLDEN.read_bytes()
    golden = ClusterMap.decode(data)
    assert golden.encode() == data
    assert golden == ONE
    assert data[6:8] == b"\0\2"
    assert golden.transition.leaving == (1,)
    assert golden.calibrated == ((), ())


def test_the_format_is_the_oldest_that_can_say_it():
    assert [m.encode()[7] for m in CHAIN] == [1, 2, 2, 2, 1]


def test_every_epoch_of_a_change_round_trips_and_is_chained():
    for before, after in pairwise(CHAIN):
        assert after.epoch == before.epoch + 1
        assert after.prev_hash == before.digest
        again = ClusterMap.decode(after.encode())
        assert again == after
        assert again.transition == after.transition
        assert len(set(before.voters) ^ set(after.voters)) <= 1


def test_phases():
    assert [m.phase(METADATA) for m in CHAIN] == [0, 1, 2, 0, 0]
    assert [m.phase(CHUNK) for m in CHAIN] == [0, 2, 2, 2, 0]


def test_sets_of_a_changed_partition():
    a, b = MAP.homes(METADATA, MOVED), ONE.homes(METADATA, MOVED)
    assert set(a) != set(b)
    assert b == END.homes(METADATA, MOVED)
    sets = [m.write_sets(METADATA, MOVED) for m in CHAIN]
    assert sets == [(a,), (a, b), (a, b), (b,), (b,)]
    assert [m.read_homes(METADATA, MOVED) for m in CHAIN] == [a, a, b, b, b]
    assert [m.old_homes(METADATA, MOVED) for m in CHAIN] == [(), a, a, (), ()]
    assert [m.last_change(METADATA, MOVED) for m in CHAIN] == [1, 2, 3, 4, 4]


def test_an_unchanged_partition_is_not_touched():
    row = MAP.homes(METADATA, SAME)
    for m in CHAIN:
        assert m.write_sets(METADATA, SAME) == (row,)
        assert m.read_homes(METADATA, SAME) == row
        assert m.old_homes(METADATA, SAME) == ()
        assert m.last_change(METADATA, SAME) == 1


def test_chunks_are_written_and_read_at_b_at_once():
    p = ONE.changed(CHUNK)[0]
    b = ONE.homes(CHUNK, p)
    for m in CHAIN[1:]:
        assert m.write_sets(CHUNK, p) == (b,)
        assert m.read_homes(CHUNK, p) == b
    assert ONE.old_homes(CHUNK, p) == MAP.homes(CHUNK, p)
    assert [m.last_change(CHUNK, p) for m in CHAIN] == [1, 2, 2, 2, 5]


def test_preference_is_b_then_a_then_everybody_else():
    for role in ROLES:
        for p in (*ONE.changed(role)[:50], 0, 1, 2):
            b, a = ONE.homes(role, p), ONE.old_homes(role, p)
            preference = ONE.preference(role, p)
            only_a = tuple(x for x in a if x not in b)
            assert preference[: len(b) + len(only_a)] == b + only_a
            assert sorted(preference) == [1, 2, 3, 4, 5, 6]
            assert ClusterMap.decode(ONE.encode()).preference(role, p) == preference
    assert sorted(END.preference(METADATA, MOVED)) == [2, 3, 4, 5, 6]


def test_who_leaves_stays_until_both_sides_are_done():
    for m in (ONE, TWO, DONE):
        assert m.node(1).weight(METADATA) == 0 == m.node(1).weight(CHUNK)
        assert m.address(METADATA, 1)
        assert m.banned == ()
    assert [x.number for x in END.nodes] == [2, 3, 4, 5, 6]
    assert END.banned == ((1, node(1).node_id),)
    assert END.transition is None
    with pytest.raises(ConfigError, match="removed node"):
        END.begin([*END.nodes, node(7, node_id=node(1).node_id)])


def test_chunks_may_be_done_first():
    m = ONE.finish_chunks()
    assert m.changed(CHUNK) == ()
    assert m.phase(METADATA) == 1
    assert m.node(1)
    end = m.advance().advance()
    assert end.transition is None
    assert end.banned == END.banned
    assert end.tables == END.tables


def test_numbers_are_never_reused():
    assert MAP.number_for_new() == 6
    shrunk = ClusterMap.create(CLUSTER, [*NODES, node(9)]).successor(NODES)
    assert shrunk.number_for_new() == 10
    last = node((1 << NODE_BITS) - 1)
    with pytest.raises(ConfigError, match="used"):
        ClusterMap.create(CLUSTER, [*NODES, last]).number_for_new()


def test_one_transition_at_a_time():
    for m in (ONE, TWO, DONE):
        with pytest.raises(ConfigError, match="wait"):
            m.begin(m.nodes)
    for m in (MAP, DONE, END):
        with pytest.raises(ConfigError, match="nothing to advance"):
            m.advance()
    for m in (MAP, END, ONE.finish_chunks()):
        with pytest.raises(ConfigError, match="nothing to finish"):
            m.finish_chunks()


def test_a_change_that_moves_nothing_is_done_at_once():
    m = MAP.begin([replace(node(1), host="other"), *NODES[1:]])
    assert m.transition is None
    assert (m.epoch, m.tables, m.changes) == (2, MAP.tables, MAP.changes)
    assert m.encode()[7] == 1


def test_a_change_of_one_role_leaves_the_other_alone():
    m = MAP.begin([*NODES, node(6, chunk_addr="")])
    assert (m.phase(METADATA), m.phase(CHUNK)) == (1, 0)
    assert m.advance().advance().transition is None
    m = MAP.begin([*NODES, node(6, metadata_addr="")])
    assert (m.phase(METADATA), m.phase(CHUNK)) == (0, 2)
    assert m.finish_chunks().transition is None
    with pytest.raises(ConfigError, match="nothing to advance"):
        m.advance()


def test_a_drained_node_is_removed_in_one_step():
    drained = replace(node(1), metadata_weight=0.0, chunk_weight=0.0)
    m = MAP.begin([drained, *NODES[1:]]).advance().advance().finish_chunks()
    assert all(1 not in m.homes(role, p) for role in ROLES for p in range(PARTITIONS))
    assert 1 not in m.voters  # nobody who is to go decides
    gone = m.begin(m.nodes, leaving=[1])
    assert gone.transition is None
    assert gone.banned == ((1, node(1).node_id),)


@pytest.mark.parametrize(
    ("nodes", "leaving", "message"),
    [
        (NODES[1:], [], "missing"),
        (NODES, [9], "no node 9"),
        ([node(1, node_id=bytes(16)), *NODES[1:]], [], "id cannot change"),
        ([node(1, chunk_addr=""), *NODES[1:]], [], "drop its chunk role"),
        (NODES, [1, 2, 3], "add nodes"),
        ([*NODES, node(5, name="x")], [], "same number"),
    ],
)
def test_begin_refuses(nodes, leaving, message):
    with pytest.raises(ConfigError, match=message):
        MAP.begin(nodes, leaving=leaving)


# --------------------------------------------------------------------------------------- voters


def grown(count, **fields):
    return ClusterMap.create(CLUSTER, [node(i, **fields) for i in range(1, count + 1)])


def steps(m):
    """The maps until the end of a transition."""
    found = [m]
    while m.transition is not None:
        m = m.step(METADATA if m.phase(METADATA) else CHUNK)
        found.append(m)
    return found


def test_voters_fill_up_one_per_epoch():
    first = grown(1)
    chain = steps(first.begin([node(1), node(2), node(3)]))
    assert [m.voters for m in chain][:2] == [(1, 2), (1, 2, 3)]
    assert chain[-1].voters == (1, 2, 3)


def test_a_voter_is_replaced_in_two_epochs():
    m = grown(3)
    chain = steps(m.begin([node(2), node(3), node(4)], leaving=[1]))
    assert [x.voters for x in chain[:3]] == [(1, 2, 3, 4), (2, 3, 4), (2, 3, 4)]
    seven = grown(7)
    chain = steps(seven.begin([node(i) for i in range(2, 9)], leaving=[1]))
    assert [len(x.voters) for x in chain[:3]] == [6, 7, 7]
    assert 1 not in chain[-1].voters


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_the_map_that_drops_nodes_is_chosen_by_those_who_stay(count):
    m = grown(count)
    old = list(range(1, count + 1))
    new = [count + i for i in old]
    chain = [m, *steps(m.begin([node(i) for i in new], leaving=old))]
    for before, after in pairwise(chain):
        assert len(set(before.voters) ^ set(after.voters)) <= 1
        assert after.prev_hash == before.digest
    assert chain[-1].transition is None
    assert set(chain[-2].voters) <= set(new)  # they chose the last one


def test_nobody_is_dropped_while_it_votes():
    m = steps(grown(3).begin([node(1), node(2), node(3), node(4)], leaving=[1]))
    last = next(x for x in m if x.ends_with(CHUNK) or x.ends_with(METADATA))
    assert not last.leaving_voters
    with pytest.raises(ConfigError, match="nobody who leaves votes"):
        last.shift_voters()
    with pytest.raises(ConfigError, match="nobody who leaves votes"):
        grown(3).shift_voters()
    early = grown(3).begin([node(4), node(5), node(6)], leaving=[1, 2, 3])
    early = early.finish_chunks().advance()
    assert early.leaving_voters
    with pytest.raises(ConfigError, match="their votes go before they do"):
        early.advance()
    assert early.step(METADATA).transition == early.transition


def test_voters_that_are_given_differ_by_one():
    assert MAP.begin(NODES, voters=[1, 2, 3, 4]).voters == (1, 2, 3, 4)
    with pytest.raises(ConfigError, match="one per epoch"):
        MAP.begin(NODES, voters=[1, 2, 3])


# ------------------------------------------------------------------------------ uneven weights


UNEVEN = [node(1, zone="z1", metadata_weight=5.0)] + [node(i, zone=f"z{i}") for i in range(2, 11)]


def uneven():
    return ClusterMap.create(CLUSTER, UNEVEN, params=Params(2, 2, 1, 2))


def test_uneven_weights_are_calibrated_and_kept_in_the_map():
    m = uneven()
    assert m.encode()[7] == 2
    assert ClusterMap.decode(m.encode()) == m
    assert uneven() == m
    assert m.node(1).metadata_weight == 5.0
    weights = dict(m.calibrated[0])
    assert sorted(weights) == list(range(1, 11))
    assert weights[1] > 5.0
    got = sum(1 in m.homes(METADATA, p) for p in range(PARTITIONS))
    assert got == pytest.approx(PARTITIONS * 2 * 5 / 14, rel=0.02)


def test_calibration_is_kept_by_a_change_and_moves_little():
    m = uneven()
    added = m.begin([*UNEVEN, node(11, zone="z11")])
    before = dict(m.calibrated[0])
    after = dict(added.calibrated[0])
    assert sorted(after) == list(range(1, 12))
    moved = sum(
        len(set(new) - set(old)) for old, new in zip(m.tables[0], added.tables[0], strict=True)
    )
    assert moved / (PARTITIONS * 2) <= 1.3 / 15
    ratio = [after[i] / before[i] for i in before]
    assert max(ratio) / min(ratio) < 1.1
    # a change of a node's own weight scales what was found for it
    same = m.begin([replace(x, host="h") for x in UNEVEN])
    assert same.calibrated == m.calibrated
    assert same.transition is None


# --------------------------------------------------------------------------------- what is wrong


def body_of(m):
    return codec.unpack(m.encode()[8:-32])


def rows(*row):
    return pack(">3H", *row) * PARTITIONS


@pytest.mark.parametrize(
    "transition",
    [
        (),
        (3, None, None, ()),
        (2, None, None, ()),
        (0, rows(1, 2, 3), None, ()),
        (True, rows(1, 2, 3), None, ()),
        (1, None, rows(1, 2, 3), ()),
        (1, rows(1, 2, 2), None, ()),
        (1, rows(1, 2, 9), None, ()),
        (1, rows(1, 2, 3)[:-2], None, ()),
        (1, rows(1, 2, 3), None, (9,)),
        (1, rows(1, 2, 3), None, (2,)),  # has weight
        (1, rows(1, 2, 3), None, (1, 1)),
        (1, rows(1, 2, 3), None, 7),
    ],
)
def test_transitions_that_are_wrong_are_refused(transition):
    body = body_of(ONE)
    with pytest.raises(Corrupt):
        ClusterMap.decode(resealed((*body[:8], transition, body[9])))


@pytest.mark.parametrize(
    "weights",
    [
        (),
        ((), ((1, 1.0),)),
        ((), tuple((i, 0.0) for i in range(2, 7))),
        ((), tuple((i, 1) for i in range(2, 7))),
        ((), tuple((i, float("inf")) for i in range(2, 7))),
        ((), 5),
    ],
)
def test_calibrated_weights_that_are_wrong_are_refused(weights):
    body = body_of(ONE)
    with pytest.raises(Corrupt):
        ClusterMap.decode(resealed((*body[:9], weights)))


def test_only_the_canonical_form_is_read():
    body = body_of(MAP)
    with pytest.raises(Corrupt, match="canonical"):
        ClusterMap.decode(resealed((*body, None, ((), ()))))
    with pytest.raises(Corrupt):
        ClusterMap.decode(resealed(body_of(ONE), version=1))
    with pytest.raises(ConfigError, match="same as the new"):
        replace(MAP, transition=Transition(1, MAP.tables[0], None, ()))
