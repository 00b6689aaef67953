"""What a mount and its nodes keep in memory does not grow with the number of files they have seen."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from localcluster import LocalCluster, wait_until

from tests.mount.test_adapter import mount  # noqa: F401 - a fixture

pytestmark = pytest.mark.mount
MIB = 1 << 20
PRUNES = tuple(map(int, platform.release().split("-")[0].split(".")[:2])) >= (6, 18)

FILES = """
import os, sys
top, first, last, act = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
for n in range(first, last):
    name = f"{top}/f{n:06d}"
    if act == "make":
        with open(name, "xb") as f:
            f.write(b"%d" % n)
    elif act == "read":
        with open(name, "rb") as f:
            assert f.read() == b"%d" % n, name
    elif act == "remove":
        os.unlink(name)
"""


def files(top, first, last, act):
    """Make, read or remove files, in a process that may hang without us hanging."""
    command = [sys.executable, "-c", FILES, top, str(first), str(last), act]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def held(m):
    """(bytes, budget) of the table of a mount, and how many inodes the kernel was asked to forget."""
    return tuple(map(int, m.other("held").split()))


@pytest.mark.skipif(not PRUNES, reason="the kernel cannot be asked to forget before Linux 6.18")
def test_the_kernel_forgets_what_nobody_uses_and_nothing_else(mount):  # noqa: F811 - the fixture
    m = mount("few")
    sub = m.path / "sub"
    sub.mkdir()
    files(sub, 0, 1, "make")
    watcher = subprocess.Popen(
        ["sh", "-c", "exec 3< f000000; read line; pwd -P; readlink /proc/self/fd/3; cat <&3"],
        cwd=sub,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        files(m.path, 0, 800, "make")
        wait_until(lambda: held(m)[0] <= 1.2 * held(m)[1], 10, "the kernel forgets")
        assert held(m)[2] > 400
        # Who stands in a directory, or has a file open, notices nothing.
        said, _ = watcher.communicate("go\n", timeout=20)
        assert said.split() == [os.fspath(sub), os.fspath(sub / "f000000"), "0"]
    finally:
        watcher.kill()
        watcher.wait()
    files(m.path, 0, 800, "read")
    assert len(os.listdir(m.path)) == 801
    assert m.unmount() == 0


def test_a_kernel_that_cannot_be_asked_is_asked_once(mount):  # noqa: F811 - the fixture
    m = mount("few", "deaf")
    files(m.path, 0, 500, "make")
    assert held(m)[2] == 0
    files(m.path, 0, 500, "read")
    files(m.path, 0, 500, "remove")
    assert os.listdir(m.path) == []
    assert m.log.read_text().count("not asked to forget inodes any more") == 1
    assert m.unmount() == 0


def resident(pid):
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pids(cluster):
    """The processes of a cluster by name."""
    found = {p.stem: int(p.read_text()) for p in (cluster.dir / "run").glob("*.pid")}
    assert len(found) == 7, found
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_files_that_come_and_go(tmp_path):
    """Two dozen rounds of 2,500 files of 4 KiB: 15 checkpoints, and what fills fast has filled.

    A leak of a KiB for each file would be 22 MiB between the thirds that are compared.
    """
    cluster = LocalCluster(tmp_path).init().up()
    try:
        cluster.dfs("volume", "create", "soak")
        mnt = cluster.mount("soak", tmp_path / "mnt")
        sizes = []
        content = bytes(range(256)) * 16
        for n in range(24):
            top = mnt / f"d{n}"
            top.mkdir()
            for i in range(2500):
                (top / f"f{i}").write_bytes(content)
            assert all((top / name).read_bytes() == content for name in os.listdir(top))
            subprocess.run(["rm", "-r", top], check=True, timeout=120)
            sizes.append({name: resident(pid) for name, pid in pids(cluster).items()})
        for name in sizes[0]:
            middle = statistics.median(s[name] for s in sizes[8:16])
            late = statistics.median(s[name] for s in sizes[16:])
            assert late < middle + 20 * MIB, [s[name] // MIB for s in sizes]
            assert late < 300 * MIB, [s[name] // MIB for s in sizes]
    finally:
        cluster.destroy()


@pytest.mark.slow
def test_a_walk_of_many_files_costs_a_mount_little(tmp_path):
    """50,000 files: a twentieth of a million, and of the 500 MiB that a mount may take for those."""
    cluster = LocalCluster(tmp_path).init().up()
    try:
        cluster.dfs("volume", "create", "many")
        mnt = cluster.mount("many", tmp_path / "mnt")
        for n in range(50):
            top = mnt / f"d{n}"
            top.mkdir()
            files(top, 0, 1000, "make")
        # Half of what is in memory now is the journal since the last checkpoint: have one.
        (mnt / "large").mkdir()
        for n in range(5000):
            (mnt / "large" / f"f{n}").write_bytes(bytes(4096))
        deadline = time.monotonic() + 60
        while checkpoint(cluster) == 0:
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(1)
        cluster.umount(mnt)
        cluster.mount("many", mnt)
        (mount_pid,) = (pid for name, pid in pids(cluster).items() if name.startswith("mount"))
        before = resident(mount_pid)
        found = 0
        for top in mnt.iterdir():
            with os.scandir(top) as entries:
                for entry in entries:
                    assert entry.stat().st_size >= 1
                    found += 1
        assert found == 55_000
        took = resident(mount_pid) - before
        assert took < 64 * MIB, took // MIB  # of tree nodes, at most; and 270 bytes an inode
    finally:
        cluster.destroy()


def checkpoint(cluster):
    """The entry up to which the volume's tree holds everything."""
    return json.loads(cluster.dfs("volume", "info", "many", "--json").stdout)["checkpoint"]
