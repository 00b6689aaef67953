"""What file systems are commonly judged by, on real mounts: fio, stress-ng, dbench, sqlite, git, ...

After each the volume is sound, its mount has said nothing bad and is no larger than it may be.
Everything takes minutes and is run with --slow; a little of each is run always.
"""

import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.mount

SHARED, EXCLUSIVE = ("suites",), ("suites-x", "--exclusive")
EVERYTHING = ("suites-a", "--xattrs", "--acls", "--relatime")
MEMORY = 512 << 10  # KiB of a mount: its caches and what may be dirty at most, and some more

_numbers = itertools.count()


class Place:
    """A fresh directory on a mount, and its mount."""

    def __init__(self, sides, volume, *options):
        self.cluster = sides.cluster
        self.volume = volume
        self.options = options
        self.mount = sides.mount(volume, *options)
        self.path = self.mount / f"p{next(_numbers)}"
        self.path.mkdir()
        self.log = self.cluster.dir / "log" / f"mount-{volume}.log"
        self._said = self.log.stat().st_size

    @property
    def pid(self):
        return int((self.cluster.dir / "run" / f"mount-{self.volume}.pid").read_text())

    def memory(self):
        """Resident KiB of the mount's process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def check(self):
        """The mount and the volume are as they should be after whatever was run."""
        shutil.rmtree(self.path)
        with self.log.open() as log:
            log.seek(self._said)
            bad = [line for line in log if re.search(r"Traceback|ERROR|WARNING", line)]
        assert bad == []
        assert self.memory() < MEMORY
        assert "sound" in self.cluster.dfs("fsck", self.volume).stdout


def _kind(options):
    return "exclusive" if options == EXCLUSIVE else "shared" if options == SHARED else "everything"


@pytest.fixture(params=[SHARED, EXCLUSIVE], ids=_kind)
def place(request, sides):
    p = Place(sides, *request.param)
    yield p
    p.check()


def run(*command, cwd, timeout=300, **env):
    """What a program said; it has to be there, and to succeed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


# ------------------------------------------------------------------------------------------ fio


def fio(place, tmp_path, *options):
    """Jobs of fio that read again what they wrote and compare it with its checksums."""
    verify = ("--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
    said = run(
        "fio", "--name=v", f"--directory={place.path}", *verify, "--group_reporting", *options,
        cwd=tmp_path,
    )  # fmt: skip
    assert "err= 0" in said
    assert "verify:" not in said


def test_random_writes_are_read_back(place, tmp_path):
    common = ("--rw=randwrite", "--size=2m", "--numjobs=2", "--randseed=7")
    fio(place, tmp_path, *common, "--bs=4k", "--ioengine=psync", "--fsync=32")
    fio(place, tmp_path, *common, "--bsrange=1k-70000", "--bs_unaligned=1", "--ioengine=mmap")


FIO = {
    "random": "--rw=randwrite --bs=4k --ioengine=psync --fsync=64",
    "in order": "--rw=write --bs=64k --ioengine=psync --end_fsync=1",
    "both": "--rw=randrw --bs=4k --ioengine=psync --fsync=64",
    "many sizes": "--rw=randwrite --bsrange=512-128k --ioengine=psync --fsync=16",
    "no alignment": "--rw=randwrite --bs_unaligned=1 --bsrange=1k-70000 --ioengine=sync --size=16m",
    "mmap": "--rw=randwrite --bs=4k --ioengine=mmap --size=16m",
    "mmap in order": "--rw=write --bs=16k --ioengine=mmap --size=16m --fsync=32",
    "six jobs": "--rw=randwrite --bs=8k --numjobs=6 --size=8m --ioengine=psync --fdatasync=32",
    "one file": "--rw=randwrite --bs=4k --filename=one --offset_increment=16m --size=16m "
    "--ioengine=psync --fsync=64",
    "direct": "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 --size=8m",
    "O_SYNC": "--rw=randwrite --bs=4k --ioengine=psync --sync=1 --size=2m",
    "read at once": "--rw=randwrite --bs=4k --ioengine=psync --verify_backlog=128 --size=8m",
}


@pytest.mark.slow
@pytest.mark.parametrize("options", FIO.values(), ids=FIO)
def test_fio(place, tmp_path, options):
    fio(place, tmp_path, "--size=32m", "--numjobs=2", "--randseed=7", *options.split())


# ------------------------------------------------------------------------------------ stress-ng


def stress(place, tmp_path, seconds, *stressors):
    said = run(
        "stress-ng", *stressors, "--timeout", f"{seconds}s", "--verify", "--oomable",
        "--temp-path", place.path, cwd=tmp_path,
    )  # fmt: skip
    assert re.findall(r"(?:fail|error): .*", said) == []


# The quick ones; each runs beside the others.
FEW = ("rename", "chmod", "utime", "touch", "mknod", "fstat", "getdent", "access", "seek")


def test_stressors_side_by_side(place, tmp_path):
    counts = [argument for name in FEW for argument in (f"--{name}", "1")]
    stress(place, tmp_path, 2, *counts, "--seek-size", "4m")


# All of the class `filesystem`, and what else works on files. Not among them is what needs another
# kernel (binderfs, bind-mount), what no FUSE file system has (fiemap, verity), and io-uring, whose
# check of IORING_OP_STATX fails on every file system.  `io` syncs every file system of the machine:
# it fails where another FUSE file system lost its daemon.
STRESSORS = (
    "access", "aio", "chattr", "chdir", "chmod", "chown", "chroot", "copy-file", "dentry", "dir",
    "dirdeep", "dirmany", "dnotify", "dup", "fallocate", "fanotify", "fault", "fcntl", "file-ioctl",
    "filename", "flock", "fpunch", "fsize", "fstat", "getdent", "handle", "hdd", "inode-flags",
    "inotify", "io", "iomix", "lease", "link", "locka", "lockf", "lockofd", "mknod", "mmap",
    "msync", "open", "readahead", "rename", "revio", "seek", "sendfile", "sparsematrix", "symlink",
    "sync-file", "touch", "utime",
)  # fmt: skip
SIZES = {
    "hdd": ("--hdd-bytes", "16m"),
    "iomix": ("--iomix-bytes", "16m"),
    "fallocate": ("--fallocate-bytes", "16m"),
    "mmap": ("--mmap-file", "--mmap-bytes", "8m"),
    "msync": ("--msync-bytes", "8m"),
    "readahead": ("--readahead-bytes", "16m"),
    "seek": ("--seek-size", "16m"),
    "sync-file": ("--sync-file-bytes", "16m"),
}
# Ends by its count: stress-ng emulates fallocate, and takes one that its end of time cut short for
# one that succeeded.
COUNTS = {"fsize": ("--fsize-ops", "120")}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRESSORS)
def test_stressor(place, tmp_path, name):
    seconds = 60 if name in COUNTS else 3
    options = (*SIZES.get(name, ()), *COUNTS.get(name, ()))
    stress(place, tmp_path, seconds, f"--{name}", "1", *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["xattr", "chmod", "chown", "copy-file", "dir", "hdd", "link", "mmap", "rename", "utime"],
)
def test_stressor_with_attributes_lists_and_access_times(sides, tmp_path, name):
    place = Place(sides, *EVERYTHING)
    stress(place, tmp_path, 3, f"--{name}", "1", *SIZES.get(name, ()))
    place.check()


# ------------------------------------------------------------------------------------ benchmarks


@pytest.mark.slow
def test_dbench(place, tmp_path):
    load = "/usr/share/dbench/client.txt"
    said = run("dbench", "-D", place.path, "-t", "10", "-c", load, "4", cwd=tmp_path)
    assert "Throughput" in said


@pytest.mark.slow
def test_bonnie(place, tmp_path):
    sizes = ("-s", "64M", "-r", "32M", "-n", "2")
    said = run("bonnie++", "-d", place.path, "-u", "root", *sizes, "-q", "-f", cwd=tmp_path)
    assert re.search(r"^\d\.\d+,", said, re.MULTILINE)  # the line with its numbers


@pytest.mark.slow
@pytest.mark.parametrize("sync", [1, 4, 5, 6])
def test_fs_mark(place, sync):
    load = ("-n", "300", "-s", "10240", "-t", "2", "-D", "8", "-k", "-S", sync)
    run("fs_mark", "-d", ".", *load, cwd=place.path)  # it takes no path of more than 40 bytes
    files = [p for p in place.path.rglob("*") if p.is_file() and p.name != "fs_log.txt"]
    assert len(files) == 600
    assert {p.stat().st_size for p in files} == {10240}


@pytest.mark.slow
def test_postmark(place, tmp_path):
    script = tmp_path / "postmark"
    script.write_text(
        f"set location {place.path}\nset number 500\nset transactions 2000\n"
        "set size 500 100000\nset subdirectories 20\nset seed 7\nrun\nquit\n"
    )
    said = run("postmark", script, cwd=tmp_path)
    assert "Error" not in said
    assert "deleted" in said
    assert list(place.path.iterdir()) == []


# ---------------------------------------------------------------------------------------- sqlite

# EXTRA: in the mode DELETE a transaction is committed by removing its journal. With FULL SQLite does
# not sync the directory after that, so that a crash of the mount, as of a machine, may undo it.
WRITER = """
import random, sqlite3, sys
path, mode, seed = sys.argv[1:]
rnd = random.Random(int(seed))
c = sqlite3.connect(path, isolation_level=None)
c.execute(f"PRAGMA journal_mode={mode}")
c.execute("PRAGMA synchronous=EXTRA")
c.execute("PRAGMA wal_autocheckpoint=20")
number = c.execute("SELECT ifnull(max(number), 0) FROM t").fetchone()[0]
while True:
    number += 1
    c.execute("BEGIN IMMEDIATE")
    c.execute("INSERT INTO t VALUES(?, ?, ?)", (number, "a", rnd.randbytes(rnd.randrange(9000))))
    c.execute("INSERT INTO t VALUES(?, ?, ?)", (number, "b", rnd.randbytes(10)))
    if number % 5 == 0:
        c.execute("UPDATE t SET v = zeroblob(length(v)) WHERE number = ?", (rnd.randrange(number),))
    c.execute("COMMIT")
    print(number, flush=True)
"""


def sqlite_killed(path, mode, seed, commits, kill):
    """Some commits by a process; then `kill(process)`.  The last number that it said."""
    arguments = [sys.executable, "-c", WRITER, path, mode, str(seed)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        said = b""
        while said.count(b"\n") < commits:
            some = os.read(process.stdout.fileno(), 1 << 16)
            assert some, "the writer has ended"
            said += some
        kill(process)
        said += process.stdout.read()
        process.kill()
    return int(said[: said.rindex(b"\n")].split()[-1])


def sqlite_judged(path, acknowledged):
    """Nothing acknowledged is missing, nothing is torn."""
    with sqlite3.connect(path) as c:
        assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        halves = [
            [n for (n,) in c.execute("SELECT number FROM t WHERE half=? ORDER BY number", (half,))]
            for half in "ab"
        ]
        assert halves[0] == halves[1] == list(range(1, len(halves[0]) + 1))
        assert len(halves[0]) >= acknowledged
    c.close()


def sqlite_database(path):
    with sqlite3.connect(path) as c:
        c.execute("CREATE TABLE t(number INTEGER, half TEXT, v BLOB)")
        c.execute("CREATE INDEX i ON t(number, half)")
    c.close()


def killing_the_writer(place, mode, rounds):
    path = place.path / f"db-{mode}"
    sqlite_database(path)
    rnd = random.Random(mode)
    for seed in range(rounds):
        commits = rnd.randrange(1, 30)
        last = sqlite_killed(path, mode, seed, commits, subprocess.Popen.kill)
        assert last >= commits
        sqlite_judged(path, last)


def test_a_database_whose_writer_is_killed(place):
    for mode in ("DELETE", "WAL"):
        killing_the_writer(place, mode, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST", "WAL"])
def test_a_database_whose_writer_is_killed_often(place, mode):
    killing_the_writer(place, mode, 20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
@pytest.mark.parametrize("kind", [SHARED, EXCLUSIVE], ids=_kind)
def test_a_database_whose_mount_is_killed(sides, kind, mode):
    volume, *options = kind
    place = Place(sides, f"{volume}-{mode.lower()}", *options)
    path = place.path / "db"
    sqlite_database(path)
    os.sync()
    for seed in range(3):

        def kill(_):
            os.kill(place.pid, signal.SIGKILL)

        last = sqlite_killed(path, mode, seed, 10 + 7 * seed, kill)
        subprocess.run(["umount", "-l", place.mount], check=True)
        place.cluster.mount(place.volume, place.mount, *options)
        sqlite_judged(path, last)
    place.check()


# ------------------------------------------------------------------------------------------- git

GIT = r"""
set -eu
commit() { n=$((n + 1)); GIT_AUTHOR_DATE="@$((1600000000 + n)) +0000" \
    GIT_COMMITTER_DATE="@$((1600000000 + n)) +0000" git commit -q -m "$@"; }
n=0
git init -q --initial-branch=main one && cd one
mkdir -p a/b && seq 500 > a/b/numbers && echo text > text && ln -s text link
printf '#!/bin/sh\n' > run && chmod +x run
git add -A && commit first
git checkout -q -b side && sed -i 's/^400$/four hundred/' a/b/numbers && git commit -q -a -m side \
    --date=@1600000100 && git mv text moved && commit moved
git checkout -q main && sed -i 's/^10$/ten/' a/b/numbers && git add -u && commit ten
git merge -q --no-edit side && git branch before-rebase
git checkout -q -b topic HEAD~1 && for i in 1 2 3; do echo $i > log$i; git add log$i; commit log$i; done
git rebase -q main && git rebase -q --onto before-rebase~1 HEAD~2
git checkout -q main && echo dirty >> run && echo new > untracked && git stash push -q -u
git status --porcelain && git stash pop -q && git status --porcelain && git reset -q --hard
git tag -a -m tag v1 && git worktree add -q ../tree topic && git worktree list | wc -l
(cd ../tree && echo more > more && git add more && commit more && git status --porcelain)
git clone -q --no-hardlinks . ../two && git -C ../two fsck --full --strict
git -c protocol.file.allow=always submodule --quiet add ../two sub && commit sub
git -c protocol.file.allow=always clone -q --recurse-submodules "$PWD" ../three
cat ../three/sub/a/b/numbers | sha256sum
git gc -q --prune=now && git repack -q -a -d -f && git fsck --full --strict && git prune
git bisect start HEAD HEAD~3 > /dev/null && git bisect reset > /dev/null 2>&1
git grep -c hundred && git archive HEAD a | tar t && git worktree remove --force ../tree
git log --all --format='%T %s' && git ls-files -s a link run && git count-objects | cut -d, -f1
git clean -q -f -d && git status --porcelain
"""


@pytest.mark.parametrize(
    "place", [SHARED, pytest.param(EXCLUSIVE, marks=pytest.mark.slow)], ids=_kind, indirect=True
)
def test_git_does_on_a_mount_what_it_does_on_a_tmpfs(place, sides, tmp_path):
    reference = sides.reference() / f"git{next(_numbers)}"
    reference.mkdir()
    said = []
    for where in (place.path, reference):
        who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
        dates = {"GIT_AUTHOR_DATE": "@1600000000 +0000", "GIT_COMMITTER_DATE": "@1600000000 +0000"}
        config = {"HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
        out = run("bash", "-c", GIT, cwd=where, **who, **dates, **config)
        content = hashlib.sha256()
        for path in sorted(p for p in where.rglob("*") if ".git" not in p.parts and p.is_file()):
            content.update(str(path.relative_to(where)).encode() + path.read_bytes())
        said.append((out, content.hexdigest()))
    assert said[0] == said[1]
    assert len(said[0][0].splitlines()) > 20
