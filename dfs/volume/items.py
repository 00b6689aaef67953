"""Items, the unit of a volume's state: how keys are built and values encoded.

A volume is an ordered map from key to value, both bytes.  A key is `ino:u64be | type:u8 | suffix`,
so that everything about one inode is adjacent and a directory's entries or a file's extents are one
contiguous *group*, named by the 9-byte prefix `(ino, type)`.  A value is a canonical msgpack tuple
that starts with its version.

    type      suffix                      value
    INODE     -                           (1, kind, mode, uid, gid, rdev, size, nlink, atime, mtime,
                                           ctime, btime, parent, flags, dataver)
    ENTRY     hash63(name) u64            (1, ((name, ino, kind), ...))
    SYMLINK   -                           (1, target)
    XATTR     name                        (1, value)
    BACKLINK  parent u64, hash63 u64      (1, (name, ...))       links besides the primary one
    EXTENT    file offset u64             (1, length, 0, bytes)
                                          (1, length, 1, chunk_id, chunk_offset, chunk_length)
    ORPHAN    ino u64                     (1,)            on ino 0: unlinked, perhaps still open
    USAGE     -                           (1, bytes, inodes)     on ino 0
    QUOTA     -                           (1, bytes, inodes)     on ino 0: limits of USAGE, 0 = none
    VOLUME    name                        (1, volume_id, state, params)   on ino 2, system volume

kind is `S_IFMT(st_mode) >> 12`, mode the permission bits 07777, times are nanoseconds since the
epoch.  Extents of a file never overlap; what no extent covers reads as zeros.
"""

import struct
from typing import Any

from dfs.codec import Buffer, pack, unpack
from dfs.errors import Corrupt, DfsError
from dfs.hashing import hash64

VERSION = 1
MAX_ITEM = 64 << 10  # bytes of key and value together
MAX_KEY = 512
MAX_NAME = 255
MAX_TARGET = 4095
MAX_EXTENT = 4 << 20  # bytes of file that one extent may cover
MAX_OFFSET = (1 << 63) - 1
HASH_BITS = 63
FIRST_HASH = 3  # 0..2 are readdir cookies of `.` and `..`
ADMIN_INO = 0  # ORPHAN, USAGE and QUOTA
REGISTRY_INO = 2  # VOLUME, in the system volume

INODE, ENTRY, SYMLINK, XATTR, BACKLINK, EXTENT = range(6)
ORPHAN, USAGE, QUOTA, VOLUME = 16, 17, 18, 32

FIFO, CHR, DIR, BLK, REG, LNK, SOCK = 1, 2, 4, 6, 8, 10, 12
KINDS = frozenset((FIFO, CHR, DIR, BLK, REG, LNK, SOCK))

# Positions in the INODE tuple, for PATCH effects and for readers that decode no `Inode`.
(
    F_KIND,
    F_MODE,
    F_UID,
    F_GID,
    F_RDEV,
    F_SIZE,
    F_NLINK,
    F_ATIME,
    F_MTIME,
    F_CTIME,
    F_BTIME,
    F_PARENT,
    F_FLAGS,
    F_DATAVER,
) = range(1, 15)
INODE_FIELDS = 15
F_USAGE_BYTES, F_USAGE_INODES = 1, 2
F_VOLUME_ID, F_VOLUME_STATE, F_VOLUME_PARAMS = 1, 2, 3

_head = struct.Struct(">QB")
_head8 = struct.Struct(">QBQ")
_head16 = struct.Struct(">QBQQ")
_u64 = struct.Struct(">Q")
GROUP_SIZE = _head.size

EntryRecord = tuple[bytes, int, int]  # (name, ino, kind)


# ----------------------------------------------------------------------------------------- keys


def group(ino: int, kind: int) -> bytes:
    """Prefix of all the keys of one type of one inode."""
    return _head.pack(ino, kind)


def group_end(prefix: bytes) -> bytes:
    """First key after a group."""
    return prefix[:8] + bytes((prefix[8] + 1,))


def group_of(key: bytes) -> bytes:
    """Group that a key belongs to."""
    return key[:GROUP_SIZE]


def split_key(key: bytes) -> tuple[int, int, bytes]:
    """(ino, type, suffix) of a key; raises `Corrupt` when it is too short to be one."""
    if len(key) < GROUP_SIZE:
        raise Corrupt(f"item key of {len(key)} bytes: {key!r}")
    ino, kind = _head.unpack_from(key)
    return ino, kind, key[GROUP_SIZE:]


def inode_key(ino: int) -> bytes:
    """Key of an INODE."""
    return _head.pack(ino, INODE)


def entry_key(parent: int, hash63: int) -> bytes:
    """Key of the bucket of directory entries whose names hash to `hash63`."""
    return _head8.pack(parent, ENTRY, hash63)


def symlink_key(ino: int) -> bytes:
    """Key of a symbolic link's target."""
    return _head.pack(ino, SYMLINK)


def xattr_key(ino: int, name: bytes) -> bytes:
    """Key of an extended attribute."""
    return _head.pack(ino, XATTR) + name


def backlink_key(ino: int, parent: int, hash63: int) -> bytes:
    """Key of the additional links of `ino` in one bucket of one directory."""
    return _head16.pack(ino, BACKLINK, parent, hash63)


def extent_key(ino: int, offset: int) -> bytes:
    """Key of the extent that starts at a file offset."""
    return _head8.pack(ino, EXTENT, offset)


def orphan_key(ino: int) -> bytes:
    """Key of the mark of an inode that has no name any more."""
    return _head8.pack(ADMIN_INO, ORPHAN, ino)


USAGE_KEY = _head.pack(ADMIN_INO, USAGE)
QUOTA_KEY = _head.pack(ADMIN_INO, QUOTA)


def volume_key(name: bytes) -> bytes:
    """Key of a volume's record in the system volume."""
    return _head.pack(REGISTRY_INO, VOLUME) + name


def suffix_u64(key: bytes) -> int:
    """First number of the suffix: an ENTRY's hash, an EXTENT's offset, an ORPHAN's inode."""
    return int(_u64.unpack_from(key, GROUP_SIZE)[0])


def name_hash(salt: bytes, name: bytes, bits: int = HASH_BITS) -> int:
    """Salted hash of a file name, 3 .. 2**bits - 1: orders a directory and is its readdir cookie.

    Keyed by the volume's salt, so that nobody who does not know it can make names collide; fewer
    bits make collisions on purpose, for tests.
    """
    value = hash64(salt, name) >> (64 - bits)
    return value if value >= FIRST_HASH else value + FIRST_HASH


# --------------------------------------------------------------------------------------- values


class Inode:
    """Attributes of one file, directory or other node; a mutable record of the INODE value."""

    __slots__ = (
        "atime",
        "btime",
        "ctime",
        "dataver",
        "flags",
        "gid",
        "kind",
        "mode",
        "mtime",
        "nlink",
        "parent",
        "rdev",
        "size",
        "uid",
    )

    def __init__(
        self,
        kind: int,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        rdev: int = 0,
        size: int = 0,
        nlink: int = 1,
        atime: int = 0,
        mtime: int = 0,
        ctime: int = 0,
        btime: int = 0,
        parent: int = 0,
        flags: int = 0,
        dataver: int = 0,
    ) -> None:
        """Fields in the order of the value."""
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.rdev = rdev
        self.size = size
        self.nlink = nlink
        self.atime = atime
        self.mtime = mtime
        self.ctime = ctime
        self.btime = btime
        self.parent = parent
        self.flags = flags
        self.dataver = dataver

    def fields(self) -> tuple[int, ...]:
        """All fields in the order of the value."""
        return (
            self.kind,
            self.mode,
            self.uid,
            self.gid,
            self.rdev,
            self.size,
            self.nlink,
            self.atime,
            self.mtime,
            self.ctime,
            self.btime,
            self.parent,
            self.flags,
            self.dataver,
        )

    def encode(self) -> bytes:
        """The value."""
        return pack((VERSION, *self.fields()))

    @classmethod
    def decode(cls, value: Buffer) -> "Inode":
        """Parse a value; raises `Corrupt`."""
        return cls(*decode(value, INODE_FIELDS)[1:])

    def __eq__(self, other: object) -> bool:
        """Equal when all fields are."""
        return isinstance(other, Inode) and self.fields() == other.fields()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        """For people."""
        inner = ", ".join(f"{name}={getattr(self, name)}" for name in self.__slots__)
        return f"Inode({inner})"


def decode(value: Buffer, size: int) -> tuple[Any, ...]:
    """Parse a value of `size` fields, the version among them; raises `Corrupt`."""
    try:
        fields = unpack(value)
    except DfsError as e:
        raise Corrupt(f"undecodable item value: {e}") from e
    if type(fields) is not tuple or len(fields) != size or fields[0] != VERSION:
        raise Corrupt(f"item value is no version {VERSION} tuple of {size}: {bytes(value[:16])!r}")
    return fields


def encode_entries(entries: tuple[EntryRecord, ...]) -> bytes:
    """ENTRY value: the names in one bucket."""
    return pack((VERSION, entries))


def decode_entries(value: Buffer) -> tuple[EntryRecord, ...]:
    """Names in one bucket: (name, ino, kind) each."""
    entries: tuple[EntryRecord, ...] = decode(value, 2)[1]
    return entries


def encode_symlink(target: bytes) -> bytes:
    """SYMLINK value."""
    return pack((VERSION, target))


def decode_symlink(value: Buffer) -> bytes:
    """Target of a symbolic link."""
    target: bytes = decode(value, 2)[1]
    return target


def encode_xattr(data: bytes) -> bytes:
    """XATTR value."""
    return pack((VERSION, data))


def decode_xattr(value: Buffer) -> bytes:
    """Content of an extended attribute."""
    data: bytes = decode(value, 2)[1]
    return data


def encode_backlinks(names: tuple[bytes, ...]) -> bytes:
    """BACKLINK value: the names in one bucket of one directory that are additional links."""
    return pack((VERSION, names))


def decode_backlinks(value: Buffer) -> tuple[bytes, ...]:
    """Names of additional links."""
    names: tuple[bytes, ...] = decode(value, 2)[1]
    return names


def encode_inline(data: Buffer) -> bytes:
    """EXTENT value that holds its bytes itself."""
    return pack((VERSION, len(data), 0, bytes(data)))


def encode_chunk(length: int, chunk_id: bytes, chunk_offset: int, chunk_length: int) -> bytes:
    """EXTENT value that names `length` bytes at `chunk_offset` of a chunk of `chunk_length`."""
    return pack((VERSION, length, 1, chunk_id, chunk_offset, chunk_length))


def decode_extent(value: Buffer) -> tuple[Any, ...]:
    """(length, 0, bytes) or (length, 1, chunk_id, chunk_offset, chunk_length)."""
    try:
        fields = unpack(value)
    except DfsError as e:
        raise Corrupt(f"undecodable extent: {e}") from e
    if type(fields) is tuple and fields[:1] == (VERSION,):
        size = len(fields)
        if (size == 4 and fields[2] == 0) or (size == 6 and fields[2] == 1):
            return fields[1:]
    raise Corrupt(f"not an extent of version {VERSION}: {bytes(value[:16])!r}")


ORPHAN_VALUE = pack((VERSION,))


def encode_usage(size: int, inodes: int) -> bytes:
    """USAGE value: sum of the sizes of regular files, number of inodes."""
    return pack((VERSION, size, inodes))


def decode_usage(value: Buffer) -> tuple[int, int]:
    """(bytes, inodes)."""
    _, size, inodes = decode(value, 3)
    return size, inodes


def encode_quota(size: int, inodes: int) -> bytes:
    """QUOTA value: how much USAGE may become, 0 = no limit."""
    return pack((VERSION, size, inodes))


def decode_quota(value: Buffer) -> tuple[int, int]:
    """(bytes, inodes)."""
    _, size, inodes = decode(value, 3)
    return size, inodes


def encode_volume(volume_id: bytes, state: str, params: dict[str, Any]) -> bytes:
    """VOLUME value; state is "creating", "created" or "deleting"."""
    return pack((VERSION, volume_id, state, params))


def decode_volume(value: Buffer) -> tuple[bytes, str, dict[str, Any]]:
    """(volume_id, state, params)."""
    _, volume_id, state, params = decode(value, 4)
    return volume_id, state, params
