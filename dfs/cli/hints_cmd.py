"""`dfs hints`: what nodes keep for others that were away."""

from pathlib import Path
from typing import Any

import click

from dfs.cli.context import (
    cluster_file,
    cluster_option,
    count,
    echo_json,
    human_size,
    json_option,
)
from dfs.cli.context import run as run_async
from dfs.errors import ConfigError, DfsError, InvalidArgument, NotFound

TIMEOUT = 5.0  # seconds a node is given
Kept = tuple[dict[str, Any], ...]


@click.group()
def hints() -> None:
    """Look at hints: writes that are kept for nodes which could not be reached.

    They are handed over as soon as the node is back, for up to three hours and 1 GiB; after that
    anti-entropy brings the node up to date, as it does in any case.
    """


@hints.command("list")
@cluster_option
@json_option
@click.argument("node", default="")
@click.pass_context
def list_(ctx: click.Context, cluster_path: str | None, as_json: bool, node: str) -> None:
    """List the hints that every metadata node keeps, or NODE.

    Exit status 1 if a node does not answer.
    """
    names, found = run_async(_collect, cluster_file(cluster_path), node)
    if as_json:
        echo_json(
            [
                {"node": holder, "error": str(kept)}
                if isinstance(kept, DfsError)
                else {
                    "node": holder,
                    "targets": [{**t, "target": _name(names, t["node"])} for t in kept],
                }
                for holder, kept in found
            ]
        )
    else:
        _print(names, found)
    ctx.exit(1 if any(isinstance(kept, DfsError) for _, kept in found) else 0)


@hints.command()
@cluster_option
@click.argument("target", metavar="NODE-OR-TARGET")
@click.option("--at", "holder", metavar="NODE", help="Only what this node keeps.")
def drop(cluster_path: str | None, target: str, holder: str | None) -> None:
    """Drop what is kept for a node, by name, or by number if it is no member any more.

    Nothing is lost: anti-entropy visits that node first and brings what it lacks.

    \b
    Examples:
      dfs hints drop node3
      dfs hints drop 17 --at node1
    """
    dropped = run_async(_drop, cluster_file(cluster_path), target, holder or "")
    total = sum(dropped.values())
    where = ", ".join(f"{n} at {name}" for name, n in dropped.items())
    click.echo(
        f"dropped {count(total, 'hint')} for {target} ({where}); anti-entropy brings the rest"
    )


async def _collect(file: Path, name: str) -> tuple[dict[int, str], list[tuple[str, Any]]]:
    """Names of nodes by number; (node, its targets or why it did not answer)."""
    from dfs.cli.client import connected
    from dfs.cluster.map import METADATA

    async with connected(file) as cluster:
        members = cluster.get_map().nodes
        holders = [n for n in members if n.metadata_addr and name in ("", n.name)]
        if not holders:
            known = ", ".join(n.name for n in members if n.metadata_addr)
            raise ConfigError(f"there is no metadata node {name}; there are {known}")
        found: list[tuple[str, Any]] = []
        for node in holders:
            try:
                (kept,), _ = await cluster.rpc.call(
                    node.address(METADATA), "hints.list", timeout=TIMEOUT
                )
            except DfsError as e:
                kept = e
            found.append((node.name, kept))
        return {n.number: n.name for n in members}, found


async def _drop(file: Path, target: str, holder: str) -> dict[str, int]:
    """Drop hints for a target; how many each holder dropped.  Raises `NotFound` for none."""
    from dfs.cli.client import connected
    from dfs.cluster.map import METADATA

    names, found = await _collect(file, holder)
    numbers = {name: number for number, name in names.items()}
    number = numbers.get(target, int(target) if target.isdecimal() else -1)
    if number < 0:
        raise InvalidArgument(
            f"there is no node {target}; there are {', '.join(numbers)}: for one that has left, "
            "give its number, `dfs hints list` shows it"
        )
    silent = [f"{name}: {kept}" for name, kept in found if isinstance(kept, DfsError)]
    holding = [
        name
        for name, kept in found
        if not isinstance(kept, DfsError) and any(t["node"] == number and t["count"] for t in kept)
    ]
    if not holding:
        told = f" ({'; '.join(silent)})" if silent else ""
        raise NotFound(f"no node that answers keeps hints for {target}{told}")
    dropped: dict[str, int] = {}
    async with connected(file) as cluster:
        for node in cluster.get_map().nodes:
            if node.name in holding:
                (dropped[node.name],), _ = await cluster.rpc.call(
                    node.address(METADATA), "hints.drop", (number,), timeout=TIMEOUT
                )
    for line in silent:
        click.echo(f"not asked: {line}", err=True)
    return dropped


def _name(names: dict[int, str], number: int) -> str:
    return names.get(number, str(number))


def _print(names: dict[int, str], found: list[tuple[str, Any]]) -> None:
    from dfs.cli.status import print_table

    rows = [["kept at", "for", "hints", "size", "oldest", "stored", "delivered", "dropped", ""]]
    errors = []
    for holder, kept in found:
        if isinstance(kept, DfsError):
            errors.append(f"{holder}: {kept}")
            continue
        rows += [
            [
                holder,
                _name(names, t["node"]),
                str(t["count"]),
                human_size(t["bytes"]),
                f"{t['age']:.0f} s" if t["count"] else "-",
                str(t["stored"]),
                str(t["delivered"]),
                str(t["dropped"]),
                "left to anti-entropy" if t["dirty"] else "",
            ]
            for t in kept
        ]
    if len(rows) > 1:
        print_table(rows)
    elif len(errors) < len(found):
        click.echo("no hints are kept")
    for line in errors:
        click.echo(line)
