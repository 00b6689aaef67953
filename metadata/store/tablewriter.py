"""Writing an SSTable in one pass; `metadata.store.table` describes the format."""

from collections.abc import Iterable

import zstandard

from dfs.codec import pack
from dfs.env import Disk
from dfs.hashing import crc32
from metadata.store import bloom
from metadata.store.memtable import Value
from metadata.store.table import BLOCK, FOOTER, HEADER, MAGIC, PLAIN, ZSTD, Meta

WRITE_BYTES = 1 << 20


def _encode(payload: bytes, offset: int, compressor: zstandard.ZstdCompressor | None) -> bytes:
    codec = PLAIN
    if compressor is not None:
        small = compressor.compress(payload)
        if len(small) < len(payload) * 7 // 8:
            payload, codec = small, ZSTD
    head = bytes([codec])
    return BLOCK.pack(crc32(payload, crc32(head, offset & 0xFFFFFFFF)), codec) + payload


def write_table(
    disk: Disk,
    name: str,
    items: Iterable[tuple[bytes, Value]],
    *,
    block_bytes: int,
    compression: int,
    table_bytes: int = 1 << 62,
    bits_per_key: float = bloom.BITS_PER_KEY,
) -> tuple[Meta | None, bytes | None]:
    """Write items (ascending, distinct keys) until the file has `table_bytes`; synced.

    `bits_per_key` is the size of the filter.  Memory is a few blocks, 12 bytes per key, and the
    index.

    Returns the table, None if there were no items, and the first key that did not fit, if any.
    """
    compressor = zstandard.ZstdCompressor(level=compression) if compression else None
    file = disk.open(name, create=True, truncate=True)
    try:
        out = [HEADER.pack(MAGIC, 1, 0)]
        waiting = at = HEADER.size
        first_keys: list[bytes] = []
        offsets: list[int] = []
        digests = bytearray()
        keys: list[bytes] = []
        values: list[Value] = []
        entries = tombstones = plain = filled = expiring = expires = 0
        rest: bytes | None = None
        last = b""

        def end_block() -> int:
            nonlocal waiting, at, filled
            stored = _encode(pack((keys, values)), at, compressor)
            first_keys.append(keys[0])
            offsets.append(at)
            digests.extend(b"".join(map(bloom.digest, keys)))
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
            size = len(key)
            if value is not None:
                size += len(value) if isinstance(value, bytes) else len(value[0])
            if keys and filled + size > block_bytes and end_block() >= table_bytes:
                rest = key
                break
            if not isinstance(value, bytes):
                if value is None:
                    tombstones += 1
                else:
                    expiring += 1
                    expires = max(expires, value[1])
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
        filters = bloom.build(digests, bits_per_key)
        version = 2 if expiring else 1
        counts = (entries, tombstones, plain)
        out.append(_finish(version, first_keys, offsets, last, filters, counts))
        file.append(out)
        file.fdatasync()
        size = file.size()
    finally:
        file.close()
    disk.sync_dir(name.rpartition("/")[0])
    short = name.rpartition("/")[2]
    return (
        Meta(short, size, entries, tombstones, plain, first_keys[0], last, expiring, expires),
        rest,
    )


def _finish(
    version: int,
    first_keys: list[bytes],
    offsets: list[int],
    last: bytes,
    filters: bytes,
    counts: tuple[int, int, int],
) -> bytes:
    at = offsets[-1]
    index_at = at + len(filters)
    index = _encode(pack((first_keys, offsets, last)), index_at, zstandard.ZstdCompressor(level=1))
    footer = FOOTER.pack(
        MAGIC, version, index_at, len(index), at, len(filters), *counts, crc32(filters)
    )
    return filters + index + footer + crc32(footer).to_bytes(4, "little")
