"""Why nobody answers: asks the silent ones once more and puts what they say into one line."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from random import SystemRandom

import trio

from dfs.client.connect import Cluster, ClusterRef
from dfs.clock import SystemClock
from dfs.cluster.map import METADATA
from dfs.env import Priority, Rpc
from dfs.errors import DfsError, NoQuorum, ProtocolError, Unreachable, WrongCluster, WrongVersion
from dfs.rpc.endpoint import RpcEndpoint

PING_TIMEOUT = 1.5  # seconds
_OTHER = re.compile(r"belongs to cluster (\w+), '[^']*' to (\w+)")
_HINT = re.compile(r" \([^()]*\)$")


def reason(error: DfsError, address: str) -> str:
    """What an error of a call to `address` says, without the address and without advice."""
    text = str(error)
    if isinstance(error, WrongCluster) and (match := _OTHER.search(text)):
        return f"serves cluster {match[2][:8]}, not {match[1][:8]}"
    for start in ("cannot reach ", "closed the connection to ", "the connection to ", "ping to "):
        text = text.removeprefix(start)
    return _HINT.sub("", text.removeprefix(address).lstrip(": "))


def grouped(reasons: Iterable[tuple[str, str]]) -> str:
    """`a, b: why; c: why` of (name, why), each reason once."""
    names: dict[str, list[str]] = {}
    for name, why in reasons:
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(who)}: {why}" for why, who in names.items())


async def ping_all(rpc: Rpc, addresses: Iterable[str]) -> dict[str, DfsError]:
    """The errors of those that do not answer."""
    failures: dict[str, DfsError] = {}

    async def ping(address: str) -> None:
        try:
            await rpc.call(address, "ping", timeout=PING_TIMEOUT, priority=Priority.HIGH)
        except DfsError as e:
            failures[address] = e

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ping, address)
    return failures


async def unreachable(file: Path, ref: ClusterRef, error: DfsError) -> DfsError:
    """What to raise when no seed of a cluster file answered; `error` if they do now."""
    rpc = RpcEndpoint(
        cluster_id=ref.cluster_id, name="dfs", clock=SystemClock(), random=SystemRandom(),
        epoch=_no_epoch,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        failures = await ping_all(rpc, ref.seeds)
        nursery.cancel_scope.cancel()
    if not failures:
        return error
    told = grouped((address, reason(e, address)) for address, e in sorted(failures.items()))
    if any(isinstance(e, WrongCluster) for e in failures.values()):
        return WrongCluster(
            f"{file} is not of the cluster that answers ({told}): its ports are another cluster's,"
            " choose the right file with --cluster or DFS_CLUSTER"
        )
    if all(isinstance(e, ProtocolError | WrongVersion) for e in failures.values()):
        return WrongVersion(
            f"no node of the cluster in {file} can be talked to ({told}): check the addresses in"
            " it, and the releases of dfs on both sides"
        )
    return Unreachable(
        f"no node of the cluster in {file} answers ({told}): start it with `dfs cluster up`;"
        " `dfs cluster status` shows what is down"
    )


async def explain_silence(
    cluster: Cluster, what: str, volume_id: bytes, seconds: float
) -> NoQuorum:
    """What to raise when `what` had no quorum for `seconds`: names the homes that are silent."""
    known = cluster.get_map()
    names = {known.address(METADATA, n): known.node(n).name for n in known.volume_homes(volume_id)}
    failures = await ping_all(cluster.rpc, names)
    if failures:
        told = grouped((names[a], reason(failures[a], a)) for a in names if a in failures)
        step = "start them with `dfs cluster up`; `dfs cluster status` shows what is down"
    else:
        told = f"{', '.join(names.values())} are up, but did not agree in time"
        step = "try again, or wait longer with `dfs --timeout SECONDS`"
    return NoQuorum(f"{what}: no quorum within {seconds:g} s ({told}): {step}")


_no_epoch: Callable[[], int] = int
