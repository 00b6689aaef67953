"""`dfs cluster plan`: what a map would give each node, in numbers and in words."""

from typing import Any

import click

from dfs.cli.context import echo_json
from dfs.cluster.map import CHUNK, METADATA, ROLES, Node, Params
from dfs.cluster.placement import Balance, Placer, balance
from dfs.cluster.tables import candidates as as_candidates
from dfs.errors import ConfigError
from dfs.hashing import PARTITIONS

UNEVEN = 0.1  # a share that differs more from its ideal is worth a warning


def show_plan(nodes: list[Node], params: Params | None, *, as_json: bool) -> None:
    """Print the plan of both roles; raises `ConfigError` if no map could be made."""
    counts = [sum(node.weight(role) > 0 for node in nodes) for role in ROLES]
    params = params or Params.for_nodes(max(1, min(counts)))
    plans = {}
    for role, count in zip(ROLES, counts, strict=True):
        if count < params.n:
            raise ConfigError(
                f"{params.n} copies need {params.n} {role} nodes of weight > 0, there are {count}"
            )
        members = [node for node in nodes if node.weight(role) > 0]
        found = as_candidates(members, role)
        plans[role] = (members, balance(found, Placer(found).table(params.n)))
    if as_json:
        echo_json({role: _as_json(plan, role, params) for role, plan in plans.items()})
        return
    click.echo(
        f"{params.n} copies of each of {PARTITIONS} partitions; a write is acknowledged with "
        f"{params.w}, a read asks {params.r}"
    )
    for role in (METADATA, CHUNK):
        members, found_balance = plans[role]
        _table(role, members, found_balance)
        for line in words(members, found_balance, params):
            click.echo(f"  {line}")


def words(members: list[Node], found: Balance, params: Params) -> list[str]:
    """The spread of copies over failure domains, and what is wrong with it, in sentences."""
    lines = []
    for one, many, shared, count in (
        ("zone", "zones", found.shared_zone, len({n.zone for n in members})),
        ("rack", "racks", found.shared_rack, len({(n.zone, n.rack) for n in members})),
        ("host", "hosts", found.shared_host, len({(n.zone, n.rack, n.host) for n in members})),
    ):
        if params.n == 1:
            lines.append("WARNING: one copy only: any lost disk loses data")
            break
        if one == "rack" and not any(n.rack for n in members):
            continue
        if not shared:
            lines.append(f"the copies of every partition are in {params.n} different {many}")
        else:
            share = f"{shared} of {PARTITIONS} partitions have"
            lines.append(
                f"WARNING: {share} two copies in one {one} ({count} {many}): "
                f"losing it takes two of {params.n} copies"
            )
    uneven = {i: d for i, d in found.deviation.items() if abs(d) > UNEVEN}
    if uneven:
        worst = max(uneven, key=lambda i: abs(uneven[i]))
        lines.append(
            f"WARNING: {members[worst].name} gets {uneven[worst]:+.0%} against its weight: "
            "zones of unequal size and copies in different zones cannot both be had evenly"
        )
    return lines


def _table(role: str, members: list[Node], found: Balance) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{role} role", title_justify="left", box=None, pad_edge=False)
    for column in ("node", "zone", "rack", "host"):
        table.add_column(column)
    for column in ("weight", "partitions", "against ideal"):
        table.add_column(column, justify="right")
    for i, node in enumerate(members):
        table.add_row(
            node.name,
            node.zone,
            node.rack or "-",
            node.host,
            f"{node.weight(role):g}",
            str(found.partitions[i]),
            f"{found.deviation[i]:+.1%}",
        )
    click.echo()
    Console().print(table)


def _as_json(plan: tuple[list[Node], Balance], role: str, params: Params) -> dict[str, Any]:
    members, found = plan
    return {
        "copies": params.n,
        "nodes": [
            {
                "name": node.name,
                "zone": node.zone,
                "rack": node.rack,
                "host": node.host,
                "weight": node.weight(role),
                "partitions": found.partitions[i],
                "deviation": round(found.deviation[i], 4),
            }
            for i, node in enumerate(members)
        ],
        "partitions_sharing": {
            "zone": found.shared_zone,
            "rack": found.shared_rack,
            "host": found.shared_host,
        },
        "words": words(members, found, params),
    }
