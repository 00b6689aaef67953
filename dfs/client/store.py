"""What files need of the chunk client, as a protocol, so that tests can give a fake."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import trio

from dfs.codec import Buffer
from dfs.env import Buffers
from dfs.errors import InvalidArgument


class Prepared:
    """A chunk that is hashed and encoded but perhaps not sent; immutable.

    Attributes: `chunk_id`; `length` in plain bytes; `buffers`, what goes over the wire, header
    first; `pieces`, the plain bytes.  Buffers and pieces share memory where nothing was compressed.
    """

    __slots__ = ("__weakref__", "buffers", "chunk_id", "length", "pieces", "starts")

    def __init__(
        self, chunk_id: bytes, buffers: Sequence[Buffer], pieces: Sequence[Buffer]
    ) -> None:
        """Take what `dfs.chunks.format.encode` returned, and the pieces it was given."""
        self.chunk_id = chunk_id
        self.buffers = buffers
        self.pieces = [memoryview(p).cast("B") for p in pieces if len(p)]
        self.starts = [0, *accumulate(map(len, self.pieces))]
        self.length = self.starts.pop()

    def read(self, offset: int, length: int) -> Buffer:
        """Plain bytes of a range; a view unless pieces have to be joined.

        Raises `InvalidArgument` when the range leaves the chunk.
        """
        if not 0 <= offset <= offset + length <= self.length:
            raise InvalidArgument(f"bytes {offset}+{length} of a chunk of {self.length} bytes")
        if not length:
            return b""
        i = bisect_right(self.starts, offset) - 1
        found: list[memoryview] = []
        while length:
            begin = offset - self.starts[i]
            found.append(self.pieces[i][begin : begin + length])
            offset += len(found[-1])
            length -= len(found[-1])
            i += 1
        return found[0] if len(found) == 1 else b"".join(found)


class ChunkStore(Protocol):
    """Chunks by id; see `dfs.client.chunkio.ChunkClient`."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...  # noqa: D102

    async def prepare(self, data: Buffers) -> Prepared:
        """Hash and encode a chunk: its id is known before anything of it is sent.

        Extents may name it at once where nobody else sees them: until the put has ended, and as
        long as somebody holds the result, this client's `read` answers from the result's memory.
        """
        ...

    async def put_prepared(self, prepared: Prepared, *, durable: bool = False) -> None:
        """Send a prepared chunk; returns once W servers have it.  May be called again if it failed.

        It is kept for a day from then on, or until a commit names it: the caller notes when it
        called (`Clock.elapsed_ns`), and tells that to the commit (`oldest`).
        """
        ...

    async def sync(self) -> None:
        """Make all chunks put so far durable on W servers."""
        ...

    async def read(self, chunk_id: bytes, offset: int, length: int) -> Buffer:
        """Verified bytes of a chunk."""
        ...

    def read_nowait(self, chunk_id: bytes, offset: int, length: int) -> Buffer | None:
        """Verified bytes that can be had without waiting, else None."""
        ...
