"""Attributes of inodes: what `stat` shows, and the operations that change them.

`Attr` is the value the VFS hands out.  The functions are pure operations on a transaction: they
read and write through it and raise `FsError`.
"""

import errno
import os

from dfs.client import acl
from dfs.codec import Buffer
from dfs.errors import FsError
from dfs.volume import effects as fx
from dfs.volume import items
from dfs.volume.items import DIR, LNK, REG, Inode
from dfs.volume.view import Txn

S_ISUID, S_ISGID, S_IXGRP = 0o4000, 0o2000, 0o010
BLOCK = 512  # unit of st_blocks
FLAG_XATTRS = 1  # INODE.flags: the inode has or had extended attributes
MAX_SIZE = items.MAX_OFFSET
MIN_TIME, MAX_TIME = -(1 << 63), (1 << 64) - 1  # nanoseconds that an item can hold: 1677 to 2554


def fs_error(code: int, what: str = "") -> FsError:
    """An `FsError` with the system's own words for the errno."""
    text = os.strerror(code)
    return FsError(f"{what}: {text}" if what else text, code)


class Attr:
    """Attributes of one inode: the fields of `struct stat`, times in nanoseconds.

    `kind` is `S_IFMT >> 12` (see `dfs.volume.items`), `mode` the permission bits.
    """

    __slots__ = (
        "atime", "btime", "ctime", "gid", "ino", "kind", "mode", "mtime", "nlink", "rdev", "size",
        "uid",
    )  # fmt: skip

    def __init__(self, ino: int, inode: Inode) -> None:
        """Copy what `stat` needs from an inode."""
        self.ino = ino
        self.kind = inode.kind
        self.mode = inode.mode
        self.nlink = inode.nlink
        self.uid = inode.uid
        self.gid = inode.gid
        self.rdev = inode.rdev
        self.size = inode.size
        self.atime = inode.atime
        self.mtime = inode.mtime
        self.ctime = inode.ctime
        self.btime = inode.btime

    @classmethod
    def decode(cls, ino: int, value: Buffer) -> "Attr":
        """The same from an INODE value, without an `Inode` between; raises `Corrupt`."""
        attr = cls.__new__(cls)
        (
            _, attr.kind, attr.mode, attr.uid, attr.gid, attr.rdev, attr.size, attr.nlink,
            attr.atime, attr.mtime, attr.ctime, attr.btime, _, _, _,
        ) = items.decode(value, items.INODE_FIELDS)  # fmt: skip
        attr.ino = ino
        return attr

    @property
    def st_mode(self) -> int:
        """Type and permission bits in one number."""
        return self.kind << 12 | self.mode

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory."""
        return self.kind == DIR

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file."""
        return self.kind == REG

    @property
    def is_symlink(self) -> bool:
        """Whether this is a symbolic link."""
        return self.kind == LNK

    def __repr__(self) -> str:
        """For people."""
        return f"Attr(ino={self.ino}, mode={self.st_mode:o}, nlink={self.nlink}, size={self.size})"


def get_inode(txn: Txn, ino: int) -> Inode:
    """The inode; raises ESTALE when it is gone."""
    value = txn.get(items.inode_key(ino))
    if value is None:
        raise fs_error(errno.ESTALE, f"inode {ino:x}")
    return Inode.decode(value)


def get_attr(txn: Txn, ino: int) -> Attr:
    """Attributes as committed; raises ESTALE when the inode is gone."""
    value = txn.get(items.inode_key(ino))
    if value is None:
        raise fs_error(errno.ESTALE, f"inode {ino:x}")
    return Attr.decode(ino, value)


def patch_inode(txn: Txn, ino: int, *changes: fx.Change) -> None:
    """Change fields of an INODE."""
    txn.patch(items.inode_key(ino), changes)


def set_attr(
    txn: Txn,
    ino: int,
    now: int,
    *,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    atime: int | None = None,
    mtime: int | None = None,
    ctime: int | None = None,
) -> Inode:
    """chmod, chown and utimens in one; None leaves a field as it is.

    Returns the inode as it becomes.  A change of owner or group clears set-user-ID, and
    set-group-ID of what its group may execute, on everything but directories, unless the same call
    sets the mode.  Times beyond what can be kept become the nearest that can, as on other file
    systems of Linux (`timestamp_truncate`).
    """
    inode = get_inode(txn, ino)
    changes: list[fx.Change] = []
    if (uid is not None or gid is not None) and mode is None and inode.kind != DIR:
        cleared = without_privileges(inode.mode)
        if cleared != inode.mode:
            mode = cleared
    if mode is not None:
        inode.mode = mode & 0o7777
        changes.append((items.F_MODE, fx.SET, inode.mode))
        if inode.flags & FLAG_XATTRS:
            _limit_access_list(txn, ino, inode.mode)
    if uid is not None:
        inode.uid = uid
        changes.append((items.F_UID, fx.SET, uid))
    if gid is not None:
        inode.gid = gid
        changes.append((items.F_GID, fx.SET, gid))
    if atime is not None:
        inode.atime = _storable(atime)
        changes.append((items.F_ATIME, fx.LAST, inode.atime))
    if mtime is not None:
        inode.mtime = _storable(mtime)
        changes.append((items.F_MTIME, fx.LAST, inode.mtime))
    inode.ctime = now if ctime is None else _storable(ctime)
    changes.append((items.F_CTIME, fx.LAST, inode.ctime))
    patch_inode(txn, ino, *changes)
    return inode


def _storable(time: int) -> int:
    return max(MIN_TIME, min(time, MAX_TIME))


def _limit_access_list(txn: Txn, ino: int, mode: int) -> None:
    """An access control list, if there is one, follows the permission bits."""
    key = items.xattr_key(ino, acl.ACCESS)
    value = txn.get(key)
    if value is not None:
        entries = acl.decode(items.decode_xattr(value))
        txn.put(key, items.encode_xattr(acl.encode(acl.limited(entries, mode, keep=False))))


def without_privileges(mode: int) -> int:
    """Permission bits after a write or change of owner: set-ID bits cleared where in effect."""
    mode &= ~S_ISUID
    return mode & ~S_ISGID if mode & S_IXGRP else mode


# ----------------------------------------------------------------------------------------- xattrs

XATTR_CREATE, XATTR_REPLACE = 1, 2
NAMESPACES = (b"user", b"trusted", b"security")
MAX_XATTR = items.MAX_ITEM - 1024


def get_xattr(txn: Txn, ino: int, name: bytes) -> bytes:
    """One extended attribute; raises ENODATA, EOPNOTSUPP for what no file can have."""
    get_inode(txn, ino)
    value = txn.get(items.xattr_key(ino, name)) if name else None
    if value is None:
        _check_xattr_name(name)
        raise fs_error(errno.ENODATA, repr(name))
    return items.decode_xattr(value)


def _check_xattr_name(name: bytes) -> None:
    """Raise EOPNOTSUPP, EINVAL for a name in no namespace that there is, or of nothing else.

    Of the `system` namespace there are access control lists only.
    """
    namespace, dot, rest = name.partition(b".")
    if name in (acl.ACCESS, acl.DEFAULT):
        return
    if not dot or namespace not in NAMESPACES:
        raise fs_error(errno.EOPNOTSUPP, f"extended attribute {name!r}")
    if not rest:
        raise fs_error(errno.EINVAL, f"extended attribute {name!r}")


def list_xattrs(txn: Txn, ino: int) -> list[bytes]:
    """Names of the extended attributes, sorted."""
    get_inode(txn, ino)
    prefix = items.group(ino, items.XATTR)
    return [key[items.GROUP_SIZE :] for key, _ in txn.scan(prefix)]


def set_xattr(txn: Txn, ino: int, name: bytes, value: bytes, now: int, flags: int = 0) -> None:
    """Set an extended attribute; flags as of setxattr(2).

    An access control list for access sets the permission bits, and is not kept if they say as much.
    """
    if not 0 < len(name) <= items.MAX_NAME:
        raise fs_error(errno.ERANGE, "name of an extended attribute")
    _check_xattr_name(name)
    if len(value) > MAX_XATTR:
        raise fs_error(errno.E2BIG, f"extended attribute of {len(value)} bytes")
    inode = get_inode(txn, ino)
    key = items.xattr_key(ino, name)
    if flags:
        there = txn.get(key) is not None
        if there and flags & XATTR_CREATE:
            raise fs_error(errno.EEXIST, repr(name))
        if not there and flags & XATTR_REPLACE:
            raise fs_error(errno.ENODATA, repr(name))
    changes: list[fx.Change] = [(items.F_CTIME, fx.LAST, now)]
    entries = acl.decode(value) if name in (acl.ACCESS, acl.DEFAULT) else []
    if name == acl.DEFAULT and inode.kind != DIR:
        raise fs_error(errno.EACCES, repr(name))
    if name == acl.ACCESS:
        changes.append((items.F_MODE, fx.SET, inode.mode & ~0o777 | acl.bits(entries)))
    if name == acl.ACCESS and acl.is_minimal(entries):
        txn.delete(key)
        patch_inode(txn, ino, *changes)
        return
    txn.put(key, items.encode_xattr(value))
    if not inode.flags & FLAG_XATTRS:
        changes.append((items.F_FLAGS, fx.SET, inode.flags | FLAG_XATTRS))
    patch_inode(txn, ino, *changes)


def remove_xattr(txn: Txn, ino: int, name: bytes, now: int) -> None:
    """Remove an extended attribute; raises ENODATA, but not for access control lists."""
    try:
        get_xattr(txn, ino, name)
    except FsError as e:
        if e.errno == errno.ENODATA and name in (acl.ACCESS, acl.DEFAULT):
            return
        raise
    txn.delete(items.xattr_key(ino, name))
    patch_inode(txn, ino, (items.F_CTIME, fx.LAST, now))
