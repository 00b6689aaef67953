"""What compaction writes, and what a small write looks at."""

import random

import pytest
import trio

from dfs.client import compaction, contents, files
from dfs.client.contents import crowded_windows, overlapping, reaching, scan_extents, touched
from dfs.volume import extents, items
from tests.unit.client.support import filesystem, new_home, read_file

PAGE = 4096


@pytest.mark.parametrize(("share", "limit"), [(1, 2.5), (contents.INLINE_SHARE, 1.0)])
async def test_small_appends_are_not_written_again_and_again(monkeypatch, share, limit):
    monkeypatch.setattr(contents, "INLINE_SHARE", share)
    monkeypatch.setattr(compaction, "HURRY", 0.3)  # often, though somebody always writes
    home = new_home()
    async with filesystem(home) as fs:
        data = random.Random(1).randbytes(700 * PAGE)
        attr, fh = await fs.create(1, b"log", 0o644)
        for at in range(0, len(data), PAGE):
            await fs.write(fh, at, data[at : at + PAGE])
            await fs.fsync(fh)
            await trio.sleep(0.01)
        await trio.sleep(5)
        assert fs.files.statistics()["compacted"] > 400
        written = sum(len(chunk) for chunk in home.chunks.stored.values())
        assert written < limit * len(data)
        _, seen = await fs.session.read(lambda t: touched(t, attr.ino, [(0, len(data))]))
        assert seen < 2 * contents.CROWDED * 2
        assert await read_file(fs, attr.ino) == data
        await fs.release(fh)


async def test_that_test_sees_a_compaction_that_joins_everything(monkeypatch):
    monkeypatch.setattr(compaction, "LARGE", 1 << 40)
    with pytest.raises(BaseExceptionGroup) as caught:
        await test_small_appends_are_not_written_again_and_again(monkeypatch, 1, 2.5)
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
            found, seen = touched(txn, attr.ino, [(start, end)])
            assert overlapping(found, start, end) == overlapping(placed, start, end)
            assert len(found) <= len(overlapping(placed, start, end)) + 1
            looked = scan_extents(txn, attr.ino, start, end)
            short = sum(e.data is None or e.length < contents.SHORT - 8 for e in looked)
            assert seen == short - (-(len(looked) - short) // contents.INLINE_SHARE)
            found = reaching(txn, attr.ino, start, end)
            assert overlapping(found, start, end) == overlapping(placed, start, end)
            assert len(found) <= len(overlapping(placed, start, end)) + 1
            edges = sorted(rng.sample(range(big.end + 10), 2 * rng.randrange(1, 60)))
            ranges = list(zip(edges[::2], edges[1::2], strict=True))
            found, _ = touched(txn, attr.ino, ranges)
            assert found == sorted(set(found))
            wanted = {e for low, high in ranges for e in overlapping(placed, low, high)}
            assert set(found) >= wanted
            assert len(found) <= len(wanted) + len(ranges)


async def test_who_syncs_all_the_time_is_not_disturbed_for_long():
    home = new_home()
    home.delegates = True
    async with filesystem(home, delegate=True) as fs:
        while not fs.session.here:
            await fs.mkdir(1, b"%d" % trio.current_time(), 0o755)
            await trio.sleep(1)
        data = random.Random(3).randbytes(1000 * PAGE)
        attr, fh = await fs.create(1, b"log", 0o644)
        began = first = trio.current_time()
        for at in range(0, len(data), PAGE):
            await fs.write(fh, at, data[at : at + PAGE])
            await fs.fsync(fh)
            await trio.sleep(0.01)
            if fs.files.statistics()["compacted"] and first == began:
                first = trio.current_time()
        crowded_at = began + 0.01 * 2 * contents.CROWDED * contents.INLINE_SHARE
        assert first > crowded_at + compaction.HURRY
        await trio.sleep(compaction.HURRY + 1)
        assert await read_file(fs, attr.ino) == data
        await fs.release(fh)


async def write_here_and_there(fs, seconds, low, high):
    """Write pages of a file for a while; returns it, its content, and when it was compacted."""
    rng = random.Random(4)
    attr, fh = await fs.create(1, b"a", 0o644)
    content = bytearray(rng.randbytes(high))
    for at in range(0, high, items.MAX_EXTENT):
        await fs.write(fh, at, bytes(content[at : at + items.MAX_EXTENT]))
    await fs.fsync(fh)
    began = trio.current_time()
    compacted_at = None
    while trio.current_time() < began + seconds:
        at = rng.randrange(low, high) // PAGE * PAGE
        content[at : at + PAGE] = page = rng.randbytes(PAGE)
        await fs.write(fh, at, page)
        await trio.sleep(0.004)
        if compacted_at is None and fs.files.statistics()["compacted"]:
            compacted_at = trio.current_time() - began
    return attr, fh, content, compacted_at


async def test_what_is_written_here_and_there_is_compacted_when_that_has_ended():
    async with filesystem(new_home()) as fs:
        size = 2 * items.MAX_EXTENT
        attr, fh, content, at = await write_here_and_there(fs, compaction.ENOUGH - 2, 0, size)
        assert at is None
        assert len(await fs.session.read(lambda t: scan_extents(t, attr.ino, 0, size))) > 1000
        await trio.sleep(compaction.STILL + 3)
        assert len(await fs.session.read(lambda t: scan_extents(t, attr.ino, 0, size))) < 10
        assert await read_file(fs, attr.ino) == content
        await fs.release(fh)


async def test_what_is_written_for_long_is_compacted_meanwhile():
    async with filesystem(new_home()) as fs:
        size = 2 * items.MAX_EXTENT
        attr, fh, content, at = await write_here_and_there(fs, compaction.ENOUGH + 4, 0, size)
        assert compaction.ENOUGH < at < compaction.ENOUGH + 4
        assert await read_file(fs, attr.ino) == content
        await fs.release(fh)


class AtOnce(compaction.Compactor):
    async def _still(self, file):
        """Whoever writes may be in the midst of it."""


class MuchLater(compaction.Compactor):
    async def _still(self, file):
        await trio.sleep(60)


@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (AtOnce, test_what_is_written_here_and_there_is_compacted_when_that_has_ended),
        (MuchLater, test_what_is_written_for_long_is_compacted_meanwhile),
    ],
)
async def test_that_those_tests_see_when_it_is_compacted(monkeypatch, mutant, test):
    monkeypatch.setattr(files, "Compactor", mutant)
    with pytest.raises(BaseExceptionGroup) as caught:
        await test()
    assert caught.group_contains((AssertionError, TypeError), depth=None)


async def test_a_range_that_becomes_crowded_while_another_waits_is_compacted_too():
    async with filesystem(new_home()) as fs:
        size = 12 * items.MAX_EXTENT
        attr, fh, content, at = await write_here_and_there(fs, 3, size - items.MAX_EXTENT, size)
        for page in range(0, items.MAX_EXTENT, 2 * PAGE):
            content[page : page + PAGE] = bytes(PAGE)
            await fs.write(fh, page, bytes(PAGE))
        assert at is None
        await trio.sleep(compaction.STILL + 4)
        assert len(await fs.session.read(lambda t: scan_extents(t, attr.ino, 0, size))) < 20
        assert await read_file(fs, attr.ino) == content
        await fs.release(fh)


async def test_who_changes_something_is_not_disturbed_for_long(monkeypatch):
    """Files are made all the while, without a sync: a window is compacted every few seconds."""
    async with filesystem(new_home()) as fs:
        size = 8 * items.MAX_EXTENT
        attr, fh, content, _ = await write_here_and_there(fs, 3, 0, size)
        began, joined = trio.current_time() + compaction.STILL, []
        while trio.current_time() < began + 3 * compaction.HURRY:
            await fs.mkdir(1, b"%d" % len(joined), 0o755)
            await trio.sleep(compaction.CALM / 4)
            joined.append(fs.files.statistics()["compacted"])
        await trio.sleep(8)
        assert 0 < joined[-1] < 0.7 * fs.files.statistics()["compacted"]
        assert len(await fs.session.read(lambda t: scan_extents(t, attr.ino, 0, size))) < 40
        assert await read_file(fs, attr.ino) == content
        await fs.release(fh)


async def test_windows_with_many_extents_are_named():
    rng, size = random.Random(5), items.MAX_EXTENT
    async with filesystem(new_home()) as fs:
        attr = await fs.mknod(1, b"a", 0o100644)
        placed = [extents.inline(0, b"z")]
        for _ in range(600):
            at = placed[-1].end + rng.choice([0, 5, 9000, 300_000])
            if rng.random() < 0.02:
                at += 3 * size
            placed.append(extents.inline(at, b"x" * rng.choice([1, 50])))
        await fs.session.transact(lambda t: t.extend([e.put(attr.ino) for e in placed]))
        last = placed[-1].offset // size
        counts = [sum(e.offset // size == w for e in placed) for w in range(last + 1)]
        for removed in range(2):
            txn = fs.session.view.begin()
            for many in range(1, max(counts) + 2):
                low, high = sorted(rng.choices(range(last + 2), k=2))
                named = crowded_windows(txn, attr.ino, low * size, high * size, many)
                wanted = [w for w in range(low, min(high, last + 1)) if counts[w] >= many]
                assert named == wanted
            if not removed:  # those that are gone still count, and no others
                gone = [e for e in placed if e.offset // size == last // 2]

                def remove(txn, ino=attr.ino, gone=gone):
                    for e in gone:
                        txn.delete(e.put(ino)[1])

                await fs.session.transact(remove)
