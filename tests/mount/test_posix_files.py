"""Content of files: open flags, sizes, holes, unlinked files, mappings, sync; compared with tmpfs."""

import errno
import fcntl
import hashlib
import mmap
import os
import random
import threading
import time

import pytest

from tests.mount.differential import EXCHANGE, content, create, errno_of, put, renameat2

pytestmark = pytest.mark.mount
GIB, TIB = 1 << 30, 1 << 40


def digest(name):
    return hashlib.sha256(content(name)).hexdigest()


def test_o_excl_o_trunc_and_o_append(same):
    def script(s):
        create("f", b"0123456789")
        os.symlink("none", "dangling")
        for name in ("f", "dangling", "new"):
            s.do(lambda n=name: os.close(os.open(n, os.O_CREAT | os.O_EXCL | os.O_WRONLY)))
        s.do(put, "f", b"ab", os.O_TRUNC)
        s.do(content, "f")
        s.do(put, "f", b"cd", os.O_APPEND)
        s.do(put, "dangling", b"through the link", os.O_CREAT)
        s.do(content, "none")
        a = os.open("f", os.O_WRONLY | os.O_APPEND)
        b = os.open("f", os.O_WRONLY | os.O_APPEND)
        for i in range(20):
            os.write(a if i % 2 else b, b"%d," % i)
        os.lseek(a, 0, os.SEEK_SET)
        os.write(a, b"still the end")
        s.note(os.lseek(a, 0, os.SEEK_CUR))
        s.do(os.pwrite, a, b"pwrite appends too", 0)  # Linux does
        fcntl.fcntl(b, fcntl.F_SETFL, 0)
        os.pwrite(b, b"XX", 0)
        os.close(a)
        os.close(b)
        s.do(content, "f")
        fd = os.open("f", os.O_RDONLY | os.O_TRUNC)
        s.do(os.fstat, fd)
        os.close(fd)

    same(script)


def test_truncate_up_and_down(same):
    def script(s):
        rnd = random.Random(7)
        create("f", rnd.randbytes(300_000))
        fd = os.open("f", os.O_RDWR)
        for size in (
            299_999,
            262_144,
            262_145,
            500_000,
            100,
            4097,
            4096,
            4095,
            0,
            1,
            70_000,
            65_537,
        ):
            s.do(os.ftruncate, fd, size) if size % 2 else s.do(os.truncate, "f", size)
            s.do(os.fstat, fd)
            s.note(digest("f"))
            os.pwrite(fd, b"tail", size // 2)
            s.note(digest("f"))
        os.close(fd)
        for size in (-1, 1 << 62):
            s.note(errno_of(os.truncate, "f", size) in (errno.EINVAL, errno.EFBIG, 0))
        s.do(os.truncate, "f", -1)
        s.do(os.truncate, "none", 0)
        os.mkdir("d")
        s.do(os.truncate, "d", 0)
        os.mkfifo("p")
        s.do(os.truncate, "p", 0)

    same(script)


def test_sparse_files(same):
    def script(s):
        fd = os.open("f", os.O_CREAT | os.O_RDWR)
        for at in (5, 70_000, 4 << 20, (9 << 20) + 3, 200 << 20):
            os.pwrite(fd, b"island", at)
        os.fsync(fd)
        s.do(os.fstat, fd)
        for at in (0, 65_530, (4 << 20) - 10, 9 << 20, (200 << 20) - 4096):
            s.do(os.pread, fd, 5000, at)
        os.ftruncate(fd, (9 << 20) + 5)
        os.ftruncate(fd, 10 << 20)
        s.do(os.pread, fd, 100, (9 << 20) + 3)
        os.close(fd)
        s.note(digest("f"))

    same(script)


def test_files_over_4_gib_and_holes_of_1_tib(same):
    def script(s):
        fd = os.open("big", os.O_CREAT | os.O_RDWR)
        places = (0, 2 * GIB - 3, 4 * GIB - 3, 4 * GIB + 5, 8 * GIB, TIB - 2, TIB + GIB)
        for i, at in enumerate(places):
            os.pwrite(fd, b"piece%d" % i, at)
        os.fsync(fd)
        s.do(os.fstat, fd)
        for at in places:
            s.do(os.pread, fd, 12, at)
            s.do(os.pread, fd, 12, at + 1000)
        s.note(os.lseek(fd, 0, os.SEEK_END))
        os.close(fd)
        s.do(os.truncate, "big", 4 * GIB + 7)
        fd = os.open("big", os.O_RDWR | os.O_APPEND)
        os.write(fd, b"appended beyond 4 GiB")
        s.do(os.pread, fd, 40, 4 * GIB)
        os.ftruncate(fd, 1 << 50)
        s.do(os.fstat, fd)
        s.do(os.pread, fd, 10, (1 << 50) - 5)
        os.ftruncate(fd, 10)
        s.do(os.pread, fd, 100, 0)
        os.close(fd)

    same(script)


def test_reads_and_writes_at_the_edges(same):
    def script(s):
        create("f", b"x" * 4096)
        fd = os.open("f", os.O_RDWR)
        for at, n in ((4096, 10), (4095, 10), (0, 0), (1 << 40, 5), (4090, 4096)):
            s.do(os.pread, fd, n, at)
        s.do(os.pwrite, fd, b"", 100_000)
        s.do(os.fstat, fd)
        s.do(os.preadv, fd, [bytearray(3), bytearray(5000)], 4000)
        s.do(os.pwritev, fd, [b"a" * 5000, b"", b"b"], 4000)
        s.do(os.lseek, fd, -1, os.SEEK_SET)
        s.do(os.lseek, fd, 0, os.SEEK_END)
        s.do(os.pread, fd, 1, -1)
        os.close(fd)
        s.note(digest("f"))
        s.do(os.pread, fd, 1, 0)

    same(script)


def test_unlink_and_rename_over_of_open_files(same):
    def script(s):
        for how in ("unlink", "rename", "exchange"):
            create("f", b"old" * 30_000)
            fd = os.open("f", os.O_RDWR)
            if how == "unlink":
                os.unlink("f")
            else:
                create("g", b"new")
                os.rename("g", "f") if how == "rename" else renameat2("g", "f", EXCHANGE)
            s.do(os.fstat, fd)
            s.note(hashlib.sha256(os.pread(fd, 100_000, 0)).hexdigest())
            os.pwrite(fd, b"written when it had no name", 100_000)
            os.fsync(fd)
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 150_000)
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            s.note(hashlib.sha256(os.pread(again, 200_000, 0)).hexdigest())
            os.close(again)
            s.do(os.fstat, fd)
            os.close(fd)
            s.do(lambda: sorted(os.listdir(".")))  # the order is nobody's business
            for name in os.listdir("."):
                os.unlink(name)

    same(script)


def test_mappings_shared_and_private(same):
    def script(s):
        create("f", bytes(range(256)) * 64)
        fd = os.open("f", os.O_RDWR)
        shared = mmap.mmap(fd, 16384)
        private = mmap.mmap(
            fd, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        shared[100:105] = b"HELLO"
        s.note(private[100:105], os.pread(fd, 5, 100))
        private[200:203] = b"own"
        s.note(shared[200:203], os.pread(fd, 3, 200))
        os.pwrite(fd, b"by write", 8000)
        s.note(shared[8000:8008])
        pid = os.fork()
        if not pid:
            shared[9000:9005] = b"child"
            os._exit(0)
        os.waitpid(pid, 0)
        s.note(shared[9000:9005])
        shared.flush()
        s.note(hashlib.sha256(os.pread(fd, 20_000, 0)).hexdigest())
        os.ftruncate(fd, 20_000)
        s.do(lambda: shared.resize(20_000))
        s.note(shared[16_384:16_390])
        os.close(fd)
        os.unlink("f")
        shared[0:4] = b"gone"  # a mapping outlives name and descriptor
        s.note(shared[:6])
        shared.close()
        private.close()

    same(script)


def test_a_mapping_is_written_back_when_it_ends(mnt):
    create(mnt / "f", bytes(1 << 20))
    with open(mnt / "f", "r+b") as f, mmap.mmap(f.fileno(), 1 << 20) as m:
        for at in range(0, 1 << 20, 50_000):
            m[at : at + 3] = b"map"
    expected = bytearray(1 << 20)
    for at in range(0, 1 << 20, 50_000):
        expected[at : at + 3] = b"map"
    assert content(mnt / "f") == expected


def test_fsync_of_files_and_directories(same):
    def script(s):
        os.mkdir("d")
        fd = os.open("d/f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"x" * 100_000)
        s.do(os.fsync, fd)
        os.write(fd, b"y")
        s.do(os.fdatasync, fd)
        d = os.open("d", os.O_RDONLY)
        s.do(os.fsync, d)
        s.do(os.fdatasync, d)
        os.close(d)
        ro = os.open("d/f", os.O_RDONLY)
        s.do(os.fsync, ro)
        os.close(ro)
        os.close(fd)
        sync = os.open("d/f", os.O_WRONLY | os.O_SYNC)
        s.do(os.write, sync, b"z")
        os.close(sync)
        s.note(digest("d/f"))

    same(script)


def test_o_direct_and_o_sync_and_o_dsync(mnt):
    f = str(mnt / "f")
    page = mmap.mmap(-1, 8192)
    page.write(b"direct" * 1000)
    for flags in (os.O_DIRECT, os.O_SYNC, os.O_DSYNC, os.O_DIRECT | os.O_SYNC):
        fd = os.open(f, os.O_CREAT | os.O_RDWR | flags)
        assert os.pwritev(fd, [page], 4096) == 8192
        back = mmap.mmap(-1, 8192)
        assert os.preadv(fd, [back], 4096) == 8192
        assert back[:] == page[:]
        os.close(fd)
    assert content(f) == bytes(4096) + page[:]


def test_writes_of_threads_do_not_tear(mnt):
    """POSIX: a write and a read of one file are each atomic against the other, within one mount."""
    f = mnt / "f"
    create(f, b"a" * 65_536)
    stop = threading.Event()

    def write():
        fd = os.open(f, os.O_WRONLY)
        for i in range(60):
            os.pwrite(fd, bytes([97 + i % 26]) * 65_536, 0)
        os.close(fd)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    fd = os.open(f, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 65_536)
    while not stop.is_set():
        assert os.preadv(fd, [buffer], 0) == 65_536
        assert len(set(buffer[:])) == 1
    writer.join()
    os.close(fd)


def test_a_file_that_is_written_over_and_over_stays_whole(mnt):
    """Its chunks are on their way while other bytes come in the place of all of theirs."""
    f = mnt / "f"
    fd = os.open(f, os.O_CREAT | os.O_RDWR)
    end = time.monotonic() + 4
    n = 0
    while time.monotonic() < end:
        n += 1
        os.pwrite(fd, bytes([n % 251]) * 65_536, 0)
    os.fsync(fd)
    os.close(fd)
    assert content(f) == bytes([n % 251]) * 65_536


def test_appends_of_processes_on_one_mount_are_all_there(mnt):
    f = mnt / "log"
    create(f)
    pids = []
    for n in range(4):
        pid = os.fork()
        if not pid:
            fd = os.open(f, os.O_WRONLY | os.O_APPEND)
            for i in range(50):
                os.write(fd, b"%d:%02d\n" % (n, i))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    lines = content(f).split()
    assert len(lines) == 200
    for n in range(4):
        assert [x for x in lines if x.startswith(b"%d:" % n)] == [
            b"%d:%02d" % (n, i) for i in range(50)
        ]


def test_statfs_tells_the_truth(sides, mnt):
    """Sizes are the cluster's, names 255 bytes; what is written is used, what is removed is not."""

    def used():
        s = os.statvfs(mnt)
        return (s.f_blocks - s.f_bfree) * s.f_frsize, s.f_files - s.f_ffree

    s = os.statvfs(mnt)
    assert (s.f_namemax, s.f_bsize, s.f_frsize) == (255, 4096, 4096)
    assert s.f_bavail == s.f_bfree <= s.f_blocks
    assert s.f_flag & os.ST_NOATIME
    disk = os.statvfs(sides.base)
    # Three copies on one disk: a third of it, give or take what others on this machine write.
    assert s.f_blocks * 4096 <= disk.f_blocks * disk.f_frsize
    before = os.statvfs(mnt)
    for i in range(10):
        create(mnt / f"f{i}", b"x" * 100_000)
    after = os.statvfs(mnt)
    assert (after.f_files - after.f_ffree) - (before.f_files - before.f_ffree) == 10
    assert os.stat(mnt / "f0").st_blocks * 512 >= 100_000
    for i in range(10):
        os.unlink(mnt / f"f{i}")
    assert os.statvfs(mnt).f_files - os.statvfs(mnt).f_ffree == before.f_files - before.f_ffree


def test_a_quota_is_what_statfs_shows_and_edquot_comes_before_anything_is_lost(sides):
    """No acknowledged write disappears: what fsync or close accepted is there after a remount."""
    m = sides.mount("quota", params={"quota_bytes": 8 << 20})
    s = os.statvfs(m)
    assert s.f_blocks * s.f_frsize == 8 << 20
    accepted = []
    for i in range(20):
        fd = os.open(m / f"f{i}", os.O_CREAT | os.O_WRONLY)
        got = [errno_of(os.write, fd, bytes([i]) * (1 << 20)), errno_of(os.fsync, fd)]
        if not any(got):
            accepted.append(i)
        got.append(errno_of(os.close, fd))
        assert set(got) <= {0, errno.EDQUOT}
    assert accepted == list(range(8))
    assert os.statvfs(m).f_bavail == 0
    sides.umount("quota")
    m = sides.mount("quota")
    for i in accepted:
        assert content(m / f"f{i}") == bytes([i]) * (1 << 20)
    os.unlink(m / "f0")
    create(m / "again", b"x" * 500_000)
    assert content(m / "again") == b"x" * 500_000
    sides.umount("quota")


def test_a_replaced_file_is_reopened_by_name_and_the_old_one_is_estale(sides, mnt):
    """A second mount replaces a file that this one knows: open finds the new one at once.

    A descriptor of the old one goes on to serve it or says ESTALE; it never shows the new one.
    """
    here = mnt / "f"
    other = sides.mount(which=1) / mnt.name
    create(here, b"old")
    fd = os.open(here, os.O_RDONLY)
    deadline = time.monotonic() + 5
    while not (other / "f").exists():
        assert time.monotonic() < deadline
    for i in range(5):
        create(other / "tmp", b"new%d" % i)
        os.rename(other / "tmp", other / "f")
        assert content(here) == b"new%d" % i
    time.sleep(1.2)  # beyond every timeout of a cache
    got = errno_of(os.pread, fd, 10, 0)
    assert got in (0, errno.ESTALE)
    if not got:
        assert os.pread(fd, 10, 0) == b"old"
    os.close(fd)
    sides.umount("posix", which=1)


def test_small_files_beyond_a_quota_fail_before_close_has_accepted_them(sides):
    """Without fsync too: the quota is charged when write(2) or close(2) answers, not later."""
    m = sides.mount("small-quota", params={"quota_bytes": 128 << 10})
    accepted = []
    for i in range(100):
        fd = os.open(m / f"f{i}", os.O_CREAT | os.O_WRONLY)
        got = [errno_of(os.write, fd, b"%02d" % i * 1024), errno_of(os.close, fd)]
        assert set(got) <= {0, errno.EDQUOT}
        if not any(got):
            accepted.append(i)
    assert 60 <= len(accepted) <= 64
    sides.umount("small-quota")
    m = sides.mount("small-quota")
    for i in accepted:
        assert content(m / f"f{i}") == b"%02d" % i * 1024
    sides.umount("small-quota")
