"""Rejoining: a node whose registers may be too old pulls before it shows anything.

A node that was restored from a backup, lost its disk, or became a home again after it slept through
a time in which it was none, lacks acknowledged writes and may hold registers whose tombstones the
others have purged since.  (Who was seen to be no home drops its rows: `metadata.regained`.)  Until
it has compared a partition with the other homes it is *waiting* there: it answers no read,
coordinates nothing, and gives away only registers that are younger than the grace of tombstones:
those cannot have been purged.  So what it pushes is not all there is, and during a transition it
vouches for nothing that it waits for (`AntiEntropy.push_partitions`).

It takes merges, but none into an older register: that may be the ghost of something deleted, which
would look young with a new value beside it.  `metadata.registers` refuses such a merge with `Busy`
until `metadata.pull`, which does the comparing, has judged the row: a ghost is a sibling that
nobody else knows of.  Ghosts are dropped if all other homes answered and none of them is waiting
itself.  When other homes were restored too, nothing can be told apart, and it is kept.
"""

from collections.abc import Callable, Iterable

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Corrupt
from dfs.hashing import PARTITIONS
from metadata.merkle import Op, Table

ROW = b"npullfirst"  # format:u8, epoch of the last map that was followed:u32, bit map of partitions
_FORMAT = 1
KEEP = 23 * 3600_000_000  # us: grace of tombstones less an hour of clock skew


class PullFirst:
    """Which partitions this node has to pull before it is a full home of them; persistent."""

    def __init__(self, view: Table) -> None:
        """Read the mark from the store."""
        raw = view.get(ROW) or bytes((_FORMAT, 0, 0, 0, 0))
        if raw[0] != _FORMAT:
            raise Corrupt(f"the list of waiting partitions has format {raw[0]}: upgrade dfs")
        self._epoch = int.from_bytes(raw[1:5], "big")
        self._bits = int.from_bytes(raw[5:], "little")
        self.begins = 0  # times that partitions began to wait since the start

    def follow(
        self, old: ClusterMap | None, new: ClusterMap, me: int, holds: Callable[[int], bool]
    ) -> list[Op]:
        """Let partitions wait of which `me` becomes a home, or may have been none for a while.

        `holds(partition)` says whether there are registers from before.  Whoever holds none has
        nothing that could be too old, and becomes a home as any new one does.
        """
        known = self._epoch
        if new.epoch <= known:
            return []
        next_one = old is not None and old.epoch == known == new.epoch - 1
        self._epoch = new.epoch
        for partition in range(PARTITIONS):
            if new.last_change(METADATA, partition) <= known:
                continue
            was = old is not None and next_one and _is_home(old, me, partition)
            if not was and _is_home(new, me, partition) and holds(partition):
                self._bits |= 1 << partition
                self.begins += 1
        return self._ops()

    def waiting(self, partition: int) -> bool:
        """Whether the partition was not compared with its other homes yet."""
        return bool(self._bits >> partition & 1)

    def partitions(self) -> list[int]:
        """Those that wait; ascending."""
        return [p for p in range(PARTITIONS) if self._bits >> p & 1] if self._bits else []

    def begin(self, partitions: Iterable[int] = range(PARTITIONS)) -> list[Op]:
        """Let partitions (all of them) wait, from now on; store the operations before serving."""
        self.begins += 1
        for partition in partitions:
            self._bits |= 1 << partition
        return self._ops()

    def finish(self, partitions: Iterable[int]) -> list[Op]:
        """End the waiting; also for operators who know better."""
        for partition in partitions:
            self._bits &= ~(1 << partition)
        return self._ops()

    def _ops(self) -> list[Op]:
        size = (self._bits.bit_length() + 7) // 8
        head = bytes([_FORMAT]) + self._epoch.to_bytes(4, "big")
        return [(ROW, head + self._bits.to_bytes(size, "little"))]


def _is_home(cluster: ClusterMap, node: int, partition: int) -> bool:
    return any(node in row for row in cluster.write_sets(METADATA, partition))
