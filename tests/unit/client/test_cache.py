"""The cache of chunk parts: what is read ahead comes several parts at a time."""

import contextlib

import pytest
import trio

from dfs.client.cache import LARGE, TOGETHER, ChunkCache, join
from dfs.errors import Corrupt

CHUNK = b"c" * 32
LENGTH = 4 * LARGE - 100
CONTENT = bytes(range(251)) * (LENGTH // 251 + 1)


class Chunks:
    """One chunk; ranges that hold a `bad` offset fail when they are longer than a part."""

    def __init__(self, bad=-1, *, always=False):
        self.bad = bad
        self.always = always
        self.asked = []

    async def read(self, chunk_id, offset, length):
        assert chunk_id == CHUNK
        assert offset + length <= LENGTH
        self.asked.append((offset, length))
        await trio.sleep(0.01)
        if offset <= self.bad < offset + length and (self.always or length > LARGE):
            raise Corrupt("a bad block")
        return CONTENT[offset : offset + length]

    def read_nowait(self, chunk_id, offset, length):
        return None


@contextlib.asynccontextmanager
async def cache_of(chunks, budget=64 << 20):
    async with trio.open_nursery() as nursery:
        yield ChunkCache(chunks, nursery, budget)
        nursery.cancel_scope.cancel()


async def content(cache, offset, length):
    return bytes(join(await cache.read(CHUNK, offset, length, LENGTH), length))


async def test_parts_that_are_read_ahead_come_together():
    chunks = Chunks()
    async with cache_of(chunks) as cache:
        cache.prefetch(CHUNK, 0, LENGTH, LENGTH)
        cache.prefetch(CHUNK, LARGE, LARGE, LENGTH)  # on its way
        assert await content(cache, 0, LENGTH) == CONTENT[:LENGTH]
        assert chunks.asked == [(0, LENGTH)]
        assert cache.statistics()["parts"] == TOGETHER
        assert cache.statistics()["used"] == LENGTH
        assert cache.statistics()["fetching"] == 0


async def test_what_is_there_is_not_fetched_again():
    chunks = Chunks()
    async with cache_of(chunks) as cache:
        await content(cache, LARGE, 10)
        cache.prefetch(CHUNK, 0, LENGTH, LENGTH)
        assert await content(cache, 5, LENGTH - 5) == CONTENT[5:LENGTH]
        assert sorted(chunks.asked) == [
            (0, LARGE),
            (LARGE, LARGE),
            (2 * LARGE, LENGTH - 2 * LARGE),
        ]


async def test_one_bad_part_does_not_take_the_others_with_it():
    chunks = Chunks(bad=LARGE + 5)
    async with cache_of(chunks) as cache:
        cache.prefetch(CHUNK, 0, LENGTH, LENGTH)
        assert await content(cache, 0, LENGTH) == CONTENT[:LENGTH]
        assert len(chunks.asked) == 1 + TOGETHER
    chunks = Chunks(bad=LARGE + 5, always=True)
    async with cache_of(chunks) as cache:
        cache.prefetch(CHUNK, 0, LENGTH, LENGTH)
        assert await content(cache, 0, LARGE) == CONTENT[:LARGE]
        assert await content(cache, 2 * LARGE, 100) == CONTENT[2 * LARGE : 2 * LARGE + 100]
        with pytest.raises(Corrupt):
            await content(cache, LARGE, 1)


async def test_the_budget_holds():
    async with cache_of(Chunks(), 2 * LARGE) as cache:
        cache.prefetch(CHUNK, 0, LENGTH, LENGTH)
        await trio.sleep(1)
        assert cache.statistics()["used"] <= 2 * LARGE
        assert await content(cache, 0, LENGTH) == CONTENT[:LENGTH]
