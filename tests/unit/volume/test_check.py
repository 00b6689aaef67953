"""The volume checker: green on a sound state, red on each damage."""

import pytest

from dfs.volume import items
from dfs.volume.check import check
from dfs.volume.items import DIR, LNK, REG, Inode

SALT = b"s" * 16


def sound():
    """root / {a (file), d / {b (file), hard link of a}, l -> a}, one orphan."""
    state = {}

    def name(parent, text, ino, kind):
        state[items.entry_key(parent, items.name_hash(SALT, text))] = items.encode_entries(
            ((text, ino, kind),)
        )

    state[items.inode_key(1)] = Inode(DIR, 0o755, size=3, nlink=3, parent=1).encode()
    state[items.inode_key(10)] = Inode(REG, 0o644, size=100, nlink=2, parent=1).encode()
    state[items.inode_key(11)] = Inode(DIR, 0o755, size=2, nlink=2, parent=1).encode()
    state[items.inode_key(12)] = Inode(REG, 0o644, size=70_000, nlink=1, parent=11).encode()
    state[items.inode_key(13)] = Inode(LNK, 0o777, nlink=1, parent=1).encode()
    state[items.inode_key(14)] = Inode(REG, 0o644, size=5, nlink=0, parent=1).encode()
    name(1, b"a", 10, REG)
    name(1, b"d", 11, DIR)
    name(11, b"b", 12, REG)
    name(11, b"again", 10, REG)
    name(1, b"l", 13, LNK)
    state[items.backlink_key(10, 11, items.name_hash(SALT, b"again"))] = items.encode_backlinks(
        (b"again",)
    )
    state[items.symlink_key(13)] = items.encode_symlink(b"a")
    state[items.extent_key(10, 0)] = items.encode_inline(b"x" * 100)
    state[items.extent_key(12, 0)] = items.encode_chunk(70_000, b"c" * 32, 0, 70_000)
    state[items.orphan_key(14)] = items.ORPHAN_VALUE
    state[items.USAGE_KEY] = items.encode_usage(70_105, 6)
    return state


def run(state):
    return check(sorted(state.items()), SALT)


def test_a_sound_volume_has_no_problem():
    found = run(sound())
    assert found.problems == []
    assert (found.inodes, found.directories, found.file_bytes) == (6, 2, 70_105)
    assert found.chunks == {b"c" * 32: 70_000}


def patch(key, **fields):
    def damage(state):
        inode = Inode.decode(state[key])
        for f, v in fields.items():
            setattr(inode, f, v)
        state[key] = inode.encode()

    return damage


def drop(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.__setitem__(key, value)


B = items.name_hash(SALT, b"b")
DAMAGES = {
    "nlink of a file": ("V2", patch(items.inode_key(10), nlink=1)),
    "nlink of a directory": ("V2", patch(items.inode_key(1), nlink=2)),
    "parent of a directory": ("V1", patch(items.inode_key(11), parent=11)),
    "parent of a file": ("V2", patch(items.inode_key(12), parent=1)),
    "inode gone": ("V1", drop(items.inode_key(12))),
    "name gone": ("V2", drop(items.entry_key(11, B))),
    "root gone": ("V1", drop(items.inode_key(1))),
    "wrong bucket": ("V1", put(items.entry_key(11, 77), items.encode_entries(((b"z", 12, REG),)))),
    "backlink gone": ("V2", drop(items.backlink_key(10, 11, items.name_hash(SALT, b"again")))),
    "target gone": ("V2", drop(items.symlink_key(13))),
    "orphan mark gone": ("V2", drop(items.orphan_key(14))),
    "orphan with a name": ("V2", put(items.orphan_key(12), items.ORPHAN_VALUE)),
    "usage": ("V2", put(items.USAGE_KEY, items.encode_usage(1, 6))),
    "usage gone": ("V2", drop(items.USAGE_KEY)),
    "size": ("V2", patch(items.inode_key(12), size=69_999)),
    "overlap": ("V2", put(items.extent_key(12, 9), items.encode_inline(b"y"))),
    "past the chunk": (
        "C1",
        put(items.extent_key(12, 0), items.encode_chunk(70_000, b"c" * 32, 1, 70_000)),
    ),
    "loose extent": ("V2", put(items.extent_key(99, 0), items.encode_inline(b"y"))),
    "size of a directory": ("V2", patch(items.inode_key(11), size=1)),
    "kind of a name": (
        "V1",
        put(
            items.entry_key(1, items.name_hash(SALT, b"l")),
            items.encode_entries(((b"l", 13, REG),)),
        ),
    ),
    "orphan that is gone": ("V2", put(items.orphan_key(99), items.ORPHAN_VALUE)),
    "nlink of an orphan": ("V2", patch(items.inode_key(14), nlink=1)),
    "loose attribute": ("V2", put(items.xattr_key(99, b"user.a"), items.encode_xattr(b"y"))),
    "backlink in a wrong bucket": (
        "V2",
        put(items.backlink_key(10, 11, 7), items.encode_backlinks((b"again",))),
    ),
    "quota": ("format", put(items.QUOTA_KEY, b"\xc1")),
    "garbage": ("format", put(items.inode_key(12), b"\xc1")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found(name):
    invariant, damage = DAMAGES[name]
    state = sound()
    damage(state)
    assert invariant in {p[0] for p in run(state).problems}, run(state).problems


def test_a_cycle_of_directories_does_not_reach_the_root():
    state = sound()
    for ino, parent in ((20, 21), (21, 20)):
        state[items.inode_key(ino)] = Inode(DIR, 0o755, size=1, nlink=3, parent=parent).encode()
        state[items.entry_key(parent, items.name_hash(SALT, b"x"))] = items.encode_entries(
            ((b"x", ino, DIR),)
        )
    assert any("does not reach" in text for _, text in run(state).problems)
