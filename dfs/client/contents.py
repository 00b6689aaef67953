"""Content of files as operations on a transaction: pure, like `dfs.client.namespace` for names."""

import errno
from collections.abc import Iterator, Sequence

from dfs.client.attributes import fs_error, get_inode, patch_inode, without_privileges
from dfs.client.namespace import Namespace
from dfs.client.writebuffer import Segment, Upload
from dfs.volume import effects as fx
from dfs.volume import extents, items
from dfs.volume.floor import Stretch, last_before
from dfs.volume.items import DIR, REG, Inode
from dfs.volume.view import Txn

INLINE = 4 << 10  # bytes up to which a commit needs no chunk
CROWDED = 32  # extents in 4 MiB of a file that call for compaction
# Inline extents that count as one: they are read from memory, not from a chunk each, and joining
# many of them at once writes little more than they hold, above all where a file grows by them.
INLINE_SHARE = 8
SHORT = 128  # bytes of an item beyond which it is an inline extent
NEAR = 16 << 20  # bytes between extents that are still looked up together


class Contents:
    """The operations, bound to the volume's namespace (for its usage and quota).

    `clear_privileges`: whether changing content clears set-user-ID bits here, or the kernel does.
    """

    def __init__(self, namespace: Namespace, *, clear_privileges: bool) -> None:
        """Keep both."""
        self._namespace = namespace
        self._clear_privileges = clear_privileges

    def publish(
        self, txn: Txn, ino: int, new: Sequence[extents.Extent], now: int, *, look: bool = True
    ) -> tuple[int, bool]:
        """Put extents over what the file held; returns (its size, whether to compact it).

        `now`: the time at which this changes the file; 0 leaves its times alone.  The volume's
        quota was asked when the writes were accepted.  `look`: whether to find out how many extents
        there are; without, no more of them are looked up than matter, which nobody may have to
        judge: only under the delegation.
        """
        inode = get_inode(txn, ino)
        size = max(inode.size, new[-1].end)
        few = all(e.data is not None for e in new)
        crowded = False
        for run in neighbours(new):
            start, end = run[0].offset, run[-1].end
            if not inode.dataver:  # nothing was ever written, and whoever does so now conflicts
                txn.reads(items.group(ino, items.EXTENT))
                for extent in run:
                    _, key, value = extent.put(ino)
                    txn.put(key, value)
                continue
            if look:
                old, seen = touched(txn, ino, [(e.offset, e.end + 1) for e in run])
                windows = 1 + (end - start) // items.MAX_EXTENT
                # The look at what is there reaches a window back: hence the one more.
                crowded = crowded or seen > CROWDED * (windows + 1)
            elif start >= inode.size and (not few or end - start >= INLINE):
                old = []  # nothing is beyond the end, and nothing will be joined with what is
            else:
                old = reaching(txn, ino, start, end + 1)
            txn.extend(extents.plan_write(ino, old, merge_inline(old, run) if few else run))
        self._changed(txn, ino, inode, size, now, admitted=True)
        return size, crowded

    def truncate(self, txn: Txn, ino: int, size: int, now: int) -> None:
        """Cut or extend (with zeros) the file."""
        inode = get_inode(txn, ino)
        if inode.kind != REG:
            raise fs_error(errno.EISDIR if inode.kind == DIR else errno.EINVAL)
        if size < inode.size:
            txn.extend(extents.plan_truncate(ino, scan_extents(txn, ino, size, size), size))
        self._changed(txn, ino, inode, size, now)

    def replace(
        self, txn: Txn, ino: int, seen: Sequence[extents.Extent], new: Sequence[extents.Extent]
    ) -> bool:
        """Put other extents with the same bytes in place; False if they are not `seen` any more."""
        start, end = seen[0].offset, seen[-1].end
        old = overlapping(scan_extents(txn, ino, start, end), start, end)
        if old != list(seen):
            return False
        txn.extend(extents.plan_write(ino, old, new))
        return True

    def mode_after(self, mode: int) -> int:
        """Permission bits after a change of content; in force when write(2) returns."""
        return without_privileges(mode) if self._clear_privileges else mode

    def _changed(
        self, txn: Txn, ino: int, inode: Inode, size: int, now: int, *, admitted: bool = False
    ) -> None:
        """What every change of content does to the inode and to the volume's usage."""
        changes: list[fx.Change] = [(items.F_DATAVER, fx.ADD, 1)]
        if now:
            # The data may be older than a change of attributes or names since it was written.
            changes.append((items.F_CTIME, fx.LAST, max(now, inode.ctime)))
            changes.append((items.F_MTIME, fx.LAST, now))
        if size != inode.size:
            changes.append((items.F_SIZE, fx.SET, size))
        mode = self.mode_after(inode.mode)
        if mode != inode.mode:
            changes.append((items.F_MODE, fx.SET, mode))
        patch_inode(txn, ino, *changes)
        self._namespace.charge(txn, size - inode.size, 0, admitted=admitted)


def scan_extents(txn: Txn, ino: int, start: int, end: int) -> list[extents.Extent]:
    """Committed extents that may overlap a range of a file, in order."""
    return extents.decode(txn.scan_range(*extents.bounds(ino, start, end)))


def touched(
    txn: Txn, ino: int, ranges: Sequence[tuple[int, int]]
) -> tuple[list[extents.Extent], int]:
    """Committed extents that may overlap ranges (start, end) of a file, and how many there are.

    Both in order; the number is of all around the first to the last range, roughly if they are
    many, and of inline extents a few count as one.  Extents do not overlap each other, so of those
    that begin before a range only the last one may reach into it.  The others are not even read: an
    append looks at a window full of small ones, who writes here and there at all that a file has.
    The transaction must have changed none that reach there.
    """
    txn.reads(items.group(ino, items.EXTENT))
    stretch = Stretch(txn.view, *extents.bounds(ino, ranges[0][0], ranges[-1][1]))
    found = stretch.near(
        [(items.extent_key(ino, start), items.extent_key(ino, end)) for start, end in ranges]
    )
    sample, each = stretch.sample()
    inline = sum([len(value) > SHORT for _, value in sample])
    return extents.decode(found), each * (len(sample) - inline + -(-inline // INLINE_SHARE))


def crowded_windows(txn: Txn, ino: int, start: int, end: int, many: int) -> list[int]:
    """Numbers of the aligned windows of 4 MiB of a range in which `many` extents or more begin.

    Some more are named where extents were replaced or removed lately.
    """
    size = items.MAX_EXTENT

    def edge(key: bytes) -> bytes:
        return items.extent_key(ino, (items.suffix_u64(key) // size + 1) * size)

    parts = Stretch(txn.view, *extents.bounds(ino, start, end)).parts(edge)
    numbers = [items.suffix_u64(key) // size - 1 for key, count in parts.items() if count >= many]
    return sorted(number for number in numbers if number >= start // size)


def reaching(txn: Txn, ino: int, start: int, end: int) -> list[extents.Extent]:
    """Committed extents that may overlap a range of a file, in order, and no others.

    The transaction must have changed none that reach there, and does not record that it looked.
    """
    low, _ = extents.bounds(ino, start, start)
    key = items.extent_key(ino, start)
    before = last_before(txn.view, low, key)
    found = txn.scan_range(key, items.extent_key(ino, end))
    return extents.decode(found if before is None else [before, *found])


def overlapping(found: Sequence[extents.Extent], start: int, end: int) -> list[extents.Extent]:
    """Those of the extents that overlap a range."""
    return [e for e in found if e.offset < end and e.end > start]


def extents_of(segments: Sequence[Segment]) -> list[extents.Extent]:
    """The extents that stored or short segments become; short neighbours become one."""
    if len(segments) == 1 or any(isinstance(s.source, Upload) for s in segments):
        return [extent_of(s) for s in segments]
    found: list[extents.Extent] = []
    parts: list[memoryview] = []
    start = end = 0
    for s in segments:
        if parts and s.start != end:
            found.append(extents.inline(start, b"".join(parts)))
            parts.clear()
        if not parts:
            start = s.start
        parts += s.read(s.start, s.length)
        end = s.end
    found.append(extents.inline(start, b"".join(parts)))
    return found


def extent_of(s: Segment) -> extents.Extent:
    """The extent that a stored or short segment becomes."""
    if isinstance(s.source, Upload):
        return extents.in_chunk(s.start, s.length, s.source.chunk_id, s.at, s.source.length)
    return extents.inline(s.start, s.read(s.start, s.length)[0])


def neighbours(new: Sequence[extents.Extent]) -> Iterator[list[extents.Extent]]:
    """Runs of extents that lie close enough for one look at what they replace."""
    run: list[extents.Extent] = []
    for extent in new:
        if run and extent.offset - run[-1].end > NEAR:
            yield run
            run = []
        run.append(extent)
    if run:
        yield run


def merge_inline(old: Sequence[extents.Extent], new: list[extents.Extent]) -> list[extents.Extent]:
    """A new inline extent joined with the old ones that it touches, as long as that stays short.

    So a file that grows by small appends has one item per `INLINE` bytes, not one per append.
    """
    if len(new) != 1:
        return new
    joined = new[0]
    for e in reversed(old):
        if e.data is None or e.end < joined.offset or e.offset > joined.end:
            continue
        start, end = min(e.offset, joined.offset), max(e.end, joined.end)
        if end - start <= INLINE:
            content = bytearray(end - start)
            content[e.offset - start : e.end - start] = e.data
            content[joined.offset - start : joined.end - start] = joined.data or b""
            joined = extents.inline(start, content)
    return [joined]
