"""The real disk passes the contract; its locks, its errors and its batched completions."""

import errno
import os
import subprocess

import pytest
import trio

from dfs.buffers import PAGE, allocate_aligned
from dfs.disk import RWF_DONTCACHE, RealDisk, disk_at, translate
from dfs.errors import Busy, ConfigError, DiskFull, NotFound, StoreFailed
from dfs.testing.contract_disk import DiskContract, FullDiskContract
from dfs.threads import ThreadPool


class TestRealDisk(DiskContract):
    pytestmark = pytest.mark.realtime

    @pytest.fixture
    def disk(self, tmp_path):
        disk = RealDisk(tmp_path / "data")
        yield disk
        disk.close()


def test_a_kernel_that_cannot_write_past_its_cache_writes_through_it(tmp_path, monkeypatch):
    calls = []
    real = os.pwritev

    def pwritev(fd, buffers, offset, flags=0):
        calls.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    disk = RealDisk(tmp_path)
    file = disk.open("a", create=True)
    assert file.append([b"abc"], cached=False) == 0
    assert file.append([b"def"], cached=False) == 3
    assert file.pread(9, 0) == b"abcdef"
    assert calls == [RWF_DONTCACHE, 0, 0]  # asked once a file
    disk.close()


@pytest.mark.parametrize("when", ["open", "write"])
def test_pages_go_through_the_cache_where_they_must(tmp_path, monkeypatch, when):
    opened, wrote, real_open, real_pwrite = [], [], os.open, os.pwrite

    def open_(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            opened.append(path)
            if when == "open":
                raise OSError(errno.EINVAL, "no O_DIRECT")
            flags &= ~os.O_DIRECT
        return real_open(path, flags, *args, **options)

    disk = RealDisk(tmp_path)
    file = disk.open("a", create=True)
    monkeypatch.setattr(os, "open", open_)

    def pwrite(fd, data, at):
        wrote.append(fd)
        if fd != file.fileno():
            raise OSError(errno.EINVAL, "not aligned enough")
        return real_pwrite(fd, data[: 5000 if len(wrote) < 3 else None], at)  # short, too

    monkeypatch.setattr(os, "pwrite", pwrite)
    pages = allocate_aligned(4 * PAGE)
    pages[:] = bytes(range(256)) * (len(pages) // 256)
    file.append([b"x"])
    assert file.append_pages(pages) == PAGE
    assert file.append_pages(pages) == 5 * PAGE
    assert len(opened) == 1
    assert wrote[-1] == file.fileno()
    assert file.pread(1 << 20, 0) == b"x" + bytes(PAGE - 1) + 2 * bytes(pages)
    disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
class TestFullRealDisk(FullDiskContract):
    @pytest.fixture
    def small_disk(self, tmp_path):
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True
        )
        if mount.returncode:
            pytest.skip(f"cannot mount a tmpfs: {mount.stderr.decode().strip()}")
        yield RealDisk(tmp_path)
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize(
    ("code", "kind"), [(28, DiskFull), (122, DiskFull), (2, NotFound), (24, Busy), (5, StoreFailed)]
)
def test_translate(code, kind):
    error = translate(OSError(code, os.strerror(code)), "append to /x")
    assert type(error) is kind
    assert "/x" in str(error)
    assert os.strerror(code) in str(error)


def test_sync_error_is_never_disk_full(tmp_path, monkeypatch):
    def enospc(fd):
        raise OSError(28, "No space left on device")

    file = RealDisk(tmp_path).open("a", create=True)
    monkeypatch.setattr(os, "fdatasync", enospc)
    with pytest.raises(StoreFailed, match="a: No space"):
        file.fdatasync()


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, b, at, flags: real(fd, [memoryview(b[0])[:3]], at, flags)
    )
    file = RealDisk(tmp_path).open("a", create=True)
    for cached in (True, False):
        file.append([b"0123456", b"", b"789", b"abcd"], cached=cached)
    assert file.pread(99, 0) == 2 * b"0123456789abcd"


def test_one_owner(tmp_path):
    one, two = RealDisk(tmp_path), RealDisk(tmp_path)
    one.lock()
    one.lock()
    with pytest.raises(ConfigError, match="in use by another process"):
        two.lock()
    one.close()
    two.lock()
    two.close()


def test_disk_at_a_path(tmp_path):
    RealDisk(tmp_path).write_atomic("f", b"x")
    assert disk_at(str(tmp_path)).open("f").pread(9, 0) == b"x"


@pytest.mark.realtime
async def test_completions_are_batched():
    pool = ThreadPool(2, name="test")
    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(pool.run, int)
    s = pool.statistics()
    pool.close()
    assert s["runs"] == 200
    assert s["wakeups"] < 200
    assert s["busy"] == 0
    assert s["threads"] <= 2
