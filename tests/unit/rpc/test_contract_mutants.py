"""The contract can fail: endpoints broken on purpose do not pass it."""

import random
from contextlib import asynccontextmanager

import pytest
from conftest import run_seeded

from dfs.clock import SystemClock
from dfs.errors import DfsError, Unreachable
from dfs.testing.contract import RpcContract, World
from dfs.testing.network import SimEndpoint, SimNetwork


class Twice(SimEndpoint):
    """Calls back twice."""

    def request(self, to, method, args=(), data=b"", *, on_reply, **options):
        def twice(answer):
            on_reply(answer)
            on_reply(answer)

        super().request(to, method, args, data, on_reply=twice, **options)


class Inline(SimEndpoint):
    """Calls back from inside `request`."""

    def request(self, to, method, args=(), data=b"", *, on_reply, **options):
        on_reply(Unreachable("at once"))


class Patient(SimEndpoint):
    """Ignores the timeout."""

    def _send(self, to, method, args, data, timeout, *rest):
        return super()._send(to, method, args, data, timeout + 1, *rest)


class Forgetful(SimEndpoint):
    """Loses the class of an error."""

    def _answered(self, stream, ok, meta, data):
        if ok:
            super()._answered(stream, ok, meta, data)
        else:
            self._fail(stream, DfsError("something"))


class Mixed(SimEndpoint):
    """Gives an answer to another caller now and then."""

    def _answered(self, stream, ok, meta, data):
        others = [s for s in self._pending if s != stream]
        super()._answered(others[0] if others else stream, ok, meta, data)


class Copying(SimEndpoint):
    """Hands the data back as bytes."""

    async def call(self, *args, **options):
        result, data = await super().call(*args, **options)
        return result, bytes(data)


@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (Twice, "test_request_calls_back_once_and_later"),
        (Inline, "test_request_calls_back_once_and_later"),
        (Patient, "test_deadline"),
        (Forgetful, "test_errors_cross_the_wire"),
        (Mixed, "test_answers_find_their_callers"),
        (Copying, "test_values_and_data_round_trip"),
    ],
)
def test_mutants_fail(mutant, test):
    def check(kind):
        class Contract(RpcContract):
            @asynccontextmanager
            async def world(self):
                clock = SystemClock()
                async with SimNetwork(random.Random(3), clock) as network:
                    client = network._endpoints["client"] = kind(network, "client", clock)
                    yield World(client, network.endpoint("server"), "tcp://s:1", "tcp://nowhere:1")

        run_seeded(getattr(Contract(), test))

    check(SimEndpoint)
    with pytest.raises((AssertionError, DfsError, BaseExceptionGroup, pytest.fail.Exception)):
        check(mutant)
