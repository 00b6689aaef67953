"""The encoded chunk: round trips, verification, hostile input, the golden file."""

import random
from pathlib import Path

import pytest
import zstandard

from dfs.chunks import format as chunks
from dfs.errors import Corrupt, InvalidArgument

SALT = b"salt of a family"
DATA = Path(__file__).parents[2] / "data"
RNG = random.Random(7)


def whole(data, **options):
    chunk_id, buffers = chunks.encode(data, SALT, **options)
    return chunk_id, b"".join(buffers)


@pytest.mark.parametrize("size", [1, 100, 65535, 65536, 65537, 200_000, 4 << 20])
@pytest.mark.parametrize("kind", ["random", "text", "mixed"])
def test_round_trip(size, kind):
    noise = RNG.randbytes(size)
    text = (b"all work and no play " * (size // 21 + 1))[:size]
    data = {"random": noise, "text": text, "mixed": text[: size // 2] + noise[size // 2 :]}[kind]
    chunk_id, encoded = whole(data)
    assert chunks.decode(encoded, chunk_id) == data
    assert chunks.verify(encoded, chunk_id).length == size
    if kind == "text" and size > 100:
        assert len(encoded) < size // 2
    assert len(encoded) <= size + chunks.header_size(size)


def test_the_id_does_not_depend_on_compression_or_on_how_data_is_cut():
    data = b"hello " * 50_000
    pieces = [data[:1], data[1:70_000], b"", data[70_000:200_000], data[200_000:]]
    ids = {
        whole(data, compress=True)[0],
        whole(data, compress=False)[0],
        whole(pieces)[0],
        whole([memoryview(p) for p in pieces], compress=False)[0],
        whole(bytearray(data))[0],
    }
    assert len(ids) == 1
    assert chunks.decode(whole(pieces, compress=False)[1], ids.pop()) == data


def test_the_id_depends_on_salt_and_content():
    assert chunks.encode(b"a", SALT)[0] != chunks.encode(b"a", bytes(16))[0]
    assert chunks.encode(b"a", SALT)[0] != chunks.encode(b"b", SALT)[0]


def test_raw_data_is_not_copied():
    data = bytearray(RNG.randbytes(300_000))
    _, buffers = chunks.encode(data, SALT)
    assert len(buffers) == 2
    assert buffers[1] is data
    _, buffers = chunks.encode([data, b"tail"], SALT)
    assert len(buffers) == 3


@pytest.mark.parametrize("size", [0, chunks.MAX_CHUNK + 1])
def test_sizes_outside_the_limits_are_refused(size):
    with pytest.raises(InvalidArgument):
        chunks.encode(bytes(size), SALT)


def test_a_short_salt_is_refused():
    with pytest.raises(InvalidArgument):
        chunks.encode(b"x", b"short")


@pytest.mark.parametrize("compress", [True, False])
def test_every_flipped_bit_is_found(compress):
    data = b"some text that shrinks, over and over. " * 4000
    chunk_id, encoded = whole(data, compress=compress)
    for at in [*range(300), *RNG.sample(range(len(encoded)), 100)]:
        bad = bytearray(encoded)
        bad[at] ^= 1 << RNG.randrange(8)
        try:
            got = chunks.decode(bytes(bad), chunk_id)
        except Corrupt:
            continue
        assert got == data  # a bit of a zstd frame that does not matter: never wrong bytes
        assert compress


@pytest.mark.parametrize("cut", [0, 5, 28, 100, 300, 65536])
def test_a_cut_off_chunk_is_corrupt(cut):
    chunk_id, encoded = whole(RNG.randbytes(100_000))
    with pytest.raises(Corrupt):
        chunks.verify(encoded[:cut], chunk_id)
    with pytest.raises(Corrupt):
        chunks.verify(encoded + b"x", chunk_id)


def test_a_decompression_bomb_is_refused_before_it_is_inflated():
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(16 << 20))
    chunk_id, buffers = chunks.encode(b"a" * 60_000, SALT)
    header = bytearray(buffers[0])
    header[28:32] = (len(bomb) | chunks.COMPRESSED).to_bytes(4, "big")
    with pytest.raises(Corrupt, match="declares a wrong size"):
        chunks.verify(bytes(header) + bomb, chunk_id)


def test_range_reads_verify_and_return_views():
    data = RNG.randbytes(300_000)
    chunk_id, encoded = whole(data, compress=False)
    header = chunks.Header.parse(encoded)
    body = memoryview(encoded)[header.size :]
    answer = encoded[: header.size] + bytes(body[65536 : 3 * 65536])
    got = chunks.decode_range(answer, chunk_id, 70_000, 120_000)
    assert isinstance(got, memoryview)
    assert bytes(got) == data[70_000:190_000]
    bad = bytearray(answer)
    bad[-1] ^= 1
    with pytest.raises(Corrupt):
        chunks.decode_range(bad, chunk_id, 70_000, 120_000)
    with pytest.raises(Corrupt):  # the other chunk's id
        chunks.decode_range(answer, bytes(32), 70_000, 10)
    with pytest.raises(Corrupt):  # fewer blocks than the range needs
        chunks.decode_range(answer[:-1], chunk_id, 70_000, 60_000)
    with pytest.raises(InvalidArgument):
        chunks.decode_range(encoded, chunk_id, 299_999, 2)


def test_incompressible_data_is_tried_once(monkeypatch):
    calls = []
    real = zstandard.ZstdCompressor

    class Counting:
        def __init__(self, **options):
            self.inner = real(**options)

        def compress(self, data):
            calls.append(len(data))
            return self.inner.compress(data)

    monkeypatch.setattr(chunks, "ZstdCompressor", Counting)
    chunks.encode(RNG.randbytes(1 << 20), SALT)
    assert calls == [chunks.BLOCK]
    calls.clear()
    chunks.encode(b"a" * chunks.BLOCK + RNG.randbytes(1 << 20), SALT)
    assert len(calls) == 1 + chunks.GIVE_UP


GOLDEN_PLAIN = bytes(i * 7 % 251 for i in range(70_000))
GOLDEN_TEXT = b"a golden chunk, compressed. " * 5000


def test_golden_files():
    raw = (DATA / "chunk-v1-raw.bin").read_bytes()
    chunk_id, encoded = whole(GOLDEN_PLAIN, compress=False)
    assert chunk_id.hex() == "000ea1928302077947759834db4183948dd0684029f33ce70e62a1663465868d"
    assert encoded == raw
    packed = (DATA / "chunk-v1-zstd.bin").read_bytes()
    assert len(packed) < 10_000
    # another zstd may compress differently; what was written must stay readable for ever
    assert chunks.decode(packed, whole(GOLDEN_TEXT)[0]) == GOLDEN_TEXT
    assert (
        whole(GOLDEN_TEXT)[0].hex()
        == "7a6e05acb431507856b0e77d6354f52f5e612b9486a68fd32ff15bd497230155"
    )
