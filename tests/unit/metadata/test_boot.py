"""Boot numbers: restored and doubled directories refuse to run, whole clusters start."""

import copy
import random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.errors import ConfigError, DfsError
from dfs.testing.mapcluster import MapCluster, member
from dfs.testing.network import SimNetwork
from metadata import boot as module
from metadata.boot import Boot


async def run_cluster(body, nodes=3):
    async with SimNetwork(random.Random(1), SystemClock()) as network, trio.open_nursery() as n:
        cluster = MapCluster(1, network, n, nodes=nodes)
        await body(cluster)
        n.cancel_scope.cancel()


async def admitted(machine, within=30):
    with trio.fail_after(within):
        while not (machine.node and machine.node.boot and machine.node.boot.admitted.is_set()):
            assert machine.error is None, machine.error
            await trio.sleep(0.1)


def refusal(machine):
    (error,) = machine.error.exceptions
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


async def test_a_whole_cluster_starts_and_one_dead_peer_does_not_matter():
    async def body(cluster):
        await cluster.machines[1].start()
        await trio.sleep(5)
        assert not cluster.machines[1].node.boot.admitted.is_set()
        client = cluster.network.endpoint("client")
        (role, *_), _ = await client.call(cluster.machines[1].address, "ping", timeout=1)
        assert role == "metadata"
        with pytest.raises(DfsError, match="starting"):
            await client.call(cluster.machines[1].address, "vol.sync", (bytes(16),), timeout=20)
        await cluster.machines[2].start()
        await admitted(cluster.machines[1])
        await admitted(cluster.machines[2])

    await run_cluster(body)


def test_a_majority_of_the_metadata_nodes_must_know():
    assert [Boot.rule_needed(None, n) for n in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("checked", [True, False])
async def test_an_older_copy_of_a_directory_refuses_to_start(checked, monkeypatch):
    async def body(cluster):
        await cluster.start()
        for machine in cluster.machines.values():
            await admitted(machine)
        machine = cluster.machines[3]
        machine.crash()
        old = copy.deepcopy(machine.disk)
        await machine.start()
        await admitted(machine)
        machine.crash()
        machine.disk = old
        await machine.start()
        await trio.sleep(5)
        if not checked:
            assert machine.node.boot.admitted.is_set(), "the rule is broken, so it runs"
            return
        assert not machine.up
        assert isinstance(refusal(machine), ConfigError)
        assert "older copy" in str(refusal(machine))
        assert "dfs cluster node replace" in str(refusal(machine))

    if not checked:
        monkeypatch.setattr(Boot, "rule_later", lambda _self, _seen: False)
        monkeypatch.setattr(Boot, "rule_needed", lambda _self, _count: 1)
    await run_cluster(body)


async def test_the_first_of_two_processes_stops():
    async def body(cluster):
        await cluster.start()
        for machine in cluster.machines.values():
            await admitted(machine)
        first = cluster.machines[3]
        first.node.boot.on_usurped("another process runs as node3")
        await trio.sleep(1)
        assert not first.up
        assert "another process" in str(refusal(first))

    await run_cluster(body)


async def test_a_removed_node_is_told_so():
    async def body(cluster):
        await cluster.start()
        for machine in cluster.machines.values():
            await admitted(machine)
        old = cluster.newest
        for n in (1, 2):
            keeper = cluster.machines[n].keeper
            keeper.current = old.successor([*old.nodes[:2], *old.nodes[3:], member(4)])
        cluster.machines[3].crash()
        await cluster.machines[3].start()
        await trio.sleep(5)
        assert "was removed from the cluster" in str(refusal(cluster.machines[3]))

    await run_cluster(body)


async def test_numbers_grow_while_a_node_runs():
    async def body(cluster):
        await cluster.start()
        for machine in cluster.machines.values():
            await admitted(machine)
        before = cluster.machines[1].node.boot.boot
        await trio.sleep(module.BUMP + 60)
        assert cluster.machines[1].node.boot.boot > before

    await run_cluster(body)


async def test_a_twin_that_nobody_talks_to_is_noticed():
    """Another process on a copy has told the others a later number; the first one asks them."""

    async def body(cluster):
        await cluster.start()
        for machine in cluster.machines.values():
            await admitted(machine)
        first = cluster.machines[3]
        twin = cluster.network.endpoint("twin")
        node_id = cluster.machines[1].node._get_map().node(3).node_id
        for number in (1, 2):
            args = (3, node_id, first.node.boot.boot + 1, b"another nonce...")
            address = cluster.machines[number].address
            await twin.call(address, "node.boot", args, timeout=2)
        assert first.error is None
        await trio.sleep(2 * module.TELL)
        assert isinstance(refusal(first), ConfigError)
        assert "another process runs as the same node" in str(refusal(first))

    await run_cluster(body)


@pytest.mark.parametrize("told", [True, False])
async def test_a_copy_with_an_old_map_asks_the_members_of_the_newest_one(told, monkeypatch):
    """A majority of an old map may be of nodes that are gone, and those that are here say so."""

    async def body(cluster):
        await cluster.start()
        for machine in cluster.machines.values():
            await admitted(machine)
        first = cluster.machines[1]
        boot = first.node.boot
        old = cluster.newest
        second = cluster.machines[2].keeper
        second.current = new = old.successor([*old.nodes, member(4)])
        assert new.epoch == old.epoch + 1
        boot.noted.clear()
        failures = await boot._tell_all(old, [2])
        assert (2 in failures) == told
        assert (first.keeper() == new) == told
        assert (2 in boot.noted) != told

    if not told:
        monkeypatch.setattr(Boot, "rule_outdated", lambda _self, _theirs, _here: False)
    await run_cluster(body)
