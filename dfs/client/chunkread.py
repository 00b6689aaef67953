"""Reading chunks: the best replica first, every block verified, another replica when one fails.

Chunks on a disk of our own host are read from it directly, see `dfs.client.shortcut`; what follows
is for the others.

Order: the chunkserver of our own host, then the homes by how fast they answered lately (with some
chance, so that load spreads and a slow one is tried again), then every other node of the preference
list.  A server that is silent for long is not given up: the next one is asked as well and the first
good answer wins.  A bad answer is reported to the server that gave it, which checks its copy.

While homes move, the preference list has the new homes first and then the old ones, so one of the W
copies is among the first 2N.  A server whose map is newer and that lacks the chunk says so with its
map: then everybody in it is asked, those that were absent before included.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Any

import trio

from dfs.chunks import format as chunks
from dfs.client.shortcut import Shortcut
from dfs.clock import Clock
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Buffer, Priority, Rpc
from dfs.errors import (
    Corrupt,
    DeadlineExceeded,
    DfsError,
    InvalidArgument,
    NoQuorum,
    NotFound,
    StaleEpoch,
)
from dfs.hashing import partition_of
from dfs.rpc.mapkeeper import MapKeeper

TIMEOUT = 30.0
HEDGE_LOW, HEDGE_HIGH = 0.1, 2.0  # seconds of silence before another server is asked as well
AVOID = 5.0  # seconds for which a server that failed is asked last
START = 0.001  # assumed latency of a server never asked


class ChunkReader:
    """Reads ranges of chunks; keeps nothing but each server's latency."""

    def __init__(
        self,
        rpc: Rpc,
        get_map: Callable[[], ClusterMap],
        clock: Clock,
        *,
        random: Random,
        host: str,
        offload: Callable[..., Awaitable[Any]],
        inline: int,
        machine: bytes = b"",
    ) -> None:
        """See `ChunkClient`."""
        self.shortcut = Shortcut(rpc, get_map, clock, machine)
        self._rpc = rpc
        self._get_map = get_map
        self._clock = clock
        self._random = random
        self._host = host
        self._offload = offload
        self._inline = inline
        self._latency: dict[int, float] = {}
        self._avoid: dict[int, float] = {}  # node -> until
        self._reads = self._bytes = self._hedges = self._corrupt = 0

    def order(self, chunk_id: bytes) -> list[int]:
        """Every server that may have the chunk, the one to ask first in front."""
        cluster = self._get_map()
        preference = cluster.preference(CHUNK, partition_of(chunk_id))
        now = self._clock.monotonic()
        random = self._random.random

        def cost(item: tuple[int, int]) -> tuple[bool, bool, bool, float]:
            place, node = item
            return (
                self._avoid.get(node, 0.0) > now,
                place >= cluster.n,
                not self._host or cluster.node(node).host != self._host,
                place if place >= cluster.n else self._latency.get(node, START) * (1 + random()),
            )

        return [node for _, node in sorted(enumerate(preference), key=cost)]

    async def read(self, chunk_id: bytes, offset: int, length: int) -> Buffer:
        """Verified plain bytes `[offset, offset + length)` of a chunk.

        Raises `NotFound` when every server answered that it has none, `Corrupt` when the only
        copies are bad, `NoQuorum` when some did not answer, `InvalidArgument` for a range outside.
        """
        if length <= 0 or offset < 0:
            if length == 0 and offset >= 0:
                return b""
            raise InvalidArgument(f"negative range {offset}+{length}")
        # The first block is here by the network as soon as its place would be known.
        if offset + length > chunks.BLOCK or chunk_id in self.shortcut:
            data = await self.shortcut.read(chunk_id, offset, length, partial(self.order, chunk_id))
            if data is not None:
                return data
        first = offset // chunks.BLOCK
        count = chunks.block_count(offset + length) - first
        candidates = deque(self.order(chunk_id))
        answers: deque[tuple[int, tuple[Any, Buffer] | DfsError]] = deque()
        failures: dict[int, DfsError] = {}
        changed = trio.Event()
        waiting: set[int] = set()
        deadline = self._clock.monotonic() + TIMEOUT
        pause = HEDGE_LOW

        def answered(node: int, sent: float, answer: tuple[Any, Buffer] | DfsError) -> None:
            waiting.discard(node)
            self._learn(node, sent, answer)
            answers.append((node, answer))
            changed.set()

        def ask() -> None:
            nonlocal pause
            node = candidates.popleft()
            waiting.add(node)
            now = self._clock.monotonic()
            pause = min(HEDGE_HIGH, max(HEDGE_LOW, 4 * self._latency.get(node, START)))
            cluster = self._get_map()
            self._rpc.request(
                cluster.address(CHUNK, node),
                "chunk.get",
                (chunk_id, first, count),
                timeout=max(0.1, deadline - now),
                on_reply=partial(answered, node, now),
                priority=Priority.BULK,
                epoch=cluster.epoch,
            )

        epoch = self._get_map().epoch
        ask()
        while True:
            while answers:
                node, answer = answers.popleft()
                try:
                    if isinstance(answer, DfsError):
                        raise answer
                    plain = await self._verified(answer[1], chunk_id, offset, length)
                except InvalidArgument:
                    raise
                except DfsError as e:
                    failures[node] = e
                    if isinstance(e, Corrupt):
                        self._bad(node, chunk_id)
                    learn_map(self._get_map, e)
                    if not candidates and self._get_map().epoch > epoch:
                        epoch = self._get_map().epoch
                        candidates += (n for n in self.order(chunk_id) if n not in waiting)
                    if candidates:
                        ask()
                else:
                    self._reads += 1
                    self._bytes += length
                    return plain  # type: ignore[no-any-return]  # what the verifier gives
            if not waiting:
                raise _failure(chunk_id, failures)
            left = deadline - self._clock.monotonic()
            if left <= 0:
                for node in waiting:
                    failures[node] = DeadlineExceeded("no answer")
                raise _failure(chunk_id, failures)
            with trio.move_on_after(min(left, pause)):
                await changed.wait()
            changed = trio.Event()
            if not answers and candidates:
                self._hedges += 1
                ask()

    async def _verified(self, answer: Buffer, chunk_id: bytes, offset: int, length: int) -> Any:
        """The wanted range of an answer, proven against the id; raises `Corrupt`."""
        if length <= self._inline:
            return chunks.decode_range(answer, chunk_id, offset, length)
        return await self._offload(chunks.decode_range, answer, chunk_id, offset, length)

    def _bad(self, node: int, chunk_id: bytes) -> None:
        self._corrupt += 1
        address = self._get_map().address(CHUNK, node)
        self._rpc.cast(address, "chunk.report", (chunk_id,), priority=Priority.NORMAL)

    def _learn(self, node: int, sent: float, answer: tuple[Any, Buffer] | DfsError) -> None:
        now = self._clock.monotonic()
        if isinstance(answer, DfsError) and not isinstance(answer, NotFound | StaleEpoch):
            self._avoid[node] = now + AVOID
            return
        old = self._latency.get(node)
        took = now - sent
        self._latency[node] = took if old is None else old * 0.9 + took * 0.1

    def statistics(self) -> dict[str, int]:
        """Counts for status pages and tests."""
        return {
            "reads": self._reads,
            "read_bytes": self._bytes,
            "hedges": self._hedges,
            "corrupt": self._corrupt,
            **self.shortcut.statistics(),
        }


def learn_map(get_map: Callable[[], ClusterMap], error: DfsError) -> bool:
    """Take the map that came with a `StaleEpoch`, where maps are kept; whether it was newer."""
    return isinstance(get_map, MapKeeper) and get_map.learn(error)


def _failure(chunk_id: bytes, failures: dict[int, DfsError]) -> DfsError:
    said = "; ".join(f"node {n}: {e}" for n, e in failures.items())
    text = f"chunk {chunk_id.hex()[:16]} cannot be read: {said}"
    if failures and all(isinstance(e, NotFound) for e in failures.values()):
        return NotFound(text)
    if any(isinstance(e, Corrupt) for e in failures.values()):
        return Corrupt(text)
    return NoQuorum(text)
