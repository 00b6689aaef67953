"""Chunks that are prepared and not sent yet."""

import gc
import random

import pytest
import trio

from dfs.client.store import Prepared
from dfs.errors import DfsError, InvalidArgument, NoQuorum
from dfs.testing.chunkcluster import ChunkCluster, SimClock
from dfs.testing.network import SimNetwork


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 7), (0, 5, 5, 9)])
def test_a_prepared_chunk_reads_like_its_bytes(cuts):
    data = bytes(range(10))
    ends = [*cuts, len(data)]
    pieces = [data[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    prepared = Prepared(b"i" * 32, [b"header", *pieces], pieces)
    assert prepared.length == len(data)
    for offset in range(len(data) + 1):
        for length in range(len(data) - offset + 1):
            assert bytes(prepared.read(offset, length)) == data[offset : offset + length]
    for offset, length in ((-1, 2), (0, 11), (11, 0), (5, -1)):
        with pytest.raises(InvalidArgument):
            prepared.read(offset, length)


async def test_a_chunk_is_readable_before_during_and_after_its_put():
    rng, clock = random.Random(1), SimClock()
    async with SimNetwork(rng, clock) as network, trio.open_nursery() as nursery:
        cluster = ChunkCluster(rng, network, clock, nursery, 3)
        await cluster.start_all()
        client = cluster.client()
        await nursery.start(client.run)
        data = rng.randbytes(200_000)
        prepared = await client.prepare([data[:70_000], data[70_000:]])
        assert bytes(await client.read(prepared.chunk_id, 69_990, 20)) == data[69_990:70_010]
        assert not any(node.store.held(prepared.chunk_id) for node in cluster.nodes.values())
        assert client.statistics()["reads"] == 0

        async with trio.open_nursery() as putting:
            putting.start_soon(client.put_prepared, prepared)
            await trio.lowlevel.checkpoint()
            assert bytes(await client.read(prepared.chunk_id, 0, 200_000)) == data
        assert sum(n.store.held(prepared.chunk_id) for n in cluster.nodes.values()) >= 2
        await client.sync()
        assert bytes(await client.read(prepared.chunk_id, 0, 200_000)) == data
        assert client.statistics()["reads"] == 1
        nursery.cancel_scope.cancel()


async def test_a_put_that_fails_can_be_repeated_and_is_readable_as_long_as_it_is_held():
    rng, clock = random.Random(1), SimClock()
    async with SimNetwork(rng, clock) as network, trio.open_nursery() as nursery:
        cluster = ChunkCluster(rng, network, clock, nursery, 3)
        await cluster.start_all()
        client = cluster.client()
        await nursery.start(client.run)
        for number in (1, 2):
            cluster.crash(number)
        data = rng.randbytes(5_000)
        prepared = await client.prepare(data)
        again = await client.prepare(data)
        assert again is prepared  # equal data: whoever is first to end does not hide it
        with pytest.raises(NoQuorum):
            await client.put_prepared(prepared)
        assert bytes(await client.read(prepared.chunk_id, 7, 5)) == data[7:12]
        for number in (1, 2):
            await cluster.start(number)
        await trio.sleep(10)
        await client.put_prepared(prepared)
        chunk_id = prepared.chunk_id

        dropped = (await client.prepare(b"never sent")).chunk_id
        gc.collect()
        with pytest.raises(DfsError):
            await client.read(dropped, 0, 5)
        del prepared, again
        assert bytes(await client.read(chunk_id, 7, 5)) == data[7:12]
        nursery.cancel_scope.cancel()
