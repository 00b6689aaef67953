"""Bloom filters, blocked and sectorised (Putze, Sanders, Singler 2007): one block per key.

A block has 512 bits, kept as one Python int; a key sets up to four bits in each half, all in one
block, so a test is one AND.  The mask depends only on the key: a get computes it once and tests
every table with it.  At 12 bits per key about one absent key in 150 passes.

The hash is BLAKE2b with 12 bytes of digest: eight bytes choose the bits, four the block.  It is
part of the table format and never changes.
"""

from hashlib import blake2b
from math import ceil
from struct import Struct

from dfs.env import Buffer

BLOCK_BITS = 512
BLOCK_BYTES = BLOCK_BITS // 8
BITS_PER_KEY = 12  # unless told otherwise; `filters` divides them among the levels

DIGEST_BYTES = 12

_unpack = Struct("<8BI").unpack
_iter_unpack = Struct("<8BI").iter_unpack
_LOW = tuple(1 << i for i in range(256))
_HIGH = tuple(1 << i for i in range(256, 512))

KeyHash = tuple[int, int]  # (chooses the block, mask within it)


def digest(key: bytes) -> bytes:
    """The 12 bytes that say everything a filter needs to know of a key."""
    return blake2b(key, digest_size=DIGEST_BYTES).digest()


def key_hash(key: bytes) -> KeyHash:
    """The same, ready to test filters with."""
    a, b, c, d, e, f, g, h, n = _unpack(blake2b(key, digest_size=DIGEST_BYTES).digest())
    low = _LOW
    high = _HIGH
    return n, low[a] | low[b] | low[c] | low[d] | high[e] | high[f] | high[g] | high[h]


def build(digests: Buffer, bits_per_key: float = BITS_PER_KEY) -> bytes:
    """Encoded filter of keys, given their digests one after the other."""
    low = _LOW
    high = _HIGH
    keys = len(digests) // DIGEST_BYTES
    count = max(1, ceil(keys * bits_per_key / BLOCK_BITS))
    blocks = [0] * count
    for a, b, c, d, e, f, g, h, n in _iter_unpack(digests):
        mask = low[a] | low[b] | low[c] | low[d] | high[e] | high[f] | high[g] | high[h]
        blocks[n % count] |= mask
    return b"".join([b.to_bytes(BLOCK_BYTES, "little") for b in blocks])


def load(data: bytes) -> list[int]:
    """The filter's blocks, for `blocks[n % len(blocks)] & mask == mask`."""
    return [
        int.from_bytes(data[i : i + BLOCK_BYTES], "little")
        for i in range(0, len(data), BLOCK_BYTES)
    ]
