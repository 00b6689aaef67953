"""Real programs on a real mount of a real three-node cluster."""

import hashlib
import os
import random
import re
import sqlite3
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def mnt(shared_cluster, tmp_path_factory):
    shared_cluster.dfs("volume", "create", "programs")
    yield shared_cluster.mount("programs", tmp_path_factory.mktemp("mnt") / "m")
    for m in shared_cluster.mounts:
        shared_cluster.umount(m)


def sh(*cmd, cwd=None, **env):
    done = subprocess.run(
        [str(c) for c in cmd],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{cmd}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


GIT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
}


def tree(root, files=120, seed=1):
    """A small source tree with sizes on both sides of every limit."""
    rnd = random.Random(seed)
    sizes = [0, 1, 100, 4095, 4096, 4097, 20_000, 65_536, 65_537, 300_000]
    for i in range(files):
        d = root / f"d{i % 7}" / f"e{i % 3}"
        d.mkdir(parents=True, exist_ok=True)
        (d / f"f{i}").write_bytes(rnd.randbytes(sizes[i % len(sizes)]))
    (root / "d0" / "link").symlink_to("e0/f0")
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o755)
    return root


def digests(root):
    out = {}
    for d, dirs, names in os.walk(root):
        dirs.sort()
        for n in names:
            p = os.path.join(d, n)
            key = os.path.relpath(p, root)
            if os.path.islink(p):
                out[key] = os.readlink(p)
            else:
                out[key] = hashlib.sha256(Path(p).read_bytes()).hexdigest()
    return out


def test_git_clone_with_history_and_fsck(mnt, tmp_path):
    origin = tree(tmp_path / "origin", 40)
    sh("git", "init", "-q", origin, **GIT)
    for i in range(5):
        (origin / f"new{i}").write_text(f"revision {i}\n")
        sh("git", "add", "-A", cwd=origin, **GIT)
        sh("git", "commit", "-qm", f"change {i}", cwd=origin, **GIT)
    sh("git", "clone", "-q", origin, mnt / "clone", **GIT)
    sh("git", "fsck", "--full", "--strict", cwd=mnt / "clone", **GIT)
    assert sh("git", "log", "--oneline", cwd=mnt / "clone", **GIT).count("\n") == 5
    assert sh("git", "status", "--porcelain", cwd=mnt / "clone", **GIT) == ""
    (mnt / "clone" / "new0").write_text("changed on the mount\n")
    sh("git", "commit", "-qam", "on the mount", cwd=mnt / "clone", **GIT)
    sh("git", "gc", "-q", cwd=mnt / "clone", **GIT)
    sh("git", "fsck", "--full", "--strict", cwd=mnt / "clone", **GIT)


def test_tar_and_diff(mnt, tmp_path):
    src = tree(tmp_path / "src")
    sh("tar", "-cf", tmp_path / "a.tar", "-C", tmp_path, "src")
    (mnt / "tar").mkdir()
    sh("tar", "-xf", tmp_path / "a.tar", "-C", mnt / "tar")
    sh("diff", "-r", src, mnt / "tar" / "src")
    assert digests(src) == digests(mnt / "tar" / "src")
    assert os.stat(mnt / "tar" / "src" / "run").st_mode & 0o777 == 0o755
    for p in ("run", "d0/e0/f0"):
        assert (
            os.stat(mnt / "tar" / "src" / p).st_mtime_ns // 10**9
            == os.stat(src / p).st_mtime_ns // 10**9
        )


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_sqlite_transactions_and_integrity(mnt, mode):
    path = mnt / f"db-{mode}.sqlite"
    with sqlite3.connect(path, isolation_level=None) as c:
        assert c.execute(f"PRAGMA journal_mode={mode}").fetchone()[0].upper() == mode
        c.execute("PRAGMA synchronous=FULL")
        c.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT)")
        for i in range(60):
            c.execute("INSERT INTO t(v) VALUES(?)", (f"value {i} " * 40,))
        c.execute("BEGIN")
        c.execute("DELETE FROM t")
        c.execute("ROLLBACK")
        c.execute("UPDATE t SET v = v || 'x' WHERE id % 3 = 0")
        assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    c.close()
    again = sqlite3.connect(path)
    assert again.execute("SELECT count(*) FROM t").fetchone() == (60,)
    assert again.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    again.close()


def test_rsync_twice_moves_nothing_the_second_time(mnt, tmp_path):
    src = tree(tmp_path / "rs")
    sh("rsync", "-a", f"{src}/", mnt / "rs")
    assert digests(src) == digests(mnt / "rs")
    second = sh("rsync", "-a", "--itemize-changes", "--stats", f"{src}/", mnt / "rs")
    assert "Number of regular files transferred: 0" in second
    changed = [line for line in second.splitlines() if re.match(r"[<>ch.][fdLDS]\S{9} ", line)]
    assert changed == []


def test_find_and_du(mnt, tmp_path):
    src = tree(tmp_path / "fd", 50)
    sh("cp", "-r", src, mnt / "fd")
    theirs = sorted(sh("find", ".", "-printf", "%P %y %m\\n", cwd=src).splitlines())
    assert sorted(sh("find", ".", "-printf", "%P %y %m\\n", cwd=mnt / "fd").splitlines()) == theirs
    assert int(sh("du", "-sb", "--apparent-size", mnt / "fd").split()[0]) > 0
    want = sum(os.path.getsize(p) for p in src.rglob("*") if p.is_file() and not p.is_symlink())
    got = sum(
        os.path.getsize(p) for p in (mnt / "fd").rglob("*") if p.is_file() and not p.is_symlink()
    )
    assert got == want


def test_editor_saves_by_rename(mnt):
    target = mnt / "notes.txt"
    target.write_text("first\n")
    for i in range(5):
        tmp = mnt / ".notes.txt.swp"
        with open(tmp, "w") as f:
            f.write(f"version {i}\n")
            f.flush()
            os.fsync(f.fileno())
        os.rename(tmp, target)
        d = os.open(mnt, os.O_RDONLY)
        os.fsync(d)
        os.close(d)
        assert target.read_text() == f"version {i}\n"
    os.rename(target, mnt / "notes.txt~")
    target.write_text("new\n")
    assert (mnt / "notes.txt~").read_text() == "version 4\n"
    assert target.read_text() == "new\n"


def test_large_file_random_access(mnt):
    rnd = random.Random(5)
    size = 24 << 20
    data = bytearray(rnd.randbytes(size))
    path = mnt / "large"
    path.write_bytes(data)
    with open(path, "r+b") as f:
        for _ in range(40):
            off, n = rnd.randrange(size), rnd.randrange(1, 200_000)
            piece = rnd.randbytes(min(n, size - off))
            data[off : off + len(piece)] = piece
            f.seek(off)
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
        for _ in range(40):
            off, n = rnd.randrange(size), rnd.randrange(1, 300_000)
            f.seek(off)
            assert f.read(n) == data[off : off + n]
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
    os.truncate(path, 1_000_003)
    assert path.read_bytes() == data[:1_000_003]
    os.truncate(path, 5_000_000)
    assert path.read_bytes() == data[:1_000_003] + bytes(5_000_000 - 1_000_003)


def test_a_second_mount_sees_what_the_first_wrote(shared_cluster, mnt, tmp_path):
    other = shared_cluster.mount("programs", tmp_path / "second")
    try:
        (mnt / "seen").write_text("by the other\n")
        assert (other / "seen").read_text() == "by the other\n"
        (other / "seen").write_text("changed there\n")
        os.rename(other / "seen", other / "seen2")
        assert (mnt / "seen2").read_text() == "changed there\n"
        with pytest.raises(FileExistsError):
            os.close(os.open(mnt / "seen2", os.O_CREAT | os.O_EXCL))
    finally:
        shared_cluster.umount(other)
        shared_cluster.mounts.remove(other)


def test_everything_is_there_after_a_remount(shared_cluster, mnt, tmp_path):
    src = tree(tmp_path / "rm", 60, seed=9)
    sh("cp", "-r", src, mnt / "rm")
    shared_cluster.umount(mnt)
    shared_cluster.mount("programs", mnt)
    assert digests(src) == digests(mnt / "rm")
    report = shared_cluster.dfs("fsck", "programs")
    assert report.returncode == 0
