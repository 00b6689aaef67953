"""Two clients that work on one volume at the same time end up with the same, consistent volume."""

import errno
import random

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfs.client.committer import Committer
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.volume import tree
from dfs.volume.check import check
from tests.conftest import run_seeded
from tests.unit.client.support import PARAMS, VOLUME, filesystem, names, new_home, read_file

NAMES = (b"a", b"b", b"c")
EXPECTED = {
    errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL,
    errno.ESTALE, errno.EPERM, errno.EIO,
}  # fmt: skip


async def work(fs, rng, steps):
    """Random operations on whatever is found; every error must be one that a program expects."""
    for _ in range(steps):
        try:
            await one(fs, rng)
        except FsError as e:
            assert e.errno in EXPECTED, errno.errorcode[e.errno]  # noqa: PT017 - it need not be raised
        if rng.random() < 0.2:
            await trio.sleep(rng.random() * 0.01)


async def one(fs, rng):
    parent, name = await somewhere(fs, rng), rng.choice(NAMES)
    what = rng.randrange(7)
    if what == 0:
        _, fh = await fs.create(parent, name, 0o644, exclusive=rng.random() < 0.5)
        try:
            await fs.write(fh, rng.randrange(9000), rng.randbytes(rng.randrange(1, 9000)))
            await fs.flush(fh)
        finally:
            await fs.release(fh)
    elif what == 1:
        await fs.mkdir(parent, name, 0o755)
    elif what == 2:
        await fs.unlink(parent, name)
    elif what == 3:
        await fs.rmdir(parent, name)
    elif what == 4:
        other = await somewhere(fs, rng)
        await fs.rename(parent, name, other, rng.choice(NAMES), rng.choice((0, 0, 1, 2)))
    elif what == 5:
        attr = await fs.lookup(parent, name)
        await fs.link(attr.ino, await somewhere(fs, rng), rng.choice(NAMES))
    else:
        attr = await fs.lookup(parent, name)
        await fs.setattr(attr.ino, size=rng.randrange(9000) if attr.is_file else None, mode=0o600)


async def somewhere(fs, rng):
    ino = ROOT_INO
    while rng.random() < 0.5:
        try:
            attr = await fs.lookup(ino, rng.choice(NAMES))
        except FsError:
            break
        if not attr.is_dir:
            break
        ino = attr.ino
    return ino


async def content(fs, ino, seen):
    """Everything below a directory, by value."""
    found = {}
    for name in await names(fs, ino):
        attr = await fs.lookup(ino, name)
        key = (attr.kind, attr.mode, attr.nlink, attr.size, attr.mtime)
        if attr.is_dir:
            assert attr.ino not in seen, "a directory with two names"
            seen.add(attr.ino)
            found[name] = key, await content(fs, attr.ino, seen)
        else:
            found[name] = key, await read_file(fs, attr.ino)
    return found


async def run(seed, lossy):
    home, rng = new_home(), random.Random(seed)
    async with filesystem(home, seed=1) as a, filesystem(home, seed=2) as b:
        for fs in (a, b):
            fs.rpc.lose_answer = fs.rpc.lose_request = lossy
            fs.rpc.delay = rng.random() * 0.003
        async with trio.open_nursery() as nursery:
            for fs in (a, b):
                for _ in range(2):
                    nursery.start_soon(work, fs, random.Random(rng.random()), 25)
            await trio.sleep(0.1)
            home.checkpoint(VOLUME)
        for fs in (a, b):
            fs.rpc.lose_answer = fs.rpc.lose_request = 0
            await fs.session.refresh()
        seen = await content(a, ROOT_INO, set())
        assert seen == await content(b, ROOT_INO, set())
        async with filesystem(home, seed=3) as cold:
            assert seen == await content(cold, ROOT_INO, set())
    home.checkpoint(VOLUME)
    root = home.volumes[VOLUME].root
    stored = tree.scan(lambda name: tree.decode(home.blobs.stored[name]), root)
    assert not check(stored, PARAMS["salt"]).problems
    return a.session.statistics()["conflicts"] + b.session.statistics()["conflicts"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.sampled_from([0, 0.1]))
def test_clients_converge(seed, lossy):
    run_seeded(run, seed, lossy, seed=seed)


def test_it_sees_clients_that_ignore_each_other(monkeypatch):
    """A client that sends no reads, so that nobody notices conflicts."""
    real = Committer._request

    def request(self, txns, *rest):
        return real(self, tuple(((), (), effects) for _, _, effects in txns), *rest)

    monkeypatch.setattr(Committer, "_request", request)

    def several():
        for seed in range(20):
            run_seeded(run, seed, 0, seed=seed)

    with pytest.raises((BaseExceptionGroup, AssertionError, RecursionError)):
        several()
