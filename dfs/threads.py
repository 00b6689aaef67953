"""A few threads for calls that may really block, with completions handed over in batches.

`trio.to_thread.run_sync` costs about 85 us a call: it asks a limiter, starts or wakes a thread with
a lock, and wakes the loop once per completion.  Here the threads take jobs from one queue, and a
thread that finishes wakes the loop only when no wake-up is under way; the loop then collects
everything that is finished at once.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import trio

T = TypeVar("T")
_Job = tuple[trio.lowlevel.TrioToken, trio.lowlevel.Task, Callable[..., Any], tuple[Any, ...]]


class ThreadPool:
    """Runs blocking functions on up to `size` threads, first come first served.

    A pool may serve several trio runs, one after the other.  Threads start when they are needed
    and are daemons, so that a forgotten pool does not keep the process.
    """

    def __init__(self, size: int, *, name: str) -> None:
        """Make a pool; `name` is for debuggers.  Size 0 runs everything inline."""
        self._size = size
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: deque[tuple[trio.lowlevel.Task, outcome.Outcome[Any]]] = deque()
        self._woken = False
        self._threads: list[threading.Thread] = []
        self._busy = 0  # jobs queued or running
        self._runs = 0
        self._wakeups = 0

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn(*args)` on a thread; raises what it raises.

        Cancellation waits until the function has ended and then does not hide its result, so a
        caller always knows whether it happened.
        """
        if self._size == 0:
            return fn(*args)
        if self._busy >= len(self._threads) < self._size:
            thread = threading.Thread(
                target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        self._busy += 1
        self._runs += 1
        token = trio.lowlevel.current_trio_token()
        self._jobs.put((token, trio.lowlevel.current_task(), fn, args))
        result: T = await trio.lowlevel.wait_task_rescheduled(_never_abort)
        return result

    def _work(self) -> None:
        get = self._jobs.get
        while (job := get()) is not None:
            token, task, fn, args = job
            result = outcome.capture(fn, *args)
            self._done.append((task, result))
            del job, fn, args, result, task
            # Append first, look second: `_collect` clears the flag before it takes results, so
            # either it still sees ours or we see the flag clear and wake the loop again.
            if not self._woken:
                self._woken = True
                token.run_sync_soon(self._collect)

    def _collect(self) -> None:
        self._woken = False
        self._wakeups += 1
        done = self._done
        while done:
            task, result = done.popleft()
            self._busy -= 1
            trio.lowlevel.reschedule(task, result)

    def close(self) -> None:
        """End the threads after the jobs they have; fine to call twice."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads.clear()

    def statistics(self) -> dict[str, int]:
        """Jobs run, wake-ups of the loop they took, jobs under way, threads."""
        return {
            "runs": self._runs,
            "wakeups": self._wakeups,
            "busy": self._busy,
            "threads": len(self._threads),
        }


def _never_abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
