"""Group commit: nobody returns before a sync that began after the call."""

from random import Random

import pytest
import trio

from dfs.errors import StoreFailed
from dfs.groupsync import GroupSync
from dfs.testing.disk import SimDisk


class Recorder:
    """A file whose sync covers what was written before it began."""

    def __init__(self):
        self.written = 0
        self.durable = 0


class Disk:
    """Runs the sync in the open: the test decides when it begins and ends."""

    def __init__(self, file, delay=1.0):
        self.file, self.delay, self.error = file, delay, None

    async def sync(self, fn, *, turn=True):
        covers = self.file.written
        with trio.CancelScope(shield=True):
            await trio.sleep(self.delay)
        if self.error:
            raise self.error
        self.file.durable = covers
        return


def setup():
    file = Recorder()
    file.fdatasync = lambda: None
    disk = Disk(file)
    return file, disk, GroupSync(disk, file)


async def write(file, group, at, log):
    await trio.sleep(at)
    file.written += 1
    mine = file.written
    await group.sync()
    assert file.durable >= mine
    log.append((trio.current_time(), mine))


async def test_those_who_come_during_a_sync_wait_for_the_next():
    file, _, group = setup()
    log, start = [], trio.current_time()
    async with trio.open_nursery() as nursery:
        for at in (0, 0.1, 0.5, 0.9, 1.5, 5):
            nursery.start_soon(write, file, group, at, log)
    times = [round(t - start, 3) for t, _ in sorted(log)]
    assert times == [1, 2, 2, 2, 3, 6]
    assert group.statistics() == {"calls": 6, "syncs": 4, "waiting": 0}


async def test_random_arrivals_are_all_covered():
    random = Random(3)
    file, _, group = setup()
    log = []
    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(write, file, group, random.random() * 20, log)
    assert len(log) == 300
    assert group.statistics()["syncs"] <= 22


async def test_cancelled_waiters_do_not_stop_the_others():
    file, _, group = setup()
    log = []

    async def impatient(at, patience):
        with trio.move_on_after(patience):
            await write(file, group, at, [])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient, 0, 0.5)  # the leader: cannot be cancelled half-way
        nursery.start_soon(impatient, 0.2, 0.5)  # would have led the second sync
        nursery.start_soon(impatient, 0.3, 1.2)  # cancelled while its sync runs
        nursery.start_soon(write, file, group, 0.4, log)
        nursery.start_soon(write, file, group, 1.4, log)
    assert len(log) == 2
    assert group.statistics()["waiting"] == 0


async def test_failure_is_everybodys_and_for_ever():
    file, disk, group = setup()
    errors = []

    async def one(at):
        try:
            await write(file, group, at, [])
        except StoreFailed as e:
            errors.append(str(e))

    disk.error = StoreFailed("sync x: Input/output error")
    async with trio.open_nursery() as nursery:
        for at in (0, 0.1, 0.2):
            nursery.start_soon(one, at)
    disk.error = None
    await one(0)
    assert len(errors) == 4
    assert all("Input/output error" in e for e in errors)


async def test_on_a_disk_that_crashes():
    """Whatever returned from sync is there after a power loss."""
    for seed in range(30):
        disk = SimDisk(Random(seed), sync_delay=0.1)
        file = disk.open("a", create=True)
        disk.sync_dir()
        group = GroupSync(disk, lambda file=file: file)
        acked = []

        async def one(i, file=file, group=group, acked=acked, seed=seed):
            await trio.sleep(Random(seed * 100 + i).random())
            at = file.append([bytes([i])])
            await group.sync()
            acked.append((at, i))

        with trio.move_on_after(Random(seed).random()):
            async with trio.open_nursery() as nursery:
                for i in range(1, 40):
                    nursery.start_soon(one, i)
        disk.crash()
        content = disk.open("a").pread(99, 0)
        assert all(content[at] == i for at, i in acked)


async def test_an_unexpected_error_fails_the_group_too():
    disk = SimDisk(Random(1))

    class Broken:
        def fdatasync(self):
            raise ValueError("boom")

    group = GroupSync(disk, Broken())
    with pytest.raises(StoreFailed, match="boom"):
        await group.sync()
    with pytest.raises(StoreFailed, match="boom"):
        await group.sync()
