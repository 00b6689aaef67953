"""Registers: limits, what contexts supersede, and the format on disk."""

from pathlib import Path

import pytest

from dfs import codec
from dfs.errors import Corrupt, InvalidArgument, TooManySiblings
from metadata import versions
from metadata.versions import (
    EMPTY,
    MAX_HLC,
    decode,
    decode_context,
    encode,
    encode_context,
    merge,
    put,
)

A, B = b"actor-a!", b"actor-b!"
GOLDEN = Path(__file__).parents[2] / "data" / "register-v1.txt"


def golden():
    first = put(EMPTY, (), A, 1_700_000_000_000_000, b"first")
    both = merge(first, put(EMPTY, (), B, 1_700_000_000_000_001, b"second"))
    deleted = put(both, both[0], A, 1_700_000_000_000_002, None)
    return {"one": first, "siblings": both, "tombstone": deleted}


def test_the_format_on_disk():
    lines = dict(line.split() for line in GOLDEN.read_text().splitlines())
    for name, register in golden().items():
        assert encode(register).hex() == lines[name]
        assert decode(bytes.fromhex(lines[name])) == register
    assert encode_context(golden()["siblings"][0]).hex() == lines["context"]


def test_a_put_supersedes_what_its_context_covers_and_nothing_else():
    r = put(put(EMPTY, (), A, 1, b"1"), (), A, 2, b"2")
    assert [x[2] for x in r[1]] == [b"2", b"1"]  # newest first
    r = put(r, ((A, 1),), A, 3, b"3")
    assert [x[2] for x in r[1]] == [b"3", b"2"]
    r = put(r, ((A, 3), (B, 7)), B, 8, None)
    assert r == (((A, 3), (B, 8)), ())


def test_an_old_copy_does_not_bring_back_what_was_deleted():
    old = put(EMPTY, (), A, 1, b"1")
    deleted = put(old, old[0], B, 2, None)
    assert merge(deleted, old) == deleted == merge(old, deleted)


def test_the_number_of_siblings_is_limited():
    r = EMPTY
    for i in range(32):
        r = put(r, (), A, i + 1, b"")
    with pytest.raises(TooManySiblings, match="32 concurrent values"):
        put(r, (), A, 33, b"")
    assert len(put(r, r[0], A, 33, b"")[1]) == 1
    assert put(r, (), A, 33, None)[1] == r[1]  # a delete never makes more
    other = put(EMPTY, (), B, 1, b"")
    assert len(merge(r, other)[1]) == 33  # a merge never refuses


def test_the_size_of_siblings_is_limited_unless_there_is_one():
    big = bytes(versions.MAX_VALUE)
    r = put(EMPTY, (), A, 1, big)
    with pytest.raises(TooManySiblings, match="bytes"):
        put(r, (), A, 2, b"x")
    assert put(r, r[0], A, 2, big)[1][0][2] == big


@pytest.mark.parametrize(
    "body",
    [
        ((), ()),
        (((A, 1), (A, 2)), ()),
        (((B, 1), (A, 1)), ()),
        (((A, 0),), ()),
        (((A, MAX_HLC + 1),), ()),
        (((b"short", 1),), ()),
        (((A, 1),), ((A, 2, b""),)),
        (((A, 2),), ((A, 1, b""), (A, 2, b""))),
        (((A, 2),), ((A, 2, b""), (A, 2, b""))),
        (((A, 1),), ((A, 1, "text"),)),
        (((A, 1),),),
        7,
    ],
)
def test_malformed_registers_are_refused(body):
    with pytest.raises(Corrupt):
        decode(b"\x01" + codec.pack(body))


def test_another_format_is_refused_by_name():
    with pytest.raises(Corrupt, match="not a register this program knows"):
        decode(b"\x02" + encode(golden()["one"])[1:])


def test_contexts():
    vector = golden()["siblings"][0]
    assert decode_context(encode_context(vector)) == vector
    assert decode_context(b"") == ()
    assert encode_context(()) == b""
    for bad in (b"\x02", b"\x01", b"\x01\x07", "text", None, encode_context(vector) + b"x"):
        with pytest.raises(InvalidArgument, match="context"):
            decode_context(bad)
