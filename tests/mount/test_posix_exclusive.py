"""An exclusive mount is POSIX too: tests of the others, where the kernel keeps writes back.

With the writeback cache the kernel owns sizes and times of files and writes pages when it likes, so
what a shared mount does in its handlers happens elsewhere.
"""

import errno
import inspect
import itertools
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from localcluster import wait_until

from dfs.mountinfo import mounts_at
from tests.mount import (
    test_posix_files,
    test_posix_io,
    test_posix_permissions,
    test_posix_random,
    test_posix_times,
)
from tests.mount.differential import (
    attributes,
    compare,
    content,
    create,
    errno_of,
    put,
    user,
)

pytestmark = pytest.mark.mount

_numbers = itertools.count()
EXCLUSIVE = ("exclusive", "--exclusive")


@pytest.fixture
def mnt(sides):
    """A fresh directory on the exclusive mount."""
    where = sides.mount(*EXCLUSIVE) / f"t{next(_numbers)}"
    where.mkdir(mode=0o777)
    os.chmod(where, 0o777)
    return where


@pytest.fixture
def same(sides):
    """`same(script)`: the script sees the same on the exclusive mount as on tmpfs."""

    def run(script, reference="noatime"):
        name = f"x{next(_numbers)}"
        places = [sides.mount(*EXCLUSIVE) / name, sides.reference(reference) / name]
        for place in places:
            place.mkdir()
            os.chmod(place, 0o777)
        compare(script, *places)

    return run


EXCEPT = {
    # Truncating a file to the size that it has changes its times on tmpfs and not here.
    "test_operations_on_content",
    # The kernel sends pages that a write(2) has half copied; O_DIRECT reads what was sent.
    "test_writes_of_threads_do_not_tear",
    # The kernel owns the times that it was told, and shows them until it forgets the inode.
    "test_times_beyond_what_can_be_kept_become_the_nearest",
}

for _module in (
    test_posix_files,
    test_posix_io,
    test_posix_permissions,
    test_posix_random,
    test_posix_times,
):
    for _name, _fn in list(vars(_module).items()):
        if not _name.startswith("test_") or _name in EXCEPT:
            continue
        if "sides" not in inspect.signature(_fn).parameters:
            globals()[_name] = _fn


def test_operations_on_content_change_times(same):
    same(lambda s: test_posix_times.content_changes(s, to_the_same_size=False))


def drop_caches():
    """Have the kernel forget what is clean."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
def test_a_part_of_a_page_can_be_written_without_the_right_to_read(mnt, flags):
    """The kernel reads the page first, through a handle that was opened for writing only."""
    f = mnt / "f"
    was = bytes(range(256)) * 40
    create(f, was)
    for at in (5000, 0, len(was) - 2):
        drop_caches()
        fd = os.open(f, flags)
        assert errno_of(os.read, fd, 1) == errno.EBADF
        os.pwrite(fd, b"new", at)
        os.close(fd)
        at = len(was) if flags & os.O_APPEND else at
        was = was[:at] + b"new" + was[at + 3 :]
    drop_caches()
    assert content(f) == was


def test_a_file_without_the_right_to_read_can_be_written_in_parts(mnt):
    f = mnt / "f"
    create(f, b"a" * 9000, 0o222)
    os.chown(f, 1234, 1234)
    drop_caches()
    top = os.open(mnt, os.O_PATH)  # what is above may not be entered by that user
    with user(1234):
        fd = os.open("f", os.O_WRONLY, dir_fd=top)
        os.pwrite(fd, b"b", 4500)
        os.close(fd)
        with pytest.raises(PermissionError):
            os.open("f", os.O_RDONLY, dir_fd=top)
    os.close(top)
    drop_caches()
    assert content(f) == b"a" * 4500 + b"b" + b"a" * 4499


def test_many_small_writes_cost_few_requests(mnt):
    """What the writeback cache is for: they take no longer than their bytes."""
    fd = os.open(mnt / "f", os.O_CREAT | os.O_WRONLY)
    began = time.monotonic()
    for i in range(20_000):
        os.pwrite(fd, b"%064d" % i, i * 64)
    took = time.monotonic() - began
    os.fsync(fd)
    os.close(fd)
    assert took < 2.0, took  # through the handlers they take ten times that
    assert content(mnt / "f") == b"".join(b"%064d" % i for i in range(20_000))


def test_sizes_times_and_content_are_there_after_a_remount(sides, mnt):
    """They belong to the kernel while the mount is there; they must have reached the volume."""
    old = 1_000_000_000_123_456_789
    create(mnt / "small", b"1234")
    create(mnt / "large", os.urandom(9_000_001))
    create(mnt / "set", b"x")
    os.utime(mnt / "set", ns=(old, old))
    put(mnt / "set", b"y")
    create(mnt / "dated", b"x")
    os.utime(mnt / "dated", ns=(old, old))
    create(mnt / "cut", b"x" * 5000)
    os.truncate(mnt / "cut", 10)
    os.truncate(mnt / "cut", 7000)
    create(mnt / "mapped", b"m" * 10_000)
    fd = os.open(mnt / "mapped", os.O_RDWR)
    with mmap.mmap(fd, 10_000) as m:
        os.close(fd)
        time.sleep(0.02)
        m[5000:5004] = b"here"
    late = os.open(mnt / "late", os.O_CREAT | os.O_WRONLY)
    os.write(late, b"x" * 100_000)
    linked = os.open(mnt / "linked", os.O_CREAT | os.O_WRONLY)
    os.write(linked, b"held open")
    os.link(mnt / "linked", mnt / "other")
    os.close(linked)
    os.chmod(mnt / "small", 0o4711)

    def look(top):
        found = {}
        for f in sorted(os.listdir(top)):
            s = os.stat(top / f)
            found[f] = (attributes(s), s.st_ino, s.st_mtime_ns, s.st_ctime_ns, content(top / f))
        return found

    before = look(mnt)
    time.sleep(0.5)
    os.close(late)  # written back now, and changed before
    assert before["dated"][2] == old
    assert before["set"][2] > old
    sides.umount(*EXCLUSIVE)
    after = look(sides.mount(*EXCLUSIVE) / mnt.name)
    assert {f: v[:4] for f, v in after.items()} == {f: v[:4] for f, v in before.items()}
    assert after == before


def test_others_that_would_write_are_refused_and_readers_see_what_was_synced(sides, mnt):
    cluster, m = sides.cluster, sides.mount(*EXCLUSIVE)
    create(mnt / "f", b"synced")
    fd = os.open(mnt / "f", os.O_RDWR)
    os.fsync(fd)
    where = sides.base / "refused"
    where.mkdir(exist_ok=True)
    said = cluster.refused("mount", "exclusive", where, "--exclusive")
    assert "in use exclusively" in said, said
    assert f":{m})" in said, said
    assert "unmount it there first" in said, said
    assert "in use exclusively" in cluster.refused("mkdir", f"exclusive:/{mnt.name}/d")
    reader = sides.mount("exclusive", "--read-only")
    assert content(reader / mnt.name / "f") == b"synced"
    os.pwrite(fd, b"SYNC", 0)
    os.fsync(fd)
    wait_until(lambda: content(reader / mnt.name / "f") == b"SYNCed", 10, "the reader's view")
    os.close(fd)
    sides.umount("exclusive", "--read-only")


def mount_pid(where):
    """The process that serves a mount."""
    found = [int(p) for p in os.listdir("/proc") if p.isdecimal() and serves(p, where)]
    assert len(found) == 1, found
    return found[0]


def serves(pid, where):
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"fuse" in arguments and os.fsencode(where) in arguments


KEEPER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
def told(fn, *args):
    try:
        fn(*args)
    except OSError as e:
        return e.errno
    return 0
for line in sys.stdin:
    work = {"write": lambda: os.pwrite(fd, b"lost" * 1000, 0), "fsync": lambda: os.fsync(fd)}
    print(told(work[line.strip()]), flush=True)
"""


def test_a_stopped_holder_is_fenced_and_ends(sides):
    """A new mount takes over after 15 s; what the kernel kept for the old one is never written."""
    old = sides.mount("fenced", "--exclusive")
    create(old / "f", b"old " * 1000)
    # A process of its own has the file open: whatever forks would flush it, and wait for ever.
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, old / "f"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def keep(what):
        keeper.stdin.write(f"{what}\n")
        return int(keeper.stdout.readline())

    assert keep("fsync") == 0
    pid = mount_pid(old)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert keep("write") == 0  # it stays in the kernel
        new = sides.mount("fenced", "--exclusive", which=1)
        put(new / "f", b"new " * 1000)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert keep("fsync") in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
    keeper.communicate(timeout=20)
    wait_until(lambda: not mounts_at(old), 10, "the end of the old mount")
    sides.cluster.mounts.remove(old)
    assert content(new / "f") == b"new " * 1000
    sides.umount("fenced", "--exclusive", which=1)
    assert content(sides.mount("fenced") / "f") == b"new " * 1000
