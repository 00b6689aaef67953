"""Talking to the daemons of a cluster without being a client of its volumes."""

import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from random import SystemRandom
from typing import Any

import trio

from dfs.cli.client import connected
from dfs.cli.diagnosis import grouped, reason
from dfs.cli.local import ClusterDir
from dfs.client.connect import Cluster
from dfs.clock import SystemClock
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap, Node
from dfs.env import Priority, Rpc
from dfs.errors import DfsError, NoQuorum, NotFound, Unreachable, WrongCluster
from dfs.hashing import digest_parts
from dfs.ids import SYSTEM_VOLUME
from dfs.rpc.blobs import BlobClient
from dfs.rpc.endpoint import RpcEndpoint
from dfs.volume.entries import GENESIS, encode

PING_TIMEOUT = 2.0  # seconds
_AGAIN = 0.05  # seconds between attempts to reach a starting daemon


@contextlib.asynccontextmanager
async def endpoint(cluster: ClusterMap) -> AsyncIterator[Rpc]:
    """An RPC endpoint of the cluster for the length of the block."""
    rpc = RpcEndpoint(
        cluster_id=cluster.cluster_id,
        name="dfs",
        clock=SystemClock(),
        random=SystemRandom(),
        epoch=lambda: cluster.epoch,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        yield rpc
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def reach(file: Path) -> AsyncIterator[Cluster]:
    """The cluster of a cluster file.

    The map is the one in the file's directory if there is one, so that a cluster can be looked at
    while nobody answers; else it is asked from the seeds, which raises `Unreachable`.
    """
    directory = ClusterDir.of_file(file)
    if not directory.has_map():
        async with connected(file) as client:
            yield client
        return
    known = directory.load_map()
    async with endpoint(known) as rpc:
        clock = SystemClock()
        blobs = BlobClient(rpc, lambda: known, clock)
        yield Cluster(rpc, lambda: known, blobs, clock, SystemRandom())


async def ping(rpc: Rpc, node: Node, role: str, *, timeout: float = PING_TIMEOUT) -> None:
    """Return when the daemon answers and is who it should be; raises `DfsError` otherwise."""
    (_, number, node_id, _), _ = await rpc.call(
        node.address(role), "ping", timeout=timeout, priority=Priority.HIGH
    )
    if (number, node_id) != (node.number, node.node_id):
        raise WrongCluster(
            f"{node.address(role)} is served by node {number} ({node_id.hex()}), "
            f"not by {node.name}: is the port used twice?"
        )


async def wait_for_ping(rpc: Rpc, node: Node, role: str, *, timeout: float) -> None:
    """Ping until the daemon answers; raises the last failure after `timeout` seconds."""
    with trio.move_on_after(timeout):
        while True:
            try:
                await ping(rpc, node, role)
            except Unreachable:
                await trio.sleep(_AGAIN)
            else:
                return
    await ping(rpc, node, role)


async def statuses(
    rpc: Rpc, cluster: ClusterMap, *, timeout: float = PING_TIMEOUT
) -> dict[tuple[int, str], dict[str, Any] | DfsError]:
    """`node.status` of every daemon by (number, role), or why it did not answer."""
    found: dict[tuple[int, str], dict[str, Any] | DfsError] = {}

    async def ask(node: Node, role: str) -> None:
        try:
            (answer,), _ = await rpc.call(node.address(role), "node.status", timeout=timeout)
            found[node.number, role] = dict(answer)
        except DfsError as e:
            found[node.number, role] = e

    async with trio.open_nursery() as nursery:
        for node in cluster.nodes:
            for role in ROLES:
                if node.address(role):
                    nursery.start_soon(ask, node, role)
    return found


def partitions_without_quorum(cluster: ClusterMap, up: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Per role, how many partitions have too few answering homes to be written."""
    answering = set(up)
    needed = {METADATA: cluster.n // 2 + 1, CHUNK: cluster.w}
    lost = {}
    for role, rows in zip(ROLES, cluster.tables, strict=True):
        lost[role] = sum(
            sum((number, role) in answering for number in row) < needed[role] for row in rows
        )
    return lost


# ------------------------------------------------------------------------------ the first volume


def system_genesis(cluster: ClusterMap) -> bytes:
    """The first journal entry of the system volume.

    It follows from the map alone, so that whoever bootstraps a cluster, and however often, proposes
    the same bytes.
    """
    params = {
        "salt": digest_parts(b"system volume", cluster.cluster_id)[:16],
        "n": cluster.n,
        "w": cluster.w,
        "chunk_size": 4 << 20,
        "compress": True,
        "class": "strict",
        "name": "",
    }
    homes = tuple(sorted(cluster.volume_homes(SYSTEM_VOLUME)))
    return encode(GENESIS, 1, params, 1, homes)


async def bootstrap(rpc: Rpc, cluster: ClusterMap, *, timeout: float) -> bool:
    """Give a new cluster its system volume; False if it has one.

    While no majority of the homes has the journal it cannot have been used, so the homes without it
    are given the genesis, all of which must answer.  Once a majority has it nothing is written: a
    home that lost its journal must not get an empty one.  Raises `NoQuorum`.
    """
    homes = cluster.volume_homes(SYSTEM_VOLUME)
    present: dict[int, bool] = {}
    why: dict[int, DfsError] = {}

    async def ask(number: int) -> None:
        address = cluster.address(METADATA, number)
        while True:
            try:
                present[number] = await has_journal(rpc, address, SYSTEM_VOLUME)
            except DfsError as e:
                why[number] = e
                await trio.sleep(_AGAIN)
            else:
                return

    with trio.move_on_after(timeout):
        async with trio.open_nursery() as nursery:
            for number in homes:
                nursery.start_soon(ask, number)
    if sum(present.values()) > len(homes) // 2:
        return False
    silent = [number for number in homes if number not in present]
    if silent and any(present.values()):
        told = grouped((cluster.node(x).name, _why(cluster, why, x)) for x in silent)
        raise NoQuorum(f"too few nodes answer ({told}): start them, then try again")
    if silent:
        told = grouped((cluster.node(x).name, _why(cluster, why, x)) for x in silent)
        raise NoQuorum(
            "too few nodes answer to tell whether the cluster has its system volume; to make it, "
            f"all of {', '.join(cluster.node(x).name for x in homes)} must run ({told})"
        )
    entry = system_genesis(cluster)
    for number in homes:
        if not present[number]:
            address = cluster.address(METADATA, number)
            await rpc.call(address, "jrnl.genesis", (SYSTEM_VOLUME, entry), timeout=timeout)
    return True


def _why(cluster: ClusterMap, why: dict[int, DfsError], number: int) -> str:
    error = why.get(number)
    return "no answer" if error is None else reason(error, cluster.address(METADATA, number))


async def has_journal(rpc: Rpc, address: str, volume: bytes) -> bool:
    """Whether the node has a journal of the volume."""
    try:
        (status,), _ = await rpc.call(address, "jrnl.status", (volume,), timeout=PING_TIMEOUT)
    except NotFound:
        return False
    return bool(status.get("chosen", 0))


async def somebody_serves(cluster: ClusterMap, newcomer: Node) -> str | None:
    """Name of a home of the system volume, other than the newcomer, that has its journal."""
    found: list[str] = []

    async def ask(rpc: Rpc, node: Node) -> None:
        with contextlib.suppress(DfsError):  # who does not answer proves nothing
            if await has_journal(rpc, node.metadata_addr, SYSTEM_VOLUME):
                found.append(node.name)

    async with endpoint(cluster) as rpc, trio.open_nursery() as nursery:
        for number in cluster.volume_homes(SYSTEM_VOLUME):
            node = cluster.node(number)
            if node.number != newcomer.number:
                nursery.start_soon(ask, rpc, node)
    return min(found, default=None)
