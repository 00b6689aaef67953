"""Telling the kernel what other clients changed, from a thread of its own.

The kernel's notification calls block: an entry cannot be invalidated while a request in its
directory is unanswered.  So no handler ever makes one; they are queued for one thread.  The queue
coalesces by inode and name, and is bounded: past the bound it drops the oldest, because what it
forgets to say the kernel finds out itself within the attribute timeout of a second.

The same thread asks the kernel to forget inodes that nobody uses, when there are too many of them
(`prune`).  FUSE_NOTIFY_PRUNE does to them what want of memory does, and leaves those in use alone;
invalidating their names would not: an open file would count as deleted.  So where the kernel does
not know it (before Linux 6.18) nothing is asked.
"""

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Sequence

import pyfuse3
import trio

log = logging.getLogger(__name__)

LIMIT = 10_000
Key = tuple[int, bytes]  # (inode, b"") or (parent, name)

PRUNE = 9  # FUSE_NOTIFY_PRUNE of <linux/fuse.h>
PRUNE_AT_ONCE = 512  # inodes in one notification
MIB_PER_MILLION = 270  # what `fuse.inodes` takes for inodes that are not pruned
_prune_head = struct.Struct("=IiQIIQ")  # fuse_out_header, fuse_notify_prune_out


def notify_prune(device: int, inos: Sequence[int]) -> None:
    """Ask the kernel to drop what it has cached of these inodes, if nobody uses them.

    `device` is the mount's open /dev/fuse.  Raises `OSError`: EINVAL where it is not known.
    """
    size = _prune_head.size + 8 * len(inos)
    head = _prune_head.pack(size, PRUNE, 0, len(inos), 0, 0)
    os.write(device, head + struct.pack(f"={len(inos)}Q", *inos))


class Invalidator:
    """The queue and its thread; `statistics()` for people."""

    def __init__(
        self,
        *,
        limit: int = LIMIT,
        invalidate_inode: Callable[..., None] = pyfuse3.invalidate_inode,
        invalidate_entry: Callable[..., None] = pyfuse3.invalidate_entry,
        prune: Callable[[int, Sequence[int]], None] = notify_prune,
    ) -> None:
        """Start the thread; the functions are the kernel's, others in tests."""
        self.device = -1  # the mount's, once there is one; before that nothing is pruned
        self._notify_prune = prune
        self._to_prune: list[int] = []
        self._limit = limit
        self._inode = invalidate_inode
        self._entry = invalidate_entry
        self._pending: dict[Key, list[Callable[[], None]]] = {}
        self._condition = threading.Condition()
        self._current: Key | None = None  # what the thread is telling the kernel now
        self._stopped = False
        self._sent = 0
        self._dropped = 0
        self._pruned = 0
        self._thread = threading.Thread(target=self._run, name="invalidate", daemon=True)
        self._thread.start()

    def statistics(self) -> dict[str, int]:
        """Counters."""
        return {
            "pending": len(self._pending),
            "sent": self._sent,
            "dropped": self._dropped,
            "pruned": self._pruned,
        }

    def inode(self, ino: int) -> None:
        """Forget cached attributes and pages of an inode; returns at once."""
        self._put((ino, b""), None)

    def entry(self, parent: int, name: bytes) -> None:
        """Forget a name of a directory; returns at once."""
        self._put((parent, name), None)

    def prune(self, inos: list[int]) -> None:
        """Have the kernel forget those of these inodes that nobody uses; returns at once.

        They wait until nothing else does.  When the last ones still wait, these are not asked for.
        """
        with self._condition:
            if self.device >= 0 and not self._to_prune:
                self._to_prune = inos
                self._condition.notify()

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
            self.device = -1  # it is closed next, and the number may be another file's then
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
                while not (self._pending or self._to_prune or self._stopped):
                    self._condition.wait()
                if self._stopped:
                    return
                if not self._pending:
                    inos = self._to_prune[:PRUNE_AT_ONCE]
                    del self._to_prune[:PRUNE_AT_ONCE]
                    key = None
                else:
                    key = next(iter(self._pending))
                    waiting = self._pending.pop(key)
                    self._current = key
            if key is None:
                self._prune_now(inos)
                continue
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

    def _prune_now(self, inos: Sequence[int]) -> None:
        try:
            self._notify_prune(self.device, inos)
            self._pruned += len(inos)
        except OSError as e:
            if e.errno != errno.ENODEV:  # that is an unmount
                log.info(
                    "the kernel is not asked to forget inodes any more (%s): Linux 6.18 or newer"
                    " can; this mount takes some %d MiB for each million files it has seen",
                    e.strerror,
                    MIB_PER_MILLION,
                )
            with self._condition:
                self.device = -1
                self._to_prune = []
