"""What a home lets into the journal, and what it does not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.codec import pack
from dfs.errors import InvalidArgument
from dfs.volume import effects as fx
from dfs.volume import items
from dfs.volume.fold import fold
from dfs.volume.items import Inode
from dfs.volume.validation import MAX_EFFECTS, validate
from dfs.volume.window import Window
from tests.unit.volume.samples import CHUNK, INODE, SAMPLES

KEY, VALUE = SAMPLES["inode"]
EXTENTS = items.group(9, items.EXTENT)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n != "volume"])
def test_every_item_may_be_put_and_deleted(name):
    key, value = SAMPLES[name]
    validate(((fx.PUT, key, value), (fx.DELETE, key)))


def test_volume_records_belong_to_the_system_volume():
    key, value = SAMPLES["volume"]
    patch = (fx.PATCH, key, ((items.F_VOLUME_STATE, fx.SET, "deleting"),))
    for effect in ((fx.PUT, key, value), (fx.DELETE, key), patch):
        validate((effect,), system=True)
        with pytest.raises(InvalidArgument):
            validate((effect,))


GOOD = [
    (fx.PATCH, KEY, ((items.F_SIZE, fx.SET, 5), (items.F_NLINK, fx.ADD, -1))),
    (fx.PATCH, items.USAGE_KEY, ((items.F_USAGE_BYTES, fx.ADD, 1 << 50),)),
    (fx.DELETE_RANGE, EXTENTS, items.group_end(EXTENTS)),
    (fx.DELETE_RANGE, items.extent_key(9, 5), items.extent_key(9, 5)),
    (fx.DELETE_RANGE, items.group(9, items.XATTR), items.group_end(items.group(9, items.XATTR))),
]
BAD = [
    None,
    (),
    [fx.DELETE, KEY],
    (9, KEY),
    (fx.PUT, KEY),
    (fx.PUT, KEY, None),
    (fx.PUT, KEY, "text"),
    (fx.PUT, KEY.hex(), VALUE),
    (fx.PUT, KEY, VALUE, 1),
    (fx.PUT, KEY[:8], VALUE),
    (fx.PUT, KEY + b"x", VALUE),  # an INODE has no suffix
    (fx.PUT, items.group(0, items.INODE), VALUE),
    (fx.PUT, items.group(0, items.EXTENT) + bytes(8), SAMPLES["inline"][1]),
    (fx.PUT, items.group(5, items.USAGE), SAMPLES["usage"][1]),
    (fx.PUT, items.group(5, items.ORPHAN) + bytes(8), items.ORPHAN_VALUE),
    (fx.PUT, items.group(5, 99), pack((1,))),
    (fx.PUT, items.entry_key(1, 2), SAMPLES["entry"][1]),  # cookies 0..2 are taken
    (fx.PUT, items.entry_key(1, 1 << 63), SAMPLES["entry"][1]),
    (fx.PUT, items.xattr_key(1, b""), SAMPLES["xattr"][1]),
    (fx.PUT, items.xattr_key(1, b"x" * 256), SAMPLES["xattr"][1]),
    (fx.PUT, items.xattr_key(1, b"big"), items.encode_xattr(b"x" * (64 << 10))),
    (fx.PUT, KEY, VALUE[:-1]),
    (fx.PUT, KEY, VALUE + b"\0"),
    (fx.PUT, KEY, pack((2, *INODE.fields()))),
    (fx.PUT, KEY, pack((1, *INODE.fields(), 0))),
    (fx.PUT, KEY, pack((1, *INODE.fields()[:-1], "x"))),
    (fx.PUT, KEY, Inode(3, 0).encode()),  # no such kind
    (fx.PUT, KEY, VALUE.replace(b"\x05", b"\xcc\x05")),  # 5, but not in its shortest form
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(())),
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(((b"a/b", 2, 8),))),
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(((b"..", 2, 8),))),
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(((b"", 2, 8),))),
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(((b"n" * 256, 2, 8),))),
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(((b"a", 0, 8),))),
    (fx.PUT, SAMPLES["entry"][0], items.encode_entries(((b"a", 2, 8), (b"a", 3, 8)))),
    (fx.PUT, SAMPLES["entry"][0], pack((1, ((b"a", 2),)))),
    (fx.PUT, SAMPLES["symlink"][0], items.encode_symlink(b"t" * 4096)),
    (fx.PUT, SAMPLES["symlink"][0], pack((1, "text"))),
    (fx.PUT, SAMPLES["inline"][0], pack((1, 4, 0, b"hello"))),
    (fx.PUT, SAMPLES["inline"][0], pack((1, 0, 0, b""))),
    (fx.PUT, SAMPLES["chunk"][0], items.encode_chunk(100, CHUNK, 29, 128)),
    (fx.PUT, SAMPLES["chunk"][0], items.encode_chunk(100, CHUNK, -1, 128)),
    (fx.PUT, SAMPLES["chunk"][0], items.encode_chunk(100, CHUNK[:31], 0, 128)),
    (fx.PUT, SAMPLES["chunk"][0], items.encode_chunk((4 << 20) + 1, CHUNK, 0, 8 << 20)),
    (fx.PUT, items.extent_key(1, (1 << 63) - 50), items.encode_chunk(100, CHUNK, 0, 128)),
    (fx.PUT, items.extent_key(1, 1 << 63), items.encode_inline(b"x")),
    (fx.PUT, items.USAGE_KEY, pack((1, 2.5, 0))),
    (fx.PATCH, KEY, ()),
    (fx.PATCH, KEY, ((0, fx.SET, 2),)),  # the version stays
    (fx.PATCH, KEY, ((15, fx.SET, 2),)),
    (fx.PATCH, KEY, ((items.F_KIND, fx.SET, 4),)),
    (fx.PATCH, KEY, ((1, 3, 2),)),
    (fx.PATCH, KEY, ((1, fx.SET, b"x"),)),
    (fx.PATCH, KEY, ((1, fx.SET, None),)),
    (fx.PATCH, KEY, ((1, fx.SET),)),
    (fx.PATCH, KEY, ((1, fx.SET, 1),) * 31),
    (fx.PATCH, SAMPLES["entry"][0], ((1, fx.SET, 1),)),
    (fx.PATCH, SAMPLES["inline"][0], ((1, fx.SET, 1),)),
    (fx.DELETE_RANGE, EXTENTS),
    (fx.DELETE_RANGE, EXTENTS[:8], EXTENTS),
    (fx.DELETE_RANGE, items.extent_key(9, 5), items.extent_key(9, 4)),
    (fx.DELETE_RANGE, EXTENTS, items.group_end(EXTENTS) + b"\0"),
    (fx.DELETE_RANGE, items.group(9, items.ENTRY), items.group_end(items.group(9, items.ENTRY))),
    (fx.DELETE_RANGE, items.group(9, items.INODE), items.group_end(items.group(9, items.INODE))),
    (fx.DELETE_RANGE, items.group(0, items.ORPHAN), items.group_end(items.group(0, items.ORPHAN))),
    (fx.DELETE_RANGE, items.group(0, items.EXTENT), items.group_end(items.group(0, items.EXTENT))),
]  # fmt: skip


@pytest.mark.parametrize("effect", GOOD, ids=repr)
def test_good(effect):
    validate((effect,))


@pytest.mark.parametrize("effect", BAD, ids=lambda e: repr(e)[:60])
def test_bad(effect):
    with pytest.raises(InvalidArgument):
        validate((effect,))
    with pytest.raises(InvalidArgument):
        validate((GOOD[0], effect), system=True)


@pytest.mark.parametrize(
    "fields",
    [
        (1, b"short", "created", {}),
        (1, b"v" * 16, "other", {}),
        (1, b"v" * 16, ["created"], {}),
        (1, b"v" * 16, "created", ()),
        (1, b"v" * 16, "created", {1: 2}),
        (1, b"v" * 16, "created", {"x": b"y" * 9000}),
    ],
)
def test_bad_volume_records(fields):
    with pytest.raises(InvalidArgument):
        validate(((fx.PUT, SAMPLES["volume"][0], pack(fields)),), system=True)


def test_bad_lists():
    for effects in (None, [], b"", ((fx.DELETE, KEY),) * (MAX_EFFECTS + 1)):
        with pytest.raises(InvalidArgument):
            validate(effects)
    validate(())


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.binary(max_size=20)
    | st.sampled_from([KEY, VALUE, EXTENTS, items.USAGE_KEY, SAMPLES["entry"][0]]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 4), junk) | st.tuples(st.integers(0, 4), junk, junk)))
@settings(max_examples=80, deadline=None)
def test_junk_is_refused_or_harmless(effects):
    """Whatever passes validation can be applied, recorded and folded."""
    try:
        validate(tuple(effects), system=True)
    except InvalidArgument:
        return
    fold(lambda _: None, b"", b"s", effects)
    Window(0).record(1, effects)
