"""What every background loop of a daemon is: a `Worker` that can be listed, woken and paused.

A worker has a name, a state, a line of progress, its rate and its last error, and does everything
in `run_once`, so that tests, the simulator and an operator run one round when they want it.  A
round that fails is told in the status and tried again later; only an error that is none of ours
ends the node.  Loops of another shape are listed through `Observed`.

`handlers` serves the list: `dfs node workers`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import trio

from dfs.clock import Clock
from dfs.env import Context, Env, Handler, Reply
from dfs.errors import DfsError, InvalidArgument, NotFound
from dfs.pace import Bandwidth, Meter, Tranquility

log = logging.getLogger(__name__)

WAITING, RUNNING, FAILED, PAUSED = "waiting", "running", "failed", "paused"
STATUS = """Fields of a worker's status, all of them always there:
name, state ("waiting" | "running" | "failed" | "paused"), progress (a line for people),
fraction (0 to 1 of the round, None = unknown), items, bytes (done since the start),
items_per_s, bytes_per_s (over the last two minutes), rounds, last_error ("" = none yet),
last_error_at (ns of wall time, 0 = never), next_in (s until the next round, None = unknown),
steerable (whether it can be run, paused and resumed)."""


class Listed(Protocol):
    """Anything `dfs node workers` can show."""

    @property
    def name(self) -> str:
        """Unique in its daemon."""
        ...

    def status(self) -> dict[str, Any]:
        """The fields of `STATUS`."""
        ...


class Worker(ABC):
    """A background loop: `run_once` every `interval` seconds, give or take a quarter.

    A subclass calls `did` as it gets on (or only returns the count), and `rest` between steps: that
    is where a pause takes effect and the loop leaves the machine to others.
    """

    name = "worker"

    def __init__(self, env: Env, interval: float, *, first: float | None = None) -> None:
        """Wait `first` seconds (default: the interval) before the first round."""
        self._env = env
        self._interval = interval
        self._first = interval if first is None else first
        self._woken = trio.Event()
        self._resumed: trio.Event | None = None  # while paused
        self._error = ""
        self._error_at = 0
        self._due: float | None = None
        self._step_at: float | None = None
        self._state = WAITING
        self.meter = Meter()
        self.tranquility = Tranquility()
        self.bandwidth: Bandwidth | None = None
        self.progress = ""
        self.fraction: float | None = None
        self.rounds = 0

    @abstractmethod
    async def run_once(self) -> int:
        """Do one round; returns how much was done (in items of this worker)."""

    # ------------------------------------------------------------------------------ for subclasses

    @property
    def last_error(self) -> str:
        """The last thing that went wrong; setting it notes when.  "" forgets it."""
        return self._error

    @last_error.setter
    def last_error(self, text: str) -> None:
        self._error = text
        self._error_at = self._env.clock.time_ns() if text else 0

    def did(self, items: int, size: int = 0) -> None:
        """Count work done in this round: items, bytes."""
        self.meter.add(self._env.clock.monotonic(), items, size)

    async def rest(self, *, size: int = 0, queue: int = 0, backlog: float = 0) -> None:
        """After a step that moved `size` bytes: leave the machine to others for a while.

        `queue` (items) and `backlog` (bytes) are what is still to do: the more, the shorter.  While
        the worker is paused, this does not return.
        """
        now = self._env.clock.monotonic()
        took = 0.0 if self._step_at is None else now - self._step_at
        pause = self.tranquility.rest(took, queue)
        if self.bandwidth is not None:
            pause = max(pause, self.bandwidth.delay(now, size, backlog))
        await trio.sleep(pause)
        await self._wait_resumed()
        self._step_at = self._env.clock.monotonic()

    # -------------------------------------------------------------------------------------- outside

    @property
    def state(self) -> str:
        """One of "waiting", "running", "failed", "paused"."""
        return PAUSED if self._resumed is not None else self._state

    def wake(self) -> None:
        """Let the next round begin now (or when the worker is resumed)."""
        self._woken.set()

    def pause(self) -> None:
        """Stop at the next rest, and begin no round, until `resume`."""
        if self._resumed is None:
            self._resumed = trio.Event()

    def resume(self) -> None:
        """Go on after `pause`; fine if it was not paused."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def run(self) -> None:
        """Round after round, until cancelled."""
        pause = self._first
        while True:
            seconds = pause * (0.75 + self._env.random.random() / 2)
            self._due = self._env.clock.monotonic() + seconds
            with trio.move_on_after(seconds):
                await self._woken.wait()
            await self._wait_resumed()
            self._woken = trio.Event()
            await self.round()
            pause = self._interval

    async def round(self) -> None:
        """One round with its accounting; errors of ours end up in `last_error`."""
        self._due = None
        self._state = RUNNING
        self._step_at = self._env.clock.monotonic()
        before = self.meter.items
        try:
            done = await self.run_once()
        except DfsError as e:
            self.last_error = str(e)
            self._state = FAILED
            log.warning("%s: %s", self.name, e)
        else:
            self._state = WAITING
            told = self.meter.items - before
            if done > told:
                self.did(done - told)
        finally:
            self._step_at = None
            self.fraction = None
        self.rounds += 1

    def status(self) -> dict[str, Any]:
        """The fields of `STATUS`."""
        now = self._env.clock.monotonic()
        items, size = self.meter.rates(now)
        return {
            "name": self.name,
            "state": self.state,
            "progress": self.progress,
            "fraction": self.fraction,
            "items": self.meter.items,
            "bytes": self.meter.bytes,
            "items_per_s": items,
            "bytes_per_s": size,
            "rounds": self.rounds,
            "last_error": self._error,
            "last_error_at": self._error_at,
            "next_in": None if self._due is None else max(0.0, self._due - now),
            "steerable": True,
        }

    async def _wait_resumed(self) -> None:
        while (resumed := self._resumed) is not None:
            await resumed.wait()


class Observed:
    """A loop that is no `Worker`, listed by what it says about itself.

    `look` returns any of the fields of `STATUS`, in particular `items` and `bytes` done so far, of
    which the rates are made by comparing looks.
    """

    def __init__(self, name: str, clock: Clock, look: Callable[[], dict[str, Any]]) -> None:
        """`look` must be cheap and must not wait."""
        self.name = name
        self._clock = clock
        self._look = look
        self._meter = Meter()
        self._seen: tuple[int, int] | None = None  # items and bytes at the last look

    def status(self) -> dict[str, Any]:
        """The fields of `STATUS`."""
        found = self._look()
        now = self._clock.monotonic()
        meter = self._meter
        items, size = found.get("items", 0), found.get("bytes", 0)
        old_items, old_size = self._seen or (items, size)  # the first look only begins the window
        self._seen = (items, size)
        meter.add(now, max(0, items - old_items), max(0, size - old_size))
        items_per_s, bytes_per_s = meter.rates(now)
        return {
            "name": self.name,
            "state": WAITING,
            "progress": "",
            "fraction": None,
            "items": items,
            "bytes": size,
            "items_per_s": items_per_s,
            "bytes_per_s": bytes_per_s,
            "rounds": 0,
            "last_error": "",
            "last_error_at": 0,
            "next_in": None,
            **found,
            "steerable": False,
        }


def lines(workers: Iterable[Listed]) -> tuple[tuple[str, str, str, str], ...]:
    """(name, state, progress, last error) of each, as `node.status` has it."""
    found = (w.status() for w in workers)
    return tuple((s["name"], s["state"], s["progress"], s["last_error"]) for s in found)


def handlers(workers: Callable[[], Iterable[Listed]]) -> dict[str, Handler]:
    """`node.workers` and `node.steer` for the workers a daemon has now; see `dfs.wire.messages`."""

    def listed(_ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (tuple(w.status() for w in workers()),), b""

    def steer(_ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        name, action = args
        every = {w.name: w for w in workers()}
        worker = every.get(name)
        if worker is None:
            raise NotFound(f"no worker {name!r} here; there are {', '.join(sorted(every))}")
        if not isinstance(worker, Worker):
            raise InvalidArgument(f"{name} works as it must and cannot be steered")
        if action == "run":
            worker.resume()
            worker.wake()
        elif action == "pause":
            worker.pause()
        elif action == "resume":
            worker.resume()
        else:
            raise InvalidArgument(f"a worker can run, pause and resume, not {action!r}")
        return (worker.status(),), b""

    return {"node.workers": listed, "node.steer": steer}
