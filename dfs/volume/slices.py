"""Folding in slices of ascending keys, so that memory does not grow with what there is to fold.

What an effect does depends on its own key alone, so effects may be applied key range by key range
instead of in their order.  A fold of each slice, on the tree that the slices before it made, gives
the tree that folding all of them at once would give, because equal content is an equal tree; but
only the nodes of one slice have to be at hand at the same time.

Edits at keys from `beyond` on change no node whose last key is before `beyond`, except the last
one of a level, which is open at its end: a node is cut anew if an edit falls in it, or if the one
before it was left open.  So most of what a slice made is final (`settle`), and only a few nodes at
its end wait for the next one.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from operator import itemgetter

from dfs.volume.effects import DELETE_RANGE, Effect
from dfs.volume.items import GROUP_SIZE
from dfs.volume.node import decode
from dfs.volume.treeedit import Nodes

SLICE = 512  # effects of a slice; each may touch a leaf of some 20 KB in memory
PART = 50_000  # effects that are in memory at the same time, about; 250 bytes each
STEP = 61  # every so-manieth effect is a sample; prime, as what happens again and again is not


def slices(
    wanted: Iterable[Effect], size: int = SLICE, part: int = PART
) -> Iterator[tuple[list[Effect], bytes]]:
    """The effects in slices of about `size`, with the key from which on all later ones are.

    That is `b""` with the last slice.  Effects on one key, and those of a group of which a range is
    removed, stay together and in order.  `wanted` is gone through once, and again for every `part`
    effects of it, about: as many are held at a time.
    """
    ranged: dict[bytes, None] = {}
    samples: list[bytes] = []
    count = 0
    for count, effect in enumerate(wanted, 1):
        if effect[0] == DELETE_RANGE:
            ranged[effect[1][:GROUP_SIZE]] = None
        if count % STEP == 0:
            samples.append(effect[1])

    def place_of_group(effect: Effect) -> bytes:
        key: bytes = effect[1]
        group = key[:GROUP_SIZE]
        return group if group in ranged else key

    place: Callable[[Effect], bytes] = place_of_group if ranged else itemgetter(1)
    bounds = _bounds(samples, -(-count // part), ranged)
    for low, high in pairwise([*bounds, b""]):
        if high:
            effects = [effect for effect in wanted if low <= place(effect) < high]
        else:
            effects = [effect for effect in wanted if low <= place(effect)]
        effects.sort(key=place)  # stable: the order of those in one place remains
        count -= len(effects)
        begin = 0
        while begin < len(effects):
            end = begin + size
            while end < len(effects) and place(effects[end]) == place(effects[end - 1]):
                end += 1
            yield effects[begin:end], place(effects[end]) if end < len(effects) else high
            begin = end
    if count:
        raise ValueError(f"{count} effects were not there any more when they were read again")


def _bounds(samples: list[bytes], parts: int, ranged: dict[bytes, None]) -> list[bytes]:
    """Places at which parts of about equal size begin, in order; the first one is `b""`."""
    samples.sort()
    bounds = {b"": None}
    for n in range(1, parts):
        key = samples[n * len(samples) // parts] if samples else b""
        group = key[:GROUP_SIZE]
        bounds[group if group in ranged else key] = None
    return list(bounds)


def settle(held: Nodes, root: bytes, beyond: bytes) -> tuple[Nodes, Nodes]:
    """(final nodes, nodes that later slices may still replace) of the new ones below `root`.

    `held` are all that were made and are not final yet.  Those that the tree has replaced since are
    left out.
    """
    final: Nodes = {}
    kept: Nodes = {}
    pending = [(root, True)]  # and whether it is the last node of its level
    while pending:
        name, last = pending.pop()
        data = held.get(name)
        if data is None:
            continue
        node = decode(data)
        if beyond and (last or node.keys[-1] >= beyond):
            kept[name] = data
        else:
            final[name] = data
        if node.level:
            pending += [(child, False) for child in node.values]
            pending[-1] = (node.values[-1], last)
    return final, kept
