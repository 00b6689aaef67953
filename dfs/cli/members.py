"""Changing the members of a cluster: what `dfs cluster node`, `plan` and `apply` do."""

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import click
import trio

from dfs.cli.client import connected
from dfs.cli.context import count, echo_json, human_size, patience
from dfs.cli.diagnosis import grouped, reason
from dfs.cli.local import ClusterDir, format_node
from dfs.cli.network import PING_TIMEOUT, statuses, wait_for_ping
from dfs.cli.updown import LOCK_PATIENCE, start
from dfs.client.connect import Cluster
from dfs.client.membership import Membership
from dfs.cluster.address import is_local
from dfs.cluster.change import Edit, NewNode, Plan, describe
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap, Node
from dfs.errors import ConfigError, DfsError, Unreachable
from dfs.hashing import PARTITIONS

_POLL = 1.0  # seconds between looks while waiting for a change


@contextlib.asynccontextmanager
async def membership(file: Path) -> AsyncIterator[tuple[Cluster, Membership]]:
    """A connection that changes members."""
    async with connected(file) as cluster:
        yield cluster, Membership(cluster, timeout=patience())


async def stage(file: Path, make: Any) -> None:
    """Stage what `make(newest map, staged edits)` returns, and say what is next."""
    async with membership(file) as (cluster, members):
        before = await members.staged()
        edits = make(await members.newest(), before.edits)
        staged = await members.stage(edits)
        epoch = cluster.get_map().epoch + 1
    _tell_staged(staged.edits, epoch)


async def show_staged(file: Path) -> None:
    """List the staged edits."""
    async with membership(file) as (_, members):
        staged = await members.staged()
        _tell_staged(staged.edits, (await members.newest()).epoch + 1)


def _tell_staged(edits: Sequence[Edit], epoch: int) -> None:
    if not edits:
        click.echo("no changes are staged")
        return
    click.echo(f"staged: {'; '.join(describe(edit) for edit in edits)}")
    click.echo(f"look: dfs cluster plan      do it: dfs cluster apply --epoch {epoch}")


def new_node(
    file: Path,
    cluster: ClusterMap,
    staged: Sequence[Edit],
    name: str,
    *,
    metadata: str | None,
    chunk: str | None,
    zone: str | None,
    rack: str,
    host: str | None,
    weights: tuple[float, float],
) -> NewNode:
    """Fill in what was not given: on a local cluster, the next free loopback ports and a zone.

    `weights` are those of the metadata and the chunk role.  Raises `ConfigError` if addresses are
    needed and were not given.
    """
    if metadata is None and chunk is None:
        if not ClusterDir.of_file(file).local_nodes(cluster):
            raise ConfigError(
                f"where will {name} listen? give --metadata ADDRESS, --chunk ADDRESS, or both"
            )
        taken = {a for node in cluster.nodes for role in ROLES if (a := node.address(role))}
        taken |= {
            a
            for edit in staged
            if (new := getattr(edit, "node", None))
            for a in (new.metadata_addr, new.chunk_addr)
        }
        metadata, chunk = _free_addresses(taken)
        host = host or f"host-{name}"
        zone = zone or _smallest_zone(cluster, staged)
    first = metadata or chunk or ""
    return NewNode(
        node_id=secrets.token_bytes(16),
        name=name,
        zone=zone or name,
        rack=rack,
        host=host or first.removeprefix("tcp://").rpartition(":")[0],
        metadata_addr=metadata or "",
        chunk_addr=chunk or "",
        metadata_weight=weights[0],
        chunk_weight=weights[1],
    )


def _free_addresses(taken: set[str]) -> tuple[str, str]:
    """Two loopback ports above those in use that nobody listens at."""
    prefix = "tcp://127.0.0.1:"
    ports = [int(a.removeprefix(prefix)) for a in taken if a.startswith(prefix)]
    found: list[str] = []
    for port in range(max(ports, default=7399) + 1, 65536):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(f"{prefix}{port}")
        if len(found) == 2:
            return found[0], found[1]
    raise ConfigError("no free loopback ports above those of the cluster: give --metadata, --chunk")


def _smallest_zone(cluster: ClusterMap, staged: Sequence[Edit]) -> str:
    """The zone with the least capacity, so that zones stay even."""
    weights: dict[str, float] = {}
    for node in cluster.nodes:
        weights[node.zone] = weights.get(node.zone, 0.0) + node.weight(METADATA)
    for edit in staged:
        new = getattr(edit, "node", None)
        if new is not None:
            weights[new.zone] = weights.get(new.zone, 0.0) + new.metadata_weight
    return min(sorted(weights), key=lambda zone: weights[zone])


async def show_change(file: Path, *, as_json: bool) -> None:
    """Print what the staged edits would do."""
    async with membership(file) as (cluster, members):
        staged = await members.staged()
        if not staged.edits:
            raise ConfigError(
                "no changes are staged: `dfs cluster node add|drain|remove|replace` stages some; "
                "`dfs cluster plan --nodes N` plans a new cluster"
            )
        newest = await members.newest()
        found = await members.plan(await _used(cluster, newest))
    epoch = found.map.epoch
    if as_json:
        echo_json(_as_json(found, staged.edits))
        return
    click.echo(f"epoch {newest.epoch} -> {epoch}: {'; '.join(map(describe, staged.edits))}")
    for role in ROLES:
        _print_role(found, role)
    for warning in found.warnings:
        click.echo(f"WARNING: {warning}")
    click.echo(f"\ndo it: dfs cluster apply --epoch {epoch}")


async def _used(cluster: Cluster, newest: ClusterMap) -> dict[tuple[str, int], int]:
    answers = await statuses(cluster.rpc, newest)
    return {
        (role, number): int(answer.get("used", 0))
        for (number, role), answer in answers.items()
        if isinstance(answer, dict)
    }


def _print_role(found: Plan, role: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{role} role", title_justify="left", box=None, pad_edge=False)
    table.add_column("node")
    for column in ("weight", "partitions", "after", "to receive", "bytes to move", "from ideal"):
        table.add_column(column, justify="right")
    for share in found.shares:
        if share.role == role:
            table.add_row(
                share.name,
                f"{share.weight:g}",
                str(share.before),
                str(share.after),
                str(share.receive),
                human_size(share.move_bytes),
                f"{share.deviation:+.1%}" if share.weight else "-",
            )
    click.echo()
    Console().print(table)
    spread = next(s for s in found.spreads if s.role == role)
    click.echo(
        f"  moves {spread.moved:.1%} of the copies (the least that would do: {spread.ideal:.1%})"
    )
    shared = [
        f"{number} in one {what}"
        for what, number in (("zone", spread.shared_zone), ("host", spread.shared_host))
        if number
    ]
    if shared:
        click.echo(f"  of {PARTITIONS} partitions, two copies are: {', '.join(shared)}")
    else:
        click.echo("  every partition's copies are in different zones and on different hosts")


def _as_json(found: Plan, edits: Sequence[Edit]) -> dict[str, Any]:
    return {
        "epoch": found.map.epoch,
        "changes": [describe(edit) for edit in edits],
        "nodes": [
            {
                "name": share.name,
                "role": share.role,
                "weight": share.weight,
                "partitions": share.before,
                "after": share.after,
                "receive": share.receive,
                "move_bytes": share.move_bytes,
                "deviation": round(share.deviation, 4),
            }
            for share in found.shares
        ],
        "roles": {
            spread.role: {
                "partitions_sharing_zone": spread.shared_zone,
                "partitions_sharing_rack": spread.shared_rack,
                "partitions_sharing_host": spread.shared_host,
                "moved": round(spread.moved, 4),
                "least": round(spread.ideal, 4),
            }
            for spread in found.spreads
        },
        "warnings": list(found.warnings),
    }


async def apply(file: Path, epoch: int, *, wait: float, start_timeout: float) -> None:
    """Apply the staged edits, beginning with `epoch`; start new local nodes."""
    directory = ClusterDir.of_file(file)
    async with membership(file) as (cluster, members):
        names = await members.join(epoch)
        if names:
            newest = cluster.get_map()
            click.echo(f"epoch {newest.epoch}: {', '.join(names)} joined, without data yet")
            await _start(directory, newest, [n for n in newest.nodes if n.name in names])
            epoch = newest.epoch + 1
            await _wait_for_nodes(cluster, names, epoch, start_timeout)
            if not (await members.staged()).edits:
                click.echo("done: they take no data as long as their weight is 0")
                return
        new = await members.begin(epoch)
        if directory.has_map():
            directory.adopt(new)
        click.echo(f"epoch {new.epoch}: the change has begun")
        if new.transition is None:
            return
        if wait:
            await _wait(cluster, members, wait)
        else:
            click.echo("it goes on by itself; progress: dfs cluster status")


async def _start(directory: ClusterDir, newest: ClusterMap, nodes: Sequence[Node]) -> None:
    """Make directories of and start the nodes that belong on this machine, tell of the others."""
    here: list[Node] = []
    if directory.has_map() and directory.local_nodes(newest):
        here = [node for node in nodes if is_local(node.metadata_addr or node.chunk_addr)]
        directory.adopt(newest)
    for node in here:
        format_node(directory.path / node.name, newest, node)
    if here:
        with directory.locked(LOCK_PATIENCE):
            await start(directory.path, tuple(node.name for node in here), LOCK_PATIENCE)
    for node in nodes:
        if node not in here:
            click.echo(
                f"start {node.name} now, on its machine: dfs node format --new --cluster-map MAP "
                f"--name {node.name} --data DIR   (MAP: dfs cluster map --output MAP)"
            )


async def _wait_for_nodes(
    cluster: Cluster, names: Sequence[str], epoch: int, seconds: float
) -> None:
    """Return when all of them answer; raises `DfsError` that says how to go on."""
    nodes = [node for node in cluster.get_map().nodes if node.name in names]
    end = trio.current_time() + seconds
    silent = ""
    for node in nodes:
        for role in ROLES:
            if not node.address(role):
                continue
            left = max(0.1, end - trio.current_time())
            try:
                await wait_for_ping(cluster.rpc, node, role, timeout=left)
            except DfsError as e:
                silent = f"{node.name} does not answer: {e}"
    if silent:
        raise DfsError(
            f"{silent}. Nothing moved yet; once the new nodes run: "
            f"dfs cluster apply --epoch {epoch}"
        )


async def wait_for_change(file: Path, seconds: float) -> None:
    """Return when no transition is under way; raises `DfsError` after `seconds`."""
    async with membership(file) as (cluster, members):
        await _wait(cluster, members, seconds)


async def _wait(cluster: Cluster, members: Membership, seconds: float) -> None:
    end = trio.current_time() + seconds
    while True:
        newest = await members.newest()
        comparing: list[str] = []
        if newest.transition is None:
            comparing = await _comparing(cluster, newest)
            if not comparing:
                click.echo(f"done: epoch {newest.epoch} is stable")
                return
        if trio.current_time() > end:
            why = comparing or await missing(cluster) or ["nobody says why"]
            raise DfsError(
                f"after {seconds:g} s the change is still under way (epoch {newest.epoch}): "
                f"{'; '.join(why)}. It goes on by itself; `dfs cluster status` shows it"
            )
        await trio.sleep(_POLL)


async def _comparing(cluster: Cluster, newest: ClusterMap) -> list[str]:
    """Nodes that came back to partitions and do not show them yet."""
    answers = await statuses(cluster.rpc, newest)
    found = []
    for (number, _), answer in sorted(answers.items()):
        waiting = (
            answer.get("sync", {}).get("waiting_partitions", 0) if isinstance(answer, dict) else 0
        )
        if waiting:
            name = newest.node(number).name
            found.append(f"{name} compares {count(waiting, 'partition')} with the other homes")
    return found


async def missing(cluster: Cluster) -> list[str]:
    """What the cluster's driver, one of the voters, says it waits for."""
    newest = cluster.get_map()
    found: list[tuple[bool, list[str]]] = []

    async def ask(address: str) -> None:
        with contextlib.suppress(DfsError):  # whoever is silent is no driver
            (_, _, reasons, owned), _ = await cluster.rpc.call(
                address, "map.waiting", timeout=PING_TIMEOUT
            )
            found.append((owned, list(reasons)))

    async with trio.open_nursery() as nursery:
        for number in newest.voters:
            nursery.start_soon(ask, newest.address(METADATA, number))
    told = [entry for entry in found if entry[1]]
    return max(told)[1] if told else []


def transition_words(cluster: ClusterMap) -> str:
    """What is under way, in one line; "" when nothing is."""
    if cluster.transition is None:
        return ""
    parts = []
    if cluster.phase(METADATA):
        parts.append(
            f"metadata homes move, phase {cluster.phase(METADATA)} of 2, "
            f"{count(len(cluster.changed(METADATA)), 'partition')}"
        )
    if cluster.phase(CHUNK):
        parts.append(f"chunks move, {count(len(cluster.changed(CHUNK)), 'partition')}")
    leaving = [cluster.node(number).name for number in cluster.transition.leaving]
    if leaving:
        parts.append(f"{', '.join(leaving)} to leave")
    return "; ".join(parts)


async def show_map(file: Path, output: Path | None, *, history: bool, as_json: bool) -> None:
    """Print the map, or its history; or write it to a file."""
    async with membership(file) as (cluster, members):
        newest = await members.newest()
        if output is not None:
            await trio.to_thread.run_sync(output.write_bytes, newest.encode())
            click.echo(f"wrote the map of epoch {newest.epoch} to {output}")
            return
        if history:
            _print_history(await _history(cluster, newest), as_json=as_json)
            return
    _print_map(newest, as_json=as_json)


async def _history(cluster: Cluster, newest: ClusterMap) -> Any:
    """The last maps as the first voter that answers has them; raises `Unreachable`."""
    failures: list[tuple[str, str]] = []
    for number in newest.voters:
        address = newest.address(METADATA, number)
        try:
            (entries,), _ = await cluster.rpc.call(address, "map.history", timeout=PING_TIMEOUT)
        except DfsError as e:
            failures.append((newest.node(number).name, reason(e, address)))
        else:
            return entries
    raise Unreachable(f"no voter tells the history of the map: {grouped(failures)}")


def _print_history(entries: Any, *, as_json: bool) -> None:
    from dfs.cli.times import local_time

    if as_json:
        echo_json([{"epoch": e, "digest": d, "time_ns": t, "note": n} for e, d, t, n in entries])
        return
    for epoch, map_digest, stamp, note in entries:
        when = local_time(stamp) if stamp else "-"
        click.echo(f"{epoch:6}  {map_digest.hex()[:16]}  {when:>16}  {note or 'next phase'}")


def _print_map(found: ClusterMap, *, as_json: bool) -> None:
    if as_json:
        echo_json(
            {
                "epoch": found.epoch,
                "digest": found.digest,
                "cluster_id": found.cluster_id,
                "voters": [found.node(n).name for n in found.voters],
                "transition": transition_words(found),
                "nodes": [_node_as_json(found, node) for node in found.nodes],
                "banned": [number for number, _ in found.banned],
            }
        )
        return
    click.echo(f"epoch {found.epoch}, digest {found.digest.hex()[:16]}")
    click.echo(f"voters: {', '.join(found.node(n).name for n in found.voters)}")
    if found.transition is not None:
        click.echo(f"under way: {transition_words(found)}")
    for node in found.nodes:
        shares = ", ".join(
            f"{sum(node.number in row for row in found.tables[i])} {role} partitions"
            for i, role in enumerate(ROLES)
            if node.address(role)
        )
        click.echo(f"  {node.number:4}  {node.name}  zone {node.zone}: {shares}")
    if found.banned:
        click.echo(f"removed for ever: {', '.join(str(number) for number, _ in found.banned)}")


def _node_as_json(found: ClusterMap, node: Node) -> dict[str, Any]:
    return {
        "number": node.number,
        "name": node.name,
        "zone": node.zone,
        "rack": node.rack,
        "host": node.host,
        "addresses": {role: node.address(role) for role in ROLES if node.address(role)},
        "partitions": {
            role: sum(node.number in row for row in found.tables[i]) for i, role in enumerate(ROLES)
        },
    }
