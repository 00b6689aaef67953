"""Access times, as seldom as Linux's relatime keeps them, and committed together.

Off unless asked for: every reader becomes a writer.  A read moves an access time that is not newer
than the last change of the file, or is a day old.  What it becomes is kept here and shown at once;
every few seconds all that was noted is committed in one transaction, which conflicts with nobody.
Access times noted in the last seconds before a crash are lost, and nothing else.
"""

import logging

import trio

from dfs.client.attributes import Attr, patch_inode
from dfs.client.session import Session
from dfs.errors import DfsError
from dfs.volume import effects as fx
from dfs.volume import items
from dfs.volume.view import Txn

log = logging.getLogger(__name__)

DAY = 24 * 3600 * 10**9  # nanoseconds after which an access time is moved in any case
INTERVAL = 5.0  # seconds between commits
BATCH = 500  # inodes in one transaction


class AccessTimes:
    """The access times that one client noted and has not committed."""

    def __init__(self, session: Session) -> None:
        """Nothing noted; `run` commits."""
        self._session = session
        self._time_ns = session.cluster.clock.time_ns
        self._noted: dict[int, int] = {}
        self._work = trio.Event()

    def __len__(self) -> int:
        """Number of access times not committed."""
        return len(self._noted)

    def accessed(self, attr: Attr) -> None:
        """Somebody reads the inode whose attributes these are; returns at once."""
        now = self._time_ns()
        atime = max(attr.atime, self._noted.get(attr.ino, attr.atime))
        if atime <= attr.mtime or atime <= attr.ctime or now - atime >= DAY:
            self._noted[attr.ino] = now
            self._work.set()

    def overlay(self, attr: Attr) -> Attr:
        """Put what is noted over committed attributes, in place."""
        noted = self._noted.get(attr.ino)
        if noted is not None:
            attr.atime = noted
        return attr

    def set(self, ino: int) -> None:
        """Somebody sets the access time: what was noted before is void."""
        self._noted.pop(ino, None)

    async def run(self) -> None:
        """Commit what is noted, every few seconds; until cancelled."""
        while True:
            await self._work.wait()
            await trio.sleep(INTERVAL)
            try:
                await self.commit()
            except DfsError as e:  # kept, and tried again
                log.warning("access times are not committed yet: %s", e)

    async def commit(self) -> None:
        """Commit all that is noted; raises `FsError`, keeping what is not committed."""
        while self._noted:
            part = list(self._noted.items())[:BATCH]

            def op(txn: Txn, part: list[tuple[int, int]] = part) -> None:
                for ino, atime in part:  # of an inode that is gone: no effect
                    patch_inode(txn, ino, (items.F_ATIME, fx.LAST, atime))

            await self._session.transact(op)
            for ino, atime in part:
                if self._noted.get(ino) == atime:
                    del self._noted[ino]
        self._work = trio.Event()
