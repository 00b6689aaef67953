"""Digests of what a node holds: what lets two replicas find out in one message that they are equal.

The rows of a table and partition are spread over 256 buckets by a byte of a keyed BLAKE3 of the row
key (keyed, because the plain hash also chooses the partition and would fill 16 buckets only).  A
bucket's digest is

    sum mod 2^256 over its rows of BLAKE3(row key | BLAKE3(value))

a multiset hash that is updated by a subtraction and an addition (AdHash: Bellare and Micciancio,
"A New Paradigm for Collision-Free Hashing", EUROCRYPT 1997).  A sum, not an exclusive or: whoever
chooses values could cancel the latter by linear algebra, and a row counted twice would vanish.
A partition's digest is the sum of its buckets; it is kept in memory.

In the store a bucket is the row `m` table:u8 partition:u16 bucket:u8 -> 32 bytes, big-endian; no
row is zero.  The row changes in the same batch as the rows it describes, so there is nothing to
rebuild after a crash.

Contract.  `Digests.ops` computes new sums from the newest ones it knows, and counts on its result
being applied next.  So for each table, between `ops` and the moment the store's reads see the batch
no other `ops` of that table may run: one writer, or a lock around both.  When the store refuses the
batch, or the caller does not know whether it took it, `reload` the operations: they are then
whatever the store says.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any, Protocol

from blake3 import blake3

from dfs.errors import Corrupt
from dfs.hashing import PARTITIONS

Op = tuple[bytes, bytes | None]  # for the store; None: delete
Change = tuple[int, int, bytes, bytes | None, bytes | None]  # table, partition, row, old, new value

REGISTERS = 0
BLOBS = 1
TABLES = (REGISTERS, BLOBS)
BUCKETS = 256
DIGEST = 32  # bytes
PREFIX = b"m"
BUILT = b"ndigests"  # row: which tables have complete digests, a byte each, after a format byte
_FORMAT = 1
_MASK = (1 << 256) - 1
_BUCKET_KEY = b"dfs merkle buckets".ljust(32, b"\0")
_ENTRY = 232  # bytes of a cached sum: two integers and its share of the dict
PAGE = 500  # rows read at once
_BITMAP = PARTITIONS * BUCKETS // 8  # bytes


class Table(Protocol):
    """An ordered map that is read synchronously: a store, a snapshot of it, or a test's dict."""

    def get(self, key: bytes) -> bytes | None:
        """The value, None if absent; raises `Corrupt` when damage hides it."""
        ...

    def scan(
        self, prefix: bytes, after: bytes = b"", limit: int = 1000
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` items with the prefix and keys greater than `after`, ascending."""
        ...


def bucket_of(row: bytes) -> int:
    """The bucket of a row key, 0..255."""
    return int(blake3(row, key=_BUCKET_KEY).digest(1)[0])


def value_digest(table: int, row: bytes, value: bytes) -> bytes:
    """BLAKE3 of the value, which for a blob is its name (blobs are verified before they count)."""
    return row[1:] if table == BLOBS else blake3(value).digest()


def element(row: bytes, digest: bytes) -> int:
    """What a row with this value digest adds to its bucket."""
    return int.from_bytes(blake3(row + digest).digest(), "big")


def bucket_row(table: int, partition: int, bucket: int) -> bytes:
    """Key of a bucket's digest in the store."""
    return b"m%c%c%c%c" % (table, partition >> 8, partition & 255, bucket)


def row_prefix(table: int, partition: int) -> tuple[bytes, bytes, bytes]:
    """(prefix, after, end): a partition's rows have the prefix and lie in (after, end)."""
    if table == REGISTERS:
        prefix = b"r" + partition.to_bytes(2, "big")
        return prefix, b"", prefix + b"\xff" * 1026
    # the top 12 bits of the hash: the upper half of the partition is a byte, the rest half a byte
    first, end = partition << 4, (partition << 4) + 15
    prefix = b"b" + first.to_bytes(2, "big")[:1]
    return prefix, b"b" + first.to_bytes(2, "big"), b"b" + end.to_bytes(2, "big") + b"\xff" * 31


def partition_of_row(table: int, row: bytes) -> int:
    """The partition a row key belongs to; raises `ValueError` for a key of another table."""
    if table == REGISTERS and row[:1] == b"r" and 5 <= len(row) <= 1028:
        partition = int.from_bytes(row[1:3], "big")
        if partition < PARTITIONS:
            return partition
    if table == BLOBS and row[:1] == b"b" and len(row) == 1 + DIGEST:
        return int.from_bytes(row[1:3], "big") >> 4
    raise ValueError(f"{row[:40]!r} is no row of table {table}")


def rows_of(
    view: Table, table: int, partition: int, after: bytes = b"", limit: int = PAGE
) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Up to `limit` rows of a partition with keys greater than `after`, and whether more follow."""
    prefix, start, end = row_prefix(table, partition)
    rows = view.scan(prefix, max(after, start), limit)
    more = len(rows) == limit
    if rows and rows[-1][0] > end:
        rows, more = [item for item in rows if item[0] <= end], False
    return rows, more


class Digests:
    """The digests of a node's tables; see the module's docstring for the contract."""

    def __init__(self, view: Table, *, cache_bytes: int = 16 << 20) -> None:
        """Read sums from `view` when needed and keep up to `cache_bytes` of them; call `load`."""
        self._view = view
        self._entries = max(BUCKETS, cache_bytes // _ENTRY)
        self._cache: dict[int, int] = {}  # slot -> sum; the one used last is last
        self._totals = [[0] * PARTITIONS for _ in TABLES]
        # A bit for each slot: unset if the store surely has no row of it.  So it is with most
        # buckets of a small store, and reading those would search every table for nothing.
        self._present = [bytearray(b"\xff") * _BITMAP for _ in TABLES]
        self._built: set[int] = set()
        self.damaged: dict[tuple[int, int], None] = {}  # partitions with sums that were lost
        self.drift = 0  # buckets that were found wrong; must stay 0
        self.hits = self.misses = 0

    # -- reading

    def load(self) -> None:
        """Sum up the partitions from the store's rows; at most 256 * 4096 rows a table."""
        for _ in self.loading():
            pass

    def loading(self) -> Generator[int, None, None]:
        """`load` in steps, each of which yields the number of rows read."""
        self._cache.clear()
        marker = self._view.get(BUILT) or b""
        self._built = set(marker[1:]) if marker[:1] == bytes([_FORMAT]) else set()
        for table in TABLES:
            totals = self._totals[table] = [0] * PARTITIONS
            self._present[table] = bytearray(b"\xff") * _BITMAP
            present = bytearray(_BITMAP)
            prefix = PREFIX + bytes([table])
            after = b""
            try:
                while rows := self._view.scan(prefix, after, PAGE):
                    for row, value in rows:
                        partition = int.from_bytes(row[2:4], "big")
                        totals[partition] += int.from_bytes(value, "big")
                        present[partition << 5 | row[4] >> 3] |= 1 << (row[4] & 7)
                    after = rows[-1][0]
                    yield len(rows)
                self._totals[table] = [total & _MASK for total in totals]
                self._present[table] = present
            except Corrupt:
                yield from self._load_damaged(table)

    def _load_damaged(self, table: int) -> Generator[int, None, None]:
        """Sum up the partitions one by one; what is left of a damaged one does not count.

        Its total means nothing until it is rebuilt, and reading a million sums one by one, as they
        may all be in one bad block, would keep a node from starting for half a minute.
        """
        for partition in range(PARTITIONS):
            try:
                rows = self._view.scan(bucket_row(table, partition, 0)[:-1], b"", BUCKETS)
            except Corrupt:
                self.damaged[table, partition] = None
                rows = []
            self._totals[table][partition] = sum(_sums(rows)) & _MASK
            yield 1 + len(rows)

    def total(self, table: int, partition: int) -> int:
        """The digest of a partition."""
        return self._totals[table][partition]

    def totals(self, table: int, partitions: Iterable[int]) -> list[int]:
        """The digests of some partitions."""
        totals = self._totals[table]
        return [totals[p] for p in partitions]

    def buckets(self, table: int, partition: int) -> list[int]:
        """The 256 sums of a partition."""
        prefix = bucket_row(table, partition, 0)[:-1]
        try:
            sums = _sums(self._view.scan(prefix, b"", BUCKETS))
        except Corrupt:
            sums = [self._read(table, partition, bucket) for bucket in range(BUCKETS)]
        return sums

    def _read(self, table: int, partition: int, bucket: int) -> int:
        """A sum from the store; a lost one counts as zero and its partition as damaged."""
        try:
            value = self._view.get(bucket_row(table, partition, bucket))
        except Corrupt:
            self.damaged[table, partition] = None
            return 0
        return int.from_bytes(value, "big") if value is not None else 0

    # -- changing

    def ops(self, changes: Sequence[Change]) -> list[Op]:
        """Store operations that make the digests follow the changes; goes into their batch.

        Changes are (table, partition, row key, old value or None, new value or None), in order;
        for blobs only whether a value is None counts.
        """
        deltas: dict[int, int] = {}
        for table, partition, row, old, new in changes:
            if new is not None:
                if old is not None and (old == new or table == BLOBS):
                    continue
                delta = element(row, value_digest(table, row, new))
                if old is not None:
                    delta -= element(row, value_digest(table, row, old))
            elif old is not None:
                delta = -element(row, value_digest(table, row, old))
            else:
                continue
            slot = table << 20 | partition << 8 | bucket_of(row)
            deltas[slot] = deltas.get(slot, 0) + delta
        return self._add(deltas)

    def _add(self, deltas: dict[int, int]) -> list[Op]:
        result: list[Op] = []
        cache = self._cache
        for slot, delta in deltas.items():
            table, partition = slot >> 20, slot >> 8 & 0xFFF
            present = self._present[table]
            byte, bit = slot >> 3 & _BITMAP - 1, 1 << (slot & 7)
            known = cache.pop(slot, None)
            if known is not None:
                self.hits += 1
            elif present[byte] & bit:
                self.misses += 1
                known = self._read(table, partition, slot & 255)
            else:
                known = 0
            present[byte] |= bit
            new = cache[slot] = (known + delta) & _MASK
            totals = self._totals[table]
            totals[partition] = (totals[partition] + delta) & _MASK
            value = new.to_bytes(DIGEST, "big") if new else None
            result.append((bucket_row(table, partition, slot & 255), value))
        while len(cache) > self._entries:
            del cache[next(iter(cache))]
        return result

    def reload(self, ops: Iterable[Op]) -> None:
        """Make the sums that `ops` names what the store says: it may not have taken the batch."""
        for key, value in ops:
            if key[:1] != PREFIX:
                continue
            table, partition, bucket = key[1], int.from_bytes(key[2:4], "big"), key[4]
            believed = int.from_bytes(value, "big") if value is not None else 0
            known = self._cache.pop(table << 20 | partition << 8 | bucket, believed)
            totals = self._totals[table]
            stored = self._read(table, partition, bucket)
            totals[partition] = (totals[partition] + stored - known) & _MASK

    # -- checking

    def built(self, table: int) -> bool:
        """Whether every row of the table is in its digest: false for data older than digests."""
        return table in self._built

    def mark_built(self, table: int) -> list[Op]:
        """Store operations that say that the table's digests are complete."""
        self._built.add(table)
        return [(BUILT, bytes([_FORMAT, *sorted(self._built)]))]

    def replace_lost(self, table: int, partition: int) -> list[Op]:
        """Forget what is remembered of a damaged partition, and make lost sums readable: as zero.

        The partition's digests are wrong from here on, until `recompute` of a newer snapshot and
        `correct`.  The contract of `ops` holds.
        """
        base = table << 20 | partition << 8
        for bucket in range(BUCKETS):
            self._cache.pop(base | bucket, None)
        result: list[Op] = []
        try:
            sums = _sums(self._view.scan(bucket_row(table, partition, 0)[:-1], b"", BUCKETS))
        except Corrupt:
            sums = []
            for bucket in range(BUCKETS):
                row = bucket_row(table, partition, bucket)
                try:
                    sums.append(int.from_bytes(self._view.get(row) or b"", "big"))
                except Corrupt:
                    result.append((row, None))
        self.damaged[table, partition] = None
        self._totals[table][partition] = sum(sums) & _MASK
        return result

    def correct(self, table: int, partition: int, errors: dict[int, int]) -> list[Op]:
        """Store operations that add what `recompute` found missing; the contract of `ops` holds.

        Counted as drift, unless the table was not built yet or the store lost the sums.
        """
        if self.built(table) and (table, partition) not in self.damaged:
            self.drift += len(errors)
        self.damaged.pop((table, partition), None)
        base = table << 20 | partition << 8
        return self._add({base | bucket: error for bucket, error in errors.items()})

    def statistics(self) -> dict[str, int]:
        """Counts, and the bytes of the cache."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "cache_bytes": len(self._cache) * _ENTRY,
            "drift": self.drift,
            "damaged": len(self.damaged),
        }


def recompute(snapshot: Table, table: int, partition: int) -> Generator[int, None, dict[int, int]]:
    """Compare a partition's digests with its rows; returns {bucket: what its sum lacks}.

    Works on a snapshot, in steps that yield the bytes read, so that it can be paced.  What it
    returns is a difference: it stays right while the partition changes, because every change moves
    the rows and the sums alike.  So it may be applied later, to sums that are newer.  Raises
    `Corrupt` when rows or sums are lost (`Digests.replace_lost`).
    """
    sums = [0] * BUCKETS
    after = b""
    more = True
    while more:
        rows, more = rows_of(snapshot, table, partition, after)
        for row, value in rows:
            if table == BLOBS and blake3(value).digest() != row[1:]:
                continue  # a bad copy counts as absent, and is about to be
            sums[bucket_of(row)] += element(row, value_digest(table, row, value))
        if rows:
            after = rows[-1][0]
            yield sum(len(value) for _, value in rows)
    stored = _sums(snapshot.scan(bucket_row(table, partition, 0)[:-1], b"", BUCKETS))
    errors = {b: (sums[b] - stored[b]) & _MASK for b in range(BUCKETS)}
    return {bucket: error for bucket, error in errors.items() if error}


def _sums(rows: Sequence[tuple[bytes, Any]]) -> list[int]:
    sums = [0] * BUCKETS
    for row, value in rows:
        sums[row[-1]] = int.from_bytes(value, "big")
    return sums
