"""Boot numbers of chunkservers: a copy may run, and the older of two processes stops."""

import copy
import random

import pytest
import trio

from chunkserver.boot import ChunkBoot, Usurped
from dfs.clock import SystemClock
from dfs.env import Env
from dfs.rpc.gossip import next_boot
from dfs.testing.disk import SimDisk
from dfs.testing.mapcluster import MapCluster
from dfs.testing.network import SimNetwork
from dfs.testing.processes import SimProcesses


async def run_cluster(body):
    async with SimNetwork(random.Random(1), SystemClock()) as network, trio.open_nursery() as n:
        cluster = MapCluster(1, network, n)
        await cluster.start()
        await body(cluster)
        n.cancel_scope.cancel()


async def started(cluster, disk, kind=ChunkBoot, seed=1):
    """A process on a directory, as far as its boot number is concerned."""
    rnd = random.Random(seed)
    endpoint = cluster.network.endpoint(f"chunks{seed}")
    env = Env(cluster.clock, disk, endpoint, SimProcesses(rnd), rnd)
    keeper = cluster.machines[1].keeper
    boot = kind(env, keeper().node(101), keeper, next_boot(disk))
    while await boot.tell():
        pass
    return boot


class NeverLater(ChunkBoot):
    def rule_later(self, boot, nonce):
        return False


async def test_the_older_of_two_processes_stops():
    async def body(cluster):
        disk = SimDisk(random.Random(2))
        first = await started(cluster, disk)
        assert first.started
        other = copy.deepcopy(disk)
        second = await started(cluster, other, seed=3)
        assert second.boot > first.boot
        with pytest.raises(Usurped, match="another process was started as the same server"):
            await first.tell()
        assert not await second.tell()

    await run_cluster(body)


@pytest.mark.parametrize(("kind", "noticed"), [(ChunkBoot, True), (NeverLater, False)])
async def test_a_restored_directory_takes_a_new_number_and_ends_the_other(kind, noticed):
    async def body(cluster):
        disk = SimDisk(random.Random(2))
        old = copy.deepcopy(disk)
        for _ in range(3):
            running = await started(cluster, disk, kind)
            assert not await running.tell()
        restored = await started(cluster, old, kind, seed=4)
        assert restored.started
        assert (restored.boot == running.boot + 1) == noticed
        if noticed:
            assert next_boot(old) == restored.boot + 1
            with pytest.raises(Usurped):
                await running.tell()
        else:
            assert not await running.tell()

    await run_cluster(body)


async def test_without_metadata_nodes_it_goes_on_and_tells_later():
    async def body(cluster):
        for machine in cluster.machines.values():
            machine.crash()
        boot = await started(cluster, SimDisk(random.Random(2)))
        assert not boot.started
        for machine in cluster.machines.values():
            await machine.start()
        assert not await boot.tell()
        assert boot.started

    await run_cluster(body)
