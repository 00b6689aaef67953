"""Group commit: one fdatasync for everybody who waits.

The first caller leads: it runs the sync.  Whoever calls while a sync runs cannot know whether its
writes came before the kernel looked, so it waits for the next one, which the first of them leads
for all.  There is no task of its own and no timer: a lone caller never waits for company, and under
load the batch is whatever arrived during one sync (DeWitt et al., SIGMOD 1984).

A failed sync fails everybody who waits, and every later call: after an fsync error the kernel no
longer knows what reached the disk, see `dfs.disk`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import outcome
import trio

from dfs.env import Disk
from dfs.errors import DfsError, StoreFailed


class Syncable(Protocol):
    """What can be synced: a `dfs.env.DiskFile`, or several of them behind one method."""

    def fdatasync(self) -> None:
        """Make all writes so far survive power loss."""
        ...


class GroupSync:
    """Syncs one file (or what a function returns at the start of each sync) for many callers.

    With a function: whoever moves on to another file sees to it that the earlier file is synced,
    because callers that wrote to it may still wait.
    """

    __slots__ = ("_calls", "_disk", "_file", "_running", "_syncs", "_waiting", "failed")

    def __init__(self, disk: Disk, file: Syncable | Callable[[], Syncable]) -> None:
        """Sync `file` through `disk.sync`."""
        self._disk = disk
        self._file = file
        self._running = False
        self._waiting: dict[trio.lowlevel.Task, None] = {}
        self._calls = 0
        self._syncs = 0
        self.failed: StoreFailed | None = None

    async def sync(self, *, turn: bool = True) -> None:
        """Return when everything written before the call is durable; raises `StoreFailed`.

        `turn`: see `dfs.env.Disk.sync`.
        Only waiting for another's sync can be cancelled; a cancelled caller knows nothing about
        its writes.
        """
        if self.failed is not None:
            raise self._again()
        self._calls += 1
        if self._running:
            task = trio.lowlevel.current_task()
            waiting = self._waiting  # stays the same object when a leader takes it
            waiting[task] = None

            def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
                del waiting[task]
                return trio.lowlevel.Abort.SUCCEEDED

            if not await trio.lowlevel.wait_task_rescheduled(abort):
                return
        self._running = True
        followers = self._waiting
        self._waiting = {}
        try:
            file = self._file() if callable(self._file) else self._file
            self._syncs += 1
            await self._disk.sync(file.fdatasync, turn=turn)
        except BaseException as e:
            self._fail(e, followers)
            if isinstance(e, DfsError) or not isinstance(e, Exception):
                raise
            raise self._again() from e
        for follower in followers:
            trio.lowlevel.reschedule(follower, outcome.Value(False))
        if self._waiting:
            leader = next(iter(self._waiting))
            del self._waiting[leader]
            trio.lowlevel.reschedule(leader, outcome.Value(True))
        else:
            self._running = False

    def _fail(self, error: BaseException, followers: dict[trio.lowlevel.Task, None]) -> None:
        text = f"{error}" if isinstance(error, DfsError) else f"{type(error).__name__}: {error}"
        self.failed = StoreFailed(text)
        self._running = False
        everybody = [*followers, *self._waiting]
        self._waiting = {}
        for task in everybody:
            trio.lowlevel.reschedule(task, outcome.Error(self._again()))

    def _again(self) -> StoreFailed:
        # an instance of its own for each: a shared exception would collect everybody's tracebacks
        return StoreFailed(f"an earlier sync failed: {self.failed}")

    def statistics(self) -> dict[str, int]:
        """Calls, syncs they took, callers that wait for the next one."""
        return {"calls": self._calls, "syncs": self._syncs, "waiting": len(self._waiting)}
