"""The key-value store of a cluster, as programs use it: registers with versions, any node answers.

A register may hold several values at once, written concurrently (*siblings*).  `get` returns all of
them with a *context*; a put with that context supersedes exactly what was seen.  A put without a
context supersedes what its coordinator sees; `context=BLIND` supersedes nothing.

    async with connect(ref) as cluster:
        kv = KV(cluster)
        await kv.put(b"colour", b"blue")
        entry = await kv.get(b"colour")  # entry.values == (b"blue",)
        await kv.put(b"colour", b"green", context=entry.context)

Consistency is chosen per call: `level` is one of `LEVELS`, or the numbers n, r, w, pr, pw one by
one.  (DeCandia et al., "Dynamo", SOSP 2007; dotted version vectors: Almeida et al. 2014.)
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import trio

from dfs.client.connect import Cluster
from dfs.cluster.map import METADATA
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    NotHome,
    StaleEpoch,
    Unreachable,
)
from dfs.hashing import digest, partition_of

LEVELS = ("one", "quorum", "all", "local-quorum", "each-zone")
USER_SPACE, CLUSTER_SPACE = 0, 1
MAX_KEY = 1024  # bytes
MAX_VALUE = 1 << 20
BLIND = b""  # a context that has seen nothing
TIMEOUT = 10.0  # seconds for a whole operation
ATTEMPT = 1.5  # seconds a first coordinator is given before another one is asked
PAGE = 500  # keys of a scan fetched at once
_ELSEWHERE = (Unreachable, DeadlineExceeded, Busy, NotHome, StaleEpoch)


class Options(TypedDict, total=False):
    """How many replicas must answer; see the module's docstring.  Numbers win over the level."""

    level: str  # one of LEVELS
    n: int  # copies that take part
    r: int  # answers a read needs
    w: int  # durable copies a write needs
    pr: int  # of the answers, how many from homes
    pw: int  # of the copies, how many on homes
    eventual: bool  # r + w may be <= n, and a read does not wait for repair


class Entry(NamedTuple):
    """A register as a read found it; without values it was never written, or deleted."""

    key: bytes
    values: tuple[bytes, ...]  # different siblings, the newest first
    context: bytes  # hand it to the put or delete that supersedes them
    info: dict[str, Any]  # who took part, for people

    @property
    def value(self) -> bytes | None:
        """The newest value, None if there is none."""
        return self.values[0] if self.values else None


def partition_of_key(key: bytes, space: int = USER_SPACE) -> int:
    """The partition of a register."""
    return partition_of(digest(bytes([space]) + key))


class KV:
    """Registers of one space of a cluster; cheap, holds no connection of its own."""

    def __init__(
        self, cluster: Cluster, *, space: int = USER_SPACE, timeout: float = TIMEOUT
    ) -> None:
        """Every call ends within `timeout` seconds, with an answer or `NoQuorum` and the like."""
        self._cluster = cluster
        self._space = space
        self._timeout = timeout
        self._failed: dict[int, float] = {}  # node -> when it may be asked first again
        self._epoch = -1  # of the map that the next is made from
        self._orders: dict[int, tuple[int, ...]] = {}  # partition -> whom to ask, the homes first

    async def get(self, key: bytes, **options: Unpack[Options]) -> Entry:
        """Read a register.

        Raises `NoQuorum` (who answered and who did not), `Unreachable`, `InvalidArgument`.
        """
        values, context, info = await self._ask(key, "kv.get", (), options)
        return Entry(key, tuple(dict.fromkeys(values)), context, info)

    async def put(
        self,
        key: bytes,
        value: bytes,
        *,
        context: bytes | None = None,
        **options: Unpack[Options],
    ) -> Entry:
        """Write a value; returns the register's new context, and no values.

        Raises what `get` does, and `TooManySiblings`, `DiskFull`.  After `NoQuorum` the value may
        be there or come back later: write again with the same context, or read.
        """
        if len(value) > MAX_VALUE:
            raise InvalidArgument(
                f"the value of {key!r:.60} has {len(value)} bytes, at most {MAX_VALUE} are kept in "
                "a register: put large things into a volume"
            )
        return await self._write(key, value, context, options)

    async def delete(
        self, key: bytes, *, context: bytes | None = None, **options: Unpack[Options]
    ) -> Entry:
        """Delete what the context has seen (default: what the coordinator sees); as `put`."""
        return await self._write(key, None, context, options)

    async def scan(
        self, prefix: bytes = b"", **options: Unpack[Options]
    ) -> AsyncGenerator[Entry, None]:
        """Every register with values whose key starts with `prefix`.

        In the order of the hash space, not of the keys: each key once, if it is there all the time.
        """
        cursor = b""
        while True:
            items, cursor = await self._call(
                self._everybody(),
                "kv.scan",
                (self._space, prefix, cursor, PAGE, dict(options)),
            )
            for key, values, context in items:
                yield Entry(key, tuple(dict.fromkeys(values)), context, {})
            if not cursor:
                return

    async def _write(
        self, key: bytes, value: bytes | None, context: bytes | None, options: Options
    ) -> Entry:
        # The same id for every attempt: a coordinator that did it already says so.
        request = self._cluster.random.getrandbits(128).to_bytes(16, "big")
        new, _siblings, info = await self._ask(
            key, "kv.put", (value, context), {**options, "request": request}
        )
        return Entry(key, (), new, info)

    async def _ask(self, key: bytes, method: str, args: tuple[Any, ...], options: Any) -> Any:
        if not 0 < len(key) <= MAX_KEY:
            raise InvalidArgument(f"a key has 1 to {MAX_KEY} bytes, not {len(key)}")
        level = options.get("level")
        if level is not None and level not in LEVELS:
            raise InvalidArgument(f"no level {level!r}; there are {', '.join(LEVELS)}")
        partition = partition_of_key(key, self._space)
        own = (self._space, key, *args, options)
        return await self._call(None, method, own, partition)

    async def _call(
        self,
        nodes: Sequence[int] | None,
        method: str,
        args: tuple[Any, ...],
        partition: int = 0,
    ) -> Any:
        """Ask one node after the other until one answers for good or time is up."""
        clock = self._cluster.clock
        now = clock.monotonic()
        deadline = now + self._timeout
        attempt = 0
        tried = 0
        without: set[int] = set()  # found no quorum, or have no room: others may
        error: DfsError | None = None
        while True:
            # the map may change between attempts
            order = self._order(nodes or self._coordinators(partition), now)
            left = deadline - now
            if left <= 0 or not order:
                raise error or Unreachable("the cluster map names no metadata node")
            node = order[tried % len(order)]
            try:
                # all are asked before one of them is waited for
                patience = ATTEMPT * 2.0 ** (attempt // len(order))
                return await self._attempt(node, method, args, min(left, patience))
            except (NoQuorum, DiskFull) as e:
                error = e if isinstance(e, NoQuorum) or error is None else error
                tried += 1
                without.add(node)
                if without.issuperset(order):
                    raise
            except _ELSEWHERE as e:
                error = error if isinstance(error, NoQuorum) else e
                tried += 1
                if isinstance(e, StaleEpoch):
                    await self._cluster.refresh_map(self._cluster.get_map().address(METADATA, node))
                elif isinstance(e, Unreachable | DeadlineExceeded):
                    self._failed[node] = clock.monotonic() + 5.0
                    tried = 0  # it is the last of the new order
            attempt += 1
            if attempt >= len(order):
                pause = min(0.5, 0.02 * 2.0 ** min(attempt, 10))
                left = max(0.0, deadline - clock.monotonic())
                await trio.sleep(min(left, pause * self._cluster.random.uniform(0.5, 1.0)))
            now = clock.monotonic()

    async def _attempt(self, node: int, method: str, args: tuple[Any, ...], timeout: float) -> Any:
        cluster_map = self._cluster.get_map()
        result, _ = await self._cluster.rpc.call(
            cluster_map.address(METADATA, node),
            method,
            args,
            timeout=timeout,
            epoch=cluster_map.epoch,
        )
        if self._failed:
            self._failed.pop(node, None)
        return result

    def _coordinators(self, partition: int) -> tuple[int, ...]:
        cluster_map = self._cluster.get_map()
        if cluster_map.epoch != self._epoch:
            self._epoch = cluster_map.epoch
            self._orders.clear()
        found = self._orders.get(partition)
        if found is None:
            homes = cluster_map.read_homes(METADATA, partition)
            rest = cluster_map.preference(METADATA, partition)
            found = (*homes, *(node for node in rest if node not in homes))
            self._orders[partition] = found
        return found

    def _everybody(self) -> tuple[int, ...]:
        nodes = self._cluster.get_map().nodes
        return tuple(node.number for node in nodes if node.metadata_addr)

    def _order(self, nodes: Sequence[int], now: float) -> Sequence[int]:
        if not self._failed:
            return nodes
        return sorted(nodes, key=lambda node: self._failed.get(node, 0.0) > now)
