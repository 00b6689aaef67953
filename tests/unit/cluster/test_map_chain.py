"""Random lives of a cluster: whatever operators do, its maps form one chain that every rule fits."""

from dataclasses import astuple
from random import Random

import pytest

from dfs.cluster.change import Add, Drain, NewNode, Remove, Replace, SetWeight, Undrain, apply_edits
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap
from dfs.errors import ConfigError
from dfs.hashing import PARTITIONS
from dfs.testing.joint_cores import member

PROBES = range(0, PARTITIONS, 97)


def random_edit(rng, m, fresh):
    name = rng.choice(m.nodes).name
    new = NewNode(*astuple(member(fresh))[1:])
    return rng.choice(
        [
            Add(new),
            Add(new),
            Drain(name),
            Undrain(name),
            Remove(name),
            Replace(name, new),
            SetWeight(name, rng.choice(ROLES), rng.choice([0.5, 1.0, 3.0])),
        ]
    )


def step(rng, m):
    """The next epoch of a map in transition, by one of the ways there are."""
    ways = []
    if m.phase(METADATA):
        ways.append(m.advance)
    if m.phase(CHUNK):
        ways.append(m.finish_chunks)
    return rng.choice(ways)()


def check_pair(before, after):
    assert after.epoch == before.epoch + 1
    assert after.prev_hash == before.digest
    assert after.params == before.params
    assert len(set(before.voters) ^ set(after.voters)) <= 1
    assert set(before.banned) <= set(after.banned)
    ids = {node.number: node.node_id for node in before.nodes}
    assert all(ids.get(node.number, node.node_id) == node.node_id for node in after.nodes)
    for role in ROLES:
        for p in PROBES:
            sets = [
                ({frozenset(row) for row in m.write_sets(role, p)}, set(m.read_homes(role, p)))
                for m in (before, after)
            ]
            ends = [set(m.old_homes(role, p)) for m in (before, after)]
            moved = sets[0] != sets[1] or ends[0] != ends[1]
            assert after.last_change(role, p) == (
                after.epoch if moved else before.last_change(role, p)
            )
            # the sets of consecutive epochs meet: what one reads the other one writes
            assert sets[0][1] in map(set, after.write_sets(role, p)) or role == CHUNK
            assert sets[1][1] in map(set, before.write_sets(role, p)) or after.phase(role)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_life(seed):
    rng = Random(seed)
    m = ClusterMap.create(bytes(16), [member(i) for i in range(1, rng.randint(4, 7))])
    for _ in range(12):
        if m.transition is not None:
            after = step(rng, m)
        else:
            try:
                after = apply_edits(m, [random_edit(rng, m, 100 + m.epoch)])
            except ConfigError:
                continue  # a change that cannot be: another one is tried
        check_pair(m, after)
        assert ClusterMap.decode(after.encode()) == after
        for role in ROLES:
            for p in PROBES:
                order = after.preference(role, p)
                assert sorted(order) == [x.number for x in after.nodes if x.address(role)]
                assert order[: after.n] == after.homes(role, p)
        m = after
    assert m.epoch > 5
