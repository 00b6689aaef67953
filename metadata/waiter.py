"""Where a request's outcome arrives, for a microsecond less than an event costs."""

from collections.abc import Callable
from typing import Any

import trio

from dfs.errors import DfsError


class Waiter:
    """Where a request's outcome arrives; cheaper than an Event and safe to cancel."""

    __slots__ = ("_task", "outcome")

    def __init__(self) -> None:
        """No outcome yet."""
        self._task: trio.lowlevel.Task | None = None
        self.outcome: Any = None

    def set(self, outcome: Any) -> None:
        """Deliver; the first outcome counts."""
        if self.outcome is None:
            self.outcome = outcome
            if self._task is not None:
                trio.lowlevel.reschedule(self._task)
                self._task = None

    async def wait(self) -> Any:
        """The outcome; raises it if it is an error."""
        if self.outcome is None:
            self._task = trio.lowlevel.current_task()

            def abort(_: Any) -> trio.lowlevel.Abort:
                self._task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if isinstance(self.outcome, DfsError):
            raise self.outcome
        return self.outcome


class Told:
    """Where a request's outcome arrives that a function is told, at once, instead of a task."""

    __slots__ = ("_fn",)

    def __init__(self, fn: Callable[[Any], None]) -> None:
        """`fn` is called with the first outcome, from whatever decided it; it must not raise."""
        self._fn: Callable[[Any], None] | None = fn

    def set(self, outcome: Any) -> None:
        """Deliver; the first outcome counts."""
        fn, self._fn = self._fn, None
        if fn is not None:
            fn(outcome)
