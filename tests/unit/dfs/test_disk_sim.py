"""The simulated disk passes the contract, and forgets exactly what nobody synced."""

from random import Random

import pytest
import trio

from dfs.disk import disk_at
from dfs.errors import DiskFull, StoreFailed
from dfs.testing.contract_disk import DiskContract, FullDiskContract
from dfs.testing.disk import SimDisk


class TestSimDisk(DiskContract):
    @pytest.fixture
    def disk(self):
        return SimDisk(Random(1))


class TestFullSimDisk(FullDiskContract):
    @pytest.fixture
    def small_disk(self):
        return SimDisk(Random(1), capacity=1 << 20)


def crashes(prepare, count=200):
    """Contents of file "a" (None: absent) after a crash, over many seeds."""
    found = set()
    for seed in range(count):
        disk = SimDisk(Random(seed))
        prepare(disk)
        disk.crash()
        found.add(disk.open("a").pread(99, 0) if disk.exists("a") else None)
    return found


def test_synced_survives():
    def prepare(disk):
        file = disk.open("a", create=True)
        file.append([b"abc"])
        file.fdatasync()
        disk.sync_dir()

    assert crashes(prepare) == {b"abc"}


def test_unsynced_may_be_lost_torn_or_reordered():
    def prepare(disk):
        file = disk.open("a", create=True)
        disk.sync_dir()
        file.append([b"abc"])
        file.fdatasync()
        file.append([b"def"])
        file.append([b"ghi"])

    found = crashes(prepare)
    assert {b"abc", b"abcdef", b"abcdefghi", b"abcd", b"abcdefg", b"abc\0\0\0ghi"} <= found
    assert all(content.startswith(b"abc") for content in found)


def test_unsynced_name_may_be_lost():
    def prepare(disk):
        file = disk.open("a", create=True)
        file.append([b"abc"])
        file.fdatasync()

    assert crashes(prepare) == {None, b"abc"}


def test_atomic_write_is_atomic():
    def prepare(disk):
        disk.write_atomic("a", b"old")
        disk.open("a.tmp", create=True).append([b"new"])
        disk.open("a.tmp").fdatasync()
        disk.rename("a.tmp", "a")

    assert crashes(prepare) == {b"old", b"new"}


def test_rename_without_sync_shows_torn_content():
    def prepare(disk):
        disk.write_atomic("a", b"old")
        disk.open("a.tmp", create=True).append([b"new"])
        disk.rename("a.tmp", "a")

    assert {b"old", b"new", b"", b"ne"} <= crashes(prepare)


def test_unsynced_removal_may_return():
    def prepare(disk):
        disk.write_atomic("a", b"x")
        disk.unlink("a")

    assert crashes(prepare) == {None, b"x"}


def test_failed_sync_dooms_the_writes():
    disk = SimDisk(Random(1))
    file = disk.open("a", create=True)
    disk.sync_dir()
    file.append([b"lost"])
    disk.fail_next("sync", "a")
    with pytest.raises(StoreFailed, match="Input/output"):
        file.fdatasync()
    file.fdatasync()
    assert file.pread(9, 0) == b"lost"
    disk.crash()
    assert disk.open("a").size() == 0


def test_handles_from_before_the_crash_are_dead():
    disk = SimDisk(Random(1))
    file = disk.open("a", create=True)
    disk.crash()
    for operation in (file.size, file.fdatasync, lambda: file.append([b"x"])):
        with pytest.raises(StoreFailed):
            operation()
    file.close()


async def test_a_dead_process_does_nothing_more():
    disk = SimDisk(Random(1), sync_delay=1)
    done = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.run, done.append, 1)
        await trio.testing.wait_all_tasks_blocked()
        disk.crash()
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert done == []


def test_flip_full_and_punched_space():
    disk = SimDisk(Random(1), capacity=1 << 16)
    file = disk.open("a", create=True)
    file.append([b"x" * (1 << 16)])
    with pytest.raises(DiskFull):
        file.append([b"x"])
    file.punch(0, 1 << 15)
    assert disk.usage() == (1 << 16, 1 << 15)
    file.append([b"y"])
    disk.full = True
    with pytest.raises(DiskFull):
        file.append([b"z"])
    disk.flip("a", 1 << 15, 1)
    assert file.pread(2, 1 << 15) == b"zx"


def test_found_again_by_its_path():
    disk = SimDisk(Random(1))
    assert disk_at(disk.path()) is disk


def test_one_seed_one_trace():
    def run(seed):
        disk = SimDisk(Random(seed))
        file = disk.open("a", create=True)
        disk.sync_dir()
        for i in range(20):
            file.append([bytes([i])])
        disk.crash()
        return disk.open("a").pread(99, 0)

    assert run(5) == run(5)
    assert len({run(seed) for seed in range(20)}) > 5
