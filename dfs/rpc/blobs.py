"""Immutable blobs on their homes: the quorum logic, for daemons and clients alike.

A blob's name is its BLAKE3 hash, which also says where it lives: the homes of its partition in the
metadata placement.  A blob never changes, so one verified copy is enough to read, writing it twice
is harmless, and no conflict exists.

Writing: every blob goes to all its homes at once, one request per home for many blobs, and
`put_many` returns as soon as each is durable on W of them.  The other copies finish behind the
caller's back; what they miss is for repair.  Fallback nodes are no substitute: a reader may find a
blob only because some W of its N homes have it.

Reading: the homes in order, then 2N more nodes of the preference list, one after the other; a node
that keeps a reader waiting is joined by the next one, not awaited.  Nothing runs in tasks: replies
come as callbacks, and the one waiting task is woken for each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any

import trio

from dfs.clock import Clock
from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Buffer, Priority, Rpc
from dfs.errors import (
    Busy,
    Corrupt,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    NoQuorum,
    NotFound,
    StaleEpoch,
    Unreachable,
)
from dfs.hashing import digest, partition_of
from dfs.rpc.budget import Flight, InFlight
from dfs.rpc.mapkeeper import MapKeeper

PUT_BYTES = 8 << 20  # of blobs in one request
PUT_COUNT = 1024
GET_COUNT = 256
ATTEMPT = 2.0  # seconds for the first request to a node; each failure doubles it
HEDGE = 0.5  # seconds after which the next node is asked as well
SUSPECT = 5.0  # seconds during which a node that failed is asked last
_TRANSIENT = (Unreachable, Busy, DeadlineExceeded, StaleEpoch)
_PAUSE = (0.05, 1.0)  # seconds before a node that failed is tried again: first, longest

_Answer = tuple[Any, Buffer] | DfsError


class BlobClient:
    """Puts and gets blobs; cheap to share, holds no connection of its own."""

    def __init__(
        self,
        rpc: Rpc,
        get_map: Callable[[], ClusterMap],
        clock: Clock,
        *,
        inflight: InFlight | None = None,
    ) -> None:
        """`get_map` gives the newest known map at each call.

        `inflight` bounds the bytes of puts under way; default: bounds of this client alone.
        """
        self.inflight = inflight or InFlight()
        self.rpc = rpc
        self.get_map = get_map
        self.clock = clock
        self.suspects: dict[int, float] = {}  # node -> when to trust it again

    async def put_many(self, blobs: Sequence[bytes], *, timeout: float = 10.0) -> list[bytes]:
        """Store the blobs; returns their hashes once each is durable on W homes.

        Raises `NoQuorum`, or `DiskFull` if that is why; the error names the nodes that failed.
        Blobs may be stored in part then; storing them again is harmless.
        """
        hashes = [digest(blob) for blob in blobs]
        if hashes:
            todo = dict(zip(hashes, blobs, strict=True))
            flight = None
            with trio.move_on_after(timeout):
                flight = await self.inflight.acquire(sum(map(len, todo.values())))
            if flight is None:
                raise Busy(
                    f"{self.inflight.used} bytes of writes have been under way here for "
                    f"{timeout:g} s: the homes of blobs are slow; try again"
                )
            try:
                await _Put(self, todo, timeout, flight).run()
            finally:
                flight.close()
        return hashes

    async def get_many(
        self, hashes: Iterable[bytes], *, timeout: float = 10.0
    ) -> dict[bytes, bytes]:
        """The blobs with these hashes, verified.

        Raises `NotFound` (details: the hashes) when all homes of a blob say that they lack it,
        `NoQuorum` when a blob was not found but some home did not answer.
        """
        wanted = dict.fromkeys(hashes)
        if not wanted:
            return {}
        return await _Get(self, list(wanted), timeout).run()

    def learn(self, error: DfsError) -> bool:
        """Take the map out of a `StaleEpoch`; whether it was newer."""
        keeper = self.get_map
        return isinstance(keeper, MapKeeper) and keeper.learn(error)

    def trust(self, node: int) -> None:
        """The node answered."""
        self.suspects.pop(node, None)

    def suspect(self, node: int) -> None:
        """The node failed or is slow."""
        self.suspects[node] = self.clock.monotonic() + SUSPECT


class _Batch:
    """What putting and getting share: requests to nodes, their failures, one waiting task."""

    def __init__(self, client: BlobClient, timeout: float) -> None:
        self.client = client
        self.timeout = timeout
        self.deadline = client.clock.monotonic() + timeout
        self.failures: dict[int, DfsError] = {}  # the last one of each node
        self.attempts: dict[int, int] = {}
        self.retry_at: dict[int, float] = {}  # inf = never again
        self._changed = trio.Event()

    def send(
        self,
        node: int,
        method: str,
        args: tuple[Any, ...],
        data: Sequence[bytes],
        on_reply: Callable[[_Answer], None],
    ) -> None:
        """Request something of a node; whatever comes back wakes the waiting task."""
        client = self.client
        cluster = client.get_map()
        # A lost message must not cost the whole deadline, a slow node must get the time it needs.
        patience = ATTEMPT * 2.0 ** min(self.attempts.get(node, 0), 10)

        def receive(answer: _Answer) -> None:
            if isinstance(answer, DfsError):
                self.failed(node, answer)
            else:
                client.trust(node)
            on_reply(answer)
            self._changed.set()

        client.rpc.request(
            cluster.address(METADATA, node),
            method,
            args,
            data,
            timeout=max(min(patience, self.deadline - client.clock.monotonic()), 0.001),
            on_reply=receive,
            priority=Priority.NORMAL,
            epoch=cluster.epoch,
        )

    def homes(self, name: bytes) -> tuple[int, ...]:
        """All nodes that count: one set of homes, or two while they move."""
        return tuple(dict.fromkeys(node for row in self.sets(name) for node in row))

    def sets(self, name: bytes) -> tuple[tuple[int, ...], ...]:
        """The sets of homes in each of which a blob needs W copies."""
        return self.client.get_map().write_sets(METADATA, partition_of(name))

    def failed(self, node: int, error: DfsError) -> None:
        """Note a node's failure and when to try it again."""
        if self.client.learn(error):
            return  # the map was too old: ask those of the new one at once
        self.failures[node] = error
        if not isinstance(error, _TRANSIENT):
            self.retry_at[node] = inf
            return
        if isinstance(error, Unreachable | DeadlineExceeded):
            self.client.suspect(node)
        attempt = self.attempts.get(node, 0)
        self.attempts[node] = attempt + 1
        wait = min(_PAUSE[1], _PAUSE[0] * 2.0 ** min(attempt, 10))
        self.retry_at[node] = self.client.clock.monotonic() + wait

    async def wait(self, until: float) -> None:
        """Until something is answered or the clock says `until` or the deadline."""
        seconds = min(until, self.deadline) - self.client.clock.monotonic()
        with trio.move_on_after(max(seconds, 0.0)):
            await self._changed.wait()
        self._changed = trio.Event()

    def reasons(self, nodes: Iterable[int]) -> str:
        """One clause per node, for messages."""
        cluster = self.client.get_map()
        known = {n.number: n for n in cluster.nodes}
        clauses = []
        for node in sorted(nodes):
            name = f"{known[node].name} (node {node})" if node in known else f"node {node}"
            clauses.append(f"{name}: {self.failures.get(node) or 'no answer'}")
        return "; ".join(clauses)


class _Put(_Batch):
    """One `put_many`."""

    def __init__(
        self, client: BlobClient, blobs: dict[bytes, bytes], timeout: float, flight: Flight
    ) -> None:
        super().__init__(client, timeout)
        self.flight = flight  # charged until the last copy ended, not only W of them
        self.count = len(blobs)
        self.todo = blobs  # those on fewer than W homes
        self.holders: dict[bytes, set[int]] = {h: set() for h in blobs}
        self.asked: dict[bytes, set[int]] = {h: set() for h in blobs}  # answer outstanding

    async def run(self) -> None:
        clock = self.client.clock
        while self.todo:
            now = clock.monotonic()
            if now >= self.deadline:
                raise self.verdict()
            for node, group in self.groups(now):
                if self.has_room(node, group, now):
                    self.put(node, group)
            if any(self.hopeless(name) for name in self.todo):
                raise self.verdict()
            later = min((t for t in self.retry_at.values() if t > now), default=inf)
            await self.wait(later)

    def groups(self, now: float) -> Iterator[tuple[int, list[bytes]]]:
        """(node, names) of the requests to make now."""
        wanted: dict[int, list[bytes]] = {}
        for name in self.todo:
            held, asked = self.holders[name], self.asked[name]
            for node in self.homes(name):
                if node not in held and node not in asked and self.retry_at.get(node, 0) <= now:
                    wanted.setdefault(node, []).append(name)
        for node, names in wanted.items():
            group: list[bytes] = []
            size = 0
            for name in names:
                length = len(self.todo[name])
                if group and (size + length > PUT_BYTES or len(group) == PUT_COUNT):
                    yield node, group
                    group, size = [], 0
                group.append(name)
                size += length
            yield node, group

    def has_room(self, node: int, names: list[bytes], now: float) -> bool:
        """Whether the node may be sent these now; else when to look again is noted."""
        inflight = self.client.inflight
        if inflight.has_room(node, sum(len(self.todo[name]) for name in names), now):
            return True
        if inflight.slow(node, now):
            self.failed(node, Busy("takes writes too slowly: too many bytes wait for it"))
        else:
            self.retry_at[node] = now + _PAUSE[0]
        return False

    def put(self, node: int, names: list[bytes]) -> None:
        blobs = [self.todo[name] for name in names]
        size = sum(map(len, blobs))
        for name in names:
            self.asked[name].add(node)

        def answered(answer: _Answer) -> None:
            self.flight.ended(node, size)
            for name in names:
                self.asked[name].discard(node)
            if isinstance(answer, DfsError):
                return
            (result, _) = answer
            if not (isinstance(result, tuple) and result and result[0] == len(names)):
                self.failed(node, NoQuorum(f"stored {result!r} of {len(names)} blobs"))
                return
            enough = self.client.get_map().w
            for name in names:
                held = self.holders[name]
                held.add(node)
                if all(len(held.intersection(row)) >= enough for row in self.sets(name)):
                    self.todo.pop(name, None)

        args = (tuple((name, len(blob)) for name, blob in zip(names, blobs, strict=True)),)
        self.flight.send(node, size)
        self.send(node, "blob.put", args, blobs, answered)

    def hopeless(self, name: bytes) -> bool:
        """Whether too many homes refused for good."""
        enough, held = self.client.get_map().w, self.holders[name]
        return any(
            sum(node in held or self.retry_at.get(node, 0) < inf for node in row) < enough
            for row in self.sets(name)
        )

    def verdict(self) -> DfsError:
        silent = set(self.failures)
        for name in self.todo:
            silent.update(set(self.homes(name)) - self.holders[name])
        why = self.reasons(silent)
        full = any(isinstance(e, DiskFull) for e in self.failures.values())
        text = (
            f"{len(self.todo)} of {self.count} blobs are on fewer than {self.client.get_map().w} "
            f"of their homes after {self.timeout:g} s: {why}"
        )
        return DiskFull(text) if full else NoQuorum(text)


class _Get(_Batch):
    """One `get_many`."""

    def __init__(self, client: BlobClient, names: list[bytes], timeout: float) -> None:
        super().__init__(client, timeout)
        self.found: dict[bytes, bytes] = {}
        self.todo = dict.fromkeys(names, 0.0)  # name -> when to ask one more node
        self.asked: dict[bytes, set[int]] = {h: set() for h in names}  # answer outstanding
        self.absent: dict[bytes, set[int]] = {h: set() for h in names}  # nodes that lack it

    async def run(self) -> dict[bytes, bytes]:
        clock = self.client.clock
        while self.todo:
            now = clock.monotonic()
            groups: dict[int, list[bytes]] = {}
            for name, due in list(self.todo.items()):
                if self.asked[name] and now < due:
                    continue
                node = self.next_node(name, now)
                if node is not None:
                    groups.setdefault(node, []).append(name)
                    self.todo[name] = now + HEDGE
                elif not self.asked[name]:
                    self.check(name)
                    self.todo[name] = inf
                else:
                    self.todo[name] = inf
            for node, names in groups.items():
                for start in range(0, len(names), GET_COUNT):
                    self.get(node, names[start : start + GET_COUNT])
            if now >= self.deadline:
                raise self.verdict()
            times = [t for t in (*self.todo.values(), *self.retry_at.values()) if t > now]
            await self.wait(min(times, default=inf))
        return self.found

    def nodes(self, name: bytes) -> dict[int, None]:
        """Those that may be asked, in order."""
        cluster = self.client.get_map()
        return dict.fromkeys(cluster.preference(METADATA, partition_of(name))[: 3 * cluster.n])

    def next_node(self, name: bytes, now: float) -> int | None:
        """The best node that may be asked now; those that failed lately come last."""
        asked, absent, suspects = self.asked[name], self.absent[name], self.client.suspects
        # The homes come first in the full order too, which takes longer to work out.
        for node in self.client.get_map().homes(METADATA, partition_of(name)):
            if node in asked or node in absent or self.retry_at.get(node, 0) > now:
                continue
            if suspects.get(node, 0) <= now:
                return node
        slow: int | None = None
        for node in self.nodes(name):
            if node in asked or node in absent or self.retry_at.get(node, 0) > now:
                continue
            if suspects.get(node, 0) <= now:
                return node
            if slow is None:
                slow = node
        return slow

    def get(self, node: int, names: list[bytes]) -> None:
        for name in names:
            if self.asked[name]:  # those asked before are slow
                for other in self.asked[name]:
                    self.client.suspect(other)
            self.asked[name].add(node)

        def answered(answer: _Answer) -> None:
            for name in names:
                self.asked[name].discard(node)
                if name in self.todo:
                    self.todo[name] = 0.0
            if not isinstance(answer, DfsError):
                self.take(node, names, *answer)

        self.send(node, "blob.get", (tuple(names),), (), answered)

    def take(self, node: int, names: list[bytes], result: Any, data: Buffer) -> None:
        """Verify and keep what a node sent."""
        lengths = result[0] if isinstance(result, tuple) and result else ()
        if len(lengths) != len(names) or sum(n for n in lengths if n > 0) != len(data):
            self.failed(node, Corrupt("the answer's lengths do not match its data"))
            return
        at = 0
        view = memoryview(data)
        for name, length in zip(names, lengths, strict=True):
            if length < 0:
                self.absent[name].add(node)
                continue
            blob = bytes(view[at : at + length])
            at += length
            if digest(blob) != name:
                self.absent[name].add(node)
                self.failures[node] = Corrupt(f"sent other bytes as blob {name.hex()}")
            elif self.todo.pop(name, None) is not None:
                self.found[name] = blob

    def check(self, name: bytes) -> None:
        """All nodes were asked; raises `NotFound` if that is a proof, or if none is left to ask."""
        if self.absent[name].issuperset(self.homes(name)):
            lost = [n for n in self.todo if self.absent[n].issuperset(self.homes(n))]
            corrupt = {n for n, e in self.failures.items() if isinstance(e, Corrupt)}
            shown = ", ".join(n.hex()[:16] for n in lost[:3])
            text = f"{len(lost)} blobs are on none of their homes, e.g. {shown}"
            if corrupt:
                raise Corrupt(f"{text}; {self.reasons(corrupt)}", *lost)
            raise NotFound(text, *lost)
        if not any(
            self.retry_at.get(n, 0) < inf for n in self.nodes(name).keys() - self.absent[name]
        ):
            raise self.verdict()

    def verdict(self) -> DfsError:
        silent = set(self.failures)
        for name in self.todo:
            silent.update(set(self.homes(name)) - self.absent[name])
        return NoQuorum(
            f"{len(self.todo)} of {len(self.asked)} blobs were not found within "
            f"{self.timeout:g} s: {self.reasons(silent)}"
        )
