"""The real kernel on the in-memory cluster: what programs see of the FUSE adapter."""

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.mount.differential import call

pytestmark = pytest.mark.mount
HERE = Path(__file__).parent


class FakeMount:
    """A mount of the in-memory cluster in a process of its own; see `fakemount.py`."""

    def __init__(self, mountpoint, *flags):
        self.path = Path(mountpoint)
        self.log = self.path.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", HERE / "fakemount.py", self.path, *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
                text=True,
                bufsize=1,
            )
        assert self.line() == "ready"

    def line(self, timeout=20):
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, f"no answer; log:\n{self.log.read_text()}"
        return self.process.stdout.readline().strip()

    def other(self, *words):
        """Have the second client of the volume do something."""
        self.process.stdin.write(" ".join(words) + "\n")
        return self.line()

    def unmount(self):
        """As a user does; returns how many handles were left open."""
        subprocess.run(["umount", self.path], check=True, timeout=20)
        left = int(self.line().split()[-1])
        assert self.process.wait(20) == 0, self.log.read_text()
        return left

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        subprocess.run(["umount", "-l", self.path], check=False, capture_output=True, timeout=20)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()


@pytest.fixture
def mount(tmp_path):
    mounts = []

    def start(*flags):
        point = tmp_path / f"m{len(mounts)}"
        point.mkdir()
        mounts.append(FakeMount(point, *flags))
        return mounts[-1]

    yield start
    for m in mounts:
        m.close()


def sh(cwd, script, timeout=60):
    done = subprocess.run(
        ["bash", "-euc", script], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def raises(code, fn, *args):
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
        fn(*args)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[code]


def test_a_shell_session(mount):
    m = mount()
    out = sh(
        m.path,
        """
        echo hi > a; cat a; mkdir -p d/e; mv a d/e/b; ln -s d/e/b l; cat l; ln d/e/b hard
        stat -c %h hard; rm d/e/b; cat hard; ls -a | tr '\\n' ' '; ls -a d
        ( ! rmdir d 2>/dev/null ); rmdir d/e d
        seq 1 100000 > big; wc -l < big; md5sum < big; seq 1 100000 | md5sum
        cp big copy; cmp big copy; truncate -s 5 copy; cat copy; echo
        rm -r *; ls | wc -l
        """,
    )
    assert out[:3] == ["hi", "hi", "2"]
    assert out[3] == "hi"
    assert out[4:8] == [".", "..", "d", "hard"]
    assert out[8:12] == ["l", ".", "..", "e"]
    assert out[12] == "100000"
    assert out[13] == out[15]
    assert out[-1] == "0"
    assert m.unmount() == 0


def test_errors_are_those_of_linux(mount):
    m = mount()
    p = m.path
    (p / "d").mkdir()
    (p / "d" / "f").write_text("x")
    raises(errno.EEXIST, os.mkdir, p / "d")
    raises(errno.ENOTEMPTY, os.rmdir, p / "d")
    raises(errno.ENOTDIR, os.rmdir, p / "d" / "f")
    raises(errno.EISDIR, os.unlink, p / "d")
    raises(errno.ENOENT, os.unlink, p / "none")
    raises(errno.EINVAL, os.rename, p / "d", p / "d" / "in")
    raises(errno.ENAMETOOLONG, os.mkdir, p / ("x" * 256))
    raises(errno.EEXIST, os.open, p / "d" / "f", os.O_CREAT | os.O_EXCL)
    raises(errno.EPERM, os.link, p / "d", p / "e")
    raises(errno.ENOTDIR, os.stat, p / "d" / "f" / "g")
    raises(errno.ENOTSUP, os.setxattr, p / "d", "user.a", b"1")


def test_a_deleted_file_lives_until_it_is_closed(mount):
    m = mount()
    with (m.path / "f").open("w+b") as f:
        f.write(b"x" * 100_000)
        f.flush()
        (m.path / "f").unlink()
        f.seek(50_000)
        assert f.read() == b"x" * 50_000
        assert os.fstat(f.fileno()).st_nlink == 0
    assert list(m.path.iterdir()) == []
    assert m.unmount() == 0


def test_times_and_modes(mount):
    m = mount()
    f = m.path / "f"
    f.write_text("x")
    f.chmod(0o640)
    os.chown(f, 12, 34)
    os.utime(f, ns=(1_000_000_001, 2_000_000_002))
    s = f.stat()
    assert (s.st_mode & 0o7777, s.st_uid, s.st_gid) == (0o640, 12, 34)
    assert (s.st_atime_ns, s.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    f.chmod(0o6755)
    with f.open("r+") as opened:
        os.setresuid(-1, 65534, -1)
        try:
            opened.write("y")
            opened.flush()
        finally:
            os.setresuid(-1, 0, -1)
    assert f.stat().st_mode & 0o7777 == 0o755  # somebody else than root wrote
    os.utime(f)
    assert abs(f.stat().st_mtime - time.time()) < 5  # noqa: TID251 - the kernel's clock


def test_a_directory_of_many_entries(mount):
    m = mount()
    names = {f"name{n}" for n in range(500)}
    for name in names:
        (m.path / name).touch()
    assert {e.name for e in os.scandir(m.path)} == names
    found = set()
    with os.scandir(m.path) as entries:  # removing while listing
        for entry in entries:
            found.add(entry.name)
            Path(entry.path).unlink()
    assert found == names
    assert list(m.path.iterdir()) == []
    assert m.unmount() == 0


def test_another_client_is_seen(mount):
    m = mount()
    f = m.path / "f"
    f.write_text("old")
    assert f.read_text() == "old"
    assert m.other("read", "f") == "old"  # close here, open there
    for n in range(10):
        assert m.other("write", "f", "new" * (n + 1)) == "ok"
        assert f.read_text() == "new" * (n + 1)  # close there, open here: no waiting
    m.other("rename", "f", "g")
    deadline = time.monotonic() + 5
    while f.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (m.path / "g").read_text() == "new" * 10
    m.other("write", "h", "x")
    m.other("unlink", "g")
    deadline = time.monotonic() + 5
    while sorted(os.listdir(m.path)) != ["h"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_small_file_that_is_written_all_the_time_is_never_read_as_it_was_before(mount):
    """What is pushed to the kernel at an open is not older than what the kernel has.

    A read beside a write may see the start of one content and the rest of the next: Linux copies
    into and out of a cached page without a lock (ext4 and tmpfs do the same). Nothing else.
    """
    m = mount()
    paths = [m.path / f"f{i}" for i in range(4)]
    done = dict.fromkeys(paths, 0)
    stop, wrong, reads = threading.Event(), [], []

    def body(n):
        return b"%08d" % n * 375  # numbers of eight bytes: no copy stops within one

    def write(path):
        n = 0
        while not stop.is_set():
            n += 1
            fd = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.pwrite(fd, body(n), 0)
            os.close(fd)
            done[path] = n

    def read():
        while not stop.is_set():
            for path in paths:
                least = done[path]
                with path.open("rb", buffering=0) as f:
                    content = f.read(8192)
                most = done[path] + 1  # this one may be under way
                reads.append(path)
                seen = {int(content[i : i + 8]) for i in range(0, len(content), 8)}
                if len(content) != 3000 or min(seen) < least or max(seen) > most:
                    wrong.append((path, least, len(content), sorted(seen)))
            if len(reads) % 40 == 0:  # the kernel forgets pages and inodes: they are pushed again
                Path("/proc/sys/vm/drop_caches").write_text("3\n")

    for path in paths:
        path.write_bytes(body(0))
    threads = [threading.Thread(target=write, args=(path,)) for path in paths[:3]]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert wrong == []
    assert len(reads) > 100
    for path in paths:
        assert m.other("read", path.name) == body(done[path]).decode()
        assert path.read_bytes() == body(done[path])


def test_a_file_replaced_elsewhere_is_found_by_its_name(mount):
    m = mount()
    (m.path / "f").write_text("one")
    m.other("write", "tmp", "two")
    m.other("rename", "tmp", "f")
    assert (m.path / "f").read_text() == "two"  # ESTALE makes the kernel look again


def test_a_write_error_comes_at_fsync_and_the_data_can_still_be_saved(mount):
    m = mount()
    with (m.path / "f").open("wb", buffering=0) as f:
        m.other("break")
        f.write(b"x" * 50_000)
        raises(errno.EIO, os.fsync, f.fileno())
        m.other("mend")
        os.fsync(f.fileno())
    assert (m.path / "f").read_bytes() == b"x" * 50_000


def test_an_error_of_write_behind_is_told_once_by_what_comes_next(mount):
    m = mount()
    size = 50_000
    fds = {
        how: os.open(m.path / how, os.O_CREAT | os.O_RDWR) for how in ("write", "fsync", "close")
    }
    m.other("break")
    for fd in fds.values():
        os.write(fd, b"x" * size)
    time.sleep(2)  # it was tried a second after the write
    raises(errno.EIO, os.write, fds["write"], b"not taken")
    raises(errno.EIO, os.fsync, fds["fsync"])
    raises(errno.EIO, os.close, fds["close"])
    m.other("mend")
    fds["close"] = os.open(m.path / "close", os.O_RDWR)
    for how, fd in fds.items():
        os.fsync(fd)
        os.close(fd)
        assert (m.path / how).read_bytes() == b"x" * size


def test_syncfs_does_not_wait_for_the_mount_and_fsync_does(mount):
    """The kernel tells file systems like this one nothing of it; `fuse/README.md` says so."""
    m = mount()
    with (m.path / "f").open("wb", buffering=0) as f:
        m.other("break")
        f.write(b"x" * 50_000)
        call("syncfs", f.fileno())
        raises(errno.EIO, os.fsync, f.fileno())
        m.other("mend")
        os.fsync(f.fileno())
    readme = (HERE.parents[1] / "fuse" / "README.md").read_text()
    assert any(line.startswith("| `sync`, `syncfs` |") for line in readme.splitlines())


def test_without_a_quorum_calls_end_with_eio_and_work_again_later(mount):
    m = mount()
    (m.path / "f").write_text("x")
    m.other("cut")
    time.sleep(2.5)
    began = time.monotonic()
    raises(errno.EIO, os.mkdir, m.path / "d")
    raises(errno.EIO, os.listdir, m.path)
    assert time.monotonic() - began < 15
    m.other("join")
    deadline = time.monotonic() + 10
    while True:
        try:
            (m.path / "d").mkdir(exist_ok=True)
            break
        except OSError:
            assert time.monotonic() < deadline
    assert sorted(os.listdir(m.path)) == ["d", "f"]


def test_a_bug_in_a_handler_is_eio_and_the_mount_goes_on(mount):
    m = mount()
    os.symlink("target", m.path / "l")
    m.other("boom")
    raises(errno.EIO, os.readlink, m.path / "l")
    (m.path / "f").write_text("still here")
    assert "Traceback" in m.log.read_text()


def test_quota_and_statfs(mount):
    m = mount("quota")
    stats = os.statvfs(m.path)
    assert stats.f_blocks * stats.f_frsize == 1 << 20
    with (m.path / "f").open("wb", buffering=0) as f:
        assert f.write(bytes(2 << 20)) == 1 << 20  # the first part of it was taken
        raises(errno.EDQUOT, f.write, b"x")
        os.fsync(f.fileno())
        assert os.fstat(f.fileno()).st_size == 1 << 20
        f.truncate(0)
    (m.path / "f").write_bytes(bytes(100_000))
    stats = os.statvfs(m.path)
    assert (1 << 20) - stats.f_bfree * stats.f_frsize == pytest.approx(100_000, abs=8192)


def test_extended_attributes_on_request(mount):
    m = mount("xattrs")
    f = m.path / "f"
    f.touch()
    os.setxattr(f, "user.a", b"1")
    assert os.getxattr(f, "user.a") == b"1"
    assert os.listxattr(f) == ["user.a"]
    os.removexattr(f, "user.a")
    raises(errno.ENODATA, os.getxattr, f, "user.a")


def test_sigterm_commits_what_is_written_and_unmounts(mount):
    m = mount()
    fd = os.open(m.path / "f", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x" * 10_000)
    m.process.send_signal(signal.SIGTERM)
    assert m.line() == "saved 10000 open 1"
    raises(errno.ENOTCONN, os.close, fd)
    assert m.process.wait(20) == 0
    assert not os.path.ismount(m.path)


def test_writers_in_parallel(mount):
    m = mount()
    failures = []

    def write(n):
        try:
            for i in range(20):
                f = m.path / f"{n}_{i}"
                f.write_bytes(bytes([n]) * (i * 5000))
                assert f.read_bytes() == bytes([n]) * (i * 5000)
        except (OSError, AssertionError) as e:
            failures.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert len(os.listdir(m.path)) == 160
    assert m.unmount() == 0


def test_the_read_ahead_of_the_kernel_is_raised(mount):
    m = mount()
    minor = os.minor(os.stat(m.path).st_dev)
    assert Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").read_text().strip() == "1024"
