"""Large directories are listed by name, and with attributes to who looks at them."""

import contextlib
import os

import pytest
from localcluster import wait_until

from tests.mount.test_adapter import mount  # noqa: F401 - a fixture

pytestmark = pytest.mark.mount
COUNT = 3000  # the kernel asks for some 800 at a time
WANTED = {f"f{n}" for n in range(COUNT)}


@pytest.fixture
def large(mount):  # noqa: F811 - the fixture
    """A mount that takes 100 entries for many, and whose kernel has seen none of 3000."""
    m = mount("large")
    m.other("fill", "f", str(COUNT))
    wait_until(lambda: len(os.listdir(m.path)) == COUNT, 10, "all of another client's names")
    return m


def lookups(m):
    """Requests for a name so far."""
    return int(m.other("lookups"))


def test_who_wants_names_gets_names_numbers_and_types(large):
    os.mkdir(large.path / "sub")
    before = lookups(large)
    with os.scandir(large.path) as entries:
        found = {e.name: (e.inode(), e.is_dir(follow_symlinks=False)) for e in entries}
    assert lookups(large) == before
    assert set(found) == WANTED | {"sub"}
    for name in ("f0", "f7", "f2999", "sub"):
        s = os.stat(large.path / name)
        assert found[name] == (s.st_ino, name == "sub")
    assert lookups(large) - before in (2, 3, 4)  # sub was seen before
    assert large.unmount() == 0


def test_who_looks_at_entries_is_given_attributes_after_a_page(large):
    before = lookups(large)
    with os.scandir(large.path) as entries:
        modes = {e.name: e.stat(follow_symlinks=False).st_mode for e in entries}
    assert modes == dict.fromkeys(WANTED, 0o100640)
    assert 400 < lookups(large) - before < 1200
    before = lookups(large)
    assert set(os.listdir(large.path)) == WANTED
    assert lookups(large) == before
    assert large.unmount() == 0


def test_every_name_comes_once_while_others_come_and_go_and_some_are_looked_at(large):
    seen = []
    with os.scandir(large.path) as entries:
        for n, entry in enumerate(entries):
            seen.append(entry.name)
            if n % 1600 < 800:  # interest comes and goes
                with contextlib.suppress(FileNotFoundError):
                    entry.stat(follow_symlinks=False)
            if n % 100 == 0:
                os.mknod(large.path / f"new{n}")
                os.unlink(large.path / f"f{n}")
    assert len(seen) == len(set(seen))
    gone = {f"f{n}" for n in range(0, COUNT, 100)}
    assert {name for name in seen if name.startswith("f")} >= WANTED - gone
    assert set(os.listdir(large.path)) == WANTED - gone | {
        f"new{n}" for n in range(0, len(seen), 100)
    }
    for name in os.listdir(large.path):
        os.unlink(large.path / name)
    assert os.listdir(large.path) == []
    assert large.unmount() == 0
