"""A volume's delegation as its holder has it: what was done here and is in no entry yet.

The only live session of a volume may hold its delegation.  Then an operation is a function on the
session's own view and nothing else: it is applied here, acknowledged, and sent later, in order and
many at a time (write-back of at most `LINGER` seconds unless the home is slow).  Nobody else's
commit comes in between, because the home lets nobody else do or see anything before the holder
has given the delegation back, or was silent for longer than its lease.

The lease: the holder serves for `LEASE` seconds from when it *sent* its last confirmed request that
named it as the holder.  The home waits longer than that, on its own clock, before it revokes.  A
holder that was stopped, or cut off, finds its lease over and asks; if it was fenced meanwhile, what
it had not sent is lost, as a suffix of what it did.

Changes are kept in *batches* of final values.  A batch is closed when it is sent or has grown
large, always between two operations: whatever of them is in the journal is a prefix.
"""

from collections import deque
from typing import TYPE_CHECKING

import trio

from dfs.errors import DfsError
from dfs.volume.effects import DELETE, DELETE_RANGE, PUT, Effect
from dfs.volume.localtxn import LocalTxn
from dfs.volume.view import View

if TYPE_CHECKING:
    from dfs.client.submission import Waiter

LEASE = 12.0  # seconds; the home revokes after 15
LINGER = 0.05  # seconds that a batch waits for company when nobody waits for it
BATCH_BYTES = 512 << 10  # of values, beyond which a batch is closed
MAX_PENDING = 8 << 20  # bytes in batches beyond which operations wait
PER_ITEM = 48  # bytes of an item beyond its value, roughly


class Batch:
    """Operations that go into one entry: the final values of what they change."""

    __slots__ = ("effects", "keys", "number", "oldest", "ranges", "since", "size", "waiters")

    def __init__(self, number: int, since: float) -> None:
        """An empty one, begun at the monotonic time `since`."""
        self.number = number
        self.since = since
        self.keys: dict[bytes, object] = {}
        self.ranges: list[tuple[bytes, bytes]] = []
        self.effects: tuple[Effect, ...] = ()  # once it is closed
        self.size = 0
        self.oldest = 0  # when the first chunk that it relies on was sent
        self.waiters: list[Waiter] = []

    def close(self, view: View) -> None:
        """Take what its keys are now; the next operation goes into another batch."""
        found: list[Effect] = [(DELETE_RANGE, start, end) for start, end in self.ranges]
        value_of = view.changed
        for key in self.keys:
            value = value_of(key)
            found.append((DELETE, key) if value is None else (PUT, key, value))
        self.effects = tuple(found)

    def inodes(self) -> set[int]:
        """Inodes that it changes."""
        return {int.from_bytes(key[:8], "big") for key in self.keys}


class Delegation:
    """The state of holding a volume's delegation, or of not holding it (`epoch` 0)."""

    __slots__ = (
        "_changed", "_number", "_open", "batches", "epoch", "pending", "recalled", "returning",
    )  # fmt: skip

    def __init__(self) -> None:
        """Not held."""
        self.epoch = 0
        self.recalled = False
        self.returning = False  # from now on others may change the volume
        self.batches: deque[Batch] = deque()
        self.pending = 0  # bytes in them
        self._open: Batch | None = None  # the last one, if operations may still be added to it
        self._number = 0  # of the newest batch
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def held(self) -> bool:
        """Whether the session holds it, as far as it knows; the lease is looked at elsewhere."""
        return self.epoch > 0

    @property
    def sole(self) -> bool:
        """Whether nobody else can have changed anything, as long as the lease lasts."""
        return self.epoch > 0 and not self.returning

    def grant(self, epoch: int) -> None:
        """It is ours."""
        self.epoch = epoch
        self.recalled = self.returning = False
        self._changed.unpark_all()

    def recall(self) -> bool:
        """Somebody else wants it: begin nothing new; whether that is news."""
        news = self.held and not self.recalled
        self.recalled = self.recalled or self.held
        return news

    def end(self) -> None:
        """It was given back."""
        self.epoch, self.recalled, self.returning = 0, False, False
        self._changed.unpark_all()

    def lose(self, error: DfsError) -> set[int]:
        """It was taken, and what was pending is lost; returns the inodes that concerns."""
        lost: set[int] = set()
        for batch in self.batches:
            lost |= batch.inodes()
            for waiter in batch.waiters:
                waiter.resolve(error)
        self.batches.clear()
        self._open = None
        self.pending = 0
        self.end()
        return lost

    # ------------------------------------------------------------------ batches

    def commit(self, view: View, txn: LocalTxn, oldest: int, now: float) -> None:
        """Apply a transaction to the view and to the open batch."""
        changes, ranges = txn.changes, txn.ranges
        batch = self._open
        if batch is None:
            self._number += 1
            batch = self._open = Batch(self._number, now)
            self.batches.append(batch)
        view.commit_local(changes, ranges, batch.number)
        batch.keys.update(changes)
        batch.ranges += ranges
        size = PER_ITEM * len(changes) + txn.size
        batch.size += size
        self.pending += size
        if oldest:
            batch.oldest = min(oldest, batch.oldest or oldest)
        if batch.size >= BATCH_BYTES:
            self._close(view)

    def _close(self, view: View) -> None:
        if self._open is not None:
            self._open.close(view)
            self._open = None

    def first(self, view: View) -> Batch:
        """The oldest batch, closed; it remains pending until it is `confirmed`."""
        if self.batches[0] is self._open:
            self._close(view)
        return self.batches[0]

    def confirmed(self, batch: Batch) -> None:
        """It is in the journal."""
        self.batches.popleft()
        self.pending -= batch.size
        for waiter in batch.waiters:
            waiter.resolve(True)
        self._changed.unpark_all()

    @property
    def crowded(self) -> bool:
        """Whether so much is pending that operations must wait."""
        return self.pending > MAX_PENDING

    def stir(self) -> None:
        """Let who waits for a change look again."""
        self._changed.unpark_all()

    async def wait_change(self) -> None:
        """Until batches were confirmed, or the delegation came or went, or somebody says so."""
        await self._changed.park()
