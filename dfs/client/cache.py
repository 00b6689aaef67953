"""Cache of file data: verified parts of chunks, bounded in bytes.

Chunks are immutable, so nothing in this cache can ever be stale; it needs no invalidation.  A part
is 1 MiB of a chunk (what streaming readers want) or, for scattered small reads, one 64 KiB block.
Concurrent readers of a part share one fetch, which runs in the mount's nursery so that it survives
the reader that started it.  What is read ahead is fetched several parts at a time: a thread, a task
and a wake-up for each take longer than its bytes.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import trio

from dfs.codec import Buffer
from dfs.errors import DfsError

LARGE, SMALL = 1 << 20, 64 << 10  # bytes of a part
TOGETHER = 4  # parts that are read ahead in one piece, at most
BUDGET = 64 << 20

Key = tuple[bytes, int, int]  # (chunk id, part size, part number)
Pieces = list[memoryview]


class ChunkReader(Protocol):
    """What the cache needs of `dfs.client.chunkio.ChunkClient`."""

    async def read(self, chunk_id: bytes, offset: int, length: int) -> Buffer:
        """Verified bytes of a chunk."""
        ...

    def read_nowait(self, chunk_id: bytes, offset: int, length: int) -> Buffer | None:
        """The same if it can be had without waiting, else None."""
        ...


class _Fetch:
    __slots__ = ("data", "done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.data: memoryview | None = None
        self.error: DfsError | None = None


def _ended() -> DfsError:
    return DfsError("the client has ended")


class ChunkCache:
    """Least recently used parts of chunks; see the module's docstring."""

    def __init__(self, chunks: ChunkReader, nursery: trio.Nursery, budget: int = BUDGET) -> None:
        """Read through `chunks`; fetches run in `nursery`."""
        self._chunks = chunks
        self._nursery = nursery
        self.budget = budget
        self._parts: dict[Key, memoryview] = {}
        self._fetches: dict[Key, _Fetch] = {}
        self._used = 0
        self._hits = 0
        self._misses = 0

    def statistics(self) -> dict[str, Any]:
        """Counters for people."""
        return {
            "parts": len(self._parts),
            "used": self._used,
            "budget": self.budget,
            "hits": self._hits,
            "misses": self._misses,
            "fetching": len(self._fetches),
        }

    async def read(
        self, chunk_id: bytes, offset: int, length: int, chunk_length: int, *, small: bool = False
    ) -> Pieces:
        """Views that together are the range; does not yield when all of it is cached.

        `small`: fetch 64 KiB blocks rather than 1 MiB.  Raises the `DfsError` of the fetch.
        """
        pieces: Pieces = []
        end = offset + length
        waiting: list[tuple[int, int, int, _Fetch]] = []
        while offset < end:
            key, data = self._find(chunk_id, offset, small)
            if data is None and small and key[1] == SMALL and key not in self._fetches:
                data = self._take(key, chunk_length)
            begin = offset - key[1] * key[2]
            count = min(end - offset, key[1] - begin)
            if data is not None:
                self._hits += 1
                pieces.append(data[begin : begin + count])
            else:
                self._misses += 1
                fetch = self._fetches.get(key) or self._start(key, chunk_length)
                waiting.append((len(pieces), begin, count, fetch))
                pieces.append(memoryview(b""))
            offset += count
        for index, begin, count, fetch in waiting:  # all of them are under way by now
            await fetch.done.wait()
            if fetch.error is not None:
                raise fetch.error
            if fetch.data is not None:
                pieces[index] = fetch.data[begin : begin + count]
        return pieces

    def prefetch(self, chunk_id: bytes, offset: int, length: int, chunk_length: int) -> None:
        """Start fetching what of a range is neither cached nor on its way."""
        run: list[Key] = []
        for number in range(offset // LARGE, -(-(offset + length) // LARGE)):
            key = (chunk_id, LARGE, number)
            absent = key not in self._parts and key not in self._fetches
            if absent:
                run.append(key)
            if run and (not absent or len(run) == TOGETHER):
                self._start_run(run, chunk_length)
                run = []
        if run:
            self._start_run(run, chunk_length)

    def _find(self, chunk_id: bytes, offset: int, small: bool) -> tuple[Key, memoryview | None]:
        parts = self._parts
        key = (chunk_id, LARGE, offset // LARGE)
        data = parts.pop(key, None)
        if data is None and small and key not in self._fetches:
            key = (chunk_id, SMALL, offset // SMALL)
            data = parts.pop(key, None)
        if data is not None:
            parts[key] = data  # most recently used is last
        return key, data

    def _take(self, key: Key, chunk_length: int) -> memoryview | None:
        """A block that need not be waited for: a task would cost more than reading it."""
        chunk_id, size, number = key
        offset = size * number
        data = self._chunks.read_nowait(chunk_id, offset, min(size, chunk_length - offset))
        if data is None:
            return None
        view = memoryview(data)
        self._add(key, view)
        return view

    def _start(self, key: Key, chunk_length: int) -> _Fetch:
        fetch = self._fetches[key] = _Fetch()
        self._nursery.start_soon(self._run, key, chunk_length, fetch)
        return fetch

    def _start_run(self, run: list[Key], chunk_length: int) -> None:
        """Start one fetch of adjacent parts."""
        if len(run) == 1:
            self._start(run[0], chunk_length)
            return
        for key in run:
            self._fetches[key] = _Fetch()
        self._nursery.start_soon(self._run_together, run, chunk_length)

    async def _run_together(self, run: list[Key], chunk_length: int) -> None:
        chunk_id, size, first = run[0]
        offset = size * first
        length = min(size * len(run), chunk_length - offset)
        try:
            data = memoryview(await self._chunks.read(chunk_id, offset, length))
        except DfsError:  # perhaps no server has all of it: what each of them has may do
            for key in run:
                self._nursery.start_soon(self._run, key, chunk_length, self._fetches[key])
            return
        except BaseException:  # the end of the mount: who waits must not go on without the bytes
            for key in run:
                fetch = self._fetches.pop(key)
                fetch.error = _ended()
                fetch.done.set()
            raise
        for at, key in enumerate(run):
            fetch = self._fetches.pop(key)
            fetch.data = data[at * size : (at + 1) * size]
            self._add(key, fetch.data)
            fetch.done.set()

    async def _run(self, key: Key, chunk_length: int, fetch: _Fetch) -> None:
        chunk_id, size, number = key
        offset = size * number
        try:
            data = await self._chunks.read(chunk_id, offset, min(size, chunk_length - offset))
            fetch.data = memoryview(data)
            self._add(key, fetch.data)
        except DfsError as e:
            fetch.error = e
        except BaseException:
            fetch.error = _ended()
            raise
        finally:
            del self._fetches[key]
            fetch.done.set()

    def _add(self, key: Key, data: memoryview) -> None:
        self._parts[key] = data
        self._used += len(data)
        if self._used > self.budget:
            victims = []
            goal = self.budget - (self.budget >> 3)
            for old, part in self._parts.items():
                if self._used <= goal or old == key:
                    break
                self._used -= len(part)
                victims.append(old)
            for old in victims:
                del self._parts[old]


def join(pieces: Iterable[Buffer], length: int) -> Buffer:
    """One buffer of `length` bytes from pieces; no copy when there is just one."""
    found = list(pieces)
    if len(found) == 1 and len(found[0]) == length:
        return found[0]
    return b"".join(found)
