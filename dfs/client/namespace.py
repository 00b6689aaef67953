"""Names: every POSIX operation on directories, as pure functions on a transaction.

A function reads through the transaction, buffers effects in it and returns the result, or raises
`FsError`; it may be run any number of times and knows neither network nor time (`now` is an
argument).  What makes the concurrency right is what each function *reads*:

- creating reads the directory's INODE (so it conflicts with the directory's removal) and the one
  bucket of the name (so it conflicts with the same name), never the whole directory;
- the directory's times, size and link count are changed by LAST and ADD, which conflict with
  nobody;
- a file's link count is SET, because "was that the last name?" must be decided by one of two
  unlinks;
- rmdir reads the directory's whole ENTRY group; moving a directory to another one reads the INODEs
  of all ancestors of its new place, so that two renames cannot make a loop.

The module is longer than most so that all rules of names stand in one place.

A directory's `size` is its number of entries, its link count 2 + its subdirectories.
`Inode.parent` is the directory of the inode's primary name; further names of a file are recorded as
BACKLINKs.
"""

import errno
from collections.abc import Callable
from typing import NamedTuple

from dfs.client import acl
from dfs.client.attributes import (
    FLAG_XATTRS,
    S_ISGID,
    Attr,
    fs_error,
    get_attr,
    get_inode,
    patch_inode,
)
from dfs.client.quota import Quota
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.volume import effects as fx
from dfs.volume import items
from dfs.volume.items import DIR, LNK, REG, EntryRecord, Inode
from dfs.volume.view import Txn

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
MAX_LINKS = 65000
MAX_DEPTH = 50_000  # of directories that others move into: a commit names no more that it read
COOKIES = 4096  # names whose hashes are remembered


class Caller(NamedTuple):
    """Who asks, for the owner of new inodes."""

    uid: int = 0
    gid: int = 0


class Namespace:
    """The operations, bound to what they need to know of the volume.

    `salt` keys the hashes of names, `bits` is their width (tests use few to make names collide),
    `quota` are the volume's limits; default: none.
    """

    def __init__(
        self,
        salt: bytes,
        *,
        bits: int = items.HASH_BITS,
        quota: Quota | None = None,
    ) -> None:
        """Keep the volume's parameters."""
        self.salt = salt
        self.bits = bits
        self.quota = quota or Quota({})
        self._cookies: dict[bytes, int] = {}  # of names that were asked for lately

    # ------------------------------------------------------------------ looking

    def cookie(self, name: bytes) -> int:
        """Where a name stands in the order of its directory.

        Remembered, because one request asks more than once, and the next is often for the same.
        """
        cookies = self._cookies
        cookie = cookies.get(name)
        if cookie is None:
            if len(cookies) >= COOKIES:
                cookies.clear()
            cookie = cookies[name] = items.name_hash(self.salt, name, self.bits)
        return cookie

    def find(self, txn: Txn, parent: int, name: bytes) -> EntryRecord | None:
        """The entry of a name, without looking at the directory itself."""
        return _named(self._bucket(txn, parent, name)[1], name)

    def _bucket(self, txn: Txn, parent: int, name: bytes) -> tuple[bytes, tuple[EntryRecord, ...]]:
        """(key, entries) of the bucket that a name belongs to."""
        key = items.entry_key(parent, self.cookie(name))
        value = txn.get(key)
        return key, items.decode_entries(value) if value is not None else ()

    def lookup(self, txn: Txn, parent: int, name: bytes) -> Attr | None:
        """The inode of a name, None if there is none; raises ENOENT, ENOTDIR for the directory."""
        if name in (b".", b".."):
            inode = self.directory(txn, parent)
            if name == b"." or parent == ROOT_INO:
                return Attr(parent, inode)
            return get_attr(txn, inode.parent)
        check_name(name)
        record = self.find(txn, parent, name)
        if record is None:
            self._require_directory(txn, parent)
            return None
        return get_attr(txn, record[1])

    def directory(self, txn: Txn, ino: int) -> Inode:
        """The inode of a directory; raises ENOENT when it was removed, ENOTDIR."""
        value = txn.get(items.inode_key(ino))
        if value is None:
            raise fs_error(errno.ENOENT, f"directory {ino:x}")
        inode = Inode.decode(value)
        if inode.kind != DIR:
            raise fs_error(errno.ENOTDIR)
        return inode

    def _require_directory(self, txn: Txn, ino: int) -> None:
        """`directory`, for who only wants to know that it is one."""
        value = txn.get(items.inode_key(ino))
        if value is None:
            raise fs_error(errno.ENOENT, f"directory {ino:x}")
        if items.decode(value, items.INODE_FIELDS)[items.F_KIND] != DIR:
            raise fs_error(errno.ENOTDIR)

    def _existing(
        self, txn: Txn, parent: int, name: bytes
    ) -> tuple[bytes, tuple[EntryRecord, ...], EntryRecord]:
        """(key of its bucket, entries of that, entry) of a name; raises ENOENT."""
        key, bucket = self._bucket(txn, parent, name)
        record = _named(bucket, name)
        if record is None:
            raise fs_error(errno.ENOENT, repr(name))
        return key, bucket, record

    # ------------------------------------------------------------------ creating

    def create(
        self,
        txn: Txn,
        parent: int,
        name: bytes,
        kind: int,
        mode: int,
        ino: int,
        caller: Caller,
        now: int,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Attr:
        """Make a new inode of any kind under a new name; raises EEXIST."""
        check_name(name)
        above = self.directory(txn, parent)
        key, bucket = self._bucket(txn, parent, name)
        if _named(bucket, name) is not None or name in (b".", b".."):
            raise fs_error(errno.EEXIST, repr(name))
        if kind == LNK:
            if not target:
                raise fs_error(errno.ENOENT, "target of a symbolic link")
            if len(target) > items.MAX_TARGET:
                raise fs_error(errno.ENAMETOOLONG, "target of a symbolic link")
            txn.put(items.symlink_key(ino), items.encode_symlink(target))
        self.charge(txn, 0, 1)
        gid = caller.gid
        if above.mode & S_ISGID:
            gid = above.gid
            if kind == DIR:
                mode |= S_ISGID
        flags = 0
        if above.flags & FLAG_XATTRS and kind != LNK:
            mode, flags = inherit_access_list(txn, parent, ino, kind, mode)
        inode = Inode(
            kind, mode & 0o7777, caller.uid, gid, rdev, len(target), 2 if kind == DIR else 1,
            now, now, now, now, parent, flags,
        )  # fmt: skip
        txn.put(items.inode_key(ino), inode.encode())
        txn.put(key, items.encode_entries((*bucket, (name, ino, kind))))
        self._touch_directory(txn, parent, now, entries=1, subdirectories=int(kind == DIR))
        return Attr(ino, inode)

    def link(self, txn: Txn, ino: int, parent: int, name: bytes, now: int) -> Attr:
        """Give a file one more name; raises EEXIST, EPERM for directories, EMLINK."""
        check_name(name)
        self._require_directory(txn, parent)
        if self.find(txn, parent, name) is not None or name in (b".", b".."):
            raise fs_error(errno.EEXIST, repr(name))
        inode = get_inode(txn, ino)
        if inode.kind == DIR:
            raise fs_error(errno.EPERM, "hard link to a directory")
        if inode.nlink == 0:
            raise fs_error(errno.ENOENT, "file has no name any more")
        if inode.nlink >= MAX_LINKS:
            raise fs_error(errno.EMLINK)
        inode.nlink += 1
        inode.ctime = now
        patch_inode(txn, ino, (items.F_NLINK, fx.SET, inode.nlink), (items.F_CTIME, fx.LAST, now))
        self._add_entry(txn, parent, (name, ino, inode.kind))
        self._add_backlink(txn, ino, parent, name)
        self._touch_directory(txn, parent, now, entries=1)
        return Attr(ino, inode)

    # ------------------------------------------------------------------ removing

    def unlink(
        self, txn: Txn, parent: int, name: bytes, now: int, is_open: Callable[[int], bool]
    ) -> Attr:
        """Remove a name of anything but a directory; returns what it stood for, as it was.

        With the last name goes the inode, unless `is_open(ino)`: then it becomes an orphan.
        """
        check_name(name)
        self._require_directory(txn, parent)
        key, bucket, record = self._existing(txn, parent, name)
        if record[2] == DIR:
            raise fs_error(errno.EISDIR, repr(name))
        _take_out(txn, key, bucket, record)
        self._touch_directory(txn, parent, now, entries=-1)
        return Attr(record[1], self._drop_name(txn, parent, record, now, is_open))

    def rmdir(self, txn: Txn, parent: int, name: bytes, now: int) -> Attr:
        """Remove an empty directory; returns what it was.  Raises ENOTEMPTY, ENOTDIR."""
        if name == b".":
            raise fs_error(errno.EINVAL, "rmdir of .")
        if name == b"..":
            raise fs_error(errno.ENOTEMPTY, "rmdir of ..")
        check_name(name)
        self._require_directory(txn, parent)
        key, bucket, record = self._existing(txn, parent, name)
        if record[2] != DIR:
            raise fs_error(errno.ENOTDIR, repr(name))
        self._require_empty(txn, record)
        _take_out(txn, key, bucket, record)
        inode = get_inode(txn, record[1])
        self._remove_inode(txn, record[1], inode)
        self._touch_directory(txn, parent, now, entries=-1, subdirectories=-1)
        return Attr(record[1], inode)

    def purge(self, txn: Txn, ino: int) -> bool:
        """Remove an orphan for good; returns whether there was one."""
        if txn.get(items.orphan_key(ino)) is None:
            return False
        txn.delete(items.orphan_key(ino))
        value = txn.get(items.inode_key(ino))
        if value is not None:
            inode = Inode.decode(value)
            if inode.nlink == 0:
                self._remove_inode(txn, ino, inode)
        return True

    # ------------------------------------------------------------------ renaming

    def rename(
        self,
        txn: Txn,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        now: int,
        is_open: Callable[[int], bool],
        flags: int = 0,
    ) -> tuple[int, int]:
        """rename(2), renameat2(2).

        Returns (inode moved, inode replaced or exchanged or 0).
        """
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == (
            RENAME_NOREPLACE | RENAME_EXCHANGE
        ):
            raise fs_error(errno.EINVAL, "flags of rename")
        if {name, new_name} & {b".", b".."}:
            raise fs_error(errno.EBUSY)
        check_name(name)
        check_name(new_name)
        self._require_directory(txn, parent)
        if new_parent != parent:
            self._require_directory(txn, new_parent)
        key, bucket, source = self._existing(txn, parent, name)
        new_key, new_bucket = self._bucket(txn, new_parent, new_name)
        victim = _named(new_bucket, new_name)
        if victim is not None and flags & RENAME_NOREPLACE:
            raise fs_error(errno.EEXIST, repr(new_name))
        if victim is None and flags & RENAME_EXCHANGE:
            raise fs_error(errno.ENOENT, repr(new_name))
        exchange = bool(flags & RENAME_EXCHANGE)
        if new_parent != parent:  # within one directory nothing changes its place in the tree
            if source[2] == DIR and source[1] in self._ancestors(txn, new_parent):
                raise fs_error(errno.EINVAL, "a directory cannot move into itself")
            if (
                victim is not None
                and victim[2] == DIR
                and victim[1] in self._ancestors(txn, parent)
            ):
                raise fs_error(errno.EINVAL if exchange else errno.ENOTEMPTY, repr(new_name))
        if victim is not None and victim[1] == source[1]:
            return source[1], 0  # two names of one file: POSIX says do nothing
        if victim is None and key != new_key:
            _take_out(txn, key, bucket, source)
            txn.put(new_key, items.encode_entries((*new_bucket, (new_name, *source[1:]))))
            self._follow(txn, source, parent, new_parent, new_name, now)
        else:  # some of what was read changes on the way
            if victim is not None and not exchange:
                self._replace(txn, source, new_parent, victim, now, is_open)
            self._remove_entry(txn, parent, source)
            if exchange and victim is not None:
                self._remove_entry(txn, new_parent, victim)
                self._move(txn, victim, new_parent, parent, name, now)
            self._move(txn, source, parent, new_parent, new_name, now)
        gone = victim is not None and not exchange
        came_dir = source[2] == DIR
        went_dir = victim is not None and victim[2] == DIR
        if new_parent == parent:
            self._touch_directory(
                txn, parent, now, entries=-int(gone), subdirectories=-int(gone and went_dir)
            )
        else:
            shift = int(came_dir) - int(went_dir)
            self._touch_directory(
                txn,
                parent,
                now,
                entries=0 if exchange else -1,
                subdirectories=-shift if exchange else -int(came_dir),
            )
            self._touch_directory(
                txn, new_parent, now, entries=int(victim is None), subdirectories=shift
            )
        return source[1], victim[1] if victim is not None else 0

    def _replace(
        self,
        txn: Txn,
        source: EntryRecord,
        parent: int,
        victim: EntryRecord,
        now: int,
        is_open: Callable[[int], bool],
    ) -> None:
        if source[2] == DIR and victim[2] != DIR:
            raise fs_error(errno.ENOTDIR, repr(victim[0]))
        if source[2] != DIR and victim[2] == DIR:
            raise fs_error(errno.EISDIR, repr(victim[0]))
        self._remove_entry(txn, parent, victim)
        if victim[2] == DIR:
            self._require_empty(txn, victim)
            self._remove_inode(txn, victim[1], get_inode(txn, victim[1]))
        else:
            self._drop_name(txn, parent, victim, now, is_open)

    def _move(
        self, txn: Txn, record: EntryRecord, parent: int, new_parent: int, new_name: bytes, now: int
    ) -> None:
        """Add the new name of an entry whose old one was removed, and follow it in the inode."""
        self._add_entry(txn, new_parent, (new_name, *record[1:]))
        self._follow(txn, record, parent, new_parent, new_name, now)

    def _follow(
        self, txn: Txn, record: EntryRecord, parent: int, new_parent: int, new_name: bytes, now: int
    ) -> None:
        """Have the inode follow its entry to another name."""
        name, ino, kind = record
        inode = get_inode(txn, ino)
        changes: list[fx.Change] = [(items.F_CTIME, fx.LAST, now)]
        if inode.nlink > 1 and kind != DIR and self._remove_backlink(txn, ino, parent, name):
            self._add_backlink(txn, ino, new_parent, new_name)
        elif inode.parent != new_parent:
            changes.append((items.F_PARENT, fx.SET, new_parent))
        patch_inode(txn, ino, *changes)

    def _ancestors(self, txn: Txn, ino: int) -> set[int]:
        """The directory and all above it."""
        found = {ino}
        while ino != ROOT_INO:
            ino = self.directory(txn, ino).parent
            if ino in found:
                raise fs_error(errno.ELOOP, f"directory {ino:x} is its own ancestor")
            found.add(ino)
            if len(found) > MAX_DEPTH:
                raise fs_error(errno.ELOOP, f"more than {MAX_DEPTH} directories in one another")
        return found

    # ------------------------------------------------------------------ parts

    def charge(self, txn: Txn, size: int, inodes: int, *, admitted: bool = False) -> None:
        """Add to the volume's usage; raises EDQUOT over its quota, unless it was `admitted`."""
        if self.quota.limited and not admitted and (size > 0 or inodes > 0):
            self.quota.admit(txn.get, size, inodes)
        changes: list[fx.Change] = []
        if size:
            changes.append((items.F_USAGE_BYTES, fx.ADD, size))
        if inodes:
            changes.append((items.F_USAGE_INODES, fx.ADD, inodes))
        if changes:
            txn.patch(items.USAGE_KEY, tuple(changes))

    def _touch_directory(
        self, txn: Txn, ino: int, now: int, *, entries: int = 0, subdirectories: int = 0
    ) -> None:
        changes: list[fx.Change] = [
            (items.F_MTIME, fx.LAST, now),
            (items.F_CTIME, fx.LAST, now),
        ]
        if entries:
            changes.append((items.F_SIZE, fx.ADD, entries))
        if subdirectories:
            changes.append((items.F_NLINK, fx.ADD, subdirectories))
        patch_inode(txn, ino, *changes)

    def _add_entry(self, txn: Txn, parent: int, record: EntryRecord) -> None:
        key, bucket = self._bucket(txn, parent, record[0])
        txn.put(key, items.encode_entries((*bucket, record)))

    def _remove_entry(self, txn: Txn, parent: int, record: EntryRecord) -> None:
        key, bucket = self._bucket(txn, parent, record[0])
        _take_out(txn, key, bucket, record)

    def _require_empty(self, txn: Txn, record: EntryRecord) -> None:
        if txn.scan(items.group(record[1], items.ENTRY), limit=1):
            raise fs_error(errno.ENOTEMPTY, repr(record[0]))

    def _drop_name(
        self, txn: Txn, parent: int, record: EntryRecord, now: int, is_open: Callable[[int], bool]
    ) -> Inode:
        """Account in a file's inode for a name that was removed; returns the inode as it was."""
        name, ino, _ = record
        inode = get_inode(txn, ino)
        if inode.nlink <= 1:
            if is_open(ino):
                patch_inode(txn, ino, (items.F_NLINK, fx.SET, 0), (items.F_CTIME, fx.LAST, now))
                txn.put(items.orphan_key(ino), items.ORPHAN_VALUE)
            else:
                self._remove_inode(txn, ino, inode)
            return inode
        changes: list[fx.Change] = [
            (items.F_NLINK, fx.SET, inode.nlink - 1),
            (items.F_CTIME, fx.LAST, now),
        ]
        if not self._remove_backlink(txn, ino, parent, name):
            promoted = self._promote_backlink(txn, ino)
            changes.append((items.F_PARENT, fx.SET, promoted))
        patch_inode(txn, ino, *changes)
        return inode

    def _remove_inode(self, txn: Txn, ino: int, inode: Inode) -> None:
        txn.delete(items.inode_key(ino))
        if inode.kind == LNK:
            txn.delete(items.symlink_key(ino))
        groups = []
        if inode.kind == REG and inode.dataver:
            groups.append(items.EXTENT)
        if inode.flags & FLAG_XATTRS:
            groups.append(items.XATTR)
        for kind in groups:
            start = items.group(ino, kind)
            txn.delete_range(start, items.group_end(start))
        self.charge(txn, -inode.size if inode.kind == REG else 0, -1)

    def _add_backlink(self, txn: Txn, ino: int, parent: int, name: bytes) -> None:
        key = items.backlink_key(ino, parent, self.cookie(name))
        value = txn.get(key)
        names = items.decode_backlinks(value) if value is not None else ()
        txn.put(key, items.encode_backlinks((*names, name)))

    def _remove_backlink(self, txn: Txn, ino: int, parent: int, name: bytes) -> bool:
        """Forget an additional name; False when the name is the primary one."""
        key = items.backlink_key(ino, parent, self.cookie(name))
        value = txn.get(key)
        names = items.decode_backlinks(value) if value is not None else ()
        if name not in names:
            return False
        left = tuple(n for n in names if n != name)
        if left:
            txn.put(key, items.encode_backlinks(left))
        else:
            txn.delete(key)
        return True

    def _promote_backlink(self, txn: Txn, ino: int) -> int:
        """Make some additional name the primary one; returns its directory."""
        found = txn.scan(items.group(ino, items.BACKLINK), limit=1)
        if not found:
            raise FsError(f"inode {ino:x} has more links than names; run `dfs fsck`", errno.EIO)
        key, value = found[0]
        parent = items.suffix_u64(key)
        self._remove_backlink(txn, ino, parent, items.decode_backlinks(value)[0])
        return parent


def _named(bucket: tuple[EntryRecord, ...], name: bytes) -> EntryRecord | None:
    """The entry of a name in its bucket."""
    for record in bucket:
        if record[0] == name:
            return record
    return None


def _take_out(txn: Txn, key: bytes, bucket: tuple[EntryRecord, ...], record: EntryRecord) -> None:
    """Remove an entry from its bucket."""
    if len(bucket) == 1:
        txn.delete(key)
    else:
        txn.put(key, items.encode_entries(tuple(r for r in bucket if r[0] != record[0])))


def inherit_access_list(txn: Txn, parent: int, ino: int, kind: int, mode: int) -> tuple[int, int]:
    """Give a new inode what its directory's default list says; returns (its mode, its flags)."""
    default = txn.get(items.xattr_key(parent, acl.DEFAULT))
    if default is None:
        return mode, 0
    flags = 0
    entries = acl.limited(acl.decode(items.decode_xattr(default)), mode, keep=True)
    if not acl.is_minimal(entries):
        txn.put(items.xattr_key(ino, acl.ACCESS), items.encode_xattr(acl.encode(entries)))
        flags = FLAG_XATTRS
    if kind == DIR:
        txn.put(items.xattr_key(ino, acl.DEFAULT), default)
        flags = FLAG_XATTRS
    return mode & ~0o777 | acl.bits(entries), flags


def check_name(name: bytes) -> None:
    """Raise ENAMETOOLONG, ENOENT or EINVAL for what cannot be the name of an entry."""
    if len(name) > items.MAX_NAME:
        raise fs_error(errno.ENAMETOOLONG, repr(name[:32]) + "...")
    if not name:
        raise fs_error(errno.ENOENT, "empty name")
    if b"/" in name or b"\0" in name:
        raise fs_error(errno.EINVAL, repr(name))
