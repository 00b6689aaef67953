"""Anti-entropy: two homes of a partition find where they differ, and exchange just that.

Push-pull, as in Demers et al., "Epidemic Algorithms for Replicated Database Maintenance" (PODC
1987), over the digests of `metadata.merkle`: totals of all shared partitions (one call), bucket
sums of those that differ, keys with value digests of the buckets that differ, then items both ways
in batches.  `metadata/SYNC.md` says when, and why nothing comes back from the dead this way.

Sans-IO: see `metadata.steps` for the effects.  `now` is wall time in microseconds.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Busy, InvalidArgument, NotHome, StaleEpoch
from dfs.hashing import PARTITIONS
from metadata.exchange import (
    BATCH_BYTES,
    BATCH_ITEMS,
    Exchange,
    Key,
    Outcome,
    Want,
    pack_sums,
)
from metadata.merkle import (
    BLOBS,
    BUCKETS,
    DIGEST,
    REGISTERS,
    TABLES,
    Digests,
    Table,
    bucket_of,
    partition_of_row,
    rows_of,
    value_digest,
)
from metadata.rejoin import KEEP, PullFirst
from metadata.steps import Call, Item, Merge, Steps

GROUP = 32  # partitions compared at once
SCAN_ROWS = 2000  # looked at for one answer
SCAN_BYTES = 8 << 20  # of values read and hashed for one answer
FRESH = 30_000_000  # us: a younger register may be on its way to its other homes anyway
AHEAD = 3600_000_000  # us: a register from further in the future is not called fresh
OLDEST = 3 * 3600_000_000  # us: a push that was sent longer ago is refused
EVERY_BUCKET = b"\xff" * (BUCKETS // 8)


def members(cluster: ClusterMap, partition: int) -> tuple[int, ...]:
    """All homes of a partition that take writes now: one set, or two during a transition."""
    sets = cluster.write_sets(METADATA, partition)
    return sets[0] if len(sets) == 1 else tuple(dict.fromkeys(x for row in sets for x in row))


class AntiEntropy:
    """One node's part: answers what others ask (`handle`), and drives exchanges.

    `newest` gives the hybrid logical time (microseconds) of the newest write in an encoded
    register.
    """

    def __init__(
        self,
        me: int,
        get_map: Callable[[], ClusterMap],
        view: Table,
        digests: Digests,
        pull_first: PullFirst,
        newest: Callable[[bytes], int],
    ) -> None:
        """Compare what `view` reads."""
        self.me = me
        self.get_map = get_map
        self.view = view
        self.digests = digests
        self.pull_first = pull_first
        self.newest = newest
        self._shared: tuple[bytes, dict[int, list[int]]] = (b"", {})

    # ------------------------------------------------------------------------------- who with whom

    def shared(self, cluster: ClusterMap, peer: int) -> list[int]:
        """Partitions of which both are homes; ascending."""
        digest, found = self._shared
        if digest != cluster.digest:
            self._shared = cluster.digest, found
            found.clear()
            for partition in range(PARTITIONS):
                row = members(cluster, partition)
                if self.me in row:
                    for node in row:
                        found.setdefault(node, []).append(partition)
        return found.get(peer, [])

    def peers(self, cluster: ClusterMap) -> list[int]:
        """Nodes with which anything is shared."""
        self.shared(cluster, self.me)
        return sorted(node for node in self._shared[1] if node != self.me)

    def may_send(self, cluster: ClusterMap, table: int, partition: int, node: int) -> bool:
        """Whether rows of `node` may go to others: registers only from homes of this map.

        Nothing that was acknowledged lives at a former home only, but what its successors have
        purged since may.  Blobs never change and may come from anywhere.
        """
        return table == BLOBS or node in members(cluster, partition)

    # ------------------------------------------------------------------------------------ answering

    def handle(
        self, method: str, sender: int, epoch: int, args: tuple[Any, ...], now: int
    ) -> Steps[tuple[Any, ...]]:
        """Answer `sync.METHOD` of another node; see `dfs.wire.messages`."""
        cluster = self.get_map()
        if args[0] not in TABLES:
            raise InvalidArgument(f"there is no table {args[0]!r}")
        if method == "sync.totals":
            return self._totals(cluster, sender, epoch, *args)
        if method == "sync.buckets":
            return self._buckets(cluster, sender, epoch, *args)
        if method == "sync.keys":
            return self._keys(cluster, sender, epoch, *args, now=now)
        if method == "sync.items":
            return self._items(cluster, sender, epoch, *args, now=now)
        return self._push(cluster, sender, epoch, *args, now=now)

    def _check(
        self, cluster: ClusterMap, epoch: int, table: int, partition: int, sender: int
    ) -> None:
        """Refuse what another map's homes must not do; raises `StaleEpoch` or `NotHome`."""
        if type(partition) is not int or not 0 <= partition < PARTITIONS:
            raise InvalidArgument(f"there is no partition {partition!r}")
        last = cluster.last_change(METADATA, partition)
        if epoch < last:
            raise StaleEpoch(
                f"partition {partition} has other homes since epoch {last}, not {epoch}",
                cluster.encode(),
            )
        homes = members(cluster, partition)
        if table == REGISTERS and (self.me not in homes or sender not in homes):
            raise NotHome(
                f"nodes {self.me} and {sender} are not both homes of partition {partition} "
                f"in epoch {cluster.epoch}",
                homes,
            )

    def _totals(
        self, cluster: ClusterMap, sender: int, epoch: int, table: int, packed: bytes, some: Any
    ) -> Steps[tuple[Any, ...]]:
        if not self.digests.built(table):
            raise Busy(f"the digests of node {self.me} are not complete yet")
        theirs = {
            int.from_bytes(packed[i : i + 2], "big"): int.from_bytes(packed[i + 2 : i + 34], "big")
            for i in range(0, len(packed), 34)
        }
        differing = []
        for partition in self.shared(cluster, sender) if some is None else some:
            if epoch < cluster.last_change(METADATA, partition):
                continue
            if self.digests.total(table, partition) != theirs.get(partition, 0):
                differing.append(partition)
        yield from ()
        return (tuple(differing),)

    def _buckets(
        self, cluster: ClusterMap, sender: int, epoch: int, table: int, partitions: Sequence[int]
    ) -> Steps[tuple[Any, ...]]:
        found = []
        for partition in partitions[:GROUP]:
            self._check(cluster, epoch, table, partition, sender)
            found.append(pack_sums(self.digests.buckets(table, partition)))
        waiting = tuple(self.pull_first.waiting(p) for p in partitions[:GROUP])
        yield from ()
        return (tuple(found), waiting)

    def _keys(
        self,
        cluster: ClusterMap,
        sender: int,
        epoch: int,
        table: int,
        wants: Sequence[Want],
        after: bytes,
        until: bytes,
        forced: bool,
        *,
        now: int,
    ) -> Steps[tuple[Any, ...]]:
        for partition, _ in wants:
            self._check(cluster, epoch, table, partition, sender)
        if forced:  # the caller concludes from it that we hold the rows, so they must be durable
            yield Merge(table, ())
        keys, cursor = self.listing(table, wants, after, until, None if forced else now)
        return (tuple(keys), cursor)

    def _items(
        self,
        cluster: ClusterMap,
        sender: int,
        epoch: int,
        table: int,
        rows: Sequence[bytes],
        *,
        now: int,
    ) -> Steps[tuple[Any, ...]]:
        for row in rows:
            self._check(cluster, epoch, table, _partition(table, row), sender)
        yield from ()
        items, taken = self.read(table, rows, now)
        return (tuple(items), taken)

    def _push(
        self,
        cluster: ClusterMap,
        sender: int,
        epoch: int,
        table: int,
        items: Sequence[Item],
        sent: int,
        *,
        now: int,
    ) -> Steps[tuple[Any, ...]]:
        if now - sent > OLDEST:
            raise StaleEpoch(f"rows that were sent {(now - sent) // 1_000_000} s ago are refused")
        for row, _ in items:
            partition = _partition(table, row)
            self._check(cluster, epoch, table, partition, sender)
            if self.me not in members(cluster, partition):
                raise NotHome(f"node {self.me} is no home of partition {partition}")
        changed = yield Merge(table, items)
        return (changed,)

    # -------------------------------------------------------------------------------------- reading

    def listing(
        self, table: int, wants: Sequence[Want], after: bytes, until: bytes, now: int | None
    ) -> tuple[list[Key], bytes]:
        """Keys of some buckets in (after, until], ascending, and where to go on (b"" = complete).

        An empty `until` is the end.  Looks at a bounded number of rows.  With `now`, fresh
        registers have an empty digest.
        """
        keys: list[Key] = []
        rows_left, bytes_left = SCAN_ROWS, SCAN_BYTES
        for partition, mask in wants:
            bits = int.from_bytes(mask, "big")
            at, more = after, True
            while more:
                rows, more = rows_of(self.view, table, partition, at, min(256, rows_left))
                for row, value in rows:
                    if until and row > until:
                        return keys, b""
                    at = row
                    rows_left -= 1
                    if bits >> bucket_of(row) & 1:
                        bytes_left -= len(value)
                        keys.append((row, self._digest(table, row, value, now)))
                    if rows_left <= 0 or bytes_left <= 0:
                        return keys, b"" if row == until else row
        return keys, b""

    def _digest(self, table: int, row: bytes, value: bytes, now: int | None) -> bytes:
        if table == REGISTERS and now is not None and self._fresh(value, now):
            return b""
        return value_digest(table, row, value)

    def _fresh(self, register: bytes, now: int) -> bool:
        return now - FRESH < self.newest(register) < now + AHEAD

    def holds_back(self, table: int, row: bytes, value: bytes, now: int) -> bool:
        """Whether a row may be the ghost of a purged register: it is neither given nor merged."""
        return (
            table == REGISTERS
            and self.pull_first.waiting(partition_of_row(table, row))
            and self.newest(value) < now - KEEP
        )

    def read(self, table: int, rows: Sequence[bytes], now: int) -> tuple[list[Item], int]:
        """A batch of items, and how many of `rows` it answers; some may be gone or held back."""
        items: list[Item] = []
        size = 0
        for taken, row in enumerate(rows):
            value = self.view.get(row)
            if value is None or self.holds_back(table, row, value, now):
                continue
            size += len(value)
            if items and (size > BATCH_BYTES or len(items) >= BATCH_ITEMS):
                return items, taken
            items.append((row, value))
        return items, len(rows)

    # -------------------------------------------------------------------------------------- driving

    def exchange(
        self,
        peer: int,
        now: int,
        *,
        tables: Iterable[int] = TABLES,
        partitions: Sequence[int] | None = None,
        forced: bool = False,
        pull: bool = True,
        push: bool = True,
        kind: Callable[..., Exchange] = Exchange,
    ) -> Steps[Outcome]:
        """Make this node and `peer` equal in the partitions they share (or in some of them).

        `forced` does not leave out fresh registers; `kind` makes another kind of exchange.  Raises
        what calls raise; what was done until then stays done.
        """
        cluster = self.get_map()
        outcome = Outcome()
        for table in tables:
            differing = yield from self.differing(peer, table, partitions)
            for i in range(0, len(differing), GROUP):
                group = differing[i : i + GROUP]
                run = kind(self, cluster, peer, table, now, forced, pull, push)
                outcome.add((yield from run.run(group)))
        return outcome

    def differing(
        self, peer: int, table: int, partitions: Sequence[int] | None = None
    ) -> Steps[Sequence[int]]:
        """Of the shared partitions, or of `partitions`, those with other digests at `peer`.

        None as long as the digests of this node are not complete.
        """
        if not self.digests.built(table):
            return ()
        cluster = self.get_map()
        chosen = self.shared(cluster, peer) if partitions is None else partitions
        packed = b"".join(
            p.to_bytes(2, "big") + total.to_bytes(DIGEST, "big")
            for p, total in zip(chosen, self.digests.totals(table, chosen), strict=True)
            if total
        )
        some = None if partitions is None else tuple(partitions)
        (found,) = yield Call(peer, "sync.totals", (table, packed, some), cluster.epoch)
        differing: Sequence[int] = found
        return differing

    def push_partition(
        self, partition: int, to: int, now: int, *, tables: Sequence[int] = TABLES
    ) -> Steps[Outcome]:
        """Give a new home one partition; see `push_partitions`."""
        return self.push_partitions((partition,), to, now, tables=tables)

    def push_partitions(
        self, partitions: Sequence[int], to: int, now: int, *, tables: Sequence[int] = TABLES
    ) -> Steps[Outcome]:
        """Give a new home everything this node holds of some partitions, durably.

        Call it after this node has learned of the transition: what it accepts from then on goes to
        both sets of homes by itself.  When it returns, `to` holds all of each partition that is not
        in `failed`.  After a failure call it again; what is there is not sent again.  Partitions
        that are equal already cost four calls, however many they are.

        A partition that waits is not pushed yet, and fails: this node may lack some of it, and
        holds back what is old.  With others of its kind it would vouch for a new home that has
        nothing (`dfs.cluster.joint` counts on every member of A having what was acknowledged).
        """
        if any(not self.digests.built(table) for table in tables):
            text = "the digests of this node are not complete yet"
            return Outcome(errors=[text], failed=list(partitions))
        began = self.pull_first.begins
        late: list[int] = []
        if REGISTERS in tables:
            late = [p for p in partitions if not self.rule_vouches(p)]
        left_out = set(late)
        ready = [p for p in partitions if p not in left_out]
        outcome = Outcome()
        if ready:
            outcome = yield from self.exchange(
                to, now, tables=tables, partitions=ready, forced=True, pull=False
            )
            cluster = self.get_map()
            for table in tables:  # what digests call equal may be on its way to the disk there
                yield Call(to, "sync.push", (table, (), now), cluster.epoch)
        if REGISTERS in tables and self.pull_first.begins != began:
            late = list(partitions)  # some rows may have been missing for a part of the time
        if late:
            outcome.errors.append(
                f"node {self.me} waits for {len(late)} partitions, the first is {late[0]}: they "
                "are pushed once they were compared with their other homes (`dfs node workers`)"
            )
            outcome.failed = list(dict.fromkeys((*outcome.failed, *late)))
        return outcome

    def rule_vouches(self, partition: int) -> bool:
        """Whether what this node holds of a partition is all that it must push."""
        return not self.pull_first.waiting(partition)


def _partition(table: int, row: Any) -> int:
    try:
        return partition_of_row(table, row)
    except (ValueError, TypeError) as e:
        raise InvalidArgument(str(e)) from None
