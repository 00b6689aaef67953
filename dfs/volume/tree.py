"""The prolly tree of a volume: pure functions over nodes that the caller supplies.

A tree is named by the id of its root; the empty tree is `b""`.  The root is the node of the first
level that has only one.  Equal content has equal roots, whatever the history and whoever built it.

Every function takes `get_node(id) -> Node`, which raises `Missing` for a node it does not have;
the functions let that escape, naming as many missing nodes as they know of.  The caller fetches
them, adds them to its cache and calls again: no function has an effect besides its result.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from dfs.errors import Corrupt
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
from dfs.volume.treeedit import apply, build, missing

__all__ = [
    "EMPTY",
    "Missing",
    "Node",
    "apply",
    "build",
    "check",
    "decode",
    "diff",
    "encode",
    "get",
    "leaves",
    "missing",
    "node_id",
    "reachable",
    "scan",
]

EMPTY = b""
FOLLOWING = 16  # leaves, at least, that a get asks for at once in a sequence of them
FURTHEST = 128  # the same, at most
ABOVE = 4  # the same for nodes of the levels above
AHEAD = 64  # children of one node that a scan asks for at once
Difference = tuple[bytes, bytes | None, bytes | None]  # (key, old value, new value)


def get(get_node: GetNode, root: bytes, key: bytes) -> bytes | None:
    """Value of a key, or None.

    When a node is missing whose left neighbour is there, the next ones are asked for with it: files
    are mostly looked at in the order in which they were made, and so their items are sorted.  The
    more lie there in a row, the more are asked for.
    """
    above: Node | None = None
    upper: Node | None = None  # the node above that one
    at = place = 0
    while root:
        try:
            node = get_node(root)
        except Missing as e:
            left = upper.values[place - 1] if upper is not None and place else b""
            raise Missing(*e.hashes, *_following(get_node, above, at, left=left)) from None
        keys = node.keys
        i = bisect_left(keys, key)
        if i == len(keys):
            return None
        if node.level == 0:
            return node.values[i] if keys[i] == key else None
        upper, place = above, at
        above, at = node, i
        root = node.values[i]
    return None


def _following(
    get_node: GetNode, above: Node | None, at: int, before: int = 1, left: bytes = b""
) -> Iterator[bytes]:
    """What to fetch with the missing child `at` of a node: more, if those `before` it are there.

    `left` names the left neighbour of that node: its children come before.
    """
    if above is None:
        return
    values = above.values
    run = _run(get_node, values, at)
    if run == at < FURTHEST and left:
        try:
            before_it = get_node(left).values
            run += _run(get_node, before_it, len(before_it))
        except Missing:
            pass
    if run < before:
        return
    count = min(max(FOLLOWING, 2 * run), FURTHEST) if above.level == 1 else ABOVE
    yield from _absent(get_node, values[at + 1 : at + count], count)


def _run(get_node: GetNode, ids: Sequence[bytes], end: int) -> int:
    """How many of the nodes before `end` are there, without a gap; looks at no more than matter."""
    for run in range(min(end, FURTHEST)):
        try:
            get_node(ids[end - 1 - run])
        except Missing:
            return run
    return min(end, FURTHEST)


def scan(
    get_node: GetNode,
    root: bytes,
    start: bytes = b"",
    end: bytes | None = None,
    ahead: int = AHEAD,
) -> Iterator[tuple[bytes, bytes]]:
    """Items with start <= key < end in order of keys; `end` None means to the end.

    When a node is missing, `Missing` names it and those of its next `ahead` siblings in the range
    that are missing too; of a leaf also some beyond it, as for `get`.
    """
    for keys, values in leaves(get_node, root, start, end, ahead):
        yield from zip(keys, values, strict=True)


def leaves(
    get_node: GetNode,
    root: bytes,
    start: bytes = b"",
    end: bytes | None = None,
    ahead: int = AHEAD,
) -> Iterator[tuple[Sequence[bytes], Sequence[bytes]]]:
    """What `scan` finds, as the keys and the values of one leaf at a time."""
    if not root:
        return
    # Children yet to be visited, of which node, and which child of it is the first in the range.
    pending: list[tuple[Iterator[bytes], Node | None, int]] = [(iter((root,)), None, 0)]
    while pending:
        children, above, first = pending[-1]
        child = next(children, None)
        if child is None:
            pending.pop()
            continue
        try:
            node = get_node(child)
        except Missing as e:
            more = [*_absent(get_node, children, ahead - 1)]
            if above is not None:
                at = above.values.index(child, first)
                more += _following(get_node, above, at, at - first + 1)
            raise Missing(*dict.fromkeys((*e.hashes, *more))) from None
        keys = node.keys
        low = bisect_left(keys, start)
        high = len(keys) if end is None else bisect_left(keys, end, low)
        if node.level == 0:
            yield keys[low:high], node.values[low:high]
        else:  # the child whose last key is the first one past the range may begin inside it
            pending.append((iter(node.values[low : high + 1]), node, low))


def _absent(get_node: GetNode, ids: Iterable[bytes], limit: int) -> Iterator[bytes]:
    for _, child in zip(range(limit), ids, strict=False):
        try:
            get_node(child)
        except Missing as e:
            yield from e.hashes


def diff(get_node: GetNode, old: bytes, new: bytes) -> list[Difference]:
    """Items that differ between two trees, in order of keys, reading only what differs.

    Goes down both trees level by level and drops the nodes that both have: equal subtrees have
    equal ids, and boundaries lie at the same keys wherever the content is the same.
    """
    if old == new:
        return []
    sides = [[root] if root else [] for root in (old, new)]
    while True:
        absent: list[bytes] = []
        nodes = [_load(get_node, side, absent) for side in sides]
        if absent:
            raise Missing(*absent)
        levels = [side[0].level if side else -1 for side in nodes]
        top = max(levels)
        if top <= 0:
            break
        for i in (0, 1):
            if levels[i] == top:
                sides[i] = [child for node in nodes[i] for child in node.values]
                levels[i] -= 1
        if levels[0] == levels[1]:
            common = set(sides[0]).intersection(sides[1])
            sides = [[child for child in side if child not in common] for side in sides]
    before, after = (
        dict(pair for node in side for pair in zip(node.keys, node.values, strict=True))
        for side in nodes
    )
    changed: list[Difference] = [
        (key, value, after.get(key)) for key, value in before.items() if after.get(key) != value
    ]
    changed += [(key, None, value) for key, value in after.items() if key not in before]
    changed.sort()
    return changed


def _load(get_node: GetNode, ids: Iterable[bytes], absent: list[bytes]) -> list[Node]:
    loaded = []
    for child in ids:
        try:
            loaded.append(get_node(child))
        except Missing as e:
            absent += e.hashes
    return loaded


def reachable(get_node: GetNode, root: bytes, seen: set[bytes]) -> Iterator[tuple[bytes, Node]]:
    """Every node below `root` that is not in `seen`, parents first; adds their ids to `seen`.

    One `seen` for many roots makes walking many snapshots cost their differences.
    """
    pending = [root] if root else []
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        node = get_node(current)
        seen.add(current)
        yield current, node
        if node.level:
            pending.extend(reversed(node.values))


def check(get_node: GetNode, root: bytes, salt: bytes, target: int = TARGET) -> int:
    """Verify that a tree is the canonical one of its content; returns the number of items.

    Raises `Corrupt` naming the first defect.
    """
    if not root:
        return 0
    top = get_node(root)
    if top.level and len(top.keys) == 1:
        raise Corrupt(f"root {root.hex()} has a single child: the tree is taller than need be")
    level = top.level
    row: list[tuple[bytes, bytes]] = [(root, top.keys[-1])]
    while True:
        cut = cutter(salt, level, target)
        below: list[tuple[bytes, bytes]] = []
        absent: list[bytes] = []
        nodes = _load(get_node, [name for name, _ in row], absent)
        if absent:
            raise Missing(*absent)
        previous = None
        for position, ((current, expected), node) in enumerate(zip(row, nodes, strict=True)):
            if node.level != level or node.keys[-1] != expected:
                raise Corrupt(f"tree node {current.hex()} is not what its parent says")
            for i, (key, value) in enumerate(zip(node.keys, node.values, strict=True)):
                if previous is not None and key <= previous:
                    raise Corrupt(f"keys of tree node {current.hex()} do not ascend at {key!r}")
                previous = key
                ends = i == len(node.keys) - 1
                if cut(key, len(value)) != ends and not (ends and position == len(row) - 1):
                    raise Corrupt(f"tree node {current.hex()} is cut wrongly at {key!r}")
                if level:
                    below.append((value, key))
        if level == 0:
            return sum(len(node.keys) for node in nodes)
        level, row = level - 1, below
