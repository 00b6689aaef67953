"""What was written to one file and is not committed yet: a map from file ranges to their bytes.

Segments never overlap; writing over a segment cuts it.  A segment's bytes lie in a `Source`: the
buffer that came with the write, or an `Upload`, a chunk being sent, into which many segments were
gathered.  Nothing is copied: segments are windows on the buffers that the caller handed over, and
must not be changed afterwards.

The buffer is plain data without IO: `dfs.client.files` decides when to upload and to commit.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from dfs.codec import Buffer

WINDOW = 4 << 20  # aligned part of a file that is uploaded as one chunk


class Upload:
    """A chunk on its way: its pieces, its id once it arrived, or why it failed."""

    __slots__ = ("chunk_id", "error", "length", "pieces", "starts")

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


class WriteBuffer:
    """The segments of one file, in order."""

    __slots__ = ("_segments", "_starts", "loose", "size")

    def __init__(self) -> None:
        """Empty."""
        self._starts: list[int] = []
        self._segments: list[Segment] = []
        self.size = 0  # bytes in all segments
        self.loose: dict[int, int] = {}  # window number -> bytes of it in no Upload

    def __bool__(self) -> bool:
        """Whether there is anything uncommitted."""
        return bool(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        """Segments in order of offsets."""
        return iter(self._segments)

    @property
    def end(self) -> int:
        """First offset after the last segment, 0 if there is none."""
        return self._segments[-1].end if self._segments else 0

    def write(self, offset: int, data: Buffer) -> None:
        """Put bytes over whatever was there."""
        length = len(data)
        if not length:
            return
        if self._segments and offset < self._segments[-1].end:
            self.cut(offset, offset + length)
        self._insert(Segment(offset, length, data, 0))

    def _insert(self, segment: Segment) -> None:
        if not self._starts or segment.start > self._starts[-1]:
            self._starts.append(segment.start)
            self._segments.append(segment)
        else:
            i = bisect_right(self._starts, segment.start)
            self._starts.insert(i, segment.start)
            self._segments.insert(i, segment)
        self._account(segment, 1)

    def _account(self, segment: Segment, sign: int) -> None:
        self.size += sign * segment.length
        if isinstance(segment.source, Upload):
            return
        offset, end, loose = segment.start, segment.end, self.loose
        while offset < end:
            window = offset // WINDOW
            part = min(end, (window + 1) * WINDOW) - offset
            left = loose.get(window, 0) + sign * part
            if left:
                loose[window] = left
            else:
                loose.pop(window, None)
            offset += part

    def cut(self, start: int, end: int) -> None:
        """Forget the bytes in [start, end)."""
        i, j = self._touching(start, end)
        if i == j:
            return
        old = self._segments[i:j]
        del self._starts[i:j], self._segments[i:j]
        for segment in old:
            self._account(segment, -1)
        first, last = old[0], old[-1]
        if first.start < start:
            self._insert(Segment(first.start, start - first.start, first.source, first.at))
        if last.end > end:
            skipped = end - last.start
            self._insert(Segment(end, last.end - end, last.source, last.at + skipped))

    def _touching(self, start: int, end: int) -> tuple[int, int]:
        """Indexes [i, j) of the segments that overlap a range."""
        i = bisect_right(self._starts, start)
        if i and self._segments[i - 1].end > start:
            i -= 1
        j = i
        while j < len(self._segments) and self._starts[j] < end:
            j += 1
        return i, j

    def overlapping(self, start: int, end: int) -> list[Segment]:
        """Segments that overlap a range, in order."""
        i, j = self._touching(start, end)
        return self._segments[i:j]

    def gather(
        self, parts: Sequence[tuple[int, int]], upload: Upload, offsets: Sequence[int]
    ) -> None:
        """Let an upload be the source of `parts` (start, length), at `offsets` in the chunk."""
        for (start, length), at in zip(parts, offsets, strict=True):
            self.cut(start, start + length)
            self._insert(Segment(start, length, upload, at))

    def forget(self, committed: Sequence[Segment]) -> None:
        """Drop what was committed, except where it was written over since."""
        if self._segments == committed:  # the very same: nothing was written since
            self._starts.clear()
            self._segments.clear()
            self.loose.clear()
            self.size = 0
            return
        for segment in committed:
            origin = segment.start - segment.at
            for now in self.overlapping(segment.start, segment.end):
                # Same source at the same place: the same bytes, not a later write of equal ones.
                if now.source is segment.source and now.start - now.at == origin:
                    self.cut(max(now.start, segment.start), min(now.end, segment.end))
