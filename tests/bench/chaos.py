#!/usr/bin/env python3
"""Programs at work on mounts while nodes and mounts are killed and stopped; nothing may be lost.

    .venv/bin/python tests/bench/chaos.py --seconds 120 --seed 1
    .venv/bin/python tests/bench/chaos.py --mode exclusive

A three-node cluster is made below --dir (default: a temporary directory, removed unless something is
wrong).  Faults come in an order that the seed gives: kill -9 of a node's daemons, one or both, and a
restart; SIGSTOP of them for up to 15 s; kill -9 of a mount and mounting it again; unmount and mount.
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
import ctypes
import errno
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from chaosmodel import Model, difference, differing_names
from localcluster import LocalCluster

VOLUME = "chaos"
SIZES = (0, 1, 10, 100, 4000, 4096, 5000, 17_000, 20_000, 70_000, 300_000)
LARGE = 5_000_000  # now and then
MOST_FILES, MOST_HANDLES = 25, 3
RUN, PAUSE, DEAD, STOP = range(4)  # what a mount's workers shall do
DEATH = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.EINTR}  # errors of a killed mount
LOCKS, LOCK_ROUNDS = 4, 4096
CHAOS_WEIGHTS = {
    "create": 8, "append": 10, "overwrite": 8, "replace": 5, "rename": 3, "truncate": 3, "unlink": 4,
    "mkdir": 2, "rmtree": 1, "movedir": 1, "syncdir": 2, "read": 10, "list": 3, "reopen": 2,
}  # fmt: skip
SHARED_WEIGHTS = {"publish": 4, "look": 6, "lock": 3}


class Shared:
    """What the processes share: orders, states and counters, in shared memory."""

    def __init__(self, mounts, workers):
        self.order = multiprocessing.Array("i", mounts, lock=False)  # RUN ... by mount
        self.generation = multiprocessing.Array("i", mounts, lock=False)  # how often it was mounted
        self.killed = multiprocessing.Array("i", mounts, lock=False)  # generation that was killed
        self.idle = multiprocessing.Array("i", workers, lock=False)  # generation it waits after
        self.done = multiprocessing.Array("i", workers, lock=False)  # operations
        self.since = multiprocessing.Array(ctypes.c_double, workers, lock=False)
        self.acked = multiprocessing.Array("i", 2 * workers, lock=False)  # versions of shared files
        self.begun = multiprocessing.Array("i", 2 * workers, lock=False)
        self.locks = multiprocessing.Array("i", LOCK_ROUNDS)  # 1 + worker that made the name
        self.reports = multiprocessing.SimpleQueue()
        for m in range(mounts):
            self.killed[m] = -1


class Died(Exception):
    """The mount is gone, and was meant to be."""


class Worker:
    """One process at work on one mount."""

    def __init__(self, number, mount, where, shared, args):
        self.number, self.mount, self.where, self.shared = number, mount, Path(where), shared
        self.root = self.where / f"w{number}"
        self.args = args
        self.random = random.Random(f"{args.seed}/{number}")
        self.model = Model(durable=args.mode == "shared", pages=args.mode == "exclusive")
        self.handles = {}  # number of a file -> descriptor
        self.dirty = set()  # numbers of files written through a handle and not flushed
        self.names = 0
        self.last = ["nothing"]
        self.generation = 0
        self.lock_round = 0
        self.weights = CHAOS_WEIGHTS | (SHARED_WEIGHTS if args.mode == "shared" else {})

    # -- the loop

    def run(self):
        try:
            self._run()
        except BaseException:
            self.report("violation", f"worker fails: {traceback.format_exc()}")

    def _run(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        order, m = self.shared.order, self.mount
        self.generation = self.shared.generation[m]
        self.attempt("start", lambda: self.call("mkdir", os.mkdir, self.root))
        names, weights = list(self.weights), list(self.weights.values())
        while order[m] != STOP:
            if order[m] != RUN or self.shared.generation[m] != self.generation:
                self.wait_mount()
                continue
            name = self.random.choices(names, weights)[0]
            self.attempt(name, getattr(self, "do_" + name))
            self.shared.done[self.number] += 1
            if self.args.pause:
                time.sleep(self.random.uniform(0, 2 * self.args.pause))
        self.close_all()
        self.shared.idle[self.number] = -1
        if (wrong := self.model.differs_now(self.look_at_all())) != "":
            self.violation(f"at the end: {wrong}")

    def attempt(self, name, work):
        """One operation; whatever goes wrong is explained by a death of the mount, or reported."""
        self.last = [*self.last[-30:], name]
        try:
            work()
        except Died:
            self.after_death()
        except OSError as e:
            self.violation(f"{name} failed: {e!r}")
            self.resynchronise()
        except AssertionError as e:
            self.violation(f"{name}: {e}")
            self.resynchronise()

    def call(self, what, fn, *args, **kw):
        """A system call, timed; raises `Died` if it fails because the mount was killed."""
        began = time.monotonic()
        self.shared.since[self.number] = began
        try:
            return fn(*args, **kw)
        except OSError as e:
            if e.errno in DEATH and self.shared.killed[self.mount] == self.generation:
                raise Died from e
            raise
        finally:
            now = time.monotonic()
            self.shared.since[self.number] = 0
            if now - began > self.args.slow:
                self.report("slow", (what, began, now))

    def report(self, kind, what):
        self.shared.reports.put((kind, self.number, self.mount, time.monotonic(), what))

    def violation(self, text):
        self.report("violation", f"{text}\n    last operations: {self.last}")

    def close_all(self):
        for fd in self.handles.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        for number in self.dirty:
            if number in self.model.files:
                self.model.flush(number)
                self.model.ack()
        self.handles.clear()
        self.dirty.clear()

    def wait_mount(self):
        """The mount goes and comes; after a clean unmount everything is as it was."""
        self.close_all()
        again = self.wait_again()
        if again is None:
            return
        found = self.look_at_all_if_alive()
        if found is None:
            return
        if self.generation_killed(again - 1):  # it died before we had seen the order
            self.check_crash(found)
        elif wrong := self.model.differs_now(found):
            self.violation(f"after unmount and mount: {wrong}")
        self.model.rebase(found)

    def generation_killed(self, generation):
        return self.shared.killed[self.mount] == generation

    def wait_again(self):
        """Until the mount is there again; returns its generation, or None at the end."""
        shared, m = self.shared, self.mount
        shared.idle[self.number] = self.generation + 1
        while shared.generation[m] <= self.generation or shared.order[m] != RUN:
            if shared.order[m] == STOP:
                break
            time.sleep(0.005)
        ended = shared.generation[m] <= self.generation
        self.generation = shared.generation[m]
        shared.idle[self.number] = 0
        return None if ended else self.generation

    def after_death(self):
        """The mount was killed: what was synced is there, of the rest a prefix."""
        for fd in self.handles.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.handles.clear()
        self.dirty.clear()
        if self.wait_again() is None:
            return
        found = self.look_at_all_if_alive()
        if found is None:
            return
        self.check_crash(found)
        self.model.rebase(found)

    def check_crash(self, found):
        if wrong := self.model.differs_after_crash(found):
            self.violation(f"after a death of the mount: {wrong}")

    def look_at_all_if_alive(self):
        """All there is; None if the mount died again, and then that is looked at first."""
        try:
            if not self.call("exists", os.path.lexists, self.root):
                self.call("mkdir", os.mkdir, self.root)
            return self.look_at_all()
        except Died:
            self.after_death()
            return None

    def resynchronise(self):
        """Go on from what there is after something was wrong."""
        for fd in self.handles.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.handles.clear()
        self.dirty.clear()
        try:
            self.model.rebase(self.look_at_all())
        except Died:
            self.after_death()
        except OSError as e:
            self.violation(f"cannot even look: {e!r}")
            time.sleep(1)

    def look_at_all(self, root=None):
        """Path -> content of everything below the worker's directory, None for directories."""
        found = {}
        pending = [""]
        root = root or self.root
        while pending:
            at = pending.pop()
            with self.call("scandir", os.scandir, root / at) as entries:
                listed = self.call("readdir", list, entries)
            for entry in listed:
                path = f"{at}/{entry.name}".lstrip("/")
                if entry.is_dir(follow_symlinks=False):
                    found[path] = None
                    pending.append(path)
                else:
                    found[path] = self.read_file(root / path)
        return found

    def read_file(self, path):
        fd = self.call("open to read", os.open, path, os.O_RDONLY)
        try:
            parts = []
            while part := self.call("read", os.read, fd, 1 << 20):
                parts.append(part)
            return b"".join(parts)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    # -- choosing

    def new_name(self):
        self.names += 1
        directory = self.random.choice(["", "", *self.directories()])
        return f"{directory}/f{self.names}".lstrip("/")

    def directories(self):
        return [p for p, n in self.model.names.items() if n is None]

    def some_file(self):
        return self.random.choice([p for p, n in self.model.names.items() if n is not None] or [""])

    def data(self):
        size = self.random.choice(SIZES)
        if self.random.random() < self.args.large:
            size = LARGE
        return self.random.randbytes(size)

    def chance(self, p):
        return self.random.random() < p

    # -- operations: each says to the model what it does before it does it

    def write(self, number, fd, at, data):
        view = memoryview(data)
        while view:
            self.model.write(number, at, bytes(view))
            n = self.call(f"pwrite {len(view)}", os.pwrite, fd, view, at)
            assert n == len(view), f"a write of {len(view)} bytes wrote {n}"
            at, view = at + n, view[n:]

    def sync(self, number, fd, *, data=False):
        self.model.flush(number)
        self.call("fdatasync" if data else "fsync", os.fdatasync if data else os.fsync, fd)
        self.model.ack(synced=True)
        self.dirty.discard(number)

    def close(self, number, fd):
        self.model.flush(number)
        self.call("close", os.close, fd)
        self.model.ack()
        self.dirty.discard(number)

    def sync_directory(self, path=""):
        fd = self.call("open directory", os.open, self.root / path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.call("fsync of a directory", os.fsync, fd)
            self.model.ack(synced=True)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def open(self, path, flags=os.O_RDWR):
        return self.call("open", os.open, self.root / path, flags, 0o644)

    def handle(self, path):
        """A descriptor that stays open, and whether the caller closes it."""
        number = self.model.names[path]
        if number in self.handles:
            return self.handles[number], False
        fd = self.open(path)
        if len(self.handles) < MOST_HANDLES and self.chance(0.3):
            self.handles[number] = fd
            return fd, False
        return fd, True

    @contextlib.contextmanager
    def using(self, path):
        fd, closing = self.handle(path)
        number = self.model.names[path]
        done = False
        try:
            yield number, fd
            done = True
        finally:
            if closing and not done:
                with contextlib.suppress(OSError):
                    os.close(fd)
        if closing:
            self.close(number, fd)
        else:
            self.dirty.add(number)

    def do_create(self, path=None, data=None, sync=None):
        if len(self.model.names) > MOST_FILES and path is None:
            self.do_unlink()
            return
        path = path or self.new_name()
        self.model.make(path)
        fd = self.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        self.model.ack()
        number = self.model.names[path]
        ok = False
        try:
            self.write(number, fd, 0, self.data() if data is None else data)
            if self.chance(0.5) if sync is None else sync:
                self.sync(number, fd)
            ok = True
        finally:
            if not ok:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.close(number, fd)

    def do_append(self):
        if path := self.some_file():
            with self.using(path) as (number, fd):
                for _ in range(self.random.choice([1, 1, 3, 10])):
                    size = self.random.choice([10, 200, 4000, 9000])
                    self.write(number, fd, len(self.model.content(path)), self.random.randbytes(size))
                    if self.chance(0.6):
                        self.sync(number, fd, data=True)

    def do_overwrite(self):
        if path := self.some_file():
            with self.using(path) as (number, fd):
                size = len(self.model.content(path))
                at = self.random.randrange(size + 1)
                if self.chance(0.2):
                    at = self.random.randrange(size + 20_000)
                length = self.random.choice([1, 100, 4096, 10_000, 150_000])
                self.write(number, fd, at, self.random.randbytes(length))
                if self.chance(0.5):
                    self.sync(number, fd)

    def do_replace(self):
        """Write a new version under another name, sync, rename it over the old, sync the names."""
        if path := self.some_file():
            tmp = path + ".tmp"
            self.do_create(tmp, self.data(), sync=self.chance(0.8))
            self.drop_handle(path)
            self.model.rename(tmp, path)
            self.call("rename over", os.rename, self.root / tmp, self.root / path)
            self.model.ack()
            if self.chance(0.7):
                self.sync_directory(str(Path(path).parent))

    def drop_handle(self, path):
        number = self.model.names[path]
        fd = self.handles.pop(number, None)
        if fd is not None:
            self.close(number, fd)

    def do_rename(self):
        if path := self.some_file():
            new = self.new_name()
            self.model.rename(path, new)
            self.call("rename", os.rename, self.root / path, self.root / new)
            self.model.ack()

    def do_truncate(self):
        if path := self.some_file():
            size = len(self.model.content(path))
            new = self.random.choice([0, size // 2, max(0, size - 1), size + 5000])
            number = self.model.names[path]
            self.model.truncate(number, new)
            fd = self.handles.get(number)
            self.call("truncate", os.truncate, self.root / path if fd is None else fd, new)
            self.model.ack()

    def do_unlink(self):
        if path := self.some_file():
            self.drop_handle(path)
            self.model.remove(path)
            self.call("unlink", os.unlink, self.root / path)
            self.model.ack()

    def do_mkdir(self):
        if len(self.directories()) < 6:
            self.names += 1
            parent = self.random.choice(["", *self.directories()])
            path = f"{parent}/d{self.names}".lstrip("/")
            self.model.make(path, directory=True)
            self.call("mkdir", os.mkdir, self.root / path)
            self.model.ack()

    def do_movedir(self):
        if directories := self.directories():
            path = self.random.choice(directories)
            self.names += 1
            self.model.rename(path, f"d{self.names}")
            self.call("rename directory", os.rename, self.root / path, self.root / f"d{self.names}")
            self.model.ack()

    def do_rmtree(self):
        if directories := self.directories():
            top = self.random.choice(directories)
            below = sorted((p for p in self.model.names if p.startswith(top + "/")), reverse=True)
            for path in [*below, top]:
                directory = self.model.names[path] is None
                if not directory:
                    self.drop_handle(path)
                self.model.remove(path)
                what, fn = ("rmdir", os.rmdir) if directory else ("unlink", os.unlink)
                self.call(what, fn, self.root / path)
                self.model.ack()

    def do_syncdir(self):
        self.sync_directory(self.random.choice(["", *self.directories()]))

    def do_read(self):
        if path := self.some_file():
            fd = self.handles.get(self.model.names[path])
            want = self.model.content(path)
            if fd is None:
                found = self.read_file(self.root / path)
                where = 0
            else:
                where = self.random.randrange(len(want) + 1)
                found = self.call("pread", os.pread, fd, 50_000, where)
                want = want[where : where + 50_000]
            if found != want:
                raise AssertionError(f"{path} at {where}: {difference(found, want)}")

    def do_list(self):
        found = self.look_at_names()
        if wrong := differing_names(self.model.names, found):
            raise AssertionError(f"listed: {wrong}")

    def look_at_names(self):
        found = {}
        for top, directories, files in os.walk(self.root, onerror=self._raise):
            rel = os.path.relpath(top, self.root)
            base = "" if rel == "." else rel + "/"
            found |= {base + d: None for d in directories} | {base + f: b"" for f in files}
        return found

    def _raise(self, e):
        if e.errno in DEATH and self.generation_killed(self.generation):
            raise Died from e
        raise e

    def do_reopen(self):
        self.close_handles()

    def close_handles(self):
        for number, fd in list(self.handles.items()):
            del self.handles[number]
            self.close(number, fd)

    # -- between mounts

    def do_publish(self):
        """A new version of one of two files of this worker that others look at."""
        slot = 2 * self.number + self.random.randrange(2)
        shared = self.shared
        version = shared.begun[slot] = shared.begun[slot] + 1
        path = self.where / "shared" / f"s{slot}"
        data = b"%08d" % version
        if slot % 2:  # replaced; its length varies
            data += bytes([version % 256]) * self.random.choice(SIZES)
            tmp = path.with_suffix(".tmp")
            fd = self.call("open", os.open, tmp, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        else:  # written over, within a page
            fd = self.call("open", os.open, path, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            self.call("write", os.write, fd, data)
            if self.chance(0.3):
                self.call("fsync", os.fsync, fd)
        finally:
            self.call("close", os.close, fd)
        if slot % 2:
            self.call("rename over", os.rename, tmp, path)
        shared.acked[slot] = version

    def do_look(self):
        """A file of anybody: at least the version that was published before the open."""
        slot = self.random.randrange(len(self.shared.acked))
        least = self.shared.acked[slot]
        path = self.where / "shared" / f"s{slot}"
        try:
            found = self.read_file(path)
        except FileNotFoundError:
            assert not least, f"shared/s{slot} is not there, version {least} was published"
            return
        if not slot % 2 and not found:
            assert not least, f"shared/s{slot} is empty, version {least} was published"
            return
        version = int(found[:8])
        most = self.shared.begun[slot]
        assert least <= version <= most, (
            f"shared/s{slot} has version {version}, published is {least} to {most}"
        )
        assert set(found[8:]) <= {version % 256}, f"shared/s{slot} is torn, version {version}"

    def do_lock(self):
        """Of all that create a name exclusively one succeeds."""
        at = self.lock_round = max(self.lock_round, self.first_free_lock())
        if at >= LOCK_ROUNDS:
            return
        path = self.where / "shared" / f"lock{at}"
        try:
            fd = self.call("create exclusively", os.open, path, os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self.lock_round += 1
            return
        except Died:
            self.lock_round += 1  # it may be ours, or not
            raise
        self.lock_round += 1
        with self.shared.locks.get_lock():
            before, self.shared.locks[at] = self.shared.locks[at], 1 + self.number
        self.call("close", os.close, fd)
        assert not before, f"{path.name} was made by worker {before - 1} and by {self.number}"

    def first_free_lock(self):
        at = self.lock_round
        while at < LOCK_ROUNDS and self.shared.locks[at]:
            at += self.random.choice([1, 1, 1, 0]) or 1
        return at


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
            away = r.uniform(1, 8)
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
        if self.random.random() < 0.6:
            self.kill_mount(m)
        else:
            self.remount(m)

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
                Worker(w, w % len(self.mounts), self.mounts[w % len(self.mounts)], shared, args)
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
                nemeses.append((self.disturb_node, (0.5, 6)))
            if "mount" in args.faults:
                nemeses.append((self.disturb_mount, (2, 15)))
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
            if self.violations:
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
                    p for p in {*found, *seen[self.mounts[0]]} if found.get(p) != seen[self.mounts[0]].get(p)
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
            for (t0, a), (t1, b) in zip(rates, rates[1:], strict=False):
                still = all(a[w] == b[w] for w in mine)
                if still and since is None:
                    since = t0
                if since is not None and (not still or t1 == rates[-1][0]):
                    if t0 - since >= 2:
                        quiet.append((m, since, t0))
                    since = None
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
        where = Path(tempfile.gettempdir()) / f"chaos-{self.args.mode}-{self.args.seed}-{os.getpid()}"
        shutil.copytree(self.cluster.dir / "log", where, dirs_exist_ok=True)
        (where / "violations").write_text("\n".join(self.violations))
        (where / "faults").write_text(
            "\n".join(f"{a} {b} {w}" for a, b, w in self.faults.all) + f"\nbegan {self.faults.began}"
        )
        self.say(f"logs are in {where}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=["shared", "single", "exclusive"], default="shared")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--faults", default="node,mount", help="which of node, mount")
    parser.add_argument("--slow", type=float, default=3.0, help="seconds worth telling")
    parser.add_argument("--large", type=float, default=0.02, help=f"chance of {LARGE} bytes")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between operations")
    parser.add_argument("--dir", help="where to make the cluster")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfs-chaos-", dir=args.dir) as base:
        return Chaos(args, base).run()


if __name__ == "__main__":
    sys.exit(main())
