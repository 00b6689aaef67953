"""Whatever arrives, a connection answers with events or with one of its three errors."""

import itertools
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.codec import pack
from dfs.errors import DfsError, RemoteProtocolError, WrongCluster, WrongVersion
from dfs.wire.connection import Connection, Role
from dfs.wire.frame import CAST, ERROR, HEADER_SIZE, HELLO, REPLY, REQUEST, Decoder, encode
from dfs.wire.outgoing import SendQueue

FAULTS = (RemoteProtocolError, WrongVersion, WrongCluster)
fast = settings(max_examples=150, deadline=None)


def cut(raw, cuts):
    """Pieces of `raw` with ends where `cuts` (fractions) say."""
    ends = sorted({int(c * len(raw)) for c in cuts} | {0, len(raw)})
    return [raw[a:b] for a, b in itertools.pairwise(ends)]


def feed(target, pieces):
    out = []
    for piece in pieces:
        while piece:
            buffer = target.next_buffer()
            n = min(len(buffer), len(piece))
            buffer[:n] = piece[:n]
            piece = piece[n:]
            out += [(*e[:-2], _value(e[-2]), bytes(e[-1])) for e in target.received(n)]
    return out


def _value(value):
    return bytes(value) if isinstance(value, memoryview) else value


cuts = st.lists(st.floats(0, 1), max_size=8)
frames = st.lists(
    st.tuples(
        st.sampled_from([HELLO, REQUEST, REPLY, ERROR, CAST]),
        st.integers(0, 2**64 - 1),
        st.integers(0, 3),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=40) | st.binary(min_size=1, max_size=4).map(lambda b: b * 9000),
        st.binary(max_size=40) | st.binary(min_size=1, max_size=4).map(lambda b: b * 20000),
    ),
    max_size=6,
)


def wire(frame):
    kind, stream, priority, epoch, deadline, meta, data = frame
    head = encode(kind, stream, meta, len(data), priority=priority, epoch=epoch, deadline=deadline)
    return head + data


@fast
@given(frames, cuts)
def test_round_trip_for_any_split(sent, where):
    decoder = Decoder()
    assert feed(decoder, cut(b"".join(map(wire, sent)), where)) == sent
    decoder.eof()


@fast
@given(st.binary(max_size=300), cuts, st.booleans())
def test_arbitrary_bytes(raw, where, prefixed):
    if prefixed:
        raw = b"dF\x01" + raw
    for target in (Decoder(), *connections()):
        try:
            feed(target, cut(raw, where))
            target.eof()
        except FAULTS:
            pass


def connections():
    return [Connection(Role.CLIENT, b"c", "a"), Connection(Role.SERVER, b"c", "b")]


def opened(role):
    other = Role.SERVER if role is Role.CLIENT else Role.CLIENT
    a, b = Connection(role, b"c", "a"), Connection(other, b"c", "b")
    for source, target in [(a, b), (b, a), (a, b)]:
        raw = b"".join(source.queue.batch())
        source.queue.sent(len(raw))
        feed(target, [raw])
    return a


MESSAGES = {
    Role.SERVER: [(REQUEST, ("m", (1, b"x"))), (CAST, ("m", ()))],
    Role.CLIENT: [(REPLY, (1, 2)), (ERROR, (2, "gone", ())), (ERROR, (30, "posix", (2,)))],
}


@fast
@given(st.data())
def test_mutated_frames(data):
    role = data.draw(st.sampled_from(list(Role)))
    picks = data.draw(st.lists(st.sampled_from(MESSAGES[role]), min_size=1, max_size=4))
    size = data.draw(st.sampled_from([0, 10, 30_000]))
    raw = bytearray()
    for i, (kind, value) in enumerate(picks):
        raw += encode(kind, i, pack(value), size) + bytes(size)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, HEADER_SIZE + 9))
        if at < len(raw):
            raw[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    target = opened(role)
    try:
        events = feed(target, cut(bytes(raw), data.draw(cuts)))
        target.eof()
    except FAULTS:
        return
    for event, (kind, value) in zip(events, picks, strict=False):
        # What got through the checksum is what was sent; only bulk data is not covered by it.
        assert event[0] == kind
        assert isinstance(event[5], DfsError) or event[5] == value


@fast
@given(
    st.binary(min_size=HEADER_SIZE - 8, max_size=HEADER_SIZE - 8),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
def test_memory_stays_within_the_limits(rest, max_meta, max_data):
    """A header alone never makes the decoder allocate more than it may hold."""
    decoder = Decoder(max_meta=max_meta, max_data=max_data)
    raw = b"dF\x01\x03" + b"\0\0\0\0" + b"\0\0\0\0" + rest[4:]
    try:
        feed(decoder, [raw])
        assert decoder.waiting <= max_meta + max_data
        decoder.next_buffer()
    except FAULTS:
        pass


def test_a_liar_gets_no_memory():
    tracemalloc.start()
    try:
        for lengths in (b"\xff" * 8, b"\x02\0\0\1" + b"\0" * 4, b"\0" * 4 + b"\x04\0\0\1"):
            decoder = Decoder()
            try:
                feed(decoder, [b"dF\x01\x03" + bytes(HEADER_SIZE - 12) + lengths])
                raise AssertionError("accepted")
            except RemoteProtocolError:
                pass
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@fast
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(0, 9000)), max_size=8),
    st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
)
def test_send_queue_sends_everything_once(puts, steps):
    queue = SendQueue()
    expected = dict.fromkeys(range(4), b"")
    for i, (priority, head, data) in enumerate(puts):
        piece, bulk = bytes([i]) * head, bytes([i]) * data
        queue.put(priority, piece, (bulk,) if bulk else (), len(bulk))
        expected[priority] += piece + bulk
    out = b""
    turn = 0
    while batch := queue.batch():
        raw = b"".join(batch)[: steps[turn % len(steps)]]
        queue.sent(len(raw))
        out += raw
        turn += 1
    assert out == b"".join(expected[p] for p in range(4))
    assert queue.size == 0
