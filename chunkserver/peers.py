"""The other chunkservers, as the workers of one see them."""

from collections.abc import Callable, Iterable
from typing import Any

from dfs.chunks import format as chunks
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Buffer, Buffers, Env, Priority
from dfs.errors import Corrupt, DfsError, NoQuorum, NotFound
from dfs.hashing import PARTITIONS, partition_of

TIMEOUT = 10.0


class Copy:
    """A verified encoded chunk from another server."""

    __slots__ = ("data", "plain", "source", "stamp")

    def __init__(self, data: Buffer, plain: int, stamp: int, source: int) -> None:
        """Keep what `Peers.fetch` got."""
        self.data = data
        self.plain = plain
        self.stamp = stamp
        self.source = source


class Peers:
    """Calls to the other chunkservers of the map, in the background class of traffic."""

    def __init__(self, env: Env, number: int, get_map: Callable[[], ClusterMap]) -> None:
        """`number` is our own."""
        self._env = env
        self.number = number
        self._get_map = get_map
        self._flags = (0, b"")  # epoch, flags

    def map(self) -> ClusterMap:
        """The newest map known here."""
        return self._get_map()

    def mine(self) -> bytes:
        """A flag per partition: 1 if we are a home of it."""
        m = self._get_map()
        if self._flags[0] != m.epoch:
            flags = bytes(self.number in m.homes(CHUNK, p) for p in range(PARTITIONS))
            self._flags = (m.epoch, flags)
        return self._flags[1]

    def homes(self, partition: int) -> tuple[int, ...]:
        """The homes of a partition, perhaps with ourselves among them."""
        return tuple(self._get_map().homes(CHUNK, partition))

    def is_home(self, partition: int) -> bool:
        """Whether we are a home of the partition."""
        return self.number in self.homes(partition)

    def others(self, partition: int) -> list[int]:
        """Where a chunk may be: the other homes, then the fallbacks in their order."""
        return [n for n in self._get_map().preference(CHUNK, partition) if n != self.number]

    def numbers(self) -> list[int]:
        """All other chunkservers."""
        return [n.number for n in self._get_map().nodes if n.chunk_addr and n.number != self.number]

    async def call(
        self, number: int, method: str, args: tuple[Any, ...] = (), data: Buffers = b""
    ) -> tuple[Any, Buffer]:
        """Call a peer; raises what `Rpc.call` raises."""
        return await self._env.rpc.call(
            self._get_map().address(CHUNK, number),
            method,
            args,
            data,
            timeout=TIMEOUT,
            priority=Priority.BACKGROUND,
        )

    async def fetch(self, chunk_id: bytes, sources: Iterable[int] | None = None) -> Copy:
        """A verified copy from the first of `sources` (default: everybody) that has a good one.

        A bad copy is reported to its holder.  Raises `NotFound` when everybody answered that it has
        none, else `NoQuorum` with what each said.
        """
        said: list[str] = []
        absent = True
        for number in self.others(partition_of(chunk_id)) if sources is None else sources:
            try:
                (_, stamp), data = await self.call(number, "chunk.get", (chunk_id, 0, -1))
                header = await self._env.disk.run(chunks.verify, data, chunk_id)
            except NotFound:
                said.append(f"node {number}: absent")
            except Corrupt as e:
                absent = False
                said.append(f"node {number}: {e}")
                address = self._get_map().address(CHUNK, number)
                self._env.rpc.cast(address, "chunk.report", (chunk_id,), priority=Priority.NORMAL)
            except DfsError as e:
                absent = False
                said.append(f"node {number}: {e}")
            else:
                return Copy(data, header.length, stamp, number)
        text = f"no good copy of chunk {chunk_id.hex()[:16]}: {'; '.join(said) or 'no other node'}"
        raise NotFound(text) if absent else NoQuorum(text)
