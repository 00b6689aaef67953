"""Building prolly trees: from scratch, and from an old tree and edits, with equal results.

An edit changes nodes of its level only from the node it falls in to the next boundary that
survives: whether an item ends a node depends on nothing else (`dfs.volume.node`).  So each level
re-cuts the few nodes that edits fall in, going on into the next node while the last one is left
open, and hands the level above an edit for each node that went or came.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from dfs.volume.node import (
    TARGET,
    GetNode,
    Missing,
    Node,
    cutter,
    decode,
    encode,
    node_id,
)

Edit = tuple[bytes, bytes | None]  # (key, value or None to remove it)
Cut = Callable[[bytes, int], bool]
Nodes = dict[bytes, bytes]  # id -> encoded node


def build(
    items: Iterable[tuple[bytes, bytes]], salt: bytes, target: int = TARGET
) -> tuple[bytes, Nodes]:
    """(root, nodes) of the tree that holds `items`, whose keys must ascend strictly."""
    nodes: Nodes = {}
    root, _ = _grow(list(items), 0, salt, target, nodes)
    return root, nodes


def _grow(
    items: Sequence[tuple[bytes, bytes]], level: int, salt: bytes, target: int, nodes: Nodes
) -> tuple[bytes, int]:
    """Build the levels from `level` up; (root, its level)."""
    if not items:
        return b"", 0
    while True:
        cut = cutter(salt, level, target)
        keys = [key for key, _ in items]
        values = [value for _, value in items]
        cuts = [i for i, (key, value) in enumerate(items, 1) if cut(key, len(value))]
        if not cuts or cuts[-1] != len(keys):
            cuts.append(len(keys))
        items = [
            (last, _store(level, part, part_values, nodes))
            for last, part, part_values in _parts(keys, values, cuts)
        ]
        if len(items) == 1:
            return items[0][1], level
        level += 1


def _parts(
    keys: list[bytes], values: list[bytes], cuts: list[int]
) -> Iterable[tuple[bytes, list[bytes], list[bytes]]]:
    start = 0
    for end in cuts:
        yield keys[end - 1], keys[start:end], values[start:end]
        start = end


def _store(level: int, keys: list[bytes], values: list[bytes], nodes: Nodes) -> bytes:
    data = encode(level, keys, values)
    name = node_id(data)
    nodes[name] = data
    return name


def apply(
    get_node: GetNode,
    root: bytes,
    edits: Sequence[Edit],
    salt: bytes,
    target: int = TARGET,
) -> tuple[bytes, Nodes]:
    """(root, new nodes) of the tree `root` after edits, whose keys must ascend strictly.

    Every node reachable from the new root is among the new nodes or reachable from the old root.
    Raises `Missing` with all the nodes of one level that are known to be needed.
    """
    if not root:
        return build([(key, value) for key, value in edits if value is not None], salt, target)
    nodes: Nodes = {}
    top = get_node(root)
    absent = missing(get_node, root, [key for key, _ in edits])
    if absent:
        raise Missing(*absent)
    level = 0
    while True:
        cut = cutter(salt, level, target)
        changes = _edit_level(_Cursor(get_node, root, top, level), edits, cut, nodes)
        if not changes:
            return root, {}
        edits = sorted(changes.items())
        if level == top.level:
            break
        level += 1
    # All nodes of the root's level are new, except perhaps the old root with siblings before it.
    row = [(key, name) for key, name in edits if name is not None]
    if top.keys[-1] not in changes:
        row.append((top.keys[-1], root))
        row.sort()
    if len(row) == 1:
        return _shrink(get_node, row[0][1], nodes), nodes
    return _grow(row, level + 1, salt, target, nodes)[0], nodes


def missing(get_node: GetNode, root: bytes, keys: Sequence[bytes]) -> tuple[bytes, ...]:
    """Ids of the nodes that are missing on the way to ascending `keys`; empty if all are there.

    Fetching them may uncover more below: ask again.
    """
    absent: list[bytes] = []
    frontier = [(root, 0, len(keys))] if root and keys else []
    while frontier:
        below = []
        for child, low, high in frontier:
            try:
                node = get_node(child)
            except Missing as e:
                absent += e.hashes
                continue
            if node.level:
                last = len(node.keys) - 1
                i = bisect_left(node.keys, keys[low])
                while low < high:
                    if i >= last:  # also keys past the end: the last child is where they would go
                        below.append((node.values[last], low, high))
                        break
                    split = bisect_left(keys, node.keys[i] + b"\0", low, high)
                    below.append((node.values[i], low, split))
                    low = split
                    if low < high:
                        i = bisect_left(node.keys, keys[low], i + 1)
        frontier = below
    return tuple(absent)


class _Cursor:
    """A place among the nodes of one level of a tree; only moves forward."""

    __slots__ = ("get_node", "level", "name", "node", "path")

    def __init__(self, get_node: GetNode, root: bytes, top: Node, level: int) -> None:
        self.get_node = get_node
        self.level = level
        self.path: list[tuple[Node, int]] = []  # ancestors, with the index of the child taken
        self.node = top
        self.name = root
        if top.level > level:
            self._descend(top, 0)

    def _descend(self, node: Node, index: int) -> None:
        path = self.path
        while True:
            path.append((node, index))
            self.name = node.values[index]
            node = self.get_node(self.name)
            if node.level == self.level:
                self.node = node
                return
            index = 0

    def last(self) -> bool:
        """Whether this is the last node of the level."""
        return all(index == len(node.keys) - 1 for node, index in self.path)

    def seek(self, key: bytes) -> None:
        """Go to the first node whose last key is >= key, or else to the last node."""
        path = self.path
        if not path or self.node.keys[-1] >= key:
            return
        while len(path) > 1 and path[-1][0].keys[-1] < key:
            path.pop()
        node, index = path.pop()
        while True:
            keys = node.keys
            index = min(bisect_left(keys, key, index), len(keys) - 1)
            path.append((node, index))
            self.name = node.values[index]
            node = self.get_node(self.name)
            if node.level == self.level:
                self.node = node
                return
            index = 0

    def step(self) -> None:
        """Go to the next node; there must be one."""
        before = self.path[:], self.name
        path = self.path
        node, index = path.pop()
        while index == len(node.keys) - 1:
            node, index = path.pop()
        try:
            self._descend(node, index + 1)
        except Missing:
            self.path, self.name = before
            raise


def _edit_level(
    cursor: _Cursor, edits: Sequence[Edit], cut: Cut, nodes: Nodes
) -> dict[bytes, bytes | None]:
    """Edit one level; returns the edits of the level above and adds new nodes to `nodes`."""
    changes: dict[bytes, bytes | None] = {}
    absent: list[bytes] = []
    level = cursor.level
    done, total = 0, len(edits)
    while done < total:
        cursor.seek(edits[done][0])
        done, old, keys, values, cuts = _recut(cursor, edits, done, cut, absent)
        changes.update(dict.fromkeys(old))
        if keys and (not cuts or cuts[-1] != len(keys)):
            cuts.append(len(keys))
        for last, part, part_values in _parts(keys, values, cuts):
            data = encode(level, part, part_values)
            name = node_id(data)
            if old.get(last) == name:
                del changes[last]
            else:
                changes[last] = name
                nodes[name] = data
    if absent:
        raise Missing(*absent)
    return changes


def _recut(
    cursor: _Cursor, edits: Sequence[Edit], done: int, cut: Cut, absent: list[bytes]
) -> tuple[int, dict[bytes, bytes], list[bytes], list[bytes], list[int]]:
    """Merge edits from number `done` into the nodes from the cursor to the next boundary.

    Returns (number of the first edit beyond, last keys and ids of the nodes consumed, the merged
    keys, their values, the indexes after boundaries).  A missing next node goes to `absent`: the
    result is then useless, but the caller can go on to find what else is missing.
    """
    total = len(edits)
    old: dict[bytes, bytes] = {}
    keys: list[bytes] = []
    values: list[bytes] = []
    cuts: list[int] = []
    while True:
        node_keys, node_values = cursor.node.keys, cursor.node.values
        size, last = len(node_keys), node_keys[-1]
        final = cursor.last()
        old[last] = cursor.name
        taken = 0
        while done < total and (final or edits[done][0] <= last):
            key, value = edits[done]
            place = bisect_left(node_keys, key, taken)
            if place > taken:
                keys += node_keys[taken:place]
                values += node_values[taken:place]
                taken = place
                if place == size and cut(last, len(node_values[-1])):
                    cuts.append(len(keys))
            if place < size and node_keys[place] == key:
                taken = place + 1
            if value is not None:
                keys.append(key)
                values.append(value)
                if cut(key, len(value)):
                    cuts.append(len(keys))
            done += 1
        if taken < size:
            keys += node_keys[taken:]
            values += node_values[taken:]
            # Every node but the last of its level ends with a boundary.
            if not final or cut(last, len(node_values[-1])):
                cuts.append(len(keys))
        if final or len(keys) == (cuts[-1] if cuts else 0):
            return done, old, keys, values, cuts
        try:
            cursor.step()
        except Missing as e:
            absent += e.hashes
            return done, old, keys, values, cuts


def _shrink(get_node: GetNode, root: bytes, nodes: Nodes) -> bytes:
    """The root proper: the node of the first level that has only one."""
    while True:
        data = nodes.get(root)
        node = decode(data) if data is not None else get_node(root)
        if node.level == 0 or len(node.keys) > 1:
            return root
        nodes.pop(root, None)
        root = node.values[0]
