"""Agreement on maps by the voters: proposals, races, illegal steps, voters that change."""

import random
from dataclasses import replace

import pytest
import trio

from dfs.clock import SystemClock
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Busy, DfsError, InvalidArgument, NotFound, StaleEpoch
from dfs.hashing import digest, partition_of
from dfs.ids import MAP_JOURNAL
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.mapcluster import CLUSTER_ID, MapCluster, first_map, member
from dfs.testing.network import SimNetwork
from dfs.volume import entries
from metadata.mapservice import MapService, decode_entry, encode_entry, genesis_of
from metadata.mapsteps import check_step


async def run_cluster(body, nodes=3):
    async with SimNetwork(random.Random(1), SystemClock()) as network, trio.open_nursery() as n:
        cluster = MapCluster(1, network, n, nodes=nodes)
        await cluster.start()
        client = network.endpoint("client")
        await body(cluster, client)
        n.cancel_scope.cancel()


def relabelled(old, rack):
    return old.begin([replace(n, rack=rack) if n.number == 1 else n for n in old.nodes])


async def propose(client, machine, new, timeout=30):
    args = (new.epoch - 1, new.encode(), "why")
    (epoch,), _ = await client.call(machine.address, "map.propose", args, timeout=timeout)
    return epoch


def test_the_genesis_is_a_function_of_the_first_map():
    one = first_map(3)
    assert genesis_of(one) == genesis_of(ClusterMap.decode(one.encode()))
    assert decode_entry(genesis_of(one))[2] == one
    with pytest.raises(InvalidArgument):
        genesis_of(relabelled(one, "q"))
    two = relabelled(one, "q")
    assert decode_entry(encode_entry(5, "n", two.encode())) == (5, "n", two)
    assert decode_entry(entries.encode(entries.CONFIG, 0, 2, (1, 2))) is None


async def test_a_map_is_agreed_once_and_known_everywhere():
    async def body(cluster, client):
        old = cluster.newest
        new, rival = relabelled(old, "q"), relabelled(old, "p")
        assert await propose(client, cluster.machines[1], new) == 2
        assert await propose(client, cluster.machines[2], new) == 2  # a resend
        with pytest.raises(StaleEpoch) as caught:
            await propose(client, cluster.machines[3], rival)
        assert ClusterMap.decode(caught.value.details[0]) == new
        with trio.fail_after(30):
            for machine in cluster.machines.values():
                assert await machine.keeper.wait_for(2) == new
        (history,), _ = await client.call(cluster.machines[2].address, "map.history", timeout=5)
        assert [(e, d) for e, d, _, _ in history] == [(1, old.digest), (2, new.digest)]
        assert history[1][3] == "why"
        (data,), _ = await client.call(cluster.machines[2].address, "map.get", (1,), timeout=5)
        assert data == old.encode()
        with pytest.raises(NotFound):
            await client.call(cluster.machines[2].address, "map.get", (9,), timeout=5)

    await run_cluster(body)


class AnyFollows(MapService):
    def rule_follows(self, newest, new):
        return True


@pytest.mark.parametrize(("kind", "expected"), [(MapService, 2), (AnyFollows, 3)])
def test_only_the_first_of_two_successors_counts(kind, expected):
    old = first_map(3)
    service = kind(None, 1, MapKeeper(old), None)
    service._count(1, genesis_of(old))
    for seq, rack in enumerate("qp", 2):
        service._count(seq, encode_entry(0, "", relabelled(old, rack).encode()))
    assert len(service._counted) == expected
    assert service._counted[1][3] == relabelled(old, "q")


async def test_racing_proposals_leave_one_map():
    async def body(cluster, client):
        old = cluster.newest
        results = {}

        async def one(rack, machine):
            try:
                results[rack] = await propose(client, machine, relabelled(old, rack))
            except StaleEpoch:
                results[rack] = None

        async with trio.open_nursery() as n:
            for i, rack in enumerate("abc", 1):
                n.start_soon(one, rack, cluster.machines[i])
        assert sorted(results.values(), key=str) == [2, None, None]

    await run_cluster(body)


async def test_agreement_needs_a_majority_and_survives_restarts():
    async def body(cluster, client):
        new = relabelled(cluster.newest, "q")
        cluster.machines[1].crash()
        assert await propose(client, cluster.machines[2], new) == 2
        cluster.machines[2].crash()
        third = relabelled(new, "x")
        with pytest.raises(DfsError):
            await propose(client, cluster.machines[3], third, timeout=8)
        cluster.machines[3].crash()
        for machine in cluster.machines.values():
            await machine.start()
        assert await propose(client, cluster.machines[1], third) == 3
        for machine in cluster.machines.values():
            assert await machine.keeper.wait_for(3) == third

    await run_cluster(body)


async def test_old_maps_are_trimmed_and_a_late_voter_is_filled():
    async def body(cluster, client):
        cluster.machines[3].crash()
        for i in range(14):
            await propose(client, cluster.machines[1], relabelled(cluster.newest, f"r{i}"))
        await trio.sleep(3)
        assert cluster.machines[1].node.journals.get(MAP_JOURNAL).base > 0
        await cluster.machines[3].start()
        with trio.fail_after(60):
            await cluster.machines[3].keeper.wait_for(15)
        await trio.sleep(40)
        assert cluster.machines[3].node.life.maps.newest == cluster.newest

    await run_cluster(body)


async def test_volumes_are_not_born_while_their_homes_move():
    async def body(cluster, client):
        old = cluster.newest
        new = old.begin([*old.nodes, member(4)])
        await propose(client, cluster.machines[1], new)
        moving = next(
            v for i in range(99) if new.old_homes(METADATA, partition(v := bytes([i + 1]) * 16))
        )
        entry = entries.encode(entries.GENESIS, 1, {}, 1, new.volume_homes(moving))
        for number in (1, 2, 3):
            await cluster.machines[number].keeper.wait_for(2)
        with pytest.raises(Busy, match="are moving"):
            await client.call(
                cluster.machines[1].address, "jrnl.genesis", (moving, entry), timeout=5, epoch=2
            )
        with pytest.raises(StaleEpoch):
            await client.call(
                cluster.machines[1].address, "jrnl.genesis", (moving, entry), timeout=5, epoch=1
            )

    await run_cluster(body)


def partition(volume):
    return partition_of(digest(volume))


def four():
    return first_map(4)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m, new: replace(new, prev_hash=b"x" * 32),
        lambda m, new: replace(new, epoch=m.epoch + 2),
        lambda m, new: replace(new, voters=(1,)),
        lambda m, new: replace(new, params=replace(m.params, r=3)),
        lambda m, new: replace(new, banned=((77, b"b" * 16),)),
        lambda m, new: replace(new, transition=None),
        lambda m, new: replace(new, changes=m.changes),
        lambda m, new: replace(new, transition=replace(new.transition, phase=2)),
    ],
)
def test_illegal_steps_are_refused(break_it):
    old = four()
    new = old.begin([n for n in old.nodes if n.number != 2], leaving=[2])
    check_step(old, new)
    with pytest.raises(DfsError):
        check_step(old, break_it(old, new))


def test_the_steps_of_a_transition_come_in_order():
    old = four()
    first = old.begin([n for n in old.nodes if n.number != 2], leaving=[2])
    second = first.advance()
    third = second.advance()
    check_step(first, second)
    check_step(second, third)
    for a, b in ((old, second), (first, third), (old, third), (second, first)):
        with pytest.raises(InvalidArgument):
            check_step(a, b)
    with pytest.raises(InvalidArgument):
        check_step(first, replace(second, voters=first.voters[:2]))
    assert old.cluster_id == CLUSTER_ID
