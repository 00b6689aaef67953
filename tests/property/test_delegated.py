"""FileSystem under the delegation: as the oracle says, and after a loss a prefix of it.

The operations are those of `test_filesystem`.  In between, another session looks (which recalls
the delegation), messages are lost, checkpoints are made, and the journal is slow.  At the end the
delegation may be revoked: then the volume is what it was after one of the operations, the last
that was made durable or a later one.
"""

import contextlib
import hashlib
import logging

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfs.client import delegation
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.testing.holder_mutants import broken
from dfs.testing.oracle import DIR, LNK, REG
from dfs.volume import items
from dfs.volume.check import check
from tests.conftest import run_seeded
from tests.property.test_filesystem import OPS, Pair, small, volume_items
from tests.unit.client.support import PARAMS, VOLUME, filesystem, new_home, read_file

SIZES = (0, 1, 100, 4096, 4097, 17_000)
MORE = {"look": 1, "lose": 1, "fsync": 2, "fsyncdir": 1, "pause": 2}
op = st.tuples(
    st.sampled_from([name for name, weight in (OPS | MORE).items() for _ in range(weight)]),
    small, small, small, small,
)  # fmt: skip
histories = st.lists(op, max_size=60) | st.lists(op, min_size=25, max_size=60)


@pytest.fixture(autouse=True)
def quiet():
    """Sessions say that they were lost, as they are meant to be."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


quick = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


def same(inode, *more):
    """What is compared of an inode, of the oracle's or of ours."""
    return (inode.kind, inode.mode, inode.uid, inode.gid, inode.nlink, inode.size, *more)


async def tree_of(fs):
    """The volume as `fs` shows it: inode number -> attributes, and content or names."""
    found, pending = {}, [ROOT_INO]
    while pending:
        ino = pending.pop()
        if ino in found:
            continue
        attr, inside = await fs.getattr(ino), None
        if attr.kind == DIR:
            names = await fs.list(ino)
            inside = sorted((name, child.ino) for name, _, child in names)
            pending += [child.ino for _, _, child in names]
        elif attr.kind == REG:
            inside = hashlib.sha256(await read_file(fs, ino)).digest()
        elif attr.kind == LNK:
            inside = await fs.readlink(ino)
        found[ino] = same(attr, inside)
    return found


class Delegated(Pair):
    """The pair, with a holder of the delegation; every write is committed at once."""

    def __init__(self, home, fs):
        super().__init__(home, fs, SIZES)
        self.states = [self.tree()]  # after each step
        self.floor = 0  # number of the oldest state that may be found after a loss

    def tree(self):
        """The oracle's volume, as `tree_of`."""
        found, pending = {}, [self.oracle.root]
        while pending:
            node = pending.pop()
            inside = None
            if node.kind == DIR:
                inside = sorted((name, self.ino(child)) for name, child in node.entries.items())
                pending += node.entries.values()
            elif node.kind == REG:
                inside = hashlib.sha256(node.data).digest()
            elif node.kind == LNK:
                inside = node.target
            found[self.ino(node)] = same(node, inside)
        return found

    async def step(self, what, a, b, c, d):
        if what == "look":
            async with filesystem(self.home, seed=9, mode="ro") as other:
                assert await tree_of(other) == self.tree()
            self.durable()
        elif what == "lose":
            self.fs.rpc.lose_answer = (0.0, 0.3)[a % 2]
            self.fs.rpc.lose_request = (0.0, 0.3)[b % 2]
        elif what == "pause":  # not long enough for all that is behind to be sent
            await trio.sleep(0.03 * (1 + a))
        elif what == "fsyncdir":
            handle = await self.fs.opendir(ROOT_INO)
            await self.fs.fsyncdir(handle)
            await self.fs.releasedir(handle)
            self.durable()
        else:
            await super().step(what, a, b, c, d)
        self.states.append(self.tree())
        if not self.fs.session.statistics()["pending"]:
            self.durable()

    def durable(self):
        """What was done so far cannot be lost."""
        self.floor = len(self.states) - 1

    async def use(self, what, a, b, c, d):
        _, handle = self.handles[a % len(self.handles)]
        if what == "fsync":
            await self.fs.fsync(handle)
            self.durable()
        else:
            await super().use(what, a, b, c, d)
            if what == "write":
                await self.fs.flush(handle)
            elif what == "behind":  # written, and neither flushed nor acknowledged
                await self.fs.write(handle, 0, b"behind")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A few operations fill a batch, so that several wait."""
    monkeypatch.setattr(delegation, "BATCH_BYTES", 600)


@contextlib.asynccontextmanager
async def holder(bits, latency):
    home = new_home()
    home.delegates = True
    async with filesystem(home, hash_bits=bits, delegate=True) as fs:
        for i in range(5):  # enough to be given the delegation, and it leaves nothing
            await fs.mkdir(ROOT_INO, b"warm%d" % i, 0o700)
            await fs.rmdir(ROOT_INO, b"warm%d" % i)
            await trio.sleep(0.2)
        assert fs.session.here
        await fs.session.settle()
        home.latency = latency
        yield home, fs


async def run(steps, bits, latency):
    async with holder(bits, latency) as (home, fs):
        pair = Delegated(home, fs)
        for step in steps:
            await pair.step(*step)
        for _, handle in pair.handles:
            await fs.release(handle)
        pair.handles.clear()
        await pair.compare_all(fs)
        async with filesystem(home, seed=1, hash_bits=bits, delegate=True) as other:
            await pair.compare_all(other)
        left = {key[8] for key in volume_items(home) if key[:8] == bytes(8)}
        assert left <= {items.USAGE}, "orphans were left"


async def run_revoked(steps, bits, latency):
    async with holder(bits, latency) as (home, fs):
        pair = Delegated(home, fs)
        for step in steps:
            await pair.step(*step)
        fs.rpc.lose_answer = fs.rpc.lose_request = 0.0
        home.revoke(VOLUME)
        home.delegates = False
        async with filesystem(home, seed=1, hash_bits=bits, mode="ro") as cold:
            found = await tree_of(cold)
            assert found in pair.states[pair.floor :], "not a prefix of what was done"
            await trio.sleep(5)
            for _, handle in pair.handles:
                with contextlib.suppress(FsError):
                    await fs.release(handle)
            await trio.sleep(5)
            await fs.session.refresh()
            assert await tree_of(fs) == found
            await cold.session.refresh()
            assert await tree_of(cold) == found, "something of before the revocation came after it"
        if bits == items.HASH_BITS:
            assert not check(volume_items(home).items(), PARAMS["salt"]).problems


latencies = st.sampled_from([0.0005, 0.02, 0.1])


@quick
@given(histories, st.sampled_from([63, 63, 2]), latencies)
def test_does_what_the_oracle_does(steps, bits, latency):
    run_seeded(run, steps, bits, latency)


@quick
@given(histories, st.sampled_from([63, 63, 2]), latencies)
def test_what_a_revocation_leaves_is_a_prefix(steps, bits, latency):
    run_seeded(run_revoked, steps, bits, latency)


# ------------------------------------------------------------------------------------ mutants


def made(name):
    return ("create", 1, name, 0, 0)


MANY = [made(0), ("mkdir", 1, 1, 0, 0), made(2), ("rename", 1, 0, 0, 3), made(0), made(4)]
OPEN = [made(0), ("fsyncdir", 0, 0, 0, 0), ("open", 0, 0, 0, 0)]
MUTANTS = {
    "newest_first": ([*MANY, ("pause", 3, 0, 0, 0)], run_revoked),
    "early_sync": ([made(0), ("fsyncdir", 0, 0, 0, 0)], run_revoked),
    "returned_first": ([*MANY, ("look", 0, 0, 0, 0)], run),
    "view_kept": ([made(0)], run_revoked),
    "data_kept": ([*OPEN, ("behind", 0, 0, 0, 1)], run_revoked),
    "late_values": ([*MANY, ("pause", 3, 0, 0, 0)], run_revoked),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_oracle_sees_a_broken_holder(mutant):
    steps, how = MUTANTS[mutant]

    def run_often():  # the order of tasks decides whether it shows
        for seed in range(20):
            run_seeded(how, steps, 63, 0.1, seed=seed)

    run_seeded(how, steps, 63, 0.1)
    with broken(mutant), pytest.raises(BaseException) as caught:  # noqa: PT011 - a group of any
        run_often()
    assert caught.group_contains((AssertionError, FsError, KeyError), depth=None)
