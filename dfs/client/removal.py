"""Removals of last names that wait for their commit, and who must know of their outcome.

Whether a file is open is asked when the removal is worked out: an open one becomes an orphan, any
other is gone with its name.  Where that is then sent to the home, somebody may open the file before
the answer comes; he has to wait for it, or he holds a file whose data is lost to him.
"""

from collections.abc import Callable

import trio


class Removal:
    """One removal under way; called as the `is_open` of the operation."""

    __slots__ = ("_done", "_inos", "_is_open", "_leaving")

    def __init__(self, is_open: Callable[[int], bool], leaving: dict[int, "Removal"]) -> None:
        """`leaving`: the inodes of all removals under way."""
        self._is_open = is_open
        self._leaving = leaving
        self._inos: list[int] = []
        self._done: trio.Event | None = None

    def __call__(self, ino: int) -> bool:
        """Whether a file is open, which becomes an orphan; what is not will be gone."""
        if self._is_open(ino):
            return True
        self._leaving[ino] = self
        self._inos.append(ino)
        return False

    def end(self) -> None:
        """It is committed, or has failed."""
        for ino in self._inos:
            if self._leaving.get(ino) is self:
                del self._leaving[ino]
        if self._done is not None:
            self._done.set()

    async def wait(self) -> None:
        """Until the end."""
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()
