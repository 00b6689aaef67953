"""The store against a dict: any sequence of writes, maintenance, kills and power losses.

After a power loss the state must be one of the past states, not older than the last one that was
acknowledged; after a kill (the page cache survives) it must be the last one that was written.
"""

from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store import bloom, compaction, iterate
from metadata.store.engine import Store
from metadata.store.maintenance import Maintenance
from metadata.store.memtable import Memtable
from metadata.store.options import StoreOptions
from metadata.store.reader import Reader
from metadata.store.state import State
from metadata.store.table import Table

KEYS = st.integers(0, 30).map(lambda i: b"k%02d" % i)
VALUES = st.none() | st.binary(max_size=30) | st.integers(100, 900).map(lambda n: b"x" * n)
BATCH = st.lists(
    st.tuples(KEYS, VALUES) | st.tuples(KEYS, st.binary(max_size=30), st.integers(1, 9)),
    max_size=6,
)
STEPS = st.lists(
    st.tuples(st.just("batch"), BATCH, st.booleans())
    | st.tuples(
        st.sampled_from(["flush", "compact", "crash", "kill", "pass", "verify", "snap", "drop"])
    )
    | st.tuples(st.just("tick"), st.integers(1, 9))
    | st.tuples(st.just("clock back"), st.integers(0, 3))
    | st.tuples(st.just("scan"), st.binary(max_size=3), KEYS, st.integers(1, 9)),
    max_size=40,
)
GRACE = 3  # seconds by which the clock may be wrong for a while
OPTIONS = StoreOptions(
    memtable_bytes=2500,
    block_bytes=200,
    table_bytes=800,
    fanout=2,
    max_runs=6,
    cache_bytes=2000,
    expiry_grace=GRACE,
    compression=0,
)


class Wall(SystemClock):
    """A wall clock that the test sets, in seconds."""

    now = latest = 1_000_000

    def time_ns(self):
        return self.now * 10**9


def live(state, now):
    """A state maps keys to None, or to (value, the second at which it expires)."""
    return sorted((k, v[0]) for k, v in state.items() if v is not None and v[1] > now)


def entry(value, expires=1 << 60):
    return None if value is None else (value, expires)


class Driver:
    """Runs steps against the store and the past states it may return to."""

    def __init__(self, seed):
        self.random = Random(seed)
        self.disk = SimDisk(self.random, sync_delay=0.01)
        self.wall = Wall()
        self.past = [{}]
        self.acked = 0  # index of the oldest state that a power loss may bring back
        self.snapshots = []  # (snapshot, an iterator on it, what it should hold, what is to come)

    async def open(self):
        env = Env(self.wall, self.disk, None, SimProcesses(self.random), self.random)
        self.store = await Store.open(env, options=OPTIONS)
        self.snapshots.clear()

    def check(self):
        state = self.past[-1]
        now = dict(live(state, self.wall.now))
        assert self.store.scan(b"", limit=10**6) == list(now.items())
        assert list(self.store.iterate()) == list(now.items())
        for i in range(31):
            key = b"k%02d" % i
            assert self.store.get(key) == now.get(key)
        for snapshot, iterator, then, rest in self.snapshots:
            assert list(snapshot.iterate(b"k1", end=b"k2")) == [
                p for p in then if b"k1" <= p[0] < b"k2"
            ]
            key = b"k%02d" % self.random.randrange(31)
            assert snapshot.get(key) == dict(then).get(key)
            for _ in range(self.random.randrange(3)):
                assert next(iterator, None) == (rest.pop(0) if rest else None)

    async def session(self, steps):
        """Steps up to the next crash or kill; returns the steps that are left."""
        await self.open()
        self.check()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run)
            while steps:
                step, *steps = steps
                if step[0] in ("crash", "kill"):
                    nursery.cancel_scope.cancel()
                    self.die(step[0])
                    break
                await self.do(step)
                self.check()
            nursery.cancel_scope.cancel()
        assert self.store.errors == []
        return steps

    async def do(self, step):
        kind, *args = step
        wall = self.wall
        if kind == "batch":
            ops, sync = args
            ops = [(op[0], op[1], wall.now + op[2]) if len(op) == 3 else op for op in ops]
            self.past.append({**self.past[-1], **{op[0]: entry(*op[1:]) for op in ops}})
            await self.store.batch(ops, sync=sync)
            if sync:
                self.acked = len(self.past) - 1
        elif kind == "tick":
            wall.now += args[0]
            wall.latest = max(wall.latest, wall.now)
        elif kind == "clock back":
            wall.now = max(wall.now - args[0], wall.latest - GRACE)
        elif kind == "snap":
            then = live(self.past[-1], wall.now)
            snapshot = self.store.snapshot()
            self.snapshots.append((snapshot, snapshot.iterate(), then, list(then)))
        elif kind == "drop":
            for snapshot, *_ in self.snapshots[:1]:
                snapshot.close()
            del self.snapshots[:1]
        elif kind == "scan":
            prefix, after, limit = args
            wanted = [
                p for p in live(self.past[-1], wall.now) if p[0].startswith(prefix) and p[0] > after
            ]
            assert self.store.scan(prefix, after=after, limit=limit) == wanted[:limit]
        elif kind == "pass":
            await trio.sleep(self.random.random())
        elif kind == "verify":
            assert await self.store.verify() == []
        else:
            await getattr(self.store, kind)()

    def die(self, kind):
        self.store.close()
        if kind == "crash":
            self.disk.crash()

    async def find_state(self):
        """After a power loss: which past state is this?"""
        await self.open()
        found = self.store.scan(b"", limit=10**6)
        for i in range(len(self.past) - 1, self.acked - 1, -1):
            if live(self.past[i], self.wall.now) == found:
                # States that look the same now may differ when the clock goes back.
                self.wall.latest = max(self.wall.latest, self.wall.now + GRACE)
                del self.past[i + 1 :]
                self.acked = i  # what was replayed is durable
                return
        raise AssertionError(f"{found} is no state since the last acknowledged one")

    async def run(self, steps):
        while True:
            left = await self.session(steps)
            crashed = len(left) < len(steps) and steps[len(steps) - len(left) - 1][0] == "crash"
            if crashed:
                await self.find_state()
            if not left:
                await self.open()
                return self.check()
            steps = left


@settings(max_examples=80, deadline=None)
@given(STEPS, st.integers(0, 10**6))
def test_store_is_a_dict_that_survives(steps, seed):
    driver = Driver(seed)
    trio.run(driver.run, steps, clock=trio.testing.MockClock(autojump_threshold=0))


# Mutants: each breaks one rule on purpose, and the driver above must notice.


def random_steps(random):
    steps = []
    for _ in range(60):
        kind = random.choice(["batch"] * 6 + ["flush", "compact", "kill", "pass"] + ["snap"] * 2)
        kind = random.choice([kind] * 4 + ["tick", "clock back", "drop"])
        if kind == "batch":
            ops = []
            for _ in range(random.randrange(1, 6)):
                key = b"k%02d" % random.randrange(31)
                value = random.choice([None, b"v%d" % random.randrange(99), b"x" * 400])
                expires = (
                    () if value is None or random.random() < 0.5 else (random.randrange(1, 9),)
                )
                ops.append((key, value, *expires))
            steps.append(("batch", ops, True))
        elif kind in ("tick", "clock back"):
            steps.append((kind, random.randrange(1, 4)))
        else:
            steps.append((kind,))
    return steps


def _drop_expired(items, expired):
    return ((k, v) for k, v in items if not isinstance(v, tuple) or v[1] > expired)


def _cut_nothing(self, first):
    return self


def _trusts_its_clock(self):
    return self._s.now()


def _shared_memtable(self):
    return self


def _never_expires(self, value):
    return value[0]


def _forgetful_filter(digests, bits_per_key=12):
    return bloom_build(digests[:-12] or digests, bits_per_key)


def _newest_first(cursors):
    return merge(list(reversed(cursors)))


def _no_newer_first(memtables, runs, *args, **kwargs):
    return stretches(memtables, list(reversed(runs)), *args, **kwargs)


def _reuses_the_copy(self):
    if self._copy is not None and self._copy[0]() is not None:
        return self._copy[0]()
    return copied(self)


bloom_build, merge, stretches, copied = (
    bloom.build,
    compaction._merge,
    iterate.stretches,
    State._copied,
)
MUTANTS = {
    "a merge forgets what has expired": (compaction, "bury", _drop_expired),
    "a merge trusts its clock": (Maintenance, "_expired", _trusts_its_clock),
    "inputs of a merge are not cut": (Table, "cut", _cut_nothing),
    "a snapshot shares the memtable": (Memtable, "copy", _shared_memtable),
    "snapshots share an old copy": (State, "_copied", _reuses_the_copy),
    "a get looks at no expiry": (Reader, "_alive", _never_expires),
    "a filter forgets its last key": (bloom, "build", _forgetful_filter),
    "a merge prefers the oldest": (compaction, "_merge", _newest_first),
    "a scan prefers the oldest": (iterate, "stretches", _no_newer_first),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch):
    owner, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    for seed in range(60):
        try:
            trio.run(
                Driver(seed).run,
                random_steps(Random(seed)),
                clock=trio.testing.MockClock(autojump_threshold=0),
            )
        except AssertionError:
            return
        except ExceptionGroup as e:
            if e.split(AssertionError)[0] is None:
                raise
            return
    pytest.fail(f"nothing noticed that {name}")


@pytest.mark.parametrize("seed", range(20))
def test_random_steps(seed):
    """What finds the mutants finds nothing in the code as it is."""
    trio.run(
        Driver(seed).run,
        random_steps(Random(seed)),
        clock=trio.testing.MockClock(autojump_threshold=0),
    )
