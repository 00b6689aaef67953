"""Handing over: this server passes on the chunks that are not its own, and drops them then.

Three ways lead to such chunks: a home was down and this server stood in for it, homes moved away
from here, or this server is being emptied (weight 0).  A chunk goes only when *every* home of the
newest map said that it holds it durably, when the homes are still the same, and when nobody put or
touched the copy here meanwhile: that somebody counts it.

While homes move, the new ones pull from the old ones (see `chunkserver.catchup`), and old homes
leave the rest to them until the transition is over; then, as a rule, one question per thousand
chunks shows that everything is there.  Pushing is limited to 64 MiB/s, more with the backlog.
"""

from chunkserver.catchup import MOVE_RATE
from chunkserver.index import Entry
from chunkserver.peers import Peers
from chunkserver.segments import Segments
from dfs.cluster.map import CHUNK
from dfs.env import Env
from dfs.errors import DfsError
from dfs.hashing import PARTITIONS
from dfs.pace import Bandwidth
from dfs.workers import Worker

BATCH = 1000  # chunks a home is asked about at once


class HandOver(Worker):
    """One `run_once` is a pass over everything that is not our own."""

    name = "hand-over"

    def __init__(
        self,
        env: Env,
        store: Segments,
        peers: Peers,
        *,
        interval: float = 180.0,
        first: float = 3.0,
        rate: float = MOVE_RATE,
    ) -> None:
        """Move from `store` to `peers`; `rate` in bytes a second."""
        super().__init__(env, interval, first=first)
        self._store = store
        self._peers = peers
        self.bandwidth = Bandwidth(rate)
        self.pushed = self.handed_over = 0

    def foreign(self) -> int:
        """How many chunks here belong to others, those that new homes still pull included."""
        mine, count = self._peers.mine(), self._store.index.count
        return sum(count(p) for p in range(PARTITIONS) if not mine[p])

    async def run_once(self) -> int:
        """Push what is not ours where it is missing, drop it here; returns the chunks dropped."""
        before = self.handed_over
        problems: list[str] = []
        left = self.foreign()
        for partition in range(PARTITIONS):
            if not left:
                break
            m = self._peers.map()
            if self._peers.is_home(partition):
                continue
            entries = self._store.index.partition(partition)
            if not entries or self._leave_to_others(m.old_homes(CHUNK, partition)):
                continue
            for start in range(0, len(entries), BATCH):
                part = entries[start : start + BATCH]
                self.progress = f"{left} chunks to hand over"
                try:
                    await self._hand_over(partition, part, left)
                except DfsError as e:
                    problems.append(f"partition {partition}: {e}")
                    break
                left -= len(part)
        if problems or self.last_error:
            self.last_error = "; ".join(problems[:3])
        left = self.foreign()
        self.progress = f"{self.handed_over} chunks handed over in all, {left} to go"
        self._interval = 30.0 if left and not problems else 180.0
        return self.handed_over - before

    def _leave_to_others(self, old_homes: tuple[int, ...]) -> bool:
        """Whether the new homes pull the partition from here: it stays until they are done."""
        return self._peers.number in old_homes

    async def _hand_over(
        self, partition: int, entries: list[tuple[bytes, Entry]], queue: int
    ) -> None:
        """Return when every home holds the chunks durably, and they are dropped here."""
        homes = self._peers.homes(partition)
        for home in homes:
            await self._push(home, entries, queue)
        if self._peers.homes(partition) != homes:
            return  # the map changed: others must have them now
        now = self._store.index.get
        done = [i for i, e in entries if self.unchanged(e, now(i))]
        await self._store.drop(done)
        self.handed_over += len(done)
        self.did(len(done))

    def unchanged(self, before: Entry, now: Entry | None) -> bool:
        """Whether nobody put or touched a copy since its homes were asked."""
        return now is not None and now.stamp == before.stamp

    async def _push(self, home: int, entries: list[tuple[bytes, Entry]], queue: int) -> None:
        """Return when `home` holds the chunks durably."""
        # a touch says whether they are held, makes them durable and passes the stamps on
        ids = tuple(i for i, _ in entries)
        stamps = tuple(e.stamp for _, e in entries)
        (held,), _ = await self._peers.call(home, "chunk.touch", (ids, 0, stamps))
        for (chunk_id, entry), there in zip(entries, held, strict=True):
            if not there:
                _, buffers = await self._store.read(chunk_id)
                args = (chunk_id, True, entry.stamp, True)
                await self._peers.call(home, "chunk.put", args, buffers)
                self.pushed += 1
                self.did(0, entry.stored)
                await self.rest(size=entry.stored, queue=queue, backlog=queue * entry.stored)
