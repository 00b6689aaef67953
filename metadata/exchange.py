"""One exchange of two homes: where a few partitions differ, and the rows that go both ways.

`metadata.antientropy` begins exchanges and answers them; `metadata.pull` has one of its own kind.

Sans-IO: see `metadata.steps` for the effects.  `now` is wall time in microseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dfs.cluster.map import ClusterMap
from dfs.errors import Corrupt
from metadata.merkle import BUCKETS, DIGEST, Digests, Table, value_digest
from metadata.steps import Call, Item, Merge, Rest, Steps

BATCH_ITEMS = 256
BATCH_BYTES = 1 << 20  # of values; a batch holds at least one item

Key = tuple[bytes, bytes]  # row, value digest; b"" = too fresh to compare
Want = tuple[int, bytes]  # partition, bit mask of buckets


@dataclass(slots=True)
class Outcome:
    """What an exchange did."""

    partitions: int = 0  # that differed
    pulled: int = 0
    pushed: int = 0
    fresh: int = 0  # rows left alone
    errors: list[str] = field(default_factory=list)  # partitions that could not be compared
    failed: list[int] = field(default_factory=list)  # those partitions

    def add(self, other: "Outcome") -> None:
        """Sum up."""
        self.partitions += other.partitions
        self.pulled += other.pulled
        self.pushed += other.pushed
        self.fresh += other.fresh
        self.errors += other.errors
        self.failed += other.failed


class Side(Protocol):
    """What an exchange needs of its own node; `metadata.antientropy.AntiEntropy`."""

    me: int
    view: Table
    digests: Digests

    def listing(
        self, table: int, wants: Sequence[Want], after: bytes, until: bytes, now: int | None
    ) -> tuple[list[Key], bytes]:
        """Keys of some buckets, and where to go on."""
        ...

    def read(self, table: int, rows: Sequence[bytes], now: int) -> tuple[list[Item], int]:
        """A batch of items, and how many of `rows` it answers."""
        ...

    def may_send(self, cluster: ClusterMap, table: int, partition: int, node: int) -> bool:
        """Whether rows of `node` may go to others."""
        ...

    def holds_back(self, table: int, row: bytes, value: bytes, now: int) -> bool:
        """Whether a row may be the ghost of a purged register: it is neither given nor merged."""
        ...


class Exchange:
    """One table and a few partitions that differ."""

    def __init__(
        self,
        node: Side,
        cluster: ClusterMap,
        peer: int,
        table: int,
        now: int,
        forced: bool,
        pull: bool,
        push: bool,
    ) -> None:
        """For the node `node`, by its map; the options are those of `AntiEntropy.exchange`."""
        self.node = node
        self.epoch = cluster.epoch
        self.cluster = cluster
        self.peer = peer
        self.table = table
        self.now = now
        self.forced = forced
        self.pull = pull
        self.push = push
        self.outcome = Outcome()

    def run(self, partitions: Sequence[int]) -> Steps[Outcome]:
        """Compare and exchange; partitions with damage on either side are named, not compared."""
        try:
            yield from self._compare(partitions)
        except Corrupt as e:
            if len(partitions) == 1:
                self.outcome.errors.append(f"partition {partitions[0]}: {e}")
                self.outcome.failed.append(partitions[0])
            else:
                for partition in partitions:
                    yield from self.run((partition,))
        return self.outcome

    def _compare(self, partitions: Sequence[int]) -> Steps[None]:
        node, table = self.node, self.table
        packed, _ = yield self._call("sync.buckets", tuple(partitions))
        pushed: list[Want] = []
        pulled: list[Want] = []
        for partition, sums in zip(partitions, packed, strict=True):
            mine, theirs = node.digests.buckets(table, partition), unpack_sums(sums)
            mask = sum(1 << b for b in range(BUCKETS) if mine[b] != theirs[b])
            if not mask:
                continue
            self.outcome.partitions += 1
            want = partition, mask.to_bytes(BUCKETS // 8, "big")
            if node.may_send(self.cluster, table, partition, node.me):
                pushed.append(want)
            else:
                pulled.append(want)
        if pushed:
            yield from self._walk(tuple(pushed), self.pull, self.push)
        if pulled and self.pull:
            yield from self._walk(tuple(pulled), self.pull, False)

    def _walk(self, wants: tuple[Want, ...], pull: bool, push: bool) -> Steps[None]:
        """Go through the rows of both sides in step."""
        node, table = self.node, self.table
        now = None if self.forced else self.now
        after = b""
        while True:
            mine, until = node.listing(table, wants, after, b"", now)
            at = 0
            while True:
                args = wants, after, until, self.forced
                theirs, cursor = yield self._call("sync.keys", *args)
                end = at
                while end < len(mine) and (not cursor or mine[end][0] <= cursor):
                    end += 1
                yield from self._settle(mine[at:end], theirs, pull, push)
                at = end
                if not cursor:
                    break
                after = cursor
            if not until:
                return
            after = until

    def _settle(
        self, mine: Sequence[Key], theirs: Sequence[Key], pull: bool, push: bool
    ) -> Steps[None]:
        """Exchange what differs between two listings of the same range."""
        ours, others = dict(mine), dict(theirs)
        wanted: list[bytes] = []
        offered: dict[bytes, bytes] = {}  # row -> digest of the peer's value; b"" = it has none
        for row, digest in others.items():
            own = ours.get(row)
            if own == digest and digest:
                continue
            if not digest or own == b"":
                self.outcome.fresh += 1
                continue
            wanted.append(row)
            if own is not None:
                offered[row] = digest
        for row, digest in ours.items():
            if row not in others:
                if digest:
                    offered[row] = b""
                else:
                    self.outcome.fresh += 1
        if pull and wanted:
            yield from self._fetch(wanted)
        if push and offered:
            yield from self._offer(offered)

    def _fetch(self, rows: list[bytes]) -> Steps[None]:
        """Pull rows and merge them."""
        while rows:
            items, taken = yield self._call("sync.items", tuple(rows[:BATCH_ITEMS]))
            yield from self._take(items)
            yield Rest(_size(items))
            del rows[: max(1, taken)]

    def _take(self, items: Sequence[Item]) -> Steps[None]:
        """Merge what was pulled, but for what meets a register that is old and waits."""
        node, table = self.node, self.table
        ready = []
        for row, value in items:
            own = node.view.get(row)
            if own is not None and node.holds_back(table, row, own, self.now):
                self.set_aside(row, value)
            else:
                ready.append((row, value))
        if ready:
            self.outcome.pulled += yield Merge(table, ready)

    def set_aside(self, row: bytes, value: bytes) -> None:
        """Leave out what must not be merged: the pull of the partition judges the row."""

    def _offer(self, offered: dict[bytes, bytes]) -> Steps[None]:
        """Push rows whose value is another than the peer's still, after what was pulled."""
        table, view = self.table, self.node.view
        rows = [
            row
            for row, digest in offered.items()
            if (value := view.get(row)) is not None and value_digest(table, row, value) != digest
        ]
        while rows:
            items, taken = self.node.read(table, rows, self.now)
            if items:
                (changed,) = yield self._call("sync.push", tuple(items), self.now)
                self.outcome.pushed += changed
                yield Rest(_size(items))
            del rows[:taken]

    def _call(self, method: str, *args: Any) -> Call:
        return Call(self.peer, method, (self.table, *args), self.epoch)


def _size(items: Sequence[Item]) -> int:
    return sum(len(row) + len(value) for row, value in items)


def pack_sums(sums: Sequence[int]) -> bytes:
    """The sums of a partition's buckets that are not zero."""
    return b"".join(bytes([b]) + s.to_bytes(DIGEST, "big") for b, s in enumerate(sums) if s)


def unpack_sums(packed: bytes) -> list[int]:
    """What `pack_sums` packed."""
    sums = [0] * BUCKETS
    for i in range(0, len(packed), 1 + DIGEST):
        sums[packed[i]] = int.from_bytes(packed[i + 1 : i + 1 + DIGEST], "big")
    return sums
