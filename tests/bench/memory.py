#!/usr/bin/env python3
"""What many files cost: memory of a mount and of the nodes, times at a million files, growth in a soak.

    .venv/bin/python tests/bench/memory.py                      # a million files: half an hour
    .venv/bin/python tests/bench/memory.py --files 100000
    .venv/bin/python tests/bench/memory.py --only flat --files 1000000
    .venv/bin/python tests/bench/memory.py --soak 3600          # write, read, delete; nothing else

A three-node cluster is made below --dir (default: a temporary directory) and removed.  The phases, in order:

tree      create --files files in directories of --per-dir, over a mount with default options
walk      unmount, mount, first `ls`, then os.scandir and stat of everything
forget    the kernel gives back what it holds of our inodes
again     walk once more in that mount
failover  kill -9 the node that sequences the volume; restart it
remove    `rm -r` of the tree
flat      the same number of files in one directory: create, list, unlink, `rm -r` of the rest

While files are made and removed a thread looks at a name, creates it and removes it all the time; its longest
silence is shown, with the checkpoints that fell into it.  A node is its metadata daemon and the processes that it
started.  Sizes are resident memory of /proc/PID/status, MiB.

The soak judges what each process holds at least in a minute, over its second half.  For metadata nodes the store's
caches of blocks and indexes are shown beside that, and how the rest grows: they fill with the data there is, up to
the bounds of `metadata.store.options`.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from localcluster import LocalCluster, wait_until

from dfs.client.connect import ClusterRef, connect
from dfs.client.filesystem import open_filesystem
from dfs.client.registry import open_volume_by_name
from fuse.__main__ import chunk_client

MIB = 1 << 20
PHASES = ("tree", "walk", "forget", "again", "failover", "remove", "flat")
SOAK_SIZES = (0, 100, 4096, 4096, 4096, 4096, 20_000)  # bytes; and now and then 5 MB
TICK = 1000 // os.sysconf("SC_CLK_TCK")  # ms


def status(pid, field="VmRSS"):
    """Bytes of a line of /proc/PID/status; 0 when the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    return 0


def cpu_ms(pid):
    """Processor time of a process."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK
    return 0


def children(pid):
    """All processes below one."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def sync_directory(path):
    """Have all that was done so far synced."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Watched:
    """The processes of a cluster and its mount; samples their memory in a thread."""

    def __init__(self, cluster, every, out=print):
        self.cluster = cluster
        self.samples = []  # (time, {name: bytes})
        self.peak = {}
        self._every, self._out = every, out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.began = time.monotonic()
        self.progress = 0
        self.folding = []  # (since, until) in which processes of metadata daemons worked
        self._worked = 0

    def pids(self):
        run = self.cluster.dir / "run"
        found = {}
        for path in sorted(run.glob("*.pid")):
            with contextlib.suppress(OSError, ValueError):
                name = path.stem if not path.stem.startswith("mount") else "mount"
                found[name] = int(path.read_text())
        return found

    def sizes(self):
        """Bytes by name; a daemon's own processes count as `NAME workers`."""
        sizes = {}
        for name, pid in self.pids().items():
            sizes[name] = status(pid)
            if name.endswith("-metadata"):
                sizes[name + " workers"] = sum(map(status, children(pid)))
        return sizes

    def _look_at_workers(self):
        """Checkpoints are made by processes of the daemons; merges of tables are, too."""
        now = time.monotonic()
        worked = sum(
            cpu_ms(child)
            for name, pid in self.pids().items()
            if name.endswith("-metadata")
            for child in children(pid)
        )
        if worked > self._worked + 50:
            last = self.folding[-1] if self.folding else (0, 0)
            if now - last[1] < 2.5:
                self.folding[-1] = (last[0], now)
            else:
                self.folding.append((now - 1, now))
        self._worked = worked

    def sample(self):
        sizes = self.sizes()
        self.samples.append((time.monotonic() - self.began, sizes))
        sums = {
            f"{name} with workers": size + sizes[name + " workers"]
            for name, size in sizes.items()
            if name + " workers" in sizes
        }
        for name, size in (sizes | sums).items():
            self.peak[name] = max(self.peak.get(name, 0), size)
        return sizes

    def show(self, what, sizes=None):
        sizes = sizes or self.sample()
        parts = {}
        for name, size in sizes.items():
            role = "mount" if name == "mount" else name.partition("-")[2]
            parts.setdefault(role, []).append(f"{size / MIB:.0f}")
        text = "  ".join(f"{role} {'/'.join(found)}" for role, found in parts.items())
        self._out(f"{time.monotonic() - self.began:7.0f} s  {what:28} {text}", flush=True)

    def _run(self):
        shown = time.monotonic()
        while not self._stop.wait(1.0):
            sizes = self.sample()
            self._look_at_workers()
            if time.monotonic() - shown >= self._every:
                shown = time.monotonic()
                self.show(f"... {self.progress:,}", sizes)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()

    def cpu(self):
        return {name: cpu_ms(pid) for name, pid in self.pids().items()}


class Canary:
    """Looks at a name, creates it, removes it, in a thread; knows its longest silences.

    `sync`: has the directory synced too, which needs the cluster; without, the mount answers alone.
    """

    def __init__(self, directory, sync=False):
        self.directory = Path(directory)
        self.sync = sync
        self.gaps = []  # (seconds, since, what)
        self.count = 0
        self.errors = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        name = os.fspath(self.directory / "canary")
        number = 0
        while not self._stop.is_set():
            number += 1
            path = f"{name}{number}"
            for what, step in (
                ("stat", lambda p: os.path.exists(p)),
                ("create", lambda p: os.close(os.open(p, os.O_CREAT | os.O_EXCL | os.O_WRONLY))),
                ("fsync", lambda _: self.sync and sync_directory(self.directory)),
                ("unlink", os.unlink),
            ):
                began = time.monotonic()
                try:
                    step(path)
                except OSError as e:
                    self.errors[f"{what}: {e.strerror}"] = (
                        self.errors.get(f"{what}: {e.strerror}", 0) + 1
                    )
                took = time.monotonic() - began
                self.count += 1
                if took > 0.05:
                    self.gaps.append((took, began, what))
            time.sleep(0.002)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join(60)

    def during(self, spans):
        """The longest silence that fell into one of the spans of time, and their lengths."""
        worst = max(
            (took for took, at, _ in self.gaps for a, b in spans if at < b and at + took > a),
            default=0.0,
        )
        lengths = ", ".join(f"{b - a:.0f}" for a, b in spans) or "none"
        return (
            f"checkpoints and merges took, in s: {lengths}; longest silence in them {worst:.2f} s"
        )

    def text(self):
        worst = sorted(self.gaps, reverse=True)[:3]
        shown = ", ".join(f"{took:.2f} s ({what})" for took, _, what in worst) or "under 0.05 s"
        errors = f", errors {self.errors}" if self.errors else ""
        return f"longest silences of a second program: {shown}; {self.count:,} operations{errors}"


def populate(cluster_file, volume, name, count, progress):
    """Make a directory of empty files with the client library: no kernel, no FUSE."""

    async def work():
        async with connect(ClusterRef.load(cluster_file), name="populate") as cluster:
            info = await open_volume_by_name(cluster, volume)
            async with open_filesystem(
                cluster, info.volume_id, lambda session: chunk_client(cluster, session)
            ) as fs:
                top = (await fs.mkdir(1, name, 0o755)).ino
                for n in range(count):
                    await fs.mknod(top, b"f%07d" % n, 0o100644)
                    if n % 50 == 0:
                        progress(n)
                        await trio.lowlevel.checkpoint()

    trio.run(work)


class Bench:
    """The phases."""

    def __init__(self, base, options):
        self.options = options
        self.cluster = LocalCluster(base)
        self.mnt = Path(base) / "mnt"
        self.results = {}
        self.watched = Watched(self.cluster, options.every)

    def __enter__(self):
        self.cluster.init().up()
        self.cluster.dfs("volume", "create", "many")
        self.cluster.mount("many", self.mnt)
        self.watched.__enter__()
        self.watched.show("mounted, empty")
        return self

    def __exit__(self, *exc):
        self.watched.__exit__()
        self.cluster.destroy()

    def note(self, key, value, text):
        self.results[key] = value
        print(f"{'':11}{text}", flush=True)

    @contextlib.contextmanager
    def phase(self, name, count):
        """Time and processor time of a phase, and what the mount and the nodes take after it."""
        self.watched.progress = 0
        self.watched.peak = {}
        self.watched.folding = []
        cpu, began = self.watched.cpu(), time.monotonic()
        yield
        took = time.monotonic() - began
        used = {n: ms - cpu.get(n, 0) for n, ms in self.watched.cpu().items()}
        mount = used.pop("mount", 0)
        servers = sum(used.values())
        self.watched.show(f"{name}: {count:,}")
        self.note(
            name,
            {"seconds": took, "count": count, "peak": self.watched.peak},
            f"{name}: {took:.1f} s, {count / took:,.0f}/s; processor time per file: mount"
            f" {mount / count * 1000:.0f} us, servers together {servers / count * 1000:.0f} us; peaks"
            f" {', '.join(f'{n} {s / MIB:.0f}' for n, s in self.watched.peak.items() if 'chunk' not in n)}",
        )

    def checkpoints(self):
        info = json.loads(self.cluster.dfs("volume", "info", "many", "--json").stdout)
        return info["checkpoint"], info["seq"]

    def make(self, directory, count):
        write = bytes(self.options.size)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.mkdir(directory)
        at = os.open(directory, os.O_RDONLY)
        try:
            for n in range(count):
                fd = os.open(f"f{n:07d}", flags, 0o644, dir_fd=at)
                if write:
                    os.write(fd, write)
                os.close(fd)
                self.watched.progress += 1
        finally:
            os.close(at)

    # ---------------------------------------------------------------------------- the phases

    def tree(self):
        top = self.mnt / "tree"
        files, per = self.options.files, self.options.per_dir
        os.mkdir(top)
        with self.phase("create", files), Canary(self.mnt) as canary:
            for n in range(0, files, per):
                self.make(top / f"d{n // per:06d}", min(per, files - n))
            sync_directory(top)
        self.note("create silence", canary.gaps, canary.text())
        self.note("create folds", 0, canary.during(self.watched.folding))
        self.note("checkpoint", self.checkpoints(), f"checkpoint, journal: {self.checkpoints()}")

    def scan(self, top):
        found = 0
        pending = [os.fspath(top)]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    entry.stat(follow_symlinks=False)
                    found += 1
                    self.watched.progress = found
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        return found

    def walk(self):
        self.remount()
        with self.phase("walk", self.options.files):
            self.judge_walk()

    def judge_walk(self):
        files, per = self.options.files, self.options.per_dir
        wanted = files + -(-files // per)
        found = self.scan(self.mnt / "tree")
        if found != wanted:
            raise SystemExit(f"the walk found {found:,} entries instead of {wanted:,}")

    def remount(self):
        self.cluster.umount(self.mnt)
        began = time.monotonic()
        self.cluster.mount("many", self.mnt)
        mounted = time.monotonic()
        subprocess.run(["ls", "-l", self.mnt], check=True, stdout=subprocess.DEVNULL)
        listed = time.monotonic()
        self.note(
            "mount",
            (mounted - began, listed - mounted),
            f"`dfs mount` {mounted - began:.2f} s, first ls -l {listed - mounted:.3f} s",
        )

    def forget(self):
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("2")
        time.sleep(5)
        self.watched.show("after FORGET of everything")

    def again(self):
        with self.phase("walk again", self.options.files):
            self.judge_walk()

    def failover(self):
        volume = next(v for v in self.cluster.status()["volumes"] if v.get("name") == "many")
        owner = f"node{volume['owner']}"
        with Canary(self.mnt, sync=True) as canary:
            time.sleep(1)
            killed = time.monotonic()
            self.cluster.kill(owner, ["metadata"])
            time.sleep(10)
        down = max((took for took, since, _ in canary.gaps if since + took > killed), default=0)
        self.note(
            "failover", down, f"kill -9 of the owner: {down:.2f} s of silence; {canary.text()}"
        )
        began = time.monotonic()
        self.cluster.up(owner)
        up = time.monotonic() - began
        wait_until(lambda: self.cluster.status()["available"], 60, "the node is back")
        time.sleep(5)
        self.watched.show(f"node back, up in {up:.1f} s")

    def remove(self):
        with self.phase("rm -r", self.options.files), Canary(self.mnt) as canary:
            subprocess.run(["rm", "-r", self.mnt / "tree"], check=True)
            sync_directory(self.mnt)
        self.note("rm silence", canary.gaps, canary.text())
        self.note("rm folds", 0, canary.during(self.watched.folding))

    def flat(self):
        files = self.options.files
        top = self.mnt / "flat"
        if self.options.library:
            self.cluster.umount(self.mnt)
            with self.phase("create in one directory, by the library", files):
                populate(
                    self.cluster.dir / "cluster.json",
                    "many",
                    b"flat",
                    files,
                    lambda n: setattr(self.watched, "progress", n),
                )
            self.cluster.mount("many", self.mnt)
        else:
            with self.phase("create in one directory", files):
                self.make(top, files)
                sync_directory(self.mnt)
        self.remount()
        with self.phase("list", files):
            names = os.listdir(top)
        if len(names) != files or len(set(names)) != files:
            raise SystemExit(f"{len(names):,} names, {len(set(names)):,} different, not {files:,}")
        del names
        with self.phase("ls -lU", files):
            subprocess.run(["ls", "-lU", top], check=True, stdout=subprocess.DEVNULL)
        with self.phase("unlink half", files // 2):
            at = os.open(top, os.O_RDONLY)
            for n in range(files // 2):
                os.unlink(f"f{n:07d}", dir_fd=at)
                self.watched.progress = n
            os.fsync(at)
            os.close(at)
        with self.phase("rm -r the rest", files - files // 2):
            subprocess.run(["rm", "-r", top], check=True)
            sync_directory(self.mnt)

    def soak(self, seconds):
        """Write, read and delete for so long; then judge the slope of each process's memory."""
        rng = random.Random(1)
        top = self.mnt / "soak"
        os.mkdir(top)
        began = last = time.monotonic()
        rows, rounds, live = [], 0, []
        least = {}  # each process's size in this minute at its smallest: between, it keeps free memory
        while (now := time.monotonic()) - began < seconds:
            directory = top / f"d{rounds}"
            os.mkdir(directory)
            sums = {}
            for n in range(100):
                size = 5_000_000 if rounds % 20 == n == 0 else rng.choice(SOAK_SIZES)
                data = rng.randbytes(size)
                sums[f"f{n}"] = zlib.crc32(data)
                (directory / f"f{n}").write_bytes(data)
                if (directory / f"f{n}").read_bytes() != data:
                    raise SystemExit(f"{directory}/f{n} does not read back")
            os.rename(directory, directory := top / f"r{rounds}")
            live.append((directory, sums))
            if len(live) > 5:
                old, sums = live.pop(0)
                if {p.name: zlib.crc32(p.read_bytes()) for p in old.iterdir()} != sums:
                    raise SystemExit(f"{old} is not what was written")
                subprocess.run(["rm", "-r", old], check=True)
            rounds += 1
            self.watched.progress = rounds * 100
            for name, size in self.watched.sizes().items():
                least[name] = min(least.get(name, size), size)
            if now - last >= self.options.every:
                last = now
                for name, size in self.caches().items():
                    least[name] = size
                rows.append((now - began, least))
                least = {}
            time.sleep(self.options.pause)
        return self.judge(rows)

    def caches(self):
        """Bytes of blocks and indexes in memory: "NODE-metadata caches" -> bytes."""
        stores = {name: s["store"] for name, s in self.cluster.node_status().items()}
        return {
            f"{name}-metadata caches": store["cache_bytes"] + store["index_bytes"]
            for name, store in stores.items()
        }

    def judge(self, rows):
        """Growth per hour in the second half; of metadata nodes without their bounded caches."""
        late = rows[len(rows) // 2 :]
        verdict = True
        for name in rows[-1][1]:
            if name.endswith(("workers", "caches")):
                continue
            caches = [sizes.get(f"{name} caches", 0) / MIB for _, sizes in late]
            sizes = [sizes.get(name, 0) / MIB for _, sizes in late]
            hours = [at / 3600 for at, _ in late]
            growth = slope(hours, sizes)
            beside = slope(hours, [a - b for a, b in zip(sizes, caches, strict=True)])
            grows = beside > self.options.slope
            verdict &= not grows
            print(
                f"{'':11}{name:20} {sizes[-1]:6.0f} MiB, {growth:+7.1f} MiB an hour"
                f" {'GROWS' if grows else 'steady'}"
                + (f"; caches {caches[-1]:.0f} MiB, the rest {beside:+.1f}" if any(caches) else "")
            )
        return verdict


def slope(at, values):
    """Of the line through the points; 0 for fewer than three."""
    if len(at) < 3:
        return 0.0
    return statistics.linear_regression(at, values).slope


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--files", type=int, default=1_000_000)
    ap.add_argument("--per-dir", type=int, default=1000)
    ap.add_argument("--size", type=int, default=0, help="bytes of each file")
    ap.add_argument("--only", default=",".join(PHASES), help="phases, of: " + ",".join(PHASES))
    ap.add_argument(
        "--library", action="store_true", help="flat: create with the client library, not a mount"
    )
    ap.add_argument("--soak", type=float, default=0, metavar="SECONDS")
    ap.add_argument("--pause", type=float, default=0.2, help="seconds between rounds of the soak")
    ap.add_argument("--slope", type=float, default=10.0, help="MiB an hour that count as growth")
    ap.add_argument("--every", type=float, default=60, help="seconds between lines")
    ap.add_argument("--dir", type=Path, default=None)
    ap.add_argument("--json", type=Path, default=None)
    a = ap.parse_args()
    phases = [p for p in a.only.split(",") if p]
    if unknown := set(phases) - set(PHASES):
        ap.error(f"no such phases: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="dfs-memory-", dir=a.dir) as base, Bench(base, a) as b:
        if a.soak:
            good = b.soak(a.soak)
        else:
            good = True
            for name in phases:
                getattr(b, name)()
        if a.json:
            a.json.write_text(json.dumps(b.results) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
