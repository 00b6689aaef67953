"""The client of the key-value store, against coordinators that a test scripts."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import trio

from dfs.client.connect import Cluster
from dfs.client.kv import BLIND, KV, MAX_VALUE, Entry
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    StaleEpoch,
    TooManySiblings,
    Unreachable,
)
from dfs.hashing import digest, partition_of
from dfs.rpc.blobs import BlobClient
from dfs.testing.chunkcluster import SimClock, cluster_map
from dfs.testing.network import SimNetwork

Answer = Callable[[int, str, tuple[Any, ...]], Any]


class World:
    """Three coordinators that answer with `answer(node, method, args)`, and a client."""

    def __init__(self, network: SimNetwork, answer: Answer) -> None:
        self.network = network
        self.answer = answer
        self.asked: list[tuple[int, str, tuple[Any, ...], int]] = []
        self.map = cluster_map(3)
        clock = SimClock()
        rpc = network.endpoint("client")
        get_map: Callable[[], ClusterMap] = lambda: self.map  # noqa: E731 - needs the type
        cluster = Cluster(rpc, get_map, BlobClient(rpc, get_map, clock), clock, Random(1))
        self.kv = KV(cluster, timeout=8.0)

    async def serve(self, number: int, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        def handler(method: str) -> Any:
            def handle(ctx: Any, args: tuple[Any, ...], _data: memoryview) -> Any:
                self.asked.append((number, method, args, ctx.epoch))
                return self.answer(number, method, args), b""

            return handle

        endpoint = self.network.endpoint(f"n{number}")
        handlers = {m: handler(m) for m in ("kv.get", "kv.put", "kv.scan")}
        address = self.map.address(METADATA, number)
        await endpoint.serve(address, handlers, started=task_status.started)

    def homes(self, key: bytes) -> tuple[int, ...]:
        return self.map.homes(METADATA, partition_of(digest(b"\0" + key)))


@asynccontextmanager
async def world(answer: Answer, serving: tuple[int, ...] = (1, 2, 3)) -> AsyncIterator[World]:
    clock = SimClock()
    async with SimNetwork(Random(1), clock) as network, trio.open_nursery() as nursery:
        made = World(network, answer)
        for number in serving:
            if number in {node.number for node in made.map.nodes}:
                await nursery.start(made.serve, number)
        yield made
        nursery.cancel_scope.cancel()


async def test_asks_a_home_and_carries_the_epoch() -> None:
    async with world(lambda *_: ((b"blue", b"red", b"blue"), b"ctx", {"acked": (1, 2)})) as w:
        entry = await w.kv.get(b"colour", level="all")
        assert entry == Entry(b"colour", (b"blue", b"red"), b"ctx", {"acked": (1, 2)})
        assert entry.value == b"blue"
        ((node, method, args, epoch),) = w.asked
        assert node == w.homes(b"colour")[0]
        assert (method, args, epoch) == ("kv.get", (0, b"colour", {"level": "all"}), 1)


async def test_goes_to_another_home_with_the_same_request_id() -> None:
    async with world(lambda *_: (b"new", 1, {})) as w:
        first = w.homes(b"k")[0]

        def answer(node: int, *_: Any) -> Any:
            if node == first:
                raise Busy("not now")
            return b"new", 1, {}

        w.answer = answer
        assert (await w.kv.put(b"k", b"v", context=BLIND, w=1)).context == b"new"
        assert [node for node, *_ in w.asked] == list(w.homes(b"k")[:2])
        (one, other) = (args for _, _, args, _ in w.asked)
        assert one == other
        assert one[:4] == (0, b"k", b"v", b"")
        assert len(one[4]["request"]) == 16


async def test_a_dead_home_is_asked_last_next_time() -> None:
    async with world(lambda *_: ((), b"", {})) as w:
        first = w.homes(b"k")[0]
        w.network.endpoint(f"n{first}")  # nobody serves there any more
        assert (await w.kv.get(b"k")).value is None
        assert [node for node, *_ in w.asked] == [w.homes(b"k")[1]]
        await w.kv.get(b"k")
        assert [node for node, *_ in w.asked] == [w.homes(b"k")[1]] * 2


async def test_no_quorum_is_believed_when_every_node_says_so() -> None:
    def answer(node: int, *_: Any) -> Any:
        raise NoQuorum(f"node {node} sees nobody")

    async with world(answer) as w:
        with pytest.raises(NoQuorum, match="sees nobody"):
            await w.kv.get(b"k")
        assert sorted(node for node, *_ in w.asked) == [1, 2, 3]


async def test_one_node_with_a_quorum_is_enough() -> None:
    async with world(lambda *_: None) as w:
        last = w.homes(b"k")[-1]

        def answer(node: int, *_: Any) -> Any:
            if node != last:
                raise NoQuorum("cut off")
            return (b"v",), b"", {}

        w.answer = answer
        assert (await w.kv.get(b"k")).value == b"v"


async def test_all_dead_is_an_error_in_time() -> None:
    async with world(lambda *_: None, serving=()) as w:
        start = trio.current_time()
        with pytest.raises(Unreachable):
            await w.kv.get(b"k")
        assert 7 < trio.current_time() - start < 12


async def test_final_answers_are_not_tried_elsewhere() -> None:
    def answer(*_: Any) -> Any:
        raise TooManySiblings("k has 32 siblings")

    async with world(answer) as w:
        with pytest.raises(TooManySiblings):
            await w.kv.put(b"k", b"v")
        assert len(w.asked) == 1


async def test_a_stale_map_is_refreshed_and_the_request_sent_again() -> None:
    seen: list[str] = []

    async with world(lambda *_: None) as w:

        async def refresh(first: str = "") -> None:
            seen.append(first)

        def answer(*_: Any) -> Any:
            if not seen:
                raise StaleEpoch("newer map")
            return (b"v",), b"", {}

        w.answer = answer
        w.kv._cluster.refresh_map = refresh  # type: ignore[method-assign]  # for one instance
        assert (await w.kv.get(b"k")).value == b"v"
        assert seen == [w.map.address(METADATA, w.homes(b"k")[0])]


async def test_scan_follows_the_cursor() -> None:
    pages = {b"": (((b"a", (b"1",), b"c"), (b"b", (b"2", b"2"), b"c")), b"x"), b"x": ((), b"")}

    async with world(lambda _n, _m, args: pages[args[2]]) as w:
        found = [entry async for entry in w.kv.scan(b"p", r=1)]
        assert [(e.key, e.values) for e in found] == [(b"a", (b"1",)), (b"b", (b"2",))]
        assert w.asked[0][2] == (0, b"p", b"", 500, {"r": 1})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda kv: kv.get(b""), "1 to 1024 bytes"),
        (lambda kv: kv.get(b"k" * 1025), "1 to 1024 bytes"),
        (lambda kv: kv.put(b"k", bytes(MAX_VALUE + 1)), "put large things into a volume"),
        (lambda kv: kv.get(b"k", level="most"), "no level 'most'"),
    ],
)
async def test_wrong_arguments_never_leave(call: Callable[[KV], Any], text: str) -> None:
    async with world(lambda *_: None) as w:
        with pytest.raises(InvalidArgument, match=text):
            await call(w.kv)
        assert not w.asked


async def test_everybody_is_asked_before_anybody_is_waited_for_long(monkeypatch: Any) -> None:
    """With two of three coordinators cut off there is time for the one that knows who is missing."""
    asked: list[tuple[int, float]] = []

    async def attempt(self: KV, node: int, _method: str, _args: Any, timeout: float) -> Any:
        asked.append((node, timeout))
        await trio.sleep(timeout)
        raise DeadlineExceeded("nothing heard")

    monkeypatch.setattr(KV, "_attempt", attempt)
    async with world(lambda *_: None, serving=()) as w:
        with pytest.raises(DeadlineExceeded):
            await w.kv.get(b"k")
    assert {node for node, _ in asked[:3]} == {1, 2, 3}
    assert [timeout for _, timeout in asked[:4]] == [1.5, 1.5, 1.5, 3.0]


async def test_a_coordinator_with_a_full_disk_is_not_the_last_word() -> None:
    async with world(lambda *_: None) as w:
        first = w.homes(b"k")[0]

        def answer(node: int, *_: Any) -> Any:
            if node == first:
                raise DiskFull("no room here")
            return b"new", 1, {}

        w.answer = answer
        assert (await w.kv.put(b"k", b"v")).context == b"new"

        def full(*_: Any) -> Any:
            raise DiskFull("no room anywhere")

        w.answer = full
        with pytest.raises(DiskFull):
            await w.kv.put(b"k", b"v")
