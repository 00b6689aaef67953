"""Pulling a partition that waits (`metadata.rejoin`) from its other homes, and judging what is old.

What only this node has and is old may be the ghost of something that was deleted, and whose
tombstone the others have purged since.  A ghost shows by nobody else knowing its dot.  So while a
partition waits, a register that is old (23 h, `holds_back`) is merged with nothing: one new value
beside a ghost would make the whole row look young.  `metadata.registers` refuses such merges with
`Busy`, and the pull sets aside what the others have of such a row.

When enough homes were asked, each of these rows becomes the merge of all answers and its own
register; if that has a ghost (a sibling whose dot none of the answers has seen), of the answers
alone.  Nothing is taken for a ghost as long as one of the other homes has not answered, and when
one of them waits itself it cannot tell: then everything is kept.

Sans-IO: see `metadata.steps`.  `now` is wall time in microseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Busy, DeadlineExceeded, NotHome, StaleEpoch, Unreachable
from metadata import versions
from metadata.antientropy import AntiEntropy, members
from metadata.exchange import Exchange, Key
from metadata.merkle import REGISTERS, value_digest
from metadata.steps import Call, Merge, Settle, Steps

_ABSENT = (Unreachable, DeadlineExceeded, Busy, StaleEpoch, NotHome)
BATCH = 256  # rows settled at once


@dataclass(slots=True)
class Asked:
    """What the other homes said of the old rows of a partition."""

    answered: list[int] = field(default_factory=list)
    aside: dict[bytes, list[bytes]] = field(default_factory=dict)  # row -> what others have of it
    unknown: dict[bytes, int] = field(default_factory=dict)  # row -> homes whose copy is another


class Pull(Exchange):
    """An exchange that only pulls, and remembers what others have of old rows."""

    def __init__(self, asked: Asked, *args: Any) -> None:
        """Note it in `asked`; the rest is as for any exchange."""
        super().__init__(*args)
        self.asked = asked

    def _settle(
        self, mine: Sequence[Key], theirs: Sequence[Key], pull: bool, push: bool
    ) -> Steps[None]:
        node, others, unknown = self.node, dict(theirs), self.asked.unknown
        for row, digest in mine:
            if others.get(row) != digest:
                own = node.view.get(row)
                if own is not None and node.holds_back(REGISTERS, row, own, self.now):
                    unknown[row] = unknown.get(row, 0) + 1
        yield from super()._settle(mine, theirs, pull, push)

    def set_aside(self, row: bytes, value: bytes) -> None:
        """See `Exchange.set_aside`: here it is kept."""
        self.asked.aside.setdefault(row, []).append(value)


def pull_partition(
    node: AntiEntropy,
    partition: int,
    now: int,
    told: list[str] | None = None,
    away: set[int] | None = None,
) -> Steps[bool]:
    """Pull the registers of a waiting partition; returns whether it is complete.

    `told` gets what stands in the way, for people.  Nodes in `away` are not asked, and those that
    do not answer are added: a mute node costs its deadline once, not once for every partition.

    The caller then writes `PullFirst.finish`.  Complete means: compared with so many other homes
    that every acknowledged write is on one of them (N - W + 1 of each set of homes), and nothing
    is left that might be the ghost of a purged register.
    """
    cluster = node.get_map()
    others = [x for x in members(cluster, partition) if x != node.me]
    told = [] if told is None else told
    away = set() if away is None else away
    asked = Asked()
    for peer in others:
        if peer in away:
            told.append(f"partition {partition}: node {peer} is away")
            continue
        try:
            outcome = yield from node.exchange(
                peer,
                now,
                tables=(REGISTERS,),
                partitions=(partition,),
                forced=True,
                push=False,
                kind=partial(Pull, asked),
            )
        except _ABSENT as e:
            if isinstance(e, (Unreachable, DeadlineExceeded)):
                away.add(peer)
            told.append(f"partition {partition}, node {peer}: {e}")
            continue
        told += outcome.errors
        if not outcome.errors:
            asked.answered.append(peer)
    last = cluster.last_change(METADATA, partition)
    if node.get_map().last_change(METADATA, partition) != last:
        return False
    if not enough(cluster, partition, node.me, asked.answered):
        return False
    judged = yield from _judge(node, partition, others, asked)
    if judged is None:
        told.append(f"partition {partition}: old registers here that not all homes can judge")
        return False
    rows = list(judged)
    for at in range(0, len(rows), BATCH):
        settled = yield Settle([judged[row] for row in rows[at : at + BATCH]])
        if not all(settled):
            told.append(f"partition {partition}: registers changed while they were judged")
            return False
    # The last word, with no step after it: a newer map may have let the partition wait once more.
    return node.get_map().last_change(METADATA, partition) == last


def enough(cluster: ClusterMap, partition: int, me: int, answered: Sequence[int]) -> bool:
    """Whether every acknowledged write is at one of the other homes that answered."""
    for homes in cluster.write_sets(METADATA, partition):
        others = [x for x in homes if x != me]
        needed = min(len(others), cluster.n - cluster.w + 1)
        if sum(x in answered for x in others) < needed:
            return False
    return True


def _judge(
    node: AntiEntropy, partition: int, others: Sequence[int], asked: Asked
) -> Steps[dict[bytes, tuple[bytes, bytes, bytes]] | None]:
    """What to put in the place of old rows: {row: item of `Settle`}; None if it cannot be said."""
    yield Merge(REGISTERS, ())  # what is read must be durable
    suspects: list[bytes] = []
    judged = {}
    for row in sorted({*asked.aside, *asked.unknown}):
        value = node.view.get(row)
        if value is None:
            continue
        own, known = versions.decode(value), versions.EMPTY
        for data in asked.aside.get(row, ()):
            known = versions.merge(known, versions.decode(data))
        if asked.unknown.get(row, 0) == len(asked.answered) and _ghosts(own, known):
            suspects.append(row)
        judged[row] = own, known, value
    drop = False
    if suspects:
        drop = not (yield from _any_waits(node, partition, asked.answered))
        if drop and len(asked.answered) < len(others):
            return None
    doomed = set(suspects) if drop else set()
    items: dict[bytes, tuple[bytes, bytes, bytes]] = {}
    for row, (own, known, value) in judged.items():
        # Every acknowledged delete is known to one of those who answered, too: what they have is
        # all there is.  The own vector must not stay, for it has seen the ghosts.
        register = known if row in doomed else versions.merge(own, known)
        data = b"" if register == versions.EMPTY else versions.encode(register)
        if data != value:
            items[row] = row, value_digest(REGISTERS, row, value), data
    return items


def _ghosts(own: versions.Register, known: versions.Register) -> bool:
    """Whether there is something in a register of which nobody else knows."""
    seen = dict(known[0])
    return not seen or any(hlc > seen.get(actor, 0) for actor, hlc, _ in own[1])


def _any_waits(node: AntiEntropy, partition: int, peers: Sequence[int]) -> Steps[bool]:
    """Whether one of the homes cannot tell itself; asked last, for it may have come back since."""
    epoch = node.get_map().epoch
    for peer in peers:
        _, (waits,) = yield Call(peer, "sync.buckets", (REGISTERS, (partition,)), epoch)
        if waits:
            return True
    return False
