"""The store against a dict: any sequence of writes, maintenance, kills and power losses.

After a power loss the state must be one of the past states, not older than the last one that was
acknowledged; after a kill (the page cache survives) it must be the last one that was written.
"""

from random import Random

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.clock import SystemClock
from dfs.env import Env
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store.engine import Store
from metadata.store.options import StoreOptions

KEYS = st.integers(0, 30).map(lambda i: b"k%02d" % i)
VALUES = st.none() | st.binary(max_size=30) | st.integers(100, 900).map(lambda n: b"x" * n)
BATCH = st.lists(st.tuples(KEYS, VALUES), max_size=6)
STEPS = st.lists(
    st.tuples(st.just("batch"), BATCH, st.booleans())
    | st.tuples(st.sampled_from(["flush", "compact", "crash", "kill", "pass", "verify"]))
    | st.tuples(st.just("scan"), st.binary(max_size=3), KEYS, st.integers(1, 9)),
    max_size=40,
)
OPTIONS = StoreOptions(
    memtable_bytes=2500, block_bytes=200, table_bytes=800, fanout=2, max_runs=6, cache_bytes=2000
)


def live(state):
    return sorted((k, v) for k, v in state.items() if v is not None)


class Driver:
    """Runs steps against the store and the past states it may return to."""

    def __init__(self, seed):
        self.random = Random(seed)
        self.disk = SimDisk(self.random, sync_delay=0.01)
        self.past = [{}]
        self.acked = 0  # index of the oldest state that a power loss may bring back

    async def open(self):
        env = Env(SystemClock(), self.disk, None, SimProcesses(self.random), self.random)
        self.store = await Store.open(env, options=OPTIONS)

    def check(self):
        state = self.past[-1]
        assert self.store.scan(b"", limit=10**6) == live(state)
        for i in range(31):
            key = b"k%02d" % i
            assert self.store.get(key) == state.get(key)

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
        if kind == "batch":
            ops, sync = args
            self.past.append({**self.past[-1], **dict(ops)})
            await self.store.batch(ops, sync=sync)
            if sync:
                self.acked = len(self.past) - 1
        elif kind == "scan":
            prefix, after, limit = args
            wanted = [p for p in live(self.past[-1]) if p[0].startswith(prefix) and p[0] > after]
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
        found = dict(self.store.scan(b"", limit=10**6))
        for i in range(len(self.past) - 1, self.acked - 1, -1):
            if live(self.past[i]) == live(found):
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
