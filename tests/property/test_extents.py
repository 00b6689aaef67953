"""The extent planners against a bytearray, in sequences of random operations."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.volume import effects as fx
from dfs.volume import extents as ex
from dfs.volume import items
from dfs.volume.items import MAX_EXTENT
from dfs.volume.overlay import Overlay
from dfs.volume.validation import validate

INO = 77
LIMIT = 4000


class File:
    """A file of items, with the chunks it names, and the oracle."""

    def __init__(self):
        self.state = Overlay(lambda key: None)
        self.chunks = {}
        self.size = 0
        self.oracle = bytearray()

    def items(self, start=None, end=None):
        group = items.group(INO, items.EXTENT)
        low, high = group, items.group_end(group)
        if start is not None:
            low, high = ex.bounds(INO, start, end)
        return [
            (key, self.state.items[key][1])
            for key in self.state.keys(low, high)
            if self.state.items[key][1] is not None
        ]

    def extents(self, start=None, end=None):
        return ex.decode(self.items(start, end))

    def apply(self, effects):
        validate(tuple(effects))
        fx.apply(self.state, effects)
        whole = self.extents()
        for a, b in pairwise(whole):
            assert a.end <= b.offset  # never overlap
        for e in whole:
            assert 0 < e.length <= MAX_EXTENT
            assert e.end <= self.size
            if e.data is None:
                assert e.chunk_offset + e.length <= e.chunk_length == len(self.chunks[e.chunk_id])

    def chunk(self, data):
        chunk_id = len(self.chunks).to_bytes(32, "big")
        self.chunks[chunk_id] = bytes(data)
        return chunk_id

    def read(self, offset, length):
        found = self.extents(offset, offset + length)
        out, at = b"", offset
        for piece in ex.plan_read(found, offset, length, self.size):
            assert piece.offset == at
            assert piece.length > 0
            at += piece.length
            if piece.kind == ex.HOLE:
                out += bytes(piece.length)
            elif piece.kind == ex.INLINE:
                assert len(piece.data) == piece.length
                out += piece.data
            else:
                chunk = self.chunks[piece.chunk_id]
                assert piece.chunk_length == len(chunk)
                out += chunk[piece.chunk_offset : piece.chunk_offset + piece.length]
        assert len(out) == at - offset
        return out

    def write(self, offset, data, how):
        end = offset + len(data)
        self.oracle.extend(bytes(max(0, end - len(self.oracle))))
        self.oracle[offset:end] = data
        self.size = max(self.size, end)
        if how == "inline":
            new = [ex.inline(offset, data)]
        else:
            before, after = (3, 5) if how == "packed" else (0, 0)
            whole = bytes(before) + data + b"\xee" * after
            new = [ex.in_chunk(offset, len(data), self.chunk(whole), before, len(whole))]
        self.apply(ex.plan_write(INO, self.extents(offset, end), new))

    def write_two(self, offset, data, gap):
        """Two new extents in one plan, perhaps on both sides of an old one."""
        second = offset + len(data) + gap
        end = second + len(data)
        self.oracle.extend(bytes(max(0, end - len(self.oracle))))
        self.oracle[offset : offset + len(data)] = data
        self.oracle[second:end] = data
        self.size = max(self.size, end)
        chunk_id = self.chunk(data)
        new = [
            ex.in_chunk(second, len(data), chunk_id, 0, len(data)),
            ex.inline(offset, data),
        ]
        self.apply(ex.plan_write(INO, self.extents(offset, end), new))

    def truncate(self, size):
        if size < self.size:
            del self.oracle[size:]
            self.size = size
            self.apply(ex.plan_truncate(INO, self.extents(max(0, size - 1), size), size))
        else:
            self.oracle.extend(bytes(size - len(self.oracle)))
            self.size = size

    def punch(self, start, end):
        stop = min(end, self.size)
        if start < stop:
            self.oracle[start:stop] = bytes(stop - start)
        self.apply(ex.plan_punch(INO, self.extents(start, end), start, end))

    def compact(self, window, limit):
        before = len(self.extents())
        runs = ex.plan_compact(self.extents(), window, limit)
        for offset, length in runs:
            assert offset // window == (offset + length - 1) // window
            data = self.read(offset, length)
            new = ex.in_chunk(offset, length, self.chunk(data), 0, length)
            self.apply(ex.plan_write(INO, self.extents(offset, offset + length), [new]))
        if window >= LIMIT:
            assert len(self.extents()) <= before
            assert ex.plan_compact(self.extents(), window, limit) == []

    def check(self):
        assert self.read(0, LIMIT * 4) == bytes(self.oracle)


offsets = st.integers(0, LIMIT)
lengths = st.integers(1, 600)
operation = st.one_of(
    st.tuples(st.just("write"), offsets, lengths, st.sampled_from(["inline", "chunk", "packed"])),
    st.tuples(st.just("write"), offsets, lengths, st.sampled_from(["inline", "chunk", "packed"])),
    st.tuples(st.just("two"), offsets, st.integers(1, 80), st.integers(0, 100)),
    st.tuples(st.just("truncate"), offsets),
    st.tuples(st.just("punch"), offsets, lengths),
    st.tuples(st.just("read"), offsets, lengths),
    st.tuples(st.just("compact"), st.sampled_from([64, 1000, 1 << 22]), st.integers(1, 6)),
)
OPERATIONS = (
    st.lists(operation, min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)


@given(*OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_file_equals_a_bytearray(operations, random):
    f = File()
    for name, *args in operations:
        if name == "write":
            f.write(args[0], random.randbytes(args[1]), args[2])
        elif name == "two":
            f.write_two(args[0], random.randbytes(args[1]), args[2])
        elif name == "truncate":
            f.truncate(*args)
        elif name == "punch":
            f.punch(args[0], args[0] + args[1])
        elif name == "compact":
            f.compact(*args)
        else:
            offset, length = args
            assert f.read(offset, length) == bytes(f.oracle[offset : offset + length])
            continue
        f.check()


def test_punching_many_extents_removes_them_as_a_range():
    f = File()
    for i in range(600):
        f.write(i * 5, b"abcde", "inline" if i % 2 else "chunk")
    effects = ex.plan_punch(INO, f.extents(), 2, 2998)
    assert len(effects) <= 4
    f.punch(2, 2998)
    f.check()
    assert [e.length for e in f.extents()] == [2, 2]


def test_writes_reach_back_as_far_as_an_extent():
    f = File()
    f.size = MAX_EXTENT
    f.oracle = bytearray(b"x" * MAX_EXTENT)
    whole = ex.in_chunk(0, MAX_EXTENT, f.chunk(f.oracle), 0, MAX_EXTENT)
    f.apply(ex.plan_write(INO, [], [whole]))
    f.write(MAX_EXTENT - 1, b"y", "inline")
    assert [(e.offset, e.length) for e in f.extents()] == [(0, MAX_EXTENT - 1), (MAX_EXTENT - 1, 1)]
    assert f.read(MAX_EXTENT - 3, 5) == b"xxy"


def test_compaction_joins_a_fragmented_window_and_leaves_others_alone():
    f = File()
    for i in range(20):
        f.write(i * 10, b"0123456789", "inline")
    f.write(MAX_EXTENT, b"a", "inline")
    f.write(MAX_EXTENT + 1, b"b", "inline")
    f.write(100_000, b"far", "inline")
    assert ex.plan_compact(f.extents()) == [(0, 200)]
    f.compact(MAX_EXTENT, 16)
    assert [(e.offset, e.length) for e in f.extents()] == [
        (0, 200), (100_000, 3), (MAX_EXTENT, 1), (MAX_EXTENT + 1, 1),
    ]  # fmt: skip


SIZES = st.integers(1, 5 * ex.BLOCK)


@given(st.lists(st.tuples(st.integers(0, 3 * ex.BLOCK), SIZES), max_size=12))
@settings(max_examples=200, deadline=None)
def test_packing_covers_every_range_once(gaps):
    chunk_size = 4 * ex.BLOCK
    ranges, at = [], 0
    for gap, length in gaps:
        at += gap
        ranges.append((at, length))
        at += length
    chunks = ex.plan_pack(ranges, chunk_size)
    pieces = sorted((offset, length) for chunk in chunks for offset, length, _ in chunk)
    want = [b for offset, length in ranges for b in range(offset, offset + length, 4096)]
    got = [(o, o + n) for o, n in pieces]
    assert sum(n for _, n in pieces) == sum(n for _, n in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(got))
    for spot in want[:50]:
        assert any(a <= spot < b for a, b in got)
    for chunk in chunks:
        end = 0
        for offset, length, where in chunk:
            assert where >= end
            end = where + length
            assert end <= chunk_size
            assert offset // chunk_size == (offset + length - 1) // chunk_size
            if length < ex.BLOCK:
                assert where // ex.BLOCK == (end - 1) // ex.BLOCK
