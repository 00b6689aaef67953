"""What a client asks the cluster about itself now and then: a newer map, and free space."""

import logging

import trio

from dfs.client.connect import Cluster
from dfs.cluster.map import CHUNK, METADATA
from dfs.env import Priority
from dfs.errors import DfsError

log = logging.getLogger(__name__)

MAP_INTERVAL = 5.0  # seconds between looks for a newer map
SPACE_INTERVAL = 30.0
TIMEOUT = 5.0


class ClusterWatch:
    """Follows a cluster's map and capacity; `capacity()` is what `statfs` shows."""

    def __init__(self, cluster: Cluster) -> None:
        """Know nothing yet."""
        self._cluster = cluster
        self._total = 0
        self._free = 0

    def capacity(self) -> tuple[int, int]:
        """(total, free) bytes for file data, copies accounted for; zeros if nobody said yet."""
        return self._total, self._free

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_map)
            nursery.start_soon(self._follow_space)

    async def _follow_map(self) -> None:
        """Ask one node after the other for its epoch; fetch the map when it is newer."""
        turn = 0
        while True:
            await trio.sleep(MAP_INTERVAL)
            known = self._cluster.get_map()
            nodes = [n.number for n in known.nodes if n.metadata_addr]
            turn += 1
            address = known.address(METADATA, nodes[turn % len(nodes)])
            try:
                (_, _, _, epoch), _ = await self._cluster.rpc.call(address, "ping", timeout=TIMEOUT)
                if epoch > known.epoch:
                    await self._cluster.refresh_map(address)
            except DfsError as e:
                log.debug("no answer to a look for a newer map: %s", e)

    async def _follow_space(self) -> None:
        """Add up the disks of the chunkservers that answer."""
        while True:
            known = self._cluster.get_map()
            total = free = 0
            for node in known.nodes:
                if not node.chunk_addr:
                    continue
                try:
                    (status,), _ = await self._cluster.rpc.call(
                        known.address(CHUNK, node.number),
                        "node.status",
                        timeout=TIMEOUT,
                        priority=Priority.BACKGROUND,
                    )
                except DfsError as e:
                    log.debug("node %s does not tell its space: %s", node.name, e)
                else:
                    total += status.get("disk_total", 0)
                    free += status.get("disk_free", 0)
            copies = max(1, known.n)
            self._total, self._free = total // copies, free // copies
            await trio.sleep(SPACE_INTERVAL)
