"""Making partitions whole again: after damage of the store, after drift.

Everything here ends in the same two steps.  Digests are recomputed from the rows, and a partition
that may lack acknowledged writes is pulled from its other homes while it waits (`metadata.pull`).

From the moment a loss is accepted until its digests are rebuilt, rows are missing that the sums
still count: the partition looks equal to one that has everything.  So which digests are to be
rebuilt is durable before the acceptance, in row `nrebuild`: (format, ((table, partition), ...)).

Sans-IO: see `metadata.steps`.
"""

from collections.abc import Callable, Iterable, Sequence

from dfs import codec
from dfs.errors import Corrupt
from dfs.hashing import PARTITIONS
from metadata.antientropy import AntiEntropy
from metadata.merkle import (
    BLOBS,
    REGISTERS,
    TABLES,
    Digests,
    Op,
    Table,
    bucket_row,
    recompute,
)
from metadata.rejoin import PullFirst
from metadata.steps import Accept, Correct, Rest, Steps, Write
from metadata.store.losses import Loss

OWN = b"ns"  # first bytes of the rows that nobody else has; the store's option of this name
ROW = b"nrebuild"
_FORMAT = 1


def remember(digests: Digests) -> list[Op]:
    """Store operations that name the partitions whose digests are to be rebuilt."""
    damaged = tuple(sorted(digests.damaged))
    return [(ROW, codec.pack((_FORMAT, damaged)) if damaged else None)]


def recall(view: Table, digests: Digests) -> None:
    """Mark what `remember` named before a restart as damaged.

    Raises `Corrupt` for a row of another format.
    """
    if (raw := view.get(ROW)) is None:
        return
    form, damaged = codec.unpack(raw)
    if form != _FORMAT:
        raise Corrupt(f"the list of digests to rebuild has format {form}: upgrade dfs")
    for table, partition in damaged:
        digests.damaged[table, partition] = None


def rebuild(
    snapshot: Callable[[bool], Table],
    table: int,
    partition: int,
    *,
    damaged: bool = False,
    prepared: bool = False,
) -> Steps[int]:
    """Recompute the digests of a partition and correct them; returns how many were wrong.

    `snapshot(fresh)` gives a view of the store, of this moment if `fresh`.  `damaged` says that
    rows or sums were lost (`Digests.damaged`), `prepared` that lost sums were made readable since
    (`Correct` with None) and that any view of `snapshot` is younger.  Raises `Corrupt` while rows
    are.
    """
    errors: dict[int, int] | None = None
    fresh = damaged
    if damaged and not prepared:
        yield Correct(table, partition, None)
    while errors is None:
        steps = recompute(snapshot(fresh and not prepared), table, partition)
        try:
            while True:
                yield Rest(next(steps))
        except StopIteration as e:
            errors = e.value or {}
        except Corrupt:
            if fresh and not prepared:
                raise
            fresh, prepared = True, False
            yield Correct(table, partition, None)
    if errors or fresh:
        yield Correct(table, partition, errors)
    return len(errors)


def affected(losses: Iterable[Loss], table: int) -> list[int]:
    """Partitions that have rows or sums in any of the ranges; ascending."""
    losses = list(losses)
    return [
        partition
        for partition in range(PARTITIONS)
        if any(
            _overlap(first, last, start, end)
            for first, last, _ in losses
            for start, end in _ranges(table, partition)
        )
    ]


def _ranges(table: int, partition: int) -> Iterable[tuple[bytes, bytes]]:
    if table == REGISTERS:
        head = b"r" + partition.to_bytes(2, "big")
        yield head, head + b"\xff" * 1026
    else:
        start = (partition << 4).to_bytes(2, "big")
        yield b"b" + start, b"b" + bytes((start[0], start[1] | 15)) + b"\xff" * 31
    yield bucket_row(table, partition, 0), bucket_row(table, partition, 255) + b"\0"


def _overlap(first: bytes, last: bytes, start: bytes, end: bytes) -> bool:
    return first < end and last > start


def repair_lost(
    node: AntiEntropy,
    pull_first: PullFirst,
    losses: Sequence[Loss],
    *,
    lost_registers: Callable[[], Steps[None]],
) -> Steps[bool]:
    """Begin the repair of ranges that storage damage hides; returns whether there were any.

    `lost_registers` makes this node mint under other names from now on; it runs before anything
    that was lost reads as absent.  Then the partitions are marked as waiting, and their digests as
    to be rebuilt, durably, and the loss is accepted.  What follows is up to the caller, also after
    a restart: rebuild what `Digests.damaged` has, then pull.

    A damaged block hides all keys up to the next block's first one, so a loss may be of kinds that
    no row has, and of the node's own rows, which the store keeps elsewhere (`OWN`).  Nothing is
    missing there, and the whole loss is accepted.
    """
    if not losses:
        return False
    registers = affected(losses, REGISTERS)
    if registers:
        yield from lost_registers()
    for table in TABLES:
        for partition in registers if table == REGISTERS else affected(losses, BLOBS):
            node.digests.damaged[table, partition] = None
    begin = pull_first.begin(registers) if registers else []
    yield Write([*begin, *remember(node.digests)])
    for first, last, _ in losses:
        yield Accept(first, last)
    return True
