"""Names that are replaced or removed while somebody opens them.

open(2) is two requests: LOOKUP answers with an inode, OPEN opens that inode.  If a rename over the
name or an unlink comes in between, the inode is gone.  The answer is ESTALE then, upon which the
kernel looks the name up once more and opens what it finds; if that is gone, too, it hands ESTALE to
the program, which has never heard of it.

So after an open has failed like that, what is looked up is *held* for a moment: as if it were open,
it outlives the removal of its name by this mount, and the second attempt succeeds.  Nobody pays for
that as long as no open fails.  What another mount removes is gone all the same.
"""

import errno
import logging
import math
from collections import deque
from typing import TYPE_CHECKING

import trio

from dfs.client.filesystem import Attr, FileSystem
from dfs.errors import DfsError, FsError

if TYPE_CHECKING:
    from dfs.client.openfile import File

log = logging.getLogger(__name__)

MOMENT = 1.0  # seconds in which the kernel tries again, and for which an inode is held
HELD = 1000  # inodes at most; then those that were held first are let go


class Contention:
    """Holds inodes for opens that are tried again."""

    __slots__ = ("_fs", "_held", "_names", "_until", "_wake")

    def __init__(self, fs: FileSystem) -> None:
        """Nothing is held."""
        self._fs = fs
        self._until = 0.0  # what is looked up before this (trio's clock) is held
        self._held: deque[tuple[float, File]] = deque()  # (when to let go, file), in this order
        self._names: dict[int, tuple[int, bytes]] = {}  # (parent, name) it was found by last
        self._wake = trio.Event()

    @property
    def active(self) -> bool:
        """Whether an open failed a moment ago; to be asked for each LOOKUP."""
        return self._until > 0.0 and self._still_active()

    def _still_active(self) -> bool:
        if trio.current_time() < self._until:
            return True
        self._until = 0.0
        return False

    def failed(self) -> None:
        """An open found that what was looked up is gone: it will be tried again."""
        self._until = trio.current_time() + MOMENT

    async def look_up(self, parent: int, name: bytes) -> Attr | None:
        """What a name stands for, which is held for a moment if it is a file; else None."""
        attr, file = await self._fs.find_held(parent, name)
        if file is not None:
            self._held.append((trio.current_time() + MOMENT, file))
            self._names[file.ino] = parent, name
            if len(self._held) in {1, HELD + 1}:
                self._wake.set()
        return attr

    async def absent(self, ino: int) -> bool:
        """Whether a held inode, which somebody else removed, had a name that is nobody's now.

        Then the kernel need not look again, which it would not: the second attempt has failed.
        """
        place = self._names.get(ino)
        if place is None:
            return False
        try:
            return await self._fs.find(*place) is None
        except FsError as e:
            return e.errno == errno.ENOENT  # nor is there a directory any more

    async def run(self) -> None:
        """Let go what is held; until cancelled."""
        held = self._held
        while True:
            while len(held) <= HELD:
                self._wake = trio.Event()
                with trio.move_on_at(held[0][0] if held else math.inf) as scope:
                    await self._wake.wait()
                if scope.cancelled_caught:
                    break
            await self._let_go()

    async def end(self) -> None:
        """Let go everything, before the mount ends."""
        while self._held:
            await self._let_go()

    async def _let_go(self) -> None:
        _, file = self._held.popleft()
        self._names.pop(file.ino, None)
        try:
            await self._fs.files.close(file)
        except DfsError as e:  # an orphan that stays is purged by another session
            log.warning("inode %x is not closed cleanly: %s", file.ino, e)
