"""Where the records of the journals stand in the segments of a node's log, and which are needed."""

from array import array
from collections.abc import Mapping

from dfs.env import DiskFile
from metadata.journalstate import ENTRY, NO_BALLOT, PROMISED, Ballot, Record


class Segment:
    """A segment file and what in it is still needed."""

    __slots__ = ("cramped", "end", "file", "live", "name", "number", "size")

    def __init__(self, number: int, name: str, file: DiskFile, end: int) -> None:
        """A segment whose records end at `end`, as its file does."""
        self.number = number
        self.name = name
        self.file = file
        self.end = end
        self.size = end  # of the file as far as it is known to be durable: zeros follow the end
        self.cramped = False  # no room could be made: a batch has to bring its own
        self.live = 0  # bytes of entries above the base of their journal


class Index:
    """Where one journal's records are: entries from seq `first` on, last promise, last base."""

    __slots__ = ("base", "base_at", "ends", "first", "promise_at", "promised", "segments", "starts")

    def __init__(self) -> None:
        """Nothing is known."""
        self.first = 1
        self.segments = array("Q")  # number of the segment, 0 = not known yet
        self.starts = array("Q")
        self.ends = array("Q")
        self.promised: Ballot = NO_BALLOT
        self.promise_at = 0  # number of a segment, as `base_at`
        self.base: Record | None = None
        self.base_at = 0

    def enter(
        self,
        record: Record,
        segment: Segment,
        start: int,
        end: int,
        segments: Mapping[int, Segment],
        *,
        loose: bool = False,
    ) -> None:
        """Note a record that stands at start..end; `loose`: entries may come out of order.

        `segments` by number; those whose records it replaces need fewer bytes then.
        """
        kind = record[0]
        if kind == ENTRY:
            if not record[5] and record[2] >= self.promised:
                self.promised, self.promise_at = record[2], segment.number
            at = record[1] - self.first
            if at < 0:
                return
            while loose and at > len(self.segments):  # an old segment's entries were copied here
                self.segments.append(0)
                self.starts.append(0)
                self.ends.append(0)
            if at == len(self.segments):
                self.segments.append(segment.number)
                self.starts.append(start)
                self.ends.append(end)
            else:
                self._release(at, segments)
                self.segments[at], self.starts[at], self.ends[at] = segment.number, start, end
            segment.live += end - start
        elif kind == PROMISED:
            if record[1] >= self.promised:
                self.promised, self.promise_at = record[1], segment.number
        elif self.base is None or record[1] >= self.base[1]:
            self.base, self.base_at = record, segment.number
            drop = min(record[1] + 1 - self.first, len(self.segments))
            for at in range(drop):
                self._release(at, segments)
            del self.segments[:drop], self.starts[:drop], self.ends[:drop]
            self.first = record[1] + 1

    def _release(self, at: int, segments: Mapping[int, Segment]) -> None:
        old = segments.get(self.segments[at])
        if old is not None:
            old.live -= self.ends[at] - self.starts[at]
