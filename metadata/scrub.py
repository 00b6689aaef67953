"""Reading every table of the store now and then, so that damage is found while copies are good."""

from dfs.env import Env
from dfs.workers import Worker
from metadata.store.engine import Store

WEEK = 7 * 86400.0
FIRST = 600.0  # seconds after the start


class StoreScrub(Worker):
    """Verifies one table after the other, with rests; a round reads all of them.

    What it finds is quarantined by the store, which tells its listeners: `storage-repair` then gets
    the lost rows from the other homes.
    """

    name = "store-scrub"

    def __init__(self, env: Env, store: Store, *, interval: float = WEEK) -> None:
        """Check `store`."""
        super().__init__(env, interval, first=FIRST)
        self._store = store

    async def run_once(self) -> int:
        """Every table once; returns how many were read."""
        checked = 0
        before = len(self._store.quarantined)
        tables = int(self._store.statistics()["tables"])
        while True:
            done = await self._store.verify_step()
            checked += 1
            self.did(1)
            self.fraction = min(1.0, checked / max(1, tables))
            found = len(self._store.quarantined) - before
            self.progress = f"{checked} of {tables} tables read, {found} damaged"
            if done:
                break
            await self.rest()
        self.fraction = None
        return checked
