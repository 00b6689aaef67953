"""Waiting, for a microsecond less than an event costs: for an outcome, or for something to do."""

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


class Parking:
    """Where one task parks while it has nothing to do; the caller looks for work again after."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        """Nobody is parked."""
        self._task: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        """Let the task go on, if it is parked."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def park(self) -> None:
        """Wait until woken; what came before does not count."""
        self._task = trio.lowlevel.current_task()

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
