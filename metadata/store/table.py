"""SSTable: an immutable sorted file of keys and values (Bigtable, Chang et al., OSDI 2006).

    header   "dfs-sst\\0" | version u32 | zeros u32
    blocks   each: crc32 u32 | codec u8 | payload      codec 0: plain, 1: zstd
    filter   encoded Bloom filter of all keys
    index    crc32 u32 | codec u8 | payload like a block's: (first keys, offsets, last key)
    footer   magic | version u32 | index offset, index length, filter offset, filter length u64 |
             entries, tombstones, plain bytes u64 | filter crc u32 | footer crc u32

A block's plain payload is the MessagePack pair (keys, values), a deletion's value is nil.  The crc
covers codec and payload and is seeded with the block's offset, so that a block read from another
place is damage too.  Offsets has one more element than first keys: where the last block ends.
Version 2 is a table with values that expire: such a value is the pair (bytes, seconds since the
epoch).  Tables without any are written as version 1.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

import zstandard

from dfs.codec import unpack
from dfs.env import Disk
from dfs.errors import Corrupt, DfsError, NotFound, RemoteProtocolError, StoreFailed
from dfs.hashing import crc32
from metadata.store import bloom
from metadata.store.cache import BlockCache
from metadata.store.memtable import Value

MAGIC = b"dfs-sst\0"
VERSIONS = (1, 2)
HEADER = struct.Struct("<8sII")
BLOCK = struct.Struct("<IB")  # crc, codec
FOOTER = struct.Struct("<8sI4Q3QI")  # then the crc
FOOTER_SIZE = FOOTER.size + 4
PLAIN, ZSTD = 0, 1

Block = tuple[tuple[bytes, ...], tuple[Value, ...]]  # keys, ascending, and their values
ENTRY = 84  # bytes of two object headers and two places in tuples
MISSING = object()  # absent, as opposed to deleted


class Meta(NamedTuple):
    """What the manifest knows of a table."""

    name: str
    size: int  # bytes of the file
    entries: int
    tombstones: int
    plain: int  # bytes of keys and values
    first: bytes  # keys below it are no longer of this table, even if the file has some
    last: bytes
    expiring: int = 0  # entries that expire
    expires: int = 0  # seconds since the epoch at which the last of them does


class Index(NamedTuple):
    """The part of a table that is kept in memory while it is used."""

    first_keys: tuple[bytes, ...]
    offsets: tuple[int, ...]
    filter: list[int]
    size: int  # bytes of memory, about
    filter_bytes: int  # in the file


class FilterReads:
    """What point reads of one level got from the filters of its tables."""

    __slots__ = ("false_positives", "hits", "negatives")

    def __init__(self) -> None:
        """Zeros."""
        self.hits = 0  # the key was in the table
        self.negatives = 0  # the filter said no: no block was looked at
        self.false_positives = 0  # the filter said maybe, the block said no


class Table:
    """An open table.  The file stays readable while this object lives, even after its removal."""

    __slots__ = (
        "__weakref__", "_decompressor", "_file", "base", "index", "last", "meta", "on_load",
        "path", "reads",
    )  # fmt: skip

    def __init__(self, disk: Disk, prefix: str, meta: Meta, number: int) -> None:
        """Open the file; raises `NotFound`.  `number` is the table's own in its process's cache."""
        self.meta = meta
        self.last = meta.last
        self.path = disk.path(f"{prefix}/{meta.name}")
        self._file = disk.open(f"{prefix}/{meta.name}")
        self._decompressor = zstandard.ZstdDecompressor()
        self.base = number << 32  # block i has the cache key `base + i`
        self.index: Index | None = None
        self.reads = FilterReads()
        self.on_load: Callable[[Table, int], None] | None = None  # told the bytes of an index

    def cut(self, first: bytes) -> "Table":
        """The same file, without the keys below `first`."""
        other = copy(self)
        other.meta = self.meta._replace(first=first)
        other.index = None  # each has its own, so that the budget counts what there is
        return other

    def load(self) -> Index:
        """Read index and filter if they are not in memory; raises `Corrupt`."""
        index = self.index
        if index is None:
            index = self.index = self._load()
            if self.on_load is not None:
                self.on_load(self, index.size)
        return index

    def _load(self) -> Index:
        size = self.meta.size
        data = self._pread(max(0, size - FOOTER_SIZE), FOOTER_SIZE, "footer")
        footer = data[: FOOTER.size]
        if crc32(footer) != int.from_bytes(data[FOOTER.size :], "little"):
            raise Corrupt(f"{self.path}: damaged footer")
        magic, version, at, length, filter_at, filter_length, *_, filter_crc = FOOTER.unpack(footer)
        if magic != MAGIC or version not in VERSIONS:
            raise Corrupt(f"{self.path}: format {magic!r} version {version}, this reads {VERSIONS}")
        filters = self._pread(filter_at, filter_length, "filter")
        if crc32(filters) != filter_crc:
            raise Corrupt(f"{self.path}: damaged filter")
        (first_keys, offsets, _last), _ = self._decode(at, length, "index")
        memory = len(first_keys) * 100 + sum(map(len, first_keys)) + filter_length * 2
        return Index(first_keys, offsets, bloom.load(filters), memory, filter_length)

    def _pread(self, at: int, length: int, what: str) -> bytes:
        try:
            data = self._file.pread(length, at)
        except (StoreFailed, OSError) as e:
            raise Corrupt(f"{self.path}: cannot read the {what}: {e}") from e
        if len(data) != length:
            raise Corrupt(f"{self.path}: the {what} is cut short")
        return data

    def _decode(self, at: int, length: int, what: str) -> tuple[tuple[Any, ...], int]:
        data = self._pread(at, length, what)
        crc, codec = BLOCK.unpack_from(data)
        payload = data[BLOCK.size :]
        if crc != crc32(payload, crc32(data[4:5], at & 0xFFFFFFFF)):
            raise Corrupt(f"{self.path}: damaged {what} at offset {at}")
        try:
            if codec == ZSTD:
                payload = self._decompressor.decompress(payload)
            value = unpack(payload)
        except (zstandard.ZstdError, RemoteProtocolError) as e:
            raise Corrupt(f"{self.path}: undecodable {what} at offset {at}: {e}") from e
        assert isinstance(value, tuple)  # noqa: S101 - the checksum says that we wrote it
        return value, len(payload)

    def block(self, i: int) -> Block:
        """Read and verify block `i`; raises `Corrupt` whose detail is `i`."""
        return self._block(i)[0]

    def _block(self, i: int) -> tuple[Block, int]:
        """Block `i`, and its bytes before decoding."""
        offsets = self.load().offsets
        at = offsets[i]
        try:
            (keys, values), plain = self._decode(at, offsets[i + 1] - at, f"block {i}")
        except Corrupt as e:
            raise Corrupt(str(e), i) from e
        return (keys, values), plain

    def first_block(self, key: bytes) -> int:
        """The block that would hold a key."""
        return max(0, bisect_right(self.load().first_keys, key) - 1)

    def range_of(self, i: int) -> tuple[bytes, bytes]:
        """[start, end) of the keys that block `i` may hold."""
        first_keys = self.load().first_keys
        end = first_keys[i + 1] if i + 1 < len(first_keys) else self.meta.last + b"\0"
        return max(first_keys[i], self.meta.first), end

    def find(self, key: bytes, hashed: list[bloom.KeyHash], cache: BlockCache) -> Any:
        """The value (None: deleted) or `MISSING`; raises `Corrupt`.

        The filter is asked only when it may save reading a block.  `hashed` is empty or has the
        key's hash, and has it after the first filter was asked.  The key is not below `meta.first`.
        """
        index = self.index or self.load()
        i = bisect_right(index.first_keys, key) - 1
        block: Block | None = cache.get(self.base + i)
        if block is None:
            if not hashed:
                hashed.append(bloom.key_hash(key))
            n, mask = hashed[0]
            filters = index.filter
            if filters[n % len(filters)] & mask != mask:
                self.reads.negatives += 1
                return MISSING
            block = self.cached_block(i, cache)
            keys, values = block
            at = bisect_left(keys, key)
            if at < len(keys) and keys[at] == key:
                self.reads.hits += 1
                return values[at]
            self.reads.false_positives += 1
            return MISSING
        keys, values = block
        at = bisect_left(keys, key)
        return values[at] if at < len(keys) and keys[at] == key else MISSING

    def cached_block(self, i: int, cache: BlockCache) -> Block:
        """Block `i` by way of the cache."""
        block: Block | None = cache.peek(self.base + i)
        if block is None:
            block, plain = self._block(i)
            cache.put(self.base + i, plain + ENTRY * len(block[0]), block)
        return block

    def scan(self, start: bytes) -> Iterator[Block]:
        """Keys and values from `start` on, block by block, past the cache; see `block`."""
        start = max(start, self.meta.first)
        for n in range(self.first_block(start), len(self.load().first_keys)):
            keys, values = self.block(n)
            if keys[0] < start:
                skip = bisect_left(keys, start)
                keys, values = keys[skip:], values[skip:]
            if keys:
                yield keys, values


def open_table(disk: Disk, prefix: str, meta: Meta, number: int) -> Table:
    """Open a table; a file that is not there is `Corrupt`, because the manifest lists it."""
    try:
        return Table(disk, prefix, meta, number)
    except NotFound as e:
        raise Corrupt(f"{disk.path(f'{prefix}/{meta.name}')} is missing") from e
    except DfsError:
        raise
