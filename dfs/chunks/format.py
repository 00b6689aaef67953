"""The encoded chunk: up to 4 MiB of file data that proves itself, block by block.

A chunk is cut in blocks of 64 KiB, the unit of verification and of compression.  Its identity is
`BLAKE3(salt | u32 plain length | BLAKE3 digests of the plain blocks)`: the digests travel in the
header, so whoever holds the header and some blocks can verify exactly those blocks against the id
(a two-level Merkle tree).  The salt belongs to a family of volumes; without knowing it nobody can
make an id, so volumes that do not trust each other share no chunks.  The id says nothing about
compression: two encodings of the same data have one id.

Layout, big endian; header, then the stored blocks one after the other:

    magic     4   b"DFSC"
    version   u8  1
    flags     u8  0
    reserved  u16 0
    length    u32 plain bytes, 1..4 MiB
    salt      16
    stored    u32 a block: stored length; top bit = one zstd frame with its content size
    digest    32  a block: BLAKE3 of the plain block

Every function works on views: a raw chunk is never copied, and nothing larger than a block is ever
joined, except to decompress.
"""

import struct
from collections.abc import Iterator, Sequence

from blake3 import blake3
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError, frame_content_size

from dfs.errors import Corrupt, InvalidArgument

Buffer = bytes | bytearray | memoryview

BLOCK = 64 << 10
MAX_CHUNK = 4 << 20
SALT_SIZE = 16
DIGEST = 32
MAGIC = b"DFSC"
VERSION = 1
COMPRESSED = 1 << 31
LEVEL = 1  # zstd level: the one that keeps up with a network

_FIXED = struct.Struct(">4sBBHI16s")
FIXED_SIZE = _FIXED.size
_LENGTH = struct.Struct(">I")
PER_BLOCK = 4 + DIGEST
GIVE_UP = 4  # blocks in vain before the rest of a chunk is stored as it is


def block_count(length: int) -> int:
    """Number of blocks of a chunk of `length` plain bytes."""
    return -(-length // BLOCK)


def header_size(length: int) -> int:
    """Size of the header of a chunk of `length` plain bytes."""
    return FIXED_SIZE + block_count(length) * PER_BLOCK


MAX_ENCODED = MAX_CHUNK + header_size(MAX_CHUNK)


def make_id(salt: bytes | memoryview, length: int, digests: bytes | memoryview) -> bytes:
    """Chunk id from the salt, the plain length and the concatenated digests of the blocks."""
    hasher = blake3(salt)
    hasher.update(_LENGTH.pack(length))
    hasher.update(digests)
    return hasher.digest()


# --------------------------------------------------------------------------------------- encoding


def _blocks(pieces: Sequence[Buffer]) -> Iterator[list[memoryview]]:
    """Cut a list of buffers in blocks; a block is the list of views that make it up."""
    block: list[memoryview] = []
    room = BLOCK
    for piece in pieces:
        view = memoryview(piece).cast("B")
        at, size = 0, len(view)
        while at < size:
            part = view[at : at + room]
            block.append(part)
            at += len(part)
            room -= len(part)
            if not room:
                yield block
                block, room = [], BLOCK
    if block:
        yield block


def _pays(stored: int, plain: int) -> bool:
    """Whether compression saves at least an eighth, so that readers gain by it."""
    return stored * 8 <= plain * 7


def encode(
    data: Buffer | Sequence[Buffer], salt: bytes, *, compress: bool = True
) -> tuple[bytes, list[Buffer]]:
    """Encode plain data, 1 byte to 4 MiB, into `(chunk id, buffers)`; buffers[0] is the header.

    The raw buffers are views of `data`: it must not change while they are in use.  Compression is
    tried on the first block; data that does not shrink there is stored as it is and costs its
    hash only.  Raises `InvalidArgument` for a size or salt outside the limits.
    """
    pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
    length = sum(memoryview(p).nbytes for p in pieces)
    if not 0 < length <= MAX_CHUNK:
        raise InvalidArgument(f"a chunk has 1..{MAX_CHUNK} bytes, not {length}")
    if len(salt) != SALT_SIZE:
        raise InvalidArgument(f"a chunk salt has {SALT_SIZE} bytes, not {len(salt)}")
    compressor = ZstdCompressor(level=LEVEL) if compress else None
    failures = 0
    stored = bytearray()
    digests = bytearray()
    out: list[Buffer] = [b""]  # the header's place
    squeezed = False
    for block in _blocks(pieces):
        size = 0
        hasher = blake3(block[0])
        for part in block:
            size += len(part)
        for part in block[1:]:
            hasher.update(part)
        digests += hasher.digest()
        if compressor is not None:
            packed = compressor.compress(block[0] if len(block) == 1 else b"".join(block))
            if _pays(len(packed), size):
                stored += _LENGTH.pack(len(packed) | COMPRESSED)
                out.append(packed)
                squeezed = True
                continue
            failures += 1
            if not squeezed or failures >= GIVE_UP:
                compressor = None
        stored += _LENGTH.pack(size)
        out += block
    if not squeezed:  # the caller's own buffers, instead of 64 views of them
        out[1:] = [p for p in pieces if memoryview(p).nbytes]
    fixed = _FIXED.pack(MAGIC, VERSION, 0, 0, length, salt)
    out[0] = b"".join((fixed, stored, digests))
    return make_id(salt, length, bytes(digests)), out


# --------------------------------------------------------------------------------------- decoding


class Header:
    """A parsed chunk header: what is stored where, and how to verify it.

    Parsing checks the form only.  `verify_id` proves the digests, `block` and `plain` prove data
    against the digests; until `verify_id` passed, nothing in here is to be believed.
    """

    __slots__ = ("digests", "length", "offsets", "salt", "size", "stored")

    def __init__(
        self, length: int, salt: bytes, stored: tuple[int, ...], digests: memoryview
    ) -> None:
        """Use `Header.parse`."""
        self.length = length
        self.salt = salt
        self.stored = stored  # per block: stored length, with the COMPRESSED bit
        self.digests = digests
        self.size = FIXED_SIZE + len(stored) * PER_BLOCK
        offsets = [0]  # of the blocks, counted from the end of the header
        at = 0
        for value in stored:
            at += value & ~COMPRESSED
            offsets.append(at)
        self.offsets = offsets

    @classmethod
    def parse(cls, buf: Buffer) -> "Header":
        """Parse the header at the start of `buf`; raises `Corrupt` when its form is wrong."""
        view = memoryview(buf)
        if len(view) < FIXED_SIZE:
            raise Corrupt(f"chunk header cut off after {len(view)} bytes")
        magic, version, flags, reserved, length, salt = _FIXED.unpack_from(view)
        if magic != MAGIC or version != VERSION or flags or reserved:
            raise Corrupt(f"not a chunk header of version {VERSION}: {bytes(view[:8])!r}")
        if not 0 < length <= MAX_CHUNK:
            raise Corrupt(f"chunk header with the impossible length {length}")
        count = block_count(length)
        if len(view) < FIXED_SIZE + count * PER_BLOCK:
            raise Corrupt(f"chunk header cut off after {len(view)} bytes")
        stored = struct.unpack_from(f">{count}I", view, FIXED_SIZE)
        last = length - (count - 1) * BLOCK
        for i, value in enumerate(stored):
            plain = BLOCK if i < count - 1 else last
            size = value & ~COMPRESSED
            if (size != plain) if size == value else not 0 < size < plain:
                raise Corrupt(f"block {i} of a chunk has the impossible stored length {size}")
        start = FIXED_SIZE + 4 * count
        return cls(length, salt, stored, view[start : start + DIGEST * count])

    @property
    def stored_size(self) -> int:
        """Bytes of all the stored blocks."""
        return self.offsets[-1]

    def verify_id(self, chunk_id: bytes) -> None:
        """Raise `Corrupt` unless this is the header of that chunk."""
        if make_id(self.salt, self.length, self.digests) != chunk_id:
            raise Corrupt(f"the header of chunk {chunk_id.hex()[:16]} does not match its id")

    def block_length(self, i: int) -> int:
        """Plain length of block `i`."""
        return min(BLOCK, self.length - i * BLOCK)

    def block(self, i: int, stored: Buffer, decompressor: ZstdDecompressor | None = None) -> Buffer:
        """The plain bytes of block `i`, verified; a raw block is returned as it came."""
        plain: Buffer = stored
        size = self.block_length(i)
        if self.stored[i] & COMPRESSED:
            try:
                # the declared size is checked first: a frame of 100 bytes may claim gigabytes
                if frame_content_size(stored) != size:
                    raise Corrupt(f"block {i} of a chunk declares a wrong size")
                plain = (decompressor or ZstdDecompressor()).decompress(
                    stored, max_output_size=size, allow_extra_data=False
                )
            except ZstdError as e:
                raise Corrupt(f"block {i} of a chunk does not decompress: {e}") from e
        digest = self.digests[i * DIGEST : (i + 1) * DIGEST]
        if len(plain) != size or blake3(plain).digest() != digest:
            raise Corrupt(f"block {i} of a chunk does not match its digest")
        return plain

    def plain(self, first: int, count: int, stored: Buffer) -> list[Buffer]:
        """Verified plain bytes of `count` blocks from `first` on, given their stored bytes.

        Blocks that are stored raw come back as views of `stored`, neighbours as one view.  Raises
        `Corrupt` if `stored` is not exactly those blocks.
        """
        offsets = self.offsets
        if not 0 <= first < first + count <= len(self.stored):
            raise InvalidArgument(f"blocks {first}+{count} of {len(self.stored)}")
        view = memoryview(stored)
        base = offsets[first]
        if len(view) != offsets[first + count] - base:
            raise Corrupt(f"{len(view)} bytes for blocks {first}+{count} of a chunk")
        decompressor: ZstdDecompressor | None = None
        out: list[Buffer] = []
        raw_from = -1  # start in `view` of the run of raw blocks before this one
        for i in range(first, first + count):
            at = offsets[i] - base
            end = offsets[i + 1] - base
            if self.stored[i] & COMPRESSED:
                if decompressor is None:
                    decompressor = ZstdDecompressor()
                if raw_from >= 0:
                    out.append(view[raw_from:at])
                    raw_from = -1
                out.append(self.block(i, view[at:end], decompressor))
            else:
                self.block(i, view[at:end])
                if raw_from < 0:
                    raw_from = at
        if raw_from >= 0:
            out.append(view[raw_from:])
        return out

    def check_range(self, offset: int, length: int) -> None:
        """Raise `InvalidArgument` when a range leaves the chunk."""
        if not 0 <= offset <= offset + length <= self.length:
            raise InvalidArgument(f"bytes {offset}+{length} of a chunk of {self.length} bytes")

    def range(self, offset: int, length: int, stored: Buffer) -> Buffer:
        """Verified plain bytes of a range inside the chunk, given the stored blocks covering it.

        A range in raw blocks is a view of `stored`.  Raises `Corrupt`.
        """
        first = offset // BLOCK
        count = block_count(offset + length) - first
        if not count:
            return b""
        if count == 1:
            plain = self.block(first, stored)
        else:
            parts = self.plain(first, count, stored)
            plain = parts[0] if len(parts) == 1 else b"".join(parts)
        skip = offset - first * BLOCK
        if skip == 0 and len(plain) == length:
            return plain
        return memoryview(plain)[skip : skip + length]


def verify(encoded: Buffer, chunk_id: bytes, into: memoryview | None = None) -> Header:
    """Verify a whole encoded chunk, header and every block, against its id; raises `Corrupt`.

    `into`, of the same length, gets a copy of it: block by block, each verified where it was copied
    to, while the processor has it in its cache.
    """
    view = memoryview(encoded)
    header = Header.parse(view)
    header.verify_id(chunk_id)
    size = header.size
    if into is None:
        header.plain(0, len(header.stored), view[size:])
        return header
    if len(view) != size + header.stored_size:
        raise Corrupt(f"{len(view)} bytes for a chunk of {size + header.stored_size}")
    into[:size] = view[:size]
    decompressor = ZstdDecompressor()
    offsets = header.offsets
    for i in range(len(header.stored)):
        start, end = size + offsets[i], size + offsets[i + 1]
        into[start:end] = view[start:end]
        header.block(i, into[start:end], decompressor)
    return header


def decode(encoded: Buffer, chunk_id: bytes) -> bytes:
    """The plain data of a whole encoded chunk, verified; for tools and tests (it copies)."""
    header = Header.parse(encoded)
    header.verify_id(chunk_id)
    return b"".join(header.plain(0, len(header.stored), memoryview(encoded)[header.size :]))


def decode_range(answer: Buffer, chunk_id: bytes, offset: int, length: int) -> Buffer:
    """Verified plain bytes `[offset, offset + length)` from a header followed by their blocks.

    `answer` holds the header and exactly the blocks that cover the range.  A range in raw blocks
    is a view of `answer`.  Raises `Corrupt`, or `InvalidArgument` when the range leaves the chunk.
    """
    header = Header.parse(answer)
    header.verify_id(chunk_id)
    header.check_range(offset, length)
    return header.range(offset, length, memoryview(answer)[header.size :])
