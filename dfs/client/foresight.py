"""Foresight: which write will be followed by a sync, as those before it were.

A program that wants its data on stable storage does the same over and over: some writes to a log,
then fsync.  Once a file was synced twice after as many writes, the commit that the next sync will
wait for can begin as soon as the last of these writes is answered, while the program is on its way
to call fsync.  Where it does not call, a commit came a little earlier than it would have by itself.

Programs also make many files in the same way, each synced after its first writes, and some once
more after the next (a database's rollback journal); what the last few files had in common is
expected of a new one.
"""

from collections import deque

from dfs.client.openfile import File

# Files in a row that were synced after as many writes, before it is expected of a new one.
FIRST = 3
EARLY = 2  # intervals between syncs of a new file that are compared with those of the last ones
MOST = 16  # files that are due at a time; if nobody begins their commits, the older are forgotten


class Foresight:
    """Counts writes and syncs of files; `due` holds those whose sync is expected now."""

    __slots__ = ("_habits", "due")

    def __init__(self) -> None:
        """Nothing is expected."""
        self.due: deque[File] = deque(maxlen=MOST)
        # Of the first intervals between syncs of a new file: the writes of the last file's, and in
        # how many files in a row there were as many.
        self._habits = [[0, 0] for _ in range(EARLY)]

    def _habit(self, interval: int) -> int:
        if interval >= EARLY:
            return 0
        writes, alike = self._habits[interval]
        return writes if alike >= FIRST else 0

    def made(self, file: File) -> None:
        """A file was opened that nothing is known of yet."""
        file.rhythm = self._habit(0)

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
        if file.syncs < EARLY:
            habit = self._habits[file.syncs]
            habit[:] = (writes, habit[1] + 1 if writes == habit[0] else 1)
        expected = file.before or file.rhythm
        file.syncs += 1
        file.rhythm = self._habit(file.syncs) or (writes if writes == expected else 0)
        file.before = writes

    def closed(self, file: File) -> None:
        """The last handle of a file was closed."""
        if file.writes and file.syncs < EARLY:
            self._habits[file.syncs][1] = 0
