"""Open files and directories of one client: what a handle number stands for."""

import errno
from typing import TYPE_CHECKING

from dfs.client.attributes import fs_error

if TYPE_CHECKING:
    from dfs.client.openfile import File

READAHEAD_MIN, READAHEAD_MAX = 1 << 20, 16 << 20
SLACK = 2 << 20  # bytes by which the kernel's own read-ahead may deliver reads out of order


class FileHandle:
    """An open file: its shared `File`, how it was opened, and where its reader seems to go."""

    __slots__ = ("ahead", "file", "next", "readable", "run", "window", "writable")

    def __init__(self, file: "File", *, readable: bool, writable: bool) -> None:
        """A handle that has read nothing yet."""
        self.file = file
        self.readable = readable
        self.writable = writable
        self.next = 0  # where a sequential reader reads next
        self.run = 0  # sequential reads in a row
        self.ahead = 0  # what lies before this was asked for already
        self.window = READAHEAD_MIN

    def advance(self, offset: int, length: int) -> tuple[int, int] | None:
        """Note a read; returns the range to read ahead, None when the reader jumps about."""
        end = offset + length
        if abs(offset - self.next) > SLACK:
            self.run = 0
            self.next = self.ahead = end
            self.window = READAHEAD_MIN
            return None
        self.next = max(self.next, end)
        self.run += 1
        start = max(self.ahead, end)
        # Refill when half of the window is used up, so that several parts are asked for at once.
        if self.ahead - end > self.window // 2:
            return None
        stop = end + self.window
        self.window = min(2 * self.window, READAHEAD_MAX)
        self.ahead = stop
        return (start, stop) if stop > start else None


class DirHandle:
    """An open directory: where its reader is.

    A cookie names a bucket of names with equal hashes; `names` are those of it that were returned,
    so that a reader stopped inside a bucket continues there.
    """

    __slots__ = ("cookie", "ino", "names")

    def __init__(self, ino: int) -> None:
        """At the beginning."""
        self.ino = ino
        self.cookie = 0
        self.names: set[bytes] = set()


class HandleTable:
    """Numbers for open handles, as the kernel wants them."""

    def __init__(self) -> None:
        """Empty."""
        self._handles: dict[int, FileHandle | DirHandle] = {}
        self._next = 1

    def __len__(self) -> int:
        """Number of open handles."""
        return len(self._handles)

    def add(self, handle: FileHandle | DirHandle) -> int:
        """Give a handle a number."""
        number = self._next
        self._next += 1
        self._handles[number] = handle
        return number

    def file(self, number: int) -> FileHandle:
        """The open file; raises EBADF."""
        handle = self._handles.get(number)
        if type(handle) is not FileHandle:
            raise fs_error(errno.EBADF, f"handle {number}")
        return handle

    def directory(self, number: int) -> DirHandle:
        """The open directory; raises EBADF."""
        handle = self._handles.get(number)
        if type(handle) is not DirHandle:
            raise fs_error(errno.EBADF, f"handle {number}")
        return handle

    def pop(self, number: int) -> FileHandle | DirHandle | None:
        """Close a number; None if it was not open."""
        return self._handles.pop(number, None)

    def files(self) -> list[FileHandle]:
        """All open files."""
        return [h for h in self._handles.values() if type(h) is FileHandle]
