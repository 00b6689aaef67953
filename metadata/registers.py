"""The replica of the registers: turns a batch of requests into one store batch and their answers.

Everything here is synchronous and does no I/O of its own: reads go to a `Table`, writes are
returned as operations.  Whoever drives it (`metadata.kv`, the simulator) does, one batch at a time:

    ops, replies = registers.apply(now_us, work)
    await store.batch(ops)               # durable
    registers.settle()                   # or `abandon(ops)` when the store refused
    deliver the replies

The rows of registers, and with them their digests, are changed through this and nothing else, so
that old values are known exactly.  Between `apply` and `settle` the rows of the batch are
*unsettled*: what the store says of them may be old, or new and not yet durable, and an answer that
a power loss can take back would let a later read go backwards.  `read` says so, and the reader gets
in line behind the batch.

The fence is here too, at the moment a request is applied: one that carries an older epoch than the
last change of its partition's homes is refused, however long it waited before.
"""

from collections.abc import Callable, Iterable, Sequence
from struct import pack, unpack_from
from typing import Any, Protocol

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import (
    Busy,
    Corrupt,
    DfsError,
    InvalidArgument,
    NotHome,
    StaleEpoch,
)
from dfs.hashing import PARTITIONS, digest, partition_of
from metadata import versions
from metadata.actors import Actors
from metadata.merkle import REGISTERS, Change, Op, Table
from metadata.regained import Regained
from metadata.rejoin import KEEP

PREFIX = b"r"
MAX_KEY = 1024  # bytes of a user's key
HEAD = 4  # bytes of a row before the key: prefix, partition, space

# Requests, of peers or of this node itself, and their replies (a `DfsError` is one, too)
GET = "g"  # row -> register bytes, b"" if there is none
MERGE = "m"  # row, register -> None, durable
HINT = "h"  # row, register, target, written -> None, durable: keep it for node `target`
MINT = "p"  # row, context, value or None -> (register, context, siblings); own node only
PURGE = "x"  # row, BLAKE3 of the register -> whether it was that and is gone; own node only
DISCARD = "d"  # the same for registers that have values: ghosts of what others purged
SETTLE = "j"  # row, BLAKE3 of the register, another or b"" -> whether it replaced it; own node only
RAW = "o"  # ops, or a function that makes them at its turn -> None; own node only, no registers

CLEARED_AT_ONCE = 1000  # rows read at once while a regained partition is cleared

Request = tuple[Any, ...]
Reply = Any


class Digests(Protocol):
    """What keeps the digests of the rows; `metadata.merkle.Digests`."""

    def ops(self, changes: Sequence[Change]) -> list[Op]:
        """Operations that take the changes into account, for the same batch."""
        ...

    def reload(self, ops: Iterable[Op]) -> None:
        """These operations may not have happened."""
        ...


class Hints(Protocol):
    """What keeps registers for other nodes."""

    def add(self, row: bytes, register: bytes, target: int, written: int) -> list[Op]:
        """Operations that keep it; raises `Busy` or `DiskFull` over the limits."""
        ...

    def find(self, row: bytes) -> Sequence[bytes]:
        """Registers that are kept for others under this row; quick when there are none."""
        ...


class NoHints:
    """Refuses to keep anything."""

    def add(self, row: bytes, register: bytes, target: int, written: int) -> list[Op]:
        """See `Hints.add`."""
        raise Busy(f"this node keeps nothing for node {target}")

    def find(self, row: bytes) -> Sequence[bytes]:
        """See `Hints.find`."""
        return ()


def row_of(space: int, key: bytes) -> bytes:
    """The row of a key; raises `InvalidArgument`."""
    if key.__class__ is not bytes or not 0 < len(key) <= MAX_KEY:
        raise InvalidArgument(f"a key is 1 to {MAX_KEY} bytes, not {key!r:.60}")
    if space.__class__ is not int or not 0 <= space < 256:
        raise InvalidArgument(f"a space is 0 to 255, not {space!r}")
    spaced = bytes((space,)) + key
    return PREFIX + partition_of(digest(spaced)).to_bytes(2, "big") + spaced


def partition_of_row(row: Any) -> int:
    """The partition in a row's name; raises `InvalidArgument`."""
    if row.__class__ is not bytes or row[:1] != PREFIX or not HEAD < len(row) <= HEAD + MAX_KEY:
        raise InvalidArgument(f"no row of a register: {row!r:.60}")
    partition: int = unpack_from(">H", row, 1)[0]
    if partition >= PARTITIONS:
        raise InvalidArgument(f"there is no partition {partition}")
    return partition


def _has_row(request: Request) -> bool:
    """Whether a request of a batch names a row of a register."""
    return (
        len(request) > 1
        and request[1].__class__ is bytes
        and request[1][:1] == PREFIX
        and len(request[1]) > HEAD
    )


class Registers:
    """A node's copies of registers."""

    regained_class: type[Regained] = Regained

    def __init__(
        self,
        table: Table,
        number: int,
        cluster_map: ClusterMap,
        *,
        digests: Digests,
        hints: Hints | None = None,
        waiting: Callable[[int], bool] = lambda partition: False,
    ) -> None:
        """Serve the copies in `table` by `cluster_map`; the first batch has its state too.

        `waiting(partition)`: the copies there may be too old to be shown; see `metadata.rejoin`.
        """
        self._is_waiting = waiting
        self._table = table
        self._number = number
        self._map = cluster_map
        self._digests = digests
        self._hints: Hints = hints or NoHints()
        self.actors = Actors(table, number, cluster_map)
        self.regained = self.regained_class(table, number, cluster_map)
        self._clearing: list[int] = []  # partitions whose old rows go in the batch under way
        self._unsettled: dict[bytes, bytes | None] = {}
        self.merges = 0  # requests that changed a row
        self.mints = 0
        self.stale = 0  # requests refused by the fence
        self.siblings_max = 0  # most concurrent values seen in a register

    @property
    def map(self) -> ClusterMap:
        """The map that requests are judged by."""
        return self._map

    def follow(self, cluster_map: ClusterMap) -> None:
        """Judge by a newer map from the next request on."""
        if cluster_map.epoch > self._map.epoch:
            self._map = cluster_map
            self.actors.follow(cluster_map)
            self.regained.follow(cluster_map)

    # -------------------------------------------------------------------------------------- reads

    def read(self, epoch: int, row: bytes) -> bytes | None:
        """What a GET answers, at once; None when it must be asked by `apply`.

        Raises `StaleEpoch`, `InvalidArgument`, `Corrupt` (damage hides it; never "absent").
        """
        partition = partition_of_row(row)
        if row in self._unsettled:
            return None
        self._fence(epoch, partition)
        if partition in self.regained.pending:
            return None
        self._check_shown(partition)
        return self._answer(row, self._table.get(row))

    @property
    def unsettled(self) -> bool:
        """Whether a batch is under way, so that the store may show what is not durable."""
        return bool(self._unsettled)

    def scan(
        self, epoch: int, partition: int, prefix: bytes, after: bytes, limit: int
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` rows of a partition with the prefix after `after`, deleted ones too.

        Raises `StaleEpoch`, `Corrupt`.  Ask `unsettled` first.
        """
        self._fence(epoch, partition)
        self._check_shown(partition)
        return self._table.scan(prefix, after, limit)

    def _check_shown(self, partition: int) -> None:
        """Raise `Busy` while the partition was not compared with its other homes."""
        if self._is_waiting(partition) or partition in self.regained.pending:
            raise Busy(
                f"node {self._number} was away and compares partition {partition} with the other "
                "homes before it shows it; `dfs node workers` shows storage-repair at it"
            )

    def _answer(self, row: bytes, found: bytes | None) -> bytes:
        kept = self._hints.find(row)
        if not kept:
            return found or b""
        register = versions.decode(found) if found else versions.EMPTY
        for other in kept:
            register = versions.merge(register, versions.decode(other))
        return versions.encode(register)

    # ------------------------------------------------------------------------------------- writes

    def apply(
        self, now_us: int, work: Sequence[tuple[int, Request]]
    ) -> tuple[list[Op], list[Reply]]:
        """Carry out requests, each with the map epoch it was made with, in their order.

        Returns the operations for one batch and a reply for each request, a `DfsError` for one that
        is refused.  Replies hold once the operations are durable, those of reads included.
        """
        overlay = self._unsettled
        if overlay:
            raise AssertionError("the batch before is not settled")
        before: dict[bytes, bytes | None] = {}
        ops: list[Op] = []
        replies: list[Reply] = []
        if self.regained.pending:
            self._clear(work, before)
        for epoch, request in work:
            try:
                replies.append(self._one(now_us, epoch, request, before, ops))
            except DfsError as e:
                replies.append(e)
            except (TypeError, ValueError, IndexError) as e:
                replies.append(InvalidArgument(f"malformed request {request!r:.80}: {e}"))
        changes: list[Change] = []
        for row, old in before.items():
            new = overlay[row]
            if new != old:
                ops.append((row, new))
                changes.append((REGISTERS, unpack_from(">H", row, 1)[0], row, old, new))
        if changes:
            ops += self._digests.ops(changes)
        ops += self.actors.take_ops()
        ops += self.regained.take_ops()
        return ops, replies

    def _clear(
        self, work: Sequence[tuple[int, Request]], before: dict[bytes, bytes | None]
    ) -> None:
        """Drop what is left from an earlier time as a home, before anything new is taken."""
        touched = [unpack_from(">H", r[1], 1)[0] for _, r in work if _has_row(r)]
        for partition in self.regained.take(touched):
            try:
                rows = self._rows(partition)
            except Corrupt:  # until `storage-repair` has settled what is lost: see `_one`
                continue
            for row, old in rows:
                self._set(row, old, None, before)
            self._clearing.append(partition)
        self.regained.cleared(self._clearing)

    def _rows(self, partition: int) -> list[tuple[bytes, bytes]]:
        prefix = PREFIX + pack(">H", partition)
        found: list[tuple[bytes, bytes]] = []
        after = b""
        while rows := self._table.scan(prefix, after, CLEARED_AT_ONCE):
            found += rows
            after = rows[-1][0]
        return found

    def settle(self) -> None:
        """The batch of the last `apply` is durable."""
        self._unsettled.clear()
        self._clearing = []

    def abandon(self, ops: Sequence[Op]) -> None:
        """The store refused the batch, or nobody knows; what was minted in it is never used."""
        self._unsettled.clear()
        self._digests.reload(ops)
        self.actors.unsaved()
        self.regained.abandon(self._clearing)
        self._clearing = []

    def _one(
        self,
        now_us: int,
        epoch: int,
        request: Request,
        before: dict[bytes, bytes | None],
        ops: list[Op],
    ) -> Reply:
        kind = request[0]
        if kind == RAW:
            made = request[1]
            ops += made() if callable(made) else made
            return None
        row = request[1]
        partition = partition_of_row(row)
        self._fence(epoch, partition)
        if partition in self.regained.pending:
            raise Busy(
                f"node {self._number} cannot clear partition {partition} of its old rows yet"
            )
        if kind == MERGE:
            self._merge(now_us, row, partition, request[2], before)
            return None
        if kind == GET:
            self._check_shown(partition)
            return self._answer(row, self._current(row))
        if kind == MINT:
            self._check_shown(partition)
            _, _, context, value = request
            return self._mint(now_us, row, partition, context, value, before)
        if kind == HINT:
            _, _, register, target, written = request
            versions.decode(register)
            ops += self._hints.add(row, register, target, written)
            return None
        if kind in {PURGE, DISCARD}:
            return self._purge(kind, row, request[2], before)
        if kind == SETTLE:
            _, _, wanted, register = request
            return self._settle(row, partition, wanted, register, before)
        raise InvalidArgument(f"no request {kind!r}; is the caller of another version?")

    def _current(self, row: bytes) -> bytes | None:
        overlay = self._unsettled
        return overlay[row] if row in overlay else self._table.get(row)

    def _set(
        self, row: bytes, old: bytes | None, new: bytes | None, before: dict[bytes, bytes | None]
    ) -> None:
        before.setdefault(row, old)
        self._unsettled[row] = new

    def _merge(
        self,
        now_us: int,
        row: bytes,
        partition: int,
        data: bytes,
        before: dict[bytes, bytes | None],
    ) -> None:
        old = self._current(row)
        if old == data:
            return
        register = versions.decode(data)
        own = versions.EMPTY if old is None else versions.decode(old)
        self.actors.recognise(partition, register[0], own[0])
        merged = versions.merge(own, register)
        if merged == own:
            return
        if self.rule_unjudged(now_us, partition, own):
            raise Busy(
                f"node {self._number} was away and cannot tell yet whether an old value of "
                f"{row[HEAD:]!r:.60} was deleted meanwhile: it takes no other beside it"
            )
        if len(merged[1]) > self.siblings_max:
            self.siblings_max = len(merged[1])
        self.merges += 1
        self._set(row, old, versions.encode(merged), before)

    def _mint(
        self,
        now_us: int,
        row: bytes,
        partition: int,
        context: bytes,
        value: bytes | None,
        before: dict[bytes, bytes | None],
    ) -> tuple[bytes, bytes, int]:
        seen = versions.decode_context(context)
        if value is not None and (value.__class__ is not bytes or len(value) > versions.MAX_VALUE):
            raise InvalidArgument(f"a value is at most {versions.MAX_VALUE} bytes")
        old = self._current(row)
        own = versions.EMPTY if old is None else versions.decode(old)
        actors = self.actors
        if seen:
            actors.recognise(partition, seen, own[0])
        actor = actors.actor(partition)
        if actor is None:
            homes = self._map.read_homes(METADATA, partition)
            raise NotHome(f"node {self._number} is no home of partition {partition}", *homes)
        hlc = actors.tick(now_us, actor, versions.join(own[0], seen))
        register = versions.put(own, seen, actor, hlc, value)
        if len(register[1]) > self.siblings_max:
            self.siblings_max = len(register[1])
        self.mints += 1
        data = versions.encode(register)
        self._set(row, old, data, before)
        return data, versions.encode_context(register[0]), len(register[1])

    def rule_unjudged(self, now_us: int, partition: int, own: versions.Register) -> bool:
        """One new value beside a ghost would make the row look too young to be one."""
        return self._is_waiting(partition) and 0 < versions.newest_hlc(own) < now_us - KEEP

    def _settle(
        self,
        row: bytes,
        partition: int,
        wanted: bytes,
        data: bytes,
        before: dict[bytes, bytes | None],
    ) -> bool:
        old = self._current(row)
        if old is None or digest(old) != wanted:
            return False
        if data:
            self.actors.recognise(partition, versions.decode(data)[0], versions.decode(old)[0])
        self._set(row, old, data or None, before)
        return True

    def _purge(
        self, kind: str, row: bytes, wanted: bytes, before: dict[bytes, bytes | None]
    ) -> bool:
        old = self._current(row)
        if old is None or digest(old) != wanted:
            return False
        if kind == PURGE and not versions.is_tombstone(versions.decode(old)):
            raise InvalidArgument(f"only tombstones are purged, and {row!r:.60} has a value")
        self._set(row, old, None, before)
        return True

    # -------------------------------------------------------------------------------------- fence

    def _fence(self, epoch: int, partition: int) -> None:
        if epoch != self._map.epoch:
            self._check_epoch(epoch, partition)

    def _check_epoch(self, epoch: int, partition: int) -> None:
        current = self._map
        if epoch > current.epoch:
            raise Busy(f"node {self._number} has no map of epoch {epoch} yet")
        changed = current.last_change(METADATA, partition)
        if self.rule_stale(epoch, changed):
            self.stale += 1
            raise StaleEpoch(
                f"epoch {epoch} is older than the last change of the homes of partition "
                f"{partition}, in epoch {changed}: the newer map comes with this error",
                current.encode(),
            )

    def rule_stale(self, epoch: int, changed: int) -> bool:
        """A caller that does not know the last change of the homes counts the wrong ones."""
        return epoch < changed
