"""Who votes on the next cluster map: at most seven metadata nodes, changed one per epoch.

Adding one voter or removing one keeps any two majorities of consecutive epochs intersecting;
swapping one for another does not ({1, 2} of {1, 2, 3} and {3, 4} of {2, 3, 4}), so a replacement
takes two epochs (Ongaro, "Consensus: Bridging Theory and Practice", 2014, section 4.1).
"""

from collections import Counter
from collections.abc import Container, Sequence

from dfs.cluster.mapformat import MAX_VOTERS
from dfs.cluster.node import METADATA, Node


def wanted_voters(
    members: Sequence[Node], voters: Sequence[int], leaving: Container[int] = ()
) -> tuple[int, ...]:
    """Who should vote: present voters that stay, filled up to an odd count of at most seven.

    Nodes of weight 0 vote only if nobody else can, leaving nodes never.  New voters, last in the
    result, are taken from the zone with the fewest voters, then by number.
    """
    able = [x for x in members if x.weight(METADATA) > 0 and x.number not in leaving]
    if not able:
        able = [x for x in members if x.metadata_addr and x.number not in leaving]
    count = min(MAX_VOTERS, len(able) - (len(able) + 1) % 2)
    zones: Counter[str] = Counter()
    chosen: list[int] = []
    rest = able
    while rest and len(chosen) < count:
        best = min(rest, key=lambda x: (x.number not in voters, zones[x.zone], x.number))
        rest = [x for x in rest if x is not best]
        zones[best.zone] += 1
        chosen.append(best.number)
    return tuple(chosen)


def first_voters(members: Sequence[Node], voters: Sequence[int] | None) -> tuple[int, ...]:
    """`voters` in order; by default the first metadata nodes, at most seven."""
    if voters is not None:
        return tuple(sorted(voters))
    return tuple(node.number for node in members if node.metadata_addr)[:MAX_VOTERS]


def next_voters(
    members: Sequence[Node], voters: Sequence[int], leaving: Sequence[int]
) -> tuple[int, ...]:
    """`voters` with at most one added or removed; one is added before another one is removed."""
    wanted = wanted_voters(members, voters, leaving)
    going = [v for v in voters if v in leaving]
    surplus = going or [v for v in voters if v not in wanted]
    missing = [v for v in wanted if v not in voters]
    if missing and len(voters) < MAX_VOTERS:
        return tuple(sorted([*voters, missing[0]]))
    if surplus and len(voters) > 1:
        return tuple(v for v in voters if v != surplus[0])
    return tuple(voters)
