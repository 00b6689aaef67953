"""The last item before a key, found without reading what lies before that.

A tree is read in the order of its keys, so a scan that looks for what may reach into a range has to
begin as far before it as an item can reach, and reads all that lies between.  Here the tree is gone
down once, to the leaf of the key or to its neighbour (a B-tree's predecessor search).
"""

from bisect import bisect_left

from dfs.volume.node import GetNode
from dfs.volume.overlay import Item
from dfs.volume.view import View

PATIENCE = 16  # items of the tree, removed since, that are passed over one by one


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
