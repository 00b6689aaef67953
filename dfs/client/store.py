"""What files need of the chunk client, as a protocol, so that tests can give a fake."""

from typing import Protocol

import trio

from dfs.codec import Buffer
from dfs.env import Buffers


class ChunkStore(Protocol):
    """Chunks by id; see `dfs.client.chunkio.ChunkClient`."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...  # noqa: D102

    async def put(self, data: Buffers, *, durable: bool = False) -> bytes:
        """Send a chunk to its servers; returns its id once W have it."""
        ...

    async def sync(self) -> int:
        """Make all chunks put so far durable on W servers; returns the oldest stamp."""
        ...

    async def read(self, chunk_id: bytes, offset: int, length: int) -> Buffer:
        """Verified bytes of a chunk."""
        ...
