"""The frame format: golden bytes, limits, large frames, and what a broken header earns."""

from pathlib import Path

import pytest

from dfs.errors import LocalProtocolError, RemoteProtocolError, WrongVersion
from dfs.wire import frame
from dfs.wire.frame import CAST, DIRECT, ERROR, HEADER_SIZE, HELLO, REPLY, REQUEST, Decoder, encode

GOLDEN = Path(__file__).parents[2] / "data" / "frames-v1.txt"
FRAMES = {
    "hello": (HELLO, 0, 0, 0, 0, b"\x94\x01\xc4\x01c\xa1n\xc4\x00", b""),
    "request": (REQUEST, 7, 1, 12, 2500, b"\x92\xa4ping\x90", b""),
    "put": (REQUEST, 2**40, 2, 2**33, 60_000, b"\x92\xa9chunk.put\x91\xc4\x02id", b"data"),
    "reply": (REPLY, 7, 1, 0, 0, b"\x91\x2a", b"0123456789"),
    "error": (ERROR, 8, 0, 0, 0, b"\x93\x02\xa4gone\x90", b""),
    "cast": (CAST, 0, 3, 0, 1, b"\x92\xa4jrnl\x90", b""),
}


def whole(kind, stream, priority, epoch, deadline, meta, data):
    head = encode(kind, stream, meta, len(data), priority=priority, epoch=epoch, deadline=deadline)
    return head + data


def feed(decoder, raw, step=1 << 20):
    """Everything that comes out, with meta and data as bytes."""
    out = []
    at = 0
    while at < len(raw):
        buffer = decoder.next_buffer()
        n = min(len(buffer), len(raw) - at, step)
        buffer[:n] = raw[at : at + n]
        at += n
        for *rest, meta, data in decoder.received(n):
            out.append((*rest, None if meta is None else bytes(meta), bytes(data)))
    return out


def test_golden_frames():
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line[:1] not in ("", "#")]
    golden = {name: bytes.fromhex(text) for name, text in lines}
    assert golden == {name: whole(*fields) for name, fields in FRAMES.items()}
    assert feed(Decoder(), b"".join(golden.values())) == list(FRAMES.values())


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_frames_of_all_sizes_in_pieces_of_all_sizes(step):
    sizes = [0, 1, 4096, DIRECT - HEADER_SIZE, DIRECT, frame.SCRATCH, 200_000]
    if step == 1:
        sizes = sizes[:5]
    sent = [
        (REQUEST, i, i % 4, 0, 5, b"m" * (i + 1), bytes([i]) * size)
        for i, size in enumerate(sizes + sizes[::-1])
    ]
    assert feed(Decoder(), b"".join(whole(*f) for f in sent), step) == sent


def test_large_meta():
    sent = [(REPLY, 3, 0, 0, 0, b"m" * 300_000, b"")]
    assert feed(Decoder(), whole(*sent[0]), 50_000) == sent


def test_a_large_frame_is_received_into_its_own_buffer():
    decoder = Decoder()
    raw = whole(REPLY, 1, 0, 0, 0, b"meta", b"x" * 100_000)
    decoder.next_buffer()[:50] = raw[:50]
    assert decoder.received(50) == []
    assert decoder.waiting == 100_004
    assert decoder.head[0] == REPLY
    buffer = decoder.next_buffer()
    assert len(buffer) == 100_004 - 10  # exactly what is missing: nothing of the next frame
    assert decoder.waiting == 0
    buffer[:] = raw[50:]
    ((*_, data),) = decoder.received(len(buffer))
    assert data.obj is buffer.obj


def test_discarded_frames_keep_the_stream_in_step():
    decoder = Decoder()
    big = whole(REQUEST, 5, 2, 9, 100, b"meta", b"x" * 500_000)
    after = whole(REQUEST, 6, 0, 0, 0, b"m", b"")
    decoder.next_buffer()[:100] = big[:100]
    decoder.received(100)
    assert decoder.waiting
    decoder.discard()
    assert feed(decoder, big[100:] + after) == [
        (REQUEST, 5, 2, 9, 100, None, b""),
        (REQUEST, 6, 0, 0, 0, b"m", b""),
    ]


def test_limits_are_checked_before_allocation():
    decoder = Decoder(max_meta=100, max_data=1000)
    feed(decoder, whole(REQUEST, 1, 0, 0, 0, b"m" * 100, b"d" * 1000))
    for meta, data in [(101, 0), (0, 1001), (2**32 - 1, 2**32 - 1)]:
        fresh = Decoder(max_meta=100, max_data=1000)
        raw = frame._PREFIX.pack(frame.MAGIC, 1, REQUEST, 0) + frame._REST.pack(
            0, 0, 0, 1, 0, 0, meta, data
        )
        with pytest.raises(RemoteProtocolError, match="over the limits"):
            feed(fresh, raw)
        assert fresh.waiting == 0


def test_our_own_limits():
    with pytest.raises(LocalProtocolError, match="in parts"):
        encode(REQUEST, 1, b"", frame.MAX_DATA + 1)
    with pytest.raises(LocalProtocolError):
        encode(REQUEST, 1, b"", priority=4)


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        (0, b"GE", "start no frame"),
        (3, b"\x00", "makes no sense"),
        (3, b"\x63", "makes no sense"),
        (8, b"\x04", "makes no sense"),
        (9, b"\x01", "makes no sense"),
        (11, b"\x01", "makes no sense"),
        (15, b"\xee", "checksum"),
        (4, b"\x01\x02", "checksum"),
        (40, b"?", "checksum"),
    ],
)
def test_broken_headers(offset, value, text):
    good = whole(*FRAMES["request"])
    bad = good[:offset] + value + good[offset + len(value) :]
    with pytest.raises(RemoteProtocolError, match=text):
        feed(Decoder(), bad)
    # Frames before it still come out; then the decoder is over.
    decoder = Decoder()
    assert len(feed(decoder, good + good + bad)) == 2
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=text):
            decoder.next_buffer()
    with pytest.raises(RemoteProtocolError):
        decoder.eof()


def test_a_large_frame_is_checked_too():
    raw = bytearray(whole(REPLY, 1, 0, 0, 0, b"meta", b"x" * 100_000))
    raw[41] ^= 1
    with pytest.raises(RemoteProtocolError, match="checksum"):
        feed(Decoder(), bytes(raw), 30_000)


def test_another_version():
    good = whole(*FRAMES["request"])
    newer = good[:2] + b"\x02" + good[3:]
    with pytest.raises(WrongVersion, match="same release"):
        feed(Decoder(), newer)
    decoder = Decoder()
    feed(decoder, good)
    with pytest.raises(RemoteProtocolError):
        feed(decoder, newer)


def test_truncation():
    raw = whole(REPLY, 1, 0, 0, 0, b"meta", b"x" * 50_000)
    for cut in (0, 1, HEADER_SIZE, 20_000, len(raw) - 1, len(raw)):
        decoder = Decoder()
        feed(decoder, raw[:cut])
        if cut in (0, len(raw)):
            decoder.eof()
        else:
            with pytest.raises(RemoteProtocolError, match="inside a frame"):
                decoder.eof()
