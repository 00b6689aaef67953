"""Who may do what: permission bits, set-ID bits, sticky directories, umask; compared with tmpfs."""

import ctypes
import mmap
import os
import stat
import subprocess

import pytest

from tests.mount.differential import (
    EXCHANGE,
    call,
    compare,
    content,
    create,
    errno_of,
    put,
    renameat2,
    umask,
    user,
)

pytestmark = pytest.mark.mount
ALICE, BOB, TEAM = 4001, 4002, 5000
W, R = os.O_WRONLY, os.O_RDONLY


def owned(name, uid, gid, mode, data=b"content"):
    create(name, data)
    os.chown(name, uid, gid)
    os.chmod(name, mode)


def opened(name, flags):
    os.close(os.open(name, flags))


def test_files_by_owner_group_and_others(same):
    def script(s):
        for mode in (0o400, 0o200, 0o040, 0o020, 0o004, 0o002, 0o477, 0o747, 0o000):
            name = f"f{mode:o}"
            owned(name, ALICE, TEAM, mode)
            for uid, groups in ((ALICE, ()), (BOB, (TEAM,)), (BOB, ())):
                with user(uid, groups=groups):
                    s.note("who", uid, groups)
                    for flags in (R, W, os.O_RDWR, W | os.O_TRUNC, R | os.O_TRUNC):
                        s.do(opened, name, flags)
                    s.do(os.truncate, name, 3)
                    for access in (os.R_OK, os.W_OK, os.X_OK):
                        s.do(os.access, name, access, effective_ids=True)
            s.do(content, name)  # root may

    same(script)


def test_directories_need_search_and_write(same):
    def script(s):
        for mode in (0o700, 0o755, 0o711, 0o744, 0o722, 0o733, 0o777):
            d = f"d{mode:o}"
            os.mkdir(d)
            owned(f"{d}/f", BOB, BOB, 0o666)
            os.mkdir(f"{d}/sub")
            os.chown(d, ALICE, ALICE)
            os.chmod(d, mode)
            with user(BOB):
                s.do(lambda d=d: sorted(os.listdir(d)))
                s.do(content, f"{d}/f")
                s.do(os.lstat, f"{d}/none")
                s.do(create, f"{d}/new")
                s.do(os.mkdir, f"{d}/newdir")
                s.do(os.symlink, "x", f"{d}/newlink")
                s.do(os.mkfifo, f"{d}/fifo")
                s.do(os.link, f"{d}/f", f"{d}/hard")
                s.do(os.rename, f"{d}/f", f"{d}/g")
                s.do(os.unlink, f"{d}/g")
                s.do(os.rmdir, f"{d}/sub")
                s.do(os.chdir, f"{d}/..")

    same(script)


def test_chmod_and_chown_are_for_the_owner_and_root(same):
    def script(s):
        owned("f", ALICE, ALICE, 0o644)
        os.mkdir("d")
        os.chown("d", ALICE, ALICE)
        for who, groups in ((BOB, ()), (ALICE, ()), (ALICE, (TEAM,))):
            with user(who, groups=groups):
                for name in ("f", "d"):
                    s.do(os.chmod, name, 0o600)
                    s.do(os.chown, name, -1, TEAM)
                    s.do(os.chown, name, BOB, -1)
                    s.do(os.chown, name, who, -1)
                    s.do(os.chmod, name, 0o2755)  # set-group-ID of a group that one is not in
                    s.look(name)

    same(script)


def test_times_are_for_the_owner_or_with_write_permission_to_now(same):
    def script(s):
        owned("f", ALICE, ALICE, 0o646)
        owned("r", ALICE, ALICE, 0o644)
        for name in ("f", "r"):
            for who in (BOB, ALICE):
                with user(who):
                    s.do(os.utime, name)
                    s.do(os.utime, name, (1, 1))
            s.note(os.stat(name).st_mtime)

    same(script)


@pytest.mark.parametrize("who", [ALICE, 0], ids=["owner", "root"])
def test_a_write_clears_set_id_bits(same, who):
    def script(s):
        for mode in (0o6777, 0o4755, 0o2755, 0o2745, 0o2644, 0o4644, 0o1777):
            for how in ("write", "truncate", "ftruncate", "o_trunc", "append"):
                name = f"{how}{mode:o}"
                owned(name, ALICE, ALICE, mode)
                with user(who) if who else umask(0o022):
                    if how == "write":
                        s.do(put, name, b"x")
                    elif how == "append":
                        s.do(put, name, b"x", os.O_APPEND)
                    elif how == "truncate":
                        s.do(os.truncate, name, 2)
                    elif how == "o_trunc":
                        s.do(opened, name, W | os.O_TRUNC)
                    else:
                        fd = os.open(name, W)
                        s.do(os.ftruncate, fd, 100)
                        os.close(fd)
                s.look(name)

    same(script)


@pytest.mark.parametrize("who", [ALICE, 0], ids=["owner", "root"])
def test_a_change_of_owner_clears_set_id_bits(same, who):
    def script(s):
        for mode in (0o6777, 0o4755, 0o2755, 0o2745, 0o4644, 0o1777):
            for to in ((-1, TEAM), (ALICE, -1), (-1, -1), (ALICE, TEAM)):
                name = f"{mode:o}{to[0]}{to[1]}"
                owned(name, ALICE, ALICE, mode)
                with user(who, groups=(TEAM,)) if who else umask(0o022):
                    s.do(os.chown, name, *to)
                s.look(name)
        os.mkdir("d")
        os.chmod("d", 0o6777)
        s.do(os.chown, "d", ALICE, TEAM)  # directories keep them
        s.look("d")

    same(script)


def test_a_write_through_a_mapping_or_an_old_descriptor_by_somebody_else(same):
    def script(s):
        owned("f", ALICE, ALICE, 0o6777)
        fd = os.open("f", W)
        s.look("f")
        with user(BOB):
            s.do(os.write, fd, b"x")
        s.look("f")
        os.chmod("f", 0o6777)
        with user(BOB):
            s.do(os.pwrite, fd, b"y", 5)
        s.do(os.fstat, fd)
        os.close(fd)

    same(script)


def test_whatever_writes_clears_set_id_bits(same):
    """Also for a member of the file's group, and without write(2)."""

    def script(s):
        owned("w", ALICE, TEAM, 0o6775)
        with open("source", "wb") as f:
            f.write(b"x" * 100)
        source = os.open("source", R)
        for how in ("put", "truncate", "sendfile", "copy_file_range", "splice", "mapping"):
            os.chmod("w", 0o6775)
            with user(BOB, groups=(TEAM,)):
                fd = os.open("w", os.O_RDWR)
                if how == "put":
                    s.do(os.write, fd, b"x" * 10)
                elif how == "truncate":
                    s.do(os.ftruncate, fd, 5)
                elif how == "sendfile":
                    s.do(os.sendfile, fd, source, 0, 10)
                elif how == "copy_file_range":
                    s.do(os.copy_file_range, source, fd, 10, 0, 0)
                elif how == "splice":
                    r, w = os.pipe()
                    os.write(w, b"piped")
                    s.do(os.splice, r, fd, 5)
                    os.close(r)
                    os.close(w)
                else:
                    with mmap.mmap(fd, 5) as m:
                        m[0] = 7
                        m.flush()
                os.close(fd)
            s.note(how)
            s.look("w")
        os.close(source)

    same(script)


def test_futimens_with_and_without_times(same):
    """To now: with the right to write, or as owner.  To anything else: as owner."""
    now, omit = (0, (1 << 30) - 1), (0, (1 << 30) - 2)

    def futimens(fd, atime, mtime):
        call("futimens", fd, (ctypes.c_long * 4)(*atime, *mtime))

    def script(s):
        owned("f", ALICE, ALICE, 0o600)
        fds = [os.open("f", os.O_RDWR), os.open("f", R), os.open("f", os.O_PATH)]
        for mode in (0o600, 0o602, 0o604):
            os.chmod("f", mode)
            for who in (ALICE, BOB):
                with user(who):
                    for fd in fds:
                        for pair in (
                            (now, now), (omit, omit), (now, omit), (omit, now), ((5, 5), now), ((5, 5), (6, 6)),
                        ):  # fmt: skip
                            s.note(mode, who, pair)
                            s.do(futimens, fd, *pair)
        for fd in fds:
            os.close(fd)

    same(script)


def test_what_sticky_directories_protect_by_the_settings_of_the_kernel(same):
    """fs.protected_regular, _fifos, _symlinks and _hardlinks."""

    def script(s):
        owned("f", 0, 0, 0o600)
        os.mkdir("t")
        os.chmod("t", 0o1777)
        with user(ALICE):
            create("t/a", b"x", 0o666)
            os.mkfifo("t/p", 0o666)
            os.chmod("t/p", 0o666)
            os.symlink("../f", "t/l")
            os.symlink("a", "t/la")
        for who in (BOB, ALICE, 0):
            with user(who) if who else umask(0o022):
                s.do(opened, "t/a", os.O_CREAT | os.O_RDWR)
                s.do(opened, "t/a", os.O_RDWR)
                s.do(opened, "t/p", os.O_CREAT | os.O_RDWR | os.O_NONBLOCK)
                s.do(content, "t/l")
                s.do(content, "t/la")
                s.do(os.link, "t/a", f"hard{who}")
                s.do(os.link, "f", f"root{who}")
                s.do(opened, "t/a", R | os.O_NOATIME)

    same(script)


def test_sticky_directories(same):
    def script(s):
        os.mkdir("t")
        os.chmod("t", 0o1777)
        os.mkdir("own")
        os.chown("own", BOB, BOB)
        os.chmod("own", 0o1777)
        for d in ("t", "own"):
            for name in ("a", "b", "c", "x"):
                owned(f"{d}/{name}", ALICE, ALICE, 0o666)
            os.mkdir(f"{d}/dir")
            os.chown(f"{d}/dir", ALICE, ALICE)
            with user(BOB):
                s.do(put, f"{d}/a", b"may write")
                create(f"{d}/mine")
                s.do(os.unlink, f"{d}/a")
                s.do(os.rename, f"{d}/b", f"{d}/b2")
                s.do(os.rename, f"{d}/mine", f"{d}/c")
                s.do(os.rmdir, f"{d}/dir")
                if os.path.exists(f"{d}/mine"):
                    s.do(renameat2, f"{d}/mine", f"{d}/x", EXCHANGE)
                    s.do(os.unlink, f"{d}/mine")
        with user(ALICE):
            s.do(os.unlink, "t/a")
            s.do(os.rename, "t/b", "t/bb")

    same(script)


def test_set_group_id_directories_hand_down_their_group(same):
    def script(s):
        os.mkdir("d")
        os.chown("d", ALICE, TEAM)
        os.chmod("d", 0o2777)
        for who, groups in ((0, ()), (BOB, ()), (BOB, (TEAM,))):
            name = f"d/{who}{len(groups)}"
            with user(who, groups=groups) if who else umask(0o022):
                s.do(os.mkdir, name + "dir")
                s.do(os.mkdir, name + "dir/below")
                s.do(opened, name + "x", os.O_CREAT | W)
                fd = os.open(name + "g", os.O_CREAT | W, 0o2775)
                os.close(fd)
                s.do(os.mkfifo, name + "fifo")
                s.do(os.symlink, "x", name + "link")
            s.look(*(name + x for x in ("dir", "dir/below", "x", "g", "fifo", "link")))

    same(script)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_umask(same, mask):
    def script(s):
        with umask(mask):
            s.do(os.mkdir, "d", 0o7777)
            os.close(os.open("f", os.O_CREAT | W, 0o7777))
            s.do(os.mkfifo, "fifo", 0o666)
            s.do(os.mknod, "reg", stat.S_IFREG | 0o6777)
            os.symlink("x", "l")
        s.look("d", "f", "fifo", "reg", "l")
        os.chmod("d", 0o755)

    same(script)


def test_a_descriptor_keeps_the_rights_it_was_opened_with(same):
    def script(s):
        with user(ALICE):
            fd = os.open("f", os.O_CREAT | os.O_RDWR, 0)  # mode 0, and yet writable
            s.do(os.write, fd, b"hello")
            s.do(opened, "f", R)
            s.do(os.pread, fd, 5, 0)
            s.do(os.fchmod, fd, 0o400)
            s.do(os.write, fd, b" world")
            os.close(fd)
        ro = os.open("f", R)
        s.do(os.write, ro, b"x")
        s.do(os.ftruncate, ro, 0)
        os.close(ro)
        wo = os.open("f", W)
        s.do(os.read, wo, 1)
        os.close(wo)
        s.do(content, "f")

    same(script)


def test_what_only_root_may_make(same):
    def script(s):
        with user(BOB):
            s.do(os.mknod, "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            s.do(os.mknod, "loop", stat.S_IFBLK | 0o666, os.makedev(7, 0))
            s.do(os.mknod, "fifo", stat.S_IFIFO | 0o666)
            s.do(os.mknod, "sock", stat.S_IFSOCK | 0o666)
            s.do(os.mknod, "file", stat.S_IFREG | 0o666)
            s.do(os.mkdir, "d")
            s.do(os.chown, "file", ALICE, -1)
        s.do(os.mknod, "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))

    same(script)


def test_programs_run_only_with_the_execute_bit(same):
    def script(s):
        create("run", b"#!/bin/sh\nexit 7\n", 0o644)
        s.do(lambda: os.spawnv(os.P_WAIT, "./run", ["run"]))
        os.chmod("run", 0o755)
        s.do(lambda: os.spawnv(os.P_WAIT, "./run", ["run"]))
        os.chmod("run", 0o644)
        s.do(os.access, "run", os.X_OK)

    same(script)


def test_a_read_only_mount_refuses_every_change(sides, tmp_path):
    """And nothing that is none: reading, opening of FIFOs, sync."""

    def script(s):
        for name in ("f", "none", "d", "l"):
            for flags in (
                R,
                W,
                os.O_RDWR,
                R | os.O_TRUNC,
                R | os.O_CREAT,
                W | os.O_CREAT,
                R | os.O_CREAT | os.O_EXCL,
                R | os.O_APPEND,
            ):
                s.note(name, flags)
                s.do(opened, name, flags)
        for who in (0, ALICE):
            with user(who) if who else umask(0o022):
                s.do(os.mkdir, "new")
                s.do(os.mkdir, "d")
                s.do(os.rmdir, "d")
                s.do(os.rmdir, "none")
                s.do(os.unlink, "f")
                s.do(os.unlink, "none")
                s.do(os.rename, "f", "g")
                s.do(renameat2, "f", "d", EXCHANGE)
                s.do(os.link, "f", "g")
                s.do(os.symlink, "x", "g")
                s.do(os.symlink, "x", "f")
                s.do(os.mkfifo, "q")
                s.do(os.chmod, "f", 0o600)
                s.do(os.chown, "f", 1, 1)
                s.do(os.utime, "f")
                s.do(os.truncate, "f", 0)
                s.do(content, "f")
                for access in (os.R_OK, os.W_OK):
                    s.do(os.access, "f", access)
                    s.do(os.access, "p", access)
        s.do(opened, "p", os.O_RDWR | os.O_NONBLOCK)
        fd = os.open("f", R)
        s.do(os.fsync, fd)
        s.do(os.fchmod, fd, 0o600)
        s.do(os.ftruncate, fd, 0)
        os.close(fd)
        s.note(bool(os.statvfs(".").f_flag & os.ST_RDONLY))

    reference = tmp_path / "reference"
    reference.mkdir()
    tmpfs = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*tmpfs, "noatime,nosuid,nodev,mode=0755", "ro", reference], check=True)
    try:
        mine = sides.mount("ro")
        for place in (mine, reference):
            create(place / "f", b"content")
            os.mkdir(place / "d")
            os.symlink("f", place / "l")
            os.mkfifo(place / "p", 0o666)
        sides.umount("ro")
        subprocess.run(["mount", "-o", "remount,ro", reference], check=True)
        mine = sides.mount("ro", "--read-only")
        compare(script, mine, reference)
        sides.umount("ro", "--read-only")
    finally:
        subprocess.run(["umount", reference], check=True)


def test_the_root_is_a_directory_like_any_other(sides):
    """But that nobody may remove, rename or link it."""

    def script(s):
        top = os.getcwd()
        for fn, *args in (
            (os.rmdir, top), (os.unlink, top), (os.mkdir, top), (os.rename, top, top + "x"),
        ):  # fmt: skip
            s.note(fn.__name__)
            s.note(errno_of(fn, *args))
        s.do(os.chmod, ".", 0o1777)
        s.do(os.chown, ".", 5, 6)
        s.look(".")
        s.do(os.utime, ".", (1, 2))
        s.note(os.stat(".").st_mtime)
        os.mkdir("a")
        s.do(os.rename, "a", ".")
        s.do(os.rename, "a/..", "b")
        s.do(renameat2, "a", ".", EXCHANGE)
        s.do(os.link, ".", "l")
        s.look(".")
        with user(ALICE):
            s.do(create, "mine")
            s.do(os.rmdir, "a")
        os.unlink("mine")
        os.rmdir("a")
        os.chmod(".", 0o755)
        os.chown(".", 0, 0)

    compare(script, sides.mount("root"), sides.reference("noatime,size=1m"))
    sides.umount("root")
