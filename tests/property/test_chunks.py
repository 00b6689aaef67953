"""Chunks against oracles: encodings against the plain bytes, the store against a dict."""

import itertools
import random

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkserver.index import Entry, Index, different_partitions
from chunkserver.segments import Segments, StoreOptions, room_for
from dfs.chunks import format as chunks
from dfs.chunks.chunker import plan
from dfs.env import Env
from dfs.hashing import PARTITIONS, partition_of
from dfs.testing.chunkcluster import SALT, SimClock
from dfs.testing.disk import SimDisk

QUIET = settings(max_examples=60, deadline=None)


@st.composite
def plain(draw):
    """Data of a few blocks, partly compressible, from a seed (fast) rather than byte by byte."""
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    out = bytearray()
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 90_000))
        out += rng.randbytes(size) if draw(st.booleans()) else bytes([rng.randrange(256)]) * size
    return bytes(out)


@QUIET
@given(data=plain(), compress=st.booleans(), cuts=st.lists(st.integers(0, 450_000), max_size=4))
def test_decoding_inverts_encoding_however_the_data_is_cut(data, compress, cuts):
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    chunk_id, buffers = chunks.encode(pieces, SALT, compress=compress)
    assert chunk_id == chunks.encode(data, SALT)[0]
    assert chunks.decode(b"".join(buffers), chunk_id) == data


@QUIET
@given(data=plain(), at=st.integers(0, 1 << 20), size=st.integers(0, 1 << 20))
def test_a_range_needs_its_own_blocks_only(data, at, size):
    at %= len(data)
    size %= len(data) - at + 1
    chunk_id, buffers = chunks.encode(data, SALT)
    encoded = b"".join(buffers)
    header = chunks.Header.parse(encoded)
    first = at // chunks.BLOCK
    last = max(first, chunks.block_count(at + size))
    start, end = (header.size + header.offsets[i] for i in (first, last))
    answer = encoded[: header.size] + encoded[start:end]
    if size:
        assert bytes(chunks.decode_range(answer, chunk_id, at, size)) == data[at : at + size]


@given(
    offset=st.integers(0, 1 << 40),
    length=st.integers(0, 1 << 26),
    size=st.sampled_from([64 << 10, 1 << 20, 4 << 20]),
)
def test_pieces_cover_the_range_and_cross_no_boundary(offset, length, size):
    at = offset
    for start, n in plan(offset, length, size):
        assert start == at
        assert 0 < n <= size
        assert start // size == (start + n - 1) // size
        at += n
    assert at == offset + length


IDS = [random.Random(i).randbytes(32) for i in range(40)]


@QUIET
@given(ops=st.lists(st.tuples(st.booleans(), st.integers(0, 39)), max_size=80))
def test_the_index_is_an_ordered_dict_with_a_summary(ops):
    index, model = Index(), {}
    for add, i in ops:
        if add:
            entry = Entry(1, i, 10 + i, i, i, 1)
            index.put(IDS[i], entry)
            model[IDS[i]] = entry
        else:
            assert index.pop(IDS[i]) == model.pop(IDS[i], None)
    assert len(index) == len(model)
    assert index.stored_bytes == sum(e.stored for e in model.values())
    listed, after = [], b""
    while page := index.after(after, 7):
        listed += page
        after = page[-1][0]
    assert listed == sorted(model.items())
    assert list(index) == sorted(model)
    other = Index()
    for chunk_id in sorted(model, reverse=True)[1:]:
        other.put(chunk_id, model[chunk_id])
    expected = [partition_of(max(model))] if model else []
    assert different_partitions(index.summary(), other.summary()) == expected
    assert different_partitions(index.summary(), b"junk") == list(range(PARTITIONS))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["put", "put", "put", "sync", "touch", "delete", "drop", "crash", "reopen"]
        ),
        st.integers(0, 9),
    ),
    max_size=40,
)
BLOBS = [random.Random(i).randbytes(300 * (i + 1)) for i in range(10)]
CHUNKS = [chunks.encode(b, SALT) for b in BLOBS]
OPTIONS = StoreOptions(segment_size=6000, reserve=0, hint_every=3000, inline=1000)


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_the_store_is_a_dict_that_survives_power_loss(steps, seed):
    """What was synced is there; what was not is whole or absent; what was deleted stays away."""

    async def main():
        rng = random.Random(seed)
        env = Env(SimClock(), SimDisk(rng), None, None, rng)
        store = await Segments.open(env, OPTIONS)
        held, sure = {}, {}  # index of the blob -> stamp; as seen, and as synced
        stamp = env.clock.time_ns()
        for op, i in steps:
            chunk_id, buffers = CHUNKS[i]
            stamp += 1
            if op == "put":
                size = sum(map(len, buffers))
                pages = None
                if (seed + i) % 2:
                    pages, chunk = room_for(size)
                    chunk[:] = b"".join(buffers)
                new = await store.put(chunk_id, buffers, size, len(BLOBS[i]), stamp, pages=pages)
                assert new == (i not in held)
                held[i] = stamp
            elif op == "sync":
                await store.sync()
                sure = dict(held)
            elif op == "touch":
                assert await store.touch([chunk_id], stamp) == [i in held]
                if i in held:
                    held[i] = stamp
                sure = dict(held)
            elif op in ("delete", "drop"):
                if op == "delete":
                    await store.delete([chunk_id], stamp)
                else:
                    await store.drop([chunk_id])
                if op == "delete" or i in held:
                    held.pop(i, None)
                    sure = dict(held)
            elif op == "reopen":
                await store.close()
                store = await Segments.open(env, OPTIONS)
                sure = dict(held)
                assert not store.recovery.errors
            else:
                env.disk.crash()
                store = await Segments.open(env, OPTIONS)
                for suspect, reason in store.recovery.suspects:
                    await store.set_aside(suspect, reason)
                found = {n for n, (c, _) in enumerate(CHUNKS) if store.held(c)}
                assert set(sure) <= found <= set(held)
                for n in sure:
                    assert store.index.get(CHUNKS[n][0]).stamp >= sure[n]
                held = {n: store.index.get(CHUNKS[n][0]).stamp for n in found}
                sure = dict(held)  # a recovered store is durable: it was read from the disk
            for n in held:
                _, parts = await store.read(CHUNKS[n][0])
                assert chunks.decode(b"".join(parts), CHUNKS[n][0]) == BLOBS[n]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
