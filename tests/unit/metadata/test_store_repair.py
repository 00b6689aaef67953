"""What a store tells and takes so that peers can repair it: losses, listeners, paced checks."""

from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.errors import Corrupt
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store.engine import Store
from metadata.store.losses import clip, in_ranges, union, without
from metadata.store.options import StoreOptions

SMALL = StoreOptions(memtable_bytes=8000, block_bytes=500, table_bytes=6000, fanout=3)


def make_env(seed=1):
    random = Random(seed)
    return Env(SystemClock(), SimDisk(random), None, SimProcesses(random), random)


async def filled(env, count=300):
    store = await Store.open(env, options=SMALL)
    model = {b"%04d" % i: env.random.randbytes(60) for i in range(count)}
    for item in model.items():
        await store.batch([item])
    await store.flush()
    return store, model


def tables(disk):
    return [n for n in disk.listdir("lsm") if n.endswith(".sst")]


async def work(store, seconds=100):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()


def hidden(key, losses):
    return in_ranges(key, losses)


@pytest.mark.parametrize("salvaged", [False, True])
async def test_scans_go_around_damage_and_peers_repair_it(salvaged):
    env = make_env()
    _, model = await filled(env)
    names = tables(env.disk)[:2]
    for name in names:
        env.disk.flip(f"lsm/{name}", 700)
    store = await Store.open(env, options=SMALL)
    told = []
    store.on_damage(lambda *loss: told.append(loss))
    assert store.lost() == []
    assert store.scan(b"", limit=1000, skip_lost=True) == [
        p for p in model.items() if not hidden(p[0], store.lost())
    ]
    losses = store.lost()
    assert told == losses
    assert [table for _, _, table in losses] == names
    if salvaged:
        await work(store)
        assert store.lost() == losses
        assert told == losses
    with pytest.raises(Corrupt):
        list(store.iterate())
    around = list(store.iterate(skip_lost=True))
    assert around == [p for p in model.items() if not hidden(p[0], losses)]
    assert 0 < len(model) - len(around) < 40

    first, last, _ = losses[0]
    found = [p for p in model.items() if first <= p[0] < last]  # by a peer
    await store.batch(found)
    assert await store.accept_losses(first, last) == 1
    assert store.lost() == losses[1:]
    assert store.lost(first, last) == []
    assert store.get(first + b"\0") is None
    with pytest.raises(Corrupt):
        store.get(losses[1][0])
    assert store.scan(b"", limit=len(model), skip_lost=True) == [
        p for p in model.items() if not hidden(p[0], losses[1:])
    ]
    again = await Store.open(env, options=SMALL)
    assert again.lost() == losses[1:]
    first, last, _ = losses[1]
    await again.batch([p for p in model.items() if first <= p[0] < last])
    assert await again.accept_losses() == 1
    assert list(again.iterate()) == list(model.items())
    await again.compact()
    assert list((await Store.open(env, options=SMALL)).iterate()) == list(model.items())


async def test_going_around_never_shows_what_a_lost_block_replaced():
    env = make_env()
    store, model = await filled(env, 60)
    old = set(tables(env.disk))
    await store.batch([(k, None if i % 2 else b"new") for i, k in enumerate(model)])
    await store.flush()
    (young,) = set(tables(env.disk)) - old
    await store.batch([(b"0001", b"newest")])
    env.disk.flip(f"lsm/{young}", 30)
    store = await Store.open(env, options=SMALL)
    found = dict(store.iterate(skip_lost=True))
    assert set(found.values()) <= {b"new", b"newest"}
    assert found[b"0001"] == b"newest"
    (loss,) = store.lost()
    assert loss[2] == young
    lost = [k for k in model if k not in found and hidden(k, [loss])]
    assert lost
    with pytest.raises(Corrupt):
        store.get(lost[0])


async def test_a_scan_reaches_as_far_as_it_can():
    env = make_env()
    _, model = await filled(env)
    env.disk.flip(f"lsm/{tables(env.disk)[0]}", 1500)
    store = await Store.open(env, options=SMALL)
    found = []
    with pytest.raises(Corrupt, match="damaged block"):
        found.extend(store.iterate())
    ((first, last, _),) = store.lost()
    assert found == [p for p in model.items() if p[0] < first]
    assert len(found) > 5
    assert store.scan(b"", limit=len(found)) == found
    assert list(store.iterate(after=last)) == [p for p in model.items() if p[0] > last]
    assert list(store.iterate(end=first)) == found


async def test_part_of_a_loss_is_accepted():
    env = make_env()
    _, model = await filled(env)
    env.disk.flip(f"lsm/{tables(env.disk)[0]}", 700)
    store = await Store.open(env, options=SMALL)
    store.scan(b"", limit=1000, skip_lost=True)
    ((first, last, name),) = store.lost()
    inside = [k for k in model if first <= k < last]
    middle, next_one = inside[2], inside[3]
    assert await store.accept_losses(middle, next_one) == 1
    assert store.lost() == [(first, middle, name), (next_one, last, name)]
    assert store.get(middle) is None
    for key in (inside[0], inside[-1]):
        with pytest.raises(Corrupt):
            store.get(key)
    assert await store.accept_losses(b"x") == 0


async def test_verify_goes_table_by_table_and_resumes():
    env = make_env()
    store, _ = await filled(env)
    names = tables(env.disk)
    assert len(names) > 4
    env.disk.flip(f"lsm/{names[1]}", 700)
    env.disk.flip(f"lsm/{names[3]}", 700)
    jobs = env.processes.jobs
    assert not await store.verify_step()
    assert store.verify_cursor == names[0]
    assert store.quarantined == []
    assert not await store.verify_step()
    assert store.quarantined == [names[1]]
    assert env.processes.jobs == jobs + 2
    again = await Store.open(env, options=SMALL)
    again.verify_cursor = store.verify_cursor
    steps = 1
    while not await again.verify_step():
        steps += 1
    assert steps == len(names) - 2
    assert again.quarantined == [names[3]]
    assert again.verify_cursor == ""


async def test_verify_of_an_empty_store():
    store = await Store.open(make_env())
    assert await store.verify_step()


async def test_losses_survive_merges_in_steps():
    """A lost range stays lost, and no further, when the runs around it are merged piece by piece."""
    for seed in range(6):
        env = make_env(seed)
        store, model = await filled(env, 200)
        for key in env.random.sample(sorted(model), 60):
            model[key] = b"2" * 60
            await store.batch([(key, model[key])])
        await store.flush()
        names = [f"lsm/{name}" for name in tables(env.disk)]
        large = [name for name in names if env.disk.open(name).size() > 2000]
        env.disk.flip(env.random.choice(large), 700)
        await store.verify()
        await work(store, 50)
        losses = store.lost()
        await store.compact()
        assert store.lost() == losses
        for key, value in model.items():
            if hidden(key, losses):
                try:
                    assert store.get(key) == value
                except Corrupt:
                    continue
            else:
                assert store.get(key) == value


def test_ranges():
    losses = ((b"b", b"f", "x"), (b"d", b"h", "y"))
    assert in_ranges(b"b", losses)
    assert not in_ranges(b"h", losses)
    assert clip(losses, b"e", b"g") == ((b"e", b"f", "x"), (b"e", b"g", "y"))
    assert clip(losses, b"f", None) == ((b"f", b"h", "y"),)
    assert clip(losses, b"", b"b") == ()
    assert without(losses, b"c", b"g") == ((b"b", b"c", "x"), (b"g", b"h", "y"))
    assert without(losses, b"", None) == ()
    assert without(losses, b"h", None) == losses
    assert union([*losses, *losses]) == losses
