"""The real disk: `dfs.env.Disk` on a directory of the kernel's file system.

Errors are translated once, here: ENOSPC and EDQUOT become `DiskFull` (and an append is cut back to
where it began), ENOENT becomes `NotFound`, running out of descriptors becomes `Busy`; everything
else, above all EIO and any error of fsync, becomes `StoreFailed`.  After a failed fsync the kernel
marks the pages clean although they never reached the disk (Rebello et al., "Can Applications
Recover from fsync Failures?", ATC 2020), so a second fsync proves nothing: callers stop.

Names are relative to the root, with `/` between parts.  `mkdir` makes the new directory durable at
once; creations, renames and removals of files are durable after `sync_dir`.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn, TypeVar

import trio

from dfs.buffers import PAGE
from dfs.env import Buffer, Disk
from dfs.errors import Busy, ConfigError, DfsError, DiskFull, NotFound, StoreFailed
from dfs.threads import ThreadPool

T = TypeVar("T")
IOV_MAX = 1024  # buffers per pwritev, a limit of the kernel
KEEP_SIZE, PUNCH_HOLE = 1, 2  # <linux/falloc.h>
_UNTRIED, _NONE = -2, -1
RWF_DONTCACHE = 0x80  # <linux/fs.h>
ZEROS = bytes(1 << 16)
SYNCS = 8  # the last ones, whose median tells whether the medium is quick
QUICK_SYNC = 0.001  # seconds
STALL = 0.02  # seconds of a single sync after which the medium has to prove itself again

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def translate(error: OSError, doing: str) -> DfsError:
    """Our error for the kernel's, with what was being done (a path, a size) in its text."""
    text = f"{doing}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{text}; delete data or add capacity")
    if error.errno == errno.ENOENT:
        return NotFound(text)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Busy(f"{text}; raise the limit of open files")
    return StoreFailed(text)


class RealFile:
    """An open file; see `dfs.env.DiskFile`."""

    __slots__ = ("_direct", "_dontcache", "_fd", "_path")

    def __init__(self, fd: int, path: str) -> None:
        """Own the descriptor; `path` is for messages."""
        self._fd = fd
        self._path = path
        self._dontcache = RWF_DONTCACHE
        self._direct = _UNTRIED  # a descriptor opened with O_DIRECT

    def _fail(self, error: OSError, doing: str) -> NoReturn:
        raise translate(error, f"{doing} {self._path}") from error

    def pread(self, length: int, offset: int) -> bytes:
        """See `DiskFile.pread`."""
        try:
            data = os.pread(self._fd, length, offset)
            if len(data) == length or not data:
                return data
            parts = [data]  # the kernel returns less than asked above 2 GiB or on a signal
            got = len(data)
            while got < length and (data := os.pread(self._fd, length - got, offset + got)):
                parts.append(data)
                got += len(data)
            return b"".join(parts)
        except OSError as e:
            self._fail(e, f"read {length} bytes at {offset} of")

    def append(self, buffers: Sequence[Buffer], *, cached: bool = True) -> int:
        """See `DiskFile.append`.

        What is not to be cached is on its way to the medium at once and its pages are used again
        for the next of it (RWF_DONTCACHE, Linux 6.14), where the file system can do that: a stream
        then neither drives out what others read nor touches ever new memory, which is dear on
        virtual machines, and a later sync finds little left to do.
        """
        fd = self._fd
        start = os.lseek(fd, 0, os.SEEK_END)
        total = sum(map(len, buffers))
        flags = 0 if cached else self._dontcache
        try:
            try:
                done = os.pwritev(fd, buffers[:IOV_MAX], start, flags)
            except OSError as e:
                if not flags or e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                self._dontcache = flags = 0  # an older kernel, or a file system without it
                done = os.pwritev(fd, buffers[:IOV_MAX], start, 0)
            while done < total:
                done += os.pwritev(fd, _rest(buffers, done), start + done, flags)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    os.ftruncate(fd, start)
            self._fail(e, f"append {total} bytes to")
        return start

    def append_pages(self, pages: memoryview) -> int:
        """See `DiskFile.append_pages`; O_DIRECT where the file system has it.

        That is a quarter of the processor time of a copy into the kernel's cache.
        """
        end = os.lseek(self._fd, 0, os.SEEK_END)
        start = -(-end // PAGE) * PAGE
        if self._direct == _UNTRIED:
            try:  # by the descriptor: the name may be another file's by now
                flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
                self._direct = os.open(f"/proc/self/fd/{self._fd}", flags)
            except OSError:
                self._direct = _NONE
        try:
            done = 0
            while done < len(pages):
                done = done // PAGE * PAGE
                done += self._write_pages(pages[done:], start + done)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    os.ftruncate(self._fd, end)
            self._fail(e, f"append {len(pages)} bytes to")
        return start

    def _write_pages(self, pages: memoryview, at: int) -> int:
        if self._direct >= 0:
            try:
                return os.pwrite(self._direct, pages, at)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                os.close(self._direct)  # the medium wants more than a page's alignment
                self._direct = _NONE
        return os.pwrite(self._fd, pages, at)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """See `DiskFile.pwrite`."""
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as e:
            self._fail(e, f"write {len(view)} bytes at {offset} of")

    def size(self) -> int:
        """See `DiskFile.size`."""
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        """See `DiskFile.truncate`."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as e:
            self._fail(e, f"truncate to {size} bytes")

    def punch(self, offset: int, length: int) -> None:
        """See `DiskFile.punch`; writes zeros where the file system has no holes."""
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        if _libc.fallocate(self._fd, KEEP_SIZE | PUNCH_HOLE, offset, length) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            self._fail(OSError(code, os.strerror(code)), f"punch {length} bytes at {offset} of")
        for at in range(offset, offset + length, len(ZEROS)):
            self.pwrite(ZEROS[: offset + length - at], at)

    def fdatasync(self) -> None:
        """See `DiskFile.fdatasync`; any error is `StoreFailed`, ENOSPC too."""
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            raise StoreFailed(f"sync {self._path}: {e.strerror}; its last writes are lost") from e

    def fileno(self) -> int:
        """See `DiskFile.fileno`."""
        return self._fd

    def close(self) -> None:
        """See `DiskFile.close`; fine if it is closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._direct >= 0:
                os.close(self._direct)
                self._direct = _NONE

    def __del__(self) -> None:
        """Give the descriptor back when nobody did."""
        self.close()


def _rest(buffers: Sequence[Buffer], done: int) -> list[memoryview]:
    """The buffers without their first `done` bytes, at most IOV_MAX of them."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
            continue
        rest.append(memoryview(buffer)[done:])
        done = 0
        if len(rest) == IOV_MAX:
            break
    return rest


class RealDisk:
    """A data directory; see `dfs.env.Disk`.  `run` uses a small pool of threads of its own."""

    def __init__(self, root: Path, *, threads: int = 3) -> None:
        """Use `root`, which is made if absent; threads start when `run` is first called."""
        self._root = os.fspath(Path(root).absolute())
        self._pool = ThreadPool(threads, name="disk")
        self._lock = -1
        self._sync_times: deque[float] = deque(maxlen=SYNCS)  # seconds
        self._syncs = 0
        self._sync_seconds = 0.0  # two threads may add at once and lose one: for people only
        self._quick = False
        weakref.finalize(self, self._pool.close)
        if not os.path.isdir(self._root):
            try:
                os.makedirs(self._root, exist_ok=True)
                _sync_path(os.path.dirname(self._root))
            except OSError as e:
                raise translate(e, f"make {self._root}") from e

    def lock(self) -> None:
        """Own the directory until `close` or the end of this process.

        Raises `ConfigError` when another process owns it: two daemons on one directory destroy it.
        """
        if self._lock >= 0:
            return
        path = self.path("LOCK")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise ConfigError(
                f"{self._root} is in use by another process (it holds {path}); stop it first"
            ) from e
        self._lock = fd

    def close(self) -> None:
        """Stop the threads after the work they have, release the lock; fine to call twice."""
        self._pool.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def open(self, name: str, *, create: bool = False, truncate: bool = False) -> RealFile:
        """See `Disk.open`."""
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            flags |= os.O_CREAT
        if truncate:
            flags |= os.O_TRUNC
        path = self.path(name)
        try:
            return RealFile(os.open(path, flags, 0o600), path)
        except OSError as e:
            raise translate(e, f"open {path}") from e

    def exists(self, name: str) -> bool:
        """See `Disk.exists`."""
        return os.path.lexists(self.path(name))

    def listdir(self, name: str = "") -> list[str]:
        """See `Disk.listdir`."""
        try:
            return sorted(os.listdir(self.path(name)))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise translate(e, f"list {self.path(name)}") from e

    def mkdir(self, name: str) -> None:
        """See `Disk.mkdir`; durable on return."""
        at = ""
        for part in name.split("/"):
            parent, at = at, f"{at}/{part}" if at else part
            try:
                os.mkdir(self.path(at), 0o700)
            except FileExistsError:
                continue
            except OSError as e:
                raise translate(e, f"make {self.path(at)}") from e
            self.sync_dir(parent)

    def rename(self, old: str, new: str) -> None:
        """See `Disk.rename`."""
        try:
            os.rename(self.path(old), self.path(new))
        except OSError as e:
            raise translate(e, f"rename {self.path(old)} to {new}") from e

    def unlink(self, name: str) -> None:
        """See `Disk.unlink`."""
        try:
            os.unlink(self.path(name))
        except FileNotFoundError:
            return
        except OSError as e:
            raise translate(e, f"remove {self.path(name)}") from e

    def sync_dir(self, name: str = "") -> None:
        """See `Disk.sync_dir`."""
        try:
            _sync_path(self.path(name))
        except OSError as e:
            raise StoreFailed(f"sync directory {self.path(name)}: {e.strerror}") from e

    def write_atomic(self, name: str, data: bytes) -> None:
        """See `Disk.write_atomic`; a crash leaves the old or the new content, maybe `name.tmp`."""
        temporary = f"{name}.tmp"
        file = self.open(temporary, create=True, truncate=True)
        try:
            file.append([data])
            file.fdatasync()
        finally:
            file.close()
        self.rename(temporary, name)
        self.sync_dir(name.rpartition("/")[0])

    def usage(self) -> tuple[int, int]:
        """See `Disk.usage`."""
        s = os.statvfs(self._root)
        return s.f_blocks * s.f_frsize, s.f_bavail * s.f_frsize

    def path(self, name: str = "") -> str:
        """See `Disk.path`."""
        return f"{self._root}/{name}" if name else self._root

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """See `Disk.run`."""
        return await self._pool.run(fn, *args)

    async def sync(self, fdatasync: Callable[[], None], *, turn: bool = True) -> None:
        """See `Disk.sync`.

        Handing a sync to a thread and its end back costs about 150 us of processor time and two
        wake-ups, as much as a quick medium needs to do it.  So it runs inline as long as most of
        the last syncs were quick, after every other task had its turn (what they queued is then
        on its way to other nodes, which work meanwhile) unless the caller saw to that.  One that
        stalls moves them to a thread until most are quick again.
        """
        if self._quick:
            if turn:
                await trio.lowlevel.cancel_shielded_checkpoint()
            self._timed(fdatasync)
        else:
            await self._pool.run(self._timed, fdatasync)

    def sync_nowait(self, fdatasync: Callable[[], None]) -> bool:
        """See `Disk.sync_nowait`."""
        if self._quick:
            self._timed(fdatasync)
            return True
        return False

    def _timed(self, fdatasync: Callable[[], None]) -> None:
        start = perf_counter()
        fdatasync()
        took = perf_counter() - start
        self._syncs += 1
        self._sync_seconds += took
        times = self._sync_times
        if took > STALL:
            times.clear()
        times.append(took)
        self._quick = len(times) == SYNCS and sorted(times)[SYNCS // 2] < QUICK_SYNC

    def statistics(self) -> dict[str, float]:
        """Syncs and their seconds, and numbers of the thread pool, see `ThreadPool.statistics`."""
        own = {"syncs": self._syncs, "sync_seconds": self._sync_seconds}
        return {**own, **self._pool.statistics()}


def _sync_path(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------ disks by path

_named: weakref.WeakValueDictionary[str, Disk] = weakref.WeakValueDictionary()


def register(path: str, disk: Disk) -> None:
    """Let `disk_at(path)` find a disk that is no directory; the simulator's disks do this."""
    _named[path] = disk


def disk_at(path: str) -> Disk:
    """The disk whose `path()` is `path`: how a worker process gets at its caller's directory."""
    return _named.get(path) or RealDisk(Path(path), threads=0)
