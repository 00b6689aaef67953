"""Extents: which bytes of a file live where, as pure planners.

A file's content is its EXTENT items, which never overlap and are at most `MAX_EXTENT` long; what
none covers, up to the file's size, reads as zeros.  A planner is given the extents that overlap a
range and answers with effects, or with what to read or upload; it does nothing itself.  To find all
extents that overlap a range one has to look `MAX_EXTENT` before it: see `bounds`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dfs.codec import Buffer
from dfs.volume.effects import DELETE, DELETE_RANGE, PUT, Effect
from dfs.volume.items import (
    EXTENT,
    MAX_EXTENT,
    MAX_OFFSET,
    decode_extent,
    encode_chunk,
    encode_inline,
    extent_key,
    group,
    group_end,
    suffix_u64,
)

HOLE, INLINE, CHUNK = range(3)
BLOCK = 64 << 10  # bytes of a chunk that are verified and compressed together
MANY = 256  # extents that are removed one by one rather than as a range
FRAGMENTED = 16  # extents in one window that are still fine
SMALL_GAP = 4 << 10  # bytes of hole that compaction fills with zeros


class Extent(NamedTuple):
    """A piece of a file: its own bytes (`data`), or a part of a chunk (`data` is None)."""

    offset: int
    length: int
    data: bytes | None
    chunk_id: bytes = b""
    chunk_offset: int = 0
    chunk_length: int = 0

    @property
    def end(self) -> int:
        """File offset after the last byte."""
        return self.offset + self.length

    def part(self, start: int, end: int) -> "Extent":
        """The part of the extent in [start, end), which must lie within it."""
        skip = start - self.offset
        if self.data is not None:
            return inline(start, self.data[skip : end - self.offset])
        where = self.chunk_offset + skip
        return Extent(start, end - start, None, self.chunk_id, where, self.chunk_length)

    def put(self, ino: int) -> Effect:
        """Effect that stores the extent."""
        if self.data is not None:
            value = encode_inline(self.data)
        else:
            value = encode_chunk(self.length, self.chunk_id, self.chunk_offset, self.chunk_length)
        return PUT, extent_key(ino, self.offset), value


class Piece(NamedTuple):
    """What to read for one part of a range: a HOLE of zeros, INLINE bytes or a part of a CHUNK."""

    kind: int
    offset: int  # in the file
    length: int
    data: bytes = b""
    chunk_id: bytes = b""
    chunk_offset: int = 0
    chunk_length: int = 0


Placed = tuple[int, int, int]  # file offset, length, offset in the chunk


def inline(offset: int, data: Buffer) -> Extent:
    """Extent that holds its bytes itself."""
    return Extent(offset, len(data), bytes(data))


def in_chunk(
    offset: int, length: int, chunk_id: bytes, chunk_offset: int, chunk_length: int
) -> Extent:
    """Extent that is `length` bytes at `chunk_offset` of a chunk of `chunk_length` bytes."""
    return Extent(offset, length, None, chunk_id, chunk_offset, chunk_length)


def decode(items: Iterable[tuple[bytes, bytes]]) -> list[Extent]:
    """Extents of EXTENT items, in their order; raises `Corrupt`."""
    found = []
    for key, value in items:
        fields = decode_extent(value)
        offset = suffix_u64(key)
        if fields[1] == 0:
            found.append(Extent(offset, fields[0], fields[2]))
        else:
            found.append(Extent(offset, fields[0], None, fields[2], fields[3], fields[4]))
    return found


def bounds(ino: int, start: int, end: int) -> tuple[bytes, bytes]:
    """Keys between which all extents lie that overlap [start, end) of a file."""
    return extent_key(ino, max(0, start - MAX_EXTENT + 1)), extent_key(ino, end)


# ------------------------------------------------------------------------------------- planners


def plan_read(
    extents: Sequence[Extent], offset: int, length: int, size: int | None = None
) -> list[Piece]:
    """Pieces that make up [offset, offset + length) of a file, in order, without gaps.

    `extents`: at least all that overlap the range, in order.  The answer ends at `size`, if given.
    """
    end = offset + length if size is None else min(offset + length, size)
    pieces: list[Piece] = []
    at = offset
    for extent in extents:
        stop = extent.offset + extent.length
        if stop <= at:
            continue
        if extent.offset >= end:
            break
        if extent.offset > at:
            pieces.append(Piece(HOLE, at, extent.offset - at))
            at = extent.offset
        take = min(stop, end) - at
        skip = at - extent.offset
        if extent.data is not None:
            pieces.append(Piece(INLINE, at, take, extent.data[skip : skip + take]))
        else:
            where = extent.chunk_offset + skip
            pieces.append(Piece(CHUNK, at, take, b"", extent.chunk_id, where, extent.chunk_length))
        at += take
    if at < end:
        pieces.append(Piece(HOLE, at, end - at))
    return pieces


def plan_write(ino: int, extents: Sequence[Extent], new: Iterable[Extent]) -> list[Effect]:
    """Effects that put `new` extents, which do not overlap each other, over the old ones.

    `extents`: at least all that overlap a new one.
    """
    new = sorted(new)
    taken = [(extent.offset, extent.end) for extent in new]
    puts = [extent.put(ino) for extent in new]
    return [*_cut_out(ino, extents, taken, {extent.offset for extent in new}), *puts]


def plan_truncate(ino: int, extents: Sequence[Extent], size: int) -> list[Effect]:
    """Effects that remove a file's content from `size` on; for shrinking, to be patched as well.

    `extents`: at least the one across `size`, if any; those beyond need not be known.
    """
    across = [e for e in extents if e.offset < size < e.end]
    last = group_end(group(ino, EXTENT))
    return [
        *_cut_out(ino, across, [(size, MAX_OFFSET + 1)], set()),
        (DELETE_RANGE, extent_key(ino, size), last),
    ]


def plan_punch(ino: int, extents: Sequence[Extent], start: int, end: int) -> list[Effect]:
    """Effects that make a hole of [start, end).  `extents`: at least all that overlap it."""
    if start >= end:
        return []
    inside = sum(start <= e.offset < end for e in extents)
    if inside <= MANY:
        return _cut_out(ino, extents, [(start, end)], set())
    across = [e for e in extents if e.offset < start < e.end or e.offset < end < e.end]
    cut = _cut_out(ino, across, [(start, end)], set())
    return [(DELETE_RANGE, extent_key(ino, start), extent_key(ino, end)), *cut]


def _cut_out(
    ino: int, extents: Sequence[Extent], holes: Sequence[tuple[int, int]], replaced: set[int]
) -> list[Effect]:
    """Effects that take sorted `holes` out of extents; the keys `replaced` will be put anyway."""
    effects: list[Effect] = []
    first, count = 0, len(holes)
    for extent in sorted(extents):
        begin = at = extent.offset
        stop = begin + extent.length
        while first < count and holes[first][1] <= at:
            first += 1
        kept = begin in replaced  # its key needs no DELETE
        hit = False
        while first < count and holes[first][0] < stop:
            start, end = holes[first]
            hit = True
            if start > at:
                kept = kept or at == begin
                effects.append(extent.part(at, start).put(ino))
            at = max(at, end)
            if at >= stop:
                break  # it may reach into the next one, too
            first += 1
        if not hit:
            continue
        if at < stop:
            effects.append(extent.part(at, stop).put(ino))
        if not kept:
            effects.append((DELETE, extent_key(ino, begin)))
    return effects


# ------------------------------------------------------------------------------ chunks to upload


def plan_pack(
    ranges: Iterable[tuple[int, int]], chunk_size: int = MAX_EXTENT
) -> list[list[Placed]]:
    """How to lay dirty ranges (offset, length) of a file out in chunks of up to `chunk_size`.

    Returns the pieces of each chunk, in order.  Ranges are cut where the file offset is a multiple
    of `chunk_size`, so that rewriting a file makes the same chunks; whole windows are a chunk of
    their own, the rest share chunks.  A piece smaller than `BLOCK` crosses no block edge, so that
    reading it reads one block; bytes left out between pieces are zeros.
    """
    chunks: list[list[Placed]] = []
    shared: list[Placed] = []
    used = 0
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            take = min(end, (offset // chunk_size + 1) * chunk_size) - offset
            if take == chunk_size:
                chunks.append([(offset, take, 0)])
            else:
                if take <= BLOCK and used // BLOCK != (used + take - 1) // BLOCK:
                    used = -(-used // BLOCK) * BLOCK
                if used + take > chunk_size:
                    chunks.append(shared)
                    shared, used = [], 0
                shared.append((offset, take, used))
                used += take
            offset += take
    if shared:
        chunks.append(shared)
    return chunks


def plan_compact(
    extents: Sequence[Extent], window: int = MAX_EXTENT, limit: int = FRAGMENTED
) -> list[tuple[int, int]]:
    """Ranges (offset, length) to rewrite as one extent each, so that the file is less fragmented.

    Looks at windows of the file, aligned to their size, that hold more than `limit` extents.  In
    them it joins neighbours and fills gaps up to `SMALL_GAP`; larger holes stay holes.  Rewriting
    the ranges leaves nothing more to do there unless holes alone exceed the limit.
    """
    runs: list[tuple[int, int]] = []
    parts: dict[int, list[tuple[int, int]]] = {}
    for extent in sorted(extents):
        at = extent.offset
        while at < extent.end:
            number = at // window
            stop = min(extent.end, (number + 1) * window)
            parts.setdefault(number, []).append((at, stop))
            at = stop
    for pieces in parts.values():
        if len(pieces) <= limit:
            continue
        start, end, count = pieces[0][0], pieces[0][1], 1
        for low, high in pieces[1:]:
            if low - end > SMALL_GAP:
                if count > 1:
                    runs.append((start, end - start))
                start, count = low, 0
            end = high
            count += 1
        if count > 1:
            runs.append((start, end - start))
    return runs
