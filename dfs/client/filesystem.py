"""`FileSystem`: the VFS of dfs, defined here and only here.

An inode-based POSIX file system on one session at one volume: no FUSE types, no paths (see
`dfs.client.paths`), no permission checks (the kernel does those for a mount; a library client has
the rights of its credentials).  Names are bytes, times nanoseconds, errors `FsError`.

Every operation on names or attributes is committed before it returns; under the volume's delegation
it is committed here, and `fsync` makes it durable (`dfs.client.delegation`).  File data is written
back: it is committed by `flush`, `fsync`, `release`, or a second after it was written (see
`dfs.client.files`).  Looking (`lookup`, `getattr`, `readdir`) answers from the session's view, at
most 1.5 s old; `open` first brings the view up to date, so that it sees whatever was closed before,
on any client.  All of it stands in one module so that there is one place to look it up.
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, NamedTuple

import trio

from dfs.client import attributes, listing, namespace
from dfs.client.attributes import Attr, fs_error
from dfs.client.cache import BUDGET
from dfs.client.connect import Cluster
from dfs.client.files import Files
from dfs.client.handles import DirHandle, FileHandle, HandleTable
from dfs.client.listing import Entry, Name
from dfs.client.namespace import Caller, Namespace
from dfs.client.openfile import File
from dfs.client.orphans import Orphans
from dfs.client.quota import Quota
from dfs.client.removal import Removal
from dfs.client.session import DEADLINE, Session
from dfs.client.store import ChunkStore
from dfs.codec import Buffer
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.volume import items
from dfs.volume.items import DIR, LNK, REG
from dfs.volume.view import Txn

log = logging.getLogger(__name__)

ROOT = Caller(0, 0)
ROOM_INTERVAL = 0.5  # seconds between attempts of an unmount that waits for room
SCAN = 256  # entries that one look into a directory reads


class FsStats(NamedTuple):
    """What `statfs` shows, in bytes and inodes; 0 in a total = no limit known."""

    total: int
    free: int
    used: int
    inodes: int
    free_inodes: int


class FileSystem:
    """The file system of one volume; see the module's docstring.

    `clear_privileges`: whether a write clears set-user-ID bits here; a FUSE mount leaves that to
    the kernel, which knows who writes.  `kernel_times`: whether a write leaves the times of its
    file alone; a kernel with a writeback cache writes later than the program did, and sets them.
    """

    def __init__(
        self,
        session: Session,
        chunks: ChunkStore,
        *,
        cache_bytes: int = BUDGET,
        clear_privileges: bool = True,
        kernel_times: bool = False,
        hash_bits: int = items.HASH_BITS,
        capacity: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """Compose on a running session; `capacity` returns (total, free) bytes of the cluster."""
        params = session.params
        self.session = session
        self.read_only = session.mode != "rw"
        self.namespace = Namespace(
            params["salt"],
            bits=hash_bits,
            quota=Quota(params, session),
        )
        self.handles = HandleTable()
        self.files = Files(
            session,
            chunks,
            self.namespace,
            cache_bytes=cache_bytes,
            clear_privileges=clear_privileges,
            kernel_times=kernel_times,
        )
        self._capacity = capacity
        self._leaving: dict[int, Removal] = {}  # inodes that are gone once a commit is answered
        self._room_until: float | None = None  # when the end stops waiting for room
        self._time_ns = session.cluster.clock.time_ns

    def refuse(self, full: str, full_of_data: str) -> None:
        """See `dfs.client.quota.Quota.refuse`; the cluster is full or is not any more."""
        self.namespace.quota.refuse(full, full_of_data)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background work (write-back, read-ahead, orphans); until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.files.run)
            if not self.read_only:
                nursery.start_soon(Orphans(self.session, self.namespace, self.files).run)
            task_status.started()

    async def shut_down(self) -> None:
        """Commit all dirty data; raises the first error after having tried everything.

        Whoever is told that the homes' disks are full cannot try again, so it waits for room as
        long as for a quorum, the first time.
        """
        clock = self.session.cluster.clock
        if self._room_until is None:
            self._room_until = clock.monotonic() + self.session.deadline
        while True:
            try:
                try:
                    await self.files.flush_all()
                finally:
                    await self.session.settle()
            except FsError as e:
                if e.errno != errno.ENOSPC or not self.session.full:
                    raise
                if clock.monotonic() > self._room_until:
                    raise
                await trio.sleep(ROOM_INTERVAL)
            else:
                return

    def statistics(self) -> dict[str, Any]:
        """Counters for people."""
        return {
            "session": self.session.statistics(),
            "files": self.files.statistics(),
            "handles": len(self.handles),
        }

    def _writable(self) -> None:
        if self.read_only:
            raise fs_error(errno.EROFS)

    # ------------------------------------------------------------------ attributes

    async def getattr(self, ino: int) -> Attr:
        """Attributes, with what this client wrote and has not committed yet."""
        attr = await self.session.read(lambda txn: attributes.get_attr(txn, ino))
        return self.files.overlay(attr)

    async def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
        ctime: int | None = None,
    ) -> Attr:
        """chmod, chown, truncate and utimens; None leaves a field as it is.

        Whatever is asked for changes ctime, nothing at all (a chown to -1, -1) included.
        """
        self._writable()
        if size is not None:
            await self.files.truncate(ino, size)
        if size is None or not (mode is uid is gid is atime is mtime is ctime is None):
            if mtime is not None or mode is not None:
                await self.files.settle(ino)
            now = self._time_ns()
            inode = await self.session.transact(
                lambda txn: attributes.set_attr(
                    txn,
                    ino,
                    now,
                    mode=mode,
                    uid=uid,
                    gid=gid,
                    atime=atime,
                    mtime=mtime,
                    ctime=ctime,
                )
            )
            return self.files.overlay(Attr(ino, inode))
        return await self.getattr(ino)

    async def statfs(self) -> FsStats:
        """Size and use of the volume: its quota, or else the cluster's capacity."""
        quota = self.namespace.quota
        value, limits = await self.session.read(
            lambda txn: (txn.get(items.USAGE_KEY), quota.limits(txn.get))
        )
        used, inodes = items.decode_usage(value) if value is not None else (0, 0)
        total, free = self._capacity()
        if limits[0]:
            room = max(0, limits[0] - used - quota.held)
            total, free = limits[0], min(free, room) if total else room
        free_inodes = max(0, (limits[1] or 1 << 40) - inodes)
        if quota.full or quota.full_of_data:
            total, free = total or used, 0
        return FsStats(total, free, used, inodes, 0 if quota.full else free_inodes)

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """Value of an extended attribute; raises ENODATA."""
        return await self.session.read(lambda txn: attributes.get_xattr(txn, ino, name))

    async def listxattr(self, ino: int) -> list[bytes]:
        """Names of the extended attributes."""
        return await self.session.read(lambda txn: attributes.list_xattrs(txn, ino))

    async def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; `flags` as of setxattr(2)."""
        self._writable()
        now = self._time_ns()
        await self.session.transact(
            lambda txn: attributes.set_xattr(txn, ino, name, value, now, flags)
        )

    async def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an extended attribute; raises ENODATA."""
        self._writable()
        now = self._time_ns()
        await self.session.transact(lambda txn: attributes.remove_xattr(txn, ino, name, now))

    # ------------------------------------------------------------------ names

    async def lookup(self, parent: int, name: bytes) -> Attr:
        """What a name stands for; raises ENOENT, ENOTDIR."""
        attr = await self.find(parent, name)
        if attr is None:
            raise fs_error(errno.ENOENT, repr(name))
        return attr

    async def find(self, parent: int, name: bytes) -> Attr | None:
        """What a name stands for, None if nothing; raises ENOENT, ENOTDIR for the directory.

        Where others write, a name is only absent after a look at the newest state: who has been
        told that a file is there must find it.
        """
        session, lookup = self.session, self.namespace.lookup
        try:
            attr = await session.read(lambda txn: lookup(txn, parent, name))
        except FsError as e:
            if e.errno != errno.ENOENT or session.alone:
                raise
            attr = None
        if attr is None and not session.alone:
            await session.refresh()
            attr = await session.read(lambda txn: lookup(txn, parent, name))
        return self.files.overlay(attr) if attr is not None else None

    async def find_held(self, parent: int, name: bytes) -> tuple[Attr | None, File | None]:
        """`find`, and count a regular file as open: it outlives the removal of its name from here.

        `files.close` gives up the file that is returned.
        """
        while True:
            attr = await self.find(parent, name)
            if attr is None or attr.kind != REG:
                return attr, None
            leaving = self._leaving.get(attr.ino)
            if leaving is None:
                return attr, self.files.open(attr.ino)
            await leaving.wait()

    async def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""

        def op(txn: Txn) -> bytes:
            if attributes.get_inode(txn, ino).kind != LNK:
                raise fs_error(errno.EINVAL, "not a symbolic link")
            value = txn.get(items.symlink_key(ino))
            if value is None:
                raise FsError(f"symbolic link {ino:x} has no target; run `dfs fsck`", errno.EIO)
            return items.decode_symlink(value)

        return await self.session.read(op)

    async def _make(
        self,
        parent: int,
        name: bytes,
        kind: int,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Attr:
        self._writable()
        ino, now = self.session.mint_ino(), self._time_ns()
        create = self.namespace.create
        return await self.session.transact(
            lambda txn: create(
                txn, parent, name, kind, mode, ino, caller, now, rdev=rdev, target=target
            )
        )

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller = ROOT) -> Attr:
        """Make a directory."""
        return await self._make(parent, name, DIR, mode, caller)

    async def mknod(
        self, parent: int, name: bytes, st_mode: int, rdev: int = 0, caller: Caller = ROOT
    ) -> Attr:
        """Make a file, FIFO, socket or device; the type is in `st_mode`."""
        kind = (st_mode >> 12) or REG
        if kind not in items.KINDS or kind in (DIR, LNK):
            raise fs_error(errno.EINVAL, f"type of file {kind}")
        return await self._make(parent, name, kind, st_mode & 0o7777, caller, rdev=rdev)

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller = ROOT) -> Attr:
        """Make a symbolic link."""
        return await self._make(parent, name, LNK, 0o777, caller, target=target)

    async def link(self, ino: int, parent: int, name: bytes) -> Attr:
        """Give a file one more name."""
        self._writable()
        now = self._time_ns()
        attr = await self.session.transact(
            lambda txn: self.namespace.link(txn, ino, parent, name, now)
        )
        return self.files.overlay(attr)

    async def unlink(self, parent: int, name: bytes) -> Attr:
        """Remove a name; an open file lives on until its last handle here is closed.

        Returns the attributes of what the name stood for, as they were.
        """
        self._writable()
        now = self._time_ns()
        unlink = self.namespace.unlink
        removal = Removal(self.files.is_open, self._leaving)
        try:
            attr = await self.session.transact(lambda txn: unlink(txn, parent, name, now, removal))
        finally:
            removal.end()
        self.files.overlay(attr)
        await self.files.unlinked(attr.ino)
        return attr

    async def rmdir(self, parent: int, name: bytes) -> Attr:
        """Remove an empty directory; returns its attributes, as they were."""
        self._writable()
        now = self._time_ns()
        return await self.session.transact(lambda txn: self.namespace.rmdir(txn, parent, name, now))

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """rename(2); flags RENAME_NOREPLACE = 1, RENAME_EXCHANGE = 2."""
        self._writable()
        now = self._time_ns()
        removal = Removal(self.files.is_open, self._leaving)
        try:
            _, other = await self.session.transact(
                lambda txn: self.namespace.rename(
                    txn, parent, name, new_parent, new_name, now, removal, flags
                )
            )
        finally:
            removal.end()
        if other and not flags & namespace.RENAME_EXCHANGE:
            await self.files.unlinked(other)

    # ------------------------------------------------------------------ files

    async def create(
        self,
        parent: int,
        name: bytes,
        mode: int,
        caller: Caller = ROOT,
        *,
        exclusive: bool = True,
        truncate: bool = False,
        readable: bool = True,
    ) -> tuple[Attr, int]:
        """Make a file and open it for writing; returns (attributes, handle).

        Not `exclusive`: an existing regular file is opened instead, and truncated if asked.
        """
        try:
            attr = await self._make(parent, name, REG, mode, caller)
        except FsError as e:
            if exclusive or e.errno != errno.EEXIST:
                raise
            attr = await self.lookup(parent, name)
            if attr.kind != REG:
                raise fs_error(errno.EISDIR if attr.is_dir else errno.ELOOP, repr(name)) from None
            handle = await self.open(attr.ino, readable=readable, writable=True, truncate=truncate)
            try:
                return await self.getattr(attr.ino), handle
            except FsError:
                await self.release(handle)
                raise
        return attr, self._open(attr.ino, readable=readable, writable=True)

    async def open(
        self, ino: int, *, readable: bool = True, writable: bool = False, truncate: bool = False
    ) -> int:
        """Open a regular file after bringing the view up to date; raises ESTALE when it is gone."""
        if writable or truncate:
            self._writable()
        await self.session.refresh()
        while True:
            attr = await self.session.read(lambda txn: attributes.get_attr(txn, ino))
            leaving = self._leaving.get(ino)
            if leaving is None:
                break
            await leaving.wait()  # its last name is being removed: then it is gone, or stays
        if attr.kind == DIR:
            raise fs_error(errno.EISDIR)
        handle = self._open(ino, readable=readable, writable=writable)
        if truncate:  # an empty file too: its times change
            try:
                await self.files.truncate(ino, 0)
            except FsError:
                await self.release(handle)
                raise
        return handle

    def _open(self, ino: int, *, readable: bool, writable: bool) -> int:
        file = self.files.open(ino)
        return self.handles.add(FileHandle(file, readable=readable, writable=writable))

    async def read(self, handle: int, offset: int, length: int) -> Buffer:
        """Up to `length` bytes; shorter only at the end of the file."""
        h = self.handles.file(handle)
        if not h.readable:
            raise fs_error(errno.EBADF, "not open for reading")
        return await self.files.read(h, offset, length)

    def whole_nowait(self, handle: int, limit: int) -> Buffer | None:
        """All of a file of up to `limit` bytes, without a wait; None where it is not as simple.

        Which is: nobody else has it open here, all is committed, and all of it is at hand.
        """
        return self.files.whole_nowait(self.handles.file(handle), limit)

    async def write(self, handle: int, offset: int, data: Buffer) -> int:
        """Write all of `data`, which must not be changed afterwards; returns its length.

        Raises the error of an earlier write-back of the file, once.
        """
        h = self.handles.file(handle)
        if not h.writable:
            raise fs_error(errno.EBADF, "not open for writing")
        return await self.files.write(h.file, offset, data)

    async def flush(self, handle: int) -> None:
        """Commit what was written: close(2) reports what goes wrong here.

        Under the delegation a few bytes are committed here, and sent later; fsync always waits.
        """
        file = self.handles.file(handle).file
        if not self.files.flush_here(file):
            await self.files.flush(file)

    async def fsync(self, handle: int) -> None:
        """Commit what was written; on return it is on stable storage of a majority."""
        file = self.handles.file(handle).file
        self.files.synced(file)
        if not self.files.flush_here(file, settling=True):
            await self.files.flush(file)
        await self._settle(file.ino)
        self.files.raise_loss(file.ino)

    async def _settle(self, ino: int) -> None:
        try:
            await self.session.settle()
        except FsError as e:
            self.files.told(ino)
            full = self.namespace.quota.full
            kept = self.session.statistics()["pending"]  # and tried again
            if e.errno != errno.ENOSPC and full and kept:
                raise fs_error(errno.ENOSPC, full) from e
            raise

    async def release(self, handle: int) -> None:
        """Close a handle; commits what is left, whose errors are logged, not raised."""
        h = self.handles.pop(handle)
        if isinstance(h, FileHandle):
            await self.files.close(h.file)

    # ------------------------------------------------------------------ directories

    async def opendir(self, ino: int) -> int:
        """Open a directory; raises ENOENT, ENOTDIR."""
        await self.session.read(lambda txn: self.namespace.directory(txn, ino))
        return self.handles.add(DirHandle(ino))

    async def releasedir(self, handle: int) -> None:
        """Close a directory."""
        self.handles.pop(handle)

    async def fsyncdir(self, handle: int) -> None:
        """Wait until all operations on names are on stable storage of a majority.

        Raises EIO, once, when changes of the directory were lost since they were acknowledged.
        """
        ino = self.handles.directory(handle).ino
        self.files.raise_loss(ino)
        await self._settle(ino)

    async def readdir(self, handle: int, cookie: int = 0, limit: int = SCAN) -> list[Entry]:
        """Entries after a cookie, in order of the cookies, without `.` and `..`; empty at the end.

        Every name that is there throughout is returned exactly once, however the directory changes.
        Call `returned(handle, name, cookie)` for each entry that the reader took, so that it can be
        stopped between names of one bucket.
        """
        h = self.handles.directory(handle)
        return await self.list(h.ino, cookie, limit, h.names if cookie == h.cookie else ())

    async def readdir_names(self, handle: int, cookie: int = 0, limit: int = SCAN) -> list[Name]:
        """As `readdir`, without attributes: reads none of the inodes."""
        h = self.handles.directory(handle)
        ino, taken = h.ino, h.names if cookie == h.cookie else ()

        def op(txn: Txn) -> list[Name]:
            self.namespace.directory(txn, ino)
            return [*listing.names(txn, ino, cookie, limit, taken)]

        return await self.session.read(op)

    def returned(self, handle: int, name: bytes, cookie: int) -> None:
        """Note that the reader of a directory took an entry."""
        h = self.handles.directory(handle)
        if cookie != h.cookie:
            h.cookie = cookie
            h.names = {name}
        else:
            h.names.add(name)

    async def list(
        self, ino: int, cookie: int = 0, limit: int = SCAN, taken: Collection[bytes] = ()
    ) -> list[Entry]:
        """Entries of a directory after `cookie`, or at it and not in `taken` if that is given."""

        def op(txn: Txn) -> list[Entry]:
            self.namespace.directory(txn, ino)
            return listing.entries(txn, ino, cookie, limit, taken)

        entries = await self.session.read(op)
        overlay = self.files.overlay
        for entry in entries:
            overlay(entry[2])
        return entries


@contextlib.asynccontextmanager
async def open_filesystem(
    cluster: Cluster,
    volume: bytes,
    chunks: Callable[[Session], ChunkStore],
    *,
    mode: str = "rw",
    name: str = "",
    deadline: float = DEADLINE,
    delegate: bool = True,
    warm: bool = False,
    **options: Any,
) -> AsyncIterator[FileSystem]:
    """A `FileSystem` for the length of the block; at its end dirty data is committed.

    `chunks(session)` makes the chunk client (whose `run` is started here).  `warm`: for long, so
    what will be looked at is fetched before (`dfs.client.warmup`).  `options` go to `FileSystem`.
    Errors are raised as they are, not wrapped in a group; so is a failed last commit.
    """
    session = Session(cluster, volume, mode=mode, name=name, deadline=deadline, delegate=delegate)
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(session.run)
            if warm:
                nursery.start_soon(session.keep_warm)
            client = chunks(session)
            await nursery.start(client.run)
            fs = FileSystem(session, client, **options)
            await nursery.start(fs.run)
            try:
                yield fs
            except trio.Cancelled:
                raise  # the tasks that would commit are cancelled too: this is a crash
            except BaseException:
                await fs.shut_down()
                raise
            await fs.shut_down()
        except trio.Cancelled:
            raise
        except BaseException as e:
            error = e
        finally:
            with trio.CancelScope(shield=True):
                await session.close()
            nursery.cancel_scope.cancel()
    if error is not None:
        raise error


__all__ = ["ROOT_INO", "Attr", "Caller", "Entry", "FileSystem", "FsStats", "open_filesystem"]
