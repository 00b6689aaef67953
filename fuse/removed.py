"""What was removed and may still be asked about: attributes, until the kernel forgets the inode.

A regular file that is open is not gone (it is an orphan until its last handle is closed).  But the
kernel opens FIFOs, sockets and devices by itself, and nobody tells us of working directories and of
O_PATH: they go on to be asked for their attributes when the inode has no name and no item any more.
"""

import errno

from dfs.client.filesystem import Attr
from dfs.errors import FsError


class Removed:
    """Attributes of inodes that are gone, by inode."""

    __slots__ = ("_attributes",)

    def __init__(self) -> None:
        """Nothing removed."""
        self._attributes: dict[int, Attr] = {}

    def __len__(self) -> int:
        """Number of inodes remembered."""
        return len(self._attributes)

    def __contains__(self, ino: object) -> bool:
        """Whether the inode was removed here and not forgotten."""
        return ino in self._attributes

    def add(self, attr: Attr, now: int) -> None:
        """A name of this inode was removed at `now`; it counts if that was the last."""
        if attr.is_dir or attr.nlink <= 1:
            attr.nlink = 0
            attr.ctime = max(now, attr.ctime)
            self._attributes[attr.ino] = attr

    def forget(self, ino: int) -> None:
        """The kernel holds the inode no more."""
        self._attributes.pop(ino, None)

    def instead_of(self, error: FsError, ino: int) -> Attr:
        """The attributes, if the error says that the inode is gone; else raises the error."""
        attr = self._attributes.get(ino)
        if attr is None or error.errno != errno.ESTALE:
            raise error
        return attr

    @staticmethod
    def change(attr: Attr, changes: dict[str, int | None], now: int) -> Attr:
        """Change the attributes, as `FileSystem.setattr` does."""
        attr.ctime = now
        for field, value in changes.items():
            if value is not None:
                setattr(attr, field, value)
        return attr
