"""What a pyfuse3 mount cannot do, and the errno of each: the list of `fuse/README.md`, tested."""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.mount.differential import WHITEOUT, call, content, create, errno_of, renameat2

pytestmark = pytest.mark.mount
NAMES = {
    errno.EOPNOTSUPP: "EOPNOTSUPP",
    errno.ENOTTY: "ENOTTY",
    errno.EINVAL: "EINVAL",
    errno.EACCES: "EACCES",
    errno.EPERM: "EPERM",
    errno.EXDEV: "EXDEV",
}


@pytest.fixture
def fd(mnt):
    fd = os.open(mnt / "f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x" * 100_000)
    yield fd
    os.close(fd)


def refuses(code, fn, *args):
    """The call fails with this errno, and `fuse/README.md` says so."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
        fn(*args)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[code]
    return f"`{NAMES[code]}`"


def documented(what, answer):
    text = (Path(__file__).parents[2] / "fuse" / "README.md").read_text()
    line = next((x for x in text.splitlines() if x.startswith(f"| {what} ")), "")
    assert answer in line, f"fuse/README.md should say of {what}: {answer}; it says: {line}"


def fallocate(fd, mode, at, length):
    call("fallocate", fd, mode, ctypes.c_long(at), ctypes.c_long(length))


def test_fallocate(fd):
    for mode in (0, 1, 3, 16, 8, 32):  # allocate, keep size, punch, zero, collapse, insert
        answer = refuses(errno.EOPNOTSUPP, fallocate, fd, mode, 4096, 4096)
    documented("`fallocate`", answer)
    assert os.fstat(fd).st_size == 100_000


def test_posix_fallocate_is_made_by_the_c_library(fd):
    """glibc writes a byte into each block instead, so programs that only know this one work."""
    os.posix_fallocate(fd, 90_000, 100_000)
    assert os.fstat(fd).st_size == 190_000
    assert os.pread(fd, 100_000, 0) == b"x" * 100_000
    assert os.pread(fd, 100_000, 100_000) == bytes(90_000)


def test_seek_data_and_seek_hole_see_one_piece_of_data(fd):
    """The kernel answers itself, as POSIX allows: all is data, the hole is at the end."""
    os.ftruncate(fd, 10 << 20)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert os.lseek(fd, 5 << 20, os.SEEK_DATA) == 5 << 20
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 10 << 20
    with pytest.raises(OSError, match="No such device or address"):
        os.lseek(fd, 10 << 20, os.SEEK_DATA)
    documented("`lseek` SEEK_DATA, SEEK_HOLE", "the whole file is data")


def test_copy_file_range_and_sendfile_copy_through_the_page_cache(fd, mnt):
    out = os.open(mnt / "copy", os.O_CREAT | os.O_RDWR)
    done = 0
    while done < 100_000:
        done += os.copy_file_range(fd, out, 100_000 - done, done, done)
    os.ftruncate(out, 50_000)
    os.lseek(out, 0, os.SEEK_END)
    assert os.sendfile(out, fd, 0, 20_000) == 20_000
    os.close(out)
    assert content(mnt / "copy") == b"x" * 70_000
    documented("`copy_file_range`", "works")


def test_reflink_ioctls(fd, mnt):
    out = os.open(mnt / "clone", os.O_CREAT | os.O_RDWR)
    whole = struct.pack("qQQQ", fd, 0, 0, 0)
    refuses(errno.EOPNOTSUPP, fcntl.ioctl, out, 0x4020940D, whole)  # FICLONERANGE
    answer = refuses(errno.EOPNOTSUPP, fcntl.ioctl, out, 0x40049409, fd)  # FICLONE
    documented("FICLONE, FICLONERANGE", answer)
    os.close(out)


def test_ioctls(fd):
    answer = refuses(errno.ENOTTY, fcntl.ioctl, fd, 0x80086601, bytes(8))  # FS_IOC_GETFLAGS
    documented("`ioctl`", answer)
    assert struct.unpack("i", fcntl.ioctl(fd, 0x541B, bytes(4)))[0] >= 0  # FIONREAD is the kernel's


def test_unnamed_temporary_files(mnt):
    answer = refuses(errno.EOPNOTSUPP, os.open, mnt, os.O_TMPFILE | os.O_RDWR)
    documented("`O_TMPFILE`", answer)


def test_whiteouts(mnt):
    create(mnt / "f")
    answer = refuses(errno.EINVAL, renameat2, str(mnt / "f"), str(mnt / "g"), WHITEOUT)
    documented("`renameat2` RENAME_WHITEOUT", answer)
    assert os.listdir(mnt) == ["f"]


def test_a_mount_is_the_lower_layer_of_overlayfs_and_not_the_upper(mnt, sides):
    for name in ("lower", "upper", "work", "merged"):
        (mnt / name).mkdir()
    create(mnt / "lower" / "f", b"below")

    def overlay(upper):
        options = f"lowerdir={mnt}/lower,upperdir={upper}/upper,workdir={upper}/work"
        command = ["mount", "-t", "overlay", "-o", options, "overlay", mnt / "merged"]
        return subprocess.run(command, check=False, capture_output=True).returncode

    assert overlay(mnt) != 0
    elsewhere = sides.reference() / mnt.name
    for name in ("upper", "work"):
        (elsewhere / name).mkdir(parents=True)
    assert overlay(elsewhere) == 0
    try:
        assert content(mnt / "merged" / "f") == b"below"
        (mnt / "merged" / "f").write_bytes(b"above")
        assert content(mnt / "merged" / "f") == b"above"
    finally:
        subprocess.run(["umount", mnt / "merged"], check=True)
    assert content(mnt / "lower" / "f") == b"below"


def test_blocks_are_counted_by_size(mnt):
    create(mnt / "f")
    os.truncate(mnt / "f", 10 << 20)
    assert os.stat(mnt / "f").st_blocks * 512 == 10 << 20
    documented("`st_blocks`, `du`", "holes included")


def test_times_that_cannot_be_kept(mnt):
    create(mnt / "f")
    os.utime(mnt / "f", (1 << 40, -(1 << 40)))
    time.sleep(1.1)  # longer than the kernel keeps attributes
    s = os.stat(mnt / "f")
    assert time.gmtime(s.st_atime).tm_year == 2554
    assert time.gmtime(s.st_mtime).tm_year == 1677
    documented("times before 1677 or after 2554", "nearest")


def test_what_a_mapping_wrote_beyond_the_end_is_not_kept_while_the_file_does_not_grow(fd, mnt):
    """The kernel cuts what it sends at the size."""
    with mmap.mmap(fd, 0) as whole:
        first = ctypes.c_char.from_buffer(whole)
        address = ctypes.addressof(first)
        ctypes.memset(address + 100_000, ord("Q"), 10)
        call("msync", ctypes.c_void_p(address), ctypes.c_size_t(100_000), 4)  # MS_SYNC
        del first  # or the mapping cannot be closed
    os.fsync(fd)
    assert os.fstat(fd).st_size == 100_000
    assert content(mnt / "f") == b"x" * 100_000
    documented("bytes beyond the end of file that", "may appear when the file grows")


def test_handles_are_good_while_the_kernel_knows_the_inode(mnt):
    create(mnt / "f", b"content")
    handle, mount_id = ctypes.create_string_buffer(140), ctypes.c_int()
    ctypes.memmove(handle, struct.pack("I", 128), 4)
    call("name_to_handle_at", -100, str(mnt / "f"), handle, ctypes.byref(mount_id), 0)
    top = os.open(mnt, os.O_RDONLY)

    def opened():
        again = call("open_by_handle_at", top, handle, os.O_RDONLY)
        assert os.read(again, 100) == b"content"
        os.close(again)

    opened()
    deadline = time.monotonic() + 5
    while not (code := errno_of(opened)):
        assert time.monotonic() < deadline
        Path("/proc/sys/vm/drop_caches").write_text("2\n")  # until the kernel has forgotten it
    assert code == errno.ESTALE
    os.close(top)
    documented("`open_by_handle_at`, export by NFS", "`ESTALE`")


def test_inotify_sees_only_this_mount(sides, mnt):
    other = sides.mount(which=1) / mnt.name
    assert wait_for(other)
    created, moved = 0x100, 0xC0
    watch = call("inotify_init1", os.O_NONBLOCK)
    call("inotify_add_watch", watch, str(mnt), created | moved)
    create(mnt / "here")
    assert b"here" in os.read(watch, 4096)
    create(other / "there")
    os.rename(other / "there", other / "elsewhere")
    assert wait_for(mnt / "elsewhere")
    with pytest.raises(BlockingIOError):
        os.read(watch, 4096)
    os.close(watch)
    sides.umount("posix", which=1)
    documented("leases, `inotify`, `fanotify`", "this mount only")


def test_swap_files(mnt):
    os.truncate(os.open(mnt / "swap", os.O_CREAT | os.O_RDWR), 1 << 20)
    answer = refuses(errno.EINVAL, call, "swapon", str(mnt / "swap"), 0)
    documented("`swapon`", answer)


def test_devices_and_set_id_programs_do_not_work_from_here(mnt):
    """nodev and nosuid, as FUSE mounts have them."""
    os.mknod(mnt / "null", 0o020666, os.makedev(1, 3))
    answer = refuses(errno.EACCES, os.open, mnt / "null", os.O_RDONLY)
    documented("opening a device", answer)
    flags = os.statvfs(mnt).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV


def test_birth_times(mnt):
    """statx has no birth time to show: the protocol of this binding does not carry one."""
    create(mnt / "f")
    shown = subprocess.run(
        ["stat", "-c", "%W", mnt / "f"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() in ("0", "-")
    documented("birth time (`statx`)", "not shown")


def lock(fd, kind):
    fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("hhqqi4x", kind, 0, 0, 0, 0))


def test_locks_work_between_processes_of_one_mount_and_not_between_mounts(sides, mnt):
    create(mnt / "f")
    other = sides.mount(which=1) / mnt.name
    here = os.open(mnt / "f", os.O_RDWR)
    fcntl.flock(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try_it = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "for fn in (fcntl.flock, fcntl.lockf):\n"
        "    try: fn(fd, fcntl.LOCK_EX | fcntl.LOCK_NB); print('got')\n"
        "    except BlockingIOError: print('busy')\n"
    )

    def tried(path):
        return subprocess.run(
            ["python3", "-c", try_it, path], capture_output=True, text=True, check=True
        ).stdout.split()

    assert tried(mnt / "f") == ["busy", "busy"]
    assert wait_for(other / "f")
    assert tried(other / "f") == ["got", "got"]
    documented("`flock`, `fcntl` locks", "this mount only")
    os.close(here)
    sides.umount("posix", which=1)


def wait_for(path, timeout=5):
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_leases_see_only_this_mount(mnt):
    create(mnt / "f")
    fd = os.open(mnt / "f", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    os.close(fd)
    documented("leases, `inotify`, `fanotify`", "this mount only")
