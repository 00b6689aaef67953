"""Quotas through the mount: EDQUOT from the call that adds too much, the quota in `df`."""

import errno
import json
import os
import subprocess
import time

import pytest

from tests.mount.differential import content, create, errno_of

pytestmark = pytest.mark.mount
MIB = 1 << 20


@pytest.fixture
def limited(sides):
    """`limited(NAME, *options)`: a new volume made with these options of the command line."""
    made = []

    def make(name, *options):
        sides.cluster.dfs("volume", "create", *options, name)
        where = sides.cluster.mount(name, sides.base / f"quota-{name}")
        made.append(where)
        return where

    yield make
    for where in made:
        sides.cluster.umount(where)
        sides.cluster.mounts.remove(where)


def info(sides, name):
    return json.loads(sides.cluster.dfs("volume", "info", "--json", name).stdout)


def test_a_write_is_refused_before_it_is_acknowledged(sides, limited):
    """write(2) says EDQUOT; whatever it took is there after fsync, which never says it."""
    m = limited("q1", "--quota-bytes", "4MiB")
    s = os.statvfs(m)
    assert s.f_blocks * s.f_frsize == 4 * MIB
    fd = os.open(m / "f", os.O_CREAT | os.O_RDWR)
    taken = 0
    while not (code := errno_of(os.write, fd, bytes([taken >> 16]) * (1 << 16))):
        taken += 1 << 16
        assert taken <= 4 * MIB
    assert (code, taken) == (errno.EDQUOT, 4 * MIB)
    assert os.statvfs(m).f_bavail == 0
    assert errno_of(os.write, fd, b"x") == errno.EDQUOT
    assert os.pwrite(fd, b"over what is there", 100) == 18
    os.fsync(fd)
    assert errno_of(os.ftruncate, fd, 4 * MIB + 1) == errno.EDQUOT
    assert errno_of(create, m / "g", b"x") == errno.EDQUOT
    os.close(fd)
    want = b"".join(bytes([i]) * (1 << 16) for i in range(64))
    want = want[:100] + b"over what is there" + want[118:]
    assert content(m / "f") == want
    df = subprocess.run(
        ["df", "--output=size,used,avail", "-B1", m], capture_output=True, text=True, check=True
    )
    assert df.stdout.split()[-3:] == [str(4 * MIB), str(4 * MIB), "0"]


def test_deleting_cutting_and_raising_make_room(sides, limited):
    m = limited("q2", "--quota-bytes", "1MiB")
    create(m / "a", bytes(700_000))
    create(m / "b", bytes(300_000))
    assert errno_of(create, m / "no", bytes(100_000)) == errno.EDQUOT
    os.unlink(m / "b")
    create(m / "c", bytes(100_000))
    os.truncate(m / "a", 100_000)
    create(m / "d", bytes(700_000))
    assert errno_of(create, m / "neither", bytes(300_000)) == errno.EDQUOT
    sides.cluster.dfs("volume", "set", "--quota-bytes", "2M", "q2")
    deadline = time.monotonic() + 5
    while errno_of((m / "e").write_bytes, bytes(300_000)):
        assert time.monotonic() < deadline, "the mount has not heard of the new quota"
    assert os.statvfs(m).f_blocks * 4096 == 2 * MIB
    found = info(sides, "q2")
    assert (found["bytes"], found["quota_bytes"], found["quota_files"]) == (
        1_200_000,
        2 * MIB,
        None,
    )
    sides.cluster.dfs("volume", "set", "--quota-bytes", "none", "q2")
    deadline = time.monotonic() + 5
    while errno_of((m / "g").write_bytes, bytes(3 * MIB)):
        assert time.monotonic() < deadline, "the mount has not heard that there is no quota"


def test_holes_count_by_size(limited):
    m = limited("q3", "--quota-bytes", "1MiB")
    fd = os.open(m / "f", os.O_CREAT | os.O_RDWR)
    assert errno_of(os.pwrite, fd, b"end", MIB) == errno.EDQUOT
    assert os.pwrite(fd, b"end", MIB - 3) == 3
    os.close(fd)
    assert os.statvfs(m).f_bavail == 0


def test_files_are_counted(sides, limited):
    m = limited("q4", "--quota-files", "11")
    for i in range(5):
        os.mkdir(m / f"d{i}")
        create(m / f"d{i}" / "f", b"x")
    s = os.statvfs(m)
    assert (s.f_files, s.f_ffree) == (11, 0)
    assert errno_of(os.mkdir, m / "more") == errno.EDQUOT
    assert errno_of(os.symlink, "x", m / "more") == errno.EDQUOT
    assert errno_of(create, m / "more", b"") == errno.EDQUOT
    os.link(m / "d0" / "f", m / "link")  # no new inode
    os.rename(m / "d0" / "f", m / "d1" / "f")
    create(m / "more", b"x")
    assert errno_of(os.mkdir, m / "even more") == errno.EDQUOT


def test_two_mounts_keep_to_one_quota(sides, limited):
    """They may exceed it by what both had accepted; nothing of that is lost, nothing more comes."""
    m = limited("q5", "--quota-bytes", "1MiB")
    other = sides.cluster.mount("q5", sides.base / "quota-q5-other")
    try:
        fds = [os.open(x / name, os.O_CREAT | os.O_WRONLY) for x, name in ((m, "a"), (other, "b"))]
        accepted = [0, 0]
        for _ in range(40):
            for i, fd in enumerate(fds):
                if not errno_of(os.write, fd, bytes([i]) * (1 << 16)):
                    accepted[i] += 1 << 16
        for fd in fds:
            os.fsync(fd)
            os.close(fd)
        assert MIB <= sum(accepted) <= 2 * MIB
        assert content(other / "a") == bytes(accepted[0])
        assert content(m / "b") == b"\1" * accepted[1]
        for x, name in ((m, "more"), (other, "even more")):
            assert errno_of(create, x / name, b"x") == errno.EDQUOT
    finally:
        sides.cluster.umount(other)
        sides.cluster.mounts.remove(other)


def test_on_an_exclusive_mount_fsync_tells(sides):
    """There the kernel accepts writes before they come here; what it cannot write is not kept."""
    sides.cluster.dfs("volume", "create", "--quota-bytes", "1MiB", "q7")
    m = sides.cluster.mount("q7", sides.base / "quota-q7", "--exclusive")
    try:
        create(m / "fits", bytes(500_000))
        fd = os.open(m / "f", os.O_CREAT | os.O_WRONLY)
        os.write(fd, bytes(MIB))
        assert errno_of(os.fsync, fd) == errno.EDQUOT
        os.close(fd)
        os.unlink(m / "f")
        create(m / "again", bytes(500_000))
        assert content(m / "fits") == content(m / "again") == bytes(500_000)
    finally:
        sides.cluster.umount(m)
        sides.cluster.mounts.remove(m)


def test_the_command_line_explains(sides):
    bad = sides.cluster.dfs("volume", "create", "--quota-bytes", "lots", "q6", check=False)
    assert (bad.returncode, "500M or 10GiB" in bad.stderr) == (2, True)
    assert sides.cluster.dfs("volume", "set", "q6", check=False).returncode == 2
    sides.cluster.dfs("volume", "create", "--quota-bytes", "1000", "--quota-files", "5", "q6")
    shown = sides.cluster.dfs("volume", "info", "q6").stdout
    assert "1000 B" in shown
    assert "5 inodes" in shown
    big = sides.base / "big"
    big.write_bytes(bytes(2000))
    refused = sides.cluster.refused("put", big, "q6:/big")
    assert "quota" in refused.lower()
    assert "dfs volume set" in refused
