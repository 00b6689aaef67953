"""Foresight: which write will be followed by a sync, as those before it were.

A program that wants its data on stable storage does the same over and over: some writes to a log,
then fsync.  Once a file was synced twice after as many writes, the commit that the next sync will
wait for can begin as soon as the last of these writes is answered, while the program is on its way
to call fsync.  Where it does not call, a commit came a little earlier than it would have by itself.

Programs also make many files in the same way, each synced after its first writes; what the last
few files had in common is expected of a new one.
"""

from collections import deque

from dfs.client.openfile import File

FIRST = (
    3  # files in a row that were synced after as many writes, before it is expected of a new one
)
MOST = 16  # files that are due at a time; if nobody begins their commits, the older are forgotten


class Foresight:
    """Counts writes and syncs of files; `due` holds those whose sync is expected now."""

    __slots__ = ("_alike", "_first", "due")

    def __init__(self) -> None:
        """Nothing is expected."""
        self.due: deque[File] = deque(maxlen=MOST)
        self._first = 0  # writes before the first sync of the last new file
        self._alike = 0  # files in a row of which that is true

    def made(self, file: File) -> None:
        """A file was opened that nothing is known of yet."""
        file.rhythm = self._first if self._alike >= FIRST else 0

    def wrote(self, file: File) -> None:
        """Something was written to a file."""
        file.writes += 1
        if file.writes == file.rhythm:
            self.due.append(file)

    def synced(self, file: File) -> None:
        """Somebody waits for what was written to a file."""
        writes, file.writes = file.writes, 0
        if not writes:
            return
        if not file.before:
            self._alike = self._alike + 1 if writes == self._first else 1
            self._first = writes
        expected = file.before or file.rhythm
        file.rhythm = writes if writes == expected else 0
        file.before = writes

    def closed(self, file: File) -> None:
        """The last handle of a file was closed."""
        if file.writes and not file.before:
            self._alike = 0
