"""Who may mount on a directory, and that only one does."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest
import trio

from dfs.errors import ConfigError
from dfs.mountinfo import Mount
from fuse import mountpoint
from fuse.mountpoint import claimed

OURS = Mount("0:45", "/m", "fuse.dfs", "dfs:photos")


def lock(path):
    """A descriptor of a directory, locked as another process would."""
    directory = os.open(path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return directory


@pytest.fixture
def mounted(monkeypatch):
    """What the kernel says is mounted."""
    found = []
    monkeypatch.setattr(mountpoint, "mounts_at", lambda _: found)
    return found


async def test_of_two_that_mount_at_once_the_second_is_told_what_the_first_mounted(
    tmp_path, mounted
):
    told = []

    async def mount():
        try:
            async with claimed(str(tmp_path)):
                assert not mounted
                await trio.sleep(0.5)  # longer than any mount takes
                mounted.append(OURS)
        except ConfigError as e:
            told.append(str(e))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(mount)
    assert mounted == [OURS]
    assert len(told) == 2
    for text in told:
        assert f"{tmp_path} is busy: dfs:photos (fuse.dfs) is mounted there; `umount" in text


async def test_who_waits_mounts_when_the_first_fails(tmp_path, mounted):
    async with trio.open_nursery() as nursery:

        async def second():
            async with claimed(str(tmp_path)):
                mounted.append(OURS)

        async def first():
            async with claimed(str(tmp_path)):
                nursery.start_soon(second)
                await trio.sleep(0.5)
                raise ConfigError("libfuse")

        with pytest.raises(ConfigError, match="libfuse"):
            await first()
        assert not mounted
    assert mounted == [OURS]


async def test_a_process_that_does_not_come_to_mount_is_not_waited_for_for_ever(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(ConfigError, match=r"locked by another process.*10 s"):
        async with claimed(str(tmp_path)):
            pass
    os.close(held)
    async with claimed(str(tmp_path)):
        with pytest.raises(BlockingIOError):
            lock(tmp_path)
    os.close(lock(tmp_path))  # a mount that stands, or was detached, holds no lock


HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
input()
"""


def test_the_lock_ends_with_its_process(tmp_path):
    async def claim():
        async with claimed(str(tmp_path)):
            pass

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(BlockingIOError):
            lock(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        trio.run(claim)


async def test_any_file_system_that_is_mounted_is_in_the_way_and_named():
    with pytest.raises(ConfigError, match=r"/proc is busy: proc \(proc\) is mounted there"):
        async with claimed("/proc"):
            pass
    with pytest.raises(ConfigError, match="/proc/self/none is not usable: No such file"):
        async with claimed("/proc/self/none"):
            pass


async def test_a_directory_that_cannot_be_locked_is_used_all_the_same(
    tmp_path, monkeypatch, caplog
):
    def refuse(*_):
        raise OSError(9, "Bad file descriptor")  # what NFS says

    monkeypatch.setattr(mountpoint.fcntl, "flock", refuse)
    async with claimed(str(tmp_path)):
        pass
    assert "cannot be locked: Bad file descriptor" in caplog.text
