"""Where readers of the same host get at the segments themselves: `chunk.door`, `chunk.locate`.

A reader asks once for the door (`dfs.rpc.descriptors`) and for each chunk where it lies; it reads
and verifies the rest itself.  Nothing is promised about a place: a chunk may be deleted or dropped
right after the answer, and then a hole is there.  The reader notices, since what it reads does not
match the chunk's digests, and asks again.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from chunkserver.recovery import segment_name
from chunkserver.segments import Segments
from dfs.disk import RealDisk, translate
from dfs.env import Context, Env, Handler, Reply
from dfs.rpc.descriptors import DescriptorServer, machine

LOCATE_LIMIT = 1000


class Door:
    """Both methods, and the socket; on a disk that is no real one there is no socket."""

    def __init__(self, env: Env, store: Segments, boot: Callable[[], int]) -> None:
        """Give away what is in `store`."""
        self._disk = env.disk
        self._store = store
        self._boot = boot
        self.server: DescriptorServer | None = None
        if isinstance(env.disk, RealDisk):
            self.server = DescriptorServer(self._open, env.random)
            store.on_unlink = self.server.revoke

    def handlers(self) -> dict[str, Handler]:
        """The methods, see `dfs.wire.messages`."""
        return {"chunk.door": self._door, "chunk.locate": self._locate}

    async def run(self) -> None:
        """Serve the socket until cancelled."""
        if self.server is not None:
            await self.server.run()

    def _open(self, number: int) -> list[int]:
        path = self._disk.path(segment_name(number))
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            fds = [os.open(path, flags)]
        except OSError as e:
            raise translate(e, f"open {path}") from e
        with contextlib.suppress(OSError):  # the file system may not have it
            fds.append(os.open(path, flags | os.O_DIRECT))
        return fds

    def _door(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        server = self.server
        if server is None:
            return (self._boot(), b"", "", b""), b""
        return (self._boot(), machine(), server.name, server.token), b""

    def _locate(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        (ids,) = args
        get = self._store.index.get
        found = [get(chunk_id) for chunk_id in ids[:LOCATE_LIMIT]]
        places = tuple((e.segment, e.offset, e.stored, e.plain) if e else None for e in found)
        return (self._boot(), places), b""
