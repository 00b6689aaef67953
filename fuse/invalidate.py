"""Telling the kernel what other clients changed, from a thread of its own.

The kernel's notification calls block: an entry cannot be invalidated while a request in its
directory is unanswered.  So no handler ever makes one; they are queued for one thread.  The queue
coalesces by inode and name, and is bounded: past the bound it drops the oldest, because what it
forgets to say the kernel finds out itself within the attribute timeout of a second.
"""

import logging
import threading
from collections.abc import Callable

import pyfuse3
import trio

log = logging.getLogger(__name__)

LIMIT = 10_000
Key = tuple[int, bytes]  # (inode, b"") or (parent, name)


class Invalidator:
    """The queue and its thread; `statistics()` for people."""

    def __init__(
        self,
        *,
        limit: int = LIMIT,
        invalidate_inode: Callable[..., None] = pyfuse3.invalidate_inode,
        invalidate_entry: Callable[..., None] = pyfuse3.invalidate_entry,
    ) -> None:
        """Start the thread; the functions are the kernel's, others in tests."""
        self._limit = limit
        self._inode = invalidate_inode
        self._entry = invalidate_entry
        self._pending: dict[Key, list[Callable[[], None]]] = {}
        self._condition = threading.Condition()
        self._current: Key | None = None  # what the thread is telling the kernel now
        self._stopped = False
        self._sent = 0
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="invalidate", daemon=True)
        self._thread.start()

    def statistics(self) -> dict[str, int]:
        """Counters."""
        return {"pending": len(self._pending), "sent": self._sent, "dropped": self._dropped}

    def inode(self, ino: int) -> None:
        """Forget cached attributes and pages of an inode; returns at once."""
        self._put((ino, b""), None)

    def entry(self, parent: int, name: bytes) -> None:
        """Forget a name of a directory; returns at once."""
        self._put((parent, name), None)

    def is_pending(self, ino: int) -> bool:
        """Whether the kernel has yet to hear about an inode."""
        key = (ino, b"")
        return key in self._pending or self._current == key

    async def wait_inode(self, ino: int, timeout: float = 1.0) -> None:
        """Forget an inode and wait until the kernel did, or `timeout` seconds.

        Safe in a handler of `open`: dropping an inode's pages waits for reads that are being
        answered, and for nothing that this handler holds.
        """
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            try:
                token.run_sync_soon(done.set)
            except trio.RunFinishedError:
                log.debug("the loop ended before an invalidation did")

        self._put((ino, b""), wake)
        with trio.move_on_after(timeout):
            await done.wait()

    def stop(self) -> None:
        """End the thread; it is not waited for, because it may be inside the kernel."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def _put(self, key: Key, done: Callable[[], None] | None) -> None:
        with self._condition:
            waiting = self._pending.setdefault(key, [])
            if done is not None:
                waiting.append(done)
            if len(self._pending) > self._limit:
                oldest = next(iter(self._pending))
                for fn in self._pending.pop(oldest):
                    fn()
                self._dropped += 1
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._pending and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    return
                key = next(iter(self._pending))
                waiting = self._pending.pop(key)
                self._current = key
            try:
                if key[1]:
                    self._entry(*key)
                else:
                    self._inode(key[0])
                self._sent += 1
            except OSError as e:  # ENOENT: the kernel does not know it; ENODEV: unmounted
                log.debug("invalidation of %s: %s", key, e)
            except Exception:
                log.exception("invalidation of %s", key)
            self._current = None
            for fn in waiting:
                fn()
