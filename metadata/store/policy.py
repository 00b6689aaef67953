"""Which runs to merge next: tiered compaction, as a pure function.

Runs are ordered newest first and their levels never fall along that order.  When a level has
`fanout` runs they become one run of the next level, so a byte is rewritten about
log_fanout(size / memtable) times.  Deletions disappear when a merge includes the oldest run; when
more than a quarter of all entries are deletions (or expired, which comes to the same) everything is
merged.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

TOMBSTONE_SHARE = 4  # one in so many
FEW = 1000  # tombstones that are not worth a merge


class Sized(Protocol):
    """What the policy looks at."""

    level: int

    @property
    def entries(self) -> int:
        """Entries, deletions included."""
        ...

    @property
    def tombstones(self) -> int:
        """Deletions."""
        ...


class Plan(NamedTuple):
    """Merge runs [start, end) of the list into one of `level`."""

    start: int
    end: int
    level: int


def everything(runs: Sequence[Sized]) -> Plan:
    """Merge all runs into one."""
    return Plan(0, len(runs), max(r.level for r in runs))


def pick(runs: Sequence[Sized], fanout: int) -> Plan | None:
    """The next merge, None if there is nothing to do."""
    tombstones = sum(r.tombstones for r in runs)
    if tombstones > FEW and tombstones * TOMBSTONE_SHARE > sum(r.entries for r in runs):
        return everything(runs)
    start = 0
    while start < len(runs):
        end = start
        while end < len(runs) and runs[end].level == runs[start].level:
            end += 1
        if end - start >= fanout:
            return Plan(start, end, runs[start].level + 1)
        start = end
    return None
