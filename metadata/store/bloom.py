"""Bloom filters, blocked and sectorised (Putze, Sanders, Singler 2007): one block per key.

A block has 512 bits, kept as one Python int; a key sets up to four bits in each half, all in one
block, so a test is one AND.  The mask depends only on the key: a get computes it once and tests
every table with it.  At 12 bits per key about one absent key in 150 passes.

The hash is BLAKE2b with 12 bytes of digest: eight bytes choose the bits, four the block.  It is
part of the table format and never changes.
"""

from hashlib import blake2b
from struct import Struct

BLOCK_BITS = 512
BLOCK_BYTES = BLOCK_BITS // 8
BITS_PER_KEY = 12

_unpack = Struct("<8BI").unpack
_LOW = tuple(1 << i for i in range(256))
_HIGH = tuple(1 << i for i in range(256, 512))

KeyHash = tuple[int, int]  # (chooses the block, mask within it)


def key_hash(key: bytes) -> KeyHash:
    """What a filter needs to know of a key."""
    a, b, c, d, e, f, g, h, n = _unpack(blake2b(key, digest_size=12).digest())
    low = _LOW
    high = _HIGH
    return (
        n,
        low[a] | low[b] | low[c] | low[d] | high[e] | high[f] | high[g] | high[h],
    )


def build(hashes: list[KeyHash]) -> bytes:
    """Encoded filter of the keys."""
    count = max(1, -(-len(hashes) * BITS_PER_KEY // BLOCK_BITS))
    blocks = [0] * count
    for n, mask in hashes:
        blocks[n % count] |= mask
    return b"".join([b.to_bytes(BLOCK_BYTES, "little") for b in blocks])


def load(data: bytes) -> list[int]:
    """The filter's blocks, for `blocks[n % len(blocks)] & mask == mask`."""
    return [
        int.from_bytes(data[i : i + BLOCK_BYTES], "little")
        for i in range(0, len(data), BLOCK_BYTES)
    ]
