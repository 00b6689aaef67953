"""A load on a cluster's registers that knows what must be there at the end, whatever happened.

Clients run in a thread of the test's process, each over its own connection, and log what was acknowledged.  There
are three kinds of keys:

    cart    shared.  A client reads, adds an element to the union of all siblings, and writes that with the
            context it read (or writes the element alone, blindly).  Every acknowledged element is in the
            union for ever, and in every read that begins after the acknowledgement.
    chain   one client's own, written with contexts.  The last acknowledged value is there, what it
            superseded is not, and a deleted key stays deleted.
    last    one client's own, written without contexts: the last acknowledged value is there.

A write that ended with an error may have happened, and may happen later; one that was resent to a second
coordinator may be two writes.  Both are allowed for, by name: `Report.excused` counts how often that
was needed.  (The cart is the shopping cart of DeCandia et al., "Dynamo", SOSP 2007.)
"""

import contextlib
import ctypes
import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import trio

from dfs.client.connect import ClusterRef, connect
from dfs.client.kv import BLIND, KV
from dfs.errors import DfsError

CLONE_NEWNET = 0x40000000
CART_SIZE = 120  # elements, then its client begins another cart
PAD = b"." * 80


@dataclass
class Write:
    """One write to a key of a single client; `value` None deletes."""

    value: bytes | None
    acked: bool = False
    resent: bool = False


@dataclass
class Phase:
    """What happened between two moments: longest silence and slowest operation, in seconds."""

    name: str
    began: float
    ended: float = 0.0
    acks: int = 0
    longest_gap: float = 0.0  # without any acknowledgement of anybody
    slowest: Counter = field(default_factory=Counter)  # operation -> seconds
    errors: Counter = field(default_factory=Counter)

    def __str__(self):
        slow = ", ".join(f"{k} {v:.2f} s" for k, v in sorted(self.slowest.items()))
        bad = ", ".join(f"{n} {k}" for k, n in self.errors.items()) or "no errors"
        return (
            f"{self.name}: {self.ended - self.began:.1f} s, {self.acks} acks, longest silence "
            f"{self.longest_gap:.2f} s, slowest {slow or '-'}; {bad}"
        )


class CountingKV(KV):
    """Counts the attempts of an operation: after more than one, a put may be two writes."""

    attempts = 0

    async def _attempt(self, *args):
        self.attempts += 1
        return await super()._attempt(*args)


class Load:
    """Start it, do harm to the cluster, `stop` it and `check`.

    `netns` is the name of a network namespace that the clients live in.  With `fresh` reads must know
    every acknowledged write; without (weak levels) only the end is checked.
    """

    def __init__(
        self, cluster, *, clients=6, netns="", prefix="", seed=1, options=None, fresh=True,
        pace=0.03, timeout=10.0, keys=2,
    ):  # fmt: skip
        self.file = cluster.dir / "cluster.json"
        self.clients = clients
        self.netns = netns
        self.prefix = prefix.encode()
        self.seed = seed
        self.options = options or {}
        self.fresh = fresh
        self.pace = pace
        self.timeout = timeout
        self.keys = keys
        self.carts = {}  # key -> acknowledged elements, in order
        self.tried = {}  # key -> elements that somebody tried to add
        self.own = {}  # key -> writes, in order
        self.cold = {}  # key -> value: written once, never touched
        self.violations = []
        self.words = Counter()  # what the errors said
        self.excused = 0
        self.phases = []
        self._number = 0
        self._carts = 0
        self._stop = threading.Event()
        self._thread = None
        self._failure = None
        self._last_ack = 0.0

    # ------------------------------------------------------------------------------------ control

    def start(self):
        self.enter("start")
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(self._work,))
        self._thread.start()
        return self

    def stop(self):
        """End the clients; raises what went wrong with them."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(60)
            assert not self._thread.is_alive(), "the load does not stop"
            self._thread = None
        self._close_phase()
        if self._failure is not None:
            raise self._failure
        assert not self.violations, "\n".join(self.violations[:10])

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        if kind is None:
            self.stop()
            return
        with contextlib.suppress(Exception):  # the test failed already: that is what counts
            self.stop()

    def enter(self, name):
        """Begin another phase of the report; returns it."""
        self._close_phase()
        now = time.monotonic()
        phase = Phase(name, now)
        self._last_ack = now
        self.phases.append(phase)
        return phase

    def _close_phase(self):
        if self.phases and not self.phases[-1].ended:
            phase = self.phases[-1]
            phase.ended = time.monotonic()
            phase.longest_gap = max(phase.longest_gap, phase.ended - self._last_ack)
            print(f"  load {self.prefix.decode()}: {phase}")

    def wait_for_acks(self, count=20, timeout=30):
        """Until this many more operations were acknowledged; returns the seconds it took."""
        began = time.monotonic()
        start = sum(p.acks for p in self.phases)
        while sum(p.acks for p in self.phases) < start + count:
            if time.monotonic() > began + timeout or self._failure:
                said = "; ".join(f"{n} times {text}" for text, n in self.words.most_common(5))
                raise AssertionError(f"no {count} acknowledgements in {timeout} s: {said}")
            time.sleep(0.02)
        return time.monotonic() - began

    def preload(self, count, pad=PAD):
        """Write keys that nobody touches again."""
        first = len(self.cold)
        values = {
            b"%scold-%d" % (self.prefix, i): b"v%d" % i + pad for i in range(first, first + count)
        }

        async def work():
            async with connect(ClusterRef.load(self.file)) as c:
                kv = KV(c, timeout=30)

                async def put(key, value):
                    await kv.put(key, value)
                    self.cold[key] = value

                await many(put, list(values.items()))

        self._run(work)
        if self._failure is not None:
            raise self._failure
        return self

    def _run(self, work):
        try:
            if self.netns:
                enter_network(self.netns)
            trio.run(work)
        except BaseException as e:
            self._failure = e

    # ------------------------------------------------------------------------------------- clients

    async def _work(self):
        async with trio.open_nursery() as nursery:
            for i in range(self.clients):
                kind = (self._cart, self._cart, self._chain, self._last)[i % 4]
                nursery.start_soon(self._client, i, kind)

    async def _client(self, number, kind):
        rnd = random.Random(f"{self.seed}/{number}")
        async with connect(ClusterRef.load(self.file), name=f"load{number}") as c:
            kv = CountingKV(c, timeout=self.timeout)
            state = {}
            while not self._stop.is_set():
                await kind(kv, rnd, number, state)
                await trio.sleep(rnd.uniform(0.5, 1.5) * self.pace)

    async def _do(self, what, kv, call):
        """The result, or None after an error, which is counted."""
        began = time.monotonic()
        kv.attempts = 0
        try:
            found = await call
        except DfsError as e:
            phase = self.phases[-1]
            phase.errors[f"{what} {type(e).__name__}"] += 1
            self.words[str(e)] += 1
            return None
        finally:
            took = time.monotonic() - began
            slowest = self.phases[-1].slowest
            slowest[what] = max(slowest[what], took)
        now = time.monotonic()
        phase = self.phases[-1]
        phase.acks += 1
        phase.longest_gap = max(phase.longest_gap, now - max(self._last_ack, phase.began))
        self._last_ack = now
        return found

    def _next(self):
        self._number += 1
        return b"%d" % self._number

    async def _cart(self, kv, rnd, _number, _state):
        key = b"%scart-%d" % (self.prefix, self._carts + rnd.randrange(self.keys))
        acked = self.carts.setdefault(key, [])
        tried = self.tried.setdefault(key, set())
        if len(tried) > CART_SIZE:
            self._carts += self.keys
            return
        known = len(acked)
        entry = await self._do("get", kv, kv.get(key, **self.read_options()))
        if entry is None:
            return
        union = elements(entry.values)
        if self.fresh and (missing := set(acked[:known]) - union):
            self.violations.append(f"a read of {key!r} missed acknowledged {sorted(missing)[:5]}")
        new = self._next()
        tried.add(new)
        if rnd.random() < 0.2 and len(entry.values) < 8:
            value, context = {new}, BLIND
        else:
            value, context = union | {new}, entry.context
        call = kv.put(key, b",".join(sorted(value)), context=context, **self.write_options())
        if await self._do("put", kv, call) is not None:
            acked.append(new)

    async def _chain(self, kv, rnd, number, state):
        key = b"%schain-%d-%d" % (self.prefix, number, rnd.randrange(self.keys))
        writes = self.own.setdefault(key, [])
        context = state.get(key)
        if context is None or rnd.random() < 0.3:
            entry = await self._do("get", kv, kv.get(key, **self.read_options()))
            if entry is None:
                return
            if self.fresh:
                self._judge(key, entry.values, "read")
            context = entry.context
        write = Write(None if rnd.random() < 0.15 else self._next() + PAD)
        writes.append(write)
        call = kv._write(key, write.value, context, self.write_options())
        done = await self._do("put" if write.value else "delete", kv, call)
        write.resent = kv.attempts > 1
        write.acked = done is not None
        state[key] = done.context if done is not None else None

    async def _last(self, kv, rnd, number, _state):
        key = b"%slast-%d-%d" % (self.prefix, number, rnd.randrange(self.keys))
        writes = self.own.setdefault(key, [])
        write = Write(None if rnd.random() < 0.1 else self._next() + PAD)
        writes.append(write)
        call = kv._write(key, write.value, None, self.write_options())
        done = await self._do("put" if write.value else "delete", kv, call)
        write.resent = kv.attempts > 1
        write.acked = done is not None
        entry = await self._do("get", kv, kv.get(key, **self.read_options()))
        if entry is not None and self.fresh:
            self._judge(key, entry.values, "read")

    def read_options(self):
        return {k: v for k, v in self.options.items() if k in ("level", "n", "r", "pr", "eventual")}

    def write_options(self):
        return {
            k: v for k, v in self.options.items() if k in ("level", "n", "r", "w", "pw", "eventual")
        }

    # -------------------------------------------------------------------------------------- judging

    def _judge(self, key, values, what):
        """What a key of a single client may hold, after its last write ended."""
        writes = self.own[key]
        last = max((i for i, w in enumerate(writes) if w.acked), default=-1)
        by_value = {w.value: i for i, w in enumerate(writes) if w.value is not None}
        for value in values:
            i = by_value.get(value)
            if i is None:
                self.violations.append(f"{what} of {key!r}: {value[:20]!r} was never written to it")
            elif i < last:
                stale = not self.fresh  # what its coordinator, or its context, had seen was old
                if writes[i].acked and not writes[i].resent and not stale:
                    self.violations.append(
                        f"{what} of {key!r}: {value[:20]!r} is back, {last - i} writes after it"
                    )
                else:
                    self.excused += 1
        if last < 0 or writes[last].value is None or writes[last].value in values:
            return
        # gone: a write that failed later, or a resent or failed one that came late, replaced it
        late = [w for i, w in enumerate(writes) if i > last or w.resent or not w.acked]
        shown = [w for w in late if w.value in values]
        if shown or (not values and any(w.value is None for w in late)):
            self.excused += 1
        else:
            self.violations.append(
                f"{what} of {key!r}: acknowledged {writes[last].value[:20]!r} is lost, it has "
                f"{[v[:20] for v in values]}"
            )

    def check(self, *, level="all", within=30.0, scan=True):
        """Read everything, once all nodes answer; raises AssertionError with what is wrong."""
        assert self._thread is None, "stop it first"
        thread = threading.Thread(
            target=self._run, args=(lambda: self._check(level, within, scan),)
        )
        thread.start()
        thread.join()
        if self._failure is not None:
            raise self._failure
        print(f"  load {self.prefix.decode()}: {self.summary()}")
        assert not self.violations, "\n".join(self.violations[:10])
        return self

    def summary(self):
        acked = sum(map(len, self.carts.values())) + sum(
            w.acked for v in self.own.values() for w in v
        )
        resent = sum(w.resent for v in self.own.values() for w in v)
        return (
            f"{acked} writes acknowledged to {len(self.carts)} carts and {len(self.own)} own keys, "
            f"{len(self.cold)} cold keys; {resent} resent, {self.excused} excused"
        )

    async def _check(self, level, within, scan):
        async with connect(ClusterRef.load(self.file)) as c:
            kv = KV(c, timeout=10.0)
            there = set()
            unread = set()
            end = time.monotonic() + within

            async def look(key):
                while True:
                    try:
                        entry = await kv.get(key, level=level)
                        break
                    except DfsError as e:
                        if time.monotonic() > end:
                            self.violations.append(f"the end of {key!r}: {e}")
                            unread.add(key)
                            return
                if entry.values:
                    there.add(key)
                self._final(key, entry.values)

            await many(look, [(key,) for key in (*self.carts, *self.own, *self.cold)])
            if scan:
                found = {e.key async for e in kv.scan(self.prefix) if e.key in self._all()}
                if missing := there - found:
                    self.violations.append(f"a scan does not show {sorted(missing)[:5]}")
                if deleted := found - there - unread:
                    self.violations.append(f"a scan shows {sorted(deleted)[:5]}: reads find none")

    def _all(self):
        return self.carts.keys() | self.own.keys() | self.cold.keys()

    def _final(self, key, values):
        if key in self.carts:
            union = elements(values)
            if missing := set(self.carts[key]) - union:
                self.violations.append(f"the end of {key!r}: lost {sorted(missing)[:5]}")
            if alien := union - self.tried[key]:
                self.violations.append(f"the end of {key!r}: nobody wrote {sorted(alien)[:5]}")
        elif key in self.own:
            self._judge(key, values, "the end")
        elif values != (self.cold[key],):
            self.violations.append(f"the end of {key!r}: lost, it has {[v[:20] for v in values]}")


def elements(values):
    """The union of carts."""
    return {e for value in values for e in value.split(b",") if e}


async def many(work, calls, limit=16):
    """Call `work(*args)` for all, some at once."""
    waiting = list(reversed(calls))

    async def worker():
        while waiting:
            await work(*waiting.pop())

    async with trio.open_nursery() as nursery:
        for _ in range(limit):
            nursery.start_soon(worker)


def enter_network(name):
    """Move this thread, and no other, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
    finally:
        os.close(fd)
