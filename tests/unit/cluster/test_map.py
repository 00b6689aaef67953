from dataclasses import replace
from pathlib import Path
from struct import pack

import pytest

from dfs import codec
from dfs.cluster.map import CHUNK, METADATA, ClusterMap, Node, Params
from dfs.errors import ConfigError, Corrupt, WrongVersion
from dfs.hashing import PARTITIONS, digest, partition_of

GOLDEN = Path(__file__).parents[2] / "data" / "cluster-map-1.bin"
CLUSTER = digest(b"cluster")[:16]


def node(i, **changes):
    fields = {
        "number": i,
        "node_id": digest(b"%d" % i)[:16],
        "name": f"node{i}",
        "zone": f"z{i % 3}",
        "rack": "r",
        "host": f"h{i}",
        "metadata_addr": f"tcp://127.0.0.1:{7000 + 2 * i}",
        "chunk_addr": f"tcp://127.0.0.1:{7001 + 2 * i}",
    }
    return Node(**{**fields, **changes})


NODES = [node(i) for i in range(1, 6)]
MAP = ClusterMap.create(CLUSTER, NODES)


def resealed(body):
    head = b"dfsmap" + pack(">H", 1) + codec.pack(body)
    return head + digest(head)


def body_of(m):
    return codec.unpack(m.encode()[8:-32])


def test_golden_file_is_still_read_and_written():
    data = GOLDEN.read_bytes()
    assert ClusterMap.decode(data).encode() == data
    golden = ClusterMap.decode(data)
    assert (golden.epoch, golden.n, golden.w, len(golden.nodes)) == (2, 3, 2, 5)
    assert golden.prev_hash == MAP.digest
    assert golden == MAP.successor([*NODES[:4], node(6)])


def test_round_trip_and_equality():
    again = ClusterMap.decode(MAP.encode())
    assert again == MAP
    assert hash(again) == hash(MAP)
    assert again.tables == MAP.tables
    assert again.nodes == MAP.nodes
    assert again != MAP.successor(NODES)


def test_order_of_the_nodes_does_not_matter():
    assert ClusterMap.create(CLUSTER, reversed(NODES)).encode() == MAP.encode()


def test_lookups():
    for role in (METADATA, CHUNK):
        for p in (0, 1, 77, PARTITIONS - 1):
            homes = MAP.homes(role, p)
            assert len(set(homes)) == 3 == MAP.n
            assert len({MAP.node(x).zone for x in homes}) == 3
            preference = MAP.preference(role, p)
            assert preference[:3] == homes
            assert sorted(preference) == [1, 2, 3, 4, 5]
            assert MAP.preference(role, p) is preference
            assert MAP.last_change(role, p) == 1
    assert MAP.address(METADATA, 2) == "tcp://127.0.0.1:7004"
    assert MAP.address(CHUNK, 2) == "tcp://127.0.0.1:7005"
    volume = bytes(16)
    assert MAP.volume_homes(volume) == MAP.homes(METADATA, partition_of(digest(volume)))
    with pytest.raises(ConfigError, match="no node 9"):
        MAP.node(9)


def test_a_role_that_is_absent_gets_nothing():
    m = ClusterMap.create(CLUSTER, [*NODES, node(6, metadata_addr=""), node(7, chunk_addr="")])
    assert all(6 not in m.homes(METADATA, p) for p in range(PARTITIONS))
    assert all(7 not in m.homes(CHUNK, p) for p in range(PARTITIONS))
    assert any(6 in m.homes(CHUNK, p) for p in range(PARTITIONS))
    assert 6 not in m.preference(METADATA, 0)
    assert m.voters == (1, 2, 3, 4, 5, 7)


def test_a_node_of_weight_zero_comes_last():
    m = ClusterMap.create(CLUSTER, [*NODES, node(6, chunk_weight=0.0)])
    assert all(6 not in m.homes(CHUNK, p) for p in range(PARTITIONS))
    assert m.preference(CHUNK, 3)[-1] == 6


def test_successor_moves_only_what_it_must_and_remembers_when():
    m = MAP.successor([*NODES, node(6)])
    assert m.epoch == 2
    assert m.prev_hash == MAP.digest
    moved = [p for p in range(PARTITIONS) if m.homes(CHUNK, p) != MAP.homes(CHUNK, p)]
    assert 0 < len(moved) < PARTITIONS
    assert {p for p in range(PARTITIONS) if m.last_change(CHUNK, p) == 2} == set(moved)
    assert ClusterMap.decode(m.encode()) == m


def test_a_removed_node_is_banned():
    m = MAP.successor(NODES[:4]).successor(NODES[:4])
    assert m.banned == ((5, node(5).node_id),)
    with pytest.raises(ConfigError, match="removed node"):
        m.successor([*NODES[:4], node(5)])
    with pytest.raises(ConfigError, match="removed node"):
        m.successor([*NODES[:4], node(6, node_id=node(5).node_id)])


def test_fewer_nodes_than_three_have_fewer_copies():
    assert ClusterMap.create(CLUSTER, NODES[:1]).params == Params(1, 1, 1, 1)
    assert ClusterMap.create(CLUSTER, NODES[:2]).params == Params(2, 2, 2, 2)
    with pytest.raises(ConfigError, match="add nodes"):
        ClusterMap.create(CLUSTER, NODES[:2], params=Params())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 1}, "same number"),
        ({"name": "node1"}, "same name"),
        ({"node_id": node(1).node_id}, "same node id"),
        ({"chunk_addr": "tcp://127.0.0.1:7002"}, "same address"),
        ({"metadata_addr": "127.0.0.1:80"}, "address"),
        ({"metadata_addr": "tcp://:80"}, "address"),
        ({"chunk_addr": "tcp://h:99999"}, "address"),
        ({"metadata_addr": "", "chunk_addr": ""}, "no address"),
        ({"number": 8192}, "malformed"),
        ({"node_id": b"short"}, "malformed"),
        ({"chunk_weight": -1.0}, "weights"),
        ({"chunk_weight": float("nan")}, "weights"),
    ],
)
def test_create_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        ClusterMap.create(CLUSTER, [*NODES, replace(node(6), **changes)])


@pytest.mark.parametrize("params", [(3, 1, 2, 1), (3, 4, 2, 2), (3, 2, 0, 2), (0, 0, 0, 0)])
def test_params_must_overlap(params):
    with pytest.raises(ConfigError):
        ClusterMap.create(CLUSTER, NODES, params=Params(*params))


def test_every_flipped_byte_is_noticed():
    data = MAP.encode()
    for at in [*range(0, 400, 7), len(data) - 1, len(data) // 2]:
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises((Corrupt, WrongVersion)):
            ClusterMap.decode(bad)
    for cut in (0, 5, 39, len(data) - 1):
        with pytest.raises(Corrupt):
            ClusterMap.decode(data[:cut])


def test_a_newer_format_is_refused():
    data = bytearray(MAP.encode())
    data[7] = 3
    with pytest.raises(WrongVersion, match="upgrade"):
        ClusterMap.decode(data)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 0),
        (0, -1),
        (0, True),
        (1, b""),
        (1, b"x" * 32),
        (2, b"short"),
        (3, (3, 2, 2)),
        (3, (200, 2, 2, 2)),
        (3, "abcd"),
        (4, ()),
        (4, ((1, 2),)),
        (5, ()),
        (5, (9,)),
        (5, (2, 1)),
        (6, (1,)),
        (7, ()),
        (7, ((b"", b""), (b"", b""))),
    ],
)
def test_bodies_that_are_wrong_are_refused_even_with_a_right_checksum(index, value):
    body = list(body_of(MAP))
    body[index] = value
    with pytest.raises(Corrupt):
        ClusterMap.decode(resealed(tuple(body)))


def test_tables_are_checked():
    body = list(body_of(MAP))
    (rows, changes), chunk = body[7]
    for bad in (
        (rows[:-2], changes),
        (pack(">3H", 1, 1, 2) + rows[6:], changes),
        (pack(">3H", 1, 2, 9) + rows[6:], changes),
        (rows, pack(">I", 2)),
        (rows, pack(">I", 1) * PARTITIONS),  # not canonical
        (rows, b"abc"),
    ):
        with pytest.raises(Corrupt):
            ClusterMap.decode(resealed((*body[:7], (bad, chunk))))
