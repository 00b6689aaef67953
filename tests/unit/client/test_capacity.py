"""Following the cluster's map and free space."""

import trio

from dfs.client.capacity import (
    ENOUGH,
    MAP_INTERVAL,
    NEAR_INTERVAL,
    SPACE_INTERVAL,
    ClusterWatch,
)
from dfs.client.connect import Cluster
from dfs.clock import SystemClock
from dfs.cluster.map import ClusterMap
from dfs.errors import Unreachable

MIB = 1 << 20


def cluster_of(nodes, current):
    """A cluster that answers like `nodes`; its map is in the list `current`."""
    return Cluster(
        nodes,
        lambda: current[0],
        None,
        SystemClock(),
        None,
        seeds=("m1",),
        set_map=lambda newest: current.__setitem__(0, newest),
    )


class Node:
    def __init__(self, number):
        self.number, self.name = number, f"node{number}"
        self.metadata_addr, self.chunk_addr = f"m{number}", f"c{number}"


class Map:
    def __init__(self, epoch):
        self.epoch, self.n, self.w = epoch, 3, 2
        self.nodes = [Node(1), Node(2), Node(3)]

    def node(self, number):
        return self.nodes[number - 1]

    def volume_homes(self, volume):
        return (1, 2, 3)

    def address(self, role, number):
        return f"{role[0]}{number}"


class Nodes:
    """Node 2 knows a newer map; node 3 is dead."""

    def __init__(self):
        disk = {"disk_total": 3000 * MIB, "disk_free": 400 * MIB, "disk_path": "/data"}
        self.status = {f"{r}{n}": {**disk, "disk_room": 300 * MIB} for r in "mc" for n in (1, 2)}

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
        return (self.status[to],), b""


async def test_a_newer_map_is_found_and_space_is_added_up(monkeypatch):
    monkeypatch.setattr(ClusterMap, "decode", classmethod(lambda _cls, data: Map(data[0])))
    current = [Map(1)]
    cluster = cluster_of(Nodes(), current)
    watch = ClusterWatch(cluster)
    assert watch.capacity() == (0, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(4 * MAP_INTERVAL)
        nursery.cancel_scope.cancel()
    assert current[0].epoch == 2
    # What two disks keep free for themselves is in neither number, divided by three copies.
    assert watch.capacity() == (2 * 2900 * MIB // 3, 2 * 300 * MIB // 3)


async def test_too_few_servers_with_room_are_told_and_when_there_are_enough_again():
    nodes, told = Nodes(), []
    watch = ClusterWatch(cluster_of(nodes, [Map(1)]))
    watch.tell(b"v" * 16, lambda *why: told.append(why))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(1)
        nodes.status["c1"]["disk_room"] = ENOUGH - 1  # another and the silent one are left
        nodes.status["m1"]["disk_level"] = "full"
        await trio.sleep(SPACE_INTERVAL)
        assert told == []
        nodes.status["c2"]["disk_room"] = ENOUGH - 1
        await trio.sleep(2 * NEAR_INTERVAL)
        (full, data) = told.pop()
        assert (full, told) == ("", [])
        assert "1 of 3 chunkservers have room and 2 must" in data
        assert "node1 /data, node2 /data" in data
        nodes.status["m2"]["disk_level"] = "full"
        await trio.sleep(2 * NEAR_INTERVAL)
        assert "1 of 3 metadata nodes of the volume have room and 2 must" in told.pop()[0]
        nodes.status["c2"]["disk_room"] = ENOUGH
        nodes.status["m2"]["disk_level"] = "ok"
        await trio.sleep(2 * NEAR_INTERVAL)
        assert told == [("", "")]
        nursery.cancel_scope.cancel()
