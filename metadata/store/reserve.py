"""Disk space set aside, so that deletes and merges still work when the disk is full.

A file of zeros, `RESERVE`, beside the tables.  Whoever meets a full disk on the way to freeing
space (a batch of deletes, a flush, a merge) releases it and tries again.  Until it is restored the
store refuses puts, so that the space goes to what frees space.  It is restored when there is room
for it twice over.

A merge needs room for one table of each input and of its output before the first is removed:
`(fanout + 1) * table_bytes` is enough for any size of the store.
"""

from dfs.env import Disk
from dfs.errors import DiskFull

NAME = "RESERVE"
_ZEROS = bytes(1 << 20)


class Reserve:
    """The reserve of one store."""

    __slots__ = ("_bytes", "_disk", "_held", "_path", "_prefix")

    def __init__(self, disk: Disk, prefix: str, size: int) -> None:
        """Of `size` bytes in directory `prefix`; 0: there is none, and none is missing."""
        self._disk = disk
        self._prefix = prefix
        self._path = f"{prefix}/{NAME}"
        self._bytes = size
        self._held = False

    @property
    def missing(self) -> bool:
        """Whether the disk was too full to hold it, or still is."""
        return self._bytes > 0 and not self._held

    @property
    def held(self) -> bool:
        """Whether there is something to release."""
        return self._held

    async def restore(self) -> None:
        """Set the space aside if it is not and there is room."""
        if self.missing and self._disk.usage()[1] >= 2 * self._bytes - self._present():
            self._held = await self._disk.run(self._fill)

    def _present(self) -> int:
        return self._disk.open(self._path).size() if self._disk.exists(self._path) else 0

    def _fill(self) -> bool:
        file = self._disk.open(self._path, create=True)
        try:
            while (left := self._bytes - file.size()) > 0:
                file.append([_ZEROS[:left]])
            file.fdatasync()
        except DiskFull:
            self._disk.unlink(self._path)
            return False
        finally:
            file.close()
        self._disk.sync_dir(self._prefix)
        return True

    async def release(self) -> bool:
        """Give the space back; False if there was none."""
        if not self._held:
            return False
        self._held = False
        await self._disk.run(self._remove)
        return True

    def _remove(self) -> None:
        self._disk.unlink(self._path)
        self._disk.sync_dir(self._prefix)
