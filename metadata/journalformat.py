"""The format of the journals' log, and how a torn tail is told from damage.

Format 1, little-endian.  File `<12 digits>.log`:

    header   magic "dfsjrnl\\n" | u16 format | u64 segment number | u32 crc of the above
    record   u32 crc of the rest | u32 length of the body | u8 kind | 16s volume | body
    body     PROMISED  u64 round | u16 node
             ENTRY     u64 seq | u64 round | u16 node | u8 chosen | 32s prev_hash | payload
             BASE      msgpack (seq, hash, version, members, genesis, promised)
             MARK      "dfsmark\\n" | u64 segment number | u64 own offset | u64 synced

The last segment may end in zeros, room for what comes.

A MARK precedes each batch and follows the last one when the log falls idle: it says that the
segment was durable up to `synced` when the mark was made.  That is how recovery tells a torn tail
from damage: an unreadable record at an offset which a later mark calls synced (or anywhere in a
segment that is not the last) was once durable, so promises may be lost, and the node must not
answer for its journals any more (`StoreFailed`).  Otherwise nobody was told about what follows the
bad record, and the segment is cut there.  The file `<directory>.made` says that a log was begun: an
empty directory beside it is a loss, not a beginning.
"""

from struct import Struct

from dfs.codec import pack, unpack
from dfs.errors import Corrupt, DfsError
from dfs.hashing import crc32
from metadata.journalstate import BASE, ENTRY, PROMISED, Record

MAGIC, MARK_MAGIC, FORMAT = b"dfsjrnl\n", b"dfsmark\n", 1
MARK = 4

HEADER = Struct("<8sHQI")
RECORD = Struct("<IIB16s")
_PROMISED = Struct("<QH")
_ENTRY = Struct("<QQHB32s")
_MARK = Struct("<8sQQQ")
_NOBODY = bytes(16)
_MARK_AT = RECORD.size  # where MARK_MAGIC stands in a mark
MARK_SIZE = RECORD.size + _MARK.size


def encode(volume: bytes, record: Record) -> list[bytes]:
    """One record as buffers."""
    kind = record[0]
    payload = b""
    if kind == ENTRY:
        _, seq, ballot, prev_hash, payload, chosen = record
        body = _ENTRY.pack(seq, *ballot, chosen, prev_hash)
    elif kind == PROMISED:
        body = _PROMISED.pack(*record[1])
    else:
        body = pack(record[1:])
    return _frame(kind, volume, body, payload)


def _frame(kind: int, volume: bytes, body: bytes, payload: bytes = b"") -> list[bytes]:
    head = RECORD.pack(0, len(body) + len(payload), kind, volume)[4:] + body
    crc = crc32(payload, crc32(head)) if payload else crc32(head)
    head = crc.to_bytes(4, "little") + head
    return [head, payload] if payload else [head]


def decode(kind: int, body: bytes) -> Record:
    """The record of a body whose CRC was right."""
    if kind == ENTRY:
        seq, round_, node, chosen, prev_hash = _ENTRY.unpack_from(body)
        return (ENTRY, seq, (round_, node), prev_hash, body[_ENTRY.size :], bool(chosen))
    if kind == PROMISED:
        return (PROMISED, _PROMISED.unpack(body))
    return (BASE, *unpack(body))


def mark(number: int, offset: int, synced: int) -> bytes:
    """A MARK at `offset` of segment `number`."""
    return _frame(MARK, _NOBODY, _MARK.pack(MARK_MAGIC, number, offset, synced))[0]


def header(number: int) -> bytes:
    """The header of segment `number`."""
    head = HEADER.pack(MAGIC, FORMAT, number, 0)[:-4]
    return head + crc32(head).to_bytes(4, "little")


def record_at(data: memoryview, offset: int) -> tuple[int, bytes, int] | None:
    """(kind, volume, end) of the record at `offset`, None if it is not intact."""
    start = offset + RECORD.size
    if start > len(data):
        return None
    crc, length, kind, volume = RECORD.unpack_from(data, offset)
    end = start + length
    if end > len(data) or crc32(data[offset + 4 : end]) != crc:
        return None
    return kind, volume, end


def _claimed(data: bytes, number: int, start: int) -> int:
    """The furthest offset that marks at or after `start` call synced."""
    view = memoryview(data)
    synced = 0
    at = data.find(MARK_MAGIC, start)
    while at >= 0:
        offset = at - _MARK_AT
        if offset >= start and record_at(view, offset) is not None:
            _, claimed, own, done = _MARK.unpack_from(data, at)
            if (claimed, own) == (number, offset):
                synced = max(synced, done)
        at = data.find(MARK_MAGIC, at + 1)
    return synced


Found = tuple[bytes, Record, int, int]  # volume, record, offset, end


def parse(data: bytes, number: int, *, last: bool) -> tuple[list[Found], int]:
    """The records of a segment, and where its intact part ends; raises `Corrupt` on damage."""
    if data[: HEADER.size] != header(number):
        raise Corrupt("at offset 0: not the header of this segment in a format this version reads")
    view = memoryview(data)
    found: list[Found] = []
    offset = HEADER.size
    while offset < len(data):
        record = record_at(view, offset)
        if record is None:
            if not last or _claimed(data, number, offset + 1) > offset:
                raise Corrupt(f"at offset {offset}: a record that was durable is damaged")
            break
        kind, volume, end = record
        if kind != MARK:
            try:
                body = decode(kind, data[offset + RECORD.size : end])
            except (DfsError, ValueError) as e:
                raise Corrupt(f"at offset {offset}: unreadable record of kind {kind}") from e
            found.append((volume, body, offset, end))
        offset = end
    return found, offset
