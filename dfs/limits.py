"""How full a disk may become, and what stops when: one rule for both roles and for status pages.

Below `near` everything goes on.  From `near` on operators are warned.  From `backfill` on nothing
is taken that somebody else could keep instead: moved partitions, hints, hand-offs.  From `full` on
clients' writes are refused with `DiskFull`.  What frees or protects space always goes on: deletes,
compaction, the journals' own entries; the rest of the disk is for them.

Each limit is a part of the disk and a number of free bytes, whichever is reached first, so that a
percentage does not leave too little of a small disk.  A level that was reached is left only once
one per cent more is free: a node at the border does not change its mind with every write.
(Ceph's nearfull, backfillfull and full ratios.)

Asking the kernel costs more than the rest of a small write's admission.  So while a disk is not
even near its limits, clients' writes are let through without a look until `UNSEEN` bytes or
`UNSEEN_WRITES` of them have come: little against the distance to `full`, which is two floors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from dfs.errors import ConfigError, DiskFull

UNSEEN = 1 << 20  # bytes of clients' writes between two looks at a disk with room
UNSEEN_WRITES = 64


class Level(IntEnum):
    """How full a disk is."""

    OK = 0
    NEAR = 1
    BACKFILL = 2
    FULL = 3

    @property
    def label(self) -> str:
        """As status pages and metrics spell it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Limits:
    """Parts of the disk (per cent used), and the bytes that stay free at `full`.

    `backfill` keeps twice and `near` three times `floor` free.
    """

    near: float = 85.0
    backfill: float = 90.0
    full: float = 95.0
    floor: int = 256 << 20
    hysteresis: float = 1.0  # per cent

    def __post_init__(self) -> None:
        """Refuse limits that contradict each other; raises `ConfigError`."""
        if not (0 < self.near <= self.backfill <= self.full <= 100 and self.floor >= 0):
            raise ConfigError(
                "disk limits must be 0 < near <= backfill <= full <= 100 per cent and a floor of "
                f"0 or more bytes, not {self.near:g}, {self.backfill:g}, {self.full:g} and "
                f"{self.floor}"
            )

    def level(self, total: int, free: int, before: Level = Level.OK) -> Level:
        """The level of a disk with so many bytes, when it was at level `before` last time."""
        if total <= 0:
            return Level.OK
        used = 100.0 * (total - free) / total
        for level, percent, floors in (
            (Level.FULL, self.full, 1),
            (Level.BACKFILL, self.backfill, 2),
            (Level.NEAR, self.near, 3),
        ):
            floor = self.floor * floors
            if before >= level:  # reached before: leave it only with some distance
                percent -= self.hysteresis
                floor += min(floor, int(total * self.hysteresis / 100))
            if used >= percent or free < floor:
                return level
        return Level.OK

    def room(self, total: int, free: int) -> int:
        """Bytes that clients may write before the disk is `full`."""
        kept = max(self.floor, int(total * (100.0 - self.full) / 100.0))
        return max(0, free - kept)


class DiskWatch:
    """The level of one disk, and the refusals that follow from it."""

    def __init__(
        self,
        limits: Limits,
        usage: Callable[[], tuple[int, int]],
        path: str,
        *,
        credit: bool = False,
    ) -> None:
        """`usage` gives (bytes, free bytes) of the file system, `path` names it in messages.

        `credit`: for small writes, of which not each is worth a look while there is room.
        """
        self._credit = credit
        self.limits = limits
        self._usage = usage
        self._path = path
        self._level = Level.OK
        self._unseen = 0  # bytes that may yet be written before the next look
        self._unseen_writes = 0
        self.refused = 0

    def level(self) -> Level:
        """The level now."""
        total, free = self._usage()
        self._level = level = self.limits.level(total, free, self._level)
        if level is not Level.OK:
            self._unseen = self._unseen_writes = 0
        return level

    def room(self) -> int:
        """Bytes that clients may still write; none while the disk counts as full."""
        total, free = self._usage()
        return 0 if self.level() is Level.FULL else self.limits.room(total, free)

    def check_write(self, size: int = 0) -> None:
        """Raise `DiskFull` if a client's `size` bytes must not be written any more."""
        if self._unseen_writes > 0 and self._unseen >= size:
            self._unseen -= size
            self._unseen_writes -= 1
            return
        self._check(Level.FULL, size, "delete data or add capacity")
        room = self._credit and self._level is Level.OK
        self._unseen = UNSEEN if room else 0
        self._unseen_writes = UNSEEN_WRITES if room else 0

    def check_move(self, size: int = 0) -> None:
        """Raise `DiskFull` if nothing is taken any more that another node could keep."""
        self._check(
            Level.BACKFILL, size, "it takes no data from other nodes; delete data or add capacity"
        )

    def _check(self, limit: Level, size: int, advice: str) -> None:
        total, free = self._usage()
        self._level = level = self.limits.level(total, free, self._level)
        # What is stored now is judged as if it were there; the level itself follows real numbers.
        if self.limits.level(total, max(0, free - size), level) >= limit:
            self.refused += 1
            raise DiskFull(
                f"{self._path}: {free} of {total} bytes free, under the reserve of a disk that is "
                f"{limit.label}; {advice}"
            )
