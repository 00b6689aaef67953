"""Which inode an open handle belongs to: what FUSE needs beyond what `FileSystem` keeps.

The kernel names a handle in `read` and `write`, an inode in `getattr` and `forget`; `fsync` of a
directory and `release` name a handle only.
"""


class OpenInodes:
    """Inode of each open handle."""

    __slots__ = ("_inodes",)

    def __init__(self) -> None:
        """Nothing open."""
        self._inodes: dict[int, int] = {}

    def __len__(self) -> int:
        """Number of open handles."""
        return len(self._inodes)

    def opened(self, handle: int, ino: int) -> int:
        """Note a new handle; returns it."""
        self._inodes[handle] = ino
        return handle

    def inode(self, handle: int) -> int:
        """The inode of an open handle, 0 if unknown."""
        return self._inodes.get(handle, 0)

    def released(self, handle: int) -> None:
        """The kernel closed the handle."""
        self._inodes.pop(handle, None)
