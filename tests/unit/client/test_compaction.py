"""What compaction writes, and what a small write looks at."""

import random

import pytest
import trio

from dfs.client import compaction, contents
from dfs.client.contents import overlapping, scan_extents, touched
from dfs.volume import extents, items
from tests.unit.client.support import filesystem, new_home, read_file

PAGE = 4096


async def test_a_file_that_grows_by_small_appends_is_not_written_again_and_again():
    home = new_home()
    async with filesystem(home) as fs:
        data = random.Random(1).randbytes(700 * PAGE)
        attr, fh = await fs.create(1, b"log", 0o644)
        for at in range(0, len(data), PAGE):
            await fs.write(fh, at, data[at : at + PAGE])
            await fs.fsync(fh)
            await trio.sleep(0.002)
        await trio.sleep(5)
        assert fs.files.statistics()["compacted"] > 400
        written = sum(len(chunk) for chunk in home.chunks.stored.values())
        assert written < 2.5 * len(data)
        found = await fs.session.read(lambda t: scan_extents(t, attr.ino, 0, len(data)))
        assert len(found) < 2 * contents.CROWDED * 2
        assert await read_file(fs, attr.ino) == data
        await fs.release(fh)


async def test_that_test_sees_a_compaction_that_joins_everything(monkeypatch):
    monkeypatch.setattr(compaction, "LARGE", 1 << 40)
    with pytest.raises(BaseExceptionGroup) as caught:
        await test_a_file_that_grows_by_small_appends_is_not_written_again_and_again()
    assert caught.group_contains(AssertionError, depth=None)


async def test_what_a_range_touches_is_found_among_many():
    home = new_home()
    rng = random.Random(2)
    async with filesystem(home) as fs:
        attr = await fs.mknod(1, b"a", 0o100644)
        at, placed = 0, []
        while len(placed) < 200:
            at += rng.choice([0, 0, 1, 5000])
            length = rng.choice([1, 100, PAGE])
            placed.append(extents.inline(at, bytes(length)))
            at += length
        big = extents.in_chunk(at, items.MAX_EXTENT, b"c" * 32, 0, items.MAX_EXTENT)
        placed.append(big)
        await fs.session.transact(lambda t: t.extend([e.put(attr.ino) for e in placed]))
        txn = fs.session.view.begin()
        for _ in range(500):
            start = rng.randrange(big.end + 10)
            end = start + rng.choice([1, PAGE, 100_000])
            found, seen = touched(txn, attr.ino, start, end)
            assert overlapping(found, start, end) == overlapping(placed, start, end)
            assert len(found) <= len(overlapping(placed, start, end)) + 1
            assert seen == len(scan_extents(txn, attr.ino, start, end))
