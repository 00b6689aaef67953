"""Conflict window: which keys and groups were written since when, in bounded memory.

Optimistic concurrency asks one question: was anything that a transaction read written by a commit
after the sequence number it read at?  The window remembers the last writer of each key and group.
When it is full it forgets its oldest half and raises its `floor`: a transaction that read below
the floor counts as conflicting, since nobody knows any more.  Two windows that recorded the same
journal from the same floor with the same limit give the same answers.

Most of what is recorded is never asked for: who is alone commits without being judged, and what a
checkpoint covers is forgotten.  So entries wait, as they are, and are indexed when somebody asks or
when there are many; one that is forgotten before that was never looked at, and of many that write
the same item only the last is entered.  No answer depends on when that happens.
"""

from collections.abc import Iterable, Sequence
from operator import itemgetter

from dfs.volume.effects import DELETE_RANGE, PATCH, Effect, commutes
from dfs.volume.items import GROUP_SIZE

WAITING = 512  # effects that are not indexed; they are kept whole, so not too many,
HELD = 1 << 20  # nor with values of more bytes than this
_operand = itemgetter(-1)


class Window:
    """Last writers of keys and groups with sequence numbers above `floor`.

    An item without a suffix, as an INODE is, is its group's only one: it is among the keys only.
    """

    __slots__ = (
        "_brief", "_entries", "_groups", "_held", "_keys", "_ranges", "_waiting",
        "floor", "limit", "seq",
    )  # fmt: skip

    def __init__(self, floor: int, limit: int = 200_000, *, brief: bool = False) -> None:
        """An empty window that knows everything after `floor`; holds up to `limit` writers.

        A `brief` one ends soon: it has no limit, and everything waits until somebody asks.
        """
        self._brief = brief
        self.floor = floor
        self.seq = floor
        self.limit = limit
        self._keys: dict[bytes, int] = {}
        self._groups: dict[bytes, int] = {}
        self._ranges: dict[bytes, int] = {}  # groups that lost keys nobody listed
        self._entries: list[tuple[int, Sequence[Effect]]] = []  # those that are not indexed
        self._waiting = 0  # effects of them
        self._held = 0  # bytes of their values

    def record(self, seq: int, effects: Iterable[Effect]) -> None:
        """Note what the effects of entry `seq` write; sequence numbers never decrease."""
        effects = tuple(effects)
        self.seq = seq
        self._entries.append((seq, effects))
        if self._brief:
            return
        self._waiting += len(effects)
        self._held += sum(map(len, map(_operand, effects)))
        # An effect makes three names at most.  When the limit may be near, `floor` has to be right
        # after each entry, so each is indexed at once.
        if (
            self._waiting > WAITING
            or self._held > HELD
            or self._indexed() + 3 * self._waiting > self.limit
        ):
            self._index()

    def _index(self) -> None:
        keys: dict[bytes, int] = {}
        groups: dict[bytes, int] = {}
        ranges: dict[bytes, int] = {}
        for seq, effects in reversed(self._entries):  # the last writer counts
            for effect in effects:
                op, key = effect[0], effect[1]
                if op == PATCH and commutes(effect):
                    continue
                name = key[:GROUP_SIZE]
                if name not in groups:
                    groups[name] = seq
                if op != DELETE_RANGE:
                    if key not in keys:
                        keys[key] = seq
                elif name not in ranges:
                    ranges[name] = seq
        self._entries = []
        self._waiting = self._held = 0
        # Popping first keeps the dicts in the order of last writing, which forgetting relies on.
        for table, new in ((self._keys, keys), (self._groups, groups), (self._ranges, ranges)):
            for name in reversed(new):
                table.pop(name, None)
                if new is not groups or self._keys.get(name) != new[name]:
                    table[name] = new[name]
        if self._indexed() > self.limit and not self._brief:
            self._forget()

    def _indexed(self) -> int:
        return len(self._keys) + len(self._groups) + len(self._ranges)

    def changed_since(self, base: int, keys: Iterable[bytes], groups: Iterable[bytes] = ()) -> bool:
        """Whether a commit after `base` wrote one of the keys or groups; True when unknown."""
        if base < self.floor:
            return True
        if base >= self.seq:
            return False
        if self._entries:
            self._index()
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
        before, self.floor = self.floor, floor
        known = self._entries
        if known and known[0][0] <= floor:
            self._entries = [entry for entry in known if entry[0] > floor]
            self._waiting = sum(len(effects) for _, effects in self._entries)
            self._held = sum(len(e[-1]) for _, effects in self._entries for e in effects)
        if not self._indexed():
            return
        tables = self._keys, self._groups, self._ranges
        if self.seq - floor < floor - before:  # few entries stay, and probably few names
            self._keys, self._groups, self._ranges = (_newer(table, floor) for table in tables)
            return
        for table in tables:
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
        if self._entries:
            self._index()
        return self._indexed()


def _newer(table: dict[bytes, int], floor: int) -> dict[bytes, int]:
    """What a table, in the order of last writing, has from after `floor`."""
    kept = []
    for item in reversed(table.items()):
        if item[1] <= floor:
            break
        kept.append(item)
    return dict(reversed(kept))
