"""Metadata nodes on a simulated network and simulated disks, for tests of volume homes."""

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import trio

from dfs.clock import Clock, SystemClock
from dfs.cluster.map import METADATA, ClusterMap, Node
from dfs.codec import pack
from dfs.errors import DfsError
from dfs.rpc.blobs import BlobClient
from dfs.testing.network import SimNetwork
from dfs.testing.simhost import SimHost
from dfs.volume import entries
from metadata.checkpoint import inline_folder
from metadata.service import MetadataNode
from metadata.volumehome import Folder

CLUSTER_ID = b"homes of volumes"
SALT = b"salt of volumes."
Hook = Callable[["SimNode"], None]


@cache
def _map_of(nodes: int) -> ClusterMap:
    """The map of nodes 1, 2, ...; placing all partitions takes a while, so it is made once."""
    return ClusterMap.create(
        CLUSTER_ID,
        [
            Node(
                number=number,
                node_id=number.to_bytes(16, "big"),
                name=f"node{number}",
                zone=f"z{number}",
                rack="r",
                host=f"node{number}",
                metadata_addr=f"tcp://node{number}:1",
                chunk_addr=f"tcp://chunks{number}:1",
            )
            for number in range(1, nodes + 1)
        ],
    )


class SimNode(SimHost):
    """One metadata node of a `HomeCluster`."""

    def __init__(self, cluster: "HomeCluster", number: int) -> None:
        """Not started."""
        super().__init__(cluster, number)
        self.cluster = cluster

    async def start(self) -> None:
        """Start on whatever the disk holds."""
        cluster = self.cluster
        env, endpoint = self.make_env()
        folder = cluster.folder or inline_folder(BlobClient(endpoint, cluster.map, cluster.clock))
        self.node = MetadataNode(env, self.number, cluster.map, folder=folder)
        await cluster.nursery.start(self._run, self.node, self._scope)
        if cluster.hook is not None:
            cluster.hook(self)

    async def _run(
        self,
        node: MetadataNode,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            await node.run(self.address, task_status=task_status)


class HomeCluster:
    """Some metadata nodes, all of them homes of everything when there are three."""

    def __init__(
        self,
        seed: int,
        network: SimNetwork,
        nursery: trio.Nursery,
        *,
        nodes: int = 3,
        hook: Hook | None = None,
        folder: Folder | None = None,
    ) -> None:
        """Nothing runs before `start`; `hook` sees every node that was started."""
        self.random = Random(seed)
        self.network = network
        self.nursery = nursery
        self.clock: Clock = SystemClock()
        self.hook = hook
        self.folder = folder
        self.nodes = {number: SimNode(self, number) for number in range(1, nodes + 1)}
        self._map = _map_of(nodes)

    def map(self) -> ClusterMap:
        """The cluster map."""
        return self._map

    async def start(self) -> None:
        """Start all nodes."""
        for node in self.nodes.values():
            await node.start()

    def genesis(self, volume: bytes) -> bytes:
        """Genesis entry of a volume."""
        params = {"salt": SALT, "name": "test"}
        return entries.encode(entries.GENESIS, 1, params, 1, self._map.volume_homes(volume))

    async def create(self, volume: bytes) -> None:
        """Make a volume at a majority of its homes."""
        for node in self.nodes.values():
            if node.node is not None:
                await node.node.journals.create(volume, self.genesis(volume), timeout=5)
                return

    def owners(self, volume: bytes) -> list[int]:
        """Nodes that believe that they own the volume's journal."""
        found = []
        for node in self.nodes.values():
            journal = node.node.journals.get(volume) if node.node is not None else None
            if journal is not None and journal.owned:
                found.append(node.number)
        return found


class HomeClient:
    """A raw client of `vol.*`: one endpoint and the homes in some order."""

    def __init__(self, cluster: HomeCluster, name: str) -> None:
        """No session yet."""
        self.cluster = cluster
        self.name = name
        self.endpoint = cluster.network.endpoint(name)

    async def call(
        self, number: int, method: str, *args: Any, timeout: float = 2.0
    ) -> tuple[Any, ...]:
        """Ask one node."""
        address = self.cluster.map().address(METADATA, number)
        result: tuple[Any, ...]
        result, _ = await self.endpoint.call(address, method, args, timeout=timeout)
        return result

    async def ask(self, method: str, volume: bytes, *args: Any, within: float = 30.0) -> Any:
        """Ask the homes, one after the other and again, until one answers with an outcome."""
        clock, homes = self.cluster.clock, self.cluster.map().volume_homes(volume)
        deadline = clock.monotonic() + within
        turn = 0
        while True:
            try:
                return await self.call(homes[turn % len(homes)], method, volume, *args)
            except DfsError as e:
                if type(e).__name__ not in TRANSIENT or clock.monotonic() > deadline:
                    raise
            turn += 1
            await trio.sleep(0.05)


TRANSIENT = ("Unreachable", "DeadlineExceeded", "Busy", "NoQuorum", "NotHome", "StaleEpoch")


def nonce(*parts: Any) -> bytes:
    """16 bytes that are different for different parts."""
    return pack(parts).ljust(16, b"\0")[:16]
