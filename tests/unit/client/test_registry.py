"""The registry of volumes and cluster references."""

import json

import pytest
import trio

from dfs.client.connect import ClusterRef, load_map
from dfs.client.filesystem import FileSystem
from dfs.client.registry import open_registry
from dfs.client.session import open_session
from dfs.cluster.map import ClusterMap
from dfs.errors import (
    AlreadyExists,
    ConfigError,
    InvalidArgument,
    NoQuorum,
    Unreachable,
    VolumeNotFound,
)
from dfs.ids import ROOT_INO, SYSTEM_VOLUME
from dfs.testing.fakehome import FakeHome


def new_home():
    home = FakeHome()
    home.create(SYSTEM_VOLUME, {"salt": bytes(16), "name": "system"})
    return home


async def test_a_volume_is_created_listed_opened_and_deleted():
    home = new_home()
    cluster = home.client()
    async with open_registry(cluster) as registry:
        made = await registry.create("home", {"compress": False})
        assert made.state == "created"
        assert made.params["compress"] is False
        assert [v.name for v in await registry.list()] == ["home"]
        assert await registry.find("home") == made
        with pytest.raises(AlreadyExists, match="volume delete home"):
            await registry.create("home")
        async with open_session(cluster, made.volume_id) as session:
            fs = FileSystem(session, home.chunk_client())
            assert (await fs.getattr(ROOT_INO)).nlink == 2
            assert (await fs.statfs()).inodes == 1
        await registry.delete("home")
        with pytest.raises(VolumeNotFound, match="volume list"):
            await registry.find("home")
        with pytest.raises(VolumeNotFound):
            await registry.delete("home")
        again = await registry.create("home")
        assert again.volume_id != made.volume_id


async def test_an_interrupted_creation_is_taken_up_again():
    home = new_home()
    cluster = home.client()
    real = home.handle

    async def handle(method, args):
        if method == "jrnl.genesis":
            raise Unreachable("down")
        return await real(method, args)

    async with open_registry(cluster) as registry:
        home.handle = handle
        with pytest.raises(NoQuorum, match="0 of 3 homes"):
            await registry.create("v", {"compress": False})
        [half] = await registry.list()
        assert half.state == "creating"
        with pytest.raises(VolumeNotFound, match="volume create v"):
            await registry.find("v")
        home.handle = real
        done = await registry.create("v")
        assert (done.volume_id, done.params) == (half.volume_id, half.params)


async def test_two_creators_of_one_name_get_one_volume():
    home = new_home()
    made, refused = [], []

    async def create(seed):
        async with open_registry(home.client(seed=seed)) as registry:
            try:
                made.append(await registry.create("v"))
            except AlreadyExists:
                refused.append(seed)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create, 1)
        nursery.start_soon(create, 2)
    assert made
    assert len({v.volume_id for v in made}) == 1


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a b", "x" * 64, "ä"])
async def test_names_that_no_volume_can_have(name):
    async with open_registry(new_home().client()) as registry:
        with pytest.raises(InvalidArgument):
            await registry.create(name)


def test_cluster_files(tmp_path):
    path = tmp_path / "cluster.json"
    with pytest.raises(ConfigError, match="dfs cluster init"):
        ClusterRef.load(path)
    for text, why in (
        ("{", "is damaged: .* copy it from a machine where it works"),
        ("[]", "is not a cluster file"),
        ('{"format": 1, "cluster_id": "zz", "seeds": ["a"]}', "is not a cluster file"),
        ('{"format": 9}', "upgrade"),
        ('{"format": 1, "cluster_id": "00"}', "'seeds' is missing"),
        (json.dumps({"format": 1, "cluster_id": "00" * 16, "seeds": []}), "no seeds"),
        ('{"format": 1, "cluster_id": "00", "seeds": ["a"]}', "32 hex digits"),
        ('{"format": 1, "cluster_id": "00", "seeds": "tcp://h:1"}', "list"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            ClusterRef.load(path)
    path.write_text(json.dumps({"format": 1, "cluster_id": "ab" * 16, "seeds": ["tcp://h:1"]}))
    assert ClusterRef.load(path) == ClusterRef(("tcp://h:1",), b"\xab" * 16)


class Seeds:
    """An `Rpc` of seeds: some answer with a map, some refuse, some are silent."""

    def __init__(self, **answers):
        self.answers = answers

    async def call(self, to, method, args=(), data=b"", *, timeout, **_):
        assert method == "map.get"
        answer = self.answers[to]
        if answer is None:
            await trio.sleep(timeout)
        if not isinstance(answer, bytes):
            raise Unreachable(f"{to} refused")
        return (answer,), b""


async def test_the_map_comes_from_any_seed_that_lives(monkeypatch):
    class Map:
        epoch = 1

    monkeypatch.setattr(ClusterMap, "decode", classmethod(lambda _cls, _data: Map))
    rpc = Seeds(dead="refused", silent=None, live=b"map")
    assert await load_map(rpc, ("dead", "live")) is Map
    assert trio.current_time() < 0.5
    assert await load_map(rpc, ("silent", "dead", "live")) is Map
    assert trio.current_time() < 5
    with pytest.raises(Unreachable, match="dfs cluster up"):
        await load_map(rpc, ("dead", "silent"))
