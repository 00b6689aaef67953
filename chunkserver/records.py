"""Bytes of segment files and hint files: encoding, decoding, scanning.

A segment is a header and then records, append-only.  Big endian:

    segment header   magic b"DFSG", version u8, 0 u8, 0 u16, number u64, nonce 16, CRC-32 u32
    record           magic b"DFSR", version u8, type u8, 0 u16, chunk id 32, size u32, extra u32,
                     stamp u64 (ns), CRC-32 u32; then `size` bytes: the encoded chunk of a PUT

    PUT        extra = plain length
    TOMBSTONE  the chunk is garbage, says the collector; extra = number of the segment of the PUT
    TOUCH      a put without bytes: renews the stamp
    DROP       this copy is gone (quarantined, or handed to its home), which says nothing about the
               chunk; extra as in TOMBSTONE

The CRC covers the segment's random nonce and the header of the record only.  Without the nonce,
which never leaves the server, nobody can store data that a scan of a damaged segment would take for
a record.  The payload needs no CRC: an encoded chunk proves itself against its id.

A large record may begin at the next multiple of 4096 (`ALIGN`) after the one before it, and end the
file at such a multiple, so that it can be written past the kernel's cache.  What lies between is
zeros.

A hint file repeats the record headers of a segment up to `covered`, everything below which was
synced before the hint was written:

    magic b"DFSH", version u8, 0 u8, 0 u16, number u64, nonce 16, covered u64, count u64
    entries: type u8, offset u32 (of the record), id 32, size u32, extra u32, stamp u64
    CRC-32 u32 over all of it
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

from dfs.errors import Corrupt
from dfs.hashing import crc32

VERSION = 1
PUT, TOMBSTONE, TOUCH, DROP = 1, 2, 3, 4

_SEGMENT = struct.Struct(">4sBBHQ16s")
_RECORD = struct.Struct(">4sBBH32sIIQ")
_HINT = struct.Struct(">4sBBHQ16sQQ")
_ENTRY = struct.Struct(">BI32sIIQ")
_CRC = struct.Struct(">I")
SEGMENT_HEADER = _SEGMENT.size + _CRC.size
RECORD_HEADER = _RECORD.size + _CRC.size
ENTRY_SIZE = _ENTRY.size
NONCE = 16
ALIGN = 4096
WINDOW = 1 << 20  # bytes read at a time while looking for the next record in damage

Read = Callable[[int, int], bytes]  # (length, offset) -> bytes, shorter at the end of the file


class Record(NamedTuple):
    """The header of a record; `offset` is where the record starts in its segment."""

    type: int
    offset: int
    chunk_id: bytes
    size: int
    extra: int
    stamp: int

    @property
    def payload(self) -> int:
        """Offset of the encoded chunk."""
        return self.offset + RECORD_HEADER

    @property
    def end(self) -> int:
        """Offset of whatever follows the record."""
        return self.offset + RECORD_HEADER + self.size


class Scan(NamedTuple):
    """What a scan found."""

    records: list[Record]
    gaps: list[tuple[int, int]]  # [start, end) where no record header could be read
    end: int  # where the last record ends; what follows is a torn tail


def aligned(offset: int) -> int:
    """The first offset at or after this one where a large record may begin."""
    return -(-offset // ALIGN) * ALIGN


def segment_header(number: int, nonce: bytes) -> bytes:
    """Header of a new segment."""
    fixed = _SEGMENT.pack(b"DFSG", VERSION, 0, 0, number, nonce)
    return fixed + _CRC.pack(crc32(fixed))


def parse_segment_header(data: bytes, number: int) -> bytes:
    """The nonce of segment `number`; raises `Corrupt`."""
    if len(data) < SEGMENT_HEADER:
        raise Corrupt(f"the header of segment {number} is cut off")
    magic, version, _, _, found, nonce = _SEGMENT.unpack_from(data)
    if (
        magic != b"DFSG"
        or version != VERSION
        or found != number
        or _CRC.unpack_from(data, _SEGMENT.size)[0] != crc32(data[: _SEGMENT.size])
    ):
        raise Corrupt(f"segment {number} has no valid header of version {VERSION}")
    return bytes(nonce)


def record_header(
    seed: int, kind: int, chunk_id: bytes, size: int, extra: int, stamp: int
) -> bytes:
    """Header of a record; `seed` is `crc32(nonce)` of its segment."""
    fixed = _RECORD.pack(b"DFSR", VERSION, kind, 0, chunk_id, size, extra, stamp)
    return fixed + _CRC.pack(crc32(fixed, seed))


def parse_record(data: bytes | memoryview, seed: int, offset: int) -> Record | None:
    """The record header at the start of `data`, None if it is none."""
    if len(data) < RECORD_HEADER:
        return None
    magic, version, kind, _, chunk_id, size, extra, stamp = _RECORD.unpack_from(data)
    if magic != b"DFSR" or version != VERSION or not PUT <= kind <= DROP:
        return None
    if _CRC.unpack_from(data, _RECORD.size)[0] != crc32(data[: _RECORD.size], seed):
        return None
    return Record(kind, offset, chunk_id, size, extra, stamp)


def scan(read: Read, start: int, size: int, seed: int) -> Scan:
    """Read the record headers in `[start, size)`, skipping payloads.

    Zeros up to a multiple of `ALIGN` are no damage.  Where a header is damaged, the scan looks for
    the next valid one and notes the gap.
    """
    records: list[Record] = []
    gaps: list[tuple[int, int]] = []
    at = end = start
    while at < size:
        record = parse_record(read(RECORD_HEADER, at), seed, at)
        if record is not None and record.end <= size:
            records.append(record)
            at = end = record.end
            continue
        up = min(aligned(at), size)
        if up > at and not any(read(up - at, at)):
            at = up  # zeros before a large record, or after the last one
            if at == size:
                end = at
            continue
        found = _next(read, at + 1, size, seed)
        if found < 0:
            break
        gaps.append((end, found))
        at = found
    return Scan(records, gaps, end)


def _next(read: Read, start: int, size: int, seed: int) -> int:
    """Offset of the first whole record at or after `start`, -1 if there is none."""
    at = start
    while at < size:
        window = read(WINDOW + RECORD_HEADER, at)
        hit = window.find(b"DFSR")
        while 0 <= hit < WINDOW:
            head = memoryview(window)[hit : hit + RECORD_HEADER]
            record = parse_record(head, seed, at + hit)
            if record is not None and record.end <= size:
                return at + hit
            hit = window.find(b"DFSR", hit + 1)
        at += WINDOW
    return -1


def entry(kind: int, offset: int, chunk_id: bytes, size: int, extra: int, stamp: int) -> bytes:
    """One hint entry."""
    return _ENTRY.pack(kind, offset, chunk_id, size, extra, stamp)


def encode_hint(number: int, nonce: bytes, covered: int, entries: bytes | bytearray) -> bytes:
    """A hint file; `entries` are concatenated `entry`s of all the records below `covered`."""
    count = len(entries) // ENTRY_SIZE
    body = _HINT.pack(b"DFSH", VERSION, 0, 0, number, nonce, covered, count) + entries
    return body + _CRC.pack(crc32(body))


def decode_hint(data: bytes, number: int) -> tuple[bytes, int, list[Record]]:
    """`(nonce, covered, records)` of a hint file; raises `Corrupt`."""
    body = memoryview(data)[: -_CRC.size]
    if (
        len(data) < _HINT.size + _CRC.size
        or _CRC.unpack_from(data, len(body))[0] != crc32(body)
        or data[:4] != b"DFSH"
        or data[4] != VERSION
    ):
        raise Corrupt(f"the hint file of segment {number} is no valid one of version {VERSION}")
    _, _, _, _, found, nonce, covered, count = _HINT.unpack_from(body)
    entries = body[_HINT.size :]
    if found != number or len(entries) != count * ENTRY_SIZE:
        raise Corrupt(f"the hint file of segment {number} does not belong to it")
    return bytes(nonce), covered, [Record(*e) for e in _ENTRY.iter_unpack(entries)]
