"""A simulated disk that forgets what nobody synced: `dfs.env.Disk` in memory, from one seed.

Each file remembers its durable bytes and the writes since the last sync; the name space remembers
its durable form and the operations since.  `crash()` is a power loss: of the unsynced writes a
prefix or a random subset survives, the last of them perhaps torn at a random byte; lost writes
below surviving ones read as zeros.  Unsynced names survive in order up to a random point, or as a
random subset.  The instance stands for the medium: after a crash, open files again on it.

A process that died does nothing more: work that was under way in `run` at the crash never returns,
and files opened before it refuse everything.

Faults: `capacity` and `full` (ENOSPC), `fail_next` (EIO), `flip` (a bit of the medium).
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Literal, TypeVar

import outcome
import trio

from dfs.buffers import PAGE
from dfs.disk import register
from dfs.env import Buffer
from dfs.errors import DiskFull, NotFound, StoreFailed

T = TypeVar("T")
Kind = Literal["read", "write", "sync"]
UNLIMITED = 1 << 40
BLOCK = 4096  # what a punched hole must cover to give space back
_Write = tuple[int, bytes]  # offset, bytes
_Cut = tuple[int, None]  # size after a truncate


class _Inode:
    """One file's content: as processes see it, and as a power loss leaves it."""

    __slots__ = ("data", "durable", "holes", "pending")

    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = bytearray()
        self.pending: list[_Write | _Cut] = []
        self.holes: set[int] = set()  # numbers of punched blocks

    def used(self) -> int:
        return len(self.data) - BLOCK * len(self.holes)

    def sync(self) -> None:
        for op in self.pending:
            _apply(self.durable, op)
        self.pending.clear()

    def crash(self, random: Random) -> None:
        ops = self.pending
        if ops:
            for op in _survivors(random, ops):
                _apply(self.durable, op)
        self.pending = []
        self.data = bytearray(self.durable)
        self.holes = {n for n in self.holes if not any(self.data[n * BLOCK : (n + 1) * BLOCK])}


def _apply(data: bytearray, op: _Write | _Cut) -> None:
    offset, new = op
    if new is None:
        if offset <= len(data):
            del data[offset:]
        else:
            data.extend(bytes(offset - len(data)))
        return
    if offset > len(data):
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(new)] = new


def _survivors(random: Random, ops: list[_Write | _Cut]) -> list[_Write | _Cut]:
    kind = random.random()
    if kind < 0.2:
        return ops
    if kind < 0.8:  # in order, as one sequential writer sees it most often
        kept = ops[: random.randrange(len(ops) + 1)]
    else:  # pages go to the medium in any order
        kept = [op for op in ops if random.random() < 0.5]
    if kept and random.random() < 0.5:
        offset, new = kept[-1]
        if new:
            kept[-1] = offset, new[: random.randrange(len(new))]
    return kept


class SimFile:
    """An open file; see `dfs.env.DiskFile`."""

    __slots__ = ("_disk", "_generation", "_inode", "_name")

    def __init__(self, disk: "SimDisk", name: str, inode: _Inode) -> None:
        """Made by `SimDisk.open`."""
        self._disk = disk
        self._generation = disk.generation
        self._name = name
        self._inode = inode

    def _check(self, kind: Kind | None) -> None:
        if self._generation != self._disk.generation:
            raise StoreFailed(f"{self._name}: closed, or opened before the crash")
        if kind is not None:
            self._disk.maybe_fail(kind, self._name)

    def pread(self, length: int, offset: int) -> bytes:
        """See `DiskFile.pread`."""
        self._check("read")
        return bytes(self._inode.data[offset : offset + length])

    def append(self, buffers: Sequence[Buffer], *, cached: bool = True) -> int:
        """See `DiskFile.append`."""
        del cached  # there is no cache
        offset = len(self._inode.data)
        self.pwrite(b"".join(buffers), offset)
        return offset

    def append_pages(self, pages: memoryview) -> int:
        """See `DiskFile.append_pages`."""
        offset = -(-len(self._inode.data) // PAGE) * PAGE
        self.pwrite(pages, offset)
        return offset

    def pwrite(self, data: Buffer, offset: int) -> None:
        """See `DiskFile.pwrite`."""
        self._check("write")
        inode = self._inode
        blocks = range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1) if data else range(0)
        filled = inode.holes.intersection(blocks) if inode.holes else set()
        growth = max(0, offset + len(data) - len(inode.data)) + BLOCK * len(filled)
        self._disk.take(growth, self._name)
        inode.holes -= filled
        op = offset, bytes(data)
        _apply(inode.data, op)
        inode.pending.append(op)

    def size(self) -> int:
        """See `DiskFile.size`."""
        self._check(None)
        return len(self._inode.data)

    def truncate(self, size: int) -> None:
        """See `DiskFile.truncate`."""
        self._check("write")
        inode = self._inode
        self._disk.take(max(0, size - len(inode.data)), self._name)
        _apply(inode.data, (size, None))
        inode.pending.append((size, None))
        inode.holes = {n for n in inode.holes if (n + 1) * BLOCK <= size}

    def punch(self, offset: int, length: int) -> None:
        """See `DiskFile.punch`."""
        self._check("write")
        inode = self._inode
        length = min(length, len(inode.data) - offset)
        if length <= 0:
            return
        op = offset, bytes(length)
        _apply(inode.data, op)
        inode.pending.append(op)
        inode.holes.update(range(-(-offset // BLOCK), (offset + length) // BLOCK))

    def fdatasync(self) -> None:
        """See `DiskFile.fdatasync`; after an injected error the unsynced writes are doomed."""
        self._check(None)
        try:
            self._disk.maybe_fail("sync", self._name)
        except StoreFailed:
            self._inode.pending.clear()  # the pages are clean now, and never written
            raise
        self._inode.sync()

    def fileno(self) -> int:
        """See `DiskFile.fileno`: there is none."""
        raise NotImplementedError("a simulated file has no descriptor")

    def close(self) -> None:
        """See `DiskFile.close`."""
        self._generation = -1


class SimDisk:
    """A data directory on a simulated medium; see `dfs.env.Disk` and the module's docstring."""

    _count = 0
    quick = False  # whether a sync may run inline, then without a delay

    def __init__(
        self, random: Random, *, capacity: int = UNLIMITED, sync_delay: float = 0.002
    ) -> None:
        """An empty disk of `capacity` bytes; `run` takes up to `sync_delay` virtual seconds."""
        SimDisk._count += 1
        self._path = f"sim:{SimDisk._count}"
        self._random = random
        self.capacity = capacity
        self.sync_delay = sync_delay
        self.full = False
        self.generation = 0
        self.syncs = 0
        self._names: dict[str, _Inode] = {}
        self._durable: dict[str, _Inode] = {}
        self._pending: list[tuple[str, str, _Inode | None]] = []  # (name lost, name made, file)
        self._dirs: set[str] = {""}
        self._faults: list[tuple[Kind, str]] = []
        register(self._path, self)

    # -- faults

    def crash(self) -> None:
        """Lose power: see the module's docstring."""
        random = self._random
        self.generation += 1
        ops = self._pending
        if random.random() < 0.5:
            ops = ops[: random.randrange(len(ops) + 1)]
        else:
            ops = [op for op in ops if random.random() < 0.5]
        for op in ops:
            _rename(self._durable, *op)
        self._pending = []
        self._names = dict(self._durable)
        for inode in {id(i): i for i in self._names.values()}.values():
            inode.crash(random)

    def flip(self, name: str, offset: int, bit: int = 0) -> None:
        """Damage one bit of a file, on the medium and as it is read."""
        inode = self._inode(name)
        inode.data[offset] ^= 1 << bit
        if offset < len(inode.durable):
            inode.durable[offset] ^= 1 << bit

    def fail_next(self, kind: Kind, name: str = "", *, count: int = 1) -> None:
        """Let the next `count` operations of a kind fail (EIO), on names starting with `name`."""
        self._faults.extend([(kind, name)] * count)

    def maybe_fail(self, kind: Kind, name: str) -> None:
        """Raise the injected fault that is due, if any; for the files."""
        for i, (k, prefix) in enumerate(self._faults):
            if k == kind and name.startswith(prefix):
                del self._faults[i]
                raise StoreFailed(f"{kind} {self.path(name)}: Input/output error")

    def take(self, growth: int, name: str) -> None:
        """Account for bytes about to be written; for the files."""
        if growth and (self.full or (self.capacity < UNLIMITED and growth > self.usage()[1])):
            raise DiskFull(
                f"write {growth} bytes to {self.path(name)}: No space left on device; "
                "delete data or add capacity"
            )

    # -- dfs.env.Disk

    def _inode(self, name: str) -> _Inode:
        inode = self._names.get(name)
        if inode is None:
            raise NotFound(f"open {self.path(name)}: No such file or directory")
        return inode

    def open(self, name: str, *, create: bool = False, truncate: bool = False) -> SimFile:
        """See `Disk.open`."""
        if create and name not in self._names:
            parent = name.rpartition("/")[0]
            if parent not in self._dirs:
                raise NotFound(f"open {self.path(name)}: No such file or directory")
            self._change("", name, _Inode())
        file = SimFile(self, name, self._inode(name))
        if truncate and file.size():
            file.truncate(0)
        return file

    def _change(self, old: str, new: str, inode: _Inode | None) -> None:
        _rename(self._names, old, new, inode)
        self._pending.append((old, new, inode))

    def exists(self, name: str) -> bool:
        """See `Disk.exists`."""
        return name in self._names or name in self._dirs

    def listdir(self, name: str = "") -> list[str]:
        """See `Disk.listdir`."""
        start = f"{name}/" if name else ""
        n = len(start)
        paths = [*self._names, *self._dirs]
        return sorted({p[n:].partition("/")[0] for p in paths if p.startswith(start)} - {""})

    def mkdir(self, name: str) -> None:
        """See `Disk.mkdir`; durable on return."""
        parts = name.split("/")
        self._dirs.update("/".join(parts[: i + 1]) for i in range(len(parts)))

    def rename(self, old: str, new: str) -> None:
        """See `Disk.rename`."""
        self._change(old, new, self._inode(old))

    def unlink(self, name: str) -> None:
        """See `Disk.unlink`."""
        if name in self._names:
            self._change(name, "", None)

    def sync_dir(self, name: str = "") -> None:
        """See `Disk.sync_dir`."""
        self.maybe_fail("sync", name)
        keep = []
        for op in self._pending:
            if any(p and p.rpartition("/")[0] == name for p in op[:2]):
                _rename(self._durable, *op)
            else:
                keep.append(op)
        self._pending = keep

    def write_atomic(self, name: str, data: bytes) -> None:
        """See `Disk.write_atomic`."""
        temporary = f"{name}.tmp"
        file = self.open(temporary, create=True, truncate=True)
        file.append([data])
        file.fdatasync()
        file.close()
        self.rename(temporary, name)
        self.sync_dir(name.rpartition("/")[0])

    def usage(self) -> tuple[int, int]:
        """See `Disk.usage`."""
        used = sum(inode.used() for inode in self._names.values())
        return self.capacity, 0 if self.full else max(0, self.capacity - used)

    def path(self, name: str = "") -> str:
        """See `Disk.path`: `sim:NUMBER/name`, which `dfs.disk.disk_at` finds again."""
        return f"{self._path}/{name}" if name else self._path

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """See `Disk.run`: inline, at a random moment of a random delay."""
        generation = self.generation
        delay, part = self._random.random() * self.sync_delay, self._random.random()
        with trio.CancelScope(shield=True):
            await trio.sleep(delay * part)
            if self.generation == generation:
                result = outcome.capture(fn, *args)
                await trio.sleep(delay * (1 - part))
        if self.generation != generation:
            await trio.sleep_forever()  # the process that asked is dead; it waits to be cancelled
        return result.unwrap()

    async def sync(self, fdatasync: Callable[[], None], *, turn: bool = True) -> None:
        """See `Disk.sync`: a sync takes its time here, always."""
        await self.run(fdatasync)

    def sync_nowait(self, fdatasync: Callable[[], None]) -> bool:
        """See `Disk.sync_nowait`."""
        if self.quick:
            fdatasync()
        return self.quick


def _rename(names: dict[str, _Inode], old: str, new: str, inode: _Inode | None) -> None:
    if old:
        names.pop(old, None)
    if new and inode is not None:
        names[new] = inode
