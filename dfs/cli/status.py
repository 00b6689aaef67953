"""`dfs cluster status`: everything the daemons say about themselves, put together."""

import sys
from pathlib import Path
from typing import Any

import click
import trio

from dfs.cli.context import echo_json, human_size
from dfs.cli.context import run as run_async
from dfs.cli.network import partitions_without_quorum, reach, statuses
from dfs.client.connect import Cluster
from dfs.client.registry import list_volumes
from dfs.cluster.map import METADATA, ROLES, ClusterMap
from dfs.datadir import PROGRAMS
from dfs.errors import DfsError
from dfs.ids import SYSTEM_VOLUME

REGISTRY_TIMEOUT = 5.0  # seconds
Answers = dict[tuple[int, str], dict[str, Any] | DfsError]


def show(file: Path, *, as_json: bool) -> bool:
    """Print the status of the cluster of `file`; False if it is unavailable."""
    report = run_async(collect, file)
    if as_json:
        echo_json(report)
    else:
        _print(report)
    return bool(report["available"])


async def collect(file: Path) -> dict[str, Any]:
    """Ask every daemon and the registry of volumes; see `summarise` for the keys."""
    async with reach(file) as cluster:
        node_map = cluster.get_map()
        report = summarise(node_map, await statuses(cluster.rpc, node_map))
        if not report["partitions_without_quorum"][METADATA]:
            await _name_volumes(cluster, report)
        return report


async def _name_volumes(cluster: Cluster, report: dict[str, Any]) -> None:
    """Add what the registry knows: all volumes, also those that no node has in use."""
    seen = {entry["id"]: entry for entry in report["volumes"]}
    try:
        with trio.fail_after(REGISTRY_TIMEOUT):
            volumes = await list_volumes(cluster)
    except (DfsError, trio.TooSlowError) as e:
        told = str(e) or f"no answer within {REGISTRY_TIMEOUT:g} s"
        text = f"the registry of volumes cannot be read: {told}"
        report["errors"].append(_error("cluster", METADATA, text, 1))
        return
    for info in volumes:
        entry = seen.setdefault(info.volume_id.hex(), {"id": info.volume_id.hex()})
        entry.update(name=info.name, state=info.state)
    report["volumes"] = sorted(seen.values(), key=lambda entry: entry.get("name", ""))


def summarise(cluster: ClusterMap, answers: Answers) -> dict[str, Any]:
    """The report that `--json` prints, made from the answers by (node number, role).

    `available` is whether every partition can be written in both roles.
    """
    up = [key for key, answer in answers.items() if isinstance(answer, dict)]
    lost = partitions_without_quorum(cluster, up)
    nodes, errors = [], []
    volumes: dict[str, dict[str, Any]] = {}
    quarantined = 0
    for node in cluster.nodes:
        roles = {}
        for role in ROLES:
            if not node.address(role):
                continue
            answer = answers[node.number, role]
            entry: dict[str, Any] = {"up": isinstance(answer, dict), "address": node.address(role)}
            if isinstance(answer, DfsError):
                entry["error"] = str(answer)
            else:
                entry.update(_numbers(answer))
                if answer.get("map_epoch", cluster.epoch) != cluster.epoch:
                    text = f"has the map of epoch {answer['map_epoch']}, not {cluster.epoch}"
                    errors.append(_error(node.name, role, text, 1))
                errors += [_error(node.name, role, *e) for e in answer.get("errors", ())]
                quarantined += int(answer.get("quarantined", 0))
                for volume, seq, owner in answer.get("volumes", ()):
                    _note_volume(volumes, bytes(volume).hex(), seq, owner)
            roles[PROGRAMS[role]] = entry
        nodes.append(
            {
                "name": node.name,
                "number": node.number,
                "zone": node.zone,
                "rack": node.rack,
                "host": node.host,
                "roles": roles,
            }
        )
    return {
        "available": not any(lost.values()),
        "cluster_id": cluster.cluster_id.hex(),
        "map_epoch": cluster.epoch,
        "copies": cluster.n,
        "nodes": nodes,
        "partitions_without_quorum": lost,
        "volumes": [{"id": key, **value} for key, value in sorted(volumes.items())],
        "quarantined": quarantined,
        "errors": errors,
    }


def _numbers(answer: dict[str, Any]) -> dict[str, Any]:
    names = (
        "uptime",
        "version",
        "map_epoch",
        "disk_total",
        "disk_free",
        "used",
        "chunks",
        "chunk_bytes",
        "quarantined",
        "workers",
    )
    return {name: answer[name] for name in names if name in answer}


def _error(node: str, role: str, text: str, count: int) -> dict[str, Any]:
    return {"node": node, "role": PROGRAMS[role], "text": text, "count": count}


def _note_volume(volumes: dict[str, dict[str, Any]], key: str, seq: int, owner: Any) -> None:
    """Keep what the node that knows most says."""
    known = volumes.setdefault(key, {"seq": seq, "owner": owner})
    if (seq, owner is not None) > (known["seq"], known["owner"] is not None):
        known.update(seq=seq, owner=owner)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    state = "available" if report["available"] else "UNAVAILABLE"
    click.echo(
        f"cluster {report['cluster_id'][:8]}: {state}, {report['copies']} copies, "
        f"map epoch {report['map_epoch']}\n"
    )
    table = Table(box=None, pad_edge=False)
    racks = any(node["rack"] for node in report["nodes"])
    for column in ("node", "zone", *(["rack"] if racks else []), "host", *PROGRAMS.values()):
        table.add_column(column)
    for column in ("metadata used", "chunks used", "disk free"):
        table.add_column(column, justify="right")
    for node in report["nodes"]:
        roles = [node["roles"].get(program) for program in PROGRAMS.values()]
        free = min((r["disk_free"] for r in roles if r and "disk_free" in r), default=None)
        table.add_row(
            node["name"],
            node["zone"],
            *([node["rack"] or "-"] if racks else []),
            node["host"],
            *("-" if r is None else "up" if r["up"] else "[red]DOWN[/red]" for r in roles),
            *("-" if not r or "used" not in r else human_size(r["used"]) for r in roles),
            "-" if free is None else human_size(free),
        )
    console.print(table)
    for role, count in report["partitions_without_quorum"].items():
        if count:
            click.echo(f"\n{role}: {count} partitions have no quorum of answering homes")
    for node in report["nodes"]:
        for program, role in node["roles"].items():
            if not role["up"]:
                click.echo(f"\n{node['name']} {program} is down: {role['error']}")
    volumes = [v for v in report["volumes"] if v["id"] != SYSTEM_VOLUME.hex()]
    names = {node["number"]: node["name"] for node in report["nodes"]}
    if volumes:
        click.echo("\nvolumes:")
    for v in volumes:
        owner = names.get(v.get("owner"), "nobody")
        told = f"commit {v['seq']}, sequenced by {owner}" if "seq" in v else "not in use"
        state = f" ({v['state']})" if v.get("state", "created") != "created" else ""
        click.echo(f"  {v.get('name', v['id'])}{state}: {told}")
    for e in report["errors"]:
        times = f" ({e['count']} times)" if e["count"] > 1 else ""
        click.echo(f"\n{e['node']} {e['role']}: {e['text']}{times}")
    if report["quarantined"]:
        click.echo(f"\n{report['quarantined']} corrupt copies are quarantined")
