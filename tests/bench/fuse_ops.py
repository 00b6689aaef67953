"""CPU of the FUSE adapter itself, per handler, without a kernel and without a cluster.

    python tests/bench/fuse_ops.py [--rounds N] [NAME...]

The file system behind it answers at once from a table, so what is left is decoding, the wrapper, the
inode table and the encoding of attributes.  Times are the best of some runs, in microseconds per call
(for readdir: per entry), with the time of the bare fake subtracted as "own".
"""

import argparse
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

from dfs.client.attributes import Attr
from dfs.volume import items
from dfs.volume.items import DIR, REG, Inode
from fuse import operations
from fuse.operations import Operations

RUNS = 7
ENTRIES = 256  # of the directory that readdir reads
CTX = SimpleNamespace(uid=0, gid=0, pid=1, umask=0o022)


def drive(coroutine):
    """Run a coroutine that never waits, as cheaply as a trio task's step."""
    try:
        coroutine.send(None)
    except StopIteration as e:
        return e.value
    raise RuntimeError("it waited")


class FakeFileSystem:
    """Answers at once; every method costs a call and nothing else."""

    def __init__(self):
        clock = SimpleNamespace(time_ns=time.time_ns)
        self.session = SimpleNamespace(
            on_change=lambda fn: None, cluster=SimpleNamespace(clock=clock), exclusive=False
        )
        self.namespace = SimpleNamespace(
            cookie=lambda name: items.name_hash(b"salt" * 4, name), salt=b"salt" * 4
        )
        now = time.time_ns()
        make = lambda ino, kind: Attr(
            ino, Inode(kind, 0o644, 1, 2, 0, 1234, 1, now, now, now, now, 1)
        )
        self.attr = make(1 << 40, REG)
        self.top = make(1, DIR)
        self.entries = [
            (
                b"entry%04d" % i,
                items.name_hash(b"salt" * 4, b"entry%04d" % i),
                make((1 << 41) + i, REG),
            )
            for i in range(ENTRIES)
        ]
        self.entries.sort(key=lambda e: e[1])
        self.data = bytes(131_072)

    async def lookup(self, parent, name):
        return self.top if name in (b".", b"..") else self.attr

    async def find(self, parent, name):
        return self.attr

    async def getattr(self, ino):
        return self.attr

    async def setattr(self, ino, **fields):
        return self.attr

    async def create(self, *args, **kw):
        return self.attr, 7

    async def mkdir(self, *args):
        return self.attr

    async def unlink(self, parent, name):
        return None

    async def open(self, ino, **kw):
        return 7

    async def read(self, handle, offset, length):
        return self.data

    async def write(self, handle, offset, data):
        return len(data)

    async def flush(self, handle):
        return None

    async def release(self, handle):
        return None

    async def opendir(self, ino):
        return 8

    async def releasedir(self, handle):
        return None

    async def readdir(self, handle, cookie, limit):
        return self.entries if cookie < 3 else []

    def returned(self, handle, name, cookie):
        return None


class Told:
    """An invalidator with nothing to do."""

    def prune(self, inos):
        pass

    def is_pending(self, ino):
        return False


def cases(on, fs):
    """name -> (the handler's call, what of it is the file system's, units per call)."""
    flags = os.O_RDWR
    fields = SimpleNamespace(
        update_mode=True, update_uid=False, update_gid=False, update_size=False, update_atime=False,
        update_mtime=False, update_ctime=False,
    )  # fmt: skip
    wanted = SimpleNamespace(st_mode=0o100644)
    piece = bytes(4096)
    fh = drive(on.opendir(1, CTX))

    async def listing():
        await fs.readdir(fh, 2, 256)

    return {
        "lookup": (lambda: on.lookup(1, b"some-name.txt", CTX), lambda: fs.lookup(1, b"n"), 1),
        "getattr": (lambda: on.getattr(1 << 40, CTX), lambda: fs.getattr(1), 1),
        "setattr": (
            lambda: on.setattr(1 << 40, wanted, fields, None, CTX),
            lambda: fs.setattr(1),
            1,
        ),
        "create": (lambda: on.create(1, b"new", 0o644, flags, CTX), lambda: fs.create(1, b"n"), 1),
        "mkdir": (lambda: on.mkdir(1, b"new", 0o755, CTX), lambda: fs.mkdir(1, b"n"), 1),
        "unlink": (lambda: on.unlink(1, b"new", CTX), lambda: fs.unlink(1, b"n"), 1),
        "open": (lambda: on.open(1 << 40, flags, CTX), lambda: fs.open(1), 1),
        "read": (lambda: on.read(7, 0, 131_072), lambda: fs.read(7, 0, 1), 1),
        "write": (lambda: on.write(7, 0, piece), lambda: fs.write(7, 0, piece), 1),
        "flush": (lambda: on.flush(7), lambda: fs.flush(7), 1),
        "release": (lambda: on.release(7), lambda: fs.release(7), 1),
        "forget": (lambda: on.forget([(1 << 40, 1)]), lambda: fs.flush(7), 1),
        "readdir": (lambda: on.readdir(fh, 2, None), listing, ENTRIES),
    }


def best(make, count):
    """Seconds of CPU per call, the best of some runs."""
    found = []
    for _ in range(RUNS):
        began = time.process_time()
        for _ in range(count):
            drive(make())
        found.append((time.process_time() - began) / count)
    return min(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    operations.pyfuse3.readdir_reply = lambda *_: True  # needs a request of the kernel's
    fs = FakeFileSystem()
    on = Operations(fs, Told())
    print(f"{'handler':10} {'total':>8} {'own':>8}  us")
    for name, (handler, bare, units) in cases(on, fs).items():
        if arguments.names and name not in arguments.names:
            continue
        count = max(20, arguments.rounds // units)
        total, below = best(handler, count), best(bare, count)
        print(f"{name:10} {1e6 * total / units:8.2f} {1e6 * (total - below) / units:8.2f}")


if __name__ == "__main__":
    main()
