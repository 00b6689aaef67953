"""Transactions on their way to the home, and which of them may share a request."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import trio

from dfs.errors import DfsError
from dfs.volume import effects as fx
from dfs.volume.view import Txn, View

MAX_BATCH = 256  # transactions a request
MAX_BATCH_BYTES = 1 << 20  # effects a request, roughly


class Waiter:
    """Somebody who waits for one answer; cheaper than an event, for exactly one task."""

    __slots__ = ("_done", "_task", "_value")

    def __init__(self) -> None:
        """Nobody waits yet."""
        self._task: trio.lowlevel.Task | None = None
        self._done = False
        self._value: bool | DfsError = False

    def resolve(self, value: bool | DfsError) -> None:
        """Wake who waits with a value, or an error to raise."""
        self._value = value
        self._done = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def wait(self) -> bool:
        """The value; raises the error."""
        if not self._done:
            self._task = trio.lowlevel.current_task()

            def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
                self._task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if isinstance(self._value, DfsError):
            raise self._value
        return self._value

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more: the operation was cancelled."""
        return self._task is None


class Submission(Waiter):
    """A transaction that waits for its verdict: True = committed, False = conflict."""

    __slots__ = ("groups", "kept", "keys", "oldest", "size", "txn")

    def __init__(self, txn: Txn, oldest: int, *, kept: bool = False) -> None:
        """`oldest`: as of `Session.transact`.

        `kept`: what it commits is kept until that succeeds, and may be committed twice.
        """
        super().__init__()
        self.kept = kept
        self.txn = txn
        self.oldest = oldest
        self.keys, self.groups = fx.writes(txn.effects)
        self.size = sum(len(e[2]) if e[0] == fx.PUT else 64 for e in txn.effects)


def form(
    queue: Iterable[Submission], view: View
) -> tuple[list[Submission], deque[Submission], list[Submission]]:
    """(what goes into one request, what stays queued, what lost to an entry the view knows).

    A transaction that reads or writes what an earlier one of the batch writes stays behind: its
    turn comes with the earlier one's entry in the view, where it will be found to conflict.
    """
    batch: list[Submission] = []
    left: deque[Submission] = deque()
    lost: list[Submission] = []
    keys: set[bytes] = set()
    groups: set[bytes] = set()
    size = 0
    for s in queue:
        txn = s.txn
        if s.abandoned:
            continue
        if view.changed_since(txn.base, txn.keys, txn.groups):
            lost.append(s)
        elif (
            len(batch) >= MAX_BATCH
            or (batch and size + s.size > MAX_BATCH_BYTES)
            or not keys.isdisjoint(txn.keys)
            or not groups.isdisjoint(txn.groups)
            or not keys.isdisjoint(s.keys)
        ):
            left.append(s)
        else:
            keys.update(s.keys)
            groups.update(s.groups)
            size += s.size
            batch.append(s)
    return batch, left, lost
