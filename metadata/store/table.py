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
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import zstandard

from dfs.codec import pack, unpack
from dfs.env import Disk
from dfs.errors import Corrupt, DfsError, NotFound, RemoteProtocolError, StoreFailed
from dfs.hashing import crc32
from metadata.store import bloom
from metadata.store.cache import BlockCache
from metadata.store.memtable import OVERHEAD, Value

MAGIC = b"dfs-sst\0"
VERSION = 1
_HEADER = struct.Struct("<8sII")
_BLOCK = struct.Struct("<IB")  # crc, codec
_FOOTER = struct.Struct("<8sI4Q3QI")  # then the crc
FOOTER_SIZE = _FOOTER.size + 4
WRITE_BYTES = 1 << 20
PLAIN, ZSTD = 0, 1

Block = dict[bytes, Value]  # in key order
MISSING = object()  # absent, as opposed to deleted


class Meta(NamedTuple):
    """What the manifest knows of a table."""

    name: str
    size: int  # bytes of the file
    entries: int
    tombstones: int
    plain: int  # bytes of keys and values
    first: bytes
    last: bytes


# -------------------------------------------------------------------------------------- write


def _encode(payload: bytes, offset: int, compressor: zstandard.ZstdCompressor | None) -> bytes:
    codec = PLAIN
    if compressor is not None:
        small = compressor.compress(payload)
        if len(small) < len(payload) * 7 // 8:
            payload, codec = small, ZSTD
    head = bytes([codec])
    return _BLOCK.pack(crc32(payload, crc32(head, offset & 0xFFFFFFFF)), codec) + payload


def write_table(
    disk: Disk,
    name: str,
    items: Iterable[tuple[bytes, Value]],
    *,
    block_bytes: int,
    compression: int,
    table_bytes: int = 1 << 62,
) -> tuple[Meta | None, bytes | None]:
    """Write items (ascending, distinct keys) until the file has `table_bytes`; synced.

    Returns the table, None if there were no items, and the first key that did not fit, if any.
    """
    compressor = zstandard.ZstdCompressor(level=compression) if compression else None
    file = disk.open(name, create=True, truncate=True)
    try:
        out = [_HEADER.pack(MAGIC, VERSION, 0)]
        waiting = at = _HEADER.size
        first_keys: list[bytes] = []
        offsets: list[int] = []
        hashes: list[bloom.KeyHash] = []
        keys: list[bytes] = []
        values: list[Value] = []
        entries = tombstones = plain = filled = 0
        rest: bytes | None = None
        last = b""

        def end_block() -> int:
            nonlocal waiting, at, filled
            stored = _encode(pack((keys, values)), at, compressor)
            first_keys.append(keys[0])
            offsets.append(at)
            hashes.extend(map(bloom.key_hash, keys))
            keys.clear()
            values.clear()
            filled = 0
            at += len(stored)
            out.append(stored)
            waiting += len(stored)
            if waiting >= WRITE_BYTES:
                file.append(out)
                out.clear()
                waiting = 0
            return at

        for key, value in items:
            if value is None:
                size = len(key)
                tombstones += 1
            else:
                size = len(key) + len(value)
            if keys and filled + size > block_bytes and end_block() >= table_bytes:
                tombstones -= value is None
                rest = key
                break
            keys.append(key)
            values.append(value)
            filled += size + 8
            plain += size
            entries += 1
            last = key
        if keys:
            end_block()
        if not entries:
            disk.unlink(name)
            return None, None
        offsets.append(at)
        out.append(_finish(first_keys, offsets, last, hashes, entries, tombstones, plain))
        file.append(out)
        file.fdatasync()
        size = file.size()
    finally:
        file.close()
    disk.sync_dir(name.rpartition("/")[0])
    short = name.rpartition("/")[2]
    return Meta(short, size, entries, tombstones, plain, first_keys[0], last), rest


def _finish(
    first_keys: list[bytes],
    offsets: list[int],
    last: bytes,
    hashes: list[bloom.KeyHash],
    entries: int,
    tombstones: int,
    plain: int,
) -> bytes:
    filters = bloom.build(hashes)
    at = offsets[-1]
    index_at = at + len(filters)
    index = _encode(pack((first_keys, offsets, last)), index_at, zstandard.ZstdCompressor(level=1))
    footer = _FOOTER.pack(
        MAGIC,
        VERSION,
        index_at,
        len(index),
        at,
        len(filters),
        entries,
        tombstones,
        plain,
        crc32(filters),
    )
    return filters + index + footer + crc32(footer).to_bytes(4, "little")


# --------------------------------------------------------------------------------------- read


class Index(NamedTuple):
    """The part of a table that is kept in memory while it is used."""

    first_keys: tuple[bytes, ...]
    offsets: tuple[int, ...]
    filter: list[int]
    size: int  # bytes of memory, about


class Table:
    """An open table.  The file stays readable while this object lives, even after its removal."""

    __slots__ = ("_decompressor", "_file", "base", "filtered", "index", "meta", "path", "searched")

    def __init__(self, disk: Disk, prefix: str, meta: Meta, number: int) -> None:
        """Open the file; raises `NotFound`.  `number` is the table's own in its process's cache."""
        self.meta = meta
        self.path = disk.path(f"{prefix}/{meta.name}")
        self._file = disk.open(f"{prefix}/{meta.name}")
        self._decompressor = zstandard.ZstdDecompressor()
        self.base = number << 32  # block i has the cache key `base + i`
        self.index: Index | None = None
        self.searched = 0  # point reads that looked into a block
        self.filtered = 0  # point reads that the filter answered

    def load(self) -> Index:
        """Read index and filter if they are not in memory; raises `Corrupt`."""
        if self.index is None:
            self.index = self._load()
        return self.index

    def _load(self) -> Index:
        size = self.meta.size
        data = self._pread(max(0, size - FOOTER_SIZE), FOOTER_SIZE, "footer")
        footer = data[: _FOOTER.size]
        if crc32(footer) != int.from_bytes(data[_FOOTER.size :], "little"):
            raise Corrupt(f"{self.path}: damaged footer")
        magic, version, at, length, filter_at, filter_length, *_, filter_crc = _FOOTER.unpack(
            footer
        )
        if magic != MAGIC or version != VERSION:
            raise Corrupt(f"{self.path}: format {magic!r} version {version}, this is {VERSION}")
        filters = self._pread(filter_at, filter_length, "filter")
        if crc32(filters) != filter_crc:
            raise Corrupt(f"{self.path}: damaged filter")
        first_keys, offsets, _last = self._decode(at, length, "index")
        memory = len(first_keys) * 100 + sum(map(len, first_keys)) + filter_length * 2
        return Index(first_keys, offsets, bloom.load(filters), memory)

    def _pread(self, at: int, length: int, what: str) -> bytes:
        try:
            data = self._file.pread(length, at)
        except (StoreFailed, OSError) as e:
            raise Corrupt(f"{self.path}: cannot read the {what}: {e}") from e
        if len(data) != length:
            raise Corrupt(f"{self.path}: the {what} is cut short")
        return data

    def _decode(self, at: int, length: int, what: str) -> tuple[Any, ...]:
        data = self._pread(at, length, what)
        crc, codec = _BLOCK.unpack_from(data)
        payload = data[_BLOCK.size :]
        if crc != crc32(payload, crc32(data[4:5], at & 0xFFFFFFFF)):
            raise Corrupt(f"{self.path}: damaged {what} at offset {at}")
        try:
            if codec == ZSTD:
                payload = self._decompressor.decompress(payload)
            value = unpack(payload)
        except (zstandard.ZstdError, RemoteProtocolError) as e:
            raise Corrupt(f"{self.path}: undecodable {what} at offset {at}: {e}") from e
        assert isinstance(value, tuple)  # noqa: S101 - the checksum says that we wrote it
        return value

    def block(self, i: int) -> Block:
        """Read and verify block `i`; raises `Corrupt` whose detail is `i`."""
        index = self.load()
        at = index.offsets[i]
        try:
            keys, values = self._decode(at, index.offsets[i + 1] - at, f"block {i}")
        except Corrupt as e:
            raise Corrupt(str(e), i) from e
        return dict(zip(keys, values, strict=True))

    def block_size(self, i: int) -> int:
        """Stored bytes of block `i`."""
        offsets = self.load().offsets
        return offsets[i + 1] - offsets[i]

    def range_of(self, i: int) -> tuple[bytes, bytes]:
        """[start, end) of the keys that block `i` may hold."""
        first_keys = self.load().first_keys
        end = first_keys[i + 1] if i + 1 < len(first_keys) else self.meta.last + b"\0"
        return first_keys[i], end

    def find(self, key: bytes, key_hash: bloom.KeyHash, cache: BlockCache) -> Any:
        """The value (None: deleted) or `MISSING`; raises `Corrupt`."""
        index = self.index or self.load()
        blocks = index.filter
        n, mask = key_hash
        if blocks[n % len(blocks)] & mask != mask:
            self.filtered += 1
            return MISSING
        self.searched += 1
        i = bisect_right(index.first_keys, key) - 1
        if i < 0:
            return MISSING
        return self.cached_block(i, cache).get(key, MISSING)

    def cached_block(self, i: int, cache: BlockCache) -> Block:
        """Block `i` by way of the cache."""
        block: Block | None = cache.get(self.base + i)
        if block is None:
            block = self.block(i)
            size = sum([len(v) for v in block.values() if v is not None])
            cache.put(self.base + i, size + sum(map(len, block)) + OVERHEAD * len(block), block)
        return block

    def slice(
        self, start: bytes, end: bytes, limit: int, cache: BlockCache
    ) -> tuple[list[tuple[bytes, Value]], bool]:
        """Items in [start, end), at least `limit` if there are so many; and whether more follow."""
        index = self.load()
        first_keys = index.first_keys
        i = max(0, bisect_right(first_keys, start) - 1)
        items: list[tuple[bytes, Value]] = []
        while i < len(first_keys) and len(items) < limit:
            if end and first_keys[i] >= end:
                return items, False
            found = list(self.cached_block(i, cache).items())
            if found[0][0] < start:
                found = found[bisect_left(found, (start,)) :]
            if end and found and found[-1][0] >= end:
                items += found[: bisect_left(found, (end,))]
                return items, False
            items += found
            i += 1
        return items, i < len(first_keys)

    def scan(self, start: bytes) -> Iterator[tuple[list[bytes], list[Value]]]:
        """Keys and values from `start` on, block by block, past the cache; see `block`."""
        index = self.load()
        i = max(0, bisect_right(index.first_keys, start) - 1)
        for n in range(i, len(index.first_keys)):
            block = self.block(n)
            keys = list(block)
            values = list(block.values())
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
