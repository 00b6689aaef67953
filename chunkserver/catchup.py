"""Catching up: this server gets the chunks it should have.

Clients send every chunk to all N homes, but return when W have it: a home that was down, or slow,
or full, lacks chunks that others hold.  And when homes move, a new home has nothing at all.  Every
few minutes, soon after a start and at once when the map changes, this worker compares summaries
(count and sum of ids per partition, 80 KiB) with every other server, lists the partitions that
differ and that are its own, and pulls what it lacks.

While homes move from A to B, a new home in B also has to know when it has *everything*, because the
transition ends by that.  It does when, of N - W + 1 members of A, it holds all they list, and each
listed after it had refused writes older than the partition's last change (`chunk.fence`): every
write of earlier epochs has a copy at one of them.  A member with a bad copy to repair does not
count for its partition, since it cannot list what it lacks.  `complete` is what is known; a restart
forgets it, and finding out again is one round.

Nothing is deleted here because it is absent elsewhere, nothing is copied that the collector
condemned after the copy was last touched, and a copy keeps its stamp.  Pulling is limited to 64
MiB/s, more when much is to be moved.
"""

from collections.abc import Iterable

from chunkserver.index import SUMMARY, different_partitions
from chunkserver.peers import Peers
from chunkserver.segments import Segments
from dfs.cluster.joint import bitmap
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Env
from dfs.errors import DfsError, DiskFull, NoQuorum, NotFound
from dfs.hashing import PARTITIONS, partition_of
from dfs.pace import Bandwidth
from dfs.workers import Worker

PAGE = 1000
MOVE_RATE = 64 << 20  # bytes/s
TYPICAL = 256 << 10  # bytes of a chunk, for a server that has none to tell


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
        rate: float = MOVE_RATE,
    ) -> None:
        """Compare `store` with `peers`; `rate` in bytes a second."""
        super().__init__(env, interval, first=first)
        self._store = store
        self._peers = peers
        self.bandwidth = Bandwidth(rate)
        self.pulled = 0
        self.waiting = 0  # chunks that others have more of, as of their last summaries
        self._moving: tuple[int, list[int]] = (0, [])  # epoch, partitions
        # partition -> (its last change, members of A all of whose chunks are here durably)
        self._sources: dict[int, tuple[int, set[int]]] = {}

    # -------------------------------------------------------------------------------- transitions

    def complete(self) -> tuple[int, bytes]:
        """(epoch, bitmap of the partitions that moved here and are here completely)."""
        m = self._peers.map()
        return m.epoch, bitmap(p for p in self._incoming(m) if self._is_complete(m, p))

    def incomplete(self) -> int:
        """How many partitions that move here are not here completely."""
        m = self._peers.map()
        return sum(not self._is_complete(m, p) for p in self._incoming(m))

    def _incoming(self, m: ClusterMap) -> list[int]:
        """The partitions that move here; kept, because status pages ask often."""
        if self._moving[0] != m.epoch:
            me = self._peers.number
            found = [
                p
                for p in m.changed(CHUNK)
                if me in m.homes(CHUNK, p) and me not in m.old_homes(CHUNK, p)
            ]
            self._moving = (m.epoch, found)
        return self._moving[1]

    def _is_complete(self, m: ClusterMap, partition: int) -> bool:
        change, sources = self._sources.get(partition, (0, set()))
        return change == m.last_change(CHUNK, partition) and len(sources) >= self.enough(m)

    def enough(self, m: ClusterMap) -> int:
        """Members of A of which every W, the copies of a write, have one."""
        return m.params.n - m.params.w + 1

    def _has_all_of(self, number: int, fenced: int, partitions: Iterable[int]) -> None:
        """Everything that a member of A listed after its fence is here durably."""
        m = self._peers.map()
        for p in partitions:
            change = m.last_change(CHUNK, p)
            if number in m.old_homes(CHUNK, p) and self.fence_counts(fenced, change):
                known = self._sources.get(p)
                if known is None or known[0] != change:
                    self._sources[p] = known = (change, set())
                known[1].add(number)

    def fence_counts(self, fenced: int, change: int) -> bool:
        """Whether a listing made behind the fence misses no write from before the change."""
        return fenced >= change

    # ------------------------------------------------------------------------------------- rounds

    async def run_once(self) -> int:
        """Pull what we lack; returns the chunks pulled."""
        before = self.pulled
        problems: list[str] = []
        numbers = self._peers.numbers()
        # Everybody begins elsewhere: new homes must not all pull from the same server.
        start = sum(n < self._peers.number for n in numbers)
        for number in numbers[start:] + numbers[:start]:
            try:
                await self._pull_from(number)
            except DiskFull as e:
                problems.append(str(e))
                break
            except DfsError as e:
                problems.append(f"node {number}: {e}")
        if problems or self.last_error:
            self.last_error = "; ".join(problems[:3])
        self._forget()
        self.progress = f"{self.pulled} chunks pulled in all"
        if left := self.incomplete():
            self.progress += f"; {left} partitions that move here are not complete"
            self._interval = 15.0
        else:
            self._interval = 180.0
        return self.pulled - before

    def _forget(self) -> None:
        """Drop what is known about transitions that are over."""
        m = self._peers.map()
        moving = set(m.changed(CHUNK))
        for p in [p for p in self._sources if p not in moving]:
            del self._sources[p]

    async def _pull_from(self, number: int) -> None:
        peers, store = self._peers, self._store
        m = peers.map()
        wanted = [p for p in self._incoming(m) if number in m.old_homes(CHUNK, p)]
        wanted = [p for p in wanted if not self._is_complete(m, p)]
        fenced = 0
        if wanted:
            (fenced, doubtful), _ = await peers.call(number, "chunk.fence", (m.epoch,))
            wanted = [p for p in wanted if p not in doubtful]
        _, data = await peers.call(number, "chunk.summary")
        ours, theirs = store.index.summary(), bytes(data)
        differing = different_partitions(ours, theirs)
        mine = [p for p in differing if peers.is_home(p)]
        lacking = {p: _count(theirs, p) - _count(ours, p) for p in mine}
        self.waiting = sum(n for n in lacking.values() if n > 0)
        typical = store.index.stored_bytes // len(store.index) if len(store.index) else TYPICAL
        done = set(wanted).difference(differing)
        for i, partition in enumerate(mine):
            self.progress = f"node {number}: partition {i + 1} of {len(mine)}"
            self.fraction = i / len(mine)
            whole = True
            for chunk_id, stamp in await self._list(number, partition):
                if not store.held(chunk_id) and not store.condemned(chunk_id, stamp):
                    size = await self._pull(number, chunk_id)
                    whole = whole and size > 0
                    await self.rest(size=size, queue=self.waiting, backlog=self.waiting * typical)
            self.waiting -= max(0, lacking[partition])
            if whole:
                done.add(partition)
        await store.sync()
        self._has_all_of(number, fenced, done.intersection(wanted))

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

    async def _pull(self, number: int, chunk_id: bytes) -> int:
        """Get one chunk; its bytes (at least 1), 0 if no good copy can be had now."""
        peers, store = self._peers, self._store
        try:
            try:
                copy = await peers.fetch(chunk_id, [number])
            except (NotFound, NoQuorum):  # bad, or set aside since it was listed: ask everybody
                copy = await peers.fetch(chunk_id)
        except NotFound:
            return 1  # deleted since it was listed
        except NoQuorum as e:
            self.last_error = str(e)
            return 0
        if not store.condemned(chunk_id, copy.stamp):
            size = len(copy.data)
            if await store.put(chunk_id, [copy.data], size, copy.plain, copy.stamp, moved=True):
                self.pulled += 1
                self.did(1, size)
        return max(1, len(copy.data))


def _count(summary: bytes, partition: int) -> int:
    """How many chunks of a partition a summary tells of."""
    if len(summary) != SUMMARY.size * PARTITIONS:
        return 0
    return int(SUMMARY.unpack_from(summary, partition * SUMMARY.size)[0])
