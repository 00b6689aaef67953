"""The newest journal entries of a volume in memory: what answers carry and what a checkpoint folds.

Entries are kept as the bytes objects the journal handed out: an entry is encoded once, by its
proposer, and those bytes go to every client that watches.
"""

from collections import deque
from itertools import islice

from dfs.volume import entries

Numbered = tuple[int, bytes]  # (seq, entry)
TAIL_BYTES = 2 << 20  # kept in memory; the journal has more
ANSWER_BYTES = 8 << 20  # of entries in one answer


def kind_of(entry: bytes) -> int:
    """Kind of an encoded entry without decoding it; -1 for what is none of ours.

    An entry is a msgpack array of less than 16 fields that starts with two numbers under 128.
    """
    if len(entry) < 3 or entry[0] & 0xF0 != 0x90 or entry[1] != entries.VERSION:
        return -1
    return entry[2]


class Tail:
    """Consecutive entries, the newest last, and what lies after the last checkpoint."""

    __slots__ = ("_bytes", "_entries", "_loose", "loose_bytes")

    def __init__(self) -> None:
        """Empty."""
        self._entries: deque[Numbered] = deque()
        self._bytes = 0
        self._loose: deque[tuple[int, int]] = deque()  # (seq, size) a checkpoint would cover
        self.loose_bytes = 0

    def append(self, seq: int, entry: bytes) -> None:
        """The next entry; after a gap the entries before it are forgotten."""
        held = self._entries
        size = len(entry)
        if held and held[-1][0] != seq - 1:
            held.clear()
            self._bytes = 0
        held.append((seq, entry))
        self._bytes += size
        while self._bytes > TAIL_BYTES and len(held) > 1:
            self._bytes -= len(held.popleft()[1])
        if kind_of(entry) != entries.CHECKPOINT:
            self._loose.append((seq, size))
            self.loose_bytes += size

    def cover(self, seq: int) -> None:
        """A checkpoint holds everything up to `seq`."""
        loose = self._loose
        while loose and loose[0][0] <= seq:
            self.loose_bytes -= loose.popleft()[1]

    @property
    def loose(self) -> int:
        """Number of entries that a checkpoint would cover; checkpoints are not among them."""
        return len(self._loose)

    def between(self, after: int, upto: int) -> tuple[Numbered, ...] | None:
        """Entries in (after, upto], the oldest `ANSWER_BYTES` of them; None if not all are held."""
        if upto <= after:
            return ()
        held = self._entries
        if not held or after + 1 < held[0][0] or upto > held[-1][0]:
            return None
        first = after + 1 - held[0][0]
        count = upto - after
        if count == 1 and upto == held[-1][0]:
            return (held[-1],)
        found = tuple(islice(held, first, first + count))
        size = 0
        for i, (_, entry) in enumerate(found):
            size += len(entry)
            if size > ANSWER_BYTES and i:
                return found[:i]
        return found

    def __len__(self) -> int:
        """Number of entries in memory."""
        return len(self._entries)
