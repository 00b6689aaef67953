"""Conflict window: which keys and groups were written since when, in bounded memory.

Optimistic concurrency asks one question: was anything that a transaction read written by a commit
after the sequence number it read at?  The window remembers the last writer of each key and group.
When it is full it forgets its oldest half and raises its `floor`: a transaction that read below
the floor counts as conflicting, since nobody knows any more.  Two windows that recorded the same
journal from the same floor with the same limit give the same answers.
"""

from collections.abc import Iterable

from dfs.volume.effects import DELETE_RANGE, Effect, writes
from dfs.volume.items import GROUP_SIZE


class Window:
    """Last writers of keys and groups with sequence numbers above `floor`.

    An item without a suffix, as an INODE is, is its group's only one: it is among the keys only.
    """

    __slots__ = ("_groups", "_keys", "_ranges", "floor", "limit", "seq")

    def __init__(self, floor: int, limit: int = 200_000) -> None:
        """An empty window that knows everything after `floor`; holds up to `limit` writers."""
        self.floor = floor
        self.seq = floor
        self.limit = limit
        self._keys: dict[bytes, int] = {}
        self._groups: dict[bytes, int] = {}
        self._ranges: dict[bytes, int] = {}  # groups that lost keys nobody listed

    def record(self, seq: int, effects: Iterable[Effect]) -> None:
        """Note what the effects of entry `seq` write; sequence numbers never decrease."""
        effects = tuple(effects)
        keys, groups = writes(effects)
        self.seq = seq
        # Popping first keeps the dicts in the order of last writing, which forgetting relies on.
        table = self._keys
        for name in keys:
            table.pop(name, None)
            table[name] = seq
        written, table = table, self._groups
        for name in groups:
            if written.get(name) != seq:
                table.pop(name, None)
                table[name] = seq
        for effect in effects:
            if effect[0] == DELETE_RANGE:
                name = effect[1][:GROUP_SIZE]
                self._ranges.pop(name, None)
                self._ranges[name] = seq
        if len(self._keys) + len(self._groups) + len(self._ranges) > self.limit:
            self._forget()

    def changed_since(self, base: int, keys: Iterable[bytes], groups: Iterable[bytes] = ()) -> bool:
        """Whether a commit after `base` wrote one of the keys or groups; True when unknown."""
        if base < self.floor:
            return True
        if base >= self.seq:
            return False
        written, ranges = self._keys, self._ranges
        for key in keys:
            if written.get(key, 0) > base:
                return True
            if ranges and ranges.get(key[:GROUP_SIZE], 0) > base:
                return True
        lists = self._groups
        return any(lists.get(name, 0) > base or written.get(name, 0) > base for name in groups)

    def forget(self, floor: int) -> None:
        """Forget writers up to `floor`; transactions that read before it conflict from now on."""
        if floor <= self.floor:
            return
        self.floor = floor
        for table in (self._keys, self._groups, self._ranges):
            stale = []
            for name, seq in table.items():
                if seq > floor:
                    break
                stale.append(name)
            for name in stale:
                del table[name]

    def _forget(self) -> None:
        seqs = [*self._keys.values(), *self._groups.values(), *self._ranges.values()]
        seqs.sort()
        self.forget(seqs[len(seqs) // 2])

    def __len__(self) -> int:
        """Number of writers remembered."""
        return len(self._keys) + len(self._groups) + len(self._ranges)
