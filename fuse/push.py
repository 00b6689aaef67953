"""Small files are handed to the kernel when they are opened: that saves it the request to read.

FUSE_NOTIFY_STORE puts bytes into the kernel's page cache, and marks whole pages as good.  It is a
fifth of what reading a small file for the first time costs.  Why it is safe in a handler of `open`:

- The handle that is being opened is the only one (`FileSystem.whole_nowait`), so the kernel has no
  read, write or mapping of the file under way: none of its pages is locked until we answer, which
  would be a deadlock, and none is newer than what we have.  Mounts whose kernel keeps writes back
  are another matter; nothing is pushed there.
- What is pushed is the view's content after `open` brought it up to date, and after the kernel was
  told of older changes.  It is told of later ones as of any page.

A file is pushed once, until the kernel forgets the inode or somebody else changes it.  When only
its pages went the kernel asks, as it does for everything else.
"""

import errno
import logging
from collections.abc import Callable

from dfs.client.filesystem import FileSystem

log = logging.getLogger(__name__)

LIMIT = 16 << 10  # bytes of a file: what may lie in its volume's tree
Store = Callable[..., None]  # (inode, offset, bytes)
MOST = 100_000  # files that are remembered as pushed; then all are forgotten


class Push:
    """What was pushed; call from the loop."""

    def __init__(self, fs: FileSystem) -> None:
        """Nothing is pushed before there is a mount: `store` is its kernel's, or None."""
        self._fs = fs
        self.store: Store | None = None
        self._known: set[int] = set()

    def opened(self, ino: int, handle: int) -> None:
        """A file was opened for reading; nothing may be awaited from here to the answer."""
        store = self.store
        if store is None or ino in self._known:
            return
        data = self._fs.whole_nowait(handle, LIMIT)
        if data is None:
            return
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.add(ino)
        try:
            store(ino, 0, data)
        except OSError as e:
            if e.errno == errno.ENOSYS:
                self.store = None
            elif e.errno != errno.ENOENT:  # the kernel has just forgotten the inode
                log.debug("inode %x cannot be pushed: %s", ino, e)

    def forget(self, ino: int) -> None:
        """The kernel has forgotten the inode, or is about to forget its pages."""
        self._known.discard(ino)

    def forget_all(self) -> None:
        """It is about to forget all pages."""
        self._known.clear()
