"""Own rows: those that nobody else has, and that no damaged table may hide.

A node's own state is a few rows among many others, and belongs into their batches.  In a table it
would share blocks with rows that other nodes have a copy of: those are made good, it would be lost.
So keys that begin with certain bytes (`StoreOptions.own`) are kept in the log.  Whenever a memtable
begins it begins with all of them, in the first record of its log segment, and the older segments go
only when that is durable.  Reads of own rows look at memtables and at nothing else.  A log that
cannot be trusted stops the node anyway, whatever it holds.  Own rows do not expire.

A row of its own, `mark`, says that a memtable began so: an older store has its own rows in tables,
where they are read one last time.  Of memtables that were read back from the log all that are newer
than a mark, and the one that has it, hold all own rows together.
"""

from collections.abc import Sequence

from metadata.store.memtable import Memtable, Value

Pair = tuple[bytes, Value]
_VALUE = b"\1"  # of the mark: its format


def mark(own: bytes) -> Pair:
    """The row that says that a memtable has all own rows; `own` are their first bytes."""
    return own[:1] + b"kept", _VALUE


def is_own(own: bytes, start: bytes, end: bytes) -> bool:
    """Whether all keys in [start, end) are own ones; an empty `end` is the end of the key space."""
    first = start[:1]
    return b"" != first in own and b"" != end <= bytes((first[0] + 1,))


def rows_of(memtable: Memtable, own: bytes) -> list[Pair]:
    """The own rows of a memtable that has them all; what it deletes no other source can show."""
    return [(k, v) for k, v in memtable.data.items() if k[0] in own and v is not None]


def gather(memtables: Sequence[Memtable], own: bytes) -> list[Pair] | None:
    """All own rows, if the memtables (newest first) have them; None: some may be in tables."""
    found: dict[bytes, Value] = {}
    for memtable in memtables:
        for key, value in memtable.data.items():
            if key[0] in own:
                found.setdefault(key, value)
    if mark(own)[0] not in found:
        return None
    return [(key, value) for key, value in found.items() if value is not None]


def size(rows: Sequence[Pair]) -> int:
    """Bytes that rows take in a memtable, about."""
    memtable = Memtable([])
    memtable.apply(rows)
    return memtable.bytes
