"""One well-formed item of each type."""

from dfs.volume import items
from dfs.volume.items import Inode

CHUNK = bytes(range(32))
INODE = Inode(8, 0o644, 1000, 1001, 0, 4096, 2, 11, 12, 13, 14, 1, 0, 5)
SAMPLES = {
    "inode": (items.inode_key(0x0102030405060708), INODE.encode()),
    "entry": (
        items.entry_key(1, 0x7766554433221100),
        items.encode_entries(((b"a", 2, 8), (b"\xff", 3, 4))),
    ),
    "symlink": (items.symlink_key(9), items.encode_symlink(b"../target")),
    "xattr": (items.xattr_key(9, b"user.x"), items.encode_xattr(b"value")),
    "backlink": (items.backlink_key(9, 1, 77), items.encode_backlinks((b"b",))),
    "inline": (items.extent_key(9, 0), items.encode_inline(b"hello")),
    "chunk": (items.extent_key(9, 4096), items.encode_chunk(100, CHUNK, 28, 128)),
    "orphan": (items.orphan_key(9), items.ORPHAN_VALUE),
    "usage": (items.USAGE_KEY, items.encode_usage(1 << 40, 7)),
    "quota": (items.QUOTA_KEY, items.encode_quota(1 << 40, 1000)),
    "volume": (items.volume_key(b"home"), items.encode_volume(b"v" * 16, "created", {"n": 3})),
}
