"""`dfs node members`: the membership as one node has it from the gossip."""

from pathlib import Path
from typing import Any

import click

from dfs.cli.context import echo_json, human_size
from dfs.cli.context import run as run_async
from dfs.cli.diagnosis import grouped, reason
from dfs.cli.network import PING_TIMEOUT, reach
from dfs.cli.status import print_table
from dfs.cluster.map import METADATA, ClusterMap
from dfs.datadir import PROGRAMS
from dfs.errors import ConfigError, DfsError, Unreachable


def show_members(file: Path, name: str | None, *, as_json: bool) -> None:
    """Print what the node of that name says, or the first that answers."""
    cluster, witness, rows = run_async(_ask, file, name)
    names = {node.number: node.name for node in cluster.nodes}
    if as_json:
        echo_json(
            {
                "witness": witness,
                "members": [{**row, "node": names.get(row["number"], "?")} for row in rows],
            }
        )
        return
    click.echo(f"as {witness} sees it:")
    table = [
        [
            "node",
            "role",
            "status",
            "for",
            "boot",
            "incarnation",
            "heartbeat",
            "epoch",
            "load",
            "disk free",
        ]
    ]
    for row in rows:
        free = human_size(row["disk_free"]) if "disk_free" in row else "-"
        table.append(
            [
                names.get(row["number"], f"({row['number']})"),
                PROGRAMS[row["role"]],
                row["status"],
                f"{row['since']:.0f} s",
                *(str(row[key]) for key in ("boot", "incarnation")),
                *(str(row.get(key, "-")) for key in ("heartbeat", "map_epoch")),
                f"{row['load']:g}" if "load" in row else "-",
                free,
            ]
        )
    print_table(table)


async def _ask(file: Path, name: str | None) -> tuple[ClusterMap, str, tuple[dict[str, Any], ...]]:
    failures: list[tuple[str, str]] = []
    async with reach(file) as cluster:
        known = cluster.get_map()
        nodes = [n for n in known.nodes if n.metadata_addr and name in (None, n.name)]
        if not nodes:
            names = ", ".join(n.name for n in known.nodes if n.metadata_addr)
            raise ConfigError(f"there is no metadata node {name}; there are {names}")
        for node in nodes:
            address = node.address(METADATA)
            try:
                (rows,), _ = await cluster.rpc.call(address, "node.members", timeout=PING_TIMEOUT)
            except DfsError as e:
                failures.append((node.name, reason(e, address)))
            else:
                return known, node.name, rows
    raise Unreachable(f"no node says who is alive: {grouped(failures)}")
