"""A turn: the messages that arrived together, and what is to be done once all are handled.

What a handler would hand to a task, to be done when everybody had his say, costs a pass of the
scheduler before it begins.  Done at the end of the turn it comes at once, still after everything
that the messages caused to be sent, and once for all of them.
"""

from collections.abc import Callable


class Turn:
    """Collects functions while it is open, and calls them when it ends."""

    __slots__ = ("_fns", "_open")

    def __init__(self) -> None:
        """No turn is under way."""
        self._open = False
        self._fns: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Messages are about to be handled, without an await until `end`."""
        self._open = True

    def later(self, fn: Callable[[], None]) -> bool:
        """Call `fn`, which must not raise, once at the end; False: no turn is under way."""
        if self._open and fn not in self._fns:
            self._fns.append(fn)
        return self._open

    def end(self) -> None:
        """All are handled, and what they caused is sent."""
        self._open = False
        while self._fns:
            self._fns.pop(0)()
