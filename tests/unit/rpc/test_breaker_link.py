"""The circuit breaker and priorities between two real endpoints."""

import random
from contextlib import asynccontextmanager

import pytest
import trio

from dfs.clock import SystemClock
from dfs.env import Priority
from dfs.errors import Busy, DeadlineExceeded, Unreachable
from dfs.rpc.breaker import CLOSED, ERRORS, OPEN
from dfs.rpc.endpoint import RpcEndpoint

pytestmark = pytest.mark.realtime


@asynccontextmanager
async def pair(handlers):
    """(client, address) of a server with these handlers."""

    def endpoint(name):
        return RpcEndpoint(
            cluster_id=bytes(16), name=name, clock=SystemClock(), random=random.Random(1)
        )

    client, server = endpoint("client"), endpoint("server")
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await nursery.start(server.run)

        async def serve(task_status):
            await server.serve("tcp://127.0.0.1:0", handlers, started=task_status.started)

        yield client, await nursery.start(serve)
        nursery.cancel_scope.cancel()


async def test_a_hanging_peer_is_left_alone_and_comes_back():
    hanging = True

    async def work(_ctx, _args, _data):
        if hanging:
            await trio.sleep_forever()
        return ("done",), b""

    def ping(_ctx, _args, _data):
        return ("pong",), b""

    def busy(_ctx, _args, _data):
        raise Busy("later")

    async with pair({"work": work, "ping": ping, "busy": busy}) as (client, address):

        def breaker():
            return client.statistics()["breakers"][address]

        async def fail():
            with pytest.raises(DeadlineExceeded):
                await client.call(address, "work", timeout=0.3)

        for _ in range(2 * ERRORS):  # refusals are answers
            with pytest.raises(Busy):
                await client.call(address, "busy", timeout=1)
        for _ in range(2 * ERRORS):  # who has no patience proves nothing
            with pytest.raises(DeadlineExceeded):
                await client.call(address, "work", timeout=0.001)
        assert breaker()["state"] == CLOSED
        async with trio.open_nursery() as nursery:
            for _ in range(ERRORS):
                nursery.start_soon(fail)
        assert breaker()["state"] == OPEN
        start = trio.current_time()
        with pytest.raises(Unreachable, match="circuit breaker is open"):
            await client.call(address, "work", timeout=5)
        with pytest.raises(Unreachable, match="circuit breaker"):
            await client.call(address, "work", (), b"x" * 100_000, timeout=5)  # the other link too
        assert trio.current_time() - start < 0.2
        answer, _ = await client.call(address, "ping", timeout=1, priority=Priority.HIGH)
        assert answer == ("pong",)
        assert breaker()["state"] != CLOSED
        hanging = False
        answer, _ = await client.call(address, "work", timeout=5)  # the ping was a good sign
        assert answer == ("done",)
        assert breaker() == {"state": CLOSED, "errors": ERRORS, "opened": 1, "refused": 2}


async def test_a_refused_connection_does_not_open_the_breaker():
    async with pair({}) as (client, _):
        nobody = "tcp://127.0.0.1:1"
        for _ in range(3 * ERRORS):
            with pytest.raises(Unreachable):
                await client.call(nobody, "ping", timeout=1)
        assert client.statistics()["breakers"][nobody]["errors"] == 0


async def test_urgent_requests_overtake_bulk_in_the_same_connection():
    """Ten bulk requests of 4 MiB wait to be sent; an urgent one that comes last is answered first."""
    order = []

    def take(ctx, args, _data):
        order.append(args[0])
        return args, b""

    async with pair({"take": take}) as (client, address):
        await client.call(address, "take", ("warm",), b"x" * 100_000, timeout=5)
        done = trio.Event()
        answers = []

        def answered(answer):
            answers.append(answer)
            if len(answers) == 11:
                done.set()

        bulk = bytes(4 << 20)
        for i in range(10):
            client.request(
                address, "take", (i,), bulk, timeout=30, priority=Priority.BULK, on_reply=answered
            )
        # large enough to go the way of the bulk
        urgent = bytes(100_000)
        client.request(
            address, "take", ("urgent",), urgent, timeout=30, priority=Priority.HIGH,
            on_reply=answered,
        )  # fmt: skip
        await done.wait()
    assert order.index("urgent") <= 3, order
    assert len(order) == 12
