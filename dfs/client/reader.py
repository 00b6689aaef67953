"""Reading files: committed extents under what is not committed yet, and reading ahead."""

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter

from dfs.client.attributes import get_inode
from dfs.client.cache import ChunkCache, join
from dfs.client.contents import reaching, scan_extents
from dfs.client.handles import READAHEAD_MAX, FileHandle
from dfs.client.openfile import File
from dfs.client.session import Session
from dfs.codec import Buffer
from dfs.errors import DfsError, FsError
from dfs.volume import extents
from dfs.volume.items import extent_key
from dfs.volume.view import Missing, Txn

SPAN = 32 << 20  # bytes of a file, beyond what is asked for, whose extents are looked up at once
WIDE = 2 << 30  # bytes of a file of which all extents may be kept
MANY = 1024  # extents that a file whose extents are all kept may have, judged by those seen
GLANCE = 32  # extents beyond what is asked for that a scattered reader looks up at first
FEW = 16  # extents that need no search
SMALL_READ = 128 << 10  # longest read of a scattered reader that fetches blocks, not megabytes


_offset = attrgetter("offset")


class Reader:
    """Reads files of one session through one cache of chunks."""

    def __init__(self, session: Session, cache: ChunkCache) -> None:
        """Compose."""
        self._session = session
        self._cache = cache

    async def read(self, handle: FileHandle, offset: int, length: int) -> Buffer:
        """Up to `length` bytes at `offset`, shorter only at the end of the file.

        Does not yield when the view is fresh and the bytes are in memory.
        """
        file = handle.file
        if file.buffer:
            dirty = file.buffer.overlapping(offset, offset + length)
            if len(dirty) == 1 and dirty[0].start <= offset and dirty[0].end >= offset + length:
                return join(dirty[0].read(offset, length), length)
        small = not handle.run and length <= SMALL_READ
        ahead = handle.advance(offset, length)
        size, committed = await self.committed(
            file,
            offset,
            offset + length,
            reach=offset + length if ahead is None else ahead[1],
            scattered=ahead is None and not handle.run,
        )
        # From here to the fetch nothing awaits: buffer and extents belong together.
        if file.cut >= 0:
            size, committed = file.cut, shorter(committed, file.cut)
        length = min(length, max(size, file.buffer.end) - offset)
        if length <= 0:
            return b""
        dirty = file.buffer.overlapping(offset, offset + length)
        if ahead is not None and ahead[0] < size:
            start, end = ahead[0], min(ahead[1], size)
            self._prefetch(extents.plan_read(committed, start, end - start))
        found = await self.gather(extents.plan_read(committed, offset, length), small=small)
        if not dirty:
            return join(found, length)
        whole = bytearray(b"".join(found))
        for s in dirty:
            begin, end = max(s.start, offset), min(s.end, offset + length)
            whole[begin - offset : end - offset] = b"".join(s.read(begin, end - begin))
        return whole

    def whole_nowait(self, file: File, limit: int) -> Buffer | None:
        """All of a file of up to `limit` bytes, if it is at hand and all of it is committed."""
        if file.buffer or file.cut >= 0 or not self._session.fresh:
            return None
        txn = self._session.view.begin()
        try:
            size = get_inode(txn, file.ino).size
            if not 0 < size <= limit:
                return None
            found = scan_extents(txn, file.ino, 0, SPAN)
        except (Missing, DfsError):  # whoever reads will fetch it, or be told
            return None
        file.size, file.span = size, (0, SPAN, found)
        pieces: list[Buffer] = []
        for piece in extents.plan_read(found, 0, size):
            if piece.kind == extents.CHUNK:
                return None
            pieces.append(piece.data if piece.kind == extents.INLINE else bytes(piece.length))
        return join(pieces, size)

    async def committed(
        self, file: File, start: int, end: int, *, reach: int, scattered: bool
    ) -> tuple[int, list[extents.Extent]]:
        """Committed size, and the extents of a range and of what may be read ahead after it.

        Cached in the file until somebody changes it.  `reach`: the end of what will be read ahead.
        `scattered`: the reader jumps about; in a file of many extents it will miss what was looked
        up for it, so no more is looked up, and kept, than is of use.
        """
        if not self._session.fresh:
            await self._session.read(lambda _: None)
        span = file.span
        if (
            span is None
            or file.size < 0
            or start < span[0]
            or min(reach, max(end, file.size)) > span[1]
        ):
            ino = file.ino
            first, stop, limit = self._widen(file, start, end, scattered=scattered)

            def op(txn: Txn) -> tuple[int, list[extents.Extent], int]:
                size = get_inode(txn, ino).size
                if not limit:
                    return size, scan_extents(txn, ino, first, stop), stop
                return size, *glance(txn, ino, first, end, stop, limit)

            file.size, found, stop = await self._session.read(op)
            if stop == end:
                return file.size, found
            file.span = span = (first, stop, found)
        found = span[2]
        if len(found) <= FEW:
            return file.size, found
        # The range, and what may be read ahead after it.
        i = max(bisect_right(found, start, key=_offset) - 1, 0)
        j = bisect_left(found, end + READAHEAD_MAX, lo=i, key=_offset)
        return file.size, found[i:j]

    def _widen(self, file: File, start: int, end: int, *, scattered: bool) -> tuple[int, int, int]:
        """The part of a file whose extents are looked up now, and how many of them; 0 is all.

        A reader that jumps about in a file of few extents misses what was looked up last again and
        again: each time four times as much is looked up, until it is all of it.  In a file of many
        it is only what is asked for.
        """
        span = file.span
        if span is None:
            return start, end + SPAN, GLANCE if scattered else 0
        width = span[1] - span[0]
        if not 0 <= file.size <= WIDE or len(span[2]) * file.size > MANY * width:
            return (start, end, GLANCE) if scattered else (start, end + SPAN, 0)
        width *= 4
        stop = max(-(-end // width) * width, end + SPAN)
        return start // width * width, stop, MANY if scattered else 0

    async def gather(
        self, plan: Sequence[extents.Piece], *, small: bool = False
    ) -> list[memoryview]:
        """Bytes of a plan's pieces, in order, as views."""
        if len(plan) > 1:  # have all of it on its way before waiting for the first
            self._prefetch(plan)
        found: list[memoryview] = []
        for piece in plan:
            if piece.kind == extents.CHUNK:
                try:
                    found += await self._cache.read(
                        piece.chunk_id,
                        piece.chunk_offset,
                        piece.length,
                        piece.chunk_length,
                        small=small,
                    )
                except DfsError as e:
                    raise FsError(f"chunk {piece.chunk_id.hex()}: {e}", errno.EIO) from e
            elif piece.kind == extents.INLINE:
                found.append(memoryview(piece.data))
            else:
                found.append(memoryview(bytes(piece.length)))
        return found

    def _prefetch(self, plan: Sequence[extents.Piece]) -> None:
        for piece in plan:
            if piece.kind == extents.CHUNK:
                self._cache.prefetch(
                    piece.chunk_id, piece.chunk_offset, piece.length, piece.chunk_length
                )


def shorter(found: Sequence[extents.Extent], size: int) -> list[extents.Extent]:
    """Extents as they are once the file is cut to `size` bytes."""
    return [e if e.end <= size else e.part(e.offset, size) for e in found if e.offset < size]


def glance(
    txn: Txn, ino: int, start: int, end: int, stop: int, limit: int
) -> tuple[list[extents.Extent], int]:
    """Extents of [start, end) and at most `limit` after it, before `stop`; and where they end."""
    found = reaching(txn, ino, start, end)
    if stop > end:
        keys = extent_key(ino, end), extent_key(ino, stop)
        more = extents.decode(txn.scan_range(*keys, limit))
        if len(more) == limit:
            stop = more[-1].end
        found += more
    return found, stop
