"""What every background loop of a chunkserver is: a `Worker` that can be listed, woken and stepped.

A worker has a name, a state, a line of progress and its last error, and does everything in
`run_once`, so that tests, the simulator and an operator run one round when they want it.  A round
that fails is told in the status and tried again later; only an error that is none of ours ends the
node.
"""

import logging
from abc import ABC, abstractmethod

import trio

from dfs.env import Env
from dfs.errors import DfsError

log = logging.getLogger(__name__)


class Worker(ABC):
    """A background loop: `run_once` every `interval` seconds, give or take a quarter."""

    name = "worker"

    def __init__(self, env: Env, interval: float, *, first: float | None = None) -> None:
        """Wait `first` seconds (default: the interval) before the first round."""
        self._env = env
        self._interval = interval
        self._first = interval if first is None else first
        self._woken = trio.Event()
        self.state = "waiting"
        self.progress = ""
        self.last_error = ""
        self.rounds = 0

    @abstractmethod
    async def run_once(self) -> int:
        """Do one round; returns how much was done (chunks)."""

    def wake(self) -> None:
        """Let the next round begin now."""
        self._woken.set()

    async def run(self) -> None:
        """Round after round, until cancelled."""
        pause = self._first
        while True:
            with trio.move_on_after(pause * (0.75 + self._env.random.random() / 2)):
                await self._woken.wait()
            self._woken = trio.Event()
            self.state = "running"
            try:
                await self.run_once()
            except DfsError as e:
                self.last_error = str(e)
                self.state = "failed"
                log.warning("%s: %s", self.name, e)
            else:
                self.state = "waiting"
            self.rounds += 1
            pause = self._interval

    def status(self) -> tuple[str, str, str, str]:
        """(name, state, progress, last error), as `node.status` has it."""
        return self.name, self.state, self.progress, self.last_error
