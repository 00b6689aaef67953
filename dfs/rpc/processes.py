"""Worker processes: `dfs.env.Processes` on persistent children, spoken to over pipes.

A child starts when a job needs it; each runs one job at a time, jobs beyond wait their turn.  One
child stays for the next job, as long as no job has made it large: Python gives little of its memory
back, and the next such job may be hours away.  A child that dies fails its job and is replaced.
Cancelling a job kills its child, since Python code cannot be stopped otherwise.  Children never
outlive this process: they end when their input ends, and the kernel kills them when their parent
dies.

Children run at nice 10: what they do must not delay the loop.  They import from the same `sys.path`
whatever the working directory is.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import trio

from dfs.codec import MAX_SIZE, pack, unpack
from dfs.errors import DfsError, InvalidArgument, from_wire
from dfs.rpc.worker import LENGTH

LARGE = 64 << 20  # bytes of memory that a child may keep


class WorkerProcesses:
    """Up to `count` children; see `dfs.env.Processes`.  Close it before the trio run ends."""

    def __init__(self, count: int = 2) -> None:
        """Start nothing yet."""
        self._slots = trio.Semaphore(count)
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._jobs = 0
        self._started = 0

    async def run(self, function: str, *args: Any) -> Any:
        """See `dfs.env.Processes.run`; raises `DfsError` when the child dies."""
        job = pack((function, args))
        if len(job) > MAX_SIZE:
            raise InvalidArgument(f"arguments of {function} take {len(job)} bytes; pass a file")
        async with self._slots:
            self._jobs += 1
            child = self._idle.pop() if self._idle else None
            if child is not None and child.dead():
                await self._discard(child)
                child = None
            if child is None:
                child = self._start()
            try:
                ok, value = unpack(await child.call(job))
            except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError) as e:
                status = await self._discard(child)
                raise DfsError(f"the process that ran {function} died: {_describe(status)}") from e
            except BaseException:
                await self._discard(child)
                raise
            if self._idle or child.resident() > LARGE:
                await self._discard(child)
            else:
                self._idle.append(child)
        if not ok:
            raise from_wire(*value)
        return value

    def _start(self) -> "_Child":
        child = _Child()
        self._all.add(child)
        self._started += 1
        return child

    async def _discard(self, child: "_Child") -> int:
        self._all.discard(child)
        return await child.end()

    async def close(self) -> None:
        """Kill all children and wait for their end; fine to call twice."""
        children = [*self._all]
        self._idle.clear()
        for child in children:
            await self._discard(child)

    async def __aenter__(self) -> "WorkerProcesses":
        """For `async with`."""
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close."""
        await self.close()

    def statistics(self) -> dict[str, int]:
        """Jobs run, children started, children that wait for work."""
        return {"jobs": self._jobs, "started": self._started, "idle": len(self._idle)}


class _Child:
    """One child process and its pipes."""

    def __init__(self) -> None:
        """Start it from this thread, which takes milliseconds.

        `trio.lowlevel.open_process` would do it from a thread that ends some time later, and the
        kernel's parent-death signal follows the thread, not the process.
        """
        path = os.pathsep.join(str(Path(p or ".").absolute()) for p in sys.path)
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", "dfs.rpc.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ValueError("a child has both pipes")
        self._stdin = trio.lowlevel.FdStream(os.dup(stdin.fileno()))
        self._stdout = trio.lowlevel.FdStream(os.dup(stdout.fileno()))
        stdin.close()
        stdout.close()

    def dead(self) -> bool:
        return self._process.poll() is not None

    def resident(self) -> int:
        """Bytes of memory that it has; 0 when it is dead."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def call(self, job: bytes) -> bytes:
        await self._stdin.send_all(LENGTH.pack(len(job)))
        await self._stdin.send_all(job)
        (length,) = LENGTH.unpack(await self._read(LENGTH.size))
        return await self._read(length)

    async def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = await self._stdout.receive_some(count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    async def end(self) -> int:
        """Kill the process and reap it; returns its status (negative: the signal)."""
        with trio.CancelScope(shield=True):
            self._process.kill()
            status = await trio.to_thread.run_sync(self._process.wait)
            await self._stdin.aclose()
            await self._stdout.aclose()
        return status


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
