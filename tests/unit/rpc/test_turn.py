"""What is done at the end of a turn: once, after the answers, and never without a turn."""

import random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.rpc.endpoint import RpcEndpoint
from dfs.rpc.turn import Turn


def test_a_function_is_called_once_at_the_end():
    turn, seen = Turn(), []

    def fn():
        seen.append(turn.later(fn))  # the turn is over: it is not called again

    assert not turn.later(fn)
    turn.begin()
    assert turn.later(fn)
    assert turn.later(fn)
    assert seen == []
    turn.end()
    assert seen == [False]
    turn.begin()
    turn.end()
    assert seen == [False]


@pytest.mark.realtime
async def test_it_is_called_when_the_answers_have_left():
    endpoint = RpcEndpoint(
        cluster_id=b"c" * 16, name="n", clock=SystemClock(), random=random.Random(4)
    )
    seen = []

    def at_end():
        (session,) = [link for link in endpoint.statistics()["links"] if link["connected"]]
        seen.append(("end", session["in_flight"]))

    def handler(_ctx, args, _data):
        seen.append(args[0])
        assert endpoint.later(at_end)
        return args, b""

    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run)
        address = await nursery.start(serve, endpoint, {"echo": handler})
        assert not endpoint.later(at_end)
        assert await endpoint.call(address, "echo", (1,), timeout=5.0) == ((1,), b"")
        assert seen == [1, ("end", 1)]
        nursery.cancel_scope.cancel()


async def serve(endpoint, handlers, *, task_status):
    await endpoint.serve("tcp://127.0.0.1:0", handlers, started=task_status.started)
