"""What a node needs from the world, as protocols: disk, network, background processes.

Production binds them to the kernel (`dfs.rpc`), the simulator binds them to one seeded process
(`dfs.testing`).  A node never imports socket, os, random or threading itself; it is given an `Env`.
That is what lets whole clusters run deterministically with faults.

Blocking discipline: every method of `DiskFile` may block and is called either inline, when it only
touches the page cache and is small, or through `Disk.run`, which production runs on a small thread
pool and the simulator runs inline after a virtual delay.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import Any, Protocol, TypeVar

from dfs.clock import Clock
from dfs.errors import DfsError

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
Buffers = Buffer | Sequence[Buffer]


# ----------------------------------------------------------------------------------------- disk


class DiskFile(Protocol):
    """An open file of one data directory."""

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the file."""
        ...

    def append(self, buffers: Sequence[Buffer], *, cached: bool = True) -> int:
        """Write all the buffers at the end of the file; return the offset where they start.

        `cached=False`: nobody is expected to read them soon, so the kernel need not remember them.
        On ENOSPC raises `DiskFull` and cuts the file back to its old length; on EIO raises
        `StoreFailed`.
        """
        ...

    def append_pages(self, pages: memoryview) -> int:
        """Write whole pages at the first multiple of a page at or after the end; return where.

        `pages` is what `dfs.buffers.allocate_aligned` gave, a multiple of `PAGE` long.  The kernel
        need not remember them; where it can, they do not go through its cache at all.  What lies
        between reads as zeros.  Same errors as `append`.
        """
        ...

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Overwrite bytes; same errors as `append`."""
        ...

    def size(self) -> int:
        """Length in bytes."""
        ...

    def truncate(self, size: int) -> None:
        """Cut (or extend with zeros) to `size` bytes."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Give the blocks of a range back to the file system; it reads as zeros afterwards."""
        ...

    def fdatasync(self) -> None:
        """Make all writes so far survive power loss; after an error distrust the file."""
        ...

    def fileno(self) -> int:
        """The kernel's file descriptor; raises `NotImplementedError` in the simulator."""
        ...

    def close(self) -> None:
        """Close; writes nothing."""
        ...


class Disk(Protocol):
    """One data directory; names are relative, with `/` between parts."""

    def open(self, name: str, *, create: bool = False, truncate: bool = False) -> DiskFile:
        """Open for reading and writing; raises `NotFound` if absent and not `create`."""
        ...

    def exists(self, name: str) -> bool:
        """Whether a file or directory has this name."""
        ...

    def listdir(self, name: str = "") -> list[str]:
        """Sorted names in a directory; empty if the directory is absent."""
        ...

    def mkdir(self, name: str) -> None:
        """Make a directory and its parents; fine if it is there."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Atomically rename over whatever has the new name."""
        ...

    def unlink(self, name: str) -> None:
        """Remove a file; fine if it is absent."""
        ...

    def sync_dir(self, name: str = "") -> None:
        """Make creations, renames and removals in a directory survive power loss."""
        ...

    def write_atomic(self, name: str, data: bytes) -> None:
        """Replace a small file: temporary, fsync, rename, fsync directory."""
        ...

    def usage(self) -> tuple[int, int]:
        """(bytes in the file system, bytes free for us)."""
        ...

    def path(self, name: str = "") -> str:
        """Real path for messages and for other processes; `sim:...` in the simulator."""
        ...

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run a blocking function of the caller off the loop; not cancelled half-way."""
        ...

    async def sync(self, fdatasync: Callable[[], None], *, turn: bool = True) -> None:
        """Run a file's `fdatasync` as `run` does, or inline while that is quicker.

        `turn`: whether other tasks have a turn before it runs inline; without, this may not yield.
        """
        ...

    def sync_nowait(self, fdatasync: Callable[[], None]) -> bool:
        """Run a file's `fdatasync` inline while that is quicker; False: it was not run."""
        ...


# -------------------------------------------------------------------------------------- network


class Priority(IntEnum):
    """Order in which a connection sends; lower goes first."""

    HIGH = 0  # ping, journal, confirm
    NORMAL = 1  # metadata
    BULK = 2  # chunk data
    BACKGROUND = 3  # repair, scrub, hints


@dataclass(slots=True)
class Context:
    """What a handler knows about a request besides its arguments."""

    peer: str  # address or name of the caller, for logs
    epoch: int  # map epoch the caller acted on; 0 = none
    deadline: float  # monotonic seconds
    priority: int


Reply = tuple[Any, Buffers]  # (result, bulk data); `call` always hands the data back as one buffer


class Deferred:
    """An answer that comes later without a task: a handler returns one and somebody answers it.

    It saves the 20 us of a task where answers come from callbacks anyway.  Nothing else ends it:
    whoever returned it must answer within the request's deadline, or the caller's slot stays taken.
    """

    __slots__ = ("_answer", "_sink")

    def __init__(self) -> None:
        """Not answered, and nobody listens yet."""
        self._sink: Callable[[Reply | Exception], None] | None = None
        self._answer: Reply | Exception | None = None

    def answer(self, answer: Reply | Exception) -> None:
        """Answer the request, or refuse it with an error; only the first answer counts."""
        sink = self._sink
        if self._answer is None:
            self._answer = answer
            if sink is not None:
                self._sink = None
                sink(answer)

    def bind(self, sink: Callable[[Reply | Exception], None]) -> None:
        """Have the answer given to `sink`, now if it is there already; for servers."""
        if self._answer is None:
            self._sink = sink
        else:
            sink(self._answer)


Handler = Callable[[Context, tuple[Any, ...], memoryview], Reply | Deferred | Awaitable[Reply]]
# A handler that can answer at once is a plain function and runs inline in the reader; one that must
# wait is a coroutine function and runs in a task of its own, or returns a `Deferred`.  It raises
# `DfsError` to refuse.  The memoryview it is given is only valid until it returns (plain function)
# or finishes (coroutine).


class Rpc(Protocol):
    """Requests to other nodes, addressed by strings such as `tcp://127.0.0.1:7401`."""

    async def call(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        timeout: float,
        priority: int = Priority.NORMAL,
        epoch: int = 0,
    ) -> tuple[Any, Buffer]:
        """Send a request, wait for its answer (result, data); `timeout` in seconds.

        Raises the handler's `DfsError`, or `Unreachable`, or `DeadlineExceeded`.
        """
        ...

    def request(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        timeout: float,
        on_reply: Callable[[tuple[Any, Buffer] | DfsError], None],
        priority: int = Priority.NORMAL,
        epoch: int = 0,
    ) -> None:
        """Send a request and return at once; quorums are built on this without tasks.

        `on_reply` is called exactly once, from the loop, never from inside `request`.
        """
        ...

    def cast(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        priority: int = Priority.HIGH,
        epoch: int = 0,
    ) -> None:
        """Send without an answer, at most once, perhaps never."""
        ...

    def later(self, fn: Callable[[], None]) -> bool:
        """Call `fn` once all messages that arrived together are handled and their answers sent.

        False: none is being handled now, and `fn` will not be called.  It must not raise.
        """
        ...


class Endpoint(Rpc, Protocol):
    """An `Rpc` that also serves."""

    async def serve(
        self, address: str, handlers: dict[str, Handler], *, started: Callable[[str], None]
    ) -> None:
        """Serve until cancelled; calls `started(actual address)` once it listens.

        Raises `ConfigError` when the address cannot be bound (taken port, bad host).
        """
        ...


# ------------------------------------------------------------------------------------ processes


class Processes(Protocol):
    """Work that would hold the GIL for long, done by another process."""

    async def run(self, function: str, *args: Any) -> Any:
        """Run `package.module:function(*args)`; arguments and result are `dfs.codec` values.

        The function may be a plain function or an async one taking no environment.  Raises what it
        raises (as `DfsError`), and `DfsError` when the process dies.  The simulator runs it inline.
        """
        ...


@dataclass(slots=True)
class Env:
    """Everything a node is given."""

    clock: Clock
    disk: Disk
    rpc: Endpoint
    processes: Processes
    random: Random
