"""Cache of decoded tree nodes, bounded in bytes."""

from collections.abc import Mapping

from dfs.errors import Corrupt
from dfs.volume.node import Missing, Node, decode, node_id


class NodeCache:
    """Least recently used nodes by id; `get` is the `get_node` of the tree's functions.

    Least recently used is first in a plain dict: a hit takes its node out and puts it back at the
    end.  Eviction drops a sixteenth of the budget at once, because looking for the first item of a
    dict steps over all that were taken out before it.

    The budget must hold the nodes that one operation touches (a few MiB do), or fetching its last
    missing node drops its first one.
    """

    __slots__ = ("_hits", "_misses", "_nodes", "added", "budget", "evicted", "used")

    def __init__(self, budget: int = 64 << 20) -> None:
        """A cache of up to `budget` bytes of memory."""
        self.budget = budget
        self.used = 0
        self.added = 0  # bytes of all nodes that ever came
        self.evicted = 0
        self._hits = 0
        self._misses = 0
        self._nodes: dict[bytes, Node | bytes] = {}  # bytes until it is looked at

    def get(self, name: bytes) -> Node:
        """The node with this id; raises `Missing`."""
        node = self._nodes.pop(name, None)
        if node is None:
            self._misses += 1
            raise Missing(name)
        if isinstance(node, bytes):
            self._nodes[name] = node = self._decoded(node)
            if self.used > self.budget + (self.budget >> 3):  # decoded it takes twice as much
                self._evict()
            self._hits += 1
            return node
        self._nodes[name] = node
        self._hits += 1
        return node

    def add(self, blobs: Mapping[bytes, bytes]) -> None:
        """Add encoded nodes by id; raises `Corrupt` when bytes do not hash to their id."""
        nodes = self._nodes
        for name, data in blobs.items():
            actual = node_id(data)
            if actual != name:
                raise Corrupt(f"bytes of tree node {name.hex()} hash to {actual.hex()}")
            if name not in nodes:
                node = decode(data)
                nodes[name] = node
                self.used += node.cost
                self.added += node.cost
        if self.used > self.budget:
            self._evict()

    def keep(self, blobs: Mapping[bytes, bytes]) -> None:
        """Add encoded nodes that somebody else has verified, and that may never be looked at.

        They are decoded when they are; `get` raises `Corrupt` for bytes that are no node.
        """
        nodes = self._nodes
        for name, data in blobs.items():
            if name not in nodes:
                nodes[name] = data
                cost = _cost(data)
                self.used += cost
                self.added += cost
        if self.used > self.budget:
            self._evict()

    def _decoded(self, data: bytes) -> Node:
        self.used -= _cost(data)
        node = decode(data)
        self.used += node.cost
        return node

    def drop_unseen(self) -> None:
        """Drop what was kept and never looked at."""
        nodes = self._nodes
        for name, node in list(nodes.items()):
            if isinstance(node, bytes):
                del nodes[name]
                self.used -= _cost(node)
                self.evicted += 1

    def __contains__(self, name: object) -> bool:
        """Whether the node is cached."""
        return name in self._nodes

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._nodes)

    def clear(self) -> None:
        """Drop all nodes."""
        self._nodes.clear()
        self.used = 0

    def statistics(self) -> dict[str, int]:
        """Counters for people and metrics."""
        return {
            "nodes": len(self._nodes),
            "used": self.used,
            "budget": self.budget,
            "hits": self._hits,
            "misses": self._misses,
            "evicted": self.evicted,
        }

    def _evict(self) -> None:
        goal = self.budget - (self.budget >> 4)
        left, count = self.used, len(self._nodes)
        victims: list[bytes] = []
        for name, node in self._nodes.items():
            if left <= goal or len(victims) == count - 1:
                break
            victims.append(name)
            left -= _cost(node) if isinstance(node, bytes) else node.cost
        for name in victims:
            del self._nodes[name]
        self.evicted += len(victims)
        self.used = left


def _cost(data: bytes) -> int:
    """Bytes of memory that an encoded node takes, with its place in the dict."""
    return len(data) + 200
