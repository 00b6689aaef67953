"""Own rows: no damage of a table hides one, whatever happened before; with mutants."""

from dataclasses import replace
from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.errors import ConfigError, Corrupt, DiskFull
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store import own, state
from metadata.store.engine import Store
from metadata.store.maintenance import Maintenance
from metadata.store.options import StoreOptions
from metadata.store.wal import Log

OLDER = StoreOptions(memtable_bytes=6000, block_bytes=400, table_bytes=2000, fanout=2, max_runs=8)
OWN = replace(OLDER, own=b"ns")
MARK = b"nkept"


def make_env(random, disk=None):
    return Env(SystemClock(), disk or SimDisk(random), None, SimProcesses(random), random)


def spoil(disk, every=300):
    """Damage every block of every table."""
    names = [n for n in disk.listdir("lsm") if n.endswith(".sst")]
    for name in names:
        for at in range(20, disk.open(f"lsm/{name}").size(), every):
            disk.flip(f"lsm/{name}", at)
    return names


async def fill(store, count=100, size=60):
    for i in range(count):
        await store.batch([(b"r%04d" % i, b"x" * size)])


async def work(store, seconds=60):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()


async def written(env, options=OWN):
    store = await Store.open(env, options=options)
    await store.batch([(b"nold", b"old"), (b"ngone", b"x"), (b"s/sid", b"7")])
    await store.batch([(b"ngone", None), (b"m", b"sum")])
    await fill(store)
    await store.batch([(b"nnew", b"new")])
    await store.flush()
    return store


FOUND = [(MARK, b"\1"), (b"nnew", b"new"), (b"nold", b"old")]


def check(store):
    assert store.scan(b"n") == FOUND
    assert store.scan(b"nn", after=b"nnew") == []
    assert store.get(b"nold") == b"old"
    assert store.get(b"ngone") is None
    assert store.get(b"nothing") is None
    assert store.get_many([b"s/sid", b"s/other"]) == [b"7", None]
    with store.snapshot() as snapshot:
        assert list(snapshot.iterate(b"n")) == FOUND
        assert snapshot.get(b"nold") == b"old"


@pytest.mark.parametrize("restarts", [0, 1, 2])
@pytest.mark.parametrize("mended", [False, True])
async def test_they_are_read_whatever_is_damaged(restarts, mended):
    random = Random(1)
    env = make_env(random)
    store = await written(env)
    assert spoil(env.disk)
    for _ in range(restarts):
        env.disk.crash()
        store = await Store.open(env, options=OWN)
        check(store)
    await store.verify()
    losses = store.lost()
    assert losses[0][0] < b"n" < losses[-1][1]
    with pytest.raises(Corrupt):
        store.get(b"r0001")
    check(store)
    if mended:
        await work(store)
        check(store)
        for first, last, _ in losses:
            await store.accept_losses(first, last)
        assert store.lost() == []
        check(store)
        assert store.scan(b"", limit=10) == [*FOUND, (b"s/sid", b"7")]
        await store.compact()
        check(await Store.open(env, options=OWN))


async def test_those_of_an_older_store_are_read_from_its_tables_once():
    random = Random(1)
    env = make_env(random)
    await written(env, OLDER)
    store = await Store.open(env, options=OWN)
    check(store)
    assert spoil(env.disk)
    check(store)
    env.disk.crash()
    check(await Store.open(env, options=OWN))


async def test_an_older_store_whose_own_rows_are_damaged_is_refused():
    env = make_env(Random(1))
    await written(env, OLDER)
    spoil(env.disk)
    with pytest.raises(Corrupt, match=r"damaged|undecodable"):
        await Store.open(env, options=OWN)


async def test_a_store_may_be_opened_without_them_in_between():
    """As an older release does: it leaves a memtable behind that has not all of them."""
    env = make_env(Random(1))
    await written(env)
    store = await Store.open(env, options=OLDER)
    await store.batch([(b"nold", b"newer")])
    await fill(store, 250)  # what holds the mark is in a table now
    await store.flush()
    await store.batch([(b"nnew", b"newest")])
    store = await Store.open(env, options=OWN)
    spoil(env.disk)
    assert store.get_many([b"nold", b"nnew", b"ngone", b"s/sid"]) == [
        b"newer",
        b"newest",
        None,
        b"7",
    ]


async def test_more_of_them_than_a_memtable_holds():
    env = make_env(Random(1))
    store = await Store.open(env, options=OWN)
    big = [(b"n%d" % i, bytes(3000)) for i in range(5)]
    await store.batch(big)
    await fill(store, 300)
    await work(store)
    assert 2 <= store.statistics()["flushes"] <= 10
    store = await Store.open(env, options=OWN)
    assert store.scan(b"n") == [*big, (MARK, b"\1")]
    await fill(store, 10)
    await work(store)
    assert store.statistics()["flushes"] <= 1


async def test_flushing_again_writes_no_tables():
    env = make_env(Random(1))
    store = await written(env)
    tables = store.statistics()["tables"]
    for _ in range(3):
        await store.flush()
        assert store.statistics()["tables"] == tables
    await store.batch([(b"nold", b"old")])
    await store.flush()
    assert store.statistics()["tables"] == tables + 1
    empty = await Store.open(make_env(Random(2)), options=OWN)
    await empty.flush()
    assert empty.statistics()["tables"] == 0


async def test_a_disk_that_is_full_when_a_memtable_begins_changes_nothing(monkeypatch):
    env = make_env(Random(1))
    store = await Store.open(env, options=OWN)
    await store.batch([(b"nold", b"old")])
    await fill(store, 20)
    append = Log.append
    with monkeypatch.context() as patched:

        def full(self, payload):
            raise DiskFull("no room")

        patched.setattr(Log, "append", full)
        with pytest.raises(DiskFull):
            await store.flush()
        assert store.statistics()["frozen"] == 0
    assert Log.append is append
    assert store.get(b"nold") == b"old"
    await fill(store, 40)
    await store.flush()
    spoil(env.disk)
    env.disk.crash()
    store = await Store.open(env, options=OWN)
    assert store.get(b"nold") == b"old"


async def _no_sync(self):
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("mutant", [False, True])
async def test_a_flush_waits_until_they_are_durable_elsewhere(mutant, monkeypatch):
    if mutant:
        monkeypatch.setattr(Maintenance, "rule_own_durable", _no_sync)
    lost = 0
    for seed in range(20):
        env = make_env(Random(seed))
        store = await Store.open(env, options=OWN)
        await store.batch([(b"nold", b"old")])
        await store.batch([(b"r", b"")], sync=False)
        await store.flush()
        assert spoil(env.disk)
        env.disk.crash()
        try:
            store = await Store.open(env, options=OWN)
            assert store.get(b"nold") == b"old"
        except Corrupt:
            lost += 1
    assert bool(lost) == mutant


def test_what_cannot_be_own_is_refused():
    with pytest.raises(ConfigError):
        StoreOptions(own=b"n\xff")
    assert own.is_own(b"ns", b"n", b"o")
    assert own.is_own(b"ns", b"nhints", b"nhintt")
    assert not own.is_own(b"ns", b"n", b"o\0")
    assert not own.is_own(b"ns", b"n", b"")
    assert not own.is_own(b"ns", b"", b"o")
    assert not own.is_own(b"ns", b"m", b"n")
    assert not own.is_own(b"", b"n", b"o")


# ------------------------------------------------------------------------------------ power losses


async def lives(seed, crashes=8):
    """One store through power losses, each of which damages every table there is."""
    random = Random(seed)
    disk = SimDisk(random, sync_delay=0.003)
    acked = sent = damaged = 0

    async def write(store):
        nonlocal acked, sent
        while True:
            sent += 1
            rows = [(b"nlast", b"%d" % sent), (b"n%d" % (sent % 50), b"%d" % sent)]
            filler = [(b"r%d" % random.randrange(99), random.randbytes(300)) for _ in range(5)]
            await store.batch([*(rows if random.random() < 0.2 else rows[:1]), *filler])
            acked = sent
            await trio.sleep(random.random() * 0.004)

    async def fillers(store):
        while True:
            await store.batch([(b"r%d" % random.randrange(99), random.randbytes(300))], sync=False)
            await trio.sleep(random.random() * 0.002)

    for _ in range(crashes):
        store = await Store.open(make_env(random, disk), options=OWN)
        last = int(store.get(b"nlast") or 0)
        assert acked <= last <= sent, "an own row is lost"
        assert all(int(value) <= last for key, value in store.scan(b"n") if key != MARK)
        acked = sent = last
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            nursery.start_soon(write, store)
            nursery.start_soon(fillers, store)
            await trio.sleep(random.random() * 0.25)
            if random.random() < 0.85:
                disk.crash()
            nursery.cancel_scope.cancel()
        damaged += len(spoil(disk))
    return damaged


@pytest.mark.parametrize("seed", range(6))
async def test_power_losses_and_damage_take_none(seed):
    assert await lives(seed) > 5


MUTANTS = {
    "memtables begin empty": (own, "rows_of", lambda memtable, first: []),
    "own rows are read from tables": (
        state.State,
        "own",
        property(lambda s: b"", lambda s, v: None),
    ),
    "only the newest memtable is read back": (
        own,
        "gather",
        lambda memtables, first, real=own.gather: real(memtables[:1], first),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
async def test_mutants_are_caught(name, monkeypatch):
    owner, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant, raising=False)
    for seed in range(20):
        try:
            await lives(seed)
        except (AssertionError, Corrupt):
            return
        except ExceptionGroup as e:
            if e.split((AssertionError, Corrupt))[0] is None:
                raise
            return
    pytest.fail(f"nothing noticed that {name}")
