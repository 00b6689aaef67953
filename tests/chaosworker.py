"""The workers of the chaos harness: processes that use a mount, and know what has to be there.

A worker does one operation after the other below a directory of its own and says each to its model
(`chaosmodel`) first.  An error is a violation, unless the harness has killed the mount.  Then the worker
waits for the new mount and looks at all there is.  The module is long because it is a list of operations.
"""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import time
import traceback
from pathlib import Path

from chaosmodel import Journal, Model, difference, differing_names

SIZES = (0, 1, 10, 100, 4000, 4096, 5000, 17_000, 20_000, 70_000, 300_000)
LARGE = 5_000_000  # now and then
SEGMENT = 4 << 20
MOST_FILES, MOST_HANDLES = 25, 3
RUN, PAUSE, DEAD, STOP = range(4)  # what a mount's workers shall do
DEATH = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.EINTR}  # errors of a killed mount
LOCK_ROUNDS = 4096
WEIGHTS = {
    "create": 8, "append": 10, "overwrite": 8, "replace": 5, "rename": 3, "truncate": 3, "unlink": 4,
    "mkdir": 2, "rmtree": 1, "orphan": 1, "movedir": 1, "syncdir": 2, "read": 10, "list": 3, "reopen": 2,
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
        self.weights = WEIGHTS | (SHARED_WEIGHTS if args.mode == "shared" else {})

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
        try:
            return fn(*args, **kw)
        except OSError as e:
            if e.errno in DEATH and self.shared.killed[self.mount] == self.generation:
                raise Died from e
            raise
        finally:
            now = time.monotonic()
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

    def forget_handles(self):
        """Close what is open, whatever the answer."""
        for fd in self.handles.values():
            with contextlib.suppress(OSError):
                os.close(fd)
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
        self.forget_handles()
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
        self.forget_handles()
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
            if n != len(view) and not self.generation_killed(self.generation):
                raise AssertionError(f"a write of {len(view)} bytes wrote {n}")
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
                    self.write(
                        number, fd, len(self.model.content(path)), self.random.randbytes(size)
                    )
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
            tmp = self.new_name()
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

    def do_orphan(self):
        """A file that is unlinked while it is open."""
        path = self.new_name()
        self.model.make(path)
        fd = self.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        self.model.ack()
        number, content = self.model.names[path], self.data()
        try:
            self.write(number, fd, 0, content)
            if self.chance(0.5):
                self.sync(number, fd)
            self.model.remove(path)
            self.call("unlink", os.unlink, self.root / path)
            self.model.ack()
            found = self.call("pread", os.pread, fd, len(content) + 1, 0)
            if self.generation_killed(self.generation):
                raise Died
            assert found == content, f"unlinked, still open: {difference(found, content)}"
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

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
        for _ in range(10):
            try:
                found = self.read_file(path)
                break
            except FileNotFoundError:
                assert not least, f"shared/s{slot} is not there, version {least} was published"
                return
            except OSError as e:
                if e.errno != errno.ESTALE:  # replaced elsewhere since it was opened
                    raise
        else:
            raise AssertionError(f"shared/s{slot} is stale whenever it is read")
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


class Database(Worker):
    """A worker that does what a database does to its journal, and as fast as it can."""

    def __init__(self, *args):
        super().__init__(*args)
        self.model = Journal(pages=self.args.mode == "exclusive")
        self.weights = {"commits": 1}
        self.fd = None
        self.segment = 0

    def close_all(self):
        self.forget_handles()

    def forget_handles(self):
        super().forget_handles()
        if self.fd is not None:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = None

    def do_commits(self):
        """Some records, each synced; a new file every 4 MiB, of which the last three stay."""
        name = f"journal{self.segment}"
        size = len(self.model.written.get(name, b""))
        if size > SEGMENT:
            self.forget_handles()
            self.segment += 1
            for old in sorted(self.model.written, key=lambda n: int(n[7:]))[:-2]:
                self.model.remove(old)
                self.call("unlink", os.unlink, self.root / old)
            return
        if self.fd is None:
            self.fd = self.open(name, os.O_RDWR | os.O_CREAT)
        for _ in range(50):
            record = self.random.randbytes(self.random.choice([200, 3000, 8192, 8192, 16384]))
            self.model.write(name, record)
            n = self.call("pwrite", os.pwrite, self.fd, record, size)
            assert n == len(record), f"a record of {len(record)} bytes: {n}"
            self.call("fdatasync", os.fdatasync, self.fd)
            self.model.ack(name)
            size += n
            self.shared.done[self.number] += 1
