"""FileSystem on the in-memory cluster does what the POSIX oracle does, errno included."""

import errno

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dfs.client import namespace
from dfs.client.files import Files
from dfs.client.filesystem import Caller
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.testing.oracle import DIR, FIFO, LNK, REG, Oracle
from dfs.volume import items, tree
from dfs.volume.check import check
from tests.conftest import run_seeded
from tests.unit.client.support import PARAMS, VOLUME, filesystem, names, new_home, read_file

NAMES = (b"a", b"b", b"c", b"d", b"x" * 255, b"x" * 256)
SIZES = (0, 1, 100, 4096, 4097, 70_000, (4 << 20) - 5, (4 << 20) + 9)
OPS = {
    "create": 6,
    "mkdir": 5,
    "symlink": 1,
    "mknod": 1,
    "link": 4,
    "unlink": 3,
    "rmdir": 3,
    "rename": 6,
    "noreplace": 1,
    "exchange": 3,
    "write": 6,
    "read": 3,
    "truncate": 3,
    "chmod": 1,
    "chown": 2,
    "stat": 2,
    "list": 2,
    "open": 2,
    "close": 2,
    "flush": 2,
    "checkpoint": 1,
    "wait": 1,
}
small = st.integers(0, 7)
op = st.tuples(
    st.sampled_from([name for name, weight in OPS.items() for _ in range(weight)]),
    small, small, small, small,
)  # fmt: skip
quick = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Pair:
    """A FileSystem and the oracle, run side by side."""

    def __init__(self, home, fs, sizes=SIZES):
        self.home = home
        self.fs = fs
        self.sizes = sizes
        self.oracle = Oracle()
        self.nodes = [self.oracle.root]  # every node that ever was
        self.inos = {id(self.oracle.root): ROOT_INO}
        self.handles = []  # (node, handle)

    def ino(self, node):
        return self.inos[id(node)]

    def pick(self, i, *kinds):
        found = [n for n in self.nodes if not kinds or n.kind in kinds]
        return found[-1 - i % len(found)] if found else None

    async def both(self, expected, actual):
        """Run one operation on both; returns (oracle's result, our result) or None for an error."""
        try:
            want, want_error = expected(), None
        except OSError as e:
            want, want_error = None, e.errno
        try:
            got, got_error = await actual(), None
        except FsError as e:
            got, got_error = None, e.errno
        name = errno.errorcode.get
        assert got_error == want_error, f"{name(got_error or 0)} instead of {name(want_error or 0)}"
        return None if want_error else (want, got)

    async def made(self, done):
        if done is not None:
            node, attr = done
            self.nodes.append(node)
            self.inos[id(node)] = attr.ino

    async def step(self, what, a, b, c, d):
        fs, oracle, name, other = self.fs, self.oracle, NAMES[b % 6], NAMES[d % 6]
        where = self.pick(a, DIR) if a % 4 else self.pick(a)
        if where.kind != DIR and not self.alive(where):
            where = oracle.root  # nobody can know what a file's number that is gone stood for
        there = self.pick(c, DIR)
        anything = self.pick(c)
        file = self.pick(c, REG)
        caller = Caller(a, c)
        if what == "create":

            async def create():
                attr, handle = await fs.create(self.ino(where), name, 0o644 | d << 9, caller)
                await fs.release(handle)
                return attr

            await self.made(
                await self.both(lambda: oracle.make(where, name, REG, 0o644 | d << 9, a, c), create)
            )
        elif what == "mkdir":
            await self.made(
                await self.both(
                    lambda: oracle.make(where, name, DIR, 0o700 | (d & 2) << 9, a, c),
                    lambda: fs.mkdir(self.ino(where), name, 0o700 | (d & 2) << 9, caller),
                )
            )
        elif what == "symlink":
            done = await self.both(
                lambda: oracle.make(where, name, LNK, 0o777, a, c),
                lambda: fs.symlink(self.ino(where), name, b"t" * (1 + d), caller),
            )
            if done:
                done[0].target = b"t" * (1 + d)
            await self.made(done)
        elif what == "mknod":
            await self.made(
                await self.both(
                    lambda: oracle.make(where, name, FIFO, 0o600, a, c),
                    lambda: fs.mknod(self.ino(where), name, FIFO << 12 | 0o600, 0, caller),
                )
            )
        elif what == "link":
            if self.alive(anything):
                await self.both(
                    lambda: oracle.link(anything, where, name),
                    lambda: fs.link(self.ino(anything), self.ino(where), name),
                )
        elif what == "unlink":
            await self.both(
                lambda: oracle.unlink(where, name), lambda: fs.unlink(self.ino(where), name)
            )
        elif what == "rmdir":
            await self.both(
                lambda: oracle.rmdir(where, name), lambda: fs.rmdir(self.ino(where), name)
            )
        elif what in ("rename", "noreplace", "exchange"):
            flags = {"rename": 0, "noreplace": 1, "exchange": 2}[what]
            await self.both(
                lambda: oracle.rename(where, name, there, other, flags),
                lambda: fs.rename(self.ino(where), name, self.ino(there), other, flags),
            )
        elif what in ("chmod", "chown", "stat") and self.alive(anything):
            if what == "chmod":
                await fs.setattr(self.ino(anything), mode=0o6010 | b)
                anything.mode = 0o6010 | b
            elif what == "chown":
                await fs.setattr(self.ino(anything), uid=b, gid=d)
                oracle.chown(anything, b, d)
            await self.compare(anything)
        elif what == "truncate" and self.alive(anything):
            size = self.sizes[b % len(self.sizes)]
            await self.both(
                lambda: oracle.truncate(anything, size),
                lambda: fs.setattr(self.ino(anything), size=size),
            )
        elif what == "list" and where.kind == DIR and not where.removed:
            assert await names(fs, self.ino(where)) == sorted(where.entries)
        elif what == "open" and file is not None and self.alive(file):
            handle = await fs.open(self.ino(file), readable=True, writable=True)
            self.handles.append((file, handle))
        elif what == "checkpoint":
            self.home.checkpoint(VOLUME)
        elif what == "wait":
            await trio.sleep(0.4 * a)
        elif self.handles:
            await self.use(what, a, b, c, d)

    async def use(self, what, a, b, c, d):
        """Operations on open files."""
        file, handle = self.handles[a % len(self.handles)]
        offset = self.sizes[b % len(self.sizes)]
        if what == "write":
            data = bytes([65 + c]) * SIZES[d % 6]
            assert await self.fs.write(handle, offset, data) == len(data)
            self.oracle.write(file, offset, data)
        elif what == "read":
            got = bytes(await self.fs.read(handle, offset, SIZES[d]))
            assert got == self.oracle.read(file, offset, SIZES[d])
        elif what == "flush":
            await self.fs.flush(handle)
        elif what == "close":
            await self.fs.release(handle)
            self.handles.remove((file, handle))

    def alive(self, node):
        if node.kind == DIR:
            return not node.removed
        return node.names > 0 or any(n is node for n, _ in self.handles)

    async def compare(self, node):
        attr = await self.fs.getattr(self.ino(node))
        want = (node.kind, node.uid, node.gid, node.nlink, node.size)
        assert (attr.kind, attr.uid, attr.gid, attr.nlink, attr.size) == want
        assert oct(attr.mode) == oct(node.mode)

    async def compare_all(self, fs):
        """The whole tree as `fs` shows it."""
        old, self.fs = self.fs, fs
        reached, pending = set(), [self.oracle.root]
        while pending:
            node = pending.pop()
            if id(node) in reached:
                continue
            reached.add(id(node))
            await self.compare(node)
            if node.kind == DIR:
                assert await names(fs, self.ino(node)) == sorted(node.entries)
                for name, child in node.entries.items():
                    assert (await fs.lookup(self.ino(node), name)).ino == self.ino(child)
                pending += node.entries.values()
                if node.parent is not None:
                    above = await fs.lookup(self.ino(node), b"..")
                    assert above.ino == self.ino(node.parent)
            elif node.kind == REG:
                assert await read_file(fs, self.ino(node)) == bytes(node.data)
            elif node.kind == LNK:
                assert await fs.readlink(self.ino(node)) == node.target
        self.fs = old
        await fs.files.flush_all()  # what close left to the next commit
        stats = await fs.statfs()
        files = [n for n in self.nodes if id(n) in reached]
        assert stats.inodes == len(files)
        assert stats.used == sum(n.size for n in files if n.kind == REG)
        return len(files)


async def run(steps, bits):
    home = new_home()
    async with filesystem(home, hash_bits=bits) as fs:
        pair = Pair(home, fs)
        for step in steps:
            await pair.step(*step)
        for _, handle in pair.handles:
            await fs.release(handle)
        pair.handles.clear()
        await pair.compare_all(fs)
        async with filesystem(home, seed=1, hash_bits=bits) as other:
            await other.session.refresh()
            count = await pair.compare_all(other)
            home.checkpoint(VOLUME)
        async with filesystem(home, seed=2, hash_bits=bits, mode="ro") as cold:
            await pair.compare_all(cold)
        left = {key[8] for key in volume_items(home) if key[:8] == bytes(8)}
        assert left <= {items.USAGE}, "orphans were left"
        inodes = [key for key in volume_items(home) if key[8] == items.INODE]
        assert len(inodes) == count, "inodes that no name leads to"
        check_backlinks(home, bits)


def volume_items(home):
    volume = home.volumes[VOLUME]
    home.checkpoint(VOLUME)
    return dict(tree.scan(lambda name: tree.decode(home.blobs.stored[name]), volume.root))


def check_backlinks(home, bits):
    """Each file's names are its primary one plus its BACKLINKs, and nothing else."""
    found = volume_items(home)
    if bits == items.HASH_BITS:
        assert not check(found.items(), PARAMS["salt"]).problems
    places, recorded = {}, {}
    for key, value in found.items():
        ino, kind, _ = items.split_key(key)
        if kind == items.ENTRY:
            for name, child, _ in items.decode_entries(value):
                places.setdefault(child, set()).add((ino, name))
        elif kind == items.BACKLINK:
            for name in items.decode_backlinks(value):
                recorded.setdefault(ino, set()).add((items.suffix_u64(key), name))
    for ino, where in places.items():
        inode = items.Inode.decode(found[items.inode_key(ino)])
        extra = recorded.pop(ino, set())
        assert extra <= where
        assert [p for p, _ in where - extra] == [inode.parent]
        assert inode.kind == items.DIR or inode.nlink == len(where)
    assert not recorded, "backlinks of inodes without names"


# A write ends set-user-ID when it returns.  With so many steps the last commit is still under way at
# the first look, as it is on a slow network.
BEHIND = [
    ("create", 0, 0, 0, 4),
    *[("create", 0, 0, 0, 0)] * 16,
    ("open", 0, 0, 0, 0),
    ("write", 0, 0, 0, 1),
]


# A list without a least size is short as a rule, five steps; what needs a history needs more.
histories = st.lists(op, max_size=40) | st.lists(op, min_size=15, max_size=40)


@quick
@example(BEHIND, 63)
@given(histories, st.sampled_from([63, 63, 2]))
def test_does_what_the_oracle_does(steps, bits):
    run_seeded(run, steps, bits)


def break_promotion(monkeypatch):
    monkeypatch.setattr(namespace.Namespace, "_promote_backlink", lambda *_: ROOT_INO)


def break_loops(monkeypatch):
    monkeypatch.setattr(namespace.Namespace, "_ancestors", lambda *_: set())


def break_usage(monkeypatch):
    monkeypatch.setattr(namespace.Namespace, "charge", lambda *_: None)


def break_cut(monkeypatch):
    monkeypatch.setattr(Files, "overlay", lambda _, attr: attr)


def break_privileges(monkeypatch):
    real = Files.overlay

    def overlay(self, attr):
        mode = attr.mode
        real(self, attr).mode = mode
        return attr

    monkeypatch.setattr(Files, "overlay", overlay)


def break_orphans(monkeypatch):
    monkeypatch.setattr(Files, "is_open", lambda *_: False)


# Each mutant with steps that find it.
d, f = ("mkdir", 1, 0, 0, 0), ("create", 1, 1, 0, 0)
WRITE = ("open", 0, 0, 0, 0), ("write", 0, 0, 0, 2)
MUTANTS = [
    (break_promotion, [d, f, ("link", 2, 0, 0, 0), ("unlink", 1, 1, 0, 0)]),
    (break_loops, [d, ("rename", 1, 0, 0, 1)]),
    (break_usage, [f]),
    (break_cut, [f, *WRITE, ("stat", 0, 0, 0, 0)]),
    (break_privileges, [("create", 1, 1, 0, 4), *WRITE, ("stat", 0, 0, 0, 0)]),
    (break_orphans, [f, ("open", 0, 0, 0, 0), ("unlink", 1, 1, 0, 0), ("stat", 0, 0, 0, 0)]),
]


@pytest.mark.parametrize(("mutant", "steps"), MUTANTS, ids=lambda m: getattr(m, "__name__", ""))
def test_the_oracle_sees_a_broken_file_system(monkeypatch, mutant, steps):
    run_seeded(run, steps, 63)
    mutant(monkeypatch)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group of any of these
        run_seeded(run, steps, 63)
    assert caught.group_contains((AssertionError, FsError, KeyError), depth=None)
