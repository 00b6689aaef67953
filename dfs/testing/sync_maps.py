"""Small cluster maps, and `SyncNode`s on them, for tests of the background protocols."""

from functools import cache

from dfs.cluster.map import METADATA, ClusterMap, Node
from dfs.testing.sync_nodes import SyncNode, key_row
from metadata.merkle import REGISTERS, partition_of_row

NOW = 1_700_000_000_000_000
DAY = 24 * 3600_000_000
OLD = NOW - 3 * DAY


def member(number: int, weight: float = 1.0) -> Node:
    """A node in a zone of its own."""
    return Node(
        number,
        bytes([number]) * 16,
        f"n{number}",
        f"z{number}",
        "",
        f"h{number}",
        f"tcp://n{number}:1",
        f"tcp://c{number}:1",
        weight,
    )


@cache
def first_map(size: int = 3) -> ClusterMap:
    """Nodes 1..size."""
    return ClusterMap.create(bytes(16), [member(i) for i in range(1, size + 1)])


@cache
def transition() -> tuple[ClusterMap, ClusterMap, ClusterMap, ClusterMap]:
    """Maps: three of four nodes have it all; both phases on the way to all four; the end."""
    before = ClusterMap.create(bytes(16), [member(i, float(i < 4)) for i in range(1, 5)])
    moving = before.begin([member(i) for i in range(1, 5)])
    reading = moving.advance()
    return before, moving, reading, reading.advance()


def make(
    size: int = 3, cluster: ClusterMap | None = None
) -> tuple[dict[int, SyncNode], list[ClusterMap]]:
    """Nodes, and a list whose only item is the map that all of them see."""
    holder = [cluster or first_map(size)]
    nodes = {i: SyncNode(i, lambda: holder[0]) for i in range(1, size + 1)}
    return nodes, holder


def moved_row(moving: ClusterMap, after: ClusterMap) -> bytes:
    """A row of a partition that node 1 gives to node 4."""
    for i in range(100_000):
        row = key_row(b"%d" % i)
        p = partition_of_row(REGISTERS, row)
        if 1 in moving.old_homes(METADATA, p) and 1 not in after.homes(METADATA, p):
            return row
    raise AssertionError("no partition moves from 1 to 4")
