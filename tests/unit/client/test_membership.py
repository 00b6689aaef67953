"""The client side of membership changes, over a cluster that is a dict of this process."""

from dataclasses import replace

import pytest
from fakecluster import FakeCluster

from dfs import codec
from dfs.client.kv import CLUSTER_SPACE
from dfs.client.membership import STAGED, Membership
from dfs.cluster.change import (
    Add,
    Drain,
    NewNode,
    Remove,
    Replace,
    SetWeight,
    Undrain,
    edit_fields,
)
from dfs.cluster.map import CHUNK, METADATA
from dfs.errors import ConfigError, Corrupt, InvalidArgument, NoQuorum, StaleEpoch, Unreachable

REGISTER = (CLUSTER_SPACE, STAGED)


def new(name, port=7500, **more):
    return NewNode(
        node_id=name.encode().ljust(16, b"."),
        name=name,
        zone="zone9",
        rack="",
        host=f"host-{name}",
        metadata_addr=f"tcp://127.0.0.1:{port}",
        chunk_addr=f"tcp://127.0.0.1:{port + 1}",
        **more,
    )


def written(*edits, version=1):
    return codec.pack((version, tuple(edit_fields(edit) for edit in edits)))


def members_of(cluster):
    return Membership(cluster.client(), timeout=3.0)


@pytest.fixture
def cluster():
    return FakeCluster(4)


def advanced(cluster):
    """The next map, made by somebody else."""
    return cluster.map.successor(cluster.map.nodes)


# ---------------------------------------------------------------------------------------- staging


async def test_edits_are_staged_one_after_the_other(cluster):
    members = members_of(cluster)
    assert (await members.staged()).edits == ()
    first = await members.stage([Drain("node1")])
    assert first.edits == (Drain("node1"),)
    both = await members.stage([SetWeight("node2", CHUNK, 2.0)])
    assert both.edits == (Drain("node1"), SetWeight("node2", CHUNK, 2.0))
    assert (await members.staged()).edits == both.edits
    assert cluster.registers[REGISTER] == (written(*both.edits),), "one value, no siblings"
    assert cluster.map.epoch == 1, "staging changes nothing"


async def test_every_kind_of_edit_survives_the_register(cluster):
    edits = (
        Add(new("node5")),
        SetWeight("node5", METADATA, 3.0),
        Drain("node1"),
        Undrain("node1", 2.0),
    )
    await members_of(cluster).stage(edits)
    assert (await members_of(cluster).staged()).edits == edits


async def test_what_cannot_be_applied_together_is_not_staged(cluster):
    members = members_of(cluster)
    await members.stage([Drain("node1")])
    before = dict(cluster.registers)
    with pytest.raises(ConfigError, match="node node1 is drained already"):
        await members.stage([Drain("node1")])
    with pytest.raises(ConfigError, match="there is no node node9 in the cluster"):
        await members.stage([Drain("node2"), Remove("node9")])
    with pytest.raises(ConfigError, match="nothing to change"):
        await members_of(FakeCluster()).stage([])
    assert cluster.registers == before


async def test_edits_of_concurrent_operators_come_together(cluster):
    ours, theirs = Drain("node1"), Add(new("node5"))
    both = SetWeight("node3", CHUNK, 2.0)  # staged before they parted: once is enough
    cluster.registers[REGISTER] = (written(both, theirs), written(both, ours))
    members = members_of(cluster)
    staged = await members.staged()
    assert staged.edits == (both, ours, theirs), "the older sibling first"
    more = await members.stage([SetWeight("node4", CHUNK, 2.0)])
    assert more.edits == (both, ours, theirs, SetWeight("node4", CHUNK, 2.0))
    assert cluster.registers[REGISTER] == (written(*more.edits),), "the siblings are resolved"


async def test_siblings_are_superseded_by_what_was_seen_and_no_more(cluster):
    cluster.registers[REGISTER] = (written(Drain("node1")),)
    members = members_of(cluster)
    seen = (await members.staged()).context
    await members.stage([SetWeight("node2", CHUNK, 2.0)])
    _, method, args = next(call for call in cluster.asked if call[1] == "kv.put")
    assert (method, args[:2], args[3]) == ("kv.put", REGISTER, seen)
    assert seen != b""


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (written(Drain("node1"), version=2), "staged changes have format 2: "),
        (codec.pack((3, b"other", "fields")), "staged changes have format 3: "),
        (codec.pack((1, (("promote", "node1"),))), "unknown change of the cluster"),
        (codec.pack((1, (), ())), "staged changes cannot be read "),
        (codec.pack(7), "staged changes cannot be read "),
        (b"\xc1", "undecodable"),
    ],
)
async def test_what_another_version_staged_is_refused_until_it_is_reset(cluster, value, why):
    cluster.registers[REGISTER] = (written(Drain("node2")), value)
    members = members_of(cluster)
    for refused, args in (
        (members.staged, ()),
        (members.stage, ([Drain("node1")],)),
        (members.join, (2,)),
        (members.begin, (2,)),
    ):
        with pytest.raises(Corrupt) as told:
            await refused(*args)
        assert why in str(told.value)
        assert str(told.value).endswith("upgrade dfs, or `dfs cluster node reset` drops them")
    assert cluster.registers[REGISTER] == (written(Drain("node2")), value)
    assert await members.reset() == 2
    assert (await members.staged()).edits == ()
    assert (await members.stage([Drain("node1")])).edits == (Drain("node1"),)


async def test_reset_says_whether_there_was_anything(cluster):
    members = members_of(cluster)
    assert await members.reset() == 0
    assert REGISTER not in cluster.registers, "nothing is written for nothing"
    await members.stage([Drain("node1")])
    assert await members.reset() == 1
    assert await members.reset() == 0
    # an emptied register may have a sibling that is not empty
    cluster.registers[REGISTER] = (written(), written(Drain("node1")))
    assert await members.reset() == 1
    assert (await members.staged()).edits == ()


async def test_the_plan_is_of_the_newest_map_and_all_that_is_staged(cluster):
    members = members_of(cluster)
    await members.stage([Add(new("node5")), Drain("node1")])
    had = sum(1 in row for row in cluster.map.tables[0])
    found = await members.plan({(METADATA, 1): had << 20})
    assert found.map.epoch == 2
    share = {(s.name, s.role): s for s in found.shares}
    assert (share["node1", METADATA].before, share["node1", METADATA].after) == (had, 0)
    assert share["node5", METADATA].after == share["node5", METADATA].receive > 0
    assert share["node5", METADATA].move_bytes > 0
    cluster.map = advanced(cluster)
    assert (await members.plan({})).map.epoch == 3
    assert cluster.proposed == []


# --------------------------------------------------------------------------------- the two steps


async def test_new_nodes_join_empty_and_take_their_share_in_a_second_step(cluster):
    members = members_of(cluster)
    await members.stage(
        [
            Add(new("node5", 7500, metadata_weight=2.0, chunk_weight=3.0)),
            Replace("node1", new("node6", 7600)),
            Drain("node2"),
        ]
    )
    assert await members.join(2) == ("node5", "node6")
    assert cluster.map.epoch == 2
    assert cluster.map.transition is None
    for name in ("node5", "node6"):
        node = next(n for n in cluster.map.nodes if n.name == name)
        assert (node.metadata_weight, node.chunk_weight) == (0.0, 0.0)
        assert not any(node.number in row for table in cluster.map.tables for row in table)
    rest = (
        SetWeight("node5", METADATA, 2.0),
        SetWeight("node5", CHUNK, 3.0),
        Remove("node1"),
        SetWeight("node6", METADATA, 1.0),
        SetWeight("node6", CHUNK, 1.0),
        Drain("node2"),
    )
    assert (await members.staged()).edits == rest
    assert [note for note, _ in cluster.proposed] == ["add node5; add node6"]

    assert await members.join(3) == (), "they are there"
    begun = await members.begin(3)
    assert begun.epoch == 3
    assert begun.transition is not None
    assert (await members.staged()).edits == ()
    assert cluster.proposed[-1] == (
        "set the metadata weight of node5 to 2; set the chunk weight of node5 to 3; remove node1; "
        "set the metadata weight of node6 to 1; set the chunk weight of node6 to 1; drain node2",
        begun,
    )
    assert [n.name for n in cluster.map.nodes] == ["node2", "node3", "node4", "node5", "node6"]
    assert [number for number, _ in cluster.map.banned] == [1]


async def test_a_node_of_one_role_gets_a_weight_in_that_role_only(cluster):
    members = members_of(cluster)
    await members.stage(
        [
            Add(replace(new("meta", 7500), chunk_addr="")),
            Add(new("spare", 7600, metadata_weight=0.0)),
        ]
    )
    assert await members.join(2) == ("meta", "spare")
    assert (await members.staged()).edits == (
        SetWeight("meta", METADATA, 1.0),
        SetWeight("spare", CHUNK, 1.0),
    )


async def test_a_node_without_weight_has_only_the_first_step(cluster):
    members = members_of(cluster)
    await members.stage([Add(new("node5", metadata_weight=0.0, chunk_weight=0.0))])
    assert await members.join(2) == ("node5",)
    assert [n.name for n in cluster.map.nodes][-1] == "node5"
    assert (await members.staged()).edits == ()
    with pytest.raises(ConfigError, match="nothing to change"):
        await members.begin(3)


async def test_who_takes_over_a_name_or_an_address_cannot_join_first(cluster):
    members = members_of(cluster)
    old = cluster.map.node(2)
    edits = (
        Replace("node1", new("node1", 7600)),
        Replace("node2", replace(new("node7", 7700), chunk_addr=old.chunk_addr)),
    )
    await members.stage(edits)
    assert await members.join(2) == ()
    assert (await members.staged()).edits == edits, "nothing is rewritten"
    assert cluster.map.epoch == 1
    begun = await members.begin(2)
    assert {n.name for n in begun.nodes} >= {"node1", "node1 (replaced 1)", "node7"}
    assert [n.name for n in cluster.map.nodes] == ["node3", "node4", "node1", "node7"]


async def test_nothing_joins_if_the_second_step_could_not_follow(cluster):
    members = members_of(cluster)
    edits = (Add(new("node5")), Drain("node1"))
    await members.stage(edits)
    cluster.map = cluster.map.begin([replace(n, metadata_weight=0.0, chunk_weight=0.0)
                                     if n.name == "node1" else n for n in cluster.map.nodes])  # fmt: skip
    while cluster.map.transition is not None:
        phase = cluster.map.phase(METADATA)
        cluster.map = cluster.map.advance() if phase else cluster.map.finish_chunks()
    epoch = cluster.map.epoch
    with pytest.raises(ConfigError, match="node1 is drained already"):
        await members.join(epoch + 1)
    assert (cluster.map.epoch, cluster.proposed) == (epoch, [])
    assert (await members.staged()).edits == edits


async def test_no_change_begins_while_another_is_under_way(cluster):
    cluster.moves = False
    members = members_of(cluster)
    await members.stage([Drain("node1")])
    await members.begin(2)
    assert cluster.map.transition is not None
    with pytest.raises(ConfigError, match="the cluster is changing already"):
        await members.stage([Drain("node2")])
    cluster.registers[REGISTER] = (written(Add(new("node5"))),)
    for step in (members.join, members.begin):
        with pytest.raises(ConfigError, match="the cluster is changing already"):
            await step(3)
    assert (await members.staged()).edits == (Add(new("node5")),)


# ------------------------------------------------------------------------------------ what fails


async def test_a_step_is_refused_when_the_cluster_moved_on(cluster):
    members = members_of(cluster)
    edits = (Add(new("node5")),)
    await members.stage(edits)
    cluster.map = advanced(cluster)
    for step in (members.join, members.begin):
        with pytest.raises(StaleEpoch) as told:
            await step(2)
        assert str(told.value) == (
            "the cluster's map has epoch 2 and the next is 3, not 2: "
            "look at `dfs cluster plan` again"
        )
    assert cluster.proposed == []
    assert (await members.staged()).edits == edits
    assert await members.join(3) == ("node5",)


@pytest.mark.parametrize("step", ["join", "begin"])
@pytest.mark.parametrize("error", [StaleEpoch("there is a newer map"), InvalidArgument("no step")])
async def test_edits_are_staged_again_when_the_voters_refuse(cluster, step, error):
    members = members_of(cluster)
    edits = (Add(new("node5")), Drain("node1"))
    await members.stage(edits)
    cluster.answers["map.propose"] = error
    with pytest.raises(type(error), match=str(error)):
        await getattr(members, step)(2)
    assert sum(method == "map.propose" for _, method, _ in cluster.asked) == 1, "that was final"
    assert (await members.staged()).edits == edits
    assert cluster.registers[REGISTER] == (written(*edits),)
    del cluster.answers["map.propose"]
    await getattr(members, step)(2)
    assert cluster.map.epoch > 1


async def test_edits_of_others_that_come_meanwhile_are_kept(cluster):
    """What is put back supersedes what this operator wrote, not what it has not seen."""
    members = members_of(cluster)
    await members.stage([Drain("node1")])
    contexts = []

    def put(address, args):
        contexts.append(args[3])
        return cluster.do_kv_put(address, args)

    cluster.answers["kv.put"] = put
    cluster.answers["map.propose"] = NoQuorum("1 of 3 voters answered")
    staged = (await members.staged()).context
    with pytest.raises(NoQuorum):
        await members.begin(2)
    emptied, restored = contexts
    assert emptied == staged
    assert restored not in (staged, b"", None), "the context that the emptying write returned"


async def test_a_map_that_came_meanwhile_is_not_built_upon(cluster):
    """The proposal names the map it was made from, even if a newer one is known by then."""
    members = members_of(cluster)
    await members.stage([Drain("node1")])

    def put(address, args):
        if not cluster.proposed:
            other = advanced(cluster)
            cluster.proposed.append(("another operator", other))
            cluster.map = other
        return cluster.do_kv_put(address, args)

    cluster.answers["kv.put"] = put
    with pytest.raises(StaleEpoch, match="there is a newer map"):
        await members.begin(2)
    assert [note for note, _ in cluster.proposed] == ["another operator"]
    assert (await members.staged()).edits == (Drain("node1"),)
    await members.begin(3)
    assert cluster.proposed[-1][0] == "drain node1"


async def test_the_map_is_proposed_after_the_register_is_empty(cluster):
    members = members_of(cluster)
    await members.stage([Drain("node1")])
    seen = []

    def propose(address, args):
        seen.append(cluster.registers[REGISTER])
        return cluster.do_map_propose(address, args)

    cluster.answers["map.propose"] = propose
    await members.begin(2)
    assert seen == [(written(),)]


@pytest.mark.parametrize("why", ["down", "lost"])
async def test_the_next_voter_is_asked(cluster, why):
    members = members_of(cluster)
    await members.stage([Drain("node4")])
    assert cluster.map.voters[:2] == (1, 2)
    first, second = (cluster.address(name) for name in ("node1", "node2"))
    asked = []

    def propose(address, args):
        asked.append(address)
        if address == first:
            if why == "lost":  # it was done, only the answer is missing
                cluster.do_map_propose(address, args)
            return Unreachable("the connection broke")
        return cluster.do_map_propose(address, args)

    cluster.answers["map.propose"] = propose
    begun = await members.begin(2)
    assert asked == [first, second]
    assert cluster.proposed == [("drain node4", begun)]
    assert (await members.staged()).edits == ()


async def test_without_voters_the_last_failure_is_told(cluster):
    members = members_of(cluster)
    await members.stage([Drain("node4")])
    cluster.answers["map.propose"] = lambda address, _args: NoQuorum(f"{address}: 1 of 3 voters")
    with pytest.raises(NoQuorum, match=f"{cluster.address('node4')}: 1 of 3 voters"):
        await members.begin(2)
    voters = [a for a, method, _ in cluster.asked if method == "map.propose"]
    assert voters == [n.metadata_addr for n in cluster.map.nodes]
    assert (await members.staged()).edits == (Drain("node4"),)
