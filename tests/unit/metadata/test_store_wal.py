"""The log: recovery cuts what was never acknowledged and refuses what was."""

from random import Random

import pytest
import trio

from dfs.errors import Corrupt, DiskFull, StoreFailed
from dfs.testing.disk import SimDisk
from metadata.store import wal
from metadata.store.wal import Log


def batch(i):
    return ((b"k%d" % i, b"v" * i),)


async def append(log, i, *, sync=True):
    log.append(wal.pack_batch(batch(i)))
    if sync:
        await log.sync()


def make_disk(seed=1):
    disk = SimDisk(Random(seed))
    disk.mkdir("d")
    return disk


def replay(disk, first=1):
    found = list(wal.replay(disk, "d", first, 0))
    return [b for f in found for b in f.batches], found


async def written(disk, counts=(3, 2)):
    """A log of synced records in several segments."""
    log = Log(disk, "d", 0, 0)
    i = 0
    for count in counts:
        await log.rotate()
        for _ in range(count):
            await append(log, i)
            i += 1
    return log


async def test_round_trip_over_segments():
    disk = make_disk()
    log = await written(disk, (3, 2, 0))
    batches, found = replay(disk)
    assert batches == [batch(i) for i in range(5)]
    assert [f.number for f in found] == [1, 2, 3]
    assert found[-1].end == log.written == log.durable
    assert wal.cut(disk, "d", 1, found[-1]) == 0


async def test_group_commit():
    disk = make_disk()
    log = Log(disk, "d", 0, 0)
    await log.rotate()
    async with trio.open_nursery() as nursery:
        for i in range(40):
            nursery.start_soon(append, log, i)
    assert log.statistics()["syncs"] <= 3
    before = log.statistics()["calls"]
    await log.sync()  # nothing to do
    assert log.statistics()["calls"] == before


async def test_sync_after_rotation_covers_the_earlier_segment():
    for seed in range(40):
        disk = make_disk(seed)
        log = Log(disk, "d", 0, 0)
        await log.rotate()
        await append(log, 0, sync=False)
        await log.rotate()
        await append(log, 1)
        disk.crash()
        assert replay(disk)[0] == [batch(0), batch(1)]


async def test_sync_covers_the_header_of_an_empty_segment():
    for seed in range(40):
        disk = make_disk(seed)
        log = Log(disk, "d", 0, 0)
        await log.rotate()
        await log.rotate()
        await append(log, 0)
        disk.crash()
        assert replay(disk)[0] == [batch(0)]


def damage(disk, number, offset):
    disk.flip(wal.segment_name("d", number), offset, 2)


@pytest.mark.parametrize("place", range(0, 128, 3))
async def test_damage_that_was_acknowledged_is_refused(place):
    disk = make_disk()
    await written(disk, (3, 2))
    size = disk.open(wal.segment_name("d", 1)).size()
    if place < size:
        damage(disk, 1, place)
        with pytest.raises(Corrupt, match="acknowledged"):
            replay(disk)


async def test_damage_of_the_last_record_is_a_torn_tail():
    disk = make_disk()
    await written(disk, (3, 2))
    size = disk.open(wal.segment_name("d", 2)).size()
    damage(disk, 2, size - 1)
    batches, found = replay(disk)
    assert batches == [batch(i) for i in range(4)]
    assert wal.cut(disk, "d", 1, found[-1]) > 0
    batches, found = replay(disk)
    assert batches == [batch(i) for i in range(4)]
    assert not found[-1].bad


async def test_a_missing_segment_is_refused():
    for gone in (1, 2):
        disk = make_disk()
        await written(disk, (3, 2, 2))
        disk.unlink(wal.segment_name("d", gone))
        with pytest.raises(Corrupt, match=r"missing|acknowledged"):
            replay(disk)


async def test_a_missing_unacknowledged_segment_ends_the_log():
    disk = make_disk()
    await written(disk, (3,))
    for number in (3, 4):  # created but never used, 2 did not survive
        disk.open(wal.segment_name("d", number), create=True)
    batches, found = replay(disk)
    assert batches == [batch(i) for i in range(3)]
    wal.cut(disk, "d", 1, found[-1])
    assert wal.numbers(disk, "d") in ([1], [1, 2])
    assert replay(disk)[0] == batches


async def test_a_segment_of_another_number_is_refused():
    disk = make_disk()
    await written(disk, (3, 3))
    disk.rename(wal.segment_name("d", 2), wal.segment_name("d", 1))
    with pytest.raises(Corrupt):
        replay(disk)


@pytest.mark.parametrize("seed", range(60))
async def test_any_crash_leaves_a_prefix_that_holds_what_was_acknowledged(seed):
    random = Random(seed)
    disk = make_disk(seed)
    log = Log(disk, "d", 0, 0)
    await log.rotate()
    sent = acked = 0
    with trio.move_on_after(random.random() * 0.1):
        for _ in range(60):
            sent += 1
            sync = random.random() < 0.3
            await append(log, sent - 1, sync=sync)
            acked = sent if sync else acked
            if random.random() < 0.1:
                await log.rotate()
    disk.crash()
    batches, found = replay(disk)
    assert batches == [batch(i) for i in range(len(batches))]
    assert acked <= len(batches) <= sent
    last = found[-1] if found else wal.Recovered(0, 0, 0, [], "", 0)
    wal.cut(disk, "d", 1, last)
    disk.crash()
    again, found = replay(disk)
    assert again == batches
    assert [f.bad for f in found if f.bad] == []


async def test_full_disk_leaves_the_log_as_it_was():
    disk = make_disk()
    log = await written(disk, (2,))
    disk.full = True
    with pytest.raises(DiskFull):
        await append(log, 2)
    disk.full = False
    await append(log, 2)
    assert replay(disk)[0] == [batch(i) for i in range(3)]


@pytest.mark.parametrize("kind", ["write", "sync"])
async def test_failed_disk_stops_the_log(kind):
    disk = make_disk()
    log = await written(disk, (2,))
    disk.fail_next(kind, "d/")
    with pytest.raises(StoreFailed):
        await append(log, 2)
    with pytest.raises(StoreFailed):
        await append(log, 3)
    with pytest.raises(StoreFailed):
        await log.sync()


async def test_a_newer_version_is_refused():
    disk = make_disk()
    await written(disk, (2,))
    file = disk.open(wal.segment_name("d", 1))
    head = file.pread(8, 0) + b"\3" + file.pread(15, 9)
    file.pwrite(head + wal.crc32(head).to_bytes(4, "little"), 0)
    with pytest.raises(Corrupt, match="version 3"):
        replay(disk)
