"""The repair queue: chunks that should be here in a good copy and are not.

Fed by whoever notices: the start (records whose data is bad), a reader's report, a failed read, the
scrubber.  A chunk stays in the queue, with growing pauses, until a good copy is here, or the
collector condemned it, or every other server answered that it has none: then it is told as lost,
and tried again rarely, since a server that is down may hold it.
"""

from chunkserver.peers import Peers
from chunkserver.segments import Segments
from dfs.env import Env
from dfs.errors import DfsError, DiskFull, NotFound
from dfs.workers import Worker

FIRST_PAUSE, LAST_PAUSE = 1.0, 300.0  # seconds between tries


class Repair(Worker):
    """Fetches chunks from other homes; `queue` is chunk id -> (reason, tries, not before)."""

    name = "repair"

    def __init__(self, env: Env, store: Segments, peers: Peers) -> None:
        """Repair `store` from `peers`."""
        super().__init__(env, 30.0, first=0.5)
        self._store = store
        self._peers = peers
        self.queue: dict[bytes, tuple[str, int, float]] = {}
        self.lost: set[bytes] = set()  # nobody has a copy
        self.repaired = 0
        self._doubtful: set[bytes] = set()

    def add(self, chunk_id: bytes, reason: str, *, doubtful: bool = False) -> None:
        """Queue a chunk for repair now; `doubtful`: it may never have been acknowledged."""
        if doubtful:
            self._doubtful.add(chunk_id)
        if chunk_id not in self.queue:
            self.queue[chunk_id] = (reason, 0, 0.0)
        self.wake()

    async def run_once(self) -> int:
        """Try every chunk that is due once; returns how many are whole again."""
        done = 0
        for chunk_id, (reason, tries, not_before) in list(self.queue.items()):
            if not_before > self._env.clock.monotonic():
                continue
            self.progress = f"{len(self.queue)} chunks waiting, {self.repaired} repaired"
            try:
                finished = await self._repair(chunk_id)
            except (NotFound, DiskFull) as e:
                # what a crash tore and nobody else has was never acknowledged by W servers
                finished = isinstance(e, NotFound) and chunk_id in self._doubtful
                if not finished:
                    self.last_error = str(e)
                    if isinstance(e, NotFound):
                        self.lost.add(chunk_id)
            except DfsError as e:
                self.last_error = str(e)
                finished = False
            if finished:
                self.queue.pop(chunk_id, None)
                self.lost.discard(chunk_id)
                self._doubtful.discard(chunk_id)
                done += 1
            else:
                pause = min(LAST_PAUSE, FIRST_PAUSE * 2.0**tries)
                due = self._env.clock.monotonic() + pause
                self.queue[chunk_id] = (reason, tries + 1, due)
        self.progress = f"{len(self.queue)} chunks waiting, {self.repaired} repaired"
        if self.queue:
            soonest = min(due for _, _, due in self.queue.values())
            self._interval = max(0.1, min(30.0, soonest - self._env.clock.monotonic()))
        else:
            self._interval = 30.0
        return done

    async def _repair(self, chunk_id: bytes) -> bool:
        store = self._store
        if not store.held(chunk_id):
            copy = await self._peers.fetch(chunk_id)
            if store.condemned(chunk_id, copy.stamp):
                return True
            size = len(copy.data)
            await store.put(chunk_id, [copy.data], size, copy.plain, copy.stamp)
            await store.sync()
            self.repaired += 1
        await store.healed(chunk_id)
        return True
