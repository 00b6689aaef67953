from dataclasses import replace
from itertools import combinations

import pytest

from dfs.cluster.voting import next_voters, wanted_voters
from dfs.testing.joint_cores import member

NODES = [member(i) for i in range(1, 10)]


@pytest.mark.parametrize(("count", "voters"), [(1, 1), (2, 1), (3, 3), (4, 3), (6, 5), (9, 7)])
def test_an_odd_number_of_at_most_seven(count, voters):
    assert len(wanted_voters(NODES[:count], ())) == voters


def test_present_voters_stay_and_new_ones_come_from_other_zones():
    nodes = [replace(node, zone="a" if node.number < 5 else "b") for node in NODES[:6]]
    assert wanted_voters(nodes, (1, 2, 3)) == (1, 2, 3, 5, 6)
    assert next_voters(nodes, (1, 2, 3), ()) == (1, 2, 3, 5)


def test_nodes_of_weight_zero_vote_only_if_nobody_else_can():
    empty = [replace(node, metadata_weight=0.0) for node in NODES[:3]]
    assert wanted_voters([*empty, *NODES[3:6]], (1, 2, 3)) == (4, 5, 6)
    assert wanted_voters(empty, (1, 2)) == (1, 2, 3)
    assert wanted_voters([*empty[:1], replace(NODES[1], metadata_addr="")], ()) == (1,)


def test_a_voter_is_added_before_one_is_removed():
    assert next_voters(NODES[:4], (1, 2, 3), (1,)) == (1, 2, 3, 4)
    assert next_voters(NODES[:4], (1, 2, 3, 4), (1,)) == (2, 3, 4)
    # unless there are seven
    assert next_voters(NODES, (1, 2, 3, 4, 5, 6, 7), (1,)) == (2, 3, 4, 5, 6, 7)
    assert next_voters(NODES[:3], (1, 2, 3), ()) == (1, 2, 3)
    assert next_voters(NODES[:1], (1,), (1,)) == (1,)


def majorities(voters):
    return [set(x) for x in combinations(voters, len(voters) // 2 + 1)]


@pytest.mark.parametrize("leaving", [(), (1,), (1, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("count", range(1, 10))
def test_majorities_of_consecutive_epochs_meet(count, leaving):
    voters = tuple(range(1, min(count, 7) + 1))
    for _ in range(14):
        after = next_voters(NODES, voters, leaving)
        assert all(a & b for a in majorities(voters) for b in majorities(after))
        voters = after
    assert not set(voters) & set(leaving)
