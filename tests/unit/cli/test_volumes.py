"""Volumes on the command line: what the list shows, and refusing what a full cluster cannot keep."""

from types import SimpleNamespace

import pytest
import trio

from dfs.cli.client import Usage, _watched, naming
from dfs.cli.volume_cmd import _table, usage_as_dict
from dfs.client.attributes import fs_error
from dfs.client.capacity import ENOUGH
from dfs.client.registry import VolumeInfo
from dfs.errors import FsError
from tests.unit.client.test_capacity import Map, Nodes, cluster_of


def entry(name, state="created"):
    return VolumeInfo(name, bytes(16), state, {"n": 3, "created": 10**18})


def test_the_list_shows_what_is_used_and_what_may_be():
    lines = _table(
        [
            (entry("limited"), Usage(1536, 12, 10 << 30, 1000)),
            (entry("free"), Usage(0, 1, 0, 0)),
            (entry("silent-one"), None),
            (entry("gone", "deleting"), None),
        ]
    )
    rows = [line.replace(" KiB", "KiB").replace(" GiB", "GiB").split() for line in lines]
    assert rows[0] == ["name", "copies", "size", "quota", "inodes", "quota", "made"]
    assert rows[1][:6] == ["limited", "3", "1.5KiB", "10.0GiB", "12", "1000"]
    assert rows[2][:7] == ["free", "3", "0", "B", "-", "1", "-"]
    assert rows[3][:6] == ["silent-one", "3", "?", "?", "?", "?"]
    assert lines[4].endswith("  (deleting)")
    assert lines[0].index("size") + 4 == lines[1].index("KiB") + 3 == lines[3].index("?") + 1


def test_what_programs_get():
    assert usage_as_dict(Usage(5, 2, 10, 0)) == {
        "bytes": 5, "inodes": 2, "quota_bytes": 10, "quota_files": None
    }  # fmt: skip
    assert set(usage_as_dict(None).values()) == {None}
    assert usage_as_dict(None).keys() == usage_as_dict(Usage(0, 0, 0, 0)).keys()


class Refusing:
    """The part of a `FileSystem` that hears of full disks."""

    session = SimpleNamespace(volume=b"v" * 16)

    def __init__(self):
        self.told = []

    def refuse(self, *why):
        self.told.append(why)


async def test_a_block_that_adds_knows_from_its_start_that_the_disks_are_full():
    nodes, fs = Nodes(), Refusing()
    for server in ("c1", "c2"):
        nodes.status[server]["disk_room"] = ENOUGH - 1
    async with _watched(fs, cluster_of(nodes, [Map(2)])):
        ((everything, data),) = fs.told
        assert everything == ""
        assert "1 of 3 chunkservers have room and 2 must" in data
        nodes.status["c2"]["disk_room"] = ENOUGH
        await trio.sleep(60)
        assert fs.told[1:] == [("", "")]


async def test_a_block_does_not_wait_for_servers_that_are_silent_and_raises_its_own_errors():
    class Silent(Nodes):
        async def call(self, *_args, timeout, **_):
            await trio.sleep(timeout)
            raise AssertionError("nobody waits that long")

    async def block():
        began = trio.current_time()
        async with _watched(Refusing(), cluster_of(Silent(), [Map(2)])):
            assert trio.current_time() - began <= 0.6
            raise FsError("of the block", 5)

    with pytest.raises(FsError, match="of the block"):
        await block()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (fs_error(28), "v:/x: no space left: too few chunkservers have room for a copy; delete"),
        (
            fs_error(28, "1 of 3 x have room; add capacity (`dfs cluster status`)"),
            "v:/x: no space left: 1 of 3 x have room; add capacity (`dfs cluster status`)",
        ),
        (
            FsError("no space left: 3 of 3; make room (`dfs cluster status`), then it goes on", 28),
            "v:/x: no space left: 3 of 3; make room (`dfs cluster status`), then it goes on",
        ),
    ],
)
def test_no_space_is_told_once_with_its_cause(error, told):
    with pytest.raises(FsError) as raised, naming("v:/x"):
        raise error
    assert str(raised.value).startswith(told)
    assert str(raised.value).count("pace left") == 1
    assert raised.value.errno == 28
