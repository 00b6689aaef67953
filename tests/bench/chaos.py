#!/usr/bin/env python3
"""Programs at work on mounts while nodes and mounts are killed and stopped; nothing may be lost.

    .venv/bin/python tests/bench/chaos.py --seconds 120 --seed 1
    .venv/bin/python tests/bench/chaos.py --mode exclusive

A three-node cluster is made below --dir (default: a temporary directory, removed unless something is
wrong).  Faults come in an order that the seed gives: kill -9 of a node's daemons, one or both, and a
restart; SIGSTOP of them for up to 15 s, or of a mount for up to 8; kill -9 of a mount and mounting it
again; unmount and mount.
Never is more than one node away, so nothing acknowledged may be lost and everything must go on.

| mode | mounts | what is durable |
|---|---|---|
| shared | two of one volume | names and closed files when the operation returns, the rest by fsync |
| single | one | what was synced, and all that came before it; the rest is lost as a suffix |
| exclusive | one, with the kernel's writeback cache | the same, but what is not synced page by page |

Each worker is a process with a directory of its own and a model of it (`chaosmodel`): what it reads is
compared all the time, and all of it after each death of its mount, each unmount, and at the end on each
mount and on a new one; then `dfs fsck`.  With two mounts the workers also pass files to each other: whoever opens a
file that was renamed or closed before sees that version or a newer one, and of those that create a name
exclusively one succeeds.

Operations that take longer than --slow seconds are listed with the faults that were active meanwhile,
and so are seconds in which nothing was done at all.  Exit status 1: something was wrong.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from chaosworker import DEAD, LARGE, PAUSE, RUN, STOP, Database, Shared, Worker
from localcluster import LocalCluster

VOLUME = "chaos"


class Faults:
    """What was wrong when: (since, until, what)."""

    def __init__(self, out):
        self.all = []
        self.began = time.monotonic()
        self._out = out

    @contextlib.contextmanager
    def during(self, what):
        fault = [time.monotonic(), None, what]
        self.all.append(fault)
        self._out(f"{fault[0] - self.began:7.1f} {what}")
        try:
            yield
        finally:
            fault[1] = time.monotonic()
            self._out(f"{fault[1] - self.began:7.1f} end of: {what}")

    def active(self, since, until):
        """Faults between two moments, and shortly before the first."""
        return [
            f"{what} ({at - self.began:.1f} to {end - self.began:.1f})" if end else what
            for at, end, what in self.all
            if at <= until and (end is None or end >= since - 1)
        ]


class Chaos:
    """The cluster, its mounts, its faults."""

    def __init__(self, args, base):
        self.args, self.base = args, Path(base)
        self.cluster = LocalCluster(base)
        self.random = random.Random(args.seed)
        mounts = 2 if args.mode == "shared" else 1
        self.mounts = [self.base / f"m{i}" for i in range(mounts)]
        self.shared = Shared(mounts, args.workers)
        self.faults = Faults(self.say)
        self.violations = []
        self.slow = []
        self.rates = []  # (time, operations by worker)
        self.over = threading.Event()
        self.nemesis_errors = []

    def say(self, text):
        print(text, flush=True)

    # -- mounts

    def pid_file(self, m):
        return self.cluster.dir / "run" / f"mount-{m}.pid"

    def mount(self, m):
        options = ["--exclusive"] if self.args.mode == "exclusive" else []
        self.cluster.mount(VOLUME, self.mounts[m], "--pid-file", self.pid_file(m), *options)

    def workers_of(self, m):
        return [w for w in range(self.args.workers) if w % len(self.mounts) == m]

    def wait_idle(self, m, timeout=60):
        """Until no worker uses the mount."""
        end = time.monotonic() + timeout
        generation = self.shared.generation[m]
        while any(self.shared.idle[w] != generation + 1 for w in self.workers_of(m)):
            if time.monotonic() > end:
                busy = [w for w in self.workers_of(m) if self.shared.idle[w] != generation + 1]
                raise AssertionError(f"workers {busy} do not let go of mount {m}")
            time.sleep(0.01)

    def kill_mount(self, m):
        shared = self.shared
        with self.faults.during(f"mount {m} is killed"):
            pid = int(self.pid_file(m).read_text())
            shared.killed[m] = shared.generation[m]
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            shared.order[m] = DEAD
            self.wait_idle(m)
            subprocess.run(["umount", "-l", str(self.mounts[m])], check=True, capture_output=True)
            self.pid_file(m).unlink(missing_ok=True)
            time.sleep(self.random.choice([0, 0, 1, 3]))
            self.mount(m)
            shared.generation[m] += 1
            shared.order[m] = RUN

    def remount(self, m):
        shared = self.shared
        with self.faults.during(f"mount {m} is unmounted and mounted"):
            shared.order[m] = PAUSE
            self.wait_idle(m)
            self.cluster.umount(self.mounts[m])
            time.sleep(self.random.choice([0, 0, 1]))
            self.mount(m)
            shared.generation[m] += 1
            shared.order[m] = RUN

    # -- nodes

    def disturb_node(self):
        r = self.random
        node = r.choice(self.cluster.nodes)
        roles = r.choice([("metadata",), ("chunkserver",), ("metadata", "chunkserver")])
        what = f"{node} {' and '.join(roles)}"
        if r.random() < 0.5:
            away = r.uniform(1, self.args.away)
            with self.faults.during(f"{what} killed for {away:.1f} s"):
                self.cluster.kill(node, roles)
                self.over.wait(away)
                self.cluster.up(node)
        else:
            away = r.choice([r.uniform(0.5, 3), r.uniform(3, 15)])
            with self.faults.during(f"{what} stopped for {away:.1f} s"):
                self.cluster.kill(node, roles, signal.SIGSTOP)
                self.over.wait(away)
                self.cluster.kill(node, roles, signal.SIGCONT)

    def disturb_mount(self):
        m = self.random.randrange(len(self.mounts))
        self.random.choices([self.kill_mount, self.remount, self.stop_mount], [5, 3, 2])[0](m)

    def stop_mount(self, m):
        """Not for as long as it takes to lose a session."""
        away = self.random.uniform(0.5, 8)
        pid = int(self.pid_file(m).read_text())
        with self.faults.during(f"mount {m} is stopped for {away:.1f} s"):
            os.kill(pid, signal.SIGSTOP)
            try:
                self.over.wait(away)
            finally:
                os.kill(pid, signal.SIGCONT)

    def disturb_both(self):
        """A mount dies while a node is stopped that has its last requests unread."""
        node = self.random.choice(self.cluster.nodes)
        with self.faults.during(f"{node} metadata stopped"):
            self.cluster.kill(node, ("metadata",), signal.SIGSTOP)
            try:
                time.sleep(self.random.uniform(0.1, 1.5))
                self.kill_mount(self.random.randrange(len(self.mounts)))
                self.over.wait(self.random.uniform(0, 3))
            finally:
                self.cluster.kill(node, ("metadata",), signal.SIGCONT)

    def nemesis(self, work, calm):
        try:
            while not self.over.wait(self.random.uniform(*calm)):
                work()
        except BaseException:
            self.violation(f"nemesis: {traceback.format_exc()}")

    # -- what workers say

    def violation(self, text):
        at = time.monotonic()
        where = f"{at - self.faults.began:7.1f} VIOLATION {text}\n    faults: {self.faults.active(at - 20, at)}"
        self.violations.append(where)
        self.say(where)

    def listen(self):
        while (report := self.shared.reports.get()) is not None:
            kind, worker, mount, _at, what = report
            if kind == "violation":
                self.violation(f"worker {worker} on mount {mount}: {what}")
            else:
                name, began, ended = what
                self.slow.append((ended - began, worker, mount, name, began, ended))
                self.say(
                    f"{ended - self.faults.began:7.1f} slow: {name} took {ended - began:.1f} s, worker"
                    f" {worker}, mount {mount}: {self.faults.active(began, ended)}"
                )

    def watch(self):
        """Count operations every second."""
        while not self.over.wait(1):
            self.rates.append((time.monotonic(), list(self.shared.done)))

    # -- the whole

    def run(self):
        args, shared = self.args, self.shared
        self.cluster.init().up()
        try:
            self.cluster.dfs("volume", "create", VOLUME)
            for m in range(len(self.mounts)):
                self.mount(m)
            (self.mounts[0] / "shared").mkdir()
            workers = [
                (Database if w < args.databases else Worker)(
                    w, w % len(self.mounts), self.mounts[w % len(self.mounts)], shared, args
                )
                for w in range(args.workers)
            ]
            processes = [multiprocessing.Process(target=w.run, daemon=True) for w in workers]
            for process in processes:
                process.start()
            threads = [
                threading.Thread(target=self.listen, daemon=True),
                threading.Thread(target=self.watch, daemon=True),
            ]
            nemeses = []
            if "node" in args.faults:
                nemeses.append((self.disturb_node, (0.5 * args.calm, 6 * args.calm)))
            if "mount" in args.faults:
                nemeses.append((self.disturb_mount, (2 * args.calm, 15 * args.calm)))
            if "both" in args.faults:
                nemeses.append((self.disturb_both, (2 * args.calm, 8 * args.calm)))
            acting = [threading.Thread(target=self.nemesis, args=n, daemon=True) for n in nemeses]
            for thread in [*threads, *acting]:
                thread.start()
            time.sleep(args.seconds)
            self.over.set()
            for thread in acting:
                thread.join(120)
            self.end(processes, workers)
            shared.reports.put(None)
            threads[0].join(10)
        finally:
            self.tell()
            if self.violations or self.args.keep:
                self.keep()
            self.cluster.destroy()
        return 1 if self.violations else 0

    def end(self, processes, workers):
        """All is quiet: every mount shows the same, and so does a new one; fsck is content."""
        time.sleep(2)
        for m in range(len(self.mounts)):
            self.shared.order[m] = STOP
        for w, process in enumerate(processes):
            process.join(60)
            if process.is_alive():
                self.violation(f"worker {w} does not end")
                process.kill()
        time.sleep(2)  # listings of another mount may be that old
        seen = {m: self.see(workers, m) for m in self.mounts}
        for m in self.mounts:
            self.cluster.umount(m)
        new = self.base / "new"
        self.cluster.mount(VOLUME, new, "--pid-file", self.pid_file("new"))
        seen[new] = self.see(workers, new)
        self.cluster.umount(new)
        self.cluster.mounts.clear()
        for where, found in seen.items():
            if found != seen[self.mounts[0]]:
                differing = sorted(
                    p
                    for p in {*found, *seen[self.mounts[0]]}
                    if found.get(p) != seen[self.mounts[0]].get(p)
                )
                self.violation(f"{where.name} and {self.mounts[0].name} differ: {differing[:10]}")
        done = self.cluster.dfs("fsck", VOLUME, check=False)
        if done.returncode:
            self.violation(f"fsck: {done.returncode}\n{done.stdout}{done.stderr}")

    def see(self, workers, where):
        found = {}
        for w in workers:
            part = w.look_at_all(where / f"w{w.number}")
            found |= {f"w{w.number}/{p}": hash(c) for p, c in part.items()}
        return found

    def tell(self):
        """What it was like."""
        rates = self.rates
        quiet = []
        for m in range(len(self.mounts)):
            mine = self.workers_of(m)
            since = None
            for (t0, a), (t1, b) in pairwise(rates):
                still = all(a[w] == b[w] for w in mine)
                if still and since is None:
                    since = t0
                if since is not None and (not still or t1 == rates[-1][0]):
                    if t0 - since >= 2:
                        quiet.append((m, since, t0))
                    since = None
        if self.args.rates:
            for (t0, a), (_, b) in pairwise(rates):
                each = " ".join(f"{y - x:5d}" for x, y in zip(a, b, strict=True))
                self.say(f"{t0 - self.faults.began:7.1f} {each} {self.faults.active(t0, t0)}")
        for m, since, until in quiet:
            began = self.faults.began
            self.say(
                f"nothing done on mount {m} from {since - began:.1f} to {until - began:.1f}:"
                f" {self.faults.active(since, until)}"
            )
        for node in self.cluster.nodes:
            with contextlib.suppress(OSError):
                for line in self.cluster.log(node).splitlines():
                    if "no checkpoint" in line:
                        self.say(f"{node}: {line}")
        longest = max(self.slow, default=(0,))
        self.say(
            f"seed {self.args.seed}: {sum(self.shared.done)} operations, {len(self.faults.all)} faults,"
            f" {len(self.slow)} slow, longest {longest[0]:.1f} s, {len(self.violations)} violations"
        )

    def keep(self):
        where = (
            Path(tempfile.gettempdir()) / f"chaos-{self.args.mode}-{self.args.seed}-{os.getpid()}"
        )
        shutil.copytree(self.cluster.dir / "log", where, dirs_exist_ok=True)
        (where / "violations").write_text("\n".join(self.violations))
        (where / "faults").write_text(
            "\n".join(f"{a} {b} {w}" for a, b, w in self.faults.all)
            + f"\nbegan {self.faults.began}"
        )
        self.say(f"logs are in {where}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=["shared", "single", "exclusive"], default="shared")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--databases", type=int, default=0, help="so many workers sync a journal")
    parser.add_argument("--rates", action="store_true", help="show operations each second")
    parser.add_argument(
        "--faults", default="node,mount", help="which of node, mount; or both: at once"
    )
    parser.add_argument("--calm", type=float, default=1.0, help="factor to the time between faults")
    parser.add_argument("--slow", type=float, default=3.0, help="seconds worth telling")
    parser.add_argument("--large", type=float, default=0.02, help=f"chance of {LARGE} bytes")
    parser.add_argument("--away", type=float, default=8.0, help="most seconds until a restart")
    parser.add_argument("--keep", action="store_true", help="keep the logs in any case")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between operations")
    parser.add_argument("--dir", help="where to make the cluster")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfs-chaos-", dir=args.dir) as base:
        return Chaos(args, base).run()


if __name__ == "__main__":
    sys.exit(main())
