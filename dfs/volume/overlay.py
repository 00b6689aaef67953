"""Overlay: items changed since a base state, on top of which they are read.

The same structure stands for the journal's entries since the tree (in a `View`), for a
transaction's own effects (in a `Txn`) and for the journal that a checkpoint folds.  It is a
`dfs.volume.effects.Target`.

Removing a range does not look at the base: the overlay keeps the range, with its sequence number,
and hides the base's items in it.  An item of the overlay always wins over a range: those the range
removed are marked removed when it comes, those put later are later.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from dfs.volume.items import GROUP_SIZE, group_end

Item = tuple[bytes, bytes]
Range = tuple[bytes, bytes, int]  # start, end, seq

AT_ONCE = 64  # items that `merge` looks up together where the base has none


class Overlay:
    """Changed items by key, an index of them by group, and removed ranges by group.

    `seq` is the sequence number that the next effects get.  The index keeps keys with a suffix
    only: the other groups have one item each.  A group's keys are sorted when first looked at.
    """

    __slots__ = ("_index", "_unsorted", "base", "items", "ranges", "seq")

    def __init__(self, base: Callable[[bytes], bytes | None], seq: int = 0) -> None:
        """An empty overlay over items that `base(key)` reads; it may raise `Missing`."""
        self.base = base
        self.seq = seq
        self.items: dict[bytes, tuple[int, bytes | None]] = {}
        self.ranges: dict[bytes, list[Range]] = {}
        self._index: dict[bytes, list[bytes]] = {}
        self._unsorted: set[bytes] = set()

    # ----------------------------------------------------------------------- writing

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set or remove an item."""
        items = self.items
        if key not in items and len(key) > GROUP_SIZE:
            group = key[:GROUP_SIZE]
            keys = self._index.get(group)
            if keys is None:
                self._index[group] = [key]
            else:
                if key < keys[-1]:
                    self._unsorted.add(group)
                keys.append(key)
        items[key] = (self.seq, value)

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Remove the items in [start, end), which lie in one group."""
        if start >= end:
            return
        gone = (self.seq, None)
        for key in self.keys(start, end):
            self.items[key] = gone
        # Ranges of a group are kept disjoint and sorted: where two overlap the newer one counts,
        # since it will be forgotten later.
        ranges = self.ranges.setdefault(start[:GROUP_SIZE], [])
        low = bisect_left(ranges, (start,))
        if low and ranges[low - 1][1] > start:
            low -= 1
        high = bisect_left(ranges, (end,), low)
        middle = [(start, end, self.seq)]
        if low < high:
            first, last = ranges[low], ranges[high - 1]
            if first[0] < start:
                middle.insert(0, (first[0], start, first[2]))
            if last[1] > end:
                middle.append((end, last[1], last[2]))
        ranges[low:high] = middle

    def absorb(self, other: "Overlay") -> None:
        """Take over the changes of an overlay that was based on this one, under our `seq`."""
        for ranges in other.ranges.values():
            for start, end, _ in ranges:
                self.delete_range(start, end)
        for key, (_, value) in other.items.items():
            self.put(key, value)

    def drop(self, covered: int) -> None:
        """Forget what changed up to `covered`: the base holds it now."""
        kept = {key: item for key, item in self.items.items() if item[0] > covered}
        ranges = {
            group: left
            for group, old in self.ranges.items()
            if (left := [r for r in old if r[2] > covered])
        }
        self.clear()
        self.ranges = ranges
        for key, item in kept.items():
            self.put(key, item[1])
        self.items = kept  # with the sequence numbers they had

    def renumber(
        self, keys: Iterable[bytes], ranges: Sequence[tuple[bytes, bytes]], old: int, new: int
    ) -> None:
        """What was changed, and removed, under the sequence number `old` was changed by `new`."""
        items = self.items
        for key in keys:
            item = items[key]
            if item[0] == old:
                items[key] = (new, item[1])
        for start, end in ranges:
            for key in self.keys(start, end):  # those that the range removed bear its number
                item = items[key]
                if item[0] == old:
                    items[key] = (new, item[1])
        for group in dict.fromkeys(start[:GROUP_SIZE] for start, _ in ranges):
            self.ranges[group] = [
                (start, end, new if seq == old else seq) for start, end, seq in self.ranges[group]
            ]

    def clear(self) -> None:
        """Forget everything."""
        self.items = {}
        self.ranges = {}
        self._index = {}
        self._unsorted = set()

    # ----------------------------------------------------------------------- reading

    def get(self, key: bytes) -> bytes | None:
        """Value of an item, or None; may raise `Missing`."""
        item = self.items.get(key)
        if item is not None:
            return item[1]
        if self.ranges and self.hides(key):
            return None
        return self.base(key)

    def hides(self, key: bytes) -> bool:
        """Whether a removed range hides the base's item of this key."""
        ranges = self.ranges.get(key[:GROUP_SIZE])
        if ranges is None:
            return False
        after = bisect_left(ranges, (key + b"\0",))
        return after > 0 and ranges[after - 1][1] > key

    def keys(self, start: bytes, end: bytes | None) -> list[bytes]:
        """Changed keys in [start, end), in order; those removed too."""
        if len(start) >= GROUP_SIZE:
            group = start[:GROUP_SIZE]
            if end is not None and end <= group_end(group):
                keys = self._index.get(group)
                if keys is None:
                    return [start] if start in self.items and start < end else []
                if group in self._unsorted:
                    self._unsorted.discard(group)
                    keys.sort()
                low = bisect_left(keys, start)
                found = keys[low : bisect_left(keys, end, low)]
                if len(start) == GROUP_SIZE and start in self.items:
                    found.insert(0, start)  # keys without a suffix are not in the index
                return found
        return sorted(key for key in self.items if key >= start and (end is None or key < end))

    def merge(self, base: Iterable[Item], start: bytes, end: bytes | None) -> Iterator[Item]:
        """Items in [start, end) in order, `base` being the base's items there."""
        if self.ranges:
            base = (item for item in base if not self.hides(item[0]))
        keys = self.keys(start, end)
        if not keys:
            yield from base
            return
        items = self.items
        at, count = 0, len(keys)
        for pair in base:
            key = pair[0]
            while at < count and keys[at] < key:
                value = items[keys[at]][1]
                if value is not None:
                    yield keys[at], value
                at += 1
            if at < count and keys[at] == key:
                value = items[key][1]
                if value is not None:
                    yield key, value
                at += 1
            else:
                yield pair
        for i in range(at, count, AT_ONCE):
            part = keys[i : i + AT_ONCE]
            yield from [(k, v) for k in part if (v := items[k][1]) is not None]

    def __len__(self) -> int:
        """Number of changed items."""
        return len(self.items)
