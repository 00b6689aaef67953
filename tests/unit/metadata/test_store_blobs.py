"""Blobs: verified both ways, durable on acknowledgement, repaired by putting them again."""

from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.env import Context, Env
from dfs.errors import Corrupt, DiskFull, InvalidArgument
from dfs.hashing import digest
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata import blobs as module
from metadata.blobs import PREFIX, REPLY, Blobs
from metadata.merkle import BLOBS, Digests, partition_of_row, recompute
from metadata.store.engine import Store

CONTEXT = Context("test", 0, 0.0, 0)


def make_env(seed=1):
    random = Random(seed)
    return Env(SystemClock(), SimDisk(random), None, SimProcesses(random), random)


async def call(blobs, method, args, data=b""):
    reply = blobs.handlers()[method](CONTEXT, args, memoryview(data))
    result, out = reply if isinstance(reply, tuple) else await reply
    return result, b"".join(out)


async def put(blobs, *values):
    pairs = tuple((digest(v), len(v)) for v in values)
    return await call(blobs, "blob.put", (pairs,), b"".join(values))


async def test_put_get_has():
    blobs = Blobs(await Store.open(make_env()))
    a, b, c = b"first", b"", b"x" * 100_000
    assert await put(blobs, a, b, c) == ((3,), b"")
    absent = digest(b"absent")
    hashes = (digest(c), absent, digest(b), digest(a))
    assert await call(blobs, "blob.get", (hashes,)) == (((100_000, -1, 0, 5),), c + a)
    assert await call(blobs, "blob.has", (hashes,)) == (((True, False, True, True),), b"")
    assert blobs.get(digest(a)) == a
    assert blobs.get(absent) is None
    assert await blobs.put([b"mine", a]) == [digest(b"mine"), digest(a)]
    assert blobs.get(digest(b"mine")) == b"mine"
    assert blobs.held == 1
    assert blobs.errors == []


async def test_reads_that_need_no_repair_run_inline():
    blobs = Blobs(await Store.open(make_env()))
    await put(blobs, b"a")
    reply = blobs.handlers()["blob.get"](CONTEXT, ((digest(b"a"),),), memoryview(b""))
    assert isinstance(reply, tuple)


@pytest.mark.parametrize(("batch", "pieces"), [(1000, True), (1 << 20, False)])
async def test_many_blobs_are_put_between_the_turns_of_others(monkeypatch, batch, pieces):
    """With pieces that are large enough there are no others: the measure can tell."""
    monkeypatch.setattr(module, "BATCH", batch)
    blobs = Blobs(await Store.open(make_env()))
    values = [b"%03d" % n * 100 for n in range(40)]
    turns, seen = Turns(), []
    batches = blobs._store.batch

    async def noted(ops, **options):
        seen.append((turns.count, len(ops)))
        await batches(ops, **options)

    monkeypatch.setattr(blobs._store, "batch", noted)
    trio.lowlevel.add_instrument(turns)
    await trio.lowlevel.checkpoint()
    await put(blobs, *values)
    trio.lowlevel.remove_instrument(turns)
    assert sum(count for _, count in seen) == 40
    assert (len({turn for turn, _ in seen}) == 10) == pieces
    assert (seen[0][0] > 8) == pieces, "they are checked in pieces, too"
    assert all(blobs.get(digest(v)) == v for v in values)


class Turns(trio.abc.Instrument):
    """Counts the turns of tasks."""

    count = 0

    def before_task_step(self, task):
        self.count += 1


async def test_put_refuses_wrong_bytes():
    store = await Store.open(make_env())
    blobs = Blobs(store)
    good = digest(b"good")
    with pytest.raises(Corrupt, match="other bytes"):
        await call(blobs, "blob.put", (((good, 4), (good, 4)),), b"goodevil")
    for pairs, data in [
        (((good, 5),), b"good"),
        (((good, 4),), b"good and more"),
        (((good, -1),), b""),
        (((good[:-1], 4),), b"good"),
        ((("text", 4),), b"good"),
        (((good, None),), b"good"),
    ]:
        with pytest.raises(InvalidArgument):
            await call(blobs, "blob.put", (pairs,), data)
    assert store.scan(b"") == []


async def test_acknowledged_puts_survive_power_loss():
    for seed in range(30):
        env = make_env(seed)
        random = Random(seed)
        blobs = Blobs(await Store.open(env))
        acked = []

        async def writer(i, blobs=blobs, acked=acked, seed=seed):
            values = [b"%d %d" % (seed, n) for n in range(i, i + 3)]  # others put the same ones
            await put(blobs, *values)
            acked.extend(values)

        async def asker(i, blobs=blobs, acked=acked, seed=seed):
            value = b"%d %d" % (seed, i)
            if (await call(blobs, "blob.has", ((digest(value),),)))[0] == ((True,),):
                acked.append(value)

        with trio.move_on_after(random.random() * 0.008):
            async with trio.open_nursery() as nursery:
                for i in range(30):
                    nursery.start_soon(writer, i)
                    nursery.start_soon(asker, i)
        env.disk.crash()
        blobs = Blobs(await Store.open(env))
        assert all(blobs.get(digest(v)) == v for v in acked)


async def test_held_blobs_cost_no_write():
    store = await Store.open(make_env())
    blobs = Blobs(store)
    await put(blobs, b"a", b"b")
    before = store.statistics()
    await put(blobs, b"a", b"b")
    after = store.statistics()
    assert after["puts"] == before["puts"]
    assert after["syncs"] == before["syncs"]
    assert blobs.held == 2


async def test_wrong_stored_bytes_are_reported_removed_and_repaired():
    store = await Store.open(make_env())
    blobs = Blobs(store)
    await put(blobs, b"good", b"other")
    good = digest(b"good")
    await store.batch([(PREFIX + good, b"evil")])
    assert await call(blobs, "blob.has", ((good, digest(b"other")),)) == (((False, True),), b"")
    assert await call(blobs, "blob.get", ((good, digest(b"other")),)) == (((-1, 5),), b"other")
    assert store.get(PREFIX + good) is None
    assert len(blobs.errors) == 1
    assert good.hex()[:16] in blobs.errors[0]
    assert blobs.corrupt == 1
    await put(blobs, b"good")
    assert blobs.get(good) == b"good"


async def test_bad_copy_found_by_a_put_is_replaced():
    store = await Store.open(make_env())
    blobs = Blobs(store)
    good = digest(b"good")
    await store.batch([(PREFIX + good, b"evil")])
    await put(blobs, b"good")
    assert blobs.get(good) == b"good"
    assert blobs.corrupt == 1


async def test_damaged_table_reads_as_absent_and_is_repaired():
    env = make_env()
    store = await Store.open(env)
    blobs = Blobs(store)
    values = [b"value %d" % i * 9 for i in range(50)]
    await put(blobs, *values)
    await store.flush()
    (name,) = [n for n in env.disk.listdir("lsm") if n.endswith(".sst")]
    env.disk.flip(f"lsm/{name}", 300)
    blobs = Blobs(await Store.open(env))
    hashes = tuple(digest(v) for v in values)
    (lengths,), _ = await call(blobs, "blob.get", (hashes,))
    assert -1 in lengths
    assert blobs.errors
    await put(blobs, *values)
    (lengths,), data = await call(blobs, "blob.get", (hashes,))
    assert data == b"".join(values)


async def test_full_disk():
    env = make_env()
    blobs = Blobs(await Store.open(env))
    env.disk.full = True
    with pytest.raises(DiskFull):
        await put(blobs, b"x")
    assert blobs.get(digest(b"x")) is None


async def test_answers_are_bounded():
    blobs = Blobs(await Store.open(make_env()))
    value = bytes(1 << 20)
    (h,) = await blobs.put([value])
    with pytest.raises(InvalidArgument, match="ask for fewer"):
        await call(blobs, "blob.get", ((h,) * (REPLY // len(value) + 1),))


async def digested(env):
    store = await Store.open(env)
    digests = Digests(store)
    digests.load()
    return store, digests, Blobs(store, digests)


def drift_of(store, partition):
    steps = recompute(store, BLOBS, partition)
    while True:
        try:
            next(steps)
        except StopIteration as e:
            return e.value


def check_digests(store, digests, partitions=range(4096)):
    for partition in partitions:
        assert drift_of(store, partition) == {}
        total = sum(digests.buckets(BLOBS, partition)) % 2**256
        assert digests.total(BLOBS, partition) == total


async def test_digests_follow_whatever_happens_to_blobs():
    env = make_env()
    store, digests, blobs = await digested(env)
    values = [b"value %d" % i for i in range(40)]
    await put(blobs, *values, values[0])
    async with trio.open_nursery() as nursery:
        for i in range(10):
            nursery.start_soon(blobs.put, [b"more %d" % j for j in range(i, i + 5)])
    check_digests(store, digests)
    before = digests.totals(BLOBS, range(4096))
    # a bad copy is removed, another one is replaced
    for value in values[:2]:
        await store.batch([(PREFIX + digest(value), b"evil")])
    await put(blobs, values[0])
    assert digests.totals(BLOBS, range(4096)) == before
    await call(blobs, "blob.get", ((digest(values[1]),),))
    assert digests.totals(BLOBS, range(4096)) != before
    check_digests(store, digests)
    await put(blobs, values[1])
    assert digests.totals(BLOBS, range(4096)) == before
    env.disk.full = True
    with pytest.raises(DiskFull):
        await put(blobs, b"no room")
    env.disk.full = False
    assert digests.totals(BLOBS, range(4096)) == before
    check_digests(store, digests)


async def test_digests_survive_power_loss():
    used = {partition_of_row(BLOBS, PREFIX + digest(b"%d" % i)) for i in range(25)}
    for seed in range(20):
        env = make_env(seed)
        _, _, blobs = await digested(env)
        with trio.move_on_after(Random(seed).random() * 0.008):
            async with trio.open_nursery() as nursery:
                for i in range(20):
                    nursery.start_soon(blobs.put, [b"%d" % j for j in range(i, i + 3)])
        env.disk.crash()
        store, digests, _ = await digested(env)
        check_digests(store, digests, used)


async def test_blobs_of_a_peer_are_verified():
    _, digests, blobs = await digested(make_env())
    rows = [(PREFIX + digest(b"%d" % i), b"%d" % i) for i in range(3)]
    assert await blobs.merge(rows[:2]) == 2
    assert await blobs.merge(rows) == 1
    before = digests.totals(BLOBS, range(4096))
    with pytest.raises(Corrupt, match="other bytes"):
        await blobs.merge([(PREFIX + digest(b"new"), b"new"), (rows[0][0], b"evil")])
    assert blobs.get(digest(b"new")) is None
    assert digests.totals(BLOBS, range(4096)) == before
