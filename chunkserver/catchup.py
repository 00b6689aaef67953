"""Catching up: this server gets the chunks it should have, and hands on those it should not.

Clients send every chunk to all N homes, but return when W have it.  A home that was down, or slow,
or full, lacks chunks that others hold; a fallback that stood in for it holds chunks that are not
its own.  Every few minutes, and soon after a start, this worker

- compares summaries (count and sum of ids per partition, 80 KiB) with every other server, lists the
  partitions that differ and that are its own, and pulls what it lacks;
- pushes chunks whose partition belongs to others to the homes that lack them, and drops its copy
  when every home holds one durably.

It never deletes because something is absent elsewhere, and never copies what the collector
condemned after the copy was last touched; a copy keeps its stamp.
"""

from chunkserver.index import different_partitions
from chunkserver.peers import Peers
from chunkserver.segments import Segments
from dfs.env import Env
from dfs.errors import DfsError, NotFound
from dfs.hashing import PARTITIONS, partition_of
from dfs.workers import Worker

PAGE = 1000


class CatchUp(Worker):
    """One `run_once` is a round with every other chunkserver."""

    name = "catch-up"

    def __init__(
        self,
        env: Env,
        store: Segments,
        peers: Peers,
        *,
        interval: float = 180.0,
        first: float = 2.0,
    ) -> None:
        """Compare `store` with `peers`."""
        super().__init__(env, interval, first=first)
        self._store = store
        self._peers = peers
        self.pulled = self.pushed = self.handed_over = 0

    async def run_once(self) -> int:
        """Pull what we lack, push what is not ours; returns the chunks moved."""
        before = self.pulled + self.pushed
        problems: list[str] = []
        for number in self._peers.numbers():
            try:
                await self._pull_from(number)
            except DfsError as e:
                problems.append(f"node {number}: {e}")
        problems += await self._push_foreign()
        self.last_error = "; ".join(problems[:3])
        moved = self.pulled + self.pushed - before
        self.progress = (
            f"{self.pulled} pulled, {self.pushed} pushed, {self.handed_over} handed over in all"
        )
        return moved

    async def _pull_from(self, number: int) -> None:
        peers, store = self._peers, self._store
        _, theirs = await peers.call(number, "chunk.summary")
        differing = different_partitions(store.index.summary(), bytes(theirs))
        mine = [p for p in differing if peers.is_home(p)]
        for i, partition in enumerate(mine):
            self.progress = f"node {number}: partition {i + 1} of {len(mine)}"
            for chunk_id, stamp in await self._list(number, partition):
                if not store.held(chunk_id) and not store.condemned(chunk_id, stamp):
                    await self._pull(number, chunk_id)
        await store.sync()

    async def _list(self, number: int, partition: int) -> list[tuple[bytes, int]]:
        """Ids and stamps of a partition at a peer."""
        at = (partition << 4).to_bytes(2, "big") + bytes(30)
        after = b"" if partition == 0 else (int.from_bytes(at, "big") - 1).to_bytes(32, "big")
        found: list[tuple[bytes, int]] = []
        while True:
            (page,), _ = await self._peers.call(number, "chunk.list", (after, PAGE, partition))
            for chunk_id, _plain, _stored, stamp in page:
                if partition_of(chunk_id) != partition:
                    return found
                found.append((chunk_id, stamp))
            if len(page) < PAGE:
                return found
            after = page[-1][0]

    async def _pull(self, number: int, chunk_id: bytes) -> None:
        try:
            copy = await self._peers.fetch(chunk_id, [number])
        except NotFound:
            return  # deleted since it was listed
        store = self._store
        if not store.condemned(chunk_id, copy.stamp):
            size = len(copy.data)
            if await store.put(chunk_id, [copy.data], size, copy.plain, copy.stamp):
                self.pulled += 1

    async def _push_foreign(self) -> list[str]:
        problems: list[str] = []
        for partition in range(PARTITIONS):
            if self._peers.is_home(partition):
                continue
            entries = self._store.index.partition(partition)
            done: list[bytes] = []
            for chunk_id, entry in entries:
                try:
                    for home in self._peers.homes(partition):
                        await self._push(home, chunk_id, entry.stamp)
                except DfsError as e:
                    problems.append(f"push to the homes of partition {partition}: {e}")
                    break
                done.append(chunk_id)
            await self._store.drop(done)
            self.handed_over += len(done)
        return problems

    async def _push(self, home: int, chunk_id: bytes, stamp: int) -> None:
        """Return when `home` holds the chunk durably."""
        ((held,),), _ = await self._peers.call(home, "chunk.touch", ((chunk_id,), stamp))
        if not held:
            _, buffers = await self._store.read(chunk_id)
            await self._peers.call(home, "chunk.put", (chunk_id, True, stamp, True), buffers)
            self.pushed += 1
