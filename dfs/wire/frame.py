"""Frames: a fixed header, codec-encoded meta, raw data.  Encoding and an incremental decoder.

Header, 40 bytes, big-endian:

    offset  size  field
         0     2  magic b"dF"
         2     1  version of this format
         3     1  kind: HELLO, GOODBYE, REQUEST, REPLY, ERROR, CAST
         4     4  CRC-32 of all from offset 8 to the end of meta, seeded with kind and version
         8     1  priority, 0..3 (`dfs.env.Priority`)
         9     1  flags, 0
        10     2  reserved, 0
        12     8  stream: the caller's number of the request; 0 where there is none
        20     8  epoch of the cluster map the sender acts on; 0 = none
        28     4  deadline in milliseconds from now; 0 = none
        32     4  meta length
        36     4  data length

The first four bytes keep their place in every version.  The CRC does not cover the data: whoever
stores data checks it against its content hash.

The decoder never allocates on the word of a peer beyond `max_meta + max_data`, and lets its owner
delay or refuse that allocation (`waiting`, `discard`).  Small frames are parsed many at a time from
one scratch buffer; a large frame gets a buffer of its own which the socket fills directly.
"""

from collections.abc import Sequence
from struct import Struct

from dfs.buffers import allocate
from dfs.codec import Buffer
from dfs.errors import DfsError, LocalProtocolError, RemoteProtocolError, WrongVersion
from dfs.hashing import crc32

Buffers = Buffer | Sequence[Buffer]

MAGIC = b"dF"
VERSION = 1
HELLO, GOODBYE, REQUEST, REPLY, ERROR, CAST = range(1, 7)
KIND_NAMES = ("?", "HELLO", "GOODBYE", "REQUEST", "REPLY", "ERROR", "CAST")
PRIORITIES = 4
MAX_META = 32 << 20
MAX_DATA = 64 << 20
SCRATCH = 64 << 10
DIRECT = 16 << 10  # a frame larger than this that is not here completely gets its own buffer

_PREFIX = Struct(">2sBBI")
_REST = Struct(">BBHQQIII")
_HEADER = Struct(">2sBBIBBHQQIII")
HEADER_SIZE = _HEADER.size
_EMPTY = memoryview(b"")

# (kind, crc, priority, stream, epoch, deadline in ms, meta length, data length)
Head = tuple[int, int, int, int, int, int, int, int]
# (kind, stream, priority, epoch, deadline in ms, meta or None when discarded, data); meta is only
# valid until the next `next_buffer()`
Frame = tuple[int, int, int, int, int, memoryview | None, memoryview]


def encode(
    kind: int,
    stream: int,
    meta: bytes,
    data_length: int = 0,
    *,
    priority: int = 0,
    epoch: int = 0,
    deadline: int = 0,
) -> bytes:
    """Header and meta of a frame; `data_length` bytes must follow them on the wire.

    Raises `LocalProtocolError` when the frame is over the limits or a field is out of range.
    """
    if len(meta) > MAX_META or data_length > MAX_DATA:
        raise LocalProtocolError(
            f"frame with {len(meta)} bytes of meta and {data_length} bytes of data is over the "
            f"limits of {MAX_META} and {MAX_DATA}; send it in parts"
        )
    if not 0 <= priority < PRIORITIES:
        raise LocalProtocolError(f"priority {priority} is not in 0..{PRIORITIES - 1}")
    body = _REST.pack(priority, 0, 0, stream, epoch, deadline, len(meta), data_length) + meta
    return _PREFIX.pack(MAGIC, VERSION, kind, crc32(body, kind << 8 | VERSION)) + body


def gather(data: Buffers) -> tuple[Sequence[Buffer], int]:
    """The buffers that bulk data consists of and their length together, without copying."""
    if type(data) is bytes:
        return ((data,), len(data)) if data else ((), 0)
    parts: Sequence[Buffer] = (data,) if isinstance(data, bytes | bytearray | memoryview) else data
    views = [memoryview(p).cast("B") for p in parts if len(p)]
    return views, sum(map(len, views))


class Decoder:
    """Turns received bytes into frames.  Fill `next_buffer()`, then tell `received(n)`."""

    __slots__ = (
        "_body", "_end", "_error", "_filled", "_head", "_max_data", "_max_meta",
        "_scratch", "_seen", "_single", "_skip", "_start", "_view",
    )  # fmt: skip

    def __init__(
        self, *, max_meta: int = MAX_META, max_data: int = MAX_DATA, single: bool = False
    ) -> None:
        """Start at a frame boundary; `single` gives one frame at a time until `limit` is called."""
        self._single = single
        self._max_meta = max_meta
        self._max_data = max_data
        self._scratch = bytearray(SCRATCH)
        self._view = memoryview(self._scratch)
        self._start = self._end = 0  # unparsed bytes of the scratch buffer
        self._head: Head | None = None  # header of the large frame under way
        self._body: memoryview | None = None  # its meta and data
        self._filled = 0
        self._skip = 0  # bytes of a discarded frame still to come
        self._seen = False
        self._error: DfsError | None = None

    def limit(self, max_meta: int, max_data: int) -> None:
        """Set other limits for the frames that did not come out yet; `received(0)` gives them."""
        self._single = False
        self._max_meta, self._max_data = max_meta, max_data

    @property
    def waiting(self) -> int:
        """Bytes that the next `next_buffer()` will allocate for a large frame; 0 = none."""
        head = self._head
        return 0 if head is None or self._body is not None or self._skip else head[6] + head[7]

    @property
    def head(self) -> Head:
        """Header of the large frame that is under way."""
        if self._head is None:
            raise LocalProtocolError("no large frame is under way")
        return self._head

    def discard(self) -> None:
        """Read the waiting large frame without keeping it; it then comes out with meta None."""
        self._skip = self.waiting - (self._end - self._start - HEADER_SIZE)
        self._start = self._end = 0

    def next_buffer(self) -> memoryview:
        """Where to receive next; raises what earlier bytes deserve once their frames are out."""
        if self._error is not None:
            raise self._error
        body = self._body
        if body is not None:
            return body[self._filled :]
        if self._skip:
            return self._view[: min(self._skip, SCRATCH)]
        start, end = self._start, self._end
        if self._head is not None:
            self._body = body = memoryview(allocate(self.waiting))
            have = self._view[start + HEADER_SIZE : end]
            self._filled = len(have)
            body[: len(have)] = have
            self._start = self._end = 0
            return body[self._filled :]
        if start:
            self._scratch[: end - start] = self._view[start:end]
            self._start, self._end = 0, end - start
        return self._view[self._end :]

    def received(self, n: int) -> list[Frame]:
        """`n` bytes are in the buffer: the frames that are complete now.

        Raises `RemoteProtocolError` (`WrongVersion` if the very first header tells of another
        format); frames before the bad one are returned first, the error by the next call.
        """
        head = self._head
        if head is None:
            self._end += n
            return self._parse()
        kind, crc, priority, stream, epoch, deadline, meta_length, data_length = head
        if self._skip:
            self._skip -= n
            if self._skip:
                return []
            self._head = None
            return [(kind, stream, priority, epoch, deadline, None, _EMPTY)]
        body = self._body
        if body is None:
            raise LocalProtocolError("received() without next_buffer()")
        self._filled += n
        if self._filled < len(body):
            return []
        self._head = self._body = None
        # The header's own bytes left the scratch buffer: build what the CRC covers again.
        rest = _REST.pack(priority, 0, 0, stream, epoch, deadline, meta_length, data_length)
        meta = body[:meta_length]
        if crc32(meta, crc32(rest, kind << 8 | VERSION)) != crc:
            raise self._fail(RemoteProtocolError("a frame's checksum does not match its bytes"))
        return [(kind, stream, priority, epoch, deadline, meta, body[meta_length:])]

    def release(self) -> None:
        """Let go of all buffers; nothing can be received any more."""
        self._error = self._error or LocalProtocolError("the connection is closed")
        self._scratch = bytearray()
        self._view = _EMPTY
        self._start = self._end = 0
        self._head = self._body = None

    def eof(self) -> None:
        """The peer sent everything; raises `RemoteProtocolError` if that ends inside a frame."""
        if self._error is not None:
            raise self._error
        if self._head is not None or self._end > self._start:
            raise self._fail(RemoteProtocolError("the connection ended inside a frame"))

    def _fail(self, error: DfsError) -> DfsError:
        self._error = error
        return error

    def _parse(self) -> list[Frame]:
        frames: list[Frame] = []
        view, start, end = self._view, self._start, self._end
        unpack_from = _HEADER.unpack_from
        while end - start >= HEADER_SIZE:
            (
                magic, version, kind, crc, priority, flags, reserved,
                stream, epoch, deadline, meta_length, data_length,
            ) = unpack_from(view, start)  # fmt: skip
            if (
                magic != MAGIC
                or version != VERSION
                or not HELLO <= kind <= CAST
                or priority >= PRIORITIES
                or flags
                or reserved
                or meta_length > self._max_meta
                or data_length > self._max_data
            ):
                error = self._judge(bytes(view[start : start + HEADER_SIZE]))
                if frames:
                    break
                raise error
            middle = start + HEADER_SIZE + meta_length
            stop = middle + data_length
            if stop > end:
                if stop - start > DIRECT:
                    self._head = (
                        kind, crc, priority, stream, epoch, deadline, meta_length, data_length,
                    )  # fmt: skip
                break
            if crc32(view[start + 8 : middle], kind << 8 | version) != crc:
                error = self._fail(RemoteProtocolError("a frame's checksum does not match"))
                if frames:
                    break
                raise error
            # The scratch buffer is used again, so data is copied; meta is decoded before that.
            data = memoryview(bytes(view[middle:stop])) if data_length else _EMPTY
            frames.append(
                (kind, stream, priority, epoch, deadline, view[start + HEADER_SIZE : middle], data)
            )
            start = stop
            if self._single:
                break
        self._seen = self._seen or bool(frames)
        self._start = start
        return frames

    def _judge(self, header: bytes) -> DfsError:
        """Why a header is refused."""
        magic, version, kind, _, priority, _, _, _, _, _, meta_length, data_length = _HEADER.unpack(
            header
        )
        if magic != MAGIC:
            text = f"bytes {header[:8]!r} start no frame; is the peer a dfs node?"
        elif version != VERSION and not self._seen:
            return self._fail(
                WrongVersion(
                    f"the peer speaks wire format {version}, we speak {VERSION}; "
                    "run the same release of dfs on both sides"
                )
            )
        elif meta_length > self._max_meta or data_length > self._max_data:
            text = (
                f"frame with {meta_length} bytes of meta and {data_length} bytes of data is over "
                f"the limits of {self._max_meta} and {self._max_data}"
            )
        else:
            text = f"frame of version {version}, kind {kind}, priority {priority} makes no sense"
        return self._fail(RemoteProtocolError(text))
