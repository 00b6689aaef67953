"""Scans over the whole cluster: pages of keys with a prefix, each partition read from R homes.

The order is that of the rows: by partition, which is a hash, then by key; so a page can be asked of
every node at once and the pages of a node follow each other in its store.  A cursor is the last row
that was dealt with.  One request per node covers a window of partitions, which doubles until the
page is full.

Keys whose copies differ, and those of partitions in transition, are read again one by one, with the
repair and the guarantees of a get.  Otherwise a scan is no snapshot: a key that is there all the
time is found once, one that comes or goes meanwhile may be found or not.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from struct import pack, unpack
from typing import Any

import trio

from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Rpc
from dfs.errors import DfsError, InvalidArgument, NoQuorum, StaleEpoch
from dfs.hashing import PARTITIONS
from metadata import versions
from metadata.coordinator import Coordinator
from metadata.quorum import Options
from metadata.registers import MAX_KEY, PREFIX, Registers

WINDOW = 256  # partitions asked for at first
MAX_LIMIT = 1000  # keys in a page
PAGE_BYTES = 4 << 20  # of registers in one node's answer
ATTEMPT = 5.0  # seconds for one node's answer
RETRIES = 5  # of a window, when nodes fail or the map changes
_YIELD = 64  # partitions listed before other tasks have their turn

Items = tuple[tuple[bytes, tuple[bytes, ...], bytes], ...]
Rows = dict[bytes, bytes]


class Scanner:
    """Makes pages on a coordinator, be it a home of anything or not."""

    def __init__(
        self,
        rpc: Rpc,
        number: int,
        core: Coordinator,
        get_map: Callable[[], ClusterMap],
        offer: Callable[[bytes], None],
        read: Callable[[bytes, Options, float], Awaitable[Any]],
    ) -> None:
        """`read` is a get of a row that this node may coordinate; other rows go to their homes."""
        self._rpc = rpc
        self._number = number
        self._core = core
        self._get_map = get_map
        self._offer = offer
        self._read = read

    async def page(
        self, space: int, prefix: bytes, after: bytes, limit: int, options: Options, deadline: float
    ) -> tuple[Items, bytes]:
        """Up to `limit` keys after the cursor `after` (b"" = the beginning), and the next cursor.

        Raises `NoQuorum`, `InvalidArgument`.
        """
        _check(space, prefix, after, limit)
        limit = min(limit, MAX_LIMIT)
        row = PREFIX + after if after else b""
        items: list[tuple[bytes, tuple[bytes, ...], bytes]] = []
        window = WINDOW
        size = 0
        while len(items) < limit and size < PAGE_BYTES:
            first = unpack(">H", row[1:3])[0] if row else 0
            if first >= PARTITIONS:
                return tuple(items), b""
            last = min(first + window, PARTITIONS)
            answers, row = await self._window(
                space, prefix, row, first, last, limit - len(items), options, deadline
            )
            for found in sorted(answers):
                values, context = await self._settle(found, answers[found], options, deadline)
                if values:
                    items.append((found[4:], values, context))
                    size += len(found) + sum(len(value) for value in values)
                    if len(items) == limit:
                        row = found
                        break
            window *= 2
        return tuple(items), row[1:]

    async def _settle(
        self, row: bytes, answers: list[bytes], options: Options, deadline: float
    ) -> tuple[tuple[bytes, ...], bytes]:
        partition = unpack(">H", row[1:3])[0]
        plan = self._core.plan(partition, options)
        if any(answer != answers[0] for answer in answers) or plan.joint:
            if self._number in plan.readers:
                values, context, _ = await self._read(row, options, deadline)
                return values, context
            given: dict[str, Any] = {} if options.level is None else {"level": options.level}
            for name in ("n", "r", "w", "pr", "pw"):
                if getattr(options, name) is not None:
                    given[name] = getattr(options, name)
            if options.eventual:
                given["eventual"] = True
            cluster = self._get_map()
            (values, context, _), _ = await self._rpc.call(
                cluster.address(METADATA, self._core.order(plan.readers)[0]),
                "kv.get",
                (row[3], row[4:], given),
                timeout=ATTEMPT,
                epoch=cluster.epoch,
            )
            return values, context
        register = versions.decode(answers[0])
        return tuple([x[2] for x in register[1]]), versions.encode_context(register[0])

    async def _window(
        self,
        space: int,
        prefix: bytes,
        row: bytes,
        first: int,
        last: int,
        limit: int,
        options: Options,
        deadline: float,
    ) -> tuple[dict[bytes, list[bytes]], bytes]:
        """Copies of rows of partitions first..last-1 after `row`, and how far they are whole."""
        failed: dict[int, DfsError] = {}
        for _ in range(RETRIES):
            cluster = self._get_map()
            wanted = self._assign(first, last, options, failed)
            replies: dict[int, tuple[Rows, bytes]] = {}
            async with trio.open_nursery() as nursery:
                for node, partitions in wanted.items():
                    args = (
                        self._number,
                        space,
                        prefix,
                        (pack(f">{len(partitions)}H", *partitions), row),
                        limit,
                    )
                    nursery.start_soon(
                        partial(self._ask, cluster, node, args, deadline, replies, failed)
                    )
            if len(replies) == len(wanted):
                return _join(wanted, replies, pack(">H", last) + bytes((space,)))
        raise NoQuorum(f"the scan found no quorum: {_reasons(failed)}")

    def _assign(
        self, first: int, last: int, options: Options, failed: dict[int, DfsError]
    ) -> dict[int, list[int]]:
        core = self._core
        wanted: dict[int, list[int]] = {}
        for partition in range(first, last):
            asked: dict[int, None] = {}
            for members, total, _ in core.plan(partition, options).reads:
                able = [node for node in core.order(members) if node not in failed]
                if len(able) < total:
                    raise NoQuorum(
                        f"{total} of {len(members)} needed to scan partition {partition}: "
                        f"{_reasons(failed)}",
                        f"{total} of {len(members)}",
                        {node: str(error) for node, error in failed.items()},
                    )
                asked.update(dict.fromkeys(able[:total]))
            for node in asked:
                wanted.setdefault(node, []).append(partition)
        return wanted

    async def _ask(
        self,
        cluster: ClusterMap,
        node: int,
        args: tuple[Any, ...],
        deadline: float,
        replies: dict[int, tuple[Rows, bytes]],
        failed: dict[int, DfsError],
    ) -> None:
        left = max(min(deadline - trio.current_time(), ATTEMPT), 0.001)
        try:
            (rows, upto), _ = await self._rpc.call(
                cluster.address(METADATA, node), "reg.scan", args, timeout=left, epoch=cluster.epoch
            )
            replies[node] = (dict(rows), upto)
        except StaleEpoch as e:
            if e.details:
                self._offer(e.details[0])
            if self._get_map().epoch <= cluster.epoch:
                failed[node] = e
        except DfsError as e:
            failed[node] = e


def _join(
    wanted: dict[int, list[int]], replies: dict[int, tuple[Rows, bytes]], end: bytes
) -> tuple[dict[bytes, list[bytes]], bytes]:
    """Put the nodes' answers side by side, as far as all of them are whole."""
    stop = min((upto for _, upto in replies.values() if upto), default=b"")
    sources: dict[int, list[Rows]] = {}
    for node, partitions in wanted.items():
        for partition in partitions:
            sources.setdefault(partition, []).append(replies[node][0])
    found: dict[bytes, list[bytes]] = {}
    for rows, _ in replies.values():
        for row in rows:
            if row not in found and (not stop or row <= stop):
                copies = sources[unpack(">H", row[1:3])[0]]
                found[row] = [copy.get(row, b"") for copy in copies]
    return found, stop or PREFIX + end


async def scan_rows(
    registers: Registers, epoch: int, space: int, prefix: bytes, wanted: Any, limit: int
) -> tuple[tuple[tuple[bytes, bytes], ...], bytes]:
    """The replica's part: rows of some partitions, and the last one if more would follow.

    Raises `StaleEpoch`, `Corrupt`.
    """
    packed, after = wanted
    if not 0 < limit <= MAX_LIMIT or packed.__class__ is not bytes:
        raise InvalidArgument(f"a page has 1 to {MAX_LIMIT} keys, not {limit!r}")
    rows: list[tuple[bytes, bytes]] = []
    size = 0
    partitions = sorted(unpack(f">{len(packed) // 2}H", packed))
    for i, partition in enumerate(partitions):
        if i % _YIELD == _YIELD - 1:
            await trio.lowlevel.checkpoint()
        head = PREFIX + pack(">H", partition) + bytes((space,)) + prefix
        found = registers.scan(epoch, partition, head, after, limit - len(rows))
        for row, register in found:
            rows.append((row, register))
            size += len(row) + len(register)
            if size >= PAGE_BYTES:
                break
        if rows and (len(rows) >= limit or size >= PAGE_BYTES):
            return tuple(rows), rows[-1][0]
    return tuple(rows), b""


def _check(space: Any, prefix: Any, after: Any, limit: Any) -> None:
    if space.__class__ is not int or not 0 <= space < 256:
        raise InvalidArgument(f"a space is 0 to 255, not {space!r}")
    if prefix.__class__ is not bytes or len(prefix) > MAX_KEY:
        raise InvalidArgument(f"a prefix is up to {MAX_KEY} bytes, not {prefix!r:.60}")
    if limit.__class__ is not int or limit < 1:
        raise InvalidArgument(f"a page has 1 to {MAX_LIMIT} keys, not {limit!r}")
    if after.__class__ is not bytes or (after and not 3 <= len(after) <= 3 + MAX_KEY):
        raise InvalidArgument("not a cursor: pass on what the page before returned")


def _reasons(failed: dict[int, DfsError]) -> str:
    return "; ".join(f"node {node}: {error}" for node, error in sorted(failed.items())) or "nobody"
