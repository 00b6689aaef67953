"""Encoded journal entries and control state, against golden bytes."""

from pathlib import Path

import pytest

from dfs.codec import unpack
from dfs.errors import Corrupt
from dfs.volume import entries
from dfs.volume.effects import ADD, DELETE, DELETE_RANGE, PATCH, PUT
from metadata.sessions import Control, Session
from metadata.tail import kind_of

GOLDEN = Path(__file__).parents[2] / "data" / "home-entries-v1.txt"

CONTROL = Control(
    {"salt": b"s" * 16, "n": 3, "w": 2, "compress": True, "class": "strict", "name": "home"},
    [
        Session((3 << 26) + 1, "rw", b"n" * 16, "host:1", 12, 345, (True, False)),
        Session((3 << 26) + 2, "ro", b"m" * 16, ""),
    ],
    2,
    (3 << 26) + 1,
    1 << 30,
)
EFFECTS = (
    (PUT, b"k" * 9, b"\x91\x01"),
    (PATCH, b"k" * 9, ((7, ADD, -1),)),
    (DELETE, b"l" * 9),
    (DELETE_RANGE, b"m" * 9, b"n" * 9),
)
ENTRIES = {
    "data": (entries.DATA, (((3 << 26) + 1, 12, (True, False), EFFECTS),)),
    "config": (entries.CONFIG, 2, (1, 2, 4)),
    "session": (entries.SESSION, (3 << 26) + 1, "rw", b"n" * 16, "host:1"),
    "exclusive": (entries.SESSION, (3 << 26) + 3, "rwx", b"x" * 16, "database"),
    "close": (entries.CLOSE, ((3 << 26) + 1,)),
    "genesis": (entries.GENESIS, CONTROL.params, 1, (1, 2, 3)),
    "checkpoint": (entries.CHECKPOINT, 344, b"r" * 32, CONTROL.encode()),
    "delegation": (entries.DELEGATION, 2, 0),
    "revocation": (entries.DELEGATION, 3, 0, (3 << 26) + 1),
}


def golden():
    return dict(line.split() for line in GOLDEN.read_text().splitlines())


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_encoded_as_ever(name):
    kind, *body = ENTRIES[name]
    encoded = entries.encode(kind, 1_700_000_000_000_000_000, *body)
    assert encoded.hex() == golden()[name]
    assert entries.decode(encoded) == (kind, 1_700_000_000_000_000_000, tuple(body))
    assert kind_of(encoded) == kind


def test_control_state_is_read_back():
    body = entries.decode(bytes.fromhex(golden()["checkpoint"])).body
    control = Control.decode(body[2])
    assert control.encode() == CONTROL.encode()
    assert [s.sid for s in control.sessions] == [s.sid for s in CONTROL.sessions]


@pytest.mark.parametrize(
    "value", [None, (), (2, {}, (), 0, 0, 0), (1, {}, ((1,),), 0, 0, 0), (1, {}, (), 0, 0)]
)
def test_control_state_of_another_shape_is_refused(value):
    with pytest.raises(Corrupt):
        Control.decode(value)


def test_what_is_no_entry_has_no_kind():
    assert kind_of(b"") == kind_of(b"\x93\x02\x00") == kind_of(b"abc") == -1
    assert unpack(bytes.fromhex(golden()["close"]))[1] == entries.CLOSE


def test_entries_say_which_sessions_end():
    ended = {name: entries.closed(entries.decode(bytes.fromhex(h))) for name, h in golden().items()}
    sid = (3 << 26) + 1
    assert {name: sids for name, sids in ended.items() if sids} == {
        "close": (sid,),
        "revocation": (sid,),
    }
