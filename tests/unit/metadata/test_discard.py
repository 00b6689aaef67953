"""Former homes discard what the present homes hold, and nothing else."""

from contextlib import asynccontextmanager

import pytest
import trio
from synccluster import Cluster

from dfs.cluster.map import METADATA
from dfs.errors import Busy, StaleEpoch
from dfs.hashing import digest, partition_of
from dfs.testing.discard_mutants import DuringTransitions, OneHomeLacksIt
from dfs.testing.sync_maps import member, transition
from dfs.testing.sync_nodes import key_row
from metadata import versions
from metadata.discard import Discard
from metadata.merkle import BLOBS, REGISTERS, TABLES, partition_of_row
from metadata.registers import DISCARD, GET, MERGE

BEFORE, MOVING, READING, AFTER = transition()


def rows_leaving(node, count):
    """Keys of registers in partitions that `node` gives up."""
    found = []
    for i in range(100_000):
        partition = partition_of_row(REGISTERS, key_row(b"%d" % i))
        if node not in AFTER.homes(METADATA, partition):
            found.append(b"%d" % i)
            if len(found) == count:
                return found
    raise AssertionError


def blobs_leaving(node, count):
    found = []
    for i in range(100_000):
        blob = b"blob %d" % i
        if node not in AFTER.homes(METADATA, partition_of(digest(blob))):
            found.append(blob)
            if len(found) == count:
                return found
    raise AssertionError


@asynccontextmanager
async def moved(*maps, keys=20, blobs=20):
    """A cluster in which nodes 1 to 3 had it all, by the last of `maps`, and what left node 1."""
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, BEFORE)
        one, two, three, four = await cluster.start()
        names = rows_leaving(1, keys)
        for name in names:
            row, register = await one.put(name)
            for node in (two, three):
                await node.writer.write([(MERGE, row, register)])
        stored = blobs_leaving(1, blobs)
        for node in (one, two, three):
            await node.sync.blobs.put(stored)
        for node in cluster.nodes.values():
            node.discard = Discard(node.env, node.sync)
        for new in maps:
            await cluster.move(new)
            if new is MOVING:
                for name in names:
                    row = key_row(name)
                    if 4 in new.homes(METADATA, partition_of_row(REGISTERS, row)):
                        await four.writer.write([(MERGE, row, two.store.get(row))])
                for blob in stored:
                    if 4 in new.homes(METADATA, partition_of(digest(blob))):
                        await four.sync.blobs.put([blob])
        yield cluster, [key_row(name) for name in names], stored
        nursery.cancel_scope.cancel()


async def test_a_former_home_lets_go_of_its_rows_and_digests():
    async with moved(MOVING, READING, AFTER) as (cluster, rows, blobs):
        one, two, *_ = cluster.nodes.values()
        stays = next(
            b"s%d" % i
            for i in range(1000)
            if 1 in AFTER.homes(METADATA, partition_of_row(REGISTERS, key_row(b"s%d" % i)))
        )
        await one.put(stays)
        assert await one.discard.run_once() == len(rows) + len(blobs)
        assert one.discard.last_error == ""
        assert "20 registers and 20 blobs discarded" in one.discard.progress
        assert [row for row in rows if one.store.get(row)] == []
        assert not any(one.sync.blobs.get(digest(blob)) for blob in blobs)
        for table in TABLES:
            for partition in range(4096):
                if 1 not in AFTER.homes(METADATA, partition):
                    assert one.sync.digests.total(table, partition) == 0
        assert one.store.get(key_row(stays))
        for table in TABLES:
            assert await one.check._check(table, 0) == 0
        assert one.sync.digests.drift == 0
        assert all(two.store.get(row) for row in rows)
        assert await one.discard.run_once() == 0
        # what belongs to the others was not touched by them
        assert sum([await node.discard.run_once() for node in (two,)]) == 0


@pytest.mark.parametrize("worker", [Discard, DuringTransitions])
@pytest.mark.parametrize("maps", [(MOVING,), (MOVING, READING)])
async def test_nothing_goes_during_a_transition(worker, maps):
    async with moved(*maps) as (cluster, rows, blobs):
        one = cluster.nodes[1]
        one.discard = worker(one.env, one.sync)
        removed = await one.discard.run_once()
        held = sum(one.store.get(row) is not None for row in rows)
        held += sum(one.sync.blobs.get(digest(blob)) is not None for blob in blobs)
        if worker is Discard:
            assert (removed, held) == (0, 40)
            assert "moving" in one.discard.progress
        else:
            assert held < 40  # the mutant is seen


@pytest.mark.parametrize("worker", [Discard, OneHomeLacksIt])
async def test_a_blob_stays_until_all_homes_hold_it(worker):
    async with moved(MOVING, READING, AFTER) as (cluster, _, blobs):
        one = cluster.nodes[1]
        one.discard = worker(one.env, one.sync)
        four = cluster.nodes[4]
        mine = [b for b in blobs if 4 in AFTER.homes(METADATA, partition_of(digest(b)))]
        assert mine
        await four.sync.blobs.discard([digest(b) for b in mine], lambda: True)

        async def give(*_):  # a put that is lost
            pass

        one.discard._put = give
        await one.discard.run_once()
        held = [b for b in mine if one.sync.blobs.get(digest(b)) is not None]
        assert held == (mine if worker is Discard else [])


async def test_a_home_that_lacks_blobs_is_given_them():
    async with moved(MOVING, READING, AFTER) as (cluster, _, blobs):
        one, *_, four = cluster.nodes.values()
        mine = [b for b in blobs if 4 in AFTER.homes(METADATA, partition_of(digest(b)))]
        await four.sync.blobs.discard([digest(b) for b in mine], lambda: True)
        assert await one.discard.run_once() == 20 + len(blobs)
        assert one.discard.pushed == len(mine)
        assert all(four.sync.blobs.get(digest(b)) == b for b in mine)


async def test_a_home_that_is_silent_keeps_blobs_here_and_registers_go():
    async with moved(MOVING, READING, AFTER) as (cluster, rows, blobs):
        one, two, *_ = cluster.nodes.values()
        two.crash()
        assert await one.discard.run_once() == len(rows)
        assert "keeps its rows for now" in one.discard.last_error
        assert all(one.sync.blobs.get(digest(blob)) for blob in blobs)
        await cluster.nursery.start(two.start)
        assert await one.discard.run_once() == len(blobs)


async def test_a_bad_copy_is_not_given_away_and_goes_when_the_homes_have_good_ones():
    async with moved(MOVING, READING, AFTER) as (cluster, _, blobs):
        one, *_, four = cluster.nodes.values()
        blob = next(b for b in blobs if 4 in AFTER.homes(METADATA, partition_of(digest(b))))
        await four.sync.blobs.discard([digest(blob)], lambda: True)
        await one.store.batch([(b"b" + digest(blob), b"other bytes")])
        await one.discard.run_once()
        assert one.store.get(b"b" + digest(blob)) == b"other bytes"
        await four.sync.blobs.put([blob])
        assert await one.discard.run_once() == 1
        assert one.store.get(b"b" + digest(blob)) is None


async def test_a_partition_that_is_regained_is_pulled_and_written_under_another_name():
    async with moved(MOVING, READING, AFTER, keys=4) as (cluster, rows, _):
        one, two, *_ = cluster.nodes.values()
        row = rows[0]
        partition = partition_of_row(REGISTERS, row)
        old_actors = {actor for actor, _ in versions.decode(one.store.get(row))[0]}
        left = one.store.get(rows[1])
        await one.discard.run_once()
        # a row that came back by mistake, as from a backup, makes its partition wait
        kept = partition_of_row(REGISTERS, rows[1])
        one.registers._set(rows[1], None, left, before := {})
        one.registers._unsettled.clear()
        assert before == {rows[1]: None}
        ops = one.sync.digests.ops([(REGISTERS, kept, rows[1], None, left)])
        await one.store.batch([(rows[1], left), *ops])
        again = AFTER.begin([member(i, float(i != 4)) for i in range(1, 5)])
        for new in (again, again.advance(), again.advance().advance()):
            await cluster.move(new)
        assert not one.sync.pull_first.waiting(partition)  # nothing here can be too old
        assert one.sync.pull_first.waiting(kept)
        (busy,) = await one.writer.write([(GET, rows[1])])
        assert isinstance(busy, Busy)
        await one.writer.write([(MERGE, row, two.store.get(row))])
        epoch = one.registers.actors.epoch
        ((register, _, _),) = await one.writer.write([("p", row, b"", b"new")])
        minted = {dot[0] for dot in versions.decode(register)[1]} - old_actors
        assert len(minted) == 1
        assert one.registers.actors.epoch == epoch  # nothing counts as forgotten
        assert one.registers.actors.forgotten == 0
        assert await one.discard.run_once() == 0


async def test_a_removal_that_comes_after_a_new_map_is_refused():
    async with moved(MOVING, READING, AFTER, keys=1) as (cluster, rows, _):
        one = cluster.nodes[1]
        value = one.store.get(rows[0])
        again = AFTER.begin([member(i, float(i != 4)) for i in range(1, 5)])
        replies = []
        one.writer.submit(AFTER.epoch, [(DISCARD, rows[0], digest(value))], replies.extend)
        one.registers.follow(again)
        await one.writer.write([])
        assert isinstance(replies[0], StaleEpoch)
        assert one.store.get(rows[0]) is None  # what is left of an earlier time went already
        (held,) = blobs_leaving(1, 1)
        cluster.map = again
        assert await one.sync.blobs.discard([digest(held)], lambda: cluster.map is AFTER) == 0
        assert one.sync.blobs.get(digest(held)) == held


async def test_an_emptied_partition_does_not_wait_any_more():
    async with moved(MOVING, READING, AFTER, keys=3, blobs=1) as (cluster, rows, _):
        one = cluster.nodes[1]
        waiting = partition_of_row(REGISTERS, rows[0])
        one.sync.pull_first.begin([waiting])
        await one.discard.run_once()
        assert not one.sync.pull_first.waiting(waiting)
        assert one.store.get(rows[0]) is None


async def test_waits_for_its_digests():
    async with moved(MOVING, READING, AFTER, keys=1) as (cluster, rows, _):
        one = cluster.nodes[1]
        one.sync.digests._built.discard(BLOBS)
        assert await one.discard.run_once() == 0
        assert "digests" in one.discard.progress
        assert one.store.get(rows[0])
        one.discard.map_changed(BEFORE, MOVING)
        assert not one.discard._woken.is_set()
        one.discard.map_changed(READING, AFTER)
        assert one.discard._woken.is_set()
