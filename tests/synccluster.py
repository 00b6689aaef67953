"""Three nodes of stores, writers and workers over a simulated network, for tests of the workers."""

from random import Random

import trio

from dfs.clock import SystemClock
from dfs.cluster.map import METADATA
from dfs.env import Env
from dfs.testing.disk import SimDisk
from dfs.testing.network import SimNetwork
from dfs.testing.processes import SimProcesses
from dfs.testing.sync_maps import first_map
from dfs.testing.sync_nodes import key_row
from metadata import versions
from metadata.merkle import TABLES
from metadata.registers import MINT, Registers
from metadata.repair import OWN
from metadata.replica import Replica
from metadata.store.engine import Store
from metadata.store.options import StoreOptions
from metadata.synchronise import Synchroniser
from metadata.syncworkers import workers


class Clock(SystemClock):
    """Wall time that follows virtual time, from 2024 on."""

    def time_ns(self):
        return 1_704_067_200_000_000_000 + int(trio.current_time() * 1e9)


class Node:
    def __init__(self, cluster, number):
        self.cluster = cluster
        self.number = number
        random = Random(number)
        self.disk = SimDisk(random, sync_delay=0.001)
        self.scope = trio.CancelScope()

    async def start(self, *, task_status=trio.TASK_STATUS_IGNORED):
        cluster, number = self.cluster, self.number
        random = Random(number)
        self.endpoint = cluster.network.endpoint(f"n{number}")
        self.env = Env(Clock(), self.disk, self.endpoint, SimProcesses(random), random)
        self.store = await Store.open(self.env, options=cluster.options)
        self.sync = Synchroniser(
            self.env, number, lambda: cluster.map, self.store, alive=lambda n: n not in cluster.down
        )
        self.sync.load()
        self.registers = registers = Registers(
            self.store,
            number,
            cluster.map,
            digests=self.sync.digests,
            hints=self.sync.keeper,
            waiting=self.sync.pull_first.waiting,
        )
        self.sync.writer = self.writer = Replica(registers, self.store, self.env.clock)
        self.scope = trio.CancelScope()

        def renamed():
            registers.actors.renew()
            yield from ()

        self.workers = workers(self.env, self.sync, renamed)
        self.antientropy, self.hints, self.purge, self.check, self.repair = self.workers
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.writer.run)
                nursery.start_soon(self.store.run)
                await self.sync.start()
                address = cluster.map.address(METADATA, number)
                await nursery.start(self._serve, address)
                task_status.started()

    async def _serve(self, address, *, task_status):
        handlers = {**self.sync.handlers(), **self.sync.blobs.handlers()}
        await self.endpoint.serve(address, handlers, started=task_status.started)

    def crash(self):
        self.scope.cancel()
        self.endpoint.close()
        self.disk.crash()

    async def put(self, name, value=b"v"):
        row = key_row(name)
        ((register, _, _),) = await self.writer.write([(MINT, row, b"", value)])
        return row, register

    async def delete(self, name):
        row = key_row(name)
        context = versions.encode_context(versions.decode(self.store.get(row))[0])
        ((register, _, _),) = await self.writer.write([(MINT, row, context, None)])
        return row, register

    def totals(self):
        return [self.sync.digests.totals(t, range(4096)) for t in TABLES]

    def own(self):
        """Rows that no other node has, but for those that each start changes."""
        return {k: v for c in OWN for k, v in self.store.scan(bytes((c,))) if k[:5] != b"nhlc"}

    def rows(self):
        found = {}
        for prefix in (b"r", b"b"):
            after = b""
            while page := self.store.scan(prefix, after):
                found.update(page)
                after = page[-1][0]
        return found


class Cluster:
    def __init__(self, nursery, cluster_map=None):
        self.nursery = nursery
        self.map = cluster_map or first_map(3)
        self.network = SimNetwork(Random(1), Clock())
        nursery.start_soon(self.network.run)
        self.down = set()
        self.options = StoreOptions(own=OWN)
        self.nodes = {n.number: Node(self, n.number) for n in self.map.nodes}

    async def start(self):
        for node in self.nodes.values():
            await self.nursery.start(node.start)
            await node.check.run_once()
        return self.nodes.values()

    async def move(self, new):
        """All nodes learn of a newer map."""
        old, self.map = self.map, new
        for node in self.nodes.values():
            node.registers.follow(new)
            node.sync.map_changed(old, new)
            await node.sync.settle_marks()
