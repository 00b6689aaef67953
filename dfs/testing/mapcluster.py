"""Metadata nodes whose cluster map changes while they run, on simulated network and disks.

Chunks have nodes of their own numbers in the map that never change and are never started, so that
their side of a transition has nothing to do.
"""

from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, cast

import trio

from dfs.clock import Clock, SystemClock
from dfs.cluster.map import ClusterMap, Node
from dfs.errors import DfsError, StaleEpoch
from dfs.rpc.blobs import BlobClient
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.homemodel import Violation
from dfs.testing.network import SimEndpoint, SimNetwork
from dfs.testing.simhost import SimHost
from dfs.volume import entries
from metadata.checkpoint import inline_folder
from metadata.journals import Journal, JournalHost
from metadata.journalstate import State
from metadata.service import MetadataNode

if TYPE_CHECKING:
    from collections.abc import Callable

CLUSTER_ID = b"maps that change"
SALT = b"salt of volumes."


def member(number: int) -> Node:
    """The metadata node of that number."""
    return Node(
        number=number,
        node_id=number.to_bytes(16, "big"),
        name=f"node{number}",
        zone=f"z{number}",
        rack="r",
        host=f"node{number}",
        metadata_addr=f"tcp://node{number}:1",
        chunk_addr="",
    )


def _chunks(number: int) -> Node:
    address = f"tcp://chunks{number}:1"
    return Node(number, b"chunks" + bytes([number]) * 10, f"chunks{number}", "z", "r",
                f"chunks{number}", "", address)  # fmt: skip


@cache
def first_map(count: int) -> ClusterMap:
    """The map of metadata nodes 1 to `count`."""
    nodes = [member(n) for n in range(1, count + 1)]
    return ClusterMap.create(CLUSTER_ID, [*nodes, *(_chunks(n) for n in (101, 102, 103))])


class _Watched(Journal):
    """Reports each entry at the moment it is chosen here."""

    def __init__(self, host: "JournalHost", volume: bytes, state: State) -> None:
        super().__init__(host, volume, state)
        watch = cast("_WatchedHost", host).watch
        self.subscribe(lambda seq, payload: watch(volume, seq, payload))


class _WatchedHost(JournalHost):
    journal_class: type[Journal] = _Watched

    def watch(self, volume: bytes, seq: int, payload: bytes) -> None:
        raise NotImplementedError


class Machine(SimHost):
    """One metadata node of a `MapCluster`, and the map it keeps."""

    node_class: type[MetadataNode] = MetadataNode
    keeper_class: type[MapKeeper] = MapKeeper

    def __init__(self, cluster: "MapCluster", number: int, initial: ClusterMap) -> None:
        """Formatted with `initial`, not started."""
        super().__init__(cluster, number)
        self.cluster = cluster
        self.disk.write_atomic("map", initial.encode())
        self.keeper: MapKeeper | None = None
        self.error: BaseException | None = None

    async def start(self) -> None:
        """Start on whatever the disk holds; returns when it listens, or has refused to."""
        cluster = self.cluster
        file = self.disk.open("map")
        initial = ClusterMap.decode(file.pread(file.size(), 0))
        file.close()
        env, endpoint = self.make_env()
        self.keeper = keeper = self.keeper_class(
            initial,
            save=lambda data: self.disk.write_atomic("map", data),
            rpc=endpoint,
            clock=cluster.clock,
            random=env.random,
            own=self.address,
        )
        keeper.subscribe(lambda _old, new: cluster.observe_map(new, self.number))
        cluster.observe_map(initial, self.number)
        folder = inline_folder(BlobClient(endpoint, keeper, cluster.clock))
        self.node = node = self.node_class(env, self.number, keeper, folder=folder)
        observe = staticmethod(cluster.observe_entry)
        node.journals_class = type("_Host", (_WatchedHost,), {"watch": observe})
        await cluster.nursery.start(self._run, node, keeper, self._scope)

    async def _run(
        self,
        node: MetadataNode,
        keeper: MapKeeper,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        started = False

        def serving(_address: str) -> None:
            nonlocal started
            started = True
            task_status.started()

        class _Status:
            started = staticmethod(serving)

        self.error = None
        with scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keeper.poll)
                    await node.run(self.address, task_status=_Status())  # type: ignore[arg-type]  # all it needs of one
            except* DfsError as group:
                self.error = group
        if not scope.cancelled_caught:
            self.node = None
            if self.endpoint is not None:
                self.endpoint.close()
        if not started:
            task_status.started()


class MapCluster:
    """The machines by number, and what was observed: one chain of maps, one of each journal."""

    machine_class: type[Machine] = Machine

    def __init__(
        self, seed: int, network: SimNetwork, nursery: trio.Nursery, *, nodes: int = 3
    ) -> None:
        """Nothing runs before `start`."""
        self.random = Random(seed)
        self.network = network
        self.nursery = nursery
        self.clock: Clock = SystemClock()
        self.maps: dict[int, ClusterMap] = {}
        self.on_map: Callable[[ClusterMap], None] = lambda _new: None  # a map is seen first
        self.entries: dict[bytes, dict[int, bytes]] = {}
        initial = first_map(nodes)
        self.machines = {n: self.machine_class(self, n, initial) for n in range(1, nodes + 1)}

    async def start(self) -> None:
        """Start all machines."""
        for machine in self.machines.values():
            await machine.start()

    async def add_machine(self, number: int) -> Machine:
        """Format and start a machine of the newest map, which must have it."""
        machine = self.machines[number] = self.machine_class(self, number, self.newest)
        await machine.start()
        return machine

    @property
    def newest(self) -> ClusterMap:
        """The newest map that any machine has had."""
        return self.maps[max(self.maps)]

    def observe_map(self, new: ClusterMap, number: int) -> None:
        """A machine has this map now; raises `Violation` if another has one of that epoch."""
        if new.epoch not in self.maps:
            self.on_map(new)
        known = self.maps.setdefault(new.epoch, new)
        if known != new:
            raise Violation(f"node {number} has another map of epoch {new.epoch}")

    def observe_entry(self, volume: bytes, seq: int, payload: bytes) -> None:
        """An entry was chosen; raises `Violation` if another was."""
        if self.entries.setdefault(volume, {}).setdefault(seq, payload) != payload:
            raise Violation(f"two entries {seq} of volume {volume!r} were chosen")

    def live(self) -> list[Machine]:
        """Machines that run."""
        return [m for m in self.machines.values() if m.up]

    async def create(self, volume: bytes, client: SimEndpoint) -> None:
        """Make a volume at all its homes."""
        current = self.newest
        params = {"salt": SALT, "name": "test"}
        entry = entries.encode(entries.GENESIS, 1, params, 1, current.volume_homes(volume))
        for home in current.volume_homes(volume):
            address = current.address("metadata", home)
            await client.call(
                address, "jrnl.genesis", (volume, entry), timeout=60, epoch=current.epoch
            )

    async def propose(self, client: SimEndpoint, new: ClusterMap, *, within: float = 60.0) -> bool:
        """Have a map chosen; False if another one was first."""
        deadline = self.clock.monotonic() + within
        while True:
            machines = self.live()
            machine = machines[self.random.randrange(len(machines))]
            try:
                await client.call(
                    machine.address,
                    "map.propose",
                    (new.epoch - 1, new.encode(), "test"),
                    timeout=5,
                )
            except StaleEpoch as e:
                newest = ClusterMap.decode(e.details[0])
                return newest.epoch > new.epoch or newest == new
            except DfsError:
                if self.clock.monotonic() > deadline:
                    raise
                await trio.sleep(0.2)
            else:
                return True
