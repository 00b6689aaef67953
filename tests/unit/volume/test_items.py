"""Keys and values of items: order, round trips, golden encodings, refusal of foreign bytes."""

from pathlib import Path

import pytest

from dfs.codec import pack
from dfs.errors import Corrupt
from dfs.volume import items
from dfs.volume.items import Inode
from tests.unit.volume.samples import CHUNK, INODE, SAMPLES

GOLDEN = Path(__file__).parents[2] / "data" / "volume_items.txt"


def test_encodings_are_those_on_disk():
    golden = {
        name: (bytes.fromhex(key), bytes.fromhex(value))
        for name, key, value in map(str.split, GOLDEN.read_text().splitlines())
    }
    assert golden == SAMPLES


def test_values_round_trip():
    assert Inode.decode(INODE.encode()) == INODE
    assert Inode(8, 0o644) != INODE
    assert "size=4096" in repr(INODE)
    assert items.decode_entries(SAMPLES["entry"][1]) == ((b"a", 2, 8), (b"\xff", 3, 4))
    assert items.decode_symlink(SAMPLES["symlink"][1]) == b"../target"
    assert items.decode_xattr(SAMPLES["xattr"][1]) == b"value"
    assert items.decode_backlinks(SAMPLES["backlink"][1]) == (b"b",)
    assert items.decode_extent(SAMPLES["inline"][1]) == (5, 0, b"hello")
    assert items.decode_extent(SAMPLES["chunk"][1]) == (100, 1, CHUNK, 28, 128)
    assert items.decode_usage(SAMPLES["usage"][1]) == (1 << 40, 7)
    assert items.decode_quota(SAMPLES["quota"][1]) == (1 << 40, 1000)
    assert items.decode_volume(SAMPLES["volume"][1]) == (b"v" * 16, "created", {"n": 3})


def test_field_indexes_match_the_value():
    fields = items.decode(INODE.encode(), items.INODE_FIELDS)
    for name, index in vars(items).items():
        if name.startswith("F_") and not name.startswith(("F_USAGE", "F_VOLUME")):
            assert fields[index] == getattr(INODE, name[2:].lower())


def test_everything_about_an_inode_is_adjacent_and_in_order():
    keys = [key for _, (key, _) in sorted(SAMPLES.items()) if key[:8] == (9).to_bytes(8, "big")]
    assert [items.split_key(k)[1] for k in sorted(keys)] == [2, 3, 4, 5, 5]
    assert items.extent_key(9, 255) < items.extent_key(9, 256) < items.extent_key(10, 0)
    for key in keys:
        group = items.group_of(key)
        assert group <= key < items.group_end(group)
        ino, kind, suffix = items.split_key(key)
        assert items.group(ino, kind) == group
        assert group + suffix == key
    assert items.suffix_u64(items.extent_key(9, 4096)) == 4096


def test_name_hashes_are_salted_and_leave_the_low_cookies_free():
    assert items.name_hash(b"a", b"x") != items.name_hash(b"b", b"x")
    assert items.name_hash(b"a", b"x") == items.name_hash(b"a", b"x")
    small = {items.name_hash(b"a", b"%d" % i, 8) for i in range(5000)}
    assert small == set(range(3, 256))
    assert all(items.name_hash(b"a", b"%d" % i) < 1 << 63 for i in range(100))


@pytest.mark.parametrize(
    "value", [b"", b"\xc1", pack(1), pack(()), pack((1, 2)), pack((2, *range(14))), b"\x91" * 5000]
)
def test_foreign_values_are_corrupt(value):
    with pytest.raises(Corrupt):
        Inode.decode(value)
    with pytest.raises(Corrupt):
        items.decode_extent(value)
    with pytest.raises(Corrupt):
        items.decode_volume(value)


def test_short_keys_are_corrupt():
    with pytest.raises(Corrupt):
        items.split_key(b"\0" * 8)
