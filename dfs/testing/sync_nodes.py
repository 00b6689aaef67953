"""Nodes of dicts that run the real background protocols of the metadata KV, one effect at a time.

A `SyncNode` has the real replica of registers, digests, anti-entropy, hints and purging over a dict
and carries out the effects of `metadata.steps`.  Who drives it decides about time, order and
faults: `run` goes straight through, `dfs.testing.scenario_sync` does not.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dfs.cluster.map import ClusterMap
from dfs.errors import Corrupt, DfsError, Unreachable
from dfs.hashing import digest
from metadata import versions
from metadata.antientropy import AntiEntropy
from metadata.hints import Hints
from metadata.merkle import BLOBS, REGISTERS, TABLES, Digests, partition_of_row
from metadata.registers import DISCARD, HEAD, MERGE, MINT, PURGE, SETTLE, Registers, row_of
from metadata.rejoin import PullFirst
from metadata.steps import Accept, Call, Correct, Merge, Purge, Rest, Settle, Steps, Write
from metadata.tombstones import Tombstones

T = TypeVar("T")
Op = tuple[bytes, bytes | None]
Loss = tuple[bytes, bytes, str]


class Rows:
    """An ordered dict of bytes that satisfies `metadata.merkle.Table`; ranges can be lost."""

    def __init__(self, rows: dict[bytes, bytes] | None = None) -> None:
        """Start with a copy of `rows`."""
        self.rows = dict(rows or {})
        self._keys = sorted(self.rows)
        self.lost: list[Loss] = []

    def _check(self, first: bytes, last: bytes) -> None:
        if any(first < b and last >= a for a, b, _ in self.lost):
            raise Corrupt(f"rows in {first[:20]!r} .. {last[:20]!r} are lost")

    def get(self, key: bytes) -> bytes | None:
        """See `Table.get`."""
        if self.lost:
            self._check(key, key)
        return self.rows.get(key)

    def scan(
        self, prefix: bytes, after: bytes = b"", limit: int = 1000
    ) -> list[tuple[bytes, bytes]]:
        """See `Table.scan`."""
        keys = self._keys
        at = bisect_left(keys, prefix) if after < prefix else bisect_right(keys, after)
        found = []
        for key in keys[at : at + limit]:
            if not key.startswith(prefix):
                break
            found.append((key, self.rows[key]))
        if self.lost:
            self._check(
                max(prefix, after), found[-1][0] if len(found) == limit else prefix + b"\xff"
            )
        return found

    def apply(self, ops: Sequence[Op]) -> None:
        """Apply a batch."""
        for key, value in ops:
            if value is None:
                if self.rows.pop(key, None) is not None:
                    del self._keys[bisect_left(self._keys, key)]
            else:
                if key not in self.rows:
                    insort(self._keys, key)
                self.rows[key] = value

    def lose(self, first: bytes, last: bytes) -> None:
        """Damage: what is in [first, last) is gone, and reads say so until it is accepted."""
        self.apply([(k, None) for k in self.rows if first <= k < last])
        self.lost.append((first, last, "damaged"))

    def accept(self, first: bytes, last: bytes) -> None:
        """Let the part of the losses in [first, last) read as absence."""
        self.lost = [
            (a, b, name)
            for start, end, name in self.lost
            for a, b in ((start, min(end, first)), (max(start, last), end))
            if a < b
        ]


def newest(register: bytes) -> int:
    """Time of the newest write in an encoded register, us."""
    return versions.newest_hlc(versions.decode(register))


def is_tombstone(register: bytes) -> bool:
    """Whether an encoded register is deleted."""
    return versions.is_tombstone(versions.decode(register))


class SyncNode:
    """One node's registers and background protocols."""

    digests_class: type[Digests] = Digests
    registers_class: type[Registers] = Registers
    sync_class: type[AntiEntropy] = AntiEntropy
    hints_class: type[Hints] = Hints
    tombstones_class: type[Tombstones] = Tombstones

    def __init__(
        self,
        number: int,
        get_map: Callable[[], ClusterMap],
        *,
        rows: dict[bytes, bytes] | None = None,
        alive: Callable[[int], bool] = lambda _: True,
        budget: int = 1 << 40,
    ) -> None:
        """Start on `rows`, as after a crash."""
        self.number = number
        self.get_map = get_map
        self.store = store = Rows(rows)
        self.digests = digests = self.digests_class(store)
        digests.load()
        self.registers = self.registers_class(
            store,
            number,
            get_map(),
            digests=digests,
            waiting=lambda partition: self.pull_first.waiting(partition),
        )
        for table in TABLES:
            if not digests.built(table):
                store.apply(digests.mark_built(table))
        self.pull_first = PullFirst(store)
        self.sync = self.sync_class(number, get_map, store, digests, self.pull_first, newest)
        self.hints = self.hints_class(number, get_map, store, lambda: budget)
        self.tombstones = self.tombstones_class(
            number,
            get_map,
            store,
            self.pull_first,
            newest=newest,
            is_tombstone=is_tombstone,
            alive=alive,
        )

    # -- registers

    def write(self, requests: Sequence[tuple[Any, ...]], now: int) -> list[Any]:
        """Apply requests of registers as one durable batch; returns the replies."""
        self.registers.follow(self.get_map())
        work = [(self.registers.map.epoch, request) for request in requests]
        ops, replies = self.registers.apply(now, work)
        self.store.apply(ops)
        self.registers.settle()
        return replies

    def put(self, row: bytes, value: bytes | None, now: int, context: bytes = b"") -> bytes:
        """Mint a write here; returns the register."""
        (reply,) = self.write([(MINT, row, context, value)], now)
        if isinstance(reply, DfsError):
            raise reply
        register: bytes = reply[0]
        return register

    def context(self, row: bytes) -> bytes:
        """What a reader of this copy has seen."""
        found = self.store.get(row)
        return versions.encode_context(versions.decode(found)[0]) if found else b""

    def values(self, row: bytes) -> list[bytes]:
        """The siblings of this copy."""
        found = self.store.get(row)
        return [x[2] for x in versions.decode(found)[1]] if found else []

    # -- effects

    def execute(self, effect: Any, now: int) -> Any:
        """Carry out an effect that needs no other node."""
        if isinstance(effect, Merge):
            if effect.table == BLOBS:
                return self._put_blobs(effect.items)
            replies = self.write([(MERGE, row, value) for row, value in effect.items], now)
            for reply in replies:
                if isinstance(reply, DfsError):
                    raise reply
            return len(replies)
        if isinstance(effect, Purge):
            return self._purge(effect, now)
        if isinstance(effect, Settle):
            return self.write([(SETTLE, *item) for item in effect.items], now)
        if isinstance(effect, Write):
            self.store.apply(effect.ops)
        elif isinstance(effect, Correct):
            where = effect.table, effect.partition
            if effect.errors is None:
                self.store.apply(self.digests.replace_lost(*where))
            else:
                self.store.apply(self.digests.correct(*where, effect.errors))
        elif isinstance(effect, Accept):
            self.store.accept(effect.first, effect.last)
        elif not isinstance(effect, Rest):
            raise TypeError(f"not a local effect: {effect!r}")
        return None

    def _purge(self, effect: Purge, now: int) -> list[bool]:
        there = [self.store.get(row) is not None for row, _ in effect.items]
        kind = DISCARD if effect.ghosts else PURGE
        replies = self.write([(kind, row, wanted) for row, wanted in effect.items], now)
        for reply in replies:
            if isinstance(reply, DfsError):
                raise reply
        return [not was or reply is True for was, reply in zip(there, replies, strict=True)]

    def _put_blobs(self, items: Sequence[tuple[bytes, bytes]]) -> int:
        changed = 0
        for row, value in items:
            if digest(value) != row[1:]:
                raise Corrupt("a blob arrived with other bytes")
            if self.store.get(row) is None:
                partition = partition_of_row(BLOBS, row)
                ops = self.digests.ops([(BLOBS, partition, row, None, value)])
                self.store.apply([(row, value), *ops])
                changed += 1
        return changed

    # -- answering

    def answer(
        self, method: str, sender: int, epoch: int, args: tuple[Any, ...], now: int
    ) -> Steps[tuple[Any, ...]]:
        """The protocol that answers a call."""
        if method == "hints.deliver":
            (items,) = args
            return self.hints.handle(sender, epoch, items, now)
        if method.startswith("tomb."):
            return self.tombstones.handle(method, sender, epoch, args)
        return self.sync.handle(method, sender, epoch, args, now)

    def total(self, row_or_partition: bytes | int, table: int = REGISTERS) -> int:
        """The digest of a partition."""
        if isinstance(row_or_partition, bytes):
            row_or_partition = partition_of_row(table, row_or_partition)
        return self.digests.total(table, row_or_partition)


def key_row(name: bytes) -> bytes:
    """The row of a user's key."""
    return row_of(0, name)


def row_in(partition: int, name: bytes) -> bytes:
    """A row that is put into a partition at will; replicas only look at what the row says."""
    row = b"r" + partition.to_bytes(2, "big") + b"\0" + name
    assert len(row) > HEAD
    return row


def run(
    nodes: dict[int, SyncNode],
    number: int,
    steps: Steps[T],
    now: int,
    *,
    down: Sequence[int] = (),
    calls: list[str] | None = None,
) -> T:
    """Drive a protocol of a node to its end, calls and all, without any delay."""
    node = nodes[number]
    send: Any = None
    error: DfsError | None = None
    while True:
        try:
            effect = steps.throw(error) if error is not None else steps.send(send)
        except StopIteration as e:
            result: T = e.value
            return result
        send = error = None
        try:
            if isinstance(effect, Call):
                if calls is not None:
                    calls.append(effect.method)
                if effect.node in down:
                    raise Unreachable(f"node {effect.node} is down")
                other = nodes[effect.node]
                answer = other.answer(effect.method, number, effect.epoch, effect.args, now)
                send = run(nodes, effect.node, answer, now, down=down, calls=calls)
            else:
                send = node.execute(effect, now)
        except DfsError as e:
            error = e
