"""What a client asks the cluster about itself now and then: a newer map, and free space.

Space runs out in two ways.  File data needs W chunkservers with room; names, attributes and small
files need a majority of the volume's homes whose disks are not at their limit (`dfs.limits`).  What
is left below the limit is for what gives space back, so a client that sees too few of them stops
adding (`FileSystem.refuse`): a write then fails before it is acknowledged, while deleting, renaming
and committing what was acknowledged go on.  That ends when not a byte is left for the homes'
journals (`stalled_by_disks`).  A server that does not answer counts as one with room; it is not
known to be full.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import trio

from dfs.client.connect import Cluster
from dfs.cluster.map import CHUNK, METADATA, ClusterMap
from dfs.cluster.node import Node
from dfs.env import Priority
from dfs.errors import DfsError
from dfs.limits import Level

log = logging.getLogger(__name__)

MAP_INTERVAL = 5.0  # seconds between looks for a newer map
SPACE_INTERVAL = 30.0
NEAR_INTERVAL = 1.0  # the same while a disk is near its limit
TIMEOUT = 5.0
STALL_TIMEOUT = 0.5  # seconds that homes are given to say whether they can write
ENOUGH = 4 << 20  # bytes: a chunkserver with less room may refuse the next chunk

Refuse = Callable[[str, str], None]  # (why nothing is added, why no file data is; "": it is)
Statuses = dict[tuple[str, int], dict[str, Any]]  # (role, node number) -> `node.status`


class ClusterWatch:
    """Follows a cluster's map and capacity; `capacity()` is what `statfs` shows."""

    def __init__(self, cluster: Cluster) -> None:
        """Know nothing yet."""
        self._cluster = cluster
        self._statuses: Statuses = {}
        self._told: tuple[str, str] = ("", "")
        self._volume = b""
        self._refuse: Refuse = lambda _all, _data: None
        self._looked = trio.Event()

    def capacity(self) -> tuple[int, int]:
        """(total, free) bytes for file data, copies accounted for; zeros if nobody said yet.

        What a server keeps free for itself is no client's, so it is left out of both.
        """
        total = free = 0
        for (role, _), status in self._statuses.items():
            if role == CHUNK:
                unused = int(status.get("disk_free", 0))
                room = int(status.get("disk_room", unused))
                total += status.get("disk_total", 0) - unused + room
                free += room
        copies = max(1, self._cluster.get_map().n)
        return total // copies, free // copies

    def tell(self, volume: bytes, refuse: Refuse) -> None:
        """Call `refuse` whenever it changes whether the volume, or file data, may grow."""
        self._volume, self._refuse = volume, refuse
        if self._statuses:
            self._judge(self._cluster.get_map())

    async def wait_looked(self) -> None:
        """Until the servers that answer were asked for their space for the first time."""
        await self._looked.wait()

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
        """Look at the disks of the servers that answer; more often when one is nearly full."""
        while True:
            found: Statuses = {}
            known = self._cluster.get_map()
            async with trio.open_nursery() as nursery:
                for node in known.nodes:
                    for role in (CHUNK, METADATA):
                        nursery.start_soon(self._look, known, node, role, found)
            self._statuses = found
            self._judge(known)
            self._looked.set()
            near = {s.get("disk_level", Level.OK.label) for s in found.values()} - {Level.OK.label}
            await trio.sleep(NEAR_INTERVAL if near else SPACE_INTERVAL)

    async def _look(self, known: ClusterMap, node: Node, role: str, found: Statuses) -> None:
        if node.chunk_addr if role == CHUNK else node.metadata_addr:
            await _look(self._cluster, known, node, role, found, TIMEOUT)

    def _judge(self, known: ClusterMap) -> None:
        """Tell when it has changed whether things may be added."""
        if not self._volume:
            return
        homes = known.volume_homes(self._volume)
        servers = [n.number for n in known.nodes if n.chunk_addr]
        told = (
            self._full(known, METADATA, homes, len(homes) // 2 + 1),
            self._full(known, CHUNK, servers, min(known.w, len(servers))),
        )
        if told != self._told:
            for why in told:
                if why:
                    log.warning("%s", why)
            if not any(told):
                log.warning("there is space again")
            self._told = told
            self._refuse(*told)

    def _full(self, known: ClusterMap, role: str, numbers: Iterable[int], wanted: int) -> str:
        """Why too few of some servers have room, "" if enough have."""
        numbers = list(numbers)
        full = [n for n in numbers if is_full(role, self._statuses.get((role, n), {}))]
        if len(numbers) - len(full) >= wanted:
            return ""
        names = ", ".join(
            f"{known.node(n).name} {self._statuses[role, n].get('disk_path', '')}".strip()
            for n in full
        )
        what = "chunkservers" if role == CHUNK else "metadata nodes of the volume"
        return (
            f"{len(numbers) - len(full)} of {len(numbers)} {what} have room and {wanted} must;"
            f" disk full: {names}; delete data or add capacity (`dfs cluster status`)"
        )


async def _look(
    cluster: Cluster, known: ClusterMap, node: Node, role: str, found: Statuses, timeout: float
) -> None:
    """Put what a server says of itself into `found`, if it answers."""
    try:
        (status,), _ = await cluster.rpc.call(
            known.address(role, node.number),
            "node.status",
            timeout=timeout,
            priority=Priority.BACKGROUND,
        )
    except DfsError as e:
        log.debug("node %s does not tell its space: %s", node.name, e)
    else:
        found[role, node.number] = status


async def stalled_by_disks(cluster: Cluster, volume: bytes) -> str:
    """Why no majority of the volume's homes can write an entry to its disk, "" if one can.

    Only what the homes say themselves counts, so "" when they do not answer.
    """
    known = cluster.get_map()
    homes = known.volume_homes(volume)
    found: Statuses = {}
    async with trio.open_nursery() as nursery:
        for number in homes:
            nursery.start_soon(
                _look, cluster, known, known.node(number), METADATA, found, STALL_TIMEOUT
            )
    full = [n for n in homes if found.get((METADATA, n), {}).get("journals_full")]
    if len(homes) - len(full) > len(homes) // 2:
        return ""
    names = ", ".join(
        f"{known.node(n).name} {found[METADATA, n].get('disk_path', '')}".strip() for n in full
    )
    return (
        f"{len(full)} of {len(homes)} metadata nodes of the volume can write nothing, their disks"
        f" have no room: {names}; make room there (`dfs cluster status`), then it goes on"
    )


def is_full(role: str, status: dict[str, Any]) -> bool:
    """Whether a server that says this of itself takes nothing from clients, or hardly anything."""
    if role == CHUNK and status.get("disk_room", ENOUGH) < ENOUGH:
        return True
    return bool(status.get("disk_level") == Level.FULL.label)
