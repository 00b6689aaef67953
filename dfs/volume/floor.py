"""Items in a few places of many, and the last ones before these, found without reading the others.

A tree is read in the order of its keys, so a scan that looks for what may reach into a range has to
begin as far before it as an item can reach, and reads all that lies between.  For one range the
tree is gone down once instead, to the leaf of the key or to its neighbour (a B-tree's predecessor
search): `last_before`.  Where many ranges lie close together, the keys of a whole stretch are taken
from its leaves, which costs next to nothing for each, and are searched: `Stretch`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from dfs.volume import tree
from dfs.volume.node import GetNode
from dfs.volume.overlay import Item
from dfs.volume.view import View

PATIENCE = 16  # items of the tree, removed since, that are passed over one by one
AT_HAND = 64  # keys after one range that are searched first for the next
SAMPLE = 1024  # items that `Stretch.sample` looks at, at most


def last_before(view: View, low: bytes, key: bytes) -> Item | None:
    """The last item in [low, key), which lie in one group; None if there is none.

    May raise `Missing`.
    """
    overlay = view._overlay
    changed = overlay.items
    keys = overlay.keys(low, key)
    at = len(keys) - 1
    while at >= 0 and changed[keys[at]][1] is None:
        at -= 1
    own: Item | None = None
    if at >= 0:
        value = changed[keys[at]][1]
        assert value is not None  # noqa: S101 - the loop above saw to it
        own = (keys[at], value)
        low = keys[at]
    bound = key
    for _ in range(PATIENCE):
        found = before(view.nodes.get, view.root, bound)
        if found is None or found[0] <= low:
            # The overlay's own item, or the tree's at the very beginning of the range.
            if own is None and found is not None and found[0] == low and _counts(view, low):
                return found
            return own
        if _counts(view, found[0]):
            return found
        bound = found[0]
    last = None
    for last in view.scan(low, bound):  # noqa: B007 - the last one is wanted
        pass
    return last


def _counts(view: View, key: bytes) -> bool:
    """Whether the tree's item of a key is still there as it is."""
    overlay = view._overlay
    return key not in overlay.items and not overlay.hides(key)


def before(get_node: GetNode, root: bytes, key: bytes) -> Item | None:
    """The last item of a tree with a key less than `key`; may raise `Missing`."""
    left = b""  # the nearest subtree whose items all come before
    while root:
        node = get_node(root)
        at = bisect_left(node.keys, key)
        if node.level == 0:
            if at:
                return node.keys[at - 1], node.values[at - 1]
            break
        at = min(at, len(node.keys) - 1)
        if at:
            left = node.values[at - 1]
        root = node.values[at]
    while left:
        node = get_node(left)
        if node.level == 0:
            return node.keys[-1], node.values[-1]
        left = node.values[-1]
    return None


class Stretch:
    """The items of a view in [start, end), which lie in one group: to look at a few of many.

    May raise `Missing`.  It is of no use any more once the view has changed.
    """

    __slots__ = ("_keys", "_overlay", "_own", "_values")

    def __init__(self, view: View, start: bytes, end: bytes) -> None:
        """Take the keys there are; values of the view's own changes are looked up when wanted."""
        self._overlay = view._overlay
        self._own = self._overlay.keys(start, end)
        self._keys: list[bytes] = []
        self._values: list[bytes] = []
        for keys, values in tree.leaves(view.nodes.get, view.root, start, end):
            self._keys += keys
            self._values += values

    def near(self, ranges: Iterable[tuple[bytes, bytes]]) -> list[Item]:
        """Items in ranges [low, high), which must ascend, and the last item before each; in order.

        Each item once, however many ranges it is the last one before.
        """
        overlay, changed = self._overlay, self._overlay.items
        removed = overlay.ranges
        keys, own, values = self._keys, self._own, self._values
        found: list[Item] = []
        # What lies before these indexes, in the tree and in the overlay, is found or of no use.
        done = own_done = 0
        for low, high in ranges:
            first, stop = _between(keys, low, high, done)
            own_first, own_stop = _between(own, low, high, own_done)
            part: list[Item] = []
            for i in range(first, stop):
                key = keys[i]
                if key not in changed and not (removed and overlay.hides(key)):
                    part.append((key, values[i]))
            for i in range(own_first, own_stop):
                value = changed[own[i]][1]
                if value is not None:
                    part.append((own[i], value))
            before: Item | None = None
            for i in range(first - 1, done - 1, -1):
                key = keys[i]
                if key not in changed and not (removed and overlay.hides(key)):
                    before = key, values[i]
                    break
            for i in range(own_first - 1, own_done - 1, -1):
                if before is not None and own[i] < before[0]:
                    break
                value = changed[own[i]][1]
                if value is not None:
                    before = own[i], value
                    break
            if before is not None:
                found.append(before)
            part.sort()
            found += part
            done, own_done = stop, own_stop
        return found

    def parts(self, edge: Callable[[bytes], bytes]) -> dict[bytes, int]:
        """Parts of the stretch that hold something: where each ends, and about how many items.

        `edge(key)`: the end of the part that a key is in.  Counts are never too low; items that
        were changed or removed since the tree may count twice, or all the same.
        """
        found: dict[bytes, int] = {}
        for keys in (self._keys, self._own):
            i, count = 0, len(keys)
            while i < count:
                end = edge(keys[i])
                j = bisect_left(keys, end, i + 1)
                found[end] = found.get(end, 0) + j - i
                i = j
        return found

    def sample(self) -> tuple[list[Item], int]:
        """Some of the items, evenly chosen, and how many each stands for: all of them if few."""
        overlay, changed = self._overlay, self._overlay.items
        keys, own, values = self._keys, self._own, self._values
        step = 1 + (len(keys) + len(own)) // (SAMPLE + 1)
        found = [(own[i], changed[own[i]][1]) for i in range(0, len(own), step)]
        items = [(key, value) for key, value in found if value is not None]
        for i in range(0, len(keys), step):
            key = keys[i]
            if key not in changed and not overlay.hides(key):
                items.append((key, values[i]))
        return items, step


def _between(keys: Sequence[bytes], low: bytes, high: bytes, start: int) -> tuple[int, int]:
    """Indexes [i, j), not below `start`, of the keys in [low, high); both are likely to be near."""
    count = len(keys)
    near = min(start + AT_HAND, count)
    if near < count and keys[near] < low:
        first = bisect_left(keys, low, near)
    else:
        first = bisect_left(keys, low, start, near)
    stop = first
    while stop < count and keys[stop] < high:
        stop += 1
    return first, stop
