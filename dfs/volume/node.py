"""Nodes of the prolly tree: their encoding, their identity and where one ends.

A node is the tuple `(MAGIC, version, level, keys, values)`; its id is the BLAKE3 of the encoded
bytes.  On level 0 the values are the items' values.  Above, each item stands for one child: its key
is the child's last key, its value the child's id.

A node ends after every item for which `hash(salt, level, key) / 2**32 < size / target`, size being
what the item takes in the node.  The item alone decides, never its neighbours or its position, so
equal content is cut equally whatever its history, and an edit moves no boundary but its own.
Counting the size makes nodes about `target` bytes long whatever the items' sizes; hashing the level
keeps a boundary of one level from being one on the next (else the tree would hardly get narrower),
and the salt keeps strangers from choosing keys that are never boundaries.  Technique: probabilistic
B-trees (prolly trees) of Noms and Dolt; the size-aware rule is ours.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from blake3 import blake3

from dfs.codec import pack, unpack
from dfs.errors import Corrupt, DfsError
from dfs.hashing import digest, digest_parts

MAGIC = b"dfst"
VERSION = 1
TARGET = 8 << 10  # bytes; mean size of an encoded node
ITEM_OVERHEAD = 5  # bytes of msgpack framing of a typical item
ID_SIZE = 32


class Missing(Exception):
    """Tree nodes are needed that are not in the cache: fetch `hashes`, add them, run again."""

    def __init__(self, *hashes: bytes) -> None:
        """Name all the nodes known to be needed, so that one round trip fetches them."""
        super().__init__(*hashes)
        self.hashes: tuple[bytes, ...] = hashes

    def __str__(self) -> str:
        """For people."""
        return f"{len(self.hashes)} tree nodes are not cached: {self.hashes[0].hex()[:16]}..."


class Node:
    """A decoded node; immutable."""

    __slots__ = ("cost", "keys", "level", "values")

    def __init__(self, level: int, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """A node of at least one item, keys ascending."""
        self.level = level
        self.keys = keys
        self.values = values
        self.cost = 0  # bytes of memory, for the cache


GetNode = Callable[[bytes], Node]


def encode(level: int, keys: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    """Bytes of a node."""
    return pack((MAGIC, VERSION, level, keys, values))


def decode(data: bytes) -> Node:
    """Parse a node; raises `Corrupt` when the bytes are none, or of a newer version."""
    try:
        fields = unpack(data)
    except DfsError as e:
        raise Corrupt(f"undecodable tree node: {e}") from e
    if type(fields) is not tuple or len(fields) != 5 or fields[:2] != (MAGIC, VERSION):
        raise Corrupt(f"not a tree node of version {VERSION}: {data[:16]!r}")
    level, keys, values = fields[2:]
    if type(level) is not int or type(keys) is not tuple or type(values) is not tuple or not keys:
        raise Corrupt("malformed tree node")
    if len(keys) != len(values) or level < 0:
        raise Corrupt(f"malformed tree node: level {level}, {len(keys)} keys, {len(values)} values")
    node = Node(level, keys, values)
    # A bytes object costs 33 bytes besides its content, a slot in a tuple 8.
    node.cost = len(data) + 82 * len(keys) + 200
    return node


def node_id(data: bytes) -> bytes:
    """Id of an encoded node."""
    return digest(data)


@lru_cache(maxsize=256)
def _level_key(salt: bytes, level: int) -> bytes:
    return digest_parts(b"dfs tree boundary", salt, bytes((level,)))


def cutter(salt: bytes, level: int, target: int = TARGET) -> Callable[[bytes, int], bool]:
    """The rule of one level: `cut(key, len(value))` tells whether a node ends after the item."""
    hash_key = _level_key(salt, level)
    # Above level 0 long keys must not make most items boundaries: each level is at least about four
    # times narrower than the one below, so that the tree ends whatever the keys.
    most = target if level == 0 else target >> 2

    def cut(key: bytes, size: int) -> bool:
        size += len(key) + ITEM_OVERHEAD
        if size > most:
            size = most
        draw = int.from_bytes(blake3(key, key=hash_key).digest(4), "big")
        return draw * target < size << 32

    return cut
