"""`dfs node workers`: the background loops of every daemon, and running or pausing one."""

from pathlib import Path
from typing import Any

import click
import trio

from dfs.cli.context import echo_json, human_size, printable
from dfs.cli.context import run as run_async
from dfs.cli.network import PING_TIMEOUT, reach
from dfs.cli.status import print_table
from dfs.cluster.map import ROLES, ClusterMap, Node
from dfs.datadir import PROGRAMS
from dfs.env import Rpc
from dfs.errors import ConfigError, DfsError, NotFound

Found = dict[tuple[int, str], tuple[dict[str, Any], ...] | DfsError]


def show(file: Path, name: str | None, *, as_json: bool) -> bool:
    """Print the loops of one node or of all; False if a daemon did not answer."""
    cluster, found = run_async(_collect, file, name)
    names = {node.number: node.name for node in cluster.nodes}
    if as_json:
        echo_json(
            [
                {"node": names[number], "role": PROGRAMS[role], "error": str(workers)}
                if isinstance(workers, DfsError)
                else {"node": names[number], "role": PROGRAMS[role], "workers": workers}
                for (number, role), workers in found.items()
            ]
        )
    else:
        _print(names, found)
    return not any(isinstance(workers, DfsError) for workers in found.values())


def steer(file: Path, name: str, worker: str, action: str) -> None:
    """Run, pause or resume a loop in the daemons of a node that have it."""
    for role, status in run_async(_steer, file, name, worker, action):
        click.echo(f"{name} {PROGRAMS[role]}: {worker} is {status['state']}")


def _named(cluster: ClusterMap, name: str | None) -> list[Node]:
    nodes = [node for node in cluster.nodes if name in (None, node.name)]
    if not nodes:
        names = ", ".join(node.name for node in cluster.nodes)
        raise ConfigError(f"there is no node {name}; there are {names}")
    return nodes


async def _collect(file: Path, name: str | None) -> tuple[ClusterMap, Found]:
    async with reach(file) as cluster:
        node_map = cluster.get_map()
        found: Found = {}
        async with trio.open_nursery() as nursery:
            for node in _named(node_map, name):
                for role in ROLES:
                    if node.address(role):
                        nursery.start_soon(_ask, cluster.rpc, node, role, found)
        return node_map, dict(sorted(found.items(), key=lambda item: item[0]))


async def _ask(rpc: Rpc, node: Node, role: str, found: Found) -> None:
    try:
        (workers,), _ = await rpc.call(node.address(role), "node.workers", timeout=PING_TIMEOUT)
        found[node.number, role] = workers
    except DfsError as e:
        found[node.number, role] = e


async def _steer(
    file: Path, name: str, worker: str, action: str
) -> list[tuple[str, dict[str, Any]]]:
    async with reach(file) as cluster:
        (node,) = _named(cluster.get_map(), name)
        done: list[tuple[str, dict[str, Any]]] = []
        absent: list[str] = []
        for role in ROLES:
            if not node.address(role):
                continue
            try:
                (status,), _ = await cluster.rpc.call(
                    node.address(role), "node.steer", (worker, action), timeout=PING_TIMEOUT
                )
            except NotFound as e:
                absent.append(f"{PROGRAMS[role]}: {e}")
            else:
                done.append((role, status))
        if not done:
            raise NotFound(f"{name} has no such loop; {'; '.join(absent)}")
        return done


def _print(names: dict[int, str], found: Found) -> None:
    rows = [["node", "role", "worker", "state", "items/s", "bytes/s", "progress"]]
    errors = []
    for (number, role), workers in found.items():
        where = [names[number], PROGRAMS[role]]
        if isinstance(workers, DfsError):
            errors.append(f"{' '.join(where)}: {workers}")
            continue
        for w in workers:
            progress = printable(str(w["progress"]))
            if w["fraction"] is not None:
                progress = f"{100 * w['fraction']:.0f} % {progress}"
            speed = f"{w['items_per_s']:.1f}", human_size(w["bytes_per_s"])
            rows.append([*where, w["name"], w["state"], *speed, progress])
            if w["last_error"]:
                errors.append(f"{' '.join(where)} {w['name']}: {printable(w['last_error'])}")
    print_table(rows)
    if errors:
        click.echo()
    for line in errors:
        click.echo(line)
