"""Chains of real cluster maps for simulations, made once per process, and keys where they change.

A chain is one cluster's history under an operator: create, then changes (add, drain, fill again,
replace one, swap three), each begun and advanced twice.  Which epoch nodes may move to, and when,
is the simulation's business: the maps of a chain are the same however the schedule goes.
"""

from functools import cache
from random import Random
from typing import NamedTuple

from dfs.cluster.map import METADATA, ClusterMap
from dfs.cluster.node import Node, Params
from dfs.hashing import digest, partition_of

CHAINS = 24
PARTITIONS = 64  # of the 4096, those that the simulation looks at
CHANGES = 4
_CHUNKSERVERS = tuple(range(8000, 8005))  # they only give the chunk table something to name
SIZES = (5, 5, 5, 6, 6, 7, 5, 7, 9, 5, 6, 8, 3, 4, 5, 6, 7, 9, 5, 6, 20, 5, 30, 50)
KEYS = 60_000


class Chain(NamedTuple):
    """Maps of consecutive epochs, the first of which is 1."""

    maps: tuple[ClusterMap, ...]
    kinds: tuple[str, ...]  # what each change was
    hot: tuple[int, ...]  # partitions that change most often
    cold: tuple[int, ...]  # partitions that change least often

    def at(self, epoch: int) -> ClusterMap:
        """The map of an epoch."""
        return self.maps[epoch - 1]


def node_id(number: int) -> bytes:
    """The id of a simulated node's data directory."""
    return digest(b"node %d" % number)[:16]


def member(number: int, *, weight: float = 1.0) -> Node:
    """A metadata node; its zone follows its number."""
    return Node(
        number,
        node_id(number),
        f"n{number}",
        f"z{number % 3}",
        "",
        f"h{number}",
        f"tcp://n{number}:1",
        "",
        weight,
        0.0,
    )


def _chunkserver(number: int) -> Node:
    name = f"c{number}"
    return Node(number, node_id(number), name, name, "", name, "", f"tcp://{name}:1", 0.0, 1.0)


_STORES = tuple(_chunkserver(i) for i in _CHUNKSERVERS)


@cache
def chain(number: int) -> Chain:
    """The chain of that number, 0..CHAINS-1: sizes from 3 to 50 nodes, N of 3 and sometimes 5."""
    random = Random(number)
    size = SIZES[number]
    n = 5 if size >= 7 and number % 2 else min(3, size)
    params = Params(n, n // 2 + 1, n // 2 + 1, n // 2 + 1)
    weights = dict.fromkeys(range(size), 1.0)
    fresh = size
    maps = [ClusterMap.create(bytes(16), [*_members(weights), *_STORES], params=params)]
    kinds: list[str] = []
    drained: list[int] = []
    for _ in range(CHANGES if size <= 9 else 2):
        kind = random.choice(("add", "drain", "swap", "swap", "replace", "refill", "refill"))
        full = [i for i, w in weights.items() if w > 0 and i not in drained]
        if kind == "refill" and not drained:
            kind = "drain"
        if kind == "drain" and len(full) <= n:
            kind = "add"
        leaving: list[int] = []
        fresh_ones = 0
        if kind == "drain":
            drained.append(random.choice(full))
            weights[drained[-1]] = 0.0
        elif kind == "refill":
            weights[drained.pop()] = 1.0
        elif kind == "swap":  # few homes stay where they were
            out = random.sample(full, min(3, len(full)))
            back = drained if random.random() < 0.7 else []
            drained = [i for i in drained if i not in back] + out
            weights |= dict.fromkeys(out, 0.0) | dict.fromkeys(back, 1.0)
            fresh_ones = max(0, len(out) - len(back))
        elif kind == "replace":
            leaving = [random.choice(full)]
            del weights[leaving[0]]
        if kind in ("add", "replace"):
            fresh_ones = 1
        for _ in range(fresh_ones):
            weights[fresh] = 1.0
            fresh += 1
        kinds.append(kind)
        maps.append(maps[-1].begin([*_members(weights), *_STORES], leaving=leaving))
        while maps[-1].transition is not None:
            maps.append(maps[-1].advance())
    for m in maps:  # whoever asks what changes is told of the partitions looked at only
        m._changed[METADATA] = tuple(p for p in m.changed(METADATA) if p < PARTITIONS)
    return Chain(tuple(maps), tuple(kinds), *_temperatures(maps))


def _members(weights: dict[int, float]) -> list[Node]:
    return [member(i, weight=w) for i, w in sorted(weights.items())]


def _temperatures(maps: list[ClusterMap]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    counts = [0] * PARTITIONS
    for m in maps:
        if m.phase(METADATA) == 1:
            for partition in m.changed(METADATA):
                old = m.old_homes(METADATA, partition)
                counts[partition] += sum(n not in old for n in m.homes(METADATA, partition))
    order = sorted(range(len(counts)), key=lambda p: (-counts[p], p))
    return tuple(order[:8]), tuple(order[-8:])


@cache
def _index() -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for i in range(KEYS):
        key = b"k%d" % i
        found.setdefault(partition_of(digest(b"\x00" + key)), []).append(key)
    return found


def keys_of(partition: int, count: int) -> tuple[bytes, ...]:
    """`count` user keys (space 0) of the partition."""
    return tuple(_index()[partition][:count])
