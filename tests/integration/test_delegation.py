"""The delegation of a volume between real mounts: recalled, stopped, killed, cut off."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from localcluster import wait_until

pytestmark = pytest.mark.mount


def mount_pid(mnt):
    """Process that serves a mount."""
    want = os.fsencode(str(mnt))
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as f:
                    args = f.read().split(b"\0")
            except OSError:
                continue
            if b"fuse" in args and want in args:
                return int(entry)
    raise AssertionError(f"nobody serves {mnt}")


def work(mnt, name, count=12):
    """Enough operations for the mount to ask for the delegation."""
    for i in range(count):
        (mnt / f"{name}{i}").write_text(name)


def fsynced(path, data):
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, data)
    os.fsync(fd)
    os.close(fd)


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o644)
os.fsync(fd)
os.write(fd, b"not synced")
print("written", flush=True)
sys.stdin.readline()
for _ in range(2):
    try:
        os.fsync(fd)
        print(0)
    except OSError as e:
        print(e.errno)
"""


def log_of(cluster, volume):
    return "".join(p.read_text() for p in (cluster.dir / "log").glob(f"mount-{volume}*"))


def test_two_mounts_take_turns(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    one, two = cluster.mount("v", tmp_path / "one"), cluster.mount("v", tmp_path / "two")
    for turn in range(3):
        work(one, f"a{turn}-")
        (one / "shared").write_text(f"one {turn}")
        assert (two / "shared").read_text() == f"one {turn}"  # close-to-open
        assert {f"a{turn}-{i}" for i in range(12)} <= set(os.listdir(two))
        (two / "shared").write_text(f"two {turn}")
        assert (one / "shared").read_text() == f"two {turn}"
        with pytest.raises(FileExistsError):
            os.open(one / "shared", os.O_CREAT | os.O_EXCL)


def test_a_stopped_holder_is_fenced(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    one = cluster.mount("v", tmp_path / "one")
    work(one, "a")
    wait_until(lambda: "delegated to us" in log_of(cluster, "v"), what="the delegation")
    fsynced(one / "kept", b"kept")
    writer = subprocess.Popen(  # by itself: whoever forks would close, and so wait for the mount
        [sys.executable, "-c", WRITER, one / "held"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "written\n"
    pid = mount_pid(one)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert cluster.dfs("--timeout", "40", "ls", "v:/", timeout=60).stdout
        two = cluster.mount("v", tmp_path / "two")
        (two / "held").write_text("the other's")
        waited = time.monotonic() - began
        print(f"  a stopped holder is waited for {waited:.1f} s")
        assert 10 < waited < 40
        assert (two / "kept").read_bytes() == b"kept"
    finally:
        os.kill(pid, signal.SIGCONT)
    out, _ = writer.communicate("go on\n", timeout=60)
    assert out.split() == [str(errno.EIO), "0"]  # told once
    wait_until(lambda: (one / "held").read_text() == "the other's", what="the newer state")
    assert (two / "held").read_text() == "the other's"
    work(one, "again")
    names = {f"again{i}" for i in range(12)}
    wait_until(lambda: names <= set(os.listdir(two)), timeout=5, what="the names elsewhere")
    cluster.umount(two)
    cluster.mounts.remove(two)
    cluster.umount(one)
    cluster.mounts.remove(one)
    assert ": sound" in cluster.dfs("fsck", "v").stdout


def test_a_killed_holder_is_replaced(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    one = cluster.mount("v", tmp_path / "one")
    work(one, "a")
    wait_until(lambda: "delegated to us" in log_of(cluster, "v"), what="the delegation")
    fsynced(one / "kept", b"kept")
    os.kill(mount_pid(one), signal.SIGKILL)
    two = cluster.mount("v", tmp_path / "two")
    assert (two / "kept").read_bytes() == b"kept"
    assert {f"a{i}" for i in range(12)} <= set(os.listdir(two))
    work(two, "b")


def test_the_owner_dies_under_a_holder(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    one = cluster.mount("v", tmp_path / "one")
    work(one, "a")
    wait_until(lambda: "delegated to us" in log_of(cluster, "v"), what="the delegation")
    for victim in ("node1", "node2", "node3"):
        for i in range(100):
            (one / f"{victim}-{i}").write_text(str(i))
        cluster.kill(victim)
        fsynced(one / f"{victim}-synced", victim.encode())
        cluster.up(victim)
    names = set(os.listdir(one))
    cluster.umount(one)
    cluster.mounts.remove(one)
    two = cluster.mount("v", tmp_path / "two")
    assert set(os.listdir(two)) == names
    assert all(
        (two / f"{v}-{i}").read_text() == str(i) for v in ("node1", "node3") for i in (0, 99)
    )
