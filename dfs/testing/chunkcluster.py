"""A few chunkservers in one process: on simulated disks and a simulated network, with crashes."""

from collections.abc import Callable
from random import Random
from typing import Any

import trio

from chunkserver.segments import StoreOptions
from chunkserver.service import ChunkNode
from dfs.client.chunkio import ChunkClient
from dfs.clock import Clock
from dfs.cluster.map import ClusterMap, Node, Params
from dfs.env import Env
from dfs.testing.disk import UNLIMITED, SimDisk
from dfs.testing.network import SimNetwork
from dfs.testing.processes import SimProcesses

SALT = b"sixteen byte id!"


class SimClock:
    """The virtual clock, with a wall clock that follows it."""

    def monotonic(self) -> float:
        """Virtual seconds."""
        return trio.current_time()

    def elapsed_ns(self) -> int:
        """The same in nanoseconds; nothing is ever suspended."""
        return 1 + int(trio.current_time() * 1e9)

    def time_ns(self) -> int:
        """Virtual nanoseconds since 2020, roughly."""
        return 1_600_000_000_000_000_000 + int(trio.current_time() * 1e9)


async def inline(fn: Callable[..., Any], *args: Any) -> Any:
    """An `offload` without threads."""
    return fn(*args)


def cluster_map(count: int, *, n: int = 3, w: int = 2) -> ClusterMap:
    """A map of `count` nodes, each in a zone of its own."""
    nodes = tuple(
        Node(
            number=i,
            node_id=bytes([i]) * 16,
            name=f"n{i}",
            zone=f"z{i}",
            rack="r",
            host=f"h{i}",
            metadata_addr=f"tcp://10.0.0.{i}:7401",
            chunk_addr=f"tcp://10.0.0.{i}:7402",
            metadata_weight=1.0,
            chunk_weight=1.0,
        )
        for i in range(1, count + 1)
    )
    return ClusterMap.create(b"c" * 16, nodes, params=Params(n=n, w=w, r=n + 1 - w, pw=w))


class ChunkCluster:
    """Chunkservers that can be started, crashed and restarted; use `nursery` for all of it."""

    def __init__(
        self,
        random: Random,
        network: SimNetwork,
        clock: Clock,
        nursery: trio.Nursery,
        count: int,
        *,
        options: StoreOptions | None = None,
        capacity: int = UNLIMITED,
        node_class: type[ChunkNode] = ChunkNode,
        n: int = 3,
        w: int = 2,
    ) -> None:
        """Make disks and a map; nothing runs yet."""
        self.random = random
        self.network = network
        self.clock = clock
        self.nursery = nursery
        self.map = cluster_map(count, n=n, w=w)
        self.disks = {i: SimDisk(random, capacity=capacity) for i in range(1, count + 1)}
        self.nodes: dict[int, ChunkNode] = {}
        self.node_class = node_class
        self.options = options or StoreOptions(segment_size=1 << 20, reserve=0, hint_every=1 << 16)
        self._scopes: dict[int, trio.CancelScope] = {}

    def map_source(self, number: int, env: Env) -> Callable[[], ClusterMap]:
        """Where a node has its map from."""
        return lambda: self.map

    async def start(self, number: int) -> ChunkNode:
        """Start (or restart) a node on its disk; returns when it serves."""
        env = Env(
            clock=self.clock,
            disk=self.disks[number],
            rpc=self.network.endpoint(f"n{number}"),
            processes=SimProcesses(self.random),
            random=self.random,
        )
        node = self.node_class(env, number, self.map_source(number, env), options=self.options)
        await self.nursery.start(self._run, node, number)
        self.nodes[number] = node
        return node

    async def _run(
        self, node: ChunkNode, number: int, *, task_status: trio.TaskStatus[str]
    ) -> None:
        with trio.CancelScope() as scope:
            self._scopes[number] = scope
            await node.run(f"tcp://10.0.0.{number}:7402", task_status=task_status)

    async def start_all(self) -> None:
        """Start every node."""
        for number in self.disks:
            await self.start(number)

    def crash(self, number: int) -> None:
        """Power loss: connections, memory and un-synced bytes are gone."""
        node = self.nodes.pop(number, None)
        if node is None:
            return
        self.disks[number].crash()
        self.network.endpoint(f"n{number}").close()
        self._scopes.pop(number).cancel()

    async def stop(self, number: int) -> None:
        """Stop cleanly."""
        self.nodes.pop(number)
        self._scopes.pop(number).cancel()
        await trio.sleep(1)

    def client(
        self, name: str = "client", *, client_class: type[ChunkClient] = ChunkClient
    ) -> ChunkClient:
        """A client with an endpoint of its own."""
        return client_class(
            self.network.endpoint(name),
            lambda: self.map,
            self.clock,
            salt=SALT,
            random=self.random,
            offload=inline,
            machine=b"",
        )
