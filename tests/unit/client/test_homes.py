"""Which home is asked next, when some do not answer."""

import pytest
import trio

from dfs.client.homes import SILENT, Homes
from dfs.errors import DfsError, NoQuorum, Unreachable

NODES = (1, 2, 3)


class Clock:
    def monotonic(self):
        return trio.current_time()


class Cluster:
    """Three homes, some of which fail."""

    def __init__(self):
        self.silent = {}
        self.clock = Clock()
        self.rpc = self
        self.asked = []
        self.failing = {}

    def get_map(self):
        return self

    epoch = 1

    def volume_homes(self, _volume):
        return NODES

    def old_homes(self, _role, _partition):
        return ()

    def address(self, _role, node):
        return node

    async def call(self, node, _method, _args, **_kw):
        await trio.lowlevel.checkpoint()
        self.asked.append(node)
        if node in self.failing:
            raise self.failing[node]
        return "answer", b""


async def ask(homes, times=1):
    for _ in range(times):
        try:
            return await homes.ask("vol.open", (), timeout=1)
        except DfsError:
            continue
    return None


async def test_a_silent_home_is_asked_last_by_all_sessions_for_a_while():
    cluster = Cluster()
    cluster.failing = {1: Unreachable("stopped")}
    assert await ask(Homes(cluster, bytes(16)), 2) == "answer"
    assert await ask(Homes(cluster, bytes(16))) == "answer"
    assert cluster.asked == [1, 2, 2]
    await trio.sleep(SILENT + 0.1)
    await ask(Homes(cluster, bytes(16)), 2)
    assert cluster.asked[3:] == [1, 2]


async def test_a_home_that_answered_is_not_silent():
    cluster = Cluster()
    cluster.failing = {1: NoQuorum("an answer, if no good one")}
    await ask(Homes(cluster, bytes(16)), 2)
    assert cluster.silent == {}


@pytest.mark.parametrize("known", [None, 1])
async def test_all_are_asked_when_all_are_silent(known):
    cluster = Cluster()
    cluster.failing = {n: Unreachable("stopped") for n in NODES}
    homes = Homes(cluster, bytes(16))
    homes.heard(known)
    assert await ask(homes, 6) is None
    assert cluster.asked[:3] == [1, 2, 3]
    cluster.failing = {}
    assert await ask(homes) == "answer"
    assert cluster.silent.keys() < set(NODES)
