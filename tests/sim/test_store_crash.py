"""Stores under load lose power again and again: acknowledged writes survive, batches are whole.

Each writer owns keys and writes ever higher numbers to all of them in one batch; so after any
crash its keys must be equal (atomic) and at least what was acknowledged (durable).  Every other writer's
values expire one day, and readers hold snapshots while tables come and go.
"""

from random import Random

import pytest
import trio
import trio.lowlevel

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.errors import Corrupt
from dfs.groupsync import GroupSync
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store import manifest, wal
from metadata.store.engine import Store
from metadata.store.options import StoreOptions

OPTIONS = StoreOptions(memtable_bytes=6000, block_bytes=400, table_bytes=2000, fanout=2, max_runs=8)
WRITERS = 4


class Writer:
    def __init__(self, number, random):
        self.keys = [b"%d-%d" % (number, i) for i in range(random.randrange(1, 5))]
        self.random = random
        self.expires = (1 << 40,) if number % 2 else ()
        self.sent = self.acked = 0

    async def run(self, store):
        while True:
            self.sent += 1
            value = b"%d" % self.sent
            filler = (b"f%d" % self.random.randrange(99), self.random.randbytes(50))
            await store.batch([(k, value, *self.expires) for k in self.keys] + [filler])
            self.acked = self.sent
            await trio.sleep(self.random.random() * 0.004)

    def check(self, store):
        values = {store.get(k) for k in self.keys}
        assert len(values) == 1, f"a batch was torn: {values}"
        value = int(values.pop() or 0)
        assert self.acked <= value <= self.sent, "an acknowledged write is lost"
        self.sent = self.acked = value


async def read_snapshots(store, random):
    """What a snapshot shows does not change, however much is flushed and merged meanwhile."""
    while True:
        with store.snapshot() as snapshot:
            then = dict(store.scan(b"", limit=10**6))
            iterator = snapshot.iterate()
            for key, value in zip(sorted(then), iterator, strict=False):
                assert value == (key, then[key]), "a snapshot changed"
                await trio.sleep(random.random() * 0.002)
            assert next(iterator, None) is None
        await trio.sleep(0.001)  # the store may be empty


async def lives(seed, crashes=8):
    """One store through several power losses and kills."""
    random = Random(seed)
    disk = SimDisk(random, sync_delay=0.003)
    writers = [Writer(i, Random(random.random())) for i in range(WRITERS)]
    total = 0
    for _ in range(crashes):
        env = Env(SystemClock(), disk, None, SimProcesses(random, delay=0.02), random)
        store = await Store.open(env, options=OPTIONS)
        for writer in writers:
            writer.check(store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            nursery.start_soon(read_snapshots, store, random)
            for writer in writers:
                nursery.start_soon(writer.run, store)
            await trio.sleep(random.random() * 0.25)
            if random.random() < 0.85:
                disk.crash()
            nursery.cancel_scope.cancel()
        total += store.statistics()["flushes"]
        if random.random() < 0.3:  # power fails while it starts
            with trio.move_on_after(random.random() * 0.01):
                await Store.open(env, options=OPTIONS)
            disk.crash()
    assert total > 0
    return sum(w.acked for w in writers)


@pytest.mark.parametrize("seed", range(8))
async def test_acknowledged_writes_survive(seed):
    assert await lives(seed) > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 600))
async def test_acknowledged_writes_survive_soak(seed):
    await lives(seed, crashes=25)


# Mutants: each breaks one rule of durability on purpose, and the check above must notice.


async def _no_sync(self):
    await trio.lowlevel.checkpoint()


def _careless_manifest(disk, prefix, value):
    disk.open(f"{prefix}/MANIFEST", create=True, truncate=True).append([manifest.encode(value)])


def _no_sync_dir(self, name=""):
    pass


def _cut_nothing(disk, prefix, first, last):
    return 0


async def _sync_joins_the_running_one(self):
    """A waiter that joins a sync which began before it wrote."""
    if isinstance(self._running, trio.Event):
        await self._running.wait()
        return
    self._running = trio.Event()
    await self._disk.run(self._file().fdatasync)
    self._running.set()
    self._running = False


MUTANTS = {
    "batch returns before the sync": (wal.Log, "sync", _no_sync),
    "manifest is written in place": (manifest, "write", _careless_manifest),
    "directories are never synced": (SimDisk, "sync_dir", _no_sync_dir),
    "a torn tail stays in the log": (wal, "cut", _cut_nothing),
    "waiters join a running sync": (GroupSync, "sync", _sync_joins_the_running_one),
}


@pytest.mark.parametrize("name", MUTANTS)
async def test_mutants_are_caught(name, monkeypatch):
    owner, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    for seed in range(40):
        try:
            await lives(seed)
        except (AssertionError, Corrupt):
            return
        except ExceptionGroup as e:  # a reader in the nursery met it
            if e.split((AssertionError, Corrupt))[0] is None:
                raise
            return
    pytest.fail(f"nothing noticed that {name}")
