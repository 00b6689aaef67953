"""Damaged tables: right answers or a loud loss, never wrong bytes; the intact part stays."""

from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.errors import Corrupt, DiskFull
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store.engine import Store
from metadata.store.options import StoreOptions
from metadata.store.reader import Run

SMALL = StoreOptions(memtable_bytes=8000, block_bytes=500, table_bytes=6000, fanout=3)


def make_env(seed=1):
    random = Random(seed)
    return Env(SystemClock(), SimDisk(random), None, SimProcesses(random), random)


async def filled(env, count=300, size=60):
    """A store whose data is in tables, and its model."""
    store = await Store.open(env, options=SMALL)
    model = {}
    for i in range(count):
        key, value = b"%04d" % i, env.random.randbytes(size)
        model[key] = value
        await store.batch([(key, value)])
    await store.flush()
    return store, model


def tables(disk):
    return [n for n in disk.listdir("lsm") if n.endswith(".sst")]


def audit(store, model):
    """Keys that are lost; everything else must be right."""
    lost = set()
    for key, value in model.items():
        try:
            assert store.get(key) == value
        except Corrupt:
            lost.add(key)
    return lost


async def work(store, seconds=100):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()


async def test_one_bad_block_loses_one_block():
    env = make_env()
    _, model = await filled(env)
    name = tables(env.disk)[0]
    env.disk.flip(f"lsm/{name}", 700)
    store = await Store.open(env, options=SMALL)
    lost = audit(store, model)
    assert 0 < len(lost) < 20
    assert audit(store, model) == lost
    assert store.quarantined == [name]
    assert any(name in e and "damaged block" in e for e in store.errors)
    with pytest.raises(Corrupt, match="damaged block"):
        store.scan(b"", limit=1000)
    safe = min(k for k in model if k > max(lost))
    assert store.scan(b"", limit=2) == sorted(model.items())[:2] or b"0000" in lost
    assert store.scan(b"", after=safe, limit=1000) == sorted(
        (k, v) for k, v in model.items() if k > safe
    )

    await work(store)  # salvage
    assert env.disk.exists(f"lsm/{name}.bad")
    assert not env.disk.exists(f"lsm/{name}")
    assert audit(store, model) == lost
    assert store.statistics()["lost_ranges"] == 1
    with pytest.raises(Corrupt, match="damaged table"):
        store.scan(b"", limit=1000)
    again = await Store.open(env, options=SMALL)
    assert again.quarantined == [name]
    assert audit(again, model) == lost

    for key in lost:  # repair, by whoever has the data
        await again.batch([(key, model[key])])
    assert audit(again, model) == set()
    await again.compact()
    assert audit(again, model) == set()
    with pytest.raises(Corrupt):
        again.get(min(lost) + b"never was")  # nobody can know
    assert await again.accept_losses() == 1
    assert again.get(min(lost) + b"never was") is None
    assert again.scan(b"", limit=1000) == sorted(model.items())


@pytest.mark.parametrize("where", ["footer", "index", "missing", "short"])
async def test_a_table_that_cannot_be_opened_loses_its_range(where):
    env = make_env()
    _, model = await filled(env)
    name = tables(env.disk)[1]
    path = f"lsm/{name}"
    size = env.disk.open(path).size()
    if where == "missing":
        env.disk.unlink(path)
    elif where == "short":
        env.disk.open(path).truncate(size // 2)
    else:
        env.disk.flip(path, size - (10 if where == "footer" else 120))
    store = await Store.open(env, options=SMALL)
    lost = audit(store, model)
    assert 10 < len(lost) < 200
    assert store.quarantined == [name]
    await work(store)
    assert audit(store, model) == lost
    again = await Store.open(env, options=SMALL)
    assert audit(again, model) == lost
    await again.compact()
    assert audit(again, model) == lost
    assert name not in tables(env.disk)


async def test_newer_values_hide_older_damage_and_older_values_never_replace_newer():
    env = make_env()
    store, model = await filled(env, 60)
    old = set(tables(env.disk))
    newer = dict.fromkeys(model, b"new" * 10)
    await store.batch(list(newer.items()))
    await store.flush()
    (young,) = set(tables(env.disk)) - old
    for name in old:
        env.disk.flip(f"lsm/{name}", 100)
    store = await Store.open(env, options=SMALL)
    assert audit(store, newer) == set()
    env.disk.flip(f"lsm/{young}", 100)
    store = await Store.open(env, options=SMALL)
    lost = audit(store, newer)
    assert lost
    await work(store)
    await store.compact()
    assert audit(store, newer) == lost  # an old value in a merge would show here


async def test_a_lost_deletion_does_not_bring_the_value_back():
    env = make_env()
    store, model = await filled(env, 60)
    old = set(tables(env.disk))
    await store.batch([(k, None) for k in model])
    await store.flush()
    (young,) = set(tables(env.disk)) - old
    env.disk.flip(f"lsm/{young}", 30)
    store = await Store.open(env, options=SMALL)
    gone = dict.fromkeys(model)
    lost = audit(store, gone)
    assert lost
    await store.compact()
    assert audit(store, gone) == lost


async def test_compaction_that_meets_damage_salvages_first():
    env = make_env()
    store, model = await filled(env, 100)
    name = tables(env.disk)[0]
    env.disk.flip(f"lsm/{name}", 700)
    store = await Store.open(env, options=SMALL)  # nobody reads: only the merge finds it
    await work(store, 10)
    for i in range(100, 400):
        model[b"%04d" % i] = b"x" * 60
        await store.batch([(b"%04d" % i, b"x" * 60)])
    await work(store, 1000)
    assert store.quarantined == [name]
    assert 0 < len(audit(store, model)) < 20
    assert store.statistics()["merges"] > 0


async def test_verify_finds_what_nobody_read():
    env = make_env()
    store, model = await filled(env)
    assert await store.verify() == []
    names = tables(env.disk)
    for name in names[:2]:
        env.disk.flip(f"lsm/{name}", 700)
    assert len(await store.verify()) == 2
    assert sorted(store.quarantined) == sorted(names[:2])
    await work(store)
    assert await store.verify() == []
    assert audit(store, model)


async def test_what_verify_finds_is_lost_at_once():
    """Before anything was salvaged: the listeners know, and so does whoever asks."""
    env = make_env()
    store, model = await filled(env)
    told = []
    store.on_damage(lambda *loss: told.append(loss))
    block, whole = tables(env.disk)[:2]
    env.disk.flip(f"lsm/{block}", 700)
    env.disk.flip(f"lsm/{whole}", env.disk.open(f"lsm/{whole}").size() - 10)
    store = await Store.open(env, options=SMALL)  # with no index in memory
    store.on_damage(lambda *loss: told.append(loss))
    await store.verify()
    losses = store.lost()
    assert [name for _, _, name in losses] == [block, whole]
    assert sorted(told) == losses
    lost = audit(store, model)
    assert lost == {k for k in model if any(a <= k < b for a, b, _ in losses)}
    assert 10 < len(lost) < 200
    assert sorted(told) == losses  # the reads told nothing new
    await work(store)
    assert audit(store, model) == lost
    assert store.lost() == losses


async def test_verify_of_a_table_in_use_in_part():
    """A merge in steps leaves the rest of a table: damage before that is no loss."""
    env = make_env()
    store, _ = await filled(env, 60)
    run = store._state.runs[-1]
    table = run.tables[-1]
    table.load()
    cut = table.cut(table.range_of(2)[0])
    store._state.runs = [Run(run.level, [*run.tables[:-1], cut], ())]
    env.disk.flip(f"lsm/{table.meta.name}", 20)
    assert await store.verify() == []
    assert store.lost() == []
    env.disk.flip(f"lsm/{table.meta.name}", 1100)
    assert len(await store.verify()) == 1
    ((first, _, _),) = store.lost()
    assert first >= cut.meta.first


async def test_a_read_error_is_damage_too():
    env = make_env()
    _, model = await filled(env)
    store = await Store.open(env, options=SMALL)
    audit(store, {})
    env.disk.fail_next("read", "lsm/", count=1)
    with pytest.raises(Corrupt, match="Input/output"):
        store.get(b"0000")
    assert len(store.quarantined) == 1
    await work(store)
    assert audit(store, model) == set()  # it passed: the salvage read everything
    assert store.statistics()["lost_ranges"] == 0
    assert store.get(b"00000") is None


@pytest.mark.parametrize("seed", range(25))
async def test_any_flipped_bit(seed):
    """Flip bits of tables at random, restart, compact: what is answered is right."""
    random = Random(seed)
    env = make_env(seed)
    _, model = await filled(env, 150)
    for _ in range(random.randrange(1, 4)):
        path = f"lsm/{random.choice(tables(env.disk))}"
        env.disk.flip(path, random.randrange(env.disk.open(path).size()), random.randrange(8))
    store = await Store.open(env, options=SMALL)
    lost = audit(store, model)
    assert bool(lost) <= bool(store.quarantined)
    await work(store)
    await store.compact()
    assert audit(store, model) >= lost
    assert bool(audit(store, model)) <= bool(store.quarantined)
    for key in model:
        await store.batch([(key, b"repaired")])
    assert audit(store, dict.fromkeys(model, b"repaired")) == set()


async def test_a_writer_that_must_merge_first_is_not_refused_for_damage():
    """It does what the background is too slow for, and meets what it would have met."""
    env = make_env()
    options = StoreOptions(memtable_bytes=3000, block_bytes=500, fanout=3, max_runs=4, max_frozen=1)
    store = await Store.open(env, options=options)  # and no background
    model = {}

    async def write(first, count):
        for i in range(first, first + count):
            model[b"%04d" % i] = value = env.random.randbytes(60)
            await store.batch([(b"%04d" % i, value)])

    await write(0, 60)
    damaged = tables(env.disk)
    for name in damaged:
        env.disk.flip(f"lsm/{name}", 700)
    await write(60, 300)
    assert store.statistics()["merges"]
    assert set(store.quarantined) == set(damaged)
    assert 0 < len(audit(store, model)) < 40


async def test_a_store_that_vanished_is_not_begun_anew():
    env = make_env()
    store, _ = await filled(env, count=3)
    store.close()
    for name in env.disk.listdir("lsm"):
        env.disk.unlink(f"lsm/{name}")
    with pytest.raises(Corrupt, match=r"lsm is empty, but it was not; .* as a lost disk"):
        await Store.open(env, options=SMALL)
    assert env.disk.listdir("lsm") == []


async def test_a_log_that_vanished_is_not_begun_anew():
    env = make_env()
    store, _ = await filled(env, count=3)
    store.close()
    for name in env.disk.listdir("lsm"):
        if name.endswith(".wal"):
            env.disk.unlink(f"lsm/{name}")
    with pytest.raises(Corrupt, match=r"lsm has no log from segment \d+ on, but it had"):
        await Store.open(env, options=SMALL)


async def test_a_store_of_before_there_was_a_mark_gets_one_once_there_is_room():
    env = make_env()
    store, model = await filled(env, count=3)
    store.close()
    env.disk.unlink("lsm.made")
    real = env.disk.write_atomic

    def full(name, data):
        if name == "lsm.made":
            raise DiskFull("no room")
        real(name, data)

    for write, marked in ((full, False), (real, True)):
        env.disk.write_atomic = write
        store = await Store.open(env, options=SMALL)
        assert all(store.get(key) == value for key, value in model.items())
        assert env.disk.exists("lsm.made") == marked
        store.close()
