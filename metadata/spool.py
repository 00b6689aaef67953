"""Journal entries for another process, in memory of the kernel: neither holds a copy of them all.

Sent as arguments they would be there four times: packed here, in the packer's own buffer, packed
there and unpacked.  Whoever reads them may do so again and again, and has one at a time.
"""

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from dfs.errors import Corrupt

_LENGTH = struct.Struct("<I")


@contextlib.contextmanager
def spool(entries: Iterable[bytes]) -> Iterator[str]:
    """Write entries down; the path by which processes of this user read them within the block."""
    fd = os.memfd_create("dfs-entries", os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            for entry in entries:
                file.write(_LENGTH.pack(len(entry)))
                file.write(entry)
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


class Spooled:
    """The entries behind such a path: each iteration reads them from the first on."""

    def __init__(self, path: str) -> None:
        """Open nothing yet."""
        self._path = Path(path)

    def __iter__(self) -> Iterator[bytes]:
        """Entry by entry; raises `Corrupt` when the last one is cut off."""
        with self._path.open("rb") as file:
            while head := file.read(_LENGTH.size):
                size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
                entry = file.read(max(size, 0))
                if len(entry) != size:
                    raise Corrupt(f"{self._path}: the last of the journal's entries is cut off")
                yield entry
