"""Cache of tree nodes, bounded in bytes: decoded while they are in use, compressed afterwards."""

from collections.abc import Mapping

from zstandard import ZstdCompressor, ZstdDecompressor

from dfs.errors import Corrupt
from dfs.volume.node import Missing, Node, decode, encode, node_id

LEVEL = 1  # of zstd: a node of inodes becomes a tenth, one of names a third


class NodeCache:
    """Least recently used nodes by id; `get` is the `get_node` of the tree's functions.

    What does not fit decoded is kept compressed, in up to three eighths of the budget.  Unpacking a
    node takes a tenth of what fetching it takes (25 us), and packed a node of inodes takes less
    than a twentieth of the room.  So what is many times larger than what fits decoded can be looked
    at in any order, like the inodes of a large directory, whose names are in the order of a hash.

    Least recently used is first in a plain dict: a hit takes its node out and puts it back at the
    end.  Eviction drops a sixteenth of the budget at once, because looking for the first item of a
    dict steps over all that were taken out before it.

    The budget must hold the nodes that one operation touches (a few MiB do), or fetching its last
    missing node drops its first one.
    """

    __slots__ = (
        "_compress", "_decompress", "_hits", "_misses", "_nodes", "_packed", "_unpacked",
        "added", "budget", "evicted", "packed", "used",
    )  # fmt: skip

    def __init__(self, budget: int = 64 << 20, *, pack: bool = True) -> None:
        """A cache of up to `budget` bytes of memory; without `pack` of decoded nodes only."""
        self.budget = budget
        self.used = 0
        self.packed = 0  # of them for compressed nodes
        self.added = 0  # bytes of all nodes that ever came
        self.evicted = 0
        self._hits = 0
        self._misses = 0
        self._unpacked = 0
        self._nodes: dict[bytes, Node | bytes] = {}  # bytes until it is looked at
        # A node that was unpacked stays here too, lest it be compressed again.
        self._packed: dict[bytes, bytes] = {}
        self._compress = ZstdCompressor(level=LEVEL).compress if pack else None
        self._decompress = ZstdDecompressor().decompress

    def get(self, name: bytes) -> Node:
        """The node with this id; raises `Missing`."""
        node = self._nodes.pop(name, None)
        if node is None:
            return self._unpack(name)
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
        nodes, packed = self._nodes, self._packed
        for name, data in blobs.items():
            if name not in nodes and name not in packed:
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

    def _unpack(self, name: bytes) -> Node:
        """A compressed node, which from now on is decoded too; raises `Missing`."""
        data = self._packed.pop(name, None)
        if data is None:
            self._misses += 1
            raise Missing(name)
        self._packed[name] = data
        self._nodes[name] = node = decode(self._decompress(data))
        self.used += node.cost
        self._hits += 1
        self._unpacked += 1
        if self.used > self.budget:
            self._evict()
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
        return name in self._nodes or name in self._packed

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._nodes.keys() | self._packed.keys())

    def clear(self) -> None:
        """Drop all nodes."""
        self._nodes.clear()
        self._packed.clear()
        self.used = self.packed = 0

    def statistics(self) -> dict[str, int]:
        """Counters for people and metrics."""
        return {
            "nodes": len(self),
            "used": self.used,
            "budget": self.budget,
            "hits": self._hits,
            "misses": self._misses,
            "evicted": self.evicted,
            "packed": len(self._packed),
            "unpacked": self._unpacked,
        }

    def _evict(self) -> None:
        """Make room: compress what was used longest ago, and drop what was compressed long ago."""
        goal = self.budget - (self.budget >> 4)
        nodes, packed, compress = self._nodes, self._packed, self._compress
        left, most = self.used, len(nodes) - 1
        victims: list[bytes] = []
        for name, node in nodes.items():
            if left <= goal or len(victims) == most:
                break
            victims.append(name)
            if isinstance(node, bytes):
                left -= _cost(node)
                continue
            left -= node.cost
            if compress is not None and name not in packed:
                data = compress(encode(node.level, node.keys, node.values))
                # A copy: what zstd returns keeps the memory that it might have needed, 8 KiB.
                packed[name] = data = bytes(memoryview(data))
                cost = _cost(data)
                self.packed += cost
                left += cost
        for name in victims:
            del nodes[name]
            self.evicted += name not in packed
        self.used = left
        if self.packed > 3 * self.budget >> 3:
            self._drop_packed(5 * self.budget >> 4)

    def _drop_packed(self, goal: int) -> None:
        victims: list[bytes] = []
        for name, data in self._packed.items():
            if self.packed <= goal:
                break
            victims.append(name)
            cost = _cost(data)
            self.packed -= cost
            self.used -= cost
        for name in victims:
            del self._packed[name]
            self.evicted += name not in self._nodes


def _cost(data: bytes) -> int:
    """Bytes of memory that an encoded node takes, with its place in the dict."""
    return len(data) + 200
