"""Clients for commands: a cluster connection, or one volume's file system, for a block.

Whoever enters one of these blocks gets an answer within `patience()`: a cluster that cannot be
reached, or a volume without a quorum, is an error that says which nodes are silent and why.
"""

import contextlib
import errno
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

from dfs.cli.context import interruptible, patience
from dfs.cli.diagnosis import explain_silence, unreachable
from dfs.cli.place import Place
from dfs.client.attributes import Attr, fs_error
from dfs.client.capacity import ClusterWatch
from dfs.client.chunkio import ChunkClient
from dfs.client.connect import Cluster, ClusterRef, connect
from dfs.client.filesystem import FileSystem, open_filesystem
from dfs.client.paths import resolve
from dfs.client.quota import read_limits, read_usage
from dfs.client.registry import Registry, open_registry
from dfs.client.session import Session, open_session
from dfs.client.store import Prepared
from dfs.errors import DfsError, FsError, Unreachable, WrongCluster
from dfs.ids import SYSTEM_VOLUME

T = TypeVar("T")
USAGE_TIMEOUT = 4.0  # seconds to wait for the sizes of volumes
USAGE_PARALLEL = 16
LOOK_PATIENCE = 0.5  # seconds to wait for servers to say how full their disks are
TOUCH_PATIENCE = 2.0  # seconds to wait for servers to say that they have a chunk already
_REASON = re.compile(f": {re.escape(os.strerror(errno.ENOSPC))}$")
_REPR = re.compile(
    r"""b(?P<q>['"]).*?(?P=q)(?:\.\.\.)?: (?=[^:]+$)"""
)  # a name as the client library puts it


class DedupChunks(ChunkClient):
    """A chunk client that asks first and sends only chunks that W servers do not have.

    The question costs a round trip and 50 bytes per chunk; for a copy of data that the cluster has
    seen, that is all that goes over the network.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """As `ChunkClient`."""
        super().__init__(*args, **options)
        self.known_bytes = 0  # plain bytes that did not have to be sent

    async def put_prepared(self, prepared: Prepared, *, durable: bool = False) -> None:
        """See `ChunkClient.put_prepared`."""
        held = False
        with trio.move_on_after(TOUCH_PATIENCE):
            (held,) = await self.touch([prepared.chunk_id])
        if held:
            self._prepared.pop(prepared.chunk_id, None)
            self.known_bytes += prepared.length
        else:
            await super().put_prepared(prepared, durable=durable)


@contextlib.asynccontextmanager
async def connected(file: Path) -> AsyncIterator[Cluster]:
    """The cluster of a cluster file."""
    ref = ClusterRef.load(file)
    inside = False
    try:
        async with connect(ref, name="dfs") as cluster:
            inside = True
            yield cluster
    except (Unreachable, WrongCluster) as e:
        if inside:
            raise
        raise await unreachable(file, ref, e) from e


@contextlib.asynccontextmanager
async def registry(cluster: Cluster, *, mode: str = "rw") -> AsyncIterator[Registry]:
    """The registry of volumes, opened within `patience()`."""
    opening = open_registry(cluster, mode=mode, deadline=patience())
    async with _opened(cluster, "the registry of volumes", SYSTEM_VOLUME, opening) as opened:
        with interruptible():
            yield opened


@contextlib.asynccontextmanager
async def volume(
    file: Path, name: str, *, mode: str = "rw", adds: bool = False
) -> AsyncIterator[tuple[FileSystem, DedupChunks]]:
    """The file system of a volume, mode "rw" or "ro", and the chunk client it uses.

    Dirty data is committed at the end of the block.  `adds`: the block adds to the volume, which a
    cluster that is full refuses.
    """
    async with connected(file) as cluster:
        async with registry(cluster, mode="ro") as volumes:
            info = await volumes.find(name)

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

        opening = open_filesystem(
            cluster, info.volume_id, chunks, mode=mode, name="dfs", deadline=patience()
        )
        async with _opened(cluster, f"volume {name}", info.volume_id, opening) as fs:
            watching = _watched(fs, cluster) if adds else contextlib.nullcontext()
            with interruptible():
                async with watching:
                    yield fs, made[0]


@contextlib.asynccontextmanager
async def _watched(fs: FileSystem, cluster: Cluster) -> AsyncIterator[None]:
    """Refuse, as a mount does, what a cluster without room could not keep; see `ClusterWatch`.

    Servers that do not say at once how full they are are not waited for, only listened to.
    """
    watch = ClusterWatch(cluster)
    watch.tell(fs.session.volume, fs.refuse)
    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        with trio.move_on_after(LOOK_PATIENCE):
            await watch.wait_looked()
        try:
            yield
        except Exception as e:  # as it is, not wrapped in a group
            error = e
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


class Usage(NamedTuple):
    """What a volume holds and may hold; a quota of 0 is no limit."""

    bytes: int
    inodes: int
    quota_bytes: int
    quota_inodes: int


async def usages(
    cluster: Cluster, volumes: list[bytes], *, timeout: float = USAGE_TIMEOUT
) -> dict[bytes, Usage]:
    """What volumes hold, of those that answer in time."""
    found: dict[bytes, Usage] = {}
    limit = trio.CapacityLimiter(USAGE_PARALLEL)

    async def ask(volume_id: bytes) -> None:
        async with limit:
            with contextlib.suppress(DfsError):  # without a quorum: not known now
                async with open_session(
                    cluster, volume_id, mode="ro", name="dfs usage", deadline=timeout
                ) as session:
                    used, limits = await read_usage(session), await read_limits(session)
                    found[volume_id] = Usage(*used, *limits)

    with trio.move_on_after(timeout):
        async with trio.open_nursery() as nursery:
            for volume_id in volumes:
                nursery.start_soon(ask, volume_id)
    return found


@contextlib.asynccontextmanager
async def _opened(
    cluster: Cluster,
    what: str,
    volume_id: bytes,
    opening: contextlib.AbstractAsyncContextManager[T],
) -> AsyncIterator[T]:
    """Enter `opening` within `patience()`; name the volume and silent nodes in its errors."""
    limit = trio.CancelScope(deadline=trio.current_time() + patience())
    entered = False
    try:
        with limit:
            async with opening as opened:
                limit.deadline = float("inf")
                entered = True
                yield opened
    except DfsError as e:
        if not entered and e.errno == errno.ENOSPC:
            raise FsError(f"{what}: {e}", e.errno) from e
        if volume_id.hex() not in str(e) or "quorum" not in str(e):
            raise
        raise await explain_silence(cluster, what, volume_id, patience()) from e
    if not entered:
        raise await explain_silence(cluster, what, volume_id, patience())


async def found(fs: FileSystem, place: Place, *, follow: bool = True) -> Attr:
    """What is at a place; raises ENOTDIR if its path ends in a slash and it is no directory."""
    attr = await resolve(fs, place.path, follow=follow or place.directory)
    if place.directory and not attr.is_dir:
        raise fs_error(errno.ENOTDIR)
    return attr


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Put the name of what is worked on in front of errors of the file system."""
    try:
        yield
    except FsError as e:
        text = _REPR.sub("", str(e))
        if e.errno == errno.ENOSPC and "`dfs cluster status`" in text:  # it says whose disks
            text = f"no space left: {_REASON.sub('', text).removeprefix('no space left: ')}"
        elif e.errno == errno.ENOSPC:
            text = (
                "no space left: too few chunkservers have room for a copy; delete data or add "
                "capacity, `dfs cluster status` shows the disks"
            )
        if str(what) in text:
            raise
        raise FsError(f"{what}: {text}", e.errno) from e
