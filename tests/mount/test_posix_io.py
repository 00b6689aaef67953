"""Ways to read and write: vectors, splices, direct I/O, ends of mappings, largest sizes, locks."""

import ctypes
import fcntl
import hashlib
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import time

import pytest

from tests.mount.differential import call, content, create

pytestmark = pytest.mark.mount
RWF_NOAPPEND = 0x20
F_OFD_GETLK, F_OFD_SETLK = 36, 37


def digest(name):
    return hashlib.sha256(content(name)).hexdigest()


def test_vectors_and_their_flags(same):
    def script(s):
        fd = os.open("f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"x" * 10_000)
        s.do(os.preadv, fd, [bytearray(10)], 0, os.RWF_NOWAIT)  # it is in the page cache
        for flags in (os.RWF_APPEND, os.RWF_DSYNC, os.RWF_SYNC):
            s.do(os.pwritev, fd, [b"abc", b"def"], 0, flags)
            s.do(os.fstat, fd)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        s.do(os.pwritev, fd, [b"zz"], 0, RWF_NOAPPEND)
        s.do(os.pread, fd, 10, 0)
        s.do(os.pwritev, fd, [b"y" * 3000] * 1024, 0)
        s.do(os.pwritev, fd, [b"x"] * 1025, 0)
        s.do(os.fstat, fd)
        s.do(os.preadv, fd, [bytearray(5000) for _ in range(1000)], 1)
        s.do(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
        call("readahead", fd, ctypes.c_long(0), ctypes.c_long(10**6))
        os.close(fd)
        s.note(digest("f"))

    same(script)


def test_one_write_of_many_megabytes(same):
    def script(s):
        data = random.Random(1).randbytes(20 << 20)
        fd = os.open("f", os.O_CREAT | os.O_RDWR)
        s.do(os.write, fd, data)
        s.note(os.pread(fd, 30 << 20, 0) == data)
        s.note(os.lseek(fd, 0, os.SEEK_CUR))
        os.close(fd)
        s.note(digest("f"))

    same(script)


def test_splice_sendfile_and_copy_file_range(same):
    def script(s):
        data = random.Random(2).randbytes(300_000)
        create("f", data)
        fd, out = os.open("f", os.O_RDWR), os.open("g", os.O_CREAT | os.O_RDWR)
        r, w = os.pipe()
        at = 0
        while at < len(data):
            n = left = os.splice(fd, w, 60_000, offset_src=at)
            while left:
                left -= os.splice(r, out, left)
            at += n
        s.note(digest("g"))
        s.do(os.splice, fd, w, 10, offset_src=299_995)
        s.do(os.splice, fd, w, 10, offset_src=300_000)
        os.read(r, 100)
        os.write(w, b"spliced!")
        s.do(os.splice, r, fd, 8, offset_dst=299_998)
        s.do(os.fstat, fd)
        append = os.open("g", os.O_WRONLY | os.O_APPEND)
        os.write(w, b"z")
        s.do(os.splice, r, append, 1)
        a, b = socket.socketpair()
        with a, b:
            s.do(os.sendfile, a.fileno(), fd, 100, 50_000)
            s.note(b.recv(100_000) == data[100:50_100])
        directory = os.open(".", os.O_RDONLY)
        s.do(os.copy_file_range, fd, fd, 100, 0, 50)
        s.do(os.copy_file_range, fd, fd, 100, 0, 500)
        s.do(os.copy_file_range, fd, append, 10)
        s.do(os.copy_file_range, directory, fd, 10)
        s.do(os.copy_file_range, fd, out, 10, 400_000, 0)
        s.do(os.sendfile, out, directory, 0, 10)
        for x in (fd, out, r, w, append, directory):
            os.close(x)
        s.note(digest("f"), digest("g"))

    same(script)


def test_direct_buffered_and_mapped_see_one_file(same):
    def script(s):
        direct = os.open("f", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        page = mmap.mmap(-1, 8192)
        megabyte = mmap.mmap(-1, 1 << 20)
        megabyte.write(bytes(range(256)) * 4096)
        s.do(os.pwritev, direct, [megabyte], 0)
        s.do(os.fstat, direct)
        for at in (4096, (1 << 20) - 4096, 1 << 20, 1 << 30):
            s.do(os.preadv, direct, [page], at)
        buffered = os.open("f", os.O_RDWR)
        os.pwrite(buffered, b"BUFFERED", 100)
        os.preadv(direct, [page], 0)
        s.note(page[100:108])
        page[200:206] = b"DIRECT"
        os.pwritev(direct, [page], 0)
        s.do(os.pread, buffered, 10, 200)
        mapped = mmap.mmap(buffered, 4096)
        mapped[300:306] = b"MAPPED"
        os.preadv(direct, [page], 0)
        s.note(page[300:306])
        page[400:403] = b"abc"
        os.pwritev(direct, [page], 0)
        s.note(mapped[400:403])
        mapped.close()
        os.close(direct)
        os.close(buffered)
        s.note(digest("f"))

    same(script)


def mapping(fd, length):
    """A shared mapping longer than the file, which Python's module does not make; its address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)


def touched(address, *, write):
    """How a process ends that touches memory: 0, or a signal."""
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if write:
            ctypes.memset(address, ord("W"), 1)
        else:
            ctypes.string_at(address, 1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_mappings_end_where_the_file_does(same):
    """Zeros up to the end of its last page, SIGBUS after it; cutting and growing move the end."""

    def script(s):
        fd = os.open("f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"x" * 5000)
        at = mapping(fd, 16_384)
        s.note(ctypes.string_at(at + 4990, 100))
        for offset in (4999, 8191, 8192, 12_288):
            s.note(offset, touched(at + offset, write=False))
        s.note(touched(at + 4999, write=True), touched(at + 8192, write=True))
        s.note(os.pread(fd, 100, 4990))
        os.ftruncate(fd, 9000)
        s.note(touched(at + 8999, write=True))
        s.note(os.pread(fd, 100, 8990))
        os.ftruncate(fd, 4096)
        s.note(touched(at + 4097, write=False))
        os.ftruncate(fd, 8192)
        s.note(ctypes.string_at(at + 4096, 4096) == bytes(4096))
        call("munmap", ctypes.c_void_p(at), ctypes.c_size_t(16_384))
        os.ftruncate(fd, 1 << 20)  # and a hole is filled by what is written to its memory
        at = mapping(fd, 1 << 20)
        ctypes.memset(at + 500_000, ord("H"), 4)
        s.note(os.pread(fd, 10, 499_998))
        call("msync", ctypes.c_void_p(at), ctypes.c_size_t(1 << 20), 4)
        os.ftruncate(fd, 500_002)
        os.ftruncate(fd, 1 << 20)
        s.note(ctypes.string_at(at + 499_998, 8))
        call("munmap", ctypes.c_void_p(at), ctypes.c_size_t(1 << 20))
        os.close(fd)
        s.note(digest("f"))

    same(script)


def test_a_mapping_needs_the_rights_of_its_descriptor(same):
    def script(s):
        create("f", bytes(8192))
        kinds = ((mmap.MAP_SHARED, 1), (mmap.MAP_SHARED, 3), (mmap.MAP_PRIVATE, 3))
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH):
            fd = os.open("f", flags)
            for kind, protection in kinds:
                s.note(flags, kind, protection)
                s.do(lambda fd=fd, k=kind, p=protection: mmap.mmap(fd, 4096, k, p)[:3])
            os.close(fd)

    same(script)


def test_the_largest_sizes_and_offsets(same):
    def script(s):
        fd = os.open("f", os.O_CREAT | os.O_RDWR)
        for size in (2**44, 2**53, 2**62, 2**63 - 4097, 2**63 - 4096, 2**63 - 1):
            s.note(size)
            s.do(os.ftruncate, fd, size)
            s.do(os.fstat, fd)
            s.do(os.pwrite, fd, b"ab", size - 1)
            s.do(os.pread, fd, 5, size - 3)
            s.do(os.lseek, fd, size, os.SEEK_SET)
        s.do(os.truncate, "f", 0)
        os.close(fd)

    same(script)


def test_rlimit_fsize(same):
    def script(s):
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            fd = os.open("f", os.O_CREAT | os.O_RDWR)
            for fn, *args in (
                (os.write, fd, b"x" * 9000), (os.write, fd, b"x" * 9000), (os.write, fd, b"x"),
                (os.ftruncate, fd, 10_001), (os.ftruncate, fd, 10_000),
                (os.pwrite, fd, b"x", 10_000), (os.pwrite, fd, b"xy", 9999), (os.fstat, fd),
            ):  # fmt: skip
                s.do(fn, *args)
            os.close(fd)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    same(script)


def lock(fd, command, kind, start, length):
    """A lock of a range, owned by the process or by the open file."""
    told = fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))
    return struct.unpack("hhqqi4x", told)[:4]


def in_a_child(fn, *args):
    """The errno of a call in another process, which has our descriptors."""
    pid = os.fork()
    if not pid:
        try:
            fn(*args)
        except OSError as e:
            os._exit(e.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_locks_of_processes_of_open_files_and_of_flock(same):
    def script(s):
        create("f", b"x" * 100)
        a, b, c = (os.open("f", flags) for flags in (os.O_RDWR, os.O_RDWR, os.O_RDONLY))
        s.do(lock, a, F_OFD_SETLK, fcntl.F_WRLCK, 0, 10)
        s.do(lock, b, F_OFD_SETLK, fcntl.F_WRLCK, 5, 10)
        s.do(lock, b, F_OFD_SETLK, fcntl.F_WRLCK, 10, 10)
        s.do(lock, b, F_OFD_GETLK, fcntl.F_WRLCK, 0, 5)
        os.close(a)  # lets go
        s.do(lock, b, F_OFD_SETLK, fcntl.F_WRLCK, 5, 10)
        s.do(lock, c, F_OFD_SETLK, fcntl.F_WRLCK, 50, 1)
        s.do(lock, c, F_OFD_SETLK, fcntl.F_RDLCK, 50, 1)
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            s.do(fcntl.flock, b, kind | fcntl.LOCK_NB)
            s.do(fcntl.flock, c, fcntl.LOCK_SH | fcntl.LOCK_NB)
        s.do(lock, b, fcntl.F_SETLK, fcntl.F_WRLCK, 80, 5)
        s.note(in_a_child(lock, b, fcntl.F_SETLK, fcntl.F_WRLCK, 84, 1))
        s.note(in_a_child(lock, b, fcntl.F_SETLK, fcntl.F_WRLCK, 85, 1))
        os.close(os.open("f", os.O_RDONLY))  # closing any descriptor of the file lets go
        s.note(in_a_child(lock, b, fcntl.F_SETLK, fcntl.F_WRLCK, 84, 1))
        os.mkdir("d")
        d = os.open("d", os.O_RDONLY)
        s.do(fcntl.flock, d, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink("f")
        s.do(lock, b, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 0)
        for fd in (b, c, d):
            os.close(fd)

    same(script)


def test_a_program_that_runs_is_not_written_and_one_that_is_written_does_not_run(same):
    def script(s):
        def ran():
            return subprocess.run(["./program", "0"], check=False).returncode

        def opened(flags):
            os.close(os.open("program", flags))

        shutil.copy("/bin/sleep", "program")
        os.chmod("program", 0o755)
        running = subprocess.Popen(["./program", "60"])
        time.sleep(0.05)
        s.do(opened, os.O_WRONLY)
        s.do(opened, os.O_RDONLY)
        s.do(os.truncate, "program", 0)
        os.rename("program", "moved")
        shutil.copy("/bin/sleep", "program")
        os.chmod("program", 0o755)
        running.kill()
        running.wait()
        fd = os.open("program", os.O_RDWR)
        s.do(ran)
        os.close(fd)
        s.do(ran)

    same(script)


@pytest.mark.slow
def test_a_file_of_64_ki_extents(mnt):
    expected = bytearray(8192 << 16)
    fd = os.open(mnt / "f", os.O_CREAT | os.O_RDWR)
    for i in range(1 << 16):
        piece = b"%08d" % i
        os.pwrite(fd, piece, i * 8192)
        expected[i * 8192 : i * 8192 + 8] = piece
    os.ftruncate(fd, len(expected))
    os.fsync(fd)
    assert digest(mnt / "f") == hashlib.sha256(expected).hexdigest()
    os.ftruncate(fd, 8192 * 100)
    os.fsync(fd)
    assert content(mnt / "f") == expected[: 8192 * 100]
    os.close(fd)
