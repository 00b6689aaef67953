"""Which extents a reader looks up, and that what it returns does not depend on it."""

import random

import pytest

from dfs.client import contents, reader
from dfs.volume import extents
from tests.unit.client.support import filesystem, new_home

MIB = 1 << 20


async def make(fs, spots, size):
    _, handle = await fs.create(1, b"f", 0o644)
    content = bytearray(size)
    for at in (*spots, size - 1):
        piece = at.to_bytes(8, "big") * 640
        await fs.write(handle, at, piece[: size - at])
        content[at : at + len(piece)] = piece[: size - at]
    await fs.flush(handle)
    return handle, content


def count_lookups(fs, monkeypatch):
    session = fs.files._session
    counted = []
    original = session.read

    async def read(op, *args, **options):
        counted.append(op)
        return await original(op, *args, **options)

    monkeypatch.setattr(session, "read", read)
    return counted


@pytest.mark.parametrize("step", [3 * MIB + 777, MIB])
async def test_scattered_reads_of_a_file_of_few_extents_stop_looking_them_up(monkeypatch, step):
    async with filesystem(new_home()) as fs:
        size = 192 * MIB
        handle, content = await make(fs, range(0, size, step), size)
        rng = random.Random(1)
        counted = count_lookups(fs, monkeypatch)
        reads = 0
        while reads < 300:
            at = rng.choice((rng.randrange(size), rng.randrange(0, size, step)))
            length = rng.choice((1, 4096, 65_536, 200_000))
            assert bytes(await fs.read(handle, at, length)) == content[at : at + length]
            reads += 1
        assert 1 < len(counted) <= 8
        await fs.write(handle, 7, b"changed")  # what is kept is forgotten, and found again
        content[7:14] = b"changed"
        await fs.flush(handle)
        for at in (0, size - 100, 5 * MIB, 100 * MIB):
            assert bytes(await fs.read(handle, at, 5000)) == content[at : at + 5000]


async def test_of_a_file_of_many_extents_only_a_part_is_kept(monkeypatch):
    monkeypatch.setattr(reader, "MANY", 8)
    async with filesystem(new_home()) as fs:
        size = 96 * MIB
        handle, content = await make(fs, range(0, size, MIB), size)
        counted = count_lookups(fs, monkeypatch)
        rng = random.Random(1)
        for _ in range(60):
            at = rng.randrange(size)
            assert bytes(await fs.read(handle, at, 5000)) == content[at : at + 5000]
        assert len(counted) > 20
        (file,) = fs.files._files.values()
        assert len(file.span[2]) < 40


async def test_reading_in_order_finds_everything(monkeypatch):
    async with filesystem(new_home()) as fs:
        size = 80 * MIB + 123
        handle, content = await make(fs, range(0, size, MIB // 2 + 99), size)
        await fs.read(handle, 50 * MIB, 10)  # wide by now
        await fs.read(handle, 10, 10)
        at = 0
        while at < size:
            data = bytes(await fs.read(handle, at, MIB))
            assert data == content[at : at + MIB]
            at += len(data)


async def test_a_scattered_read_of_a_crowded_file_decodes_few_extents(monkeypatch):
    """4096 extents, all within reach of any lookup: a read must not pay for the others."""
    async with filesystem(new_home()) as fs:
        monkeypatch.setattr(contents, "CROWDED", 1 << 30)  # no compaction
        size = 16 * MIB
        _, handle = await fs.create(1, b"f", 0o644)
        rng = random.Random(3)
        content = bytearray(size)
        spots = list(range(0, size, 4096))
        rng.shuffle(spots)
        for number, at in enumerate(spots):
            piece = at.to_bytes(8, "big") * 512
            await fs.write(handle, at, piece)
            content[at : at + 4096] = piece
            if number % 64 == 63:
                await fs.flush(handle)
        await fs.flush(handle)
        decoded = []
        original = extents.decode

        def decode(items):
            found = original(items)
            decoded.append(len(found))
            return found

        monkeypatch.setattr(extents, "decode", decode)
        scattered = fs.handles.file(handle)
        for at in spots[:400]:
            where = at + rng.randrange(-3000, 3000) if at else 0
            length = rng.choice((1, 4096, 20_000, 131_072))
            want = bytes(content[where : where + length])
            assert bytes(await fs.read(handle, where, length)) == want
            scattered.next = 1 << 40  # the next read is a jump, wherever it goes
        assert len(decoded) > 390
        assert max(decoded) <= 64
