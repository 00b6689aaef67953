"""Full disks under a mount: ENOSPC in time, nothing acknowledged lost, everything else goes on.

The chunk and metadata directories of three nodes lie on small tmpfs disks of their own, which a file
that is no business of dfs fills and leaves.
"""

import errno
import os
import random
import shutil
import subprocess
import time

import pytest
from localcluster import LocalCluster, wait_until

from tests.mount.differential import content, errno_of

pytestmark = pytest.mark.mount
MIB = 1 << 20
DISK = 400 * MIB
FLOOR = 256 * MIB  # what servers keep free of a small disk


class SmallDisks:
    """A cluster whose nodes have a tmpfs for their chunks and one for their metadata."""

    def __init__(self, base):
        self.cluster = LocalCluster(base)
        self.disks = {}

    def up(self):
        self.cluster.init()
        for node in self.cluster.nodes:
            for role in ("chunks", "metadata"):
                where = self.cluster.dir / node / role
                kept = where.with_suffix(".kept")
                where.rename(kept)
                where.mkdir()
                options = f"size={DISK},mode=0700"
                subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", options, "dfs-test", where], check=True
                )
                self.disks[node, role] = where
                shutil.copytree(kept, where, dirs_exist_ok=True)
        self.cluster.up()

    def fill(self, role, room, nodes=None):
        """Leave so many bytes free on the disks of a role."""
        for (node, which), where in self.disks.items():
            if which == role and node in (nodes or self.cluster.nodes):
                wait_until(lambda at=where: self._filled(at, room), 10, f"{where} is filled")

    def _filled(self, where, room):
        s = os.statvfs(where)
        fd = os.open(where / "ballast", os.O_CREAT | os.O_WRONLY)
        try:
            os.posix_fallocate(fd, 0, s.f_bavail * s.f_frsize - room)
        except OSError as e:
            if e.errno != errno.ENOSPC:  # the node took some since we looked
                raise
            return False
        finally:
            os.close(fd)
        return True

    def leave(self):
        """Take what was filled away."""
        for where in self.disks.values():
            (where / "ballast").unlink(missing_ok=True)

    def close(self):
        self.cluster.destroy()
        for where in self.disks.values():
            subprocess.run(["umount", "-l", where], check=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    s = SmallDisks(tmp_path_factory.mktemp("full"))
    try:
        s.up()
        yield s
    finally:
        s.close()


@pytest.fixture
def mounted(small, tmp_path, request):
    """A new volume and where it is mounted."""
    name = request.node.name.replace("test_", "")[:40]
    small.cluster.dfs("volume", "create", name)
    where = small.cluster.mount(name, tmp_path / "m")
    yield name, where
    small.leave()
    if os.path.ismount(where):
        small.cluster.umount(where)
    small.cluster.mounts.remove(where)


def remount(small, name, where):
    small.cluster.umount(where)
    small.cluster.mount(name, where)


def write_synced(path, data):
    """0 once the data is acknowledged as durable, else the first errno."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    except OSError as e:
        return e.errno
    try:
        at = 0
        while at < len(data):
            at += os.write(fd, data[at:])
        os.fsync(fd)
    except OSError as e:
        return e.errno
    finally:
        closed = errno_of(os.close, fd)
        assert closed in (0, errno.ENOSPC)
    return closed


def write_until_refused(where, size, seconds, rnd):
    """(what was acknowledged: name -> content, the errno that ended it)."""
    accepted = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path, data = where / f"f{len(accepted)}", rnd.randbytes(size)
        code = write_synced(path, data)
        if code:
            return accepted, code
        accepted[path] = data
    raise AssertionError(f"nothing was refused in {seconds} s, {len(accepted)} files")


def intact(accepted):
    return all(content(path) == data for path, data in accepted.items())


def synced(where):
    """0 once everything done in a directory is durable, else the errno."""
    fd = os.open(where, os.O_RDONLY)
    try:
        return errno_of(os.fsync, fd)
    finally:
        os.close(fd)


def works_again(where):
    wait_until(lambda: write_synced(where / "again", b"again" * 10_000) == 0, 10, "writing again")
    assert content(where / "again") == b"again" * 10_000


def test_chunk_disks_run_full(small, mounted, tmp_path):
    name, where = mounted
    small.fill("chunks", FLOOR + 8 * MIB)
    assert os.statvfs(where).f_bavail > 0
    accepted, code = write_until_refused(where, MIB, 60, random.Random(1))
    assert code == errno.ENOSPC
    assert 4 <= len(accepted) <= 8
    wait_until(lambda: os.statvfs(where).f_bavail == 0, 5, "df shows that it is full")
    began = time.monotonic()
    assert write_synced(where / "more", b"x" * MIB) == errno.ENOSPC
    assert intact(accepted)
    assert write_synced(where / "small", b"needs no chunkserver") == 0
    os.mkdir(where / "d")
    gone = list(accepted)[:2]
    for path in gone:
        os.unlink(path)
        del accepted[path]
    os.rename(where / "f3", where / "d" / "f3")
    accepted[where / "d" / "f3"] = accepted.pop(where / "f3")
    assert time.monotonic() - began < 10

    status = small.cluster.dfs("cluster", "status", check=False).stdout
    for node in small.cluster.nodes:
        assert f"{node} chunkserver {small.disks[node, 'chunks']}" in status
    assert "delete data or add capacity" in status
    (tmp_path / "big").write_bytes(random.Random(2).randbytes(8 * MIB))
    refused = small.cluster.refused("put", tmp_path / "big", f"{name}:/big")
    assert "no space left: 0 of 3 chunkservers have room and 2 must; disk full: node" in refused
    assert "delete data or add capacity (`dfs cluster status`)" in refused

    told = small.cluster.refused("umount", where)  # of what was refused before
    assert "is unmounted, but what was written there last is not in the cluster: write-back" in told
    small.cluster.mount(name, where)
    assert intact(accepted)
    assert content(where / "small") == b"needs no chunkserver"
    assert not any(path.exists() for path in gone)
    small.leave()
    works_again(where)
    assert intact(accepted)
    assert small.cluster.dfs("fsck", name).returncode == 0


def test_one_full_chunk_disk_is_no_reason_to_stop(small, mounted):
    _, where = mounted
    small.fill("chunks", FLOOR - MIB, ["node2"])
    wait_until(lambda: "disk full: node2" in small.cluster.dfs("cluster", "status").stdout, 10, "")
    for i in range(10):
        assert write_synced(where / f"f{i}", b"x" * MIB) == 0
    assert os.statvfs(where).f_bavail > 0


def test_metadata_disks_reach_their_limit(small, mounted):
    """What gives space back goes on with what is kept for it; nothing is added."""
    name, where = mounted
    rnd = random.Random(3)
    accepted = {where / f"before{i}": rnd.randbytes(3000) for i in range(10)}
    assert [write_synced(path, data) for path, data in accepted.items()] == [0] * 10
    small.fill("metadata", FLOOR - 1)
    more, code = write_until_refused(where, 3000, 30, rnd)
    assert code == errno.ENOSPC
    accepted |= more
    began = time.monotonic()
    assert errno_of(os.mkdir, where / "d") == errno.ENOSPC
    assert write_synced(where / "before0", b"over what is there") == errno.ENOSPC
    assert intact(accepted)
    path = where / "before0"
    os.rename(path, where / "renamed")
    accepted[where / "renamed"] = accepted.pop(path)
    os.chmod(where / "renamed", 0o600)
    gone = list(accepted)[: len(accepted) // 2]
    for path in gone:
        os.unlink(path)
        del accepted[path]
    assert synced(where) == 0
    assert os.statvfs(where).f_ffree == 0
    assert time.monotonic() - began < 10
    status = small.cluster.dfs("cluster", "status", check=False).stdout
    assert f"node1 metadata {small.disks['node1', 'metadata']}" in status

    remount(small, name, where)
    assert intact(accepted)
    assert not any(path.exists() for path in gone)
    wait_until(
        lambda: errno_of(os.mkdir, where / "d") == errno.ENOSPC or os.rmdir(where / "d"), 10, ""
    )
    small.leave()
    works_again(where)
    assert intact(accepted)
    assert small.cluster.dfs("fsck", name).returncode == 0


def test_metadata_disks_with_not_a_byte_left(small, mounted):
    """Somebody else took all of it: no answer is wrong, none takes for ever."""
    name, where = mounted
    assert write_synced(where / "before", b"before") == 0
    names = [f"f-{i}" for i in range(3000)]
    for old in names:
        (where / old).touch()
    small.fill("metadata", 0)
    accepted, code = write_until_refused(where, 3000, 60, random.Random(4))
    assert code == errno.ENOSPC
    assert content(where / "before") == b"before"

    # What needs no room is taken until the room that the journals have made ahead is used up.
    moved = {}
    for i, old in enumerate(names):
        new = f"{i:d}-" + "y" * 240
        os.rename(where / old, where / new)
        moved[new] = old
    for _ in range(2):
        began = time.monotonic()
        assert synced(where) == errno.ENOSPC
        assert time.monotonic() - began < 10  # resent until its deadline it would take 30
    assert set(os.listdir(where)) >= moved.keys()
    began = time.monotonic()
    for command in (("ls", f"{name}:/"), ("volume", "list")):  # no session can be opened
        assert "their disks have no room: node" in small.cluster.refused(*command)
    assert time.monotonic() - began < 10
    small.leave()
    wait_until(lambda: synced(where) == 0, 15, "the same is synced when there is room")
    works_again(where)
    remount(small, name, where)
    assert intact(accepted)
    assert set(os.listdir(where)) >= moved.keys()
    assert set(os.listdir(where)).isdisjoint(names)
    assert content(where / "before") == b"before"
    assert small.cluster.dfs("fsck", name).returncode == 0
