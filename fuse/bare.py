"""Entries of a directory without attributes, which pyfuse3 has no function for.

The kernel always asks for entries with attributes (pyfuse3 serves READDIRPLUS only), and takes one
whose node number is 0 as a name with an inode's number and type and nothing else: it makes no inode
and counts no lookup (`fuse_direntplus_link` in fs/fuse/readdir.c).  pyfuse3 sets the node's number
and the inode's number together, so the former is cleared in the object's memory.  Where that is not
laid out as expected, `SUPPORTED` is False.
"""

import ctypes
import struct

import pyfuse3

_PATTERN = (0x5B1D_57A1_90C3_E2F7, 0x1F4E_8B62_D935_7AC1)


def _offset() -> int:
    """Where an `EntryAttributes` has its node number, which a generation follows; -1 if unknown."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino, entry.generation = _PATTERN
    size = pyfuse3.EntryAttributes.__basicsize__
    memory = ctypes.string_at(id(entry), size)
    offset = memory.find(struct.pack("=QQ", *_PATTERN))
    if offset < 0 or memory.count(struct.pack("=Q", _PATTERN[0])) != 2:
        return -1  # the node's number and the inode's
    ctypes.c_uint64.from_address(id(entry) + offset).value = 0
    expected = memory[:offset] + bytes(8) + memory[offset + 8 :]
    if entry.st_ino != 0 or ctypes.string_at(id(entry), size)[16:] != expected[16:]:
        return -1
    return offset


OFFSET = _offset()
SUPPORTED = OFFSET >= 0


class BareEntry:
    """One entry, filled again and again: a reply copies it."""

    __slots__ = ("_entry", "_node")

    def __init__(self) -> None:
        """Raises `RuntimeError` where it is not `SUPPORTED`."""
        if not SUPPORTED:
            raise RuntimeError("this pyfuse3 keeps node numbers where nobody expects them")
        self._entry = pyfuse3.EntryAttributes()
        self._node = ctypes.c_uint64.from_address(id(self._entry) + OFFSET)

    def fill(self, ino: int, kind: int) -> pyfuse3.EntryAttributes:
        """An entry of the inode; `kind` is its `S_IFMT >> 12`."""
        entry = self._entry
        entry.st_ino = ino
        entry.st_mode = kind << 12
        self._node.value = 0
        return entry
