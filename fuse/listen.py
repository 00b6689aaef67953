"""How the workers of a mount wait for requests of the kernel: one listens, the others rest.

pyfuse3's own way costs each request a `trio.Lock` and a round of epoll: two to three passes of the
scheduler and five system calls, more than most handlers.  Here the worker that listens looks with
poll(2) first, and so takes a request that is there already without giving up control.  It stays the
listener while it handles the request, since most are answered without waiting; a handler that waits
after all passes the duty on (`Listener.pass_on`, called by `first_wait`).

Concurrency contract.  At most one worker has the duty.  Between a poll that finds a request and
pyfuse3's read(2) of it nothing awaits, so that nobody else can take it and the read cannot block.
Resting workers are woken last in, first out: the same few, with warm buffers, do all the work.
"""

import select
import types
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pyfuse3
import trio

STREAK = 16  # requests taken in a row before other tasks get a turn
NAME = "_wait_fuse_readable"  # what pyfuse3 calls before it reads a request


class Listener:
    """The duty to listen on a FUSE device, shared by the workers of `pyfuse3.main`."""

    def __init__(self, fd: int) -> None:
        """Nobody listens yet; `fd` is the device, opened."""
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._holder: trio.lowlevel.Task | None = None
        self._resting: list[trio.lowlevel.Task] = []
        self._closed = False
        self.answered: Callable[[], None] | None = None  # called by who has answered a request
        self._streak = self._at_once = self._waited = self._passed_on = 0

    def statistics(self) -> dict[str, int]:
        """Requests taken at once and after a wait, and how often the duty was passed on."""
        return {
            "at_once": self._at_once,
            "waited": self._waited,
            "passed_on": self._passed_on,
            "resting": len(self._resting),
        }

    async def wait(self) -> bool:
        """Wait until a request can be read; False when no more will come."""
        if self.answered is not None:
            self.answered()
        me = trio.lowlevel.current_task()
        if self._holder is not me:
            if self._holder is not None and not self._closed:
                self._resting.append(me)
                await trio.lowlevel.wait_task_rescheduled(self._wake_abort(me))
            if self._closed:
                return False
            self._holder = me
        turn = False  # others have had a turn since this worker came
        try:
            while not self._closed:
                found = self._poll.poll(0)
                if not found:
                    turn = True
                    await trio.lowlevel.wait_readable(self._fd)
                    continue
                if found[0][1] & ~select.POLLIN:  # unmounted: pyfuse3 learns it from its read
                    self.close()
                    return True
                if turn:
                    self._streak = 0
                    self._waited += 1
                    return True
                self._streak += 1
                if self._streak < STREAK:
                    self._at_once += 1
                    return True
                turn = True
                await trio.lowlevel.checkpoint()
        except trio.ClosedResourceError:
            self.close()
        except trio.Cancelled:
            self.pass_on()
            raise
        return False

    def pass_on(self) -> None:
        """The listener has to wait for something else: somebody who rests listens from now on."""
        if self._holder is not trio.lowlevel.current_task():
            return
        self._holder = None
        if self._resting:
            self._passed_on += 1
            self._holder = self._resting.pop()
            trio.lowlevel.reschedule(self._holder)

    def close(self) -> None:
        """No more requests will come: everybody who rests is to end."""
        self._closed = True
        while self._resting:
            trio.lowlevel.reschedule(self._resting.pop())

    def _wake_abort(self, task: trio.lowlevel.Task) -> Callable[[Any], trio.lowlevel.Abort]:
        def abort(_: Any) -> trio.lowlevel.Abort:
            self._resting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        return abort


def install(listener: Listener) -> Callable[[], None]:
    """Have pyfuse3's workers wait with the listener; returns what undoes that.

    A version of pyfuse3 that has no such function goes on to wait in its own way.
    """
    original = getattr(pyfuse3, NAME, None)
    if original is None:
        return lambda: None
    setattr(pyfuse3, NAME, listener.wait)
    return lambda: setattr(pyfuse3, NAME, original)


def devices() -> set[int]:
    """Descriptors of FUSE devices that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()) == "/dev/fuse":
                found.add(int(entry.name))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return found


@types.coroutine
def first_wait(
    coroutine: Coroutine[Any, Any, Any], waits: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """Run a coroutine (PEP 380), and call `waits` when it waits for the first time."""
    try:
        message = coroutine.send(None)
    except StopIteration as e:
        return e.value
    waits()
    while True:
        try:
            answer = yield message
        except BaseException as error:
            try:
                message = coroutine.throw(error)
            except StopIteration as e:
                return e.value
        else:
            try:
                message = coroutine.send(answer)
            except StopIteration as e:
                return e.value
