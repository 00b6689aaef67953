"""Times: which operation changes which time of which file, and setting them; compared with tmpfs."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import pytest

from tests.mount.differential import (
    EXCHANGE,
    TICK,
    call,
    content,
    create,
    put,
    renameat2,
    umask,
    user,
)

pytestmark = pytest.mark.mount
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def utimensat(path, atime, mtime, flags=0):
    """Seconds and nanoseconds as they are, UTIME_NOW and UTIME_OMIT included."""
    pair = (ctypes.c_long * 4)(*atime, *mtime)
    call("utimensat", -100, path, pair, flags)


def now_ish(ns):
    return abs(ns - time.time_ns()) < 5 * 10**9


def test_utimensat_with_nanoseconds_now_and_omit(same):
    def script(s):
        create("f")
        os.symlink("f", "l")
        os.mkdir("d")
        for name in ("f", "d"):
            for at in ((1, 999_999_999), (0, 0), (2**31, 1), (2**33, 123_456_789), (-1, 5)):
                s.do(utimensat, name, at, (7, 77))
                st = os.stat(name)
                s.note(st.st_atime_ns, st.st_mtime_ns)
                s.do(utimensat, name, (8, 88), at)
                st = os.stat(name)
                s.note(st.st_atime_ns, st.st_mtime_ns)
            s.do(utimensat, name, (0, UTIME_OMIT), (5, 5))
            s.note(os.stat(name).st_atime_ns, os.stat(name).st_mtime_ns)
            s.do(utimensat, name, (6, 6), (0, UTIME_OMIT))
            s.note(os.stat(name).st_atime_ns, os.stat(name).st_mtime_ns)
            s.do(utimensat, name, (0, UTIME_NOW), (0, UTIME_OMIT))
            s.note(now_ish(os.stat(name).st_atime_ns), os.stat(name).st_mtime_ns)
            s.do(utimensat, name, (0, UTIME_OMIT), (0, UTIME_NOW))
            s.note(now_ish(os.stat(name).st_mtime_ns))
            s.changes(utimensat, name, (0, UTIME_OMIT), (0, UTIME_OMIT), watch=(name,))
            s.do(utimensat, name, (0, 1_000_000_000), (0, 0))
        s.do(utimensat, "l", (11, 11), (12, 12), 0x100)  # AT_SYMLINK_NOFOLLOW
        st = os.lstat("l")
        s.note(st.st_atime_ns, st.st_mtime_ns)
        s.note(now_ish(os.stat("f").st_ctime_ns))

    same(script)


def test_times_beyond_what_can_be_kept_become_the_nearest(mnt):
    """As ext4 has it, whose range is 1901 to 2446; here it is 1677 to 2554."""
    create(mnt / "f")
    for at, kept in (
        (-(1 << 62), -(1 << 63)),
        (-9223372037, -(1 << 63)),
        (-9223372036, -9223372036 * 10**9),
        (1 << 34, 10**9 << 34),
        (1 << 40, (1 << 64) - 1),
        (1 << 62, (1 << 64) - 1),
    ):
        utimensat(str(mnt / "f"), (at, 0), (at, 0))
        time.sleep(0.01)
        s = os.stat(mnt / "f")
        assert (s.st_atime_ns, s.st_mtime_ns) == (kept, kept), at


def test_a_time_set_is_not_undone_by_data_written_before(mnt):
    os.chdir("/")
    with open(mnt / "f", "wb", buffering=0) as f:
        f.write(b"x" * 100_000)
        os.utime(f.fileno(), ns=(10**18, 10**18 + 1))
        os.fsync(f.fileno())
    s = os.stat(mnt / "f")
    assert (s.st_atime_ns, s.st_mtime_ns) == (10**18, 10**18 + 1)


def test_operations_on_names(same):
    def script(s):
        os.mkdir("d")
        os.mkdir("e")
        w = (".", "d", "e")
        s.changes(create, "d/f", watch=(*w, "d/f"))
        s.changes(os.mkdir, "d/sub", watch=w)
        s.changes(os.symlink, "x", "d/l", watch=w)
        s.changes(os.mkfifo, "d/p", watch=w)
        s.changes(os.link, "d/f", "e/hard", watch=(*w, "d/f"))
        s.changes(os.rename, "d/f", "d/g", watch=(*w, "e/hard"))
        s.changes(os.rename, "d/g", "e/g", watch=(*w, "e/hard"))
        s.changes(os.rename, "d/sub", "e/sub", watch=w)
        fd = os.open("e/sub", os.O_RDONLY)
        s.changes(os.rename, "e/sub", "d/sub", watch=(*w, fd))
        os.close(fd)
        create("d/x")
        victim = os.open("e/g", os.O_RDONLY)
        s.changes(os.rename, "d/x", "e/g", watch=(*w, victim, "e/hard"))
        os.close(victim)
        create("d/y")
        s.changes(renameat2, "d/y", "e/g", EXCHANGE, watch=(*w, "d/y", "e/g"))
        s.changes(os.unlink, "e/hard", watch=w)
        fd = os.open("e/g", os.O_RDONLY)
        s.changes(os.unlink, "e/g", watch=(*w, fd))
        os.close(fd)
        s.changes(os.rmdir, "d/sub", watch=w)
        s.changes(os.unlink, "d/none", watch=w)
        s.changes(os.mkdir, "d/l", watch=w)
        s.changes(os.rename, "d/y", "d/y", watch=(*w, "d/y"))
        os.link("d/y", "d/y2")
        s.changes(os.rename, "d/y", "d/y2", watch=(*w, "d/y"))

    same(script)


def test_operations_on_attributes(same):
    def script(s):
        create("f", b"hello")
        os.symlink("f", "l")
        w = (".", "f", "l")
        s.changes(os.chmod, "f", 0o600, watch=w)
        s.changes(os.chmod, "f", 0o600, watch=w)
        s.changes(os.chown, "f", 1, 1, watch=w)
        s.changes(os.chown, "f", -1, -1, watch=w)
        s.changes(os.lchown, "l", 2, 2, watch=w)
        s.changes(os.utime, "f", (1, 1), watch=(".", "l"))
        s.changes(os.lstat, "f", watch=w)
        s.changes(os.access, "f", os.R_OK, watch=w)
        with user(3):
            s.changes(os.chmod, "f", 0o777, watch=w)  # refused: nothing changes

    same(script)


def content_changes(s, *, to_the_same_size):
    """Operations on a file's content, one by one, and the times that each changes."""
    create("f", b"hello")
    w = (".", "f")
    s.changes(put, "f", b"x", watch=w)
    s.changes(put, "f", b"", watch=w)
    s.changes(put, "f", b"more", os.O_APPEND, watch=w)
    s.changes(os.truncate, "f", 3, watch=w)
    if to_the_same_size:
        s.changes(os.truncate, "f", 3, watch=w)
    s.changes(os.truncate, "f", 1 << 20, watch=w)
    s.changes(put, "f", b"", os.O_TRUNC, watch=w)
    s.changes(put, "f", b"", os.O_TRUNC, watch=w)
    fd = os.open("f", os.O_RDWR)
    s.changes(os.ftruncate, fd, 8192, watch=w)
    if to_the_same_size:
        s.changes(os.ftruncate, fd, 8192, watch=w)
    s.changes(os.pwrite, fd, b"at the end", 9000, watch=w)
    s.changes(os.fsync, fd, watch=w)
    s.changes(os.pread, fd, 10, 9000, watch=w)
    s.changes(os.close, fd, watch=w)
    s.changes(lambda: os.close(os.open("f", os.O_RDONLY | os.O_CREAT)), watch=w)


def test_operations_on_content(same):
    same(lambda s: content_changes(s, to_the_same_size=True))


def test_a_mapping_that_was_written_changes_mtime_by_msync(same):
    def script(s):
        create("f", b"x" * 8192)
        with open("f", "r+b") as f, mmap.mmap(f.fileno(), 8192) as m:

            def change():
                m[5] = 7
                m.flush()

            s.changes(change, watch=("f",))
        s.do(content, "f")

    same(script)


def test_times_of_a_file_stay_when_it_is_committed_later(mnt):
    """What stat says after write(2) it says for ever, though the commit comes a second later."""
    f = mnt / "late"
    fd = os.open(f, os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x" * 10_000)
    seen = os.fstat(fd)
    time.sleep(TICK)
    os.fsync(fd)
    after = os.fstat(fd)
    os.close(fd)
    time.sleep(1.1)  # longer than the kernel keeps attributes
    for s in (after, os.stat(f)):
        assert (s.st_mtime_ns, s.st_ctime_ns) == (seen.st_mtime_ns, seen.st_ctime_ns)


def test_ctime_never_goes_back(same):
    """Of a file with data that is not committed when its attributes or names change."""

    def script(s):
        os.mkdir("d")
        for i, (fn, *args) in enumerate(
            (
                (os.chown, "f", 5, 6),
                (os.chmod, "f", 0o600),
                (os.link, "f", "l"),
                (os.unlink, "l"),
                (os.rename, "f", "d/f"),
                (os.rename, "d/f", "f"),
            )
        ):
            fd = os.open("f", os.O_CREAT | os.O_WRONLY)
            os.pwrite(fd, b"x" * 10_000, 0)
            time.sleep(TICK)
            s.changes(fn, *args, watch=(fd,))
            before = os.fstat(fd)
            os.fsync(fd)
            after = os.fstat(fd)
            s.note(
                i, after.st_ctime_ns == before.st_ctime_ns, after.st_mtime_ns == before.st_mtime_ns
            )
            os.close(fd)

    same(script)


def test_new_files_have_the_present_time(same):
    def script(s):
        create("f")
        os.mkdir("d")
        os.symlink("x", "l")
        os.mkfifo("p")
        for name in ("f", "d", "l", "p"):
            st = os.lstat(name)
            s.note(now_ish(st.st_atime_ns), now_ish(st.st_mtime_ns), now_ish(st.st_ctime_ns))
            s.note(st.st_mtime_ns == st.st_ctime_ns or name == "f")

    same(script)


def reads(s):
    with umask(0):
        create("f", b"hello")
        os.mkdir("d")
        create("d/x")
        os.symlink("f", "l")
    w = ("f", "d", "l")
    for _ in range(2):
        s.changes(content, "f", watch=w)
        s.changes(lambda: sorted(os.listdir("d")), watch=w)
        s.changes(os.readlink, "l", watch=w)
        os.utime("f", (10**9, 10**9))  # in the past: relatime moves it again
        s.changes(content, "f", watch=w)
        s.changes(content, "f", watch=w)
        s.changes(put, "f", b"HELLO", watch=w)
        s.changes(content, "f", watch=w)


def test_reading_changes_no_time(same):
    """The default: as on any file system mounted with noatime, which /proc/mounts says."""
    same(reads)


def test_relatime_on_request(sides):
    """A read moves an access time that is older than the last change, or than a day."""
    m = sides.mount("relatime", "--relatime")
    f, link, d = m / "f", m / "l", m / "d"
    create(f, b"hello")
    os.mkdir(d)
    os.symlink("f", link)
    old = 10**18
    content(f)  # ctime is newer than atime: moved
    os.listdir(d)
    os.readlink(link)
    time.sleep(1.1)  # longer than the kernel keeps attributes
    first = {p: os.lstat(p).st_atime_ns for p in (f, d, link)}
    for p, atime in first.items():
        assert now_ish(atime), p
        assert atime > os.lstat(p).st_mtime_ns
    content(f)  # newer than everything: stays
    os.listdir(d)
    os.readlink(link)
    time.sleep(1.1)
    assert {p: os.lstat(p).st_atime_ns for p in first} == first
    fd = os.open(f, os.O_RDONLY | os.O_NOATIME)
    put(f, b"HELLO")
    os.read(fd, 5)
    os.close(fd)
    assert os.stat(f).st_atime_ns == first[f]
    content(f)  # changed since
    sides.umount("relatime", "--relatime")  # commits what was noted
    m = sides.mount("relatime", "--relatime")
    assert os.stat(m / "f").st_atime_ns > os.stat(m / "f").st_mtime_ns > first[f]
    os.utime(m / "f", ns=(old, old))
    assert os.stat(m / "f").st_atime_ns == old
    sides.umount("relatime", "--relatime")


def test_the_mount_says_noatime(sides):
    where = str(sides.mount())
    lines = Path("/proc/mounts").read_text().splitlines()
    line = next(x for x in lines if x.split()[1] == where)
    assert "noatime" in line.split()[3].split(",")
