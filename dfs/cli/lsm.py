"""`dfs kv lsm`: the storage engines of the metadata nodes, in numbers."""

from pathlib import Path
from typing import Any

import click

from dfs.cli.client import connected
from dfs.cli.context import count, echo_json, human_size
from dfs.cli.context import run as run_async
from dfs.cluster.map import METADATA, ClusterMap, Node
from dfs.errors import ConfigError, DfsError

TIMEOUT = 5.0  # seconds a node is given


def show_lsm(file: Path, name: str, *, as_json: bool) -> None:
    """Ask every metadata node, or the one of that name; raises `ConfigError` for no such node."""

    async def work() -> list[tuple[str, Any]]:
        async with connected(file) as cluster:
            found: list[tuple[str, Any]] = []
            for node in _chosen(cluster.get_map(), name):
                address = node.address(METADATA)
                try:
                    (state,), _ = await cluster.rpc.call(address, "node.lsm", timeout=TIMEOUT)
                except DfsError as e:
                    state = e
                found.append((node.name, state))
            return found

    answers = run_async(work)
    if as_json:
        echo_json(
            {
                node: {"error": str(state)} if isinstance(state, DfsError) else state
                for node, state in answers
            }
        )
        return
    for i, (node, state) in enumerate(answers):
        if i:
            click.echo()
        if isinstance(state, DfsError):
            click.echo(f"{node}: {state}")
        else:
            _print(node, state)


def _chosen(cluster: ClusterMap, name: str) -> list[Node]:
    nodes = [node for node in cluster.nodes if node.metadata_addr]
    if not name:
        return nodes
    found = [node for node in nodes if node.name == name]
    if not found:
        names = ", ".join(node.name for node in nodes)
        raise ConfigError(f"there is no metadata node {name}; there are {names}")
    return found


def _print(node: str, state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=node, title_justify="left", box=None, pad_edge=False)
    for column in ("level", "runs", "tables", "size", "entries", "deleted", "bits/key"):
        table.add_column(column, justify="right")
    for column in ("filter passed", "stopped", "wrongly passed"):
        table.add_column(column, justify="right")
    for level in state["levels"]:
        table.add_row(
            str(level["level"]),
            str(level["runs"]),
            str(level["tables"]),
            human_size(level["bytes"]),
            str(level["entries"]),
            str(level["tombstones"]),
            f"{level['filter_bits_per_key']:.1f}",
            str(level["filter_hits"]),
            str(level["filter_negatives"]),
            str(level["filter_false_positives"]),
        )
    Console().print(table)
    memory, log, reserve = state["memory"], state["log"], state["reserve"]
    click.echo(
        f"  amplification  write {state['write_amplification']:.2f}, "
        f"space at most {state['space_amplification']:.2f}"
    )
    click.echo(f"  block cache    hit rate {state['cache_hit_rate']:.1%}")
    click.echo(
        f"  memory         {human_size(memory['total'])} of at most "
        f"{human_size(memory['budget'])}: memtables {human_size(memory['memtables'])}, "
        f"blocks {human_size(memory['cache'])}, indexes and filters "
        f"{human_size(memory['indexes'])}, snapshots {human_size(memory['snapshots'])}"
    )
    click.echo(
        f"  log            {count(log['segments'], 'segment')}, {human_size(log['bytes'])}, "
        f"{human_size(log['unsynced_bytes'])} not synced yet"
    )
    click.echo(
        f"  work           {count(state['flushes'], 'flush')}, {count(state['merges'], 'merge')} "
        f"since the start, {state['frozen_memtables']} memtables and "
        f"{state['pending_merge']} runs waiting"
    )
    if reserve["missing"]:
        click.echo("  FULL DISK      the reserve is in use: puts are refused, deletes are not")
    for name in state["quarantined"]:
        click.echo(f"  QUARANTINED    {name}")
    for first, last, name in state["lost"]:
        click.echo(f"  LOST           {first!r} to {last!r} of {name}: fetched from other homes")
