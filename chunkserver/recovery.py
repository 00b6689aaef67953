"""Start of a segment store: hints, scans, torn tails, damage; everything found is told.

The order is: replay every segment in number order, from its hint as far as that reaches and by
scanning record headers from there; then verify by hashing every live chunk that no hint covers,
because a crash may have kept a record's header and lost its data.  What a hint covers was synced
before the hint was written, so a start after a clean stop reads hints only, and one after a crash
hashes at most what was written since the last hint (64 MiB) or one segment.

- A tail without a valid record, or ending in records whose data is bad, is cut: it was never
  acknowledged as durable.
- A damaged header in the middle is skipped to the next valid record.
- A chunk in the middle whose data is bad becomes a *suspect*: most likely it was never synced.  The
  server drops it and asks the other homes; if none has it, it was never acknowledged.
- A segment whose header and hint are both unreadable is moved to `quarantine/`.
"""

from dataclasses import dataclass, field

from chunkserver import records
from chunkserver.index import Entry
from chunkserver.ledger import Ledger, Usage
from chunkserver.records import PUT, Record
from dfs.chunks import format as chunks
from dfs.env import Disk, DiskFile
from dfs.errors import Corrupt, DfsError, NotFound, StoreFailed
from dfs.hashing import crc32

SEGMENTS = "segments"
QUARANTINE = "quarantine"


class Segment:
    """One open segment file."""

    __slots__ = (
        "covered", "doomed", "file", "log", "nonce", "number", "readers", "seed", "size",
    )  # fmt: skip

    def __init__(self, number: int, file: DiskFile, nonce: bytes, size: int) -> None:
        """Own the open file."""
        self.number = number
        self.file = file
        self.nonce = nonce
        self.seed = crc32(nonce)
        self.size = size
        self.covered = records.SEGMENT_HEADER  # a hint on disk covers everything below
        self.log = bytearray()  # hint entries of all its records; empty once sealed
        self.readers = 0
        self.doomed = False  # unlinked; the last reader closes the file

    def release(self) -> None:
        """One reader less."""
        self.readers -= 1
        if self.doomed and not self.readers:
            self.file.close()


def segment_name(number: int) -> str:
    """Name of a segment file."""
    return f"{SEGMENTS}/{number:08d}.seg"


def hint_name(number: int) -> str:
    """Name of a hint file."""
    return f"{SEGMENTS}/{number:08d}.hint"


@dataclass(slots=True)
class Recovery:
    """What a start found; the texts are for an operator."""

    segments: dict[int, Segment] = field(default_factory=dict)
    suspects: list[tuple[bytes, str]] = field(default_factory=list)  # held, but the data is bad
    missing: list[tuple[bytes, str]] = field(default_factory=list)  # were held, are gone
    garbage: list[Entry] = field(default_factory=list)  # dead chunks whose space may be in use
    notes: list[str] = field(default_factory=list)  # normal after a crash
    errors: list[str] = field(default_factory=list)  # damage
    hashed: int = 0  # bytes verified


def recover(disk: Disk, ledger: Ledger) -> Recovery:
    """Rebuild the ledger from the files; blocking.  Raises `StoreFailed` when the disk fails."""
    found = Recovery()
    disk.mkdir(SEGMENTS)
    disk.mkdir(QUARANTINE)
    names = disk.listdir(SEGMENTS)
    numbers = sorted(int(n[:-4]) for n in names if n.endswith(".seg") and n[:-4].isdigit())
    unproven: dict[int, list[Record]] = {}
    for number in numbers:
        unproven[number] = _load(disk, ledger, number, found)
    for name in names:
        if name.endswith(".hint") and int(name[:-5]) not in numbers:
            _lost(disk, name, ledger, found)
    last = numbers[-1] if numbers else 0
    for number, put in unproven.items():
        _prove(ledger, number, put, found, is_last=number == last)
    return found


def _load(disk: Disk, ledger: Ledger, number: int, found: Recovery) -> list[Record]:
    """Open and replay one segment; returns its records that no hint covers."""
    name = segment_name(number)
    file = disk.open(name)
    size = file.size()
    nonce, covered, hinted = _hint(disk, number, size, found)
    try:
        nonce = records.parse_segment_header(file.pread(records.SEGMENT_HEADER, 0), number)
    except Corrupt as e:
        if size < records.SEGMENT_HEADER:
            file.close()
            disk.unlink(name)
            disk.sync_dir(SEGMENTS)
            found.notes.append(f"removed {disk.path(name)}: a crash interrupted its creation")
            return []
        if not nonce:
            file.close()
            disk.rename(name, f"{QUARANTINE}/{number:08d}.seg")
            disk.sync_dir(SEGMENTS)
            disk.sync_dir(QUARANTINE)
            found.errors.append(f"{e}; moved to {disk.path(QUARANTINE)}, {size} bytes")
            return []
        found.errors.append(f"{e}; it is read by its hint file")
    segment = Segment(number, file, nonce, size)
    segment.covered = covered
    found.segments[number] = segment
    ledger.segments[number] = Usage()
    scanned = records.scan(file.pread, covered, size, segment.seed)
    for start, end in scanned.gaps:
        found.errors.append(f"{disk.path(name)}: {end - start} damaged bytes skipped at {start}")
    if scanned.end < size:
        _cut(segment, scanned.end, found)
    for record in hinted:
        ledger.apply(number, record)
    for record in scanned.records:
        if (dead := ledger.apply(number, record)) is not None:
            found.garbage.append(dead)
    for record in (*hinted, *scanned.records):
        segment.log += records.entry(*record)
    return scanned.records


def _hint(disk: Disk, number: int, size: int, found: Recovery) -> tuple[bytes, int, list[Record]]:
    """`(nonce, covered, records)` of the hint, or of no hint."""
    name = hint_name(number)
    nothing: tuple[bytes, int, list[Record]] = (b"", records.SEGMENT_HEADER, [])
    try:
        file = disk.open(name)
    except NotFound:
        return nothing
    try:
        nonce, covered, hinted = records.decode_hint(file.pread(file.size(), 0), number)
    except (Corrupt, StoreFailed) as e:
        found.errors.append(f"{e}; scanning the segment instead")
        return nothing
    finally:
        file.close()
    if covered > size:
        found.errors.append(
            f"{disk.path(segment_name(number))} has {size} bytes, but {covered} were synced; "
            "scanning what is left"
        )
        return nonce, records.SEGMENT_HEADER, []
    return nonce, covered, hinted


def _lost(disk: Disk, name: str, ledger: Ledger, found: Recovery) -> None:
    """A hint without its segment: a sealed file was removed behind our back."""
    number = int(name[:-5])
    _, _, hinted = _hint(disk, number, 1 << 62, found)
    ids = {r.chunk_id for r in hinted if r.type == PUT}
    missing = [i for i in ids if ledger.index.get(i) is None and i not in ledger.dead]
    if missing:
        found.errors.append(
            f"{disk.path(segment_name(number))} is gone, {len(missing)} chunks lost"
        )
        found.missing += [(i, f"segment {number} is gone") for i in sorted(missing)]
    else:  # kept until every chunk it names is back
        disk.unlink(f"{SEGMENTS}/{name}")


def _cut(segment: Segment, end: int, found: Recovery) -> None:
    found.notes.append(f"segment {segment.number}: cut {segment.size - end} torn bytes at {end}")
    segment.file.truncate(end)
    segment.size = end


def _prove(
    ledger: Ledger, number: int, written: list[Record], found: Recovery, *, is_last: bool
) -> None:
    """Hash the live chunks among `written`; cut a bad tail, report the other bad ones."""
    segment = found.segments.get(number)
    if segment is None:
        return
    bad: dict[int, str] = {}
    for record in written:
        entry = ledger.index.get(record.chunk_id)
        if record.type != PUT or entry is None:
            continue
        if (entry.segment, entry.offset) != (number, record.payload):
            continue
        try:
            data = segment.file.pread(record.size, record.payload)
            header = chunks.verify(data, record.chunk_id)
            if header.length != record.extra:
                raise Corrupt(f"record and chunk {record.chunk_id.hex()[:16]} differ in length")
            found.hashed += len(data)
        except DfsError as e:
            bad[record.offset] = str(e)
    while is_last and written and written[-1].offset in bad:
        record = written.pop()
        del bad[record.offset]
        ledger.discard(record.chunk_id)
        del segment.log[-records.ENTRY_SIZE :]
        _cut(segment, record.offset, found)
    found.suspects += [(r.chunk_id, bad[r.offset]) for r in written if r.offset in bad]
