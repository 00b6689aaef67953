"""Warm-up: reads after an open and after a checkpoint find their tree nodes at hand."""

import contextlib
import random

import pytest
import trio

from dfs.client.attributes import get_inode, patch_inode
from dfs.client.session import Session
from dfs.client.warmup import PATIENCE, SHARE, UNSEEN
from dfs.errors import Corrupt, FsError
from dfs.volume import effects as fx
from dfs.volume import items
from dfs.volume.nodecache import NodeCache
from tests.unit.client.support import VOLUME, new_home

COUNT = 400


def fill(first, count=COUNT, size=3):
    """Inodes, each with an extended attribute of 2 KiB: some four of them in a leaf."""

    def op(txn):
        for ino in range(first, first + count):
            txn.put(items.inode_key(ino), items.Inode(8, 0o644, size=size).encode())
            txn.put(items.xattr_key(ino, b"a"), items.encode_xattr(bytes(2000)))

    return op


def sizes(first, count=COUNT):
    def op(txn):
        values = [txn.get(items.inode_key(ino)) for ino in range(first, first + count)]
        return {items.Inode.decode(value).size for value in values if value is not None}

    return op


@contextlib.asynccontextmanager
async def opened(home, *, warm=True, seed=1, budget=64 << 20):
    async with trio.open_nursery() as nursery:
        session = Session(home.client(seed=seed), VOLUME)
        await nursery.start(session.run)
        if budget:
            session.nodes = NodeCache(budget)
        if warm:
            nursery.start_soon(session.keep_warm)
            await session.wait_warm()
        yield session
        await session.close()
        nursery.cancel_scope.cancel()


async def filled(count=COUNT):
    """A home whose volume is all in the tree."""
    home = new_home()
    async with opened(home, warm=False) as session:
        await session.transact(fill(1000, count))
    home.checkpoint(VOLUME)
    return home


async def gets(home, session, op):
    """What the operation returns, and how often it had to ask for nodes."""
    before = home.blobs.gets
    return await session.read(op), home.blobs.gets - before


async def test_a_volume_that_was_just_opened_is_read_without_a_wait():
    home = await filled()
    async with opened(home, warm=False) as session:
        assert (await gets(home, session, sizes(1000)))[1] > 3
    async with opened(home) as session:
        assert await gets(home, session, sizes(1000)) == ({3}, 0)
        assert session.statistics()["warmed"] == session.statistics()["fetched"]


async def test_a_long_journal_is_applied_without_a_round_trip_for_each_entry():
    home = await filled()
    rng = random.Random(1)
    inos = rng.sample(range(1000, 1000 + COUNT), 150)
    async with opened(home) as session:
        for ino in inos:
            await session.transact(lambda txn, ino=ino: patch_inode(txn, ino, (2, fx.SET, 0o600)))
    before = home.blobs.gets
    async with opened(home, warm=False, budget=0) as session:
        assert home.blobs.gets - before < 10
        found = await session.read(lambda txn: {get_inode(txn, ino).mode for ino in inos})
        assert found == {0o600}


async def test_nodes_that_nobody_looks_at_are_dropped_after_a_while():
    home = await filled()
    async with opened(home) as session:
        await gets(home, session, sizes(1000, 100))
        held = len(session.nodes)
        await trio.sleep(UNSEEN + 1)
        assert 10 < len(session.nodes) < held / 2
        assert session.nodes.used == sum(
            session.nodes.get(name).cost for name in home.blobs.stored if name in session.nodes
        )
        assert await gets(home, session, sizes(1000, 100)) == ({3}, 0)
        found, asked = await gets(home, session, sizes(1000))
        assert found == {3}
        assert asked > 0


async def test_who_reads_in_order_waits_for_the_next_nodes_only():
    home = await filled(4 * COUNT)
    real, asked = home.blobs.get_many, []

    async def slow(hashes, *, timeout=10):
        asked.extend(hashes)
        await trio.sleep(0.001 * len(list(hashes)))
        return await real(hashes)

    took = []
    for warm in (False, True):
        async with opened(home, warm=warm) as session:
            session.nodes.clear()
            home.blobs.get_many = slow
            asked.clear()
            began, latest = trio.current_time(), 0.0
            for ino in range(1000, 1000 + 4 * COUNT):
                before = trio.current_time()
                assert await session.read(sizes(ino, 1)) == {3}
                latest = max(latest, trio.current_time() - before)
                await trio.sleep(0.001)  # the reader has something to do, too
            took.append((trio.current_time() - began, latest))
            home.blobs.get_many = real
            assert len(asked) == len(set(asked))  # nothing twice
    assert took[1][0] < took[0][0] * 0.9
    assert took[1][1] < took[0][1] / 2


async def test_what_there_is_no_room_for_is_fetched_when_it_is_needed():
    home = await filled(4 * COUNT)
    budget = len(b"".join(home.blobs.stored.values())) // 2
    async with opened(home, budget=budget) as session:
        assert budget / SHARE / 2 < session.nodes.used < budget
        assert (await gets(home, session, sizes(1000 + 4 * COUNT - 20, 20)))[1] == 0  # the newest
        found, asked = await gets(home, session, sizes(1000, 60))
        assert found == {3}
        assert asked > 0


@pytest.mark.parametrize("warm", [True, False])
async def test_a_checkpoint_makes_nobody_wait(warm):
    home = await filled()
    async with opened(home, warm=warm) as session:
        await session.transact(fill(1000, size=4))
        home.checkpoint(VOLUME)
        await trio.sleep(2)
        assert session.view.root == home.volumes[VOLUME].root
        assert session.view.statistics()["overlay"] == 0
        found, asked = await gets(home, session, sizes(1000))
        assert found == {4}
        assert (asked == 0) is warm


async def test_a_view_moves_over_at_last_when_the_new_nodes_cannot_be_had():
    home = await filled()
    async with opened(home) as session:
        await session.transact(fill(1000, size=4))
        real = home.blobs.get_many

        async def hang(hashes, *, timeout=10):
            await trio.sleep(1000)

        home.blobs.get_many = hang
        home.checkpoint(VOLUME)
        await trio.sleep(PATIENCE / 2)
        assert session.view.root != home.volumes[VOLUME].root
        assert await session.read(sizes(1000)) == {4}  # of the old tree, and what came since
        await trio.sleep(PATIENCE)
        home.blobs.get_many = real
        assert session.view.root == home.volumes[VOLUME].root
        assert await session.read(sizes(1000)) == {4}


async def test_a_volume_that_changes_all_the_time_is_not_held_up():
    home = await filled()
    async with opened(home) as session:
        roots = []
        for n in range(round(PATIENCE / 0.2) + 5):
            await session.transact(fill(1000 + n, count=1, size=4))
            if n in (0, 10):
                home.checkpoint(VOLUME)
                roots.append(home.volumes[VOLUME].root)
            await trio.sleep(0.2)
            assert session.statistics()["warmed"] == session.statistics()["fetched"]
            if n == 9:
                assert session.view.root not in roots
            if n == 12:
                assert session.view.root == roots[0]  # what came next found it waiting
                before = session.statistics()["warmed"]
        assert session.statistics()["warmed"] == before
        await trio.sleep(5)
        assert session.view.root == roots[1]


async def test_nodes_that_are_lost_end_the_warm_up_not_the_session():
    home = await filled()
    lost = dict(home.blobs.stored)
    home.blobs.stored.clear()
    async with opened(home) as session:
        with pytest.raises(FsError, match="tree"):
            await session.read(sizes(1000))
        home.blobs.stored.update(lost)
        assert await session.read(sizes(1000)) == {3}


async def test_another_session_does_not_move_to_the_tree_that_the_one_before_waited_for():
    home = await filled()
    async with opened(home) as session:
        await session.transact(fill(1000, size=4))
        gate, real = trio.Event(), home.blobs.get_many

        async def wait(hashes, *, timeout=10):
            await gate.wait()
            return await real(hashes)

        home.blobs.get_many = wait
        home.checkpoint(VOLUME)
        await trio.sleep(1)
        first = home.volumes[VOLUME].root
        home.fence(VOLUME, session.sid)  # the next session begins at the newest checkpoint
        home.checkpoint(VOLUME)
        await trio.sleep(1)
        gate.set()
        await trio.sleep(1)
        assert session.statistics()["opens"] == 2
        assert session.view.root == home.volumes[VOLUME].root == first
        await session.transact(fill(1000, size=5))
        home.checkpoint(VOLUME)
        await trio.sleep(1)
        assert session.view.root == home.volumes[VOLUME].root != first
        assert await session.read(sizes(1000)) == {5}


async def test_the_cache_keeps_encoded_nodes_within_its_budget():
    home = await filled()
    blobs = home.blobs.stored
    cache = NodeCache(100_000)
    cache.keep(blobs)
    assert cache.used <= 100_000
    assert len(cache) < len(blobs)
    for name in [name for name in blobs if name in cache]:
        cache.get(name)
    assert cache.used == sum(cache.get(name).cost for name in blobs if name in cache)
    cache.keep({b"x" * 32: b"junk"})
    with pytest.raises(Corrupt, match="tree node"):
        cache.get(b"x" * 32)
