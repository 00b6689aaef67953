"""Fold: the tree that holds a tree's items after some more effects; how checkpoints are made."""

from collections.abc import Iterable

from dfs.volume import effects, tree
from dfs.volume.effects import Effect
from dfs.volume.node import TARGET, GetNode, Missing
from dfs.volume.overlay import Overlay
from dfs.volume.treeedit import Nodes, missing


def fold(
    get_node: GetNode, root: bytes, salt: bytes, wanted: Iterable[Effect], target: int = TARGET
) -> tuple[bytes, Nodes]:
    """(new root, new nodes) of the tree `root` after the effects, in order.

    Raises `Missing`, naming what is missing for all of them: fetch it and call again.
    """
    wanted = list(wanted)
    absent = missing(get_node, root, sorted({effect[1] for effect in wanted}))
    if absent:
        raise Missing(*absent)
    overlay = Overlay(lambda key: tree.get(get_node, root, key))
    effects.apply(overlay, wanted)
    edits = {key: item[1] for key, item in overlay.items.items()}
    absent_ranges: dict[bytes, None] = {}
    for ranges in overlay.ranges.values():
        for start, end, _ in ranges:
            try:
                for key, _value in tree.scan(get_node, root, start, end):
                    edits.setdefault(key, None)
            except Missing as e:
                absent_ranges.update(dict.fromkeys(e.hashes))
    if absent_ranges:
        raise Missing(*absent_ranges)
    return tree.apply(get_node, root, sorted(edits.items()), salt, target)
