"""The real endpoint at its end: what others send while it goes down."""

import random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.errors import Unreachable
from dfs.rpc.endpoint import RpcEndpoint

NOWHERE = "tcp://127.0.0.1:1"


@pytest.mark.realtime
@pytest.mark.parametrize("connected", [False, True])
async def test_nothing_goes_wrong_at_any_moment_of_its_end(connected):
    """Whoever is cancelled together with it may still cast, request and call: each has an end."""
    endpoint = RpcEndpoint(
        cluster_id=b"c" * 16, name="n", clock=SystemClock(), random=random.Random(4)
    )
    answers, refused, steps = [], [], 50

    async def last_words():
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for step in range(steps):
                    to = f"tcp://127.0.0.{2 + step}:1"  # a link that there is not yet
                    endpoint.cast(to, "bye")
                    endpoint.request(to, "bye", timeout=1.0, on_reply=answers.append)
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    with pytest.raises(Unreachable) as caught:
                        await endpoint.call(to, "bye", timeout=1.0)
                    refused.append(caught.value)

    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run)
        if connected:
            with pytest.raises(Unreachable):
                await endpoint.call(NOWHERE, "ping", timeout=1.0)
        for _ in range(5):
            nursery.start_soon(last_words)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert len(refused) == 5 * steps
    assert len(answers) == 5 * steps
    assert all(type(answer) is Unreachable for answer in answers)
