"""A progress bar for transfers that take over a second, on a terminal only."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 1.0  # seconds before a bar appears


class Meter:
    """Counts files and bytes; shows them on stderr if it is a terminal.  A context manager."""

    def __init__(self, verb: str) -> None:
        """`verb` stands in front of the bar."""
        self._verb = verb
        self._since = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self.files = 0
        self.bytes = 0

    def __enter__(self) -> "Meter":
        """Start the clock; must be in a trio run."""
        self._since = trio.current_time()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def expect(self, size: int) -> None:
        """So many bytes more are to come."""
        self._total += size

    def done(self, size: int) -> None:
        """So many bytes more are done."""
        self.bytes += size
        if self._bar is None:
            if trio.current_time() - self._since < PATIENCE or not sys.stderr.isatty():
                return
            self._show()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.bytes, total=max(self._total, self.bytes))

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._verb, total=None)
        self._bar.start()
