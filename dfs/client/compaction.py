"""Compaction: rewriting the parts of a file that many small writes have cut to pieces.

Content does not change, so nothing about the file does but its extents.  The rewritten extents are
committed only if those that were read are still in place; otherwise the work was for nothing.

A window costs 4 MiB to read and as much for each copy to write, however little of it was cut: so
a file that is written here and there is left alone until that has ended, or went on for long.
"""

import logging
from collections.abc import Callable

import trio

from dfs.client.attributes import get_inode
from dfs.client.contents import Contents, crowded_windows, overlapping, scan_extents
from dfs.client.openfile import File
from dfs.client.reader import Reader
from dfs.client.session import Session
from dfs.client.store import ChunkStore
from dfs.errors import DfsError
from dfs.volume import extents
from dfs.volume.items import MAX_EXTENT
from dfs.volume.view import Txn

log = logging.getLogger(__name__)

TRANQUILITY = 3.0  # rest after a window, in multiples of the time it took
CALM = 0.1  # seconds without a sync of the session, or a commit, in which a window is begun
HURRY = 3.0  # seconds after which it is begun all the same
ATTEMPTS = 6
# Bytes of an extent that is not joined with others: with those, and what lies between, a window
# of 4 MiB stays below what calls for compaction (`contents.CROWDED`).
LARGE = 512 << 10
STILL = 2.0  # seconds since a file became dirty after which nobody seems to go on writing to it
ENOUGH = 10.0  # seconds after which it is compacted all the same


class Compactor:
    """Compacts files of one session."""

    def __init__(
        self,
        session: Session,
        chunks: ChunkStore,
        reader: Reader,
        contents: Contents,
        nursery: trio.Nursery,
        find: Callable[[int], File | None],
    ) -> None:
        """Compose; `nursery` is where the work is done, `find` tells what is open or dirty now."""
        self._session = session
        self._chunks = chunks
        self._reader = reader
        self._contents = contents
        self._nursery = nursery
        self._find = find
        self._running: set[int] = set()  # inodes; a file may be closed and opened meanwhile
        self._clock = session.cluster.clock
        self._wanted: dict[int, tuple[int, int]] = {}  # inode -> range that was found crowded
        self.saved = 0  # extents

    def want(self, file: File, start: int, end: int, *, bulk: bool) -> None:
        """Compact the windows that a range touches, some time.

        `bulk`: they are crowded by what came without a sync for each write, and more may come.
        """
        low, high = self._wanted.get(file.ino, (start, end))
        self._wanted[file.ino] = min(low, start), max(high, end)
        if file.ino not in self._running:
            self._running.add(file.ino)
            self._nursery.start_soon(self._run, file.ino, bulk)

    async def _run(self, ino: int, bulk: bool) -> None:
        """Compact a file; a failure leaves all as it was.

        Tries again, less and less often, while somebody writes to the very extents.
        """
        try:
            while ino in self._wanted:
                if bulk:
                    await self._still(ino)
                start, end = self._wanted.pop(ino)
                for attempt in range(ATTEMPTS):
                    if await self._compact(ino, start // MAX_EXTENT * MAX_EXTENT, end):
                        break
                    await trio.sleep(0.1 * 2**attempt)
        except DfsError as e:
            log.info("inode %x is not compacted now: %s", ino, e)
        finally:
            self._running.discard(ino)
            self._wanted.pop(ino, None)

    async def _still(self, ino: int) -> None:
        """Wait until nobody has written to a file for a while, but not for ever."""
        give_up = self._clock.monotonic() + ENOUGH
        since = give_up - ENOUGH
        while (now := self._clock.monotonic()) < give_up:
            file = self._find(ino)
            if file is not None:
                since = max(since, file.dirty_since)
            if (file is None or not file.buffer) and now >= since + STILL:
                return
            await trio.sleep(STILL / 4)

    async def _compact(self, ino: int, start: int, end: int) -> bool:
        async def look(start: int, end: int) -> list[extents.Extent]:
            def op(txn: Txn) -> list[extents.Extent]:
                get_inode(txn, ino)
                found = overlapping(scan_extents(txn, ino, start, end), start, end)
                # What is large stays as it is: a file that grows by small appends is not written
                # again and again, but once.
                return [e for e in found if e.length < LARGE]

            return await self._session.read(op)

        end = -(-end // MAX_EXTENT) * MAX_EXTENT
        # By their keys alone: to decode all that a large file has would keep everybody waiting.
        windows = await self._session.read(
            lambda txn: crowded_windows(txn, ino, start, end, extents.FRAGMENTED)
        )
        done, rest = True, 0.0
        for window in windows:
            low, high = window * MAX_EXTENT, (window + 1) * MAX_EXTENT
            found = await look(low, high)
            if not extents.plan_compact(found):
                await trio.lowlevel.checkpoint()
                continue
            await self._calm(rest)
            began = trio.current_time()
            found = await look(low, high)
            for offset, length in extents.plan_compact(found):
                seen = overlapping(found, offset, offset + length)
                done = await self._rewrite(ino, seen, offset, length) and done
            # Whoever waits for something else goes first: rest in proportion to the work.
            rest = TRANQUILITY * (trio.current_time() - began)
        await trio.sleep(rest)
        return done

    async def _calm(self, rest: float) -> None:
        """Rest, and wait for a while in which nobody syncs, or changes anything.

        A program that does waits for the same disks and processors.  Not for long, since what is
        cut to pieces takes memory; but the more pieces are joined at a time, the less is written.
        """
        session = self._session
        give_up = trio.current_time() + rest + HURRY
        while True:
            seq = session.view.seq
            await trio.sleep(max(rest, CALM - session.calm, CALM / 2))
            rest = 0.0
            if session.calm >= CALM and session.view.seq == seq:
                return
            if trio.current_time() >= give_up:
                return

    async def _rewrite(
        self, ino: int, seen: list[extents.Extent], offset: int, length: int
    ) -> bool:
        """Make one extent of those seen in a range; False if they were changed meanwhile."""
        pieces = await self._reader.gather(extents.plan_read(seen, offset, length))
        stamp = self._clock.elapsed_ns()
        prepared = await self._chunks.prepare(pieces)
        await self._chunks.put_prepared(prepared, durable=True)
        new = [extents.in_chunk(offset, length, prepared.chunk_id, 0, length)]
        if not await self._session.transact(
            lambda txn: self._contents.replace(txn, ino, seen, new), oldest=stamp
        ):
            return False
        file = self._find(ino)
        if file is not None:
            file.span = None
        self.saved += len(seen) - 1
        return True
