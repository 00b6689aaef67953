"""Making partitions whole again: after a restore, after damage of the store, after drift.

Everything here ends in the same two steps.  Digests are recomputed from the rows, and a partition
that may lack acknowledged writes is pulled from its other homes while it waits
(`metadata.rejoin`).

Sans-IO: see `metadata.steps`.  `now` is wall time in microseconds.
"""

from collections.abc import Callable, Iterable, Sequence

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Busy, Corrupt, DeadlineExceeded, NotHome, StaleEpoch, Unreachable
from dfs.hashing import PARTITIONS
from metadata.antientropy import AntiEntropy, absent_at, members
from metadata.merkle import BLOBS, REGISTERS, TABLES, Table, bucket_row, recompute
from metadata.rejoin import KEEP, PullFirst
from metadata.steps import Accept, Correct, Merge, Purge, Rest, Steps, Write

_ABSENT = (Unreachable, DeadlineExceeded, Busy, StaleEpoch, NotHome)
Loss = tuple[bytes, bytes, str]  # [first, last) of keys, and the damaged table


def pull_partition(
    node: AntiEntropy, partition: int, now: int, told: list[str] | None = None
) -> Steps[bool]:
    """Pull the registers of a waiting partition; returns whether it is complete.

    `told` gets what stands in the way, for people.

    The caller then writes `PullFirst.finish`.  Complete means: compared with so many other homes
    that every acknowledged write is on one of them (N - W + 1 of each set of homes), and nothing
    is left that might be the ghost of a purged register.
    """
    cluster = node.get_map()
    row = members(cluster, partition)
    others = [x for x in row if x != node.me]
    answered: list[int] = []
    told = [] if told is None else told
    for peer in others:
        try:
            outcome = yield from node.exchange(
                peer, now, tables=(REGISTERS,), partitions=(partition,), forced=True, push=False
            )
        except _ABSENT as e:
            told.append(f"partition {partition}, node {peer}: {e}")
            continue
        told += outcome.errors
        if not outcome.errors:
            answered.append(peer)
    if node.get_map().last_change(METADATA, partition) != cluster.last_change(METADATA, partition):
        return False
    if not enough(cluster, partition, node.me, answered):
        return False
    ghosts = yield from _ghosts(node, partition, answered, now)
    if not ghosts:
        return True
    if len(answered) < len(others):
        told.append(f"partition {partition}: old registers here that not all homes can judge")
        return False
    yield Purge(ghosts, ghosts=True)
    return True


def enough(cluster: ClusterMap, partition: int, me: int, answered: Sequence[int]) -> bool:
    """Whether every acknowledged write is at one of the other homes that answered."""
    for homes in cluster.write_sets(METADATA, partition):
        others = [x for x in homes if x != me]
        needed = min(len(others), cluster.n - cluster.w + 1)
        if sum(x in answered for x in others) < needed:
            return False
    return True


def _ghosts(
    node: AntiEntropy, partition: int, peers: Sequence[int], now: int
) -> Steps[list[tuple[bytes, bytes]]]:
    """Old registers that none of `peers` has; none if one of them cannot tell itself."""
    suspects: dict[bytes, bytes] | None = None
    for peer in peers:
        found, peer_waits = yield from absent_at(node, peer, partition, now)
        if peer_waits:
            return []
        if suspects is None:
            suspects = found
        else:
            suspects = {row: digest for row, digest in suspects.items() if row in found}
        if not suspects:
            return []
    yield Merge(REGISTERS, ())
    ghosts = []
    for row, digest in (suspects or {}).items():
        value = node.view.get(row)
        if value is not None and node.newest(value) < now - KEEP:
            ghosts.append((row, digest))
    return ghosts


def rebuild(
    snapshot: Callable[[bool], Table], table: int, partition: int, *, damaged: bool = False
) -> Steps[int]:
    """Recompute the digests of a partition and correct them; returns how many were wrong.

    `snapshot(fresh)` gives a view of the store, of this moment if `fresh`.  `damaged` says that
    rows or sums were lost (`Digests.damaged`).  Raises `Corrupt` while rows are.
    """
    errors: dict[int, int] | None = None
    fresh = damaged
    if damaged:
        yield Correct(table, partition, None)
    while errors is None:
        steps = recompute(snapshot(fresh), table, partition)
        try:
            while True:
                yield Rest(next(steps))
        except StopIteration as e:
            errors = e.value or {}
        except Corrupt:
            if fresh:
                raise
            fresh = True
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
    """Begin the repair of ranges that storage damage hides; returns whether there were any of ours.

    `lost_registers` makes this node mint under other names from now on; it runs before anything
    that was lost reads as absent.  Then the partitions are marked as waiting, durably, and the loss
    is accepted.  What follows is as after a restore: their digests are rebuilt, they are pulled.
    Ranges of rows that have no replicas (the node's own state) stay lost, for an operator to see.
    """
    ours = [clipped for loss in losses for p in _REPAIRED if (clipped := _clip(loss, p))]
    if not ours:
        return False
    registers = affected(ours, REGISTERS)
    if registers:
        yield from lost_registers()
        yield Write(pull_first.begin(registers))
    for table in TABLES:
        for partition in registers if table == REGISTERS else affected(ours, BLOBS):
            node.digests.damaged[table, partition] = None
    for first, last, _ in ours:
        yield Accept(first, last)
    return True


_REPAIRED = (b"H", b"b", b"h", b"m", b"r")  # first bytes of the rows that others have, or hints


def _clip(loss: Loss, prefix: bytes) -> Loss | None:
    first, last, name = loss
    first, last = max(first, prefix), min(last, bytes([prefix[0] + 1]))
    return (first, last, name) if first < last else None
