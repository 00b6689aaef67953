"""Clients for commands: a cluster connection, or one volume's file system, for a block."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import trio

from dfs.chunks.format import encode
from dfs.client.chunkio import ChunkClient
from dfs.client.connect import Cluster, ClusterRef, connect
from dfs.client.filesystem import FileSystem, open_filesystem
from dfs.client.registry import open_volume_by_name
from dfs.client.session import Session
from dfs.env import Buffers
from dfs.errors import FsError

TOUCH_PATIENCE = 2.0  # seconds to wait for servers to say that they have a chunk already


class DedupChunks(ChunkClient):
    """A chunk client that asks first and sends only chunks that W servers do not have.

    The question costs a round trip and 50 bytes per chunk; for a copy of data that the cluster has
    seen, that is all that goes over the network.
    """

    def __init__(self, *args: Any, salt: bytes, **options: Any) -> None:
        """As `ChunkClient`."""
        super().__init__(*args, salt=salt, **options)
        self._family = salt
        self.known_bytes = 0  # plain bytes that did not have to be sent

    async def put(self, data: Buffers, *, durable: bool = False) -> bytes:
        """See `ChunkClient.put`."""
        chunk_id, _ = encode(data, self._family, compress=False)
        held = False
        with trio.move_on_after(TOUCH_PATIENCE):
            (held,) = await self.touch([chunk_id])
        if held:
            pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
            self.known_bytes += sum(len(piece) for piece in pieces)
            return chunk_id
        return await super().put(data, durable=durable)


@contextlib.asynccontextmanager
async def connected(file: Path) -> AsyncIterator[Cluster]:
    """The cluster of a cluster file."""
    async with connect(ClusterRef.load(file), name="dfs") as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def volume(
    file: Path, name: str, *, mode: str = "rw"
) -> AsyncIterator[tuple[FileSystem, DedupChunks]]:
    """The file system of a volume, mode "rw" or "ro", and the chunk client it uses.

    Dirty data is committed at the end of the block.
    """
    async with connected(file) as cluster:
        info = await open_volume_by_name(cluster, name)

        made: list[DedupChunks] = []

        def chunks(session: Session) -> ChunkClient:
            client = DedupChunks(
                cluster.rpc,
                cluster.get_map,
                cluster.clock,
                salt=session.params["salt"],
                compress=session.params.get("compress", True),
                random=cluster.random,
            )
            made.append(client)
            return client

        async with open_filesystem(cluster, info.volume_id, chunks, mode=mode, name="dfs") as fs:
            yield fs, made[0]


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Put the name of what is worked on in front of errors of the file system."""
    try:
        yield
    except FsError as e:
        if str(what) in str(e):
            raise
        raise FsError(f"{what}: {e}", e.errno) from e
