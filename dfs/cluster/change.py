"""Changing who is in a cluster: the edits, and what they would do in numbers and words."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dfs.cluster.edits import (
    Add,
    Drain,
    Edit,
    NewNode,
    Remove,
    Replace,
    SetWeight,
    Undrain,
    apply_edits,
    describe,
    edit_fields,
    edit_from_fields,
)
from dfs.cluster.map import ROLES, ClusterMap, Node
from dfs.cluster.placement import TOLERANCE, achievable, balance
from dfs.cluster.tables import candidates
from dfs.hashing import PARTITIONS

__all__ = [
    "Add",
    "Drain",
    "Edit",
    "NewNode",
    "Plan",
    "Remove",
    "Replace",
    "SetWeight",
    "Share",
    "Spread",
    "Undrain",
    "apply_edits",
    "describe",
    "edit_fields",
    "edit_from_fields",
    "plan",
]


@dataclass(frozen=True, slots=True)
class Share:
    """What one node has in one role, before and after."""

    number: int
    name: str
    role: str
    weight: float  # capacity after the change, in the operator's unit
    before: int  # partitions
    after: int
    receive: int  # replicas that it gets and had not
    move_bytes: int  # estimated size of those
    deviation: float  # of `after` from the share by weight: 0.1 = 10 % too much; 0.0 if weight 0


@dataclass(frozen=True, slots=True)
class Spread:
    """How a role's table turns out."""

    role: str
    shared_zone: int  # partitions with two replicas in one zone
    shared_rack: int
    shared_host: int
    moved: float  # replicas that move, as a share of all
    ideal: float  # the share that would have to move for everybody to get exactly the new share


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of a change that has not begun."""

    map: ClusterMap  # in which it begins
    shares: tuple[Share, ...]
    spreads: tuple[Spread, ...]  # one per role
    warnings: tuple[str, ...]  # in words


def plan(m: ClusterMap, edits: Sequence[Edit], used: Mapping[tuple[str, int], int]) -> Plan:
    """What the edits would do; `used` is bytes in use by (role, node number), as far as known.

    Raises `ConfigError` if they cannot be applied.
    """
    after = apply_edits(m, edits)
    shares: list[Share] = []
    spreads: list[Spread] = []
    warnings: list[str] = []
    for role, old, new in zip(ROLES, m.tables, after.tables, strict=True):
        members = [node for node in after.nodes if node.weight(role) > 0]
        index = {node.number: i for i, node in enumerate(members)}
        had = Counter(x for row in old for x in row)
        gets = Counter(x for row in new for x in row)
        sizes = {x: used.get((role, x), 0) / had[x] for x in had if (role, x) in used}
        receive: Counter[int] = Counter()
        incoming: Counter[int] = Counter()
        for before, row in zip(old, new, strict=True):
            if before == row:
                continue
            known = [sizes[x] for x in before if x in sizes]
            size = sum(known) / len(known) if known else 0.0
            for x in row:
                if x not in before:
                    receive[x] += 1
                    incoming[x] += round(size)
        seen = candidates(members, role)
        found = balance(seen, [[index[x] for x in row] for row in new])
        everybody = {node.number: node for node in (*m.nodes, *after.nodes)}
        for number in sorted(everybody):
            node = everybody[number]
            if node.address(role):
                shares.append(
                    Share(
                        number,
                        node.name,
                        role,
                        node.weight(role),
                        had[number],
                        gets[number],
                        receive[number],
                        incoming[number],
                        found.deviation[index[number]] if number in index else 0.0,
                    )
                )
        targets = achievable(seen, m.n)
        least = sum(
            max(0.0, targets[i] * PARTITIONS - had[node.number]) for i, node in enumerate(members)
        )
        copies = PARTITIONS * m.n
        spreads.append(
            Spread(
                role,
                found.shared_zone,
                found.shared_rack,
                found.shared_host,
                receive.total() / copies,
                least / copies,
            )
        )
        warnings += _uneven(role, members, [found.deviation[i] for i in range(len(members))])
        warnings += _few_zones(role, members, m.n)
        warnings += _without_quorum(m, after, role)
    warnings += _liars(after.nodes)
    return Plan(after, tuple(shares), tuple(spreads), tuple(warnings))


def _uneven(role: str, members: Sequence[Node], deviations: Sequence[float]) -> Iterable[str]:
    """Zones that get more than their weight, because others are too small to take turns."""
    zones: dict[str, list[float]] = {}
    for node, deviation in zip(members, deviations, strict=True):
        zones.setdefault(node.zone, []).append(deviation)
    for zone, found in sorted(zones.items()):
        worst = max(found, key=abs)
        if abs(worst) > 2 * TOLERANCE:
            much = "more" if worst > 0 else "less"
            yield (
                f"zone {zone}: its {role} nodes get up to {abs(worst):.0%} {much} than their "
                "weight, because copies must be in different zones: make the zones equally big"
            )


def _few_zones(role: str, members: Sequence[Node], copies: int) -> Iterable[str]:
    zones = sorted({node.zone for node in members})
    if len(zones) < copies:
        yield (
            f"{copies} {role} copies but {len(zones)} zone{'s' * (len(zones) != 1)} "
            f"({', '.join(zones)}): some copies share a zone and are lost or cut off with it"
        )


def _without_quorum(m: ClusterMap, after: ClusterMap, role: str) -> Iterable[str]:
    """Partitions that depend on the nodes that leave."""
    staying = {node.number for node in after.nodes}
    if after.transition is not None:
        staying -= set(after.transition.leaving)
    gone = [node.name for node in m.nodes if node.number not in staying]
    needed = max(m.params.w, m.params.r, m.n // 2 + 1)
    rows = m.tables[ROLES.index(role)]
    weak = sum(sum(x in staying for x in row) < needed for row in rows)
    none = sum(not any(x in staying for x in row) for row in rows)
    if weak:
        yield (
            f"{weak} {role} partitions have fewer than {needed} homes without "
            f"{', '.join(gone)}{f', {none} of them none at all' if none else ''}: keep these "
            "nodes running until the change is complete, or remove fewer at a time"
        )


def _liars(nodes: Sequence[Node]) -> Iterable[str]:
    """Nodes on one machine that are said to be in different zones or racks."""
    machines: dict[str, list[Node]] = {}
    for node in nodes:
        for machine in sorted({node.host, *filter(None, map(_machine, _addresses(node)))}):
            machines.setdefault(machine, []).append(node)
    told = set()
    for machine, found in sorted(machines.items()):
        names = tuple(node.name for node in found)
        if len({(node.zone, node.rack) for node in found}) > 1 and names not in told:
            told.add(names)
            yield (
                f"nodes {', '.join(names)} are on the same host {machine} but have different "
                "zones or racks: their copies are lost together, whatever the labels say"
            )


def _addresses(node: Node) -> list[str]:
    return [a for role in ROLES if (a := node.address(role))]


def _machine(address: str) -> str:
    """The host part of a TCP address; "" for a local socket, which says nothing."""
    return address.removeprefix("tcp://").rpartition(":")[0] if "tcp://" in address else ""
