"""`dfs cluster status`: everything the daemons say about themselves, put together."""

import os
from pathlib import Path
from typing import Any

import click
import trio

from dfs.cli.client import registry, usages
from dfs.cli.context import count, echo_json, human_size
from dfs.cli.context import run as run_async
from dfs.cli.diagnosis import grouped, reason
from dfs.cli.members import missing, transition_words
from dfs.cli.network import partitions_without_quorum, reach, statuses
from dfs.client.capacity import is_full
from dfs.client.connect import Cluster
from dfs.client.registry import CREATED
from dfs.cluster.map import METADATA, ROLES, ClusterMap
from dfs.datadir import PROGRAMS
from dfs.errors import DfsError
from dfs.hashing import PARTITIONS
from dfs.ids import SYSTEM_VOLUME
from dfs.limits import Level

REGISTRY_TIMEOUT = 5.0  # seconds
WAITS = 5  # reasons shown
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
        if node_map.transition is not None:
            report["waits_for"] = await missing(cluster)
        if not report["partitions_without_quorum"][METADATA]:
            await _name_volumes(cluster, report)
        return report


async def _name_volumes(cluster: Cluster, report: dict[str, Any]) -> None:
    """Add what the registry knows: all volumes, also those that no node has in use."""
    seen = {entry["id"]: entry for entry in report["volumes"]}
    try:
        with trio.fail_after(REGISTRY_TIMEOUT):
            async with registry(cluster, mode="ro") as opened:
                volumes = await opened.list()
    except (DfsError, trio.TooSlowError) as e:
        told = str(e) or f"no answer within {REGISTRY_TIMEOUT:g} s"
        text = f"the registry of volumes cannot be read: {told}"
        report["errors"].append(_error("cluster", METADATA, text, 1))
        return
    for entry in seen.values():
        if not entry["system"]:
            entry["state"] = "deleted"  # unless the registry knows better, as it does of most
    used = await usages(cluster, [v.volume_id for v in volumes if v.state == CREATED])
    for info in volumes:
        new = {"id": info.volume_id.hex(), "system": False}
        entry = seen.setdefault(info.volume_id.hex(), new)
        entry.update(name=info.name, state=info.state)
        if info.volume_id in used:
            usage = used[info.volume_id]
            entry["bytes"], entry["inodes"] = usage.bytes, usage.inodes
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
                entry["error"] = reason(answer, node.address(role))
            else:
                entry.update(_numbers(answer))
                entry["full"] = is_full(role, answer)
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
        "transition": transition_words(cluster),
        "copies": cluster.n,
        "nodes": nodes,
        "partitions_without_quorum": lost,
        "volumes": [
            {"id": key, "system": key == SYSTEM_VOLUME.hex(), **value}
            for key, value in sorted(volumes.items())
        ],
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
        "disk_level",
        "disk_room",
        "disk_path",
        "to_move",
        "incomplete",
        "metrics",
        "sync",
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
    state = "available" if report["available"] else _red("UNAVAILABLE")
    click.echo(
        f"cluster {report['cluster_id'][:8]}: {state}, {count(len(report['nodes']), 'node')}, "
        f"{report['copies']} copies, map epoch {report['map_epoch']}\n"
    )
    if report["transition"]:
        click.echo(f"change under way: {report['transition']}")
        for text in report.get("waits_for", ())[:WAITS]:
            click.echo(f"  waits: {text}")
        click.echo()
    _print_nodes(report["nodes"])
    _print_volumes(report)
    _print_metrics(report["nodes"])
    problems = _problems(report)
    if problems:
        click.echo()
    for line in problems:
        click.echo(line)


def _print_nodes(nodes: list[dict[str, Any]]) -> None:
    racks = any(node["rack"] for node in nodes)
    rows = [["node", "zone", *(["rack"] if racks else []), "host", *PROGRAMS.values(), "disk free"]]
    for node in nodes:
        roles = [node["roles"].get(program) for program in PROGRAMS.values()]
        disks = [r for r in roles if r and r.get("disk_total")]
        tightest = min(disks, key=lambda r: int(r["disk_free"]), default=None)
        free = "-"
        if tightest is not None:
            free = f"{human_size(tightest['disk_free'])} of {human_size(tightest['disk_total'])}"
        full = any(r.get("full") for r in disks)
        rows.append(
            [
                node["name"],
                node["zone"],
                *([node["rack"] or "-"] if racks else []),
                node["host"],
                *("-" if r is None else _role(r) for r in roles),
                f"{free} {_red('FULL')}" if full else free,
            ]
        )
    print_table(rows)


def _print_metrics(nodes: list[dict[str, Any]]) -> None:
    """Where Prometheus is to scrape, if anywhere."""
    found = [
        f"{node['name']} {program} {role['metrics']}"
        for node in nodes
        for program, role in node["roles"].items()
        if role.get("metrics")
    ]
    if found:
        click.echo(f"\nmetrics: {', '.join(found)}")


def _role(role: dict[str, Any]) -> str:
    if not role["up"]:
        return _red("DOWN")
    return f"up, {human_size(role['used'])}" if "used" in role else "up"


def _print_volumes(report: dict[str, Any]) -> None:
    volumes = [v for v in report["volumes"] if not v["system"]]
    if not volumes:
        return
    click.echo()
    names = {node["number"]: node["name"] for node in report["nodes"]}
    rows = [["volume", "size", "inodes", "commits", "sequenced by"]]
    for v in volumes:
        state = f" ({v['state']})" if v.get("state", "created") != "created" else ""
        size, inodes = v.get("bytes"), v.get("inodes")
        rows.append(
            [
                v.get("name", v["id"][:16]) + state,
                "?" if size is None else human_size(size),
                "?" if inodes is None else str(inodes),
                str(v.get("seq", "-")),
                names.get(v.get("owner"), "-"),
            ]
        )
    print_table(rows)


def print_table(rows: list[list[str]]) -> None:
    """Columns as wide as they must be: a terminal wraps what does not fit, nothing is cut off."""
    widths = [max(len(click.unstyle(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell + " " * (width - len(click.unstyle(cell)))
            for cell, width in zip(row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def _full_disk(name: str, role: dict[str, Any]) -> str:
    """A server, its directory, and how full the disk is."""
    path = f" {role['disk_path']}" if role.get("disk_path") else ""
    return (
        f"{name}{path} ({human_size(role['disk_free'])} of {human_size(role['disk_total'])} free)"
    )


def _problems(report: dict[str, Any]) -> list[str]:
    """What is wrong, and what to do about it, one line each."""
    lines = []
    for role, lost in report["partitions_without_quorum"].items():
        if lost:
            lines.append(f"no quorum: {lost} of {PARTITIONS} partitions of role {role}")
    down = [
        (f"{node['name']} {program}", role["error"])
        for node in report["nodes"]
        for program, role in node["roles"].items()
        if not role["up"]
    ]
    if down:
        lines.append(f"down: {grouped(down)}; `dfs cluster up` starts nodes of this machine")
    full = [
        _full_disk(f"{node['name']} {program}", role)
        for node in report["nodes"]
        for program, role in node["roles"].items()
        if role.get("full")
    ]
    if full:
        lines.append(
            f"disk full: {', '.join(full)} take no new data, only what gives space back; other "
            "nodes do instead, if there are any: delete data or add capacity"
        )
    for level, text in (
        (Level.NEAR, "warning: disk nearly full"),
        (Level.BACKFILL, "disk nearly full, takes no data from other nodes"),
    ):
        names = [
            node["name"]
            for node in report["nodes"]
            if any(role.get("disk_level") == level.label for role in node["roles"].values())
        ]
        if names:
            lines.append(f"{text}: {', '.join(names)}; delete data or add capacity")
    roles = [role for node in report["nodes"] for role in node["roles"].values()]
    to_move = sum(role.get("to_move", 0) for role in roles)
    if to_move:
        lines.append(f"{count(to_move, 'chunk')} still to move; `dfs node workers` shows progress")
    for e in report["errors"]:
        times = f" ({e['count']} times)" if e["count"] > 1 else ""
        lines.append(f"{e['node']} {e['role']}: {e['text']}{times}")
    if report["quarantined"]:
        copies = "corrupt copy is" if report["quarantined"] == 1 else "corrupt copies are"
        lines.append(f"{report['quarantined']} {copies} quarantined")
    return lines


def _red(text: str) -> str:
    return text if "NO_COLOR" in os.environ else click.style(text, fg="red", bold=True)
