"""Registers on five real nodes whose network is cut, deaf in one direction, or lossy.

What holds: a strict operation is answered on the side of a majority and refused with the names of those
that are missing on the other; weak writes of both sides are all there once the network is whole.
"""

import json
import time

import pytest
from kvload import Load
from localcluster import wait_until
from netcluster import NetCluster

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with NetCluster(tmp_path_factory.mktemp("net")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def whole(net):
    """Every test ends with a whole network."""
    yield
    net.heal()


def got(net, key, *options, beside=None):
    return json.loads(net.dfs("kv", "get", "--json", *options, key, beside=beside).stdout)


def homes_of(net, key):
    """Names of the homes of a user's key, in order."""
    from dfs.cluster.map import METADATA, ClusterMap
    from metadata.registers import partition_of_row, row_of

    current = ClusterMap.decode((net.dir / "map").read_bytes())
    row = current.read_homes(METADATA, partition_of_row(row_of(0, key.encode())))
    return [current.node(n).name for n in row]


def key_with(net, wanted):
    """A key for whose homes `wanted(names)` holds."""
    return next(k for i in range(1000) if wanted(homes_of(net, k := f"key-{i}")))


def test_a_minority_refuses_and_a_majority_goes_on(net):
    major, minor = ["node1", "node2", "node3"], ["node4", "node5"]
    lost = key_with(net, lambda homes: sum(h in minor for h in homes) == 1)
    net.dfs("kv", "put", lost, "before")
    with (
        Load(net, prefix="major-", netns=net.netns("node1"), timeout=6) as load,
        Load(net, prefix="minor-", netns=net.netns("node5"), timeout=3, seed=2) as other,
    ):
        load.wait_for_acks(30)
        other.wait_for_acks(30)
        load.enter("cut")
        other.enter("cut off")
        net.cut(major, minor)
        began = time.monotonic()
        said = net.refused("--timeout", "4", "kv", "put", lost, "during", beside="node5")
        print(f"  refused after {time.monotonic() - began:.1f} s: {said}")
        assert "needed for a" in said
        missing = [h for h in homes_of(net, lost) if h in major]
        assert all(name in said or f"node {name[4:]} " in said for name in missing), said
        net.dfs("kv", "put", lost, "by the majority", beside="node2")
        assert got(net, lost, beside="node3")["values"] == ["by the majority"]
        time.sleep(4)
        net.heal()
        load.enter("healed")
        other.enter("healed")
        print(f"  the minority is answered again after {other.wait_for_acks(20):.1f} s")
        load.wait_for_acks(20)
    load.check()
    other.check()
    assert got(net, lost)["values"] in (["by the majority"], ["by the majority", "during"])


def test_what_was_refused_in_a_cut_does_not_happen_after_it(net):
    """What a node passed on to homes it could not reach is not delivered when the network heals."""
    key = key_with(net, lambda homes: not {"node4", "node5"} & set(homes))
    for node in ("node4", "node5"):  # their links to the homes are open
        net.dfs("kv", "put", key, "before", beside=node)
    net.cut(["node1", "node2", "node3"], ["node4", "node5"])
    net.refused("--timeout", "4", "kv", "put", key, "during", beside="node5")
    net.dfs("kv", "put", key, "by the majority", beside="node2")
    net.heal()
    until = time.monotonic() + 6  # TCP tries again after at most as long as the cut was
    while time.monotonic() < until:
        assert got(net, key)["values"] == ["by the majority"]
        time.sleep(0.5)


def test_both_sides_write_weakly_and_people_resolve(net):
    major, minor = ["node1", "node2", "node3"], ["node4", "node5"]
    key = key_with(net, lambda homes: sum(h in minor for h in homes) == 1)
    net.dfs("kv", "put", key, "old")
    weak = ("--level", "one", "--pw", "0", "--eventual")
    with (
        Load(net, prefix="weak1-", netns=net.netns("node1"), fresh=False,
             options={"level": "one", "pw": 0, "eventual": True}) as load,
        Load(net, prefix="weak5-", netns=net.netns("node5"), fresh=False, seed=2,
             options={"level": "one", "pw": 0, "eventual": True}) as other,
    ):  # fmt: skip
        load.wait_for_acks(20)
        other.wait_for_acks(20)
        net.cut(major, minor)
        load.enter("cut")
        other.enter("cut off")
        net.dfs("kv", "put", *weak, key, "left", beside="node1")
        net.dfs("kv", "put", *weak, key, "right", beside="node5")
        load.wait_for_acks(50)
        # Keys without a home on its side time out here, 2 s each, until they are known to be cut off.
        other.wait_for_acks(20, timeout=60)
        net.heal()
        load.enter("healed")
        other.enter("healed")
        load.wait_for_acks(50)
        other.wait_for_acks(50, timeout=60)

    def siblings():
        shown = net.dfs("kv", "get", "--json", "--level", "all", key, check=False)
        return sorted(json.loads(shown.stdout)["values"]) if not shown.returncode else None

    began = time.monotonic()
    wait_until(lambda: siblings() == ["left", "right"], 40, "both sides' values")
    print(f"  both values are there after {time.monotonic() - began:.1f} s")
    shown = net.dfs("kv", "get", key)
    assert sorted(shown.stdout.split()) == ["left", "right"]
    assert "2 siblings; resolve: dfs kv put" in shown.stderr
    context = shown.stderr.split("--context ")[1].split()[0]
    net.dfs("kv", "put", key, "both", "--context", context)
    wait_until(lambda: siblings() == ["both"], 20, "all homes have what was resolved")
    load.check()
    other.check()


def test_a_node_that_hears_nobody_but_is_heard(net):
    with Load(net, prefix="deaf-", netns=net.netns("node1")) as load:
        load.wait_for_acks(30)
        load.enter("node4 hears nobody")
        for peer in ("node1", "node2", "node3", "node5"):
            net.deafen("node4", peer)
        load.wait_for_acks(100)
        time.sleep(4)
        net.heal()
        load.enter("healed")
        load.enter("node1 hears not node2")
        net.deafen("node1", "node2")
        load.wait_for_acks(100)
        time.sleep(2)
        net.heal()
        load.enter("healed again")
        load.wait_for_acks(30)
    load.check()


def test_a_third_of_all_packets_is_lost(net):
    with Load(net, prefix="lossy-", netns=net.netns("node1"), timeout=20) as load:
        load.wait_for_acks(30)
        load.enter("30 % lost at node2 and node3")
        net.lose("node2", 0.3)
        net.lose("node3", 0.3)
        time.sleep(6)
        net.heal()
        load.enter("healed")
        load.wait_for_acks(50)
    load.check()
