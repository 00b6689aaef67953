"""The process of a mount is killed: what was synced is there, and the volume is a prefix.

A power failure that takes only the mount: the cluster goes on, so whatever the kernel and the process
had and nobody else is lost.
"""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from localcluster import wait_gone

from tests.mount.differential import content, tree, umask

pytestmark = pytest.mark.mount
BIG = random.Random(1).randbytes(200_000)


class Killable:
    """A mount of a volume of its own, whose process can be killed and made again."""

    def __init__(self, cluster, volume, path):
        self.cluster, self.volume = cluster, volume
        cluster.dfs("volume", "create", volume)
        self.path = cluster.mount(volume, path)

    def kill(self):
        pid = int((self.cluster.dir / "run" / f"mount-{self.volume}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)

    def again(self):
        """Mount it again; returns what a check of the volume says."""
        subprocess.run(["umount", "-l", self.path], check=True)
        self.cluster.mount(self.volume, self.path)
        return self.cluster.dfs("fsck", self.volume).stdout


def killable(cluster, volume, path):
    k = Killable(cluster, volume, path)
    for n in range(30):  # enough for the mount to be given the delegation
        (k.path / f"warm{n}").write_bytes(b"x")
    return k


def sync_in_every_way(top):
    """Files and what must be in them; some are left open."""
    expected, left_open = {}, []

    def file(name, data, flags=0):
        fd = os.open(top / name, os.O_CREAT | os.O_RDWR | flags)
        left_open.append(fd)
        expected[name] = data
        return fd

    os.write(file("o_sync", BIG, os.O_SYNC), BIG)
    os.write(file("o_dsync", b"small", os.O_DSYNC), b"small")
    os.pwritev(file("rwf_dsync", b"one write"), [b"one write"], 0, os.RWF_DSYNC)
    direct = mmap.mmap(-1, 4096)
    direct.write(b"direct" * 600)
    os.pwritev(file("o_direct", direct[:], os.O_DIRECT | os.O_SYNC), [direct], 0)
    for name, sync in (("fsync", os.fsync), ("fdatasync", os.fdatasync)):
        fd = file(name, BIG)
        os.write(fd, BIG)
        sync(fd)
    fd = file("msync", bytes(5000) + b"mapped" + bytes(3186))
    os.ftruncate(fd, 8192)
    with mmap.mmap(fd, 8192) as m:
        m[5000:5006] = b"mapped"
        m.flush()
    fd = file("cut", BIG[:1000])
    os.write(fd, BIG)
    os.fsync(fd)
    os.ftruncate(fd, 1000)
    os.fsync(fd)
    (top / "closed").write_bytes(b"")
    os.rename(top / "warm0", top / "renamed")
    os.mkdir(top / "directory")
    os.symlink("target", top / "link")
    os.unlink(top / "warm1")
    sync_directory(top)
    return expected, left_open


def sync_directory(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


STEPS = """
import os, random, sys

def steps(top, seed):
    "Operations on what is below a directory, the same for a seed; yields whether it was a sync."
    rnd = random.Random(seed)
    files, n = [], 0
    for d in "abc":
        os.mkdir(f"{top}/{d}")
        yield False
    while True:
        n += 1
        what = rnd.choice(["create"] * 4 + ["rename", "rename", "unlink", "link", "append", "cut", "chmod",
                           "mkdir", "replace", "sync"])
        if what == "create" or len(files) < 8:
            name = f"{top}/{rnd.choice('abc')}/f{n}"
            with open(name, "wb") as f:
                f.write(rnd.randbytes(rnd.choice([0, 10, 3000, 5000, 150_000])))
            files.append(name)
        elif what == "mkdir":
            os.mkdir(f"{top}/{rnd.choice('abc')}/d{n}", 0o700)
        elif what == "sync":
            fd = os.open(rnd.choice(files), os.O_RDWR)
            os.fsync(fd)
            os.close(fd)
        else:
            at = rnd.randrange(len(files))
            name = files[at]
            if what == "rename":
                files[at] = f"{top}/{rnd.choice('abc')}/r{n}"
                os.rename(name, files[at])
            elif what == "unlink":
                os.unlink(files.pop(at))
            elif what == "link":
                files.append(f"{top}/{rnd.choice('abc')}/l{n}")
                os.link(name, files[-1])
            elif what == "append":
                with open(name, "ab") as f:
                    f.write(rnd.randbytes(rnd.choice([5, 40_000])))
            elif what == "cut":
                os.truncate(name, rnd.randrange(os.stat(name).st_size + 1))
            elif what == "chmod":
                os.chmod(name, rnd.choice([0o600, 0o640, 0o755]))
            elif what == "replace":
                other = files.pop(rnd.randrange(len(files)))
                if other == name or os.path.samefile(other, name):
                    files.append(other)
                else:
                    os.rename(other, name)
        yield what == "sync"

if __name__ == "__main__":
    os.umask(0o022)
    for synced in steps(sys.argv[1], int(sys.argv[2])):
        print(int(synced), flush=True)
"""


class Round:
    """Operations that were cut off by a kill: how many were done, and how many of them synced."""

    def __init__(self, killable, script, seed):
        self.seed = seed
        self.top = killable.path / f"round{seed}"
        self.top.mkdir()
        sync_directory(killable.path)
        with subprocess.Popen(
            [sys.executable, script, self.top, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as worker:
            time.sleep(random.Random(seed).uniform(0.1, 1.2))
            killable.kill()
            told = [line == b"1\n" for line in worker.stdout]
        self.done = len(told)
        self.synced = max((n for n, synced in enumerate(told, 1) if synced), default=0)

    def judge(self, reference):
        """What is left is a state of the volume not older than the last sync."""
        found = seen(self.top)
        module = {"__name__": "steps"}
        exec(STEPS, module)
        copy = reference / f"round{self.seed}"
        copy.mkdir()
        states = []
        steps = module["steps"](str(copy), self.seed)
        # The last one may have taken effect without having been told.
        with umask(0o022):
            for n in range(self.done + 2):
                if n >= self.synced:
                    states.append(seen(copy))
                next(steps)
        assert self.done > 10
        assert found in states, f"{self.done} done, {self.synced} of them synced"
        print(f"  {self.done} done, {self.synced} synced, {self.synced + states.index(found)} left")


def seen(top):
    home = os.getcwd()
    os.chdir(top)
    try:
        return tree()
    finally:
        os.chdir(home)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("crash") / "steps.py"
    path.write_text(STEPS)
    return path


@pytest.fixture(scope="module")
def crashed(shared_cluster, script, tmp_path_factory):
    """(mount, what was synced, operations) after one kill: it takes seconds until a dead mount is fenced."""
    k = killable(shared_cluster, "crash", tmp_path_factory.mktemp("mounts") / "crash")
    expected, left_open = sync_in_every_way(k.path)
    operations = Round(k, script, 0)
    for fd in left_open:
        with contextlib.suppress(OSError):  # ENOTCONN
            os.close(fd)
    said = k.again()
    return k.path, expected, operations, said


def test_what_was_synced_in_whatever_way_is_there(crashed):
    top, expected, _, said = crashed
    assert ": sound" in said
    for name, data in expected.items():
        assert content(top / name) == data, name
    assert content(top / "renamed") == b"x"
    assert not (top / "warm0").exists()
    assert not (top / "warm1").exists()
    assert (top / "directory").is_dir()
    assert os.readlink(top / "link") == "target"
    assert (top / "closed").exists()


def test_a_prefix_of_all_operations_is_left(crashed, tmp_path):
    """Names, attributes and content as they were after one of the operations since the last sync."""
    crashed[2].judge(tmp_path)


def test_numbers_of_entries_and_links_are_right_afterwards(crashed):
    """What `stat` says of directories is what is in them."""
    for where, directories, files in os.walk(crashed[0]):
        s = os.stat(where)
        assert s.st_nlink == 2 + len(directories)
        assert s.st_size == len(directories) + len(files)


@pytest.mark.slow
def test_a_prefix_is_left_many_times(shared_cluster, script, tmp_path):
    """`DFS_CRASH_ROUNDS` times."""
    k = killable(shared_cluster, "crashes", tmp_path / "mount")
    for seed in range(1, 1 + int(os.environ.get("DFS_CRASH_ROUNDS", "10"))):
        operations = Round(k, script, seed)
        assert ": sound" in k.again()
        operations.judge(tmp_path)
