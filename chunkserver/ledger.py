"""What the records of all segments add up to: one function applies them, live and at recovery.

`Ledger.apply` is called with every record in log order, by the running server right after it wrote
the record, and at a start with what the hints and scans say.  So a recovered server and one that
never stopped cannot disagree, and what is checked for one holds for the other.
"""

from dataclasses import dataclass, field

from chunkserver.index import Entry, Index
from chunkserver.records import PUT, TOMBSTONE, TOUCH, Record


@dataclass(slots=True)
class Usage:
    """Why a segment cannot be unlinked yet."""

    refs: int = 0  # chunks whose bytes, and chunks whose newest stamp, are here
    killed: dict[int, int] = field(default_factory=dict)  # segment -> records here that kill there
    youngest: int = 0  # stamp of the newest tombstone here


class Ledger:
    """Index, verdicts of the collector, and what each segment is still needed for.

    A segment may go when nothing refers to it, every earlier PUT that its tombstones kill is gone
    with its own segment (else the next start would bring the chunk back), and its tombstones are
    so old that no other server still holds what they condemn.
    """

    def __init__(self, remember: int) -> None:
        """Keep verdicts for `remember` nanoseconds."""
        self.index = Index()
        self.dead: dict[bytes, int] = {}  # chunk id -> stamp of its tombstone
        self.segments: dict[int, Usage] = {}
        self._remember = remember

    def apply(self, number: int, record: Record) -> Entry | None:
        """Account for one record of segment `number`; returns the entry it made garbage, if any."""
        kind, chunk_id, stamp = record.type, record.chunk_id, record.stamp
        old = self.index.get(chunk_id)
        if kind == PUT:
            self.dead.pop(chunk_id, None)
            if old is not None:
                self._release(old)
                stamp = max(stamp, old.stamp)
            new = Entry(number, record.payload, record.size, record.extra, stamp, number)
            self.index.put(chunk_id, new)
            self.segments[number].refs += 2
            return old
        if kind == TOUCH:
            if old is not None and stamp > old.stamp:
                self._unref(old.touched)
                self.segments[number].refs += 1
                self.index.put(chunk_id, old._replace(stamp=stamp, touched=number))
            return None
        usage = self.segments[number]
        if record.extra != number:
            usage.killed[record.extra] = usage.killed.get(record.extra, 0) + 1
        if kind == TOMBSTONE:
            self.dead[chunk_id] = stamp
            usage.youngest = max(usage.youngest, stamp)
        return self.discard(chunk_id)

    def discard(self, chunk_id: bytes) -> Entry | None:
        """Forget a chunk as if its PUT had never been written; returns its entry."""
        old = self.index.pop(chunk_id)
        if old is not None:
            self._release(old)
        return old

    def _release(self, entry: Entry) -> None:
        self._unref(entry.segment)
        self._unref(entry.touched)

    def _unref(self, number: int) -> None:
        usage = self.segments.get(number)
        if usage is not None:
            usage.refs -= 1

    def removable(self, active: int, now: int) -> list[int]:
        """Numbers of segments that may be unlinked, oldest first; `now` in ns."""
        out = []
        left = set(self.segments)
        for number in sorted(self.segments):
            usage = self.segments[number]
            if (
                number != active
                and usage.refs == 0
                and usage.youngest <= now - self._remember
                and not any(target in left for target in usage.killed)
            ):
                out.append(number)
                left.discard(number)
        return out

    def forget(self, number: int) -> None:
        """A segment was unlinked."""
        del self.segments[number]
        for usage in self.segments.values():
            usage.killed.pop(number, None)

    def prune(self, now: int) -> None:
        """Forget verdicts that are old enough."""
        limit = now - self._remember
        for chunk_id in [i for i, stamp in self.dead.items() if stamp <= limit]:
            del self.dead[chunk_id]

    def condemned(self, chunk_id: bytes, stamp: int) -> bool:
        """Whether the collector condemned the copy that was last put or touched at `stamp`."""
        return self.dead.get(chunk_id, -1) >= stamp
