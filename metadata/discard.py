"""Former homes let go of what they hold: the `discard` worker.

Once a transition is complete nothing of a partition is needed at a node that is no home of it any
more.  Its registers are discarded, never pushed: whatever was acknowledged is in quorums of the
present homes, and what only a former home has may have been purged by the others since.  Blobs
never change, so a former home may be the one that has a copy which repair would want: they go only
when every present home says that it holds them, durably, and one that lacks some is given them.

Interplay:

- The removal of a register carries the epoch it was judged by, and the replica refuses it if the
  homes of the partition changed since.  Removing blobs looks at the map in turn with their writes.
- A partition that is regained: rows that are still here go before it takes a new one
  (`metadata.regained`), or, if this node slept meanwhile, are judged (`metadata.rejoin`); rows that
  are gone cannot be too old.  `metadata.actors` mints under another name from then on, so that
  a forgotten dot of ours is nobody's dot of today.  The digests lose what is discarded in the same
  batch, and nobody is told of rows that are gone.
- A partition that waits is not waited for any more once it is empty.
- Journals of former members: `metadata.journalmoves`.
"""

from collections.abc import Iterator, Sequence

from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Env, Priority
from dfs.errors import Corrupt, DfsError
from dfs.hashing import PARTITIONS, digest
from dfs.pace import Bandwidth
from dfs.workers import Worker
from metadata.antientropy import members
from metadata.merkle import BLOBS, REGISTERS, TABLES, rows_of
from metadata.steps import Purge, Rest, Steps, Write
from metadata.synchronise import Synchroniser

INTERVAL = 600.0
FIRST = 60.0  # seconds after the start
ROWS = 256  # looked at in one step
ASK_TIMEOUT = 10.0  # seconds; a home reads what it says it has
PUSH_BYTES = 4 << 20  # of blobs in one request
RATE = 32 << 20  # bytes a second, of rows looked at


class Discard(Worker):
    """Removes the rows of partitions that this node is no home of; see the module's docstring."""

    name = "discard"

    def __init__(
        self, env: Env, sync: Synchroniser, *, interval: float = INTERVAL, first: float = FIRST
    ) -> None:
        """Over the rows that `sync` keeps equal."""
        super().__init__(env, interval, first=first)
        self.sync = sync
        self.bandwidth = Bandwidth(RATE)
        self.registers = 0  # removed since the start
        self.blobs = 0
        self.pushed = 0  # blobs that a home lacked

    def map_changed(self, _old: ClusterMap, new: ClusterMap) -> None:
        """A transition may have ended: look soon; for `MapKeeper.subscribe`."""
        if self.rule_complete(new):
            self.wake()

    def rule_complete(self, cluster: ClusterMap) -> bool:
        """Nothing is discarded while homes are moving: old ones are read, and pushed from."""
        return cluster.phase(METADATA) == 0

    def rule_everywhere(self, held: Sequence[bool]) -> bool:
        """A blob goes when all present homes hold it."""
        return all(held)

    def foreign_now(self, cluster: ClusterMap, partition: int) -> bool:
        """Whether this node is no home of a partition, neither of the old set nor of the new."""
        return self.sync.me not in members(cluster, partition)

    def foreign(self, cluster: ClusterMap) -> Iterator[tuple[int, int]]:
        """(table, partition) of what is held here and does not belong here."""
        digests = self.sync.digests
        for table in TABLES:
            for partition in range(PARTITIONS):
                if digests.total(table, partition) and self.foreign_now(cluster, partition):
                    yield table, partition

    async def run_once(self) -> int:
        """Discard what may go now; returns how many rows went."""
        sync = self.sync
        cluster = sync.get_map()
        if not self.rule_complete(cluster):
            self.progress = "homes are moving; nothing is discarded until they have moved"
            return 0
        if not all(sync.digests.built(table) for table in TABLES):
            self.progress = "waits for the digests of this node"
            return 0
        todo = list(self.foreign(cluster))
        problems: list[str] = []
        removed = 0
        for i, (table, partition) in enumerate(todo):
            self.fraction = i / len(todo)
            if sync.get_map().epoch != cluster.epoch:
                break  # the next round, which a complete map begins at once, judges by the new one
            try:
                if table == REGISTERS:
                    removed += await self._registers(cluster, partition)
                else:
                    removed += await self._blobs(cluster, partition)
            except Corrupt as e:  # storage-repair's first
                problems.append(f"partition {partition}: {e}")
            except DfsError as e:
                problems.append(f"partition {partition} keeps its rows for now: {e}")
        self.fraction = None
        left = sum(1 for _ in self.foreign(sync.get_map())) if todo else 0
        self.progress = (
            f"{self.registers} registers and {self.blobs} blobs discarded, {self.pushed} blobs "
            f"given away, {left} partitions to go"
        )
        if problems:
            self.last_error = "; ".join(problems[:3])
        return removed

    # ---------------------------------------------------------------------------------- registers

    async def _registers(self, cluster: ClusterMap, partition: int) -> int:
        removed = await self.sync.run(self._purge(cluster, partition), self._rest)
        self.registers += removed
        return removed

    def _purge(self, cluster: ClusterMap, partition: int) -> Steps[int]:
        sync = self.sync
        removed = 0
        after, more = b"", True
        while more and sync.get_map().epoch == cluster.epoch:
            rows, more = rows_of(sync.store, REGISTERS, partition, after, ROWS)
            if rows:
                after = rows[-1][0]
                gone = yield Purge([(row, digest(v)) for row, v in rows], ghosts=True)
                removed += sum(gone)
                yield Rest(sum(len(v) for _, v in rows))
        if sync.pull_first.waiting(partition) and not sync.digests.total(REGISTERS, partition):
            yield Write(sync.pull_first.finish([partition]))
        return removed

    async def _rest(self, size: int, backlog: int) -> None:
        self.did(0, size)
        await self.rest(size=size, backlog=backlog)

    # -------------------------------------------------------------------------------------- blobs

    async def _blobs(self, cluster: ClusterMap, partition: int) -> int:
        """Discard a partition's blobs; raises `DfsError` when a home does not answer."""
        sync = self.sync
        removed = 0
        after, more = b"", True
        while more:
            rows, more = rows_of(sync.store, BLOBS, partition, after, ROWS)
            if not rows:
                break
            after = rows[-1][0]
            names = [row[1:] for row, _ in rows]
            held = await self._ensure(cluster, partition, names)
            safe = [name for name, has in zip(names, held, strict=True) if has]
            done = await sync.blobs.discard(safe, lambda: sync.get_map().epoch == cluster.epoch)
            removed += done
            self.blobs += done
            await self._rest(sum(len(data) for _, data in rows), 0)
            if sync.get_map().epoch != cluster.epoch:
                break
        return removed

    async def _ensure(
        self, cluster: ClusterMap, partition: int, names: Sequence[bytes]
    ) -> list[bool]:
        """Which of these blobs all homes hold, after those that lack some were given them."""
        answers: list[Sequence[bool]] = []
        for home in cluster.homes(METADATA, partition):
            held = list(await self._ask(cluster, home, names))
            lacking = [i for i, has in enumerate(held) if not has]
            if lacking:
                await self._give(cluster, home, [names[i] for i in lacking])
                again = await self._ask(cluster, home, [names[i] for i in lacking])
                for i, has in zip(lacking, again, strict=True):
                    held[i] = has
            answers.append(held)
        return [self.rule_everywhere(each) for each in zip(*answers, strict=True)]

    async def _ask(self, cluster: ClusterMap, home: int, names: Sequence[bytes]) -> Sequence[bool]:
        (held,) = await self._call(cluster, home, "blob.has", (tuple(names),), ())
        return [bool(has) for has in held]

    async def _give(self, cluster: ClusterMap, home: int, names: Sequence[bytes]) -> None:
        group: list[tuple[bytes, bytes]] = []
        size = 0
        for name in names:
            data = self.sync.blobs.get(name)
            if data is None:
                continue  # our copy is bad; it stays until all homes have a good one
            if group and size + len(data) > PUSH_BYTES:
                await self._put(cluster, home, group)
                group, size = [], 0
            group.append((name, data))
            size += len(data)
        if group:
            await self._put(cluster, home, group)

    async def _put(
        self, cluster: ClusterMap, home: int, group: Sequence[tuple[bytes, bytes]]
    ) -> None:
        wanted = tuple((name, len(data)) for name, data in group)
        await self._call(cluster, home, "blob.put", (wanted,), [data for _, data in group])
        self.pushed += len(group)

    async def _call(
        self,
        cluster: ClusterMap,
        home: int,
        method: str,
        args: tuple[object, ...],
        data: Sequence[bytes],
    ) -> tuple[Sequence[bool]]:
        result, _ = await self._env.rpc.call(
            cluster.address(METADATA, home),
            method,
            args,
            data,
            timeout=ASK_TIMEOUT,
            priority=Priority.BACKGROUND,
            epoch=cluster.epoch,
        )
        found: tuple[Sequence[bool]] = result
        return found
