"""Purging tombstones: a deleted register goes when no copy of what it deleted can come back.

One home does it for a partition, the first in the map, and only while every home is alive and the
map is stable.  First it *prepares*: tombstones older than a day go to all homes, and all must have
merged them to the same bytes.  Four hours later it *purges*: every home removes the rows that still
are those bytes.  Both requests carry the epoch, and a home refuses another epoch than its own, a
map in transition, and a partition that it is pulling itself.

The four hours let die whatever was read from a home before it knew of the tombstone: requests have
deadlines of a minute, pushes are refused three hours after they were sent, and clocks may differ by
one.  The day does the same for hints, whose age is that of the write they carry.  A crash between
is harmless: anti-entropy brings the tombstone back to those who purged it, and the next pass
removes it again.

Sans-IO: see `metadata.steps`.  `now` is wall time in microseconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import InvalidArgument, NotHome, StaleEpoch
from metadata.antientropy import OLDEST
from metadata.exchange import BATCH_BYTES, BATCH_ITEMS
from metadata.merkle import (
    REGISTERS,
    Table,
    partition_of_row,
    rows_of,
    value_digest,
)
from metadata.rejoin import PullFirst
from metadata.steps import Call, Item, Merge, Purge, Rest, Steps

GRACE = 24 * 3600_000_000  # us
SETTLE = OLDEST + 3600_000_000  # us: older than any message, whatever the clocks say
PENDING = 50_000  # prepared rows that are remembered; others are prepared again later

Doomed = tuple[bytes, bytes]  # row, digest of its tombstone


@dataclass(slots=True)
class Batch:
    """Tombstones of a partition that all its homes have."""

    partition: int
    epoch: int
    prepared: int  # us
    rows: list[Doomed] = field(default_factory=list)


class Tombstones:
    """One node's part in purging: leads for the partitions it is first home of, and answers.

    `newest` and `is_tombstone` look into encoded registers; `alive` says whether a node answers.
    """

    grace = GRACE
    settle = SETTLE

    def __init__(
        self,
        me: int,
        get_map: Callable[[], ClusterMap],
        view: Table,
        pull_first: PullFirst,
        *,
        newest: Callable[[bytes], int],
        is_tombstone: Callable[[bytes], bool],
        alive: Callable[[int], bool],
    ) -> None:
        """Nothing is remembered over a restart; it is prepared again."""
        self.me = me
        self.get_map = get_map
        self._view = view
        self._pull_first = pull_first
        self._newest = newest
        self._is_tombstone = is_tombstone
        self._alive = alive
        self.batches: list[Batch] = []
        self.prepared = 0
        self.purged = 0
        self.kept = 0  # rows that some home had changed

    # -- leading

    def allowed(self, cluster: ClusterMap, partition: int) -> bool:
        """Whether this node may purge in the partition now."""
        homes = cluster.homes(METADATA, partition)
        return (
            cluster.phase(METADATA) == 0
            and homes[0] == self.me
            and not self._pull_first.waiting(partition)
            and all(node == self.me or self._alive(node) for node in homes)
        )

    def _pending(self) -> int:
        return sum(len(batch.rows) for batch in self.batches)

    def prepare(self, partition: int, now: int) -> Steps[int]:
        """Push the old tombstones of a partition to all its homes; returns how many they have."""
        known = {row for b in self.batches if b.partition == partition for row, _ in b.rows}
        after, more, count = b"", True, 0
        while more and self._pending() < PENDING:
            cluster = self.get_map()
            if not self.allowed(cluster, partition):
                return count
            rows, more = rows_of(self._view, REGISTERS, partition, after, BATCH_ITEMS)
            items: list[Item] = []
            size = 0
            for row, value in rows:
                if size > BATCH_BYTES:
                    more = True
                    break
                after = row
                if row not in known and self._expired(value, now):
                    items.append((row, value))
                    size += len(value)
            if items:
                batch = yield from self._confirm(cluster, partition, items, now)
                self.batches.append(batch)
                count += len(batch.rows)
            yield Rest(sum(len(value) for _, value in rows))
        self.prepared += count
        return count

    def _expired(self, register: bytes, now: int) -> bool:
        return self._is_tombstone(register) and self._newest(register) < now - self.grace

    def _confirm(
        self, cluster: ClusterMap, partition: int, items: Sequence[Item], now: int
    ) -> Steps[Batch]:
        doomed = [(row, value_digest(REGISTERS, row, value)) for row, value in items]
        for node in cluster.homes(METADATA, partition):
            if node == self.me:
                yield Merge(REGISTERS, ())  # what was read may be on its way to the disk only
                digests = _digests(self._view, [row for row, _ in doomed])
            else:
                args = partition, tuple(items)
                (digests,) = yield Call(node, "tomb.prepare", args, cluster.epoch)
            doomed = [pair for pair, d in zip(doomed, digests, strict=True) if pair[1] == d]
            kept = {row for row, _ in doomed}
            items = [item for item in items if item[0] in kept]
        return Batch(partition, cluster.epoch, now, doomed)

    def purge(self, now: int) -> Steps[int]:
        """Purge what was prepared long enough ago; returns how many rows are gone everywhere.

        A batch whose purge fails, for example because a home went down, is prepared again later.
        """
        due = [b for b in self.batches if now - b.prepared >= self.settle]
        self.batches = [b for b in self.batches if now - b.prepared < self.settle]
        count = 0
        for batch in due:
            cluster = self.get_map()
            if cluster.epoch == batch.epoch and self.allowed(cluster, batch.partition):
                count += yield from self._purge(cluster, batch)
        return count

    def _purge(self, cluster: ClusterMap, batch: Batch) -> Steps[int]:
        rows = batch.rows
        for node in cluster.homes(METADATA, batch.partition):
            if node == self.me or not rows:
                continue
            args = batch.partition, tuple(rows)
            (gone,) = yield Call(node, "tomb.purge", args, cluster.epoch)
            self.kept += len(rows) - sum(gone)
            rows = [pair for pair, ok in zip(rows, gone, strict=True) if ok]
        if self.get_map().epoch != batch.epoch or not rows:
            return 0
        gone = yield Purge(rows)  # ours last: so that a pass that fails is repeated
        count = sum(map(bool, gone))
        self.purged += count
        return count

    # -- answering

    def handle(
        self, method: str, sender: int, epoch: int, args: tuple[Any, ...]
    ) -> Steps[tuple[Any, ...]]:
        """Answer `tomb.prepare` and `tomb.purge`; raises `StaleEpoch` or `NotHome` to refuse."""
        partition, items = args
        self._check(sender, epoch, partition, items)
        if method == "tomb.prepare":
            yield Merge(REGISTERS, items)
            self._check(sender, epoch, partition, items)  # the map may have changed meanwhile
            return (tuple(_digests(self._view, [row for row, _ in items])),)
        gone = yield Purge(items)
        return (tuple(gone),)

    def _check(self, sender: int, epoch: int, partition: int, items: Sequence[Any]) -> None:
        cluster = self.get_map()
        if epoch != cluster.epoch or cluster.phase(METADATA) != 0:
            raise StaleEpoch(
                f"tombstones are purged in one stable epoch only, not {epoch} at {cluster.epoch} "
                f"(phase {cluster.phase(METADATA)})",
                cluster.encode(),
            )
        homes = cluster.homes(METADATA, partition)
        if homes[0] != sender or self.me not in homes:
            raise NotHome(f"node {sender} does not purge partition {partition} at {self.me}", homes)
        if self._pull_first.waiting(partition):
            raise NotHome(f"node {self.me} is pulling partition {partition} itself")
        for row, _ in items:
            try:
                right = partition_of_row(REGISTERS, row) == partition
            except ValueError as e:
                raise InvalidArgument(str(e)) from None
            if not right:
                raise InvalidArgument(f"row {row[:40]!r} is not in partition {partition}")


def _digests(view: Table, rows: Sequence[bytes]) -> list[bytes]:
    """Value digests; b"" for absent rows."""
    found = []
    for row in rows:
        value = view.get(row)
        found.append(b"" if value is None else value_digest(REGISTERS, row, value))
    return found
