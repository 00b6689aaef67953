"""Bytes of requests in memory: a limit for the process and one for each connection.

A request counts from the allocation of its buffer until its handler is done.  Only requests with
their own buffer count; small ones are limited by number.  Answers are never held back by a budget
(whoever asked has room for them), so a full server always drains: no cycle of waiting servers.
"""

from collections import deque

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled


class Share:
    """What one connection uses of a `Budget`."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        """Nothing used."""
        self.limit = limit
        self.used = 0


class Budget:
    """A first-come-first-served byte semaphore with shares."""

    __slots__ = ("_waiters", "limit", "used")

    def __init__(self, limit: int) -> None:
        """`limit` bytes for everybody together."""
        self.limit = limit
        self.used = 0
        self._waiters: deque[tuple[Task, Share, int]] = deque()

    def _fits(self, share: Share, size: int) -> bool:
        # Whoever uses nothing yet may always take one request, however large its limit is.
        return (not self.used or self.used + size <= self.limit) and (
            not share.used or share.used + size <= share.limit
        )

    def acquire_nowait(self, share: Share, size: int) -> bool:
        """Take `size` bytes if they are free and nobody waits; whether that worked."""
        if self._waiters or not self._fits(share, size):
            return False
        self._take(share, size)
        return True

    def _take(self, share: Share, size: int) -> None:
        share.used += size
        self.used += size

    async def acquire(self, share: Share, size: int) -> None:
        """Wait for `size` bytes."""
        if self.acquire_nowait(share, size):
            await trio.lowlevel.checkpoint()
            return
        me = (current_task(), share, size)
        self._waiters.append(me)

        def give_up(_: object) -> Abort:
            self._waiters.remove(me)
            return Abort.SUCCEEDED

        await wait_task_rescheduled(give_up)

    def release(self, share: Share, size: int) -> None:
        """Give bytes back; wakes those who wait, passing over connections at their own limit."""
        share.used -= size
        self.used -= size
        if self._waiters:
            kept: deque[tuple[Task, Share, int]] = deque()
            for waiter in self._waiters:
                task, theirs, wanted = waiter
                if self._fits(theirs, wanted):
                    self._take(theirs, wanted)
                    reschedule(task)
                else:
                    kept.append(waiter)
            self._waiters = kept
