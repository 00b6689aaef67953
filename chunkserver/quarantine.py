"""Bad copies, kept for a look: `quarantine/<chunk id>.bad`, one file per chunk.

A file is `pack((1, chunk id, segment, offset, reason, bytes))`.  The bytes are kept as long as the
directory stays under a limit, so that a dying disk does not fill what is left of it.  A file goes
when the chunk has a good copy here again.
"""

import contextlib

from dfs.codec import pack
from dfs.env import Disk
from dfs.errors import DiskFull

VERSION = 1
DIRECTORY = "quarantine"
LIMIT = 256 << 20


class Quarantine:
    """The listing of bad copies that wait for a good one."""

    def __init__(self, disk: Disk) -> None:
        """Read the listing; blocking."""
        self._disk = disk
        self._kept = 0
        self.ids: set[bytes] = set()
        for name in disk.listdir(DIRECTORY):
            stem, _, kind = name.partition(".")
            if kind == "bad" and len(stem) == 64:
                self.ids.add(bytes.fromhex(stem))

    def add(self, chunk_id: bytes, segment: int, offset: int, reason: str, data: bytes) -> None:
        """List a bad copy; blocking."""
        if self._kept + len(data) > LIMIT:
            data = b""
        self._kept += len(data)
        self.ids.add(chunk_id)
        content = pack((VERSION, chunk_id, segment, offset, reason, data))
        with contextlib.suppress(DiskFull):  # then it is listed until the next start only
            self._disk.write_atomic(f"{DIRECTORY}/{chunk_id.hex()}.bad", content)

    def remove(self, chunk_id: bytes) -> None:
        """A good copy replaced the bad one; blocking."""
        self._disk.unlink(f"{DIRECTORY}/{chunk_id.hex()}.bad")
        self.ids.discard(chunk_id)
