"""Reading chunks from the disks of our own host, past the chunkserver; see `dfs.rpc.descriptors`.

For every server of this machine there is a `_Neighbour`: its door, and the segments it gave us.
For every chunk read lately there is a `_Place`: the segment, where the chunk lies in it, and its
header, proven against the id.  A read then is one `preadv` and the hashes of the blocks it covers.

What is read is believed only when it matches the digests of the proven header, exactly as an answer
that came over the network.  So nothing has to be revoked for safety: a chunk that was deleted reads
as a hole, a segment that was written again cannot exist, a flipped bit shows.  Whatever does not
match makes the reader ask the server again where the chunk is.  If it says the same place, its copy
is bad: that is reported (the server quarantines and repairs it) and the caller reads elsewhere.

Cold data: `read_nowait` takes what is in the kernel's cache, or short ranges from a quick medium;
`read` goes to a thread.  Long ranges are read past the cache (O_DIRECT): the reader's mount keeps
them, twice would be waste, and it takes half the processor time; they were most likely written past
it as well.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter  # on threads, where the loop's clock is none
from typing import Any

import trio

from dfs.buffers import PAGE, allocate, allocate_aligned
from dfs.chunks import format as chunks
from dfs.clock import Clock
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Buffer, Priority, Rpc
from dfs.errors import Corrupt, DfsError
from dfs.rpc.descriptors import Descriptor, DescriptorClient
from dfs.threads import ThreadPool

PLACES = 2048  # chunks whose places are remembered, 7 KiB each for those of 4 MiB
LOCATE_TIMEOUT = 1.0
DOOR_TIMEOUT = 5.0
AGAIN = 60.0  # seconds before a server that gives nothing is asked for its door again
SOON = 2.0  # the same for one that ended or was silent
LONG = 256 << 10  # bytes of a range that is read past the kernel's cache
THREADS = 3
SHORT = 64 << 10  # bytes of a range that may be read in the loop
READS = 16  # the last short ones, whose median tells whether the medium is quick
QUICK_READ = 0.0004  # seconds, with the hash
STALL = 0.01  # seconds of a single short read after which the medium has to prove itself again


class _Neighbour:
    """A chunkserver of this machine, or one of which that is not known."""

    __slots__ = ("asking", "boot", "door", "until")

    def __init__(self) -> None:
        self.asking = False
        self.until = 0.0  # not to be asked before
        self.boot = 0
        self.door: DescriptorClient | None = None

    def open(self) -> DescriptorClient | None:
        """The door, if it is open."""
        door = self.door
        return None if door is None or door.closed else door


class _Place:
    """A chunk in a segment that we have open."""

    __slots__ = ("base", "file", "header", "node", "spot")

    def __init__(self, node: int, spot: tuple[int, ...], file: Descriptor) -> None:
        self.node = node
        self.spot = spot  # boot, segment, offset, stored and plain length
        self.file = file
        self.base = 0  # where the first block is, once `_prove` read the header; 0 before
        self.header: chunks.Header


class _Quick:
    """Whether the medium answers short reads sooner than a thread would be asked and answer.

    As `dfs.disk.RealDisk.sync` does for syncs: handing a read to a thread and its end back costs
    100 us of processor time and two wake-ups, on a busy machine more.  While most of the last short
    reads were quicker than that, they are done in the loop.  One that stalls moves them to threads
    until most are quick again.
    """

    __slots__ = ("_quick", "_times")

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=READS)
        self._quick = False

    def inline(self, length: int) -> bool:
        """Whether a read of this length may be done in the loop."""
        return self._quick and length <= SHORT

    def timed(self, pull: Callable[..., Buffer | None], *args: Any) -> Buffer | None:
        """Do a short read and learn from the time it takes."""
        start = perf_counter()
        data = pull(*args)
        took = perf_counter() - start
        times = self._times
        if took > STALL:
            times.clear()
        times.append(took)
        self._quick = len(times) == READS and sorted(times)[READS // 2] < QUICK_READ
        return data


class Shortcut:
    """Places of chunks on this machine; call from the loop, start `run` before use."""

    def __init__(
        self, rpc: Rpc, get_map: Callable[[], ClusterMap], clock: Clock, machine: bytes
    ) -> None:
        """`machine`: `dfs.rpc.descriptors.machine()`; with b"" every read goes over the network."""
        self._rpc = rpc
        self._get_map = get_map
        self._clock = clock
        self._machine = machine
        self._pool = ThreadPool(THREADS, name="shortcut")
        self._nursery: trio.Nursery | None = None
        self._neighbours: dict[int, _Neighbour] = {}
        self._places: dict[bytes, _Place] = {}  # most recently used last
        self._locating: dict[bytes, trio.Event] = {}
        self._quick = _Quick()
        self._reads = self._bytes = self._locates = self._misses = self._corrupt = 0

    async def run(self) -> None:
        """Home of the connections; closes every descriptor when it is cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._places.clear()
            self._pool.close()

    def __contains__(self, chunk_id: object) -> bool:
        """Whether the place of a chunk is known."""
        return chunk_id in self._places

    def statistics(self) -> dict[str, int]:
        """Counts for status pages and tests."""
        doors = [n.door for n in self._neighbours.values() if n.door and not n.door.closed]
        return {
            "local_servers": len(doors),
            "local_files": sum(map(len, doors)),
            "local_places": len(self._places),
            "local_reads": self._reads,
            "local_bytes": self._bytes,
            "local_locates": self._locates,
            "local_misses": self._misses,
            "local_corrupt": self._corrupt,
        }

    # ------------------------------------------------------------------------------------ reading

    def read_nowait(self, chunk_id: bytes, offset: int, length: int) -> Buffer | None:
        """Verified bytes if they are at hand and the chunk's place is known, else None.

        At hand is what the kernel has in its cache, and short ranges of a medium that is `quick`.
        """
        place = self._places.pop(chunk_id, None)
        if place is None or place.file.revoked:
            return None
        self._places[chunk_id] = place
        if not place.base:
            return None
        try:
            data = _pull(place, offset, length, os.RWF_NOWAIT)
        except BlockingIOError:
            data = None
        except (OSError, DfsError):  # `read` meets it again and sees to it
            return None
        if data is None:
            if not self._quick.inline(length):
                return None
            try:
                data = self._quick.timed(_pull, place, offset, length, 0)
            except (OSError, DfsError):
                return None
        self._reads += 1
        self._bytes += length
        return data

    async def read(
        self, chunk_id: bytes, offset: int, length: int, nodes: Callable[[], Iterable[int]]
    ) -> Buffer | None:
        """Verified bytes, None if they must come over the network.

        `nodes` gives the servers that may have the chunk, best first.  Raises `InvalidArgument`
        for a range outside the chunk, nothing else.
        """
        if not self._machine or self._nursery is None:
            return None
        for _ in range(2):
            place = self._places.pop(chunk_id, None)
            if place is not None and not place.file.revoked:
                self._places[chunk_id] = place  # last
            else:
                place = await self._find(chunk_id, nodes)
            if place is None:
                break
            place.file.acquire()
            try:
                if not place.base:
                    data = await self._pool.run(_prove_and_pull, place, chunk_id, offset, length)
                elif length <= SHORT:
                    data = await self._pool.run(self._quick.timed, _pull, place, offset, length, 0)
                else:
                    data = await self._pool.run(_pull, place, offset, length, 0)
            except OSError:
                self._forget(chunk_id, place)
                break
            except Corrupt:
                self._forget(chunk_id, place)
                if await self._is_bad(chunk_id, place):
                    break
            else:
                self._reads += 1
                self._bytes += length
                return data
            finally:
                place.file.release()
        self._misses += 1
        return None

    def _forget(self, chunk_id: bytes, place: _Place) -> None:
        if self._places.get(chunk_id) is place:
            del self._places[chunk_id]

    async def _is_bad(self, chunk_id: bytes, place: _Place) -> bool:
        """Bytes at a place were wrong: whether the copy is bad (and reported), or moved away."""
        if await self._locate(place.node, chunk_id) != place.spot:
            return False
        self._corrupt += 1
        address = self._get_map().address(CHUNK, place.node)
        self._rpc.cast(address, "chunk.report", (chunk_id,), priority=Priority.NORMAL)
        return True

    # ------------------------------------------------------------------------------------- places

    async def _find(self, chunk_id: bytes, nodes: Callable[[], Iterable[int]]) -> _Place | None:
        """Find the chunk at a neighbour; readers that come meanwhile wait for the one search."""
        other = self._locating.get(chunk_id)
        if other is not None:
            await other.wait()
            return self._places.get(chunk_id)
        done = self._locating[chunk_id] = trio.Event()
        try:
            for node in nodes():
                neighbour = self._neighbour(node)
                if neighbour is None:
                    continue
                place = await self._place(node, neighbour, chunk_id)
                if place is not None:
                    self._places[chunk_id] = place
                    if len(self._places) > PLACES:
                        del self._places[next(iter(self._places))]
                    return place
            return None
        finally:
            del self._locating[chunk_id]
            done.set()

    async def _place(self, node: int, neighbour: _Neighbour, chunk_id: bytes) -> _Place | None:
        spot = await self._locate(node, chunk_id)
        door = neighbour.open()
        if spot is None or door is None:
            return None
        file = await door.get(spot[1])
        if file is None or file.revoked:
            return None
        return _Place(node, spot, file)

    async def _locate(self, node: int, chunk_id: bytes) -> tuple[int, ...] | None:
        """(boot, segment, offset, stored, plain) of a chunk at a node; None if it is not there."""
        neighbour = self._neighbours[node]
        self._locates += 1
        try:
            (boot, (found,)), _ = await self._rpc.call(
                self._get_map().address(CHUNK, node),
                "chunk.locate",
                ((chunk_id,),),
                timeout=LOCATE_TIMEOUT,
            )
        except (DfsError, ValueError, TypeError):
            self._shut(neighbour, SOON)
            return None
        if boot != neighbour.boot:  # another run, perhaps on another directory
            self._shut(neighbour, 0.0)
            return None
        return None if found is None else (boot, *found)

    # --------------------------------------------------------------------------------- neighbours

    def _neighbour(self, node: int) -> _Neighbour | None:
        """The server, if its door is open; else it is asked, behind the reader's back."""
        neighbour = self._neighbours.get(node)
        if neighbour is None:
            neighbour = self._neighbours[node] = _Neighbour()
        if neighbour.open() is not None:
            return neighbour
        if (
            not neighbour.asking
            and self._nursery is not None
            and self._clock.monotonic() >= neighbour.until
        ):
            neighbour.asking = True
            self._nursery.start_soon(self._knock, node, neighbour)
        return None

    def _shut(self, neighbour: _Neighbour, pause: float) -> None:
        neighbour.until = self._clock.monotonic() + pause
        if neighbour.door is not None:
            neighbour.door.close()
            neighbour.door = None

    async def _knock(self, node: int, neighbour: _Neighbour) -> None:
        """Ask a server for its door, and keep the connection until it ends."""
        neighbour.until = self._clock.monotonic() + AGAIN
        try:
            address = self._get_map().address(CHUNK, node)
            (boot, machine, name, token), _ = await self._rpc.call(
                address, "chunk.door", timeout=DOOR_TIMEOUT
            )
            if machine != self._machine:
                return
            door = await DescriptorClient.connect(name, token)
        except (DfsError, ValueError, TypeError):
            return  # older, unreachable, in another network namespace: read over the network
        finally:
            neighbour.asking = False
        neighbour.door, neighbour.boot = door, boot
        await door.run()
        if neighbour.door is door:
            self._shut(neighbour, SOON)


def _prove(place: _Place, chunk_id: bytes) -> None:
    """Read the header at a place and prove that it is the chunk's; blocking."""
    _, _, offset, _, plain = place.spot
    header = chunks.Header.parse(os.pread(place.file.fd, chunks.header_size(plain), offset))
    header.verify_id(chunk_id)
    if header.length != plain:
        raise Corrupt(f"chunk {chunk_id.hex()[:16]} has another length")
    place.header = header
    place.base = offset + header.size


def _prove_and_pull(place: _Place, chunk_id: bytes, offset: int, length: int) -> Buffer | None:
    """The first read of a place: one errand of a thread for both.  Blocking."""
    _prove(place, chunk_id)
    return _pull(place, offset, length, 0)


def _pull(place: _Place, offset: int, length: int, flags: int) -> Buffer | None:
    """Verified bytes of a range; None where RWF_NOWAIT finds only a part.  Blocking without it."""
    header = place.header
    header.check_range(offset, length)
    first = offset // chunks.BLOCK
    start = header.offsets[first]
    size = header.offsets[chunks.block_count(offset + length)] - start
    start += place.base
    if size >= LONG and place.file.direct >= 0 and not flags:
        stored = _read_direct(place.file.direct, start, size)
    else:
        stored = memoryview(allocate(size))
        if not _fill(place.file.fd, stored, start, flags):
            return None
    return header.range(offset, length, stored)


def _fill(fd: int, into: memoryview, start: int, flags: int) -> bool:
    """Read exactly; False where RWF_NOWAIT finds only a part."""
    got = os.preadv(fd, [into], start, flags)
    while got < len(into):
        if flags & os.RWF_NOWAIT:
            return False
        more = os.preadv(fd, [into[got:]], start + got, flags)
        if not more:
            raise Corrupt("a segment ends in the middle of a chunk")
        got += more
    return True


def _read_direct(fd: int, start: int, size: int) -> memoryview:
    """Read whole pages around a range, past the kernel's cache."""
    skip = start % PAGE
    pages = allocate_aligned(-(-(skip + size) // PAGE) * PAGE)
    got = os.preadv(fd, [pages], start - skip)
    while got < skip + size:  # the last page of a file may be short, what is before may not
        if not got or got % PAGE:
            raise Corrupt("a segment ends in the middle of a chunk")
        more = os.preadv(fd, [pages[got:]], start - skip + got)
        if not more:
            raise Corrupt("a segment ends in the middle of a chunk")
        got += more
    return pages[skip : skip + size]
