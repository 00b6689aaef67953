"""LocalTxn: a transaction that nobody will judge.

Who only looks, or holds the volume's delegation, is in nobody's way: what such a transaction read
need not be known afterwards, and its writes become part of the view as final values, not as effects
on what others may have made of the items.  So it keeps its changes by key and records nothing else.
Operations do not see the difference.
"""

from collections.abc import Sequence
from itertools import islice

from dfs.volume import tree
from dfs.volume.effects import Change, patched
from dfs.volume.overlay import Overlay
from dfs.volume.view import Txn, View


class LocalTxn(Txn):
    """A transaction on a view: `changes` by key (None: removed), and `ranges` removed before them.

    `size`: bytes of the values that were put.  A patch reads its item, so it may raise `Missing`.
    """

    __slots__ = ("changes", "ranges", "size")

    def __init__(self, view: View) -> None:
        """On the state as it is now, which must not change until the operation has ended."""
        self.view = view
        self.changes: dict[bytes, bytes | None] = {}
        self.ranges: list[tuple[bytes, bytes]] = []
        self.size = 0

    def get(self, key: bytes) -> bytes | None:
        """Value of an item, or None."""
        changes = self.changes
        if key in changes:
            return changes[key]
        if self.ranges and any(start <= key < end for start, end in self.ranges):
            return None
        return self.view._overlay.get(key)

    def reads(self, group: bytes) -> None:
        """Nobody asks."""

    def _scan(
        self, group: bytes, start: bytes, end: bytes, limit: int | None
    ) -> list[tuple[bytes, bytes]]:
        ahead = tree.AHEAD if limit is None else min(limit // 50 + 1, tree.AHEAD)
        found = self.view.scan(start, end, ahead)
        if self.ranges or any(start <= key < end for key in self.changes):
            own = Overlay(self.view.get)
            for begin, stop in self.ranges:
                own.delete_range(begin, stop)
            for key, value in self.changes.items():
                own.put(key, value)
            found = own.merge(found, start, end)
        return list(found if limit is None else islice(found, limit))

    def put(self, key: bytes, value: bytes) -> None:
        """Create or replace an item."""
        self.changes[key] = value
        self.size += len(value)

    def delete(self, key: bytes) -> None:
        """Remove an item; fine if it is absent."""
        self.changes[key] = None

    def patch(self, key: bytes, changes: Sequence[Change]) -> None:
        """Change fields of an item; nothing happens if it is absent."""
        old = self.get(key)
        if old is not None:
            self.changes[key] = patched(old, changes)

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Remove the items with start <= key < end, which lie in one group."""
        if start >= end:
            return
        for key in self.changes:
            if start <= key < end:
                self.changes[key] = None
        self.ranges.append((start, end))
