"""The placement tables of a cluster map: rows of homes, one per partition, and what made them."""

from collections.abc import Iterable, Sequence

from dfs.cluster.node import ROLES, Node, Params, Row, Table, same_homes
from dfs.cluster.placement import Calibrated, Candidate, calibrate
from dfs.errors import ConfigError


def candidates(nodes: Iterable[Node], role: str, calibrated: Calibrated = ()) -> list[Candidate]:
    """Nodes as placement sees them, in the same order; with their calibrated weights if any."""
    weights = dict(calibrated)
    return [
        Candidate(x.node_id, x.zone, x.rack, x.host, weights.get(x.number, x.weight(role)))
        for x in nodes
    ]


def in_order(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Nodes by number, as a map lists them."""
    return tuple(sorted(nodes, key=lambda node: node.number))


def place(
    members: Sequence[Node], params: Params, calibrated: tuple[Calibrated, Calibrated]
) -> tuple[tuple[Table, Table], tuple[Calibrated, Calibrated]]:
    """The tables of both roles and the weights they were made with, starting from `calibrated`.

    Raises `ConfigError` if a role has fewer nodes than copies.
    """
    tables: list[Table] = []
    found: list[Calibrated] = []
    for role, start in zip(ROLES, calibrated, strict=True):
        usable = [node for node in members if node.weight(role) > 0]
        if len(usable) < params.n:
            raise ConfigError(
                f"{params.n} copies need {params.n} {role} nodes of weight > 0, "
                f"but there are {len(usable)}: add nodes or ask for fewer copies"
            )
        weights = dict(start)
        rows, used = calibrate(
            candidates(usable, role),
            params.n,
            [weights.get(x.number, x.weight(role)) for x in usable],
        )
        tables.append(tuple(tuple(usable[i].number for i in row) for row in rows))
        found.append(
            ()
            if all(w == x.weight(role) for w, x in zip(used, usable, strict=True))
            else tuple((x.number, w) for x, w in zip(usable, used, strict=True))
        )
    return (tables[0], tables[1]), (found[0], found[1])


def kept_weights(
    before: Sequence[Node], calibrated: tuple[Calibrated, Calibrated], members: Sequence[Node]
) -> tuple[Calibrated, Calibrated]:
    """The calibrated weights of the nodes `before`, in proportion to the weights of `members`."""
    known = {node.number: node for node in before}
    kept: list[Calibrated] = []
    for role, weights in zip(ROLES, calibrated, strict=True):
        bent = dict(weights)

        def weight(node: Node, role: str = role, bent: dict[int, float] = bent) -> float:
            now = node.weight(role)
            if node.number not in bent:
                return now
            old = known[node.number].weight(role)
            return bent[node.number] * (1.0 if now == old else now / old)

        usable = [node for node in members if node.weight(role) > 0]
        kept.append(tuple((node.number, weight(node)) for node in usable) if bent else ())
    return kept[0], kept[1]


def differing(old: Table, new: Table) -> Row:
    """The partitions whose sets of homes are not the same in both tables."""
    return tuple(p for p, (a, b) in enumerate(zip(old, new, strict=True)) if not same_homes(a, b))


def touch(changes: tuple[int, ...], partitions: Iterable[int], epoch: int) -> tuple[int, ...]:
    """`changes` with the epoch of these partitions moved to `epoch`."""
    after = list(changes)
    for p in partitions:
        after[p] = epoch
    return tuple(after)
