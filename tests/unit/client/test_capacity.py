"""Following the cluster's map and free space."""

import trio

from dfs.client.capacity import MAP_INTERVAL, ClusterWatch
from dfs.client.connect import Cluster
from dfs.clock import SystemClock
from dfs.cluster.map import ClusterMap
from dfs.errors import Unreachable


class Node:
    def __init__(self, number):
        self.number, self.name = number, f"node{number}"
        self.metadata_addr, self.chunk_addr = f"m{number}", f"c{number}"


class Map:
    def __init__(self, epoch):
        self.epoch, self.n = epoch, 3
        self.nodes = [Node(1), Node(2), Node(3)]

    def address(self, role, number):
        return f"{role[0]}{number}"


class Nodes:
    """Node 2 knows a newer map; node 3 is dead."""

    async def call(self, to, method, args=(), data=b"", *, timeout, **_):
        await trio.sleep(0.001)
        if to.endswith("3"):
            raise Unreachable(to)
        epoch = 2 if to.endswith("2") else 1
        if method == "ping":
            return ("", 0, b"", epoch), b""
        if method == "map.get":
            return (bytes([epoch]),), b""
        assert method == "node.status"
        return ({"disk_total": 3000, "disk_free": 300},), b""


async def test_a_newer_map_is_found_and_space_is_added_up(monkeypatch):
    monkeypatch.setattr(ClusterMap, "decode", classmethod(lambda _cls, data: Map(data[0])))
    current = [Map(1)]
    cluster = Cluster(
        Nodes(),
        lambda: current[0],
        None,
        SystemClock(),
        None,
        seeds=("m1",),
        set_map=lambda newest: current.__setitem__(0, newest),
    )
    watch = ClusterWatch(cluster)
    assert watch.capacity() == (0, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(4 * MAP_INTERVAL)
        nursery.cancel_scope.cancel()
    assert current[0].epoch == 2
    assert watch.capacity() == (2000, 200)
