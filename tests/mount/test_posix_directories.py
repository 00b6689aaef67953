"""Reading directories: every entry exactly once, whatever happens meanwhile; big ones."""

import ctypes
import os
import random
import time

import pytest
from localcluster import wait_until

from dfs.client.namespace import Caller, Namespace
from dfs.client.registry import open_volume_by_name
from dfs.client.session import open_session
from dfs.volume.items import REG
from tests.mount.differential import create

pytestmark = pytest.mark.mount

_libc = ctypes.CDLL(None, use_errno=True)
for _name, _result, _arguments in (
    ("opendir", ctypes.c_void_p, [ctypes.c_char_p]),
    ("readdir", ctypes.c_void_p, [ctypes.c_void_p]),
    ("closedir", ctypes.c_int, [ctypes.c_void_p]),
    ("telldir", ctypes.c_long, [ctypes.c_void_p]),
    ("seekdir", None, [ctypes.c_void_p, ctypes.c_long]),
    ("rewinddir", None, [ctypes.c_void_p]),
):
    _fn = getattr(_libc, _name)
    _fn.restype, _fn.argtypes = _result, _arguments
NAME_AT, TYPE_AT = 19, 18  # of struct dirent


class Dir:
    """opendir(3) and friends, one entry at a time."""

    def __init__(self, path):
        self.d = _libc.opendir(os.fsencode(path))
        assert self.d, os.strerror(ctypes.get_errno())

    def read(self):
        """The next name without `.` and `..`, None at the end."""
        while True:
            ctypes.set_errno(0)
            entry = _libc.readdir(self.d)
            if not entry:
                assert not ctypes.get_errno(), os.strerror(ctypes.get_errno())
                return None
            name = ctypes.string_at(entry + NAME_AT)
            if name not in (b".", b".."):
                return name

    def rest(self):
        return list(iter(self.read, None))

    def tell(self):
        return _libc.telldir(self.d)

    def seek(self, at):
        _libc.seekdir(self.d, at)

    def rewind(self):
        _libc.rewinddir(self.d)

    def close(self):
        _libc.closedir(self.d)


def fill(sides, directory, count, name):
    """Make many files at once, as another client of the volume does: a thousand a transaction."""
    parent = os.stat(directory).st_ino
    caller = Caller(0, 0)

    async def work(cluster):
        info = await open_volume_by_name(cluster, "posix")
        async with open_session(cluster, info.volume_id, name="fill") as session:
            namespace = Namespace(session.params["salt"])
            for first in range(0, count, 1000):
                made = [
                    (name(i), session.mint_ino()) for i in range(first, min(first + 1000, count))
                ]

                def op(txn, made=made):
                    for entry, ino in made:
                        namespace.create(txn, parent, entry, REG, 0o644, ino, caller, 10**18)

                await session.transact(op)

    sides.cluster.ask(work)


@pytest.fixture(scope="module")
def crowd(sides):
    """A directory of 20,000 files."""
    top = sides.mount() / "crowd"
    top.mkdir()
    fill(sides, top, 20_000, lambda i: b"entry%05d" % i)
    # Another client's names are seen within a second and a half, not at once.
    wait_until((top / "entry19999").exists, 10, "the last of another client's names")
    return top


WANTED = {b"entry%05d" % i for i in range(20_000)}


def test_a_directory_of_20_000_entries(crowd):
    got = os.listdir(os.fsencode(crowd))
    assert len(got) == 20_000
    assert set(got) == WANTED
    assert os.stat(crowd).st_nlink == 2
    rnd = random.Random(3)
    for i in rnd.sample(range(20_000), 200):
        assert os.stat(crowd / f"entry{i:05}").st_size == 0
    assert not (crowd / "entry20000").exists()


def test_telldir_and_seekdir_come_back_to_any_entry(crowd):
    d = Dir(crowd)
    order, places = [], []
    while True:
        at = d.tell()
        name = d.read()
        if name is None:
            break
        order.append(name)
        places.append(at)
    assert set(order) == WANTED
    assert len(order) == len(WANTED)
    rnd = random.Random(4)
    for i in [0, 1, 19_999, *rnd.sample(range(20_000), 60)]:
        d.seek(places[i])
        assert d.read() == order[i]
    d.seek(places[15_000])
    assert d.rest() == order[15_000:]
    d.rewind()
    assert d.read() in order[:1]
    assert d.rest() == order[1:]
    d.close()


def test_every_entry_exactly_once_while_the_directory_changes(crowd):
    """Names that are there throughout come once; those that come or go, at most once."""
    d = Dir(crowd)
    rnd = random.Random(5)
    seen, round_ = [], 0
    temporary = {b"more%05d" % i for i in range(2000)}
    gone = set()
    while (name := d.read()) is not None:
        seen.append(name)
        if len(seen) % 2000 == 0:  # the kernel holds a buffer of entries: reach beyond it
            for i in range(20):
                os.mknod(crowd / f"more{round_ * 20 + i:05}")
            for i in range(5):
                os.unlink(crowd / f"more{round_ * 20 + i:05}")
            victim = b"entry%05d" % rnd.randrange(20_000)
            if victim not in gone:
                gone.add(victim)
                os.rename(
                    os.path.join(os.fsencode(crowd), victim), os.fsencode(crowd) + b"/../moved"
                )
                os.rename(
                    os.fsencode(crowd) + b"/../moved", os.path.join(os.fsencode(crowd), victim)
                )
            round_ += 1
    d.close()
    counts = {name: seen.count(name) for name in gone}
    assert len(seen) == len(set(seen)) + sum(max(0, c - 1) for c in counts.values())
    assert WANTED - gone <= set(seen)  # those renamed away and back may have been missed
    assert set(seen) <= WANTED | temporary
    for entry in os.scandir(crowd):
        if entry.name.startswith("more"):
            os.unlink(entry.path)


def test_removing_while_reading_removes_everything(mnt):
    """What rm -r and `find -delete` do."""
    for i in range(400):
        os.mknod(mnt / f"{i}")
    d = Dir(mnt)
    count = 0
    while (name := d.read()) is not None:
        os.unlink(os.path.join(os.fsencode(mnt), name))
        count += 1
    d.close()
    assert count == 400
    assert os.listdir(mnt) == []


def test_two_readers_of_one_directory_have_places_of_their_own(crowd):
    a, b = Dir(crowd), Dir(crowd)
    first = [a.read() for _ in range(3000)]
    assert [b.read() for _ in range(100)] == first[:100]
    assert set(first) | set(a.rest()) == WANTED
    assert set(first[:100]) | set(b.rest()) == WANTED
    a.close()
    b.close()


def test_types_in_directory_entries_and_numbers_are_those_of_stat(mnt):
    os.mkdir(mnt / "d")
    create(mnt / "f")
    os.symlink("f", mnt / "l")
    os.mkfifo(mnt / "p")
    for entry in os.scandir(mnt):
        s = os.lstat(entry.path)
        assert entry.inode() == s.st_ino
        assert (entry.is_dir(follow_symlinks=False), entry.is_symlink()) == (
            entry.name == "d",
            entry.name == "l",
        )
    d = ctypes.c_void_p(_libc.opendir(os.fsencode(mnt / "d")))
    found = {}
    while entry := _libc.readdir(d):
        found[ctypes.string_at(entry + NAME_AT)] = int.from_bytes(
            ctypes.string_at(entry, 8), "little"
        )
    _libc.closedir(d)
    assert found == {b".": os.stat(mnt / "d").st_ino, b"..": os.stat(mnt).st_ino}


@pytest.mark.slow
def test_a_directory_of_a_million_entries(sides):
    """Opt-in: makes them, reads them, finds some, and says how long each took."""
    top = sides.mount() / "million"
    top.mkdir()
    began = time.monotonic()
    fill(sides, top, 1_000_000, lambda i: b"%07d" % i)
    made = time.monotonic()
    names = os.listdir(top)
    read = time.monotonic()
    assert len(names) == 1_000_000
    assert len(set(names)) == 1_000_000
    for i in random.Random(1).sample(range(1_000_000), 1000):
        assert os.stat(top / f"{i:07}").st_size == 0
    print(f"made in {made - began:.0f} s, read in {read - made:.0f} s")
