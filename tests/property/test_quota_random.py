"""Random operations under a quota: it is kept exactly by one client, and no commit ever fails."""

import errno
import random

import pytest
import trio

from dfs.client.quota import Quota
from dfs.errors import FsError
from tests.unit.client.support import filesystem, new_home, read_file

LIMIT = 200_000
NAMES = [b"a", b"b", b"c", b"d"]
STEPS = 120


class Model:
    """What the files are, and how much more there may be."""

    def __init__(self):
        self.files = {}  # name -> content

    def used(self):
        return sum(map(len, self.files.values()))

    def fits(self, name, size):
        return self.used() - len(self.files.get(name, b"")) + size <= LIMIT


async def attempt(refused, call):
    """Run a call that must be refused, or must not; returns its result."""
    code, result = 0, None
    try:
        result = await call
    except FsError as e:
        code = e.errno
    assert code == (errno.EDQUOT if refused else 0)
    return result


async def step(fs, rnd, model, handles):
    """One random operation on one of the files."""
    name = rnd.choice(NAMES)
    data = model.files.get(name)
    if data is None:
        attr, fh = await fs.create(1, name, 0o644)
        model.files[name], handles[name] = b"", (attr.ino, fh)
        return
    ino, fh = handles[name]
    what = rnd.randrange(10)
    if what < 5:
        at = rnd.choice([len(data), rnd.randrange(len(data) + 1), rnd.randrange(LIMIT)])
        new = rnd.randbytes(rnd.choice([10, 3_000, 30_000, 90_000]))
        size = max(len(data), at + len(new))
        refused = size > len(data) and not model.fits(name, size)
        if await attempt(refused, fs.write(fh, at, new)):
            data = data.ljust(at, b"\0")
            model.files[name] = data[:at] + new + data[at + len(new) :]
    elif what < 7:
        size = rnd.randrange(LIMIT)
        refused = size > len(data) and not model.fits(name, size)
        if await attempt(refused, fs.setattr(ino, size=size)):
            model.files[name] = data[:size].ljust(size, b"\0")
    elif what == 7:
        await fs.unlink(1, name)
        await fs.release(fh)
        del model.files[name], handles[name]
    elif what == 8:
        await fs.fsync(fh)
    else:
        await trio.sleep(rnd.choice([0.01, 1.5]))  # the write-back may come


async def run(seed, delegates):
    rnd, home, model, handles = random.Random(seed), new_home(quota_bytes=LIMIT), Model(), {}
    home.delegates = delegates
    async with filesystem(home, delegate=delegates) as fs:
        for _ in range(STEPS):
            await step(fs, rnd, model, handles)
            assert (await fs.statfs()).free == LIMIT - model.used()
        for _, fh in handles.values():
            await fs.fsync(fh)
            await fs.release(fh)
        assert fs.namespace.quota.held == 0
        assert (await fs.statfs()).used == model.used()
        for name, (ino, _) in handles.items():
            assert await read_file(fs, ino) == model.files[name]


@pytest.mark.parametrize("delegates", [False, True])
@pytest.mark.parametrize("seed", range(30))
async def test_a_quota_is_kept_exactly_and_no_commit_fails_for_it(seed, delegates):
    await run(seed, delegates)


class HoldsNothing(Quota):
    """A mutant: what was accepted is not held."""

    def _hold(self, file, end, get):
        super()._hold(file, end, get)
        self.release(file)


class HoldsForEver(Quota):
    """A mutant: what was committed is held on."""

    def settle(self, file, size):
        pass


class ForgetsCuts(Quota):
    """A mutant: what was given up is held on."""

    def release(self, file):
        return 0


class OneMore(Quota):
    """A mutant: a byte more than the limit is let through."""

    def limits(self, get):
        size, inodes = super().limits(get)
        return size + 1, inodes


@pytest.mark.parametrize("mutant", [HoldsNothing, HoldsForEver, ForgetsCuts, OneMore])
async def test_a_quota_that_counts_wrongly_is_found(monkeypatch, mutant):
    monkeypatch.setattr("dfs.client.filesystem.Quota", mutant)
    for seed in range(30):
        try:
            await run(seed, delegates=False)
        except (BaseExceptionGroup, AssertionError):
            return
    raise AssertionError("no seed shows it")
