"""Purging orphans: files that were unlinked while open, whose client is gone."""

import logging
from collections.abc import Sequence
from functools import partial

import trio

from dfs.client.files import Files
from dfs.client.namespace import Namespace
from dfs.client.session import Session
from dfs.errors import FsError
from dfs.volume import items
from dfs.volume.view import Txn

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds between the end of a session and the purge of what it left


class Orphans:
    """Purges at the start and after sessions end, if nobody else may need an orphan.

    An orphan does not say who has it open.  So only a session that knows from the journal that it
    is the only writing one purges, and it spares what it has open itself.
    """

    def __init__(self, session: Session, namespace: Namespace, files: Files) -> None:
        """Compose; nothing happens before `run`."""
        self._session = session
        self._namespace = namespace
        self._files = files
        self._closed = trio.Event()
        session.on_closed(self._on_closed)

    def _on_closed(self, _sids: Sequence[int]) -> None:
        self._closed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.purge()
            except FsError as e:
                log.warning("orphans of volume %s stay: %s", self._session.volume.hex(), e)
            await self._closed.wait()
            self._closed = trio.Event()
            await trio.sleep(GRACE)

    async def purge(self) -> int:
        """Remove what may be removed now; returns how many."""

        def find(txn: Txn) -> list[int]:
            prefix = items.group(items.ADMIN_INO, items.ORPHAN)
            return [items.suffix_u64(key) for key, _ in txn.scan(prefix)]

        purged = 0
        if self._session.last:
            for ino in await self._session.read(find):
                if self._session.last and not self._files.is_open(ino):
                    purged += await self._session.transact(partial(self._purge, ino))
        return purged

    def _purge(self, ino: int, txn: Txn) -> bool:
        return self._namespace.purge(txn, ino)
