"""The simulator and the real endpoint keep the same contract."""

import random
from contextlib import asynccontextmanager

import pytest
import trio

from dfs.clock import SystemClock
from dfs.rpc.endpoint import RpcEndpoint
from dfs.testing.contract import RpcContract, World
from dfs.testing.network import SimNetwork


class TestSimEndpoint(RpcContract):
    @asynccontextmanager
    async def world(self):
        async with SimNetwork(random.Random(3), SystemClock()) as network:
            yield World(
                network.endpoint("client"),
                network.endpoint("server"),
                "tcp://server:1",
                "tcp://nowhere:1",
            )


@asynccontextmanager
async def real_world(address, nowhere):
    def make(name):
        return RpcEndpoint(
            cluster_id=b"c" * 16, name=name, clock=SystemClock(), random=random.Random(4)
        )

    async with trio.open_nursery() as nursery:
        client, server = make("client"), make("server")
        await nursery.start(client.run)
        await nursery.start(server.run)
        yield World(client, server, address, nowhere)
        nursery.cancel_scope.cancel()


@pytest.mark.realtime
class TestTcp(RpcContract):
    def world(self):
        return real_world("tcp://127.0.0.1:0", "tcp://127.0.0.1:1")


@pytest.mark.realtime
class TestUnix(RpcContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    def world(self):
        return real_world(f"unix://{self.folder}/socket", f"unix://{self.folder}/absent")
