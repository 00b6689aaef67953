"""POSIX access control lists (IEEE 1003.1e draft 17): their part in modes and in new inodes.

A list is kept as the kernel writes it, as an extended attribute; the kernel also does the checking,
on mounts that ask for it.  What is left for a file system is that bits and list agree: a list sets
the bits, chmod changes the list, and a directory's default list becomes that of what is made in it.
Pure functions on the attribute's value (linux/posix_acl_xattr.h).
"""

import errno
import struct

from dfs.errors import FsError

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
VERSION = struct.pack("<I", 2)
_entry = struct.Struct("<HHI")

Entry = tuple[int, int, int]  # (tag, permissions 0..7, uid or gid)


def decode(value: bytes) -> list[Entry]:
    """The entries; raises EINVAL for what the kernel would not have written."""
    body = value[len(VERSION) :]
    if value[: len(VERSION)] != VERSION or len(body) % _entry.size:
        raise FsError("not an access control list", errno.EINVAL)
    entries = list(_entry.iter_unpack(body))
    tags = [tag for tag, _, _ in entries]
    if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
        raise FsError("not an access control list", errno.EINVAL)
    if MASK not in tags and (USER in tags or GROUP in tags):
        raise FsError("access control list without a mask", errno.EINVAL)
    return entries


def encode(entries: list[Entry]) -> bytes:
    """The attribute's value."""
    return VERSION + b"".join(_entry.pack(*e) for e in entries)


def is_minimal(entries: list[Entry]) -> bool:
    """Whether permission bits say as much, so that no list need be kept."""
    return len(entries) == 3


def bits(entries: list[Entry]) -> int:
    """The nine permission bits of a list: the group's are the mask, if there is one."""
    found = {tag: permissions for tag, permissions, _ in entries if tag not in (USER, GROUP)}
    return found[USER_OBJ] << 6 | found.get(MASK, found[GROUP_OBJ]) << 3 | found[OTHER]


def limited(entries: list[Entry], mode: int, *, keep: bool) -> list[Entry]:
    """The list with the entries that permission bits stand for replaced by these.

    `keep`: what the list does not grant stays so (creation), else the bits decide (chmod).
    """
    group = MASK if any(tag == MASK for tag, _, _ in entries) else GROUP_OBJ
    wanted = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    changed: list[Entry] = []
    for tag, permissions, who in entries:
        if tag in wanted:
            permissions = wanted[tag] & permissions if keep else wanted[tag]
        changed.append((tag, permissions, who))
    return changed
