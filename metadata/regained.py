"""Partitions a node is a home of again: what it held before must go first.

While a node was no home of a partition its old registers went stale: they may have been deleted
since, and the tombstones purged.  Nothing that was acknowledged is only here (a transition ends
when quorums of the new homes have everything), so whoever was *seen* to be no home drops its old
rows before it takes a new one.  Then nothing old can come back, whatever was written to the key
since, and however many homes return at once.

Durable is the row `nheld`: format:u8, bit map of the partitions whose rows here are from the time
since this node is a home.  It changes in the same batch as the rows it speaks of, so a crash at any
moment leaves either old rows that are still to be dropped, or none.  Whoever slept through the time
in which it was no home is not told apart by this: see `metadata.rejoin`.
"""

from collections.abc import Iterable

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Corrupt
from dfs.hashing import PARTITIONS
from metadata.merkle import Op, Table

ROW = b"nheld"
FORMAT = 1
AT_ONCE = 64  # partitions that are cleared in one batch besides those it touches


class Regained:
    """Which partitions are held as a home, and which are to be cleared first."""

    def __init__(self, table: Table, number: int, cluster_map: ClusterMap) -> None:
        """Read the row; without one (a new node, an older store) all that is here counts."""
        self._number = number
        self._changed = False
        raw = table.get(ROW)
        if raw is None:
            self._held = set(_homes(cluster_map, number))
            self._changed = True
        elif raw[:1] != bytes([FORMAT]):
            raise Corrupt(f"the row {ROW!r} has format {raw[0]}: upgrade dfs")
        else:
            bits = int.from_bytes(raw[1:], "little")
            self._held = {p for p in range(PARTITIONS) if bits >> p & 1}
        self.pending: dict[int, None] = {}  # to be cleared, in order
        self.follow(cluster_map)

    def follow(self, cluster_map: ClusterMap) -> None:
        """Judge by a newer map, before any request is."""
        now = set(_homes(cluster_map, self._number))
        if self._held - now:
            self._held &= now
            self._changed = True
        self.pending = dict.fromkeys(sorted(now - self._held))

    def take(self, touched: Iterable[int]) -> list[int]:
        """Partitions to clear in the next batch: those that it touches, and some more."""
        if not self.pending:
            return []
        chosen = [p for p in dict.fromkeys(touched) if p in self.pending]
        for p in self.pending:
            if len(chosen) >= AT_ONCE:
                break
            if p not in chosen:
                chosen.append(p)
        return chosen

    def cleared(self, partitions: Iterable[int]) -> None:
        """They are, in the batch that is being made."""
        for p in partitions:
            self.pending.pop(p, None)
            self._held.add(p)
            self._changed = True

    def take_ops(self) -> list[Op]:
        """What must be in the next batch."""
        if not self._changed:
            return []
        self._changed = False
        bits = sum(1 << p for p in self._held)
        return [(ROW, bytes([FORMAT]) + bits.to_bytes(PARTITIONS // 8, "little"))]

    def abandon(self, partitions: Iterable[int]) -> None:
        """The batch may not have happened: clear them again."""
        for p in partitions:
            self._held.discard(p)
            self.pending[p] = None
        self._changed = True


def _homes(cluster_map: ClusterMap, number: int) -> list[int]:
    return [
        p
        for p in range(PARTITIONS)
        if any(number in row for row in cluster_map.write_sets(METADATA, p))
    ]
