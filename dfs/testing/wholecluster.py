"""A whole cluster in one process: metadata nodes, chunkservers and file-system clients.

Everything is the production code on simulated disks, network and clock; only sockets, files,
processes and threads are replaced.  A *machine* is a metadata node and a chunkserver that lose
power together, each on a disk of its own.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from chunkserver.segments import StoreOptions
from chunkserver.service import ChunkNode
from dfs.client.chunkio import ChunkClient
from dfs.client.connect import Cluster
from dfs.client.filesystem import FileSystem, open_filesystem
from dfs.client.registry import create_volume, open_volume_by_name
from dfs.client.session import Session
from dfs.cluster.map import CHUNK, METADATA, ClusterMap
from dfs.env import Env
from dfs.ids import SYSTEM_VOLUME
from dfs.rpc.blobs import BlobClient
from dfs.testing.chunkcluster import SimClock, cluster_map, inline
from dfs.testing.disk import SimDisk
from dfs.testing.network import SimEndpoint, SimNetwork
from dfs.testing.processes import SimProcesses
from dfs.volume import entries
from metadata.checkpoint import inline_folder
from metadata.service import MetadataNode

if TYPE_CHECKING:
    from metadata.volumehome import Folder

SEGMENT_SIZE = 1 << 20  # bytes; small, so that segments are sealed while a scenario runs


whole_map = cache(cluster_map)


class Machine:
    """A metadata node and a chunkserver: their disks, and their present run."""

    def __init__(self, world: "World", number: int) -> None:
        """Not started."""
        self.world = world
        self.number = number
        self.disks = {role: SimDisk(Random(world.random.random())) for role in (METADATA, CHUNK)}
        self.up = False
        self._scopes: list[trio.CancelScope] = []
        self._endpoints: list[SimEndpoint] = []

    def names(self) -> tuple[str, str]:
        """Endpoint names, for partitions of the network."""
        return f"m{self.number}", f"c{self.number}"

    async def start(self) -> None:
        """Start both processes on whatever their disks hold."""
        world = self.world
        self.up = True
        self._scopes, self._endpoints = [], []
        for role, name in zip((METADATA, CHUNK), self.names(), strict=True):
            endpoint = world.network.endpoint(name)
            self._endpoints.append(endpoint)
            random = Random(world.random.random())
            env = Env(world.clock, self.disks[role], endpoint, SimProcesses(random), random)
            service: Any
            if role == METADATA:
                blobs = BlobClient(endpoint, world.get_map, world.clock)
                folder = world.wrap_folder(inline_folder(blobs))
                service = MetadataNode(env, self.number, world.get_map, folder=folder)
            else:
                options = StoreOptions(segment_size=SEGMENT_SIZE, reserve=0, hint_every=1 << 16)
                service = world.chunk_node(env, self.number, world.get_map, options=options)
            scope = trio.CancelScope()
            self._scopes.append(scope)
            await world.nursery.start(_run, service, world.map.address(role, self.number), scope)

    def crash(self) -> None:
        """Lose power: memory, connections and un-synced bytes are gone."""
        if not self.up:
            return
        self.up = False
        for endpoint in self._endpoints:
            endpoint.close()
        for disk in self.disks.values():
            disk.crash()
        for scope in self._scopes:
            scope.cancel()


async def _run(
    service: Any,
    address: str,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    with scope:
        await service.run(address, task_status=task_status)


class World:
    """Machines, clients and the network between them; build by `make_world`."""

    def __init__(
        self, random: Random, network: SimNetwork, nursery: trio.Nursery, machines: int = 3
    ) -> None:
        """Machines that are not started."""
        self.random = random
        self.network = network
        self.nursery = nursery
        self.clock = SimClock()
        self.map = whole_map(machines)
        self.chunk_node: type[ChunkNode] = ChunkNode
        self.chunk_client: type[ChunkClient] = ChunkClient
        self.wrap_folder: Callable[[Folder], Folder] = lambda folder: folder
        self.damaged = 0  # number of the machine whose files were damaged, 0 = none
        self.machines = [Machine(self, i) for i in range(1, machines + 1)]

    def get_map(self) -> ClusterMap:
        """The one map."""
        return self.map

    async def start(self) -> None:
        """Start all machines and give the cluster its system volume."""
        for machine in self.machines:
            await machine.start()
        params = {"salt": b"system volume ..", "n": 3, "w": 2}
        homes = tuple(sorted(self.map.volume_homes(SYSTEM_VOLUME)))
        genesis = entries.encode(entries.GENESIS, 1, params, 1, homes)
        operator = self.network.endpoint("operator")
        for home in homes:
            address = self.map.address(METADATA, home)
            await operator.call(address, "jrnl.genesis", (SYSTEM_VOLUME, genesis), timeout=30)

    def connect(self, name: str) -> Cluster:
        """A client's connection; a second one of the same name replaces the first."""
        endpoint = self.network.endpoint(name)
        blobs = BlobClient(endpoint, self.get_map, self.clock)
        random = Random(self.random.random())
        return Cluster(endpoint, self.get_map, blobs, self.clock, random)

    async def create_volume(self, name: str) -> None:
        """Make a volume."""
        await create_volume(self.connect("operator"), name)

    @contextlib.asynccontextmanager
    async def filesystem(self, cluster: Cluster, volume: str) -> AsyncIterator[FileSystem]:
        """A mounted file system without the mount."""
        info = await open_volume_by_name(cluster, volume)

        def chunks(session: Session) -> ChunkClient:
            return self.chunk_client(
                cluster.rpc,
                cluster.get_map,
                self.clock,
                salt=session.params["salt"],
                random=cluster.random,
                offload=inline,
            )

        async with open_filesystem(cluster, info.volume_id, chunks, warm=True) as fs:
            yield fs


@contextlib.asynccontextmanager
async def make_world(random: Random, **network_options: Any) -> AsyncIterator[World]:
    """A started world for the length of the block."""
    async with (
        SimNetwork(random, SimClock(), **network_options) as network,
        trio.open_nursery() as nursery,
    ):
        world = World(random, network, nursery)
        await world.start()
        yield world
        nursery.cancel_scope.cancel()
