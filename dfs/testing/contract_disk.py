"""What every `dfs.env.Disk` does, as tests: subclass it and give a `disk` fixture."""

import pytest
import trio

from dfs.buffers import PAGE, allocate_aligned
from dfs.env import Disk
from dfs.errors import DiskFull, NotFound
from dfs.groupsync import GroupSync


class DiskContract:
    """Tests that the real and the simulated disk both pass."""

    def test_append_returns_where_it_starts(self, disk: Disk) -> None:
        """Appends land one after the other, whatever buffers they are made of."""
        file = disk.open("a", create=True)
        assert file.append([b"one", memoryview(b"two")]) == 0
        assert file.append([bytearray(b"three")]) == 6
        assert file.append([]) == 11
        assert file.append([b"", b"x"] * 3000) == 11
        assert file.size() == 3011
        assert file.pread(11, 0) == b"onetwothree"
        assert file.pread(100, 3009) == b"xx"
        assert file.pread(5, 4000) == b""

    def test_append_without_caching_writes_the_same(self, disk: Disk) -> None:
        """Whether the kernel is to remember the bytes changes nothing in the file."""
        file = disk.open("a", create=True)
        assert file.append([b"x" * 5000]) == 0
        assert file.append([b"head", memoryview(b"y" * 200_000)], cached=False) == 5000
        file.fdatasync()
        assert file.append([b"", b"z"] * 3000, cached=False) == 205_004
        assert file.append([b"end"]) == 208_004
        assert file.size() == 208_007
        assert file.pread(file.size(), 0) == (
            b"x" * 5000 + b"head" + b"y" * 200_000 + b"z" * 3000 + b"end"
        )

    def test_pages_are_appended_at_a_multiple_of_a_page(self, disk: Disk) -> None:
        """What is between reads as zeros; ordinary appends go on behind them."""
        file = disk.open("a", create=True)
        pages = allocate_aligned(3 * PAGE)
        pages[:] = b"p" * len(pages)
        assert file.append_pages(pages) == 0
        assert file.append([b"tail"]) == 3 * PAGE
        pages[:] = b"q" * len(pages)
        assert file.append_pages(pages) == 4 * PAGE
        assert file.append([b"end"]) == 7 * PAGE
        file.fdatasync()
        assert file.append_pages(pages[:PAGE]) == 8 * PAGE
        assert file.size() == 9 * PAGE
        gap, last = bytes(PAGE - 4), bytes(PAGE - 3)
        wanted = b"p" * 3 * PAGE + b"tail" + gap + b"q" * 3 * PAGE + b"end" + last + b"q" * PAGE
        assert file.pread(file.size(), 0) == wanted
        assert disk.open("a").pread(5, 4 * PAGE - 2) == b"\0\0qqq"

    def test_append_sees_other_handles(self, disk: Disk) -> None:
        """Two handles of one file append after each other's bytes."""
        one, two = disk.open("a", create=True), disk.open("a")
        one.append([b"1"])
        assert two.append([b"2"]) == 1
        assert one.append([b"3"]) == 2
        assert two.pread(9, 0) == b"123"

    def test_pwrite_overwrites_and_extends(self, disk: Disk) -> None:
        """A write beyond the end leaves zeros between."""
        file = disk.open("a", create=True)
        file.pwrite(b"abcdef", 0)
        file.pwrite(b"XY", 2)
        file.pwrite(b"!", 8)
        assert file.pread(20, 0) == b"abXYef\0\0!"

    def test_truncate(self, disk: Disk) -> None:
        """Cutting and extending; appends follow the new end."""
        file = disk.open("a", create=True)
        file.append([b"abcdef"])
        file.truncate(2)
        assert file.append([b"Z"]) == 2
        file.truncate(5)
        assert file.pread(9, 0) == b"abZ\0\0"

    def test_punch_reads_as_zeros_and_keeps_the_size(self, disk: Disk) -> None:
        """A hole is zeros, the rest is untouched."""
        file = disk.open("a", create=True)
        file.append([b"x" * 20000])
        file.punch(1000, 12000)
        assert file.size() == 20000
        assert file.pread(20000, 0) == b"x" * 1000 + bytes(12000) + b"x" * 7000
        file.punch(19000, 5000)
        assert file.size() == 20000

    def test_open_absent(self, disk: Disk) -> None:
        """Absent files and directories are `NotFound`, and the message names the path."""
        with pytest.raises(NotFound, match="absent"):
            disk.open("absent")
        with pytest.raises(NotFound, match="no/such"):
            disk.open("no/such", create=True)

    def test_open_truncate_and_create_keep(self, disk: Disk) -> None:
        """`create` keeps what is there, `truncate` does not."""
        disk.open("a", create=True).append([b"abc"])
        assert disk.open("a", create=True).size() == 3
        assert disk.open("a", create=True, truncate=True).size() == 0

    def test_names(self, disk: Disk) -> None:
        """Directories, renames over files, removals."""
        disk.mkdir("d/e")
        disk.mkdir("d")
        for name in ("d/2", "d/1", "d/e/3"):
            disk.open(name, create=True).append([name.encode()])
        assert disk.listdir("d") == ["1", "2", "e"]
        assert disk.listdir() == ["d"]
        assert disk.listdir("absent") == []
        disk.rename("d/1", "d/2")
        disk.sync_dir("d")
        assert disk.listdir("d") == ["2", "e"]
        assert disk.open("d/2").pread(9, 0) == b"d/1"
        assert disk.exists("d/2")
        assert disk.exists("d/e")
        assert not disk.exists("d/1")
        disk.unlink("d/2")
        disk.unlink("d/2")
        assert not disk.exists("d/2")
        with pytest.raises(NotFound):
            disk.rename("d/1", "d/9")

    def test_removed_file_stays_readable(self, disk: Disk) -> None:
        """An open file outlives its name."""
        file = disk.open("a", create=True)
        file.append([b"abc"])
        disk.unlink("a")
        assert file.pread(3, 0) == b"abc"
        file.fdatasync()
        file.close()
        file.close()

    def test_write_atomic(self, disk: Disk) -> None:
        """Replaces, and leaves no temporary."""
        disk.mkdir("d")
        disk.write_atomic("d/f", b"long content")
        disk.write_atomic("d/f", b"new")
        assert disk.open("d/f").pread(99, 0) == b"new"
        assert disk.listdir("d") == ["f"]

    def test_usage(self, disk: Disk) -> None:
        """Free is at most the total."""
        total, free = disk.usage()
        assert 0 <= free <= total

    def test_path_names_the_file(self, disk: Disk) -> None:
        """Paths are for people and for `dfs.disk.disk_at`."""
        assert disk.path("d/f") == f"{disk.path()}/d/f"

    async def test_run(self, disk: Disk) -> None:
        """Results and errors come back; cancellation does not cut a function short."""
        assert await disk.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await disk.run(divmod, 7, 0)
        done: list[int] = []
        with trio.CancelScope() as scope:
            scope.cancel()
            await disk.run(done.append, 1)
        assert done == [1]

    async def test_run_many(self, disk: Disk) -> None:
        """Many at once."""
        results = []

        async def one(i: int) -> None:
            results.append(await disk.run(lambda: i * i))

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(one, i)
        assert sorted(results) == [i * i for i in range(50)]

    async def test_group_sync(self, disk: Disk) -> None:
        """Everybody's bytes are durable after fewer syncs than callers."""
        file = disk.open("a", create=True)
        group = GroupSync(disk, file)

        async def one(i: int) -> None:
            file.append([bytes([i])])
            await group.sync()

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(one, i)
        assert file.size() == 50
        assert group.statistics()["calls"] == 50
        assert 1 <= group.statistics()["syncs"] <= 10


class FullDiskContract:
    """What every disk does when it is full; give a `small_disk` fixture of at most 1 MiB."""

    def test_full_append_is_cut_back(self, small_disk: Disk) -> None:
        """`DiskFull` names the path and leaves the file as it was; what is free can be used."""
        file = small_disk.open("a", create=True)
        file.append([b"start"])
        with pytest.raises(DiskFull, match="a: No space left"):
            file.append([bytes(100_000)] * 30)
        assert file.size() == 5
        with pytest.raises(DiskFull, match="a: No space left"):
            file.append_pages(allocate_aligned(732 * PAGE))
        assert file.size() == 5
        assert file.append([b"more"]) == 5
        file.punch(0, 9)
        small_disk.unlink("a")
