"""Bytes in memory: of requests that are served (`Budget`), of writes under way (`InFlight`).

A request that is served counts from the allocation of its buffer until its handler is done.  Only
requests with their own buffer count; small ones are limited by number.  Answers are never held back
by a budget (whoever asked has room for them), so a full server always drains: no cycle of waiting
servers.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from dfs.clock import Clock
from dfs.errors import Busy


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


class InFlight:
    """Bytes of replica writes under way: a limit for the process and one for each peer.

    A value is charged once for the process and once for each peer it is sent to, until the *last*
    copy ended, however early its caller got a quorum: otherwise a fast majority hides a slow peer
    whose copies pile up in our memory.  A peer that stays full for five seconds is `slow`; callers
    do not wait for it but leave a hint.  `now` is monotonic seconds.
    """

    def __init__(
        self, limit: int = 256 << 20, per_peer: int = 32 << 20, patience: float = 5.0
    ) -> None:
        """Limits in bytes; `patience` in seconds."""
        self.limit = limit
        self.per_peer = per_peer
        self.patience = patience
        self.used = 0
        self.refused = 0
        self._peers: dict[int, int] = {}  # bytes under way, > 0
        self._full: dict[int, tuple[float, float]] = {}  # first and last refusal in a row
        self._room = trio.lowlevel.ParkingLot()
        self._listeners: list[Callable[[int], None]] = []

    def on_ended(self, listener: Callable[[int], None]) -> None:
        """Call `listener(peer)` whenever a copy for the peer ended, so that it may have room."""
        self._listeners.append(listener)

    def check(self, size: int) -> None:
        """Raise `Busy` if the process is at its limit."""
        # A value larger than the limit is let through alone.
        if self.used and self.used + size > self.limit:
            self.refused += 1
            raise Busy(
                f"{self.used} bytes of writes are under way here already, of {self.limit} allowed; "
                "try again"
            )

    def charge(self, size: int) -> "Flight":
        """Charge the process, whatever its limit: for what was let in already."""
        self.used += size
        return Flight(self, size)

    def acquire_nowait(self, size: int) -> "Flight":
        """Charge the process; raises `Busy` if it is at its limit."""
        self.check(size)
        return self.charge(size)

    async def acquire(self, size: int) -> "Flight":
        """Charge the process; waits while it is at its limit."""
        await trio.lowlevel.checkpoint()
        while self.used and self.used + size > self.limit:
            await self._room.park()
        return self.acquire_nowait(size)

    def has_room(self, peer: int, size: int, now: float) -> bool:
        """Whether the peer may be sent `size` bytes now; a refusal starts its clock."""
        used = self._peers.get(peer, 0)
        if not used or used + size <= self.per_peer:
            return True
        first, last = self._full.get(peer, (now, now))
        # nobody was refused for long: it was not full, or nobody tried
        self._full[peer] = (first if now - last <= self.patience else now, now)
        return False

    def slow(self, peer: int, now: float) -> bool:
        """Whether the peer has been full for so long that nobody should wait for it.

        Ends after five seconds without anybody who tried, so that it is tried again.
        """
        full = self._full.get(peer)
        return (
            full is not None and now - full[0] >= self.patience and now - full[1] <= self.patience
        )

    async def wait_room(self, peer: int, size: int, clock: Clock) -> None:
        """Wait until the peer may be sent `size` bytes; raises `Busy` once it is slow."""
        await trio.lowlevel.checkpoint()
        while not self.has_room(peer, size, now := clock.monotonic()):
            if self.slow(peer, now):
                self.refused += 1
                raise Busy(
                    f"node {peer} is slow: {self._peers[peer]} bytes have waited for it for "
                    f"{self.patience:g} s"
                )
            with trio.move_on_after(self._full[peer][0] + self.patience - now):
                await self._room.park()

    def _send(self, peer: int, size: int) -> None:
        self._peers[peer] = self._peers.get(peer, 0) + size

    def _ended(self, peer: int, size: int) -> None:
        left = self._peers[peer] - size
        if left > 0:
            self._peers[peer] = left
        else:
            del self._peers[peer]
        # Half empty, not merely below the limit: one that swallows a value now and then stays slow.
        if left * 2 <= self.per_peer:
            self._full.pop(peer, None)
        self._room.unpark_all()
        for listener in self._listeners:
            listener(peer)

    def _release(self, size: int) -> None:
        self.used -= size
        self._room.unpark_all()

    def statistics(self, now: float) -> dict[str, Any]:
        """Bytes under way, slow peers, refusals."""
        return {
            "bytes": self.used,
            "peers": dict(sorted(self._peers.items())),
            "slow": tuple(p for p in sorted(self._full) if self.slow(p, now)),
            "refused": self.refused,
        }


class Flight:
    """One value on its way to its replicas; see `InFlight`."""

    __slots__ = ("_all", "_closed", "_copies", "_size")

    # Copies may be parts: a request with some of the values that were charged together.

    def __init__(self, everything: InFlight, size: int) -> None:
        """Made by `InFlight.acquire`."""
        self._all = everything
        self._size = size
        self._copies: dict[int, int] = {}
        self._closed = False

    def send(self, peer: int, size: int | None = None) -> None:
        """A copy leaves for the peer (one more, if some did before); `size`: a part of it."""
        self._copies[peer] = self._copies.get(peer, 0) + 1
        self._all._send(peer, self._size if size is None else size)

    def ended(self, peer: int, size: int | None = None) -> None:
        """A copy, or the part of `size` bytes, was answered, refused or given up."""
        self._copies[peer] -= 1
        if not self._copies[peer]:
            del self._copies[peer]
        self._all._ended(peer, self._size if size is None else size)
        self._finish()

    def close(self) -> None:
        """No more copies will leave; gives back the process's bytes once the last one ended."""
        self._closed = True
        self._finish()

    def _finish(self) -> None:
        if self._closed and not self._copies and self._size >= 0:
            size, self._size = self._size, -1
            self._all._release(size)
