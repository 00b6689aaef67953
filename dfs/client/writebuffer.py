"""What was written to one file and is not committed yet: a map from file ranges to their bytes.

Segments never overlap; writing over a segment cuts it.  A segment's bytes lie in a `Source`: the
buffer that came with the write, or an `Upload`, a chunk being sent, into which many segments were
gathered.  Nothing is copied: segments are windows on the buffers that the caller handed over, and
must not be changed afterwards.

Segments are kept by the aligned window of the file that they lie in, and one that crosses an edge
is two: so a write in the midst of many others moves no more of them than its window holds.

The buffer is plain data without IO: `dfs.client.files` decides when to upload and to commit.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import chain

from dfs.client.store import Prepared
from dfs.codec import Buffer
from dfs.volume.extents import plan_pack

WINDOW = 4 << 20  # aligned part of a file that is uploaded as one chunk


class Upload:
    """A chunk on its way: its pieces, its id once it arrived, or why it failed.

    `stamp`: when it was sent, by `Clock.elapsed_ns`; no server counts it as older.
    """

    __slots__ = ("chunk_id", "error", "length", "pieces", "stamp", "starts")

    def __init__(self, pieces: Sequence[Buffer]) -> None:
        """Take the pieces in the order of the chunk."""
        self.pieces = [memoryview(p) for p in pieces]
        self.starts: list[int] = []
        at = 0
        for piece in self.pieces:
            self.starts.append(at)
            at += len(piece)
        self.length = at
        self.chunk_id = b""
        self.error: BaseException | None = None
        self.stamp = 0

    def exchange(self, prepared: Prepared) -> None:
        """Hold the same bytes as the prepared chunk does: short pieces may be one there."""
        self.pieces, self.starts = prepared.pieces, prepared.starts

    def read(self, offset: int, length: int) -> list[memoryview]:
        """The bytes of a range, as views."""
        found = []
        i = bisect_right(self.starts, offset) - 1
        while length > 0:
            begin = offset - self.starts[i]
            view = self.pieces[i][begin : begin + length]
            found.append(view)
            offset += len(view)
            length -= len(view)
            i += 1
        return found


class Segment:
    """`length` bytes of a file at `start`, found at `at` in `source`."""

    __slots__ = ("at", "length", "source", "start")

    def __init__(self, start: int, length: int, source: "Buffer | Upload", at: int) -> None:
        """See the class."""
        self.start = start
        self.length = length
        self.source = source
        self.at = at

    @property
    def end(self) -> int:
        """First offset after the segment."""
        return self.start + self.length

    def read(self, offset: int, length: int) -> list[memoryview]:
        """Views on a range given in file offsets."""
        at = self.at + offset - self.start
        if isinstance(self.source, Upload):
            return self.source.read(at, length)
        return [memoryview(self.source)[at : at + length]]


class _Window:
    """Segments of one window of the file, in order, and where each begins."""

    __slots__ = ("segments", "starts")

    def __init__(self) -> None:
        """Empty."""
        self.starts: list[int] = []
        self.segments: list[Segment] = []

    def touching(self, start: int, end: int) -> tuple[int, int]:
        """Indexes [i, j) of the segments that overlap a range."""
        starts, segments = self.starts, self.segments
        i = bisect_right(starts, start)
        if i and segments[i - 1].end > start:
            i -= 1
        return i, bisect_left(starts, end, i)


class WriteBuffer:
    """The segments of one file, in order."""

    __slots__ = ("_order", "_windows", "loose", "size")

    def __init__(self) -> None:
        """Empty."""
        self._windows: dict[int, _Window] = {}  # none of them is empty
        self._order: list[int] = []  # their numbers
        self.size = 0  # bytes in all segments
        self.loose: dict[int, int] = {}  # window number -> bytes of it in no Upload

    def __bool__(self) -> bool:
        """Whether there is anything uncommitted."""
        return bool(self._order)

    def __len__(self) -> int:
        """Number of segments."""
        windows = self._windows.values()
        return sum([len(window.segments) for window in windows])

    def __iter__(self) -> Iterator[Segment]:
        """Segments in order of offsets."""
        windows = self._windows
        return chain.from_iterable([windows[number].segments for number in self._order])

    @property
    def end(self) -> int:
        """First offset after the last segment, 0 if there is none."""
        return self._windows[self._order[-1]].segments[-1].end if self._order else 0

    def write(self, offset: int, data: Buffer) -> None:
        """Put bytes over whatever was there."""
        length = len(data)
        if length:
            self._place(offset, length, data, 0)

    def _place(self, start: int, length: int, source: "Buffer | Upload", at: int) -> None:
        """Put a segment over whatever was there, cut where windows meet."""
        number = start // WINDOW
        edge = (number + 1) * WINDOW
        while start + length > edge:
            self._put(number, Segment(start, edge - start, source, at))
            length -= edge - start
            at += edge - start
            start = edge
            number += 1
            edge += WINDOW
        self._put(number, Segment(start, length, source, at))

    def _put(self, number: int, segment: Segment) -> None:
        """Put a segment that does not leave window `number` over whatever was there."""
        start, length = segment.start, segment.length
        window = self._windows.get(number)
        if window is None:
            window = self._windows[number] = _Window()
            order = self._order
            if order and number < order[-1]:
                insort(order, number)
            else:
                order.append(number)
        starts, segments = window.starts, window.segments
        i = bisect_left(starts, start)
        if (i and segments[i - 1].end > start) or (i < len(starts) and starts[i] < start + length):
            self._cut(number, window, start, start + length)
            i = bisect_left(starts, start)
        starts.insert(i, start)
        segments.insert(i, segment)
        self.size += length
        if not isinstance(segment.source, Upload):
            self.loose[number] = self.loose.get(number, 0) + length

    def _numbers(self, start: int, end: int) -> list[int]:
        """Numbers of the windows, of those there are, that overlap a range which is not empty."""
        first, last = start // WINDOW, (end - 1) // WINDOW
        if first == last:
            return [first] if first in self._windows else []
        order = self._order
        return order[bisect_left(order, first) : bisect_right(order, last)]

    def cut(self, start: int, end: int) -> None:
        """Forget the bytes in [start, end)."""
        if start >= end:
            return
        for number in self._numbers(start, end):
            window = self._windows[number]
            self._cut(number, window, start, end)
            if not window.segments:
                self._drop(number)

    def _drop(self, number: int) -> None:
        """Remove a window without segments."""
        del self._windows[number]
        del self._order[bisect_left(self._order, number)]

    def _cut(self, number: int, window: _Window, start: int, end: int) -> None:
        """Forget the bytes of one window in [start, end); it may be empty then."""
        i, j = window.touching(start, end)
        if i == j:
            return
        old = window.segments[i:j]
        first, last = old[0], old[-1]
        left = []
        if first.start < start:
            left.append(Segment(first.start, start - first.start, first.source, first.at))
        if last.end > end:
            left.append(Segment(end, last.end - end, last.source, last.at + end - last.start))
        self._exchange(number, window, i, j, left)

    def _exchange(
        self, number: int, window: _Window, i: int, j: int, new: Sequence[Segment]
    ) -> None:
        """Put other segments in the place of those with the indexes [i, j)."""
        size = loose = 0
        for sign, segments in ((-1, window.segments[i:j]), (1, new)):
            for s in segments:
                size += sign * s.length
                if not isinstance(s.source, Upload):
                    loose += sign * s.length
        window.segments[i:j] = new
        window.starts[i:j] = [s.start for s in new]
        self.size += size
        if loose:
            loose += self.loose.get(number, 0)
            if loose:
                self.loose[number] = loose
            else:
                del self.loose[number]

    def overlapping(self, start: int, end: int) -> list[Segment]:
        """Segments that overlap a range, in order."""
        found: list[Segment] = []
        if start < end:
            for number in self._numbers(start, end):
                window = self._windows[number]
                i, j = window.touching(start, end)
                found += window.segments[i:j]
        return found

    def gather(
        self, parts: Sequence[tuple[int, int]], upload: Upload, offsets: Sequence[int]
    ) -> None:
        """Let an upload be the source of `parts` (start, length), at `offsets` in the chunk."""
        for (start, length), at in zip(parts, offsets, strict=True):
            self._place(start, length, upload, at)

    def pack(self) -> list[Upload]:
        """Gather what is in no upload yet in new ones, in order; see `extents.plan_pack`.

        Adjacent pieces come together, short ones share chunks.
        """
        ranges: list[tuple[int, int]] = []
        begin = end = -1
        for number in self._order:
            if number not in self.loose:
                continue
            for s in self._windows[number].segments:
                if isinstance(s.source, Upload):
                    continue
                if s.start == end:
                    end += s.length
                    continue
                if end > begin:
                    ranges.append((begin, end - begin))
                begin, end = s.start, s.end
        if end > begin:
            ranges.append((begin, end - begin))
        return [self._gathered(chunk) for chunk in plan_pack(ranges, WINDOW)]

    def _gathered(self, chunk: Sequence[tuple[int, int, int]]) -> Upload:
        """A new upload of parts (start, length, offset in the chunk) that are in none yet."""
        pieces: list[Buffer] = []
        filled = 0
        # Most parts are one segment each, which is exchanged in its place.
        single: list[tuple[_Window, int, int]] = []
        others: list[tuple[int, int, int]] = []
        for part in chunk:
            start, length, at = part
            if at > filled:
                pieces.append(bytes(at - filled))
            filled = at + length
            window = self._windows[start // WINDOW]
            i = bisect_left(window.starts, start)
            if i < len(window.starts):
                s = window.segments[i]
                if s.start == start and s.length == length:
                    pieces += s.read(start, length)
                    single.append((window, i, at))
                    continue
            others.append(part)
            for s in self.overlapping(start, filled - at + start):
                begin = max(s.start, start)
                pieces += s.read(begin, min(s.end, start + length) - begin)
        upload = Upload(pieces)
        loose = self.loose
        for window, i, at in single:
            s = window.segments[i]
            window.segments[i] = Segment(s.start, s.length, upload, at)
            number = s.start // WINDOW
            left = loose[number] - s.length
            if left:
                loose[number] = left
            else:
                del loose[number]
        for start, length, at in others:
            self._place(start, length, upload, at)
        return upload

    def restore(self, start: int, segments: Sequence[Segment]) -> None:
        """Put back what was cut from `start` on, except where something was written since."""
        for segment in segments:
            at = max(start, segment.start)
            for now in [*self.overlapping(at, segment.end), None]:
                end = segment.end if now is None else now.start
                if at < end:
                    skipped = at - segment.start
                    self._place(at, end - at, segment.source, segment.at + skipped)
                at = at if now is None else max(at, now.end)

    def forget(self, committed: Sequence[Segment]) -> None:
        """Drop what was committed, except where it was written over since.

        `committed`: some of the segments that were here at one time, in order.
        """
        i, count = 0, len(committed)
        while i < count:
            number = committed[i].start // WINDOW
            edge = (number + 1) * WINDOW
            j = i
            while j < count and committed[j].start < edge:
                j += 1
            window = self._windows.get(number)
            if window is not None:
                self._forget(number, window, committed[i:j])
            i = j

    def _forget(self, number: int, window: _Window, committed: Sequence[Segment]) -> None:
        segments = window.segments
        left = [] if segments == committed else _later(segments, committed)
        if len(left) < len(segments):
            self._exchange(number, window, 0, len(segments), left)
            if not left:
                self._drop(number)


def _later(segments: Sequence[Segment], committed: Sequence[Segment]) -> list[Segment]:
    """Those segments, in order, that are not parts of committed ones.

    A segment is never changed, only replaced by parts of itself or by others: with the same source
    at the same place it is (a part of) the same bytes, not a later write of equal ones.
    """
    left = []
    c, count = 0, len(committed)
    for now in segments:
        while c < count and committed[c].end <= now.start:
            c += 1
        if c < count:
            old = committed[c]
            if now is old or (
                now.source is old.source
                and now.start - now.at == old.start - old.at
                and old.start <= now.start
                and now.end <= old.end
            ):
                continue
        left.append(now)
    return left
