"""What membership keeps on disks and sends: bytes that must stay readable."""

import random
from pathlib import Path

import pytest

from dfs.clock import SystemClock
from dfs.cluster.joint import ChunkProgress, Progress, bitmap
from dfs.codec import pack, unpack
from dfs.env import Env
from dfs.errors import Corrupt, RemoteProtocolError
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.disk import SimDisk
from dfs.testing.mapcluster import first_map, member
from metadata import rebalance
from metadata.boot import FILE, Boot, _decode
from metadata.mapservice import decode_entry, encode_entry, genesis_of
from metadata.rebalance import Rebalance

FIRST = first_map(3)
MOVING = FIRST.begin([*FIRST.nodes, member(4)])
PROGRESS = Progress(2, {4: bitmap([0, 9, 4095])}, ((b"v" * 16, (1, 2, 4), 3, True),), True)
CHUNKS = ChunkProgress(2, bitmap([7]))


def golden():
    """Everything by name, as the code writes it today."""
    return {
        "life": pack((1, 7, b"n" * 16)),
        "boot row": pack((1, 300, b"m" * 16)),
        "rebalance": pack((1, 2, ((4, bitmap([1, 4095])),))),
        "map entry": encode_entry(1_700_000_000_000_000_000, "a note", b"an encoded map"),
        "progress": pack(PROGRESS.fields()),
        "chunk progress": pack(CHUNKS.fields()),
    }


def stored():
    path = Path(__file__).parents[2] / "data" / "membership-v1.txt"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: bytes.fromhex(data) for name, _, data in (x.partition(": ") for x in lines)}


def test_what_is_written_has_not_changed():
    assert golden() == stored()


def test_what_was_written_is_read():
    data = stored()
    assert _decode(data["life"], "life") == (7, b"n" * 16)
    assert _decode(data["boot row"], "row") == (300, b"m" * 16)
    assert Progress.from_fields(unpack(data["progress"])) == PROGRESS
    assert ChunkProgress.from_fields(unpack(data["chunk progress"])) == CHUNKS
    assert unpack(data["map entry"])[1:3] == (1_700_000_000_000_000_000, "a note")
    entry = encode_entry(5, "n", MOVING.encode())
    assert decode_entry(entry) == (5, "n", MOVING)
    assert decode_entry(genesis_of(FIRST))[2] == FIRST


def env(disk):
    return Env(SystemClock(), disk, None, None, random.Random(1))


class Rows(dict):
    """A store of rows, as far as these parts use one."""

    async def batch(self, ops):
        self.update(ops)


async def test_the_file_life_is_written_like_that():
    disk = SimDisk(random.Random(1))
    disk.write_atomic(FILE, stored()["life"])
    boot = Boot(env(disk), 1, FIRST.node(1), MapKeeper(FIRST), Rows())
    boot.begin()
    assert boot.boot == 8
    file = disk.open(FILE)
    assert file.pread(file.size(), 0) == pack((1, 8, boot.nonce))


async def test_what_was_pushed_is_written_like_that(monkeypatch):
    monkeypatch.setattr(rebalance, "SAVE_EVERY", 0.0)
    rows = Rows()
    worker = Rebalance(env(None), 1, MapKeeper(MOVING), rows, None)
    worker._epoch = 2
    worker._pushed(4, [1, 4095])
    await worker._save(now=True)
    assert rows == {rebalance.KEY: stored()["rebalance"]}
    assert worker._load(2) == {4: {1, 4095}}
    assert worker._load(5) == {}, "that was another transition"
    rows[rebalance.KEY] = pack((1, 2, ((4, b"short"),)))
    with pytest.raises(Corrupt, match="what was pushed"):
        worker._load(2)
    rows[rebalance.KEY] = pack((2, "whatever a newer version keeps"))
    assert worker._load(2) == {}, "pushed again, which costs comparisons only"


@pytest.mark.parametrize("data", [b"", b"\x90", pack((1, 2)), pack((1, "7", b"")), b"\xff"])
def test_a_damaged_boot_number_is_named(data):
    with pytest.raises(Corrupt, match="the file `life` is unreadable"):
        _decode(data, "the file `life`")


def test_a_newer_format_is_named():
    with pytest.raises(Corrupt, match="format 2, this program knows format 1"):
        _decode(pack((2, 7, b"n", "more")), "the file `life`")


@pytest.mark.parametrize("value", [(), (2,), (2, b"short"), ("2", bitmap([])), None])
def test_malformed_reports_are_refused(value):
    with pytest.raises(RemoteProtocolError):
        ChunkProgress.from_fields(value)
    with pytest.raises(RemoteProtocolError):
        Progress.from_fields(value)
