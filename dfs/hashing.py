"""Hashes for identity, placement and integrity.  Stable for ever: formats depend on them."""

import zlib

from blake3 import blake3

DIGEST_SIZE = 32
PARTITION_BITS = 12
PARTITIONS = 1 << PARTITION_BITS


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3-256 of the bytes."""
    return blake3(data).digest()


def digest_parts(*parts: bytes) -> bytes:
    """BLAKE3-256 of length-prefixed parts, so that no two part lists collide."""
    h = blake3()
    for part in parts:
        h.update(len(part).to_bytes(4, "big"))
        h.update(part)
    return h.digest()


def hash64(salt: bytes, data: bytes) -> int:
    """Salted 64-bit hash (BLAKE3 keyed by a salt of up to 32 bytes)."""
    return int.from_bytes(blake3(data, key=salt.ljust(32, b"\0")).digest(8), "big")


def crc32(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """CRC-32 (zlib) for torn-write detection; not a guard against tampering."""
    return zlib.crc32(data, start)


def partition_of(object_digest: bytes) -> int:
    """Partition number, 0..4095: the top 12 bits of a BLAKE3 digest."""
    return (object_digest[0] << 4) | (object_digest[1] >> 4)
