"""FUSE requests to `FileSystem` calls: decode, call, encode.  No rule of the file system is here.

Every handler is wrapped once, in `_answering`, so that only `FUSEError` can leave it: anything else
would end pyfuse3's main loop and with it the mount.  A cancelled handler answers too, or its caller
would hang in the kernel for ever.

Attributes and entries are valid for a second in the kernel, about as long as the session's view;
what other clients change is invalidated as soon as the watch tells (`fuse.invalidate`).
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import pyfuse3
import trio

from dfs.client.atimes import AccessTimes
from dfs.client.attributes import without_privileges
from dfs.client.filesystem import Attr, Caller, FileSystem
from dfs.client.namespace import RENAME_EXCHANGE
from dfs.errors import DfsError, FsError
from dfs.volume import items
from fuse.contention import Contention
from fuse.handles import OpenInodes
from fuse.inodes import InodeTable
from fuse.invalidate import Invalidator
from fuse.listen import first_wait
from fuse.push import Push
from fuse.readdir import Directories
from fuse.removed import Removed

log = logging.getLogger(__name__)

TIMEOUT = 1.0  # seconds that the kernel may answer from its own caches
BLOCK_SIZE = 4096  # of statfs
REMOVED = 0  # handle of a directory that was opened after it was removed
NO_LIMIT = 1 << 60  # bytes that statfs shows when nobody knows a limit

T = TypeVar("T")
Handler = Callable[..., Coroutine[Any, Any, Any]]


def _answering(handler: Handler) -> Handler:
    """Let only `FUSEError` out of a handler; tell when it waits."""

    @functools.wraps(handler)
    async def answering(self: "Operations", *args: Any) -> Any:
        try:
            return await first_wait(handler(self, *args), self.waits)
        except pyfuse3.FUSEError:
            raise
        except DfsError as e:
            if e.errno == errno.EIO:
                log.warning("%s: %s", handler.__name__, e)
            raise pyfuse3.FUSEError(e.errno) from None
        except trio.Cancelled:  # pyfuse3 is being cancelled; its next checkpoint says so again
            raise pyfuse3.FUSEError(errno.EIO) from None
        except Exception:
            log.exception("%s%r failed", handler.__name__, _short(args))
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answering


def _short(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a if not isinstance(a, bytes) or len(a) < 300 else f"{len(a)} bytes" for a in args)


_ENOSYS = pyfuse3.FUSEError(errno.ENOSYS)
_ABSENT = pyfuse3.EntryAttributes()  # to the kernel inode 0 means ENOENT; that is not cached
_ABSENT.entry_timeout = _ABSENT.attr_timeout = 0.0


def _blank() -> pyfuse3.EntryAttributes:
    """An entry with what all of them have in common."""
    entry = pyfuse3.EntryAttributes()
    entry.st_blksize = 1 << 17
    entry.entry_timeout = entry.attr_timeout = TIMEOUT
    return entry


class Operations(pyfuse3.Operations):
    """The handlers of one mount; `xattrs`: whether to serve extended attributes.

    Serving them costs one more request for every write(2), since the kernel then asks for
    `security.capability` each time; unserved, it asks once and never again.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        fs: FileSystem,
        invalidator: Invalidator,
        *,
        xattrs: bool = False,
        acls: bool = False,
        atimes: AccessTimes | None = None,
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve `fs`; `waits` is called whenever a handler begins to wait for something.

        `atimes` keeps access times; without it nothing changes them but who sets them.
        """
        super().__init__()
        self._atimes = atimes
        self.waits = waits
        self._fs = fs
        self._xattrs = xattrs or acls
        self.enable_acl = acls  # the kernel checks access control lists
        # The kernel may keep what is written, sizes and times if nobody else can write.
        self._alone = self.enable_writeback_cache = fs.session.exclusive
        self._invalidator = invalidator
        self.inodes = InodeTable(prune=invalidator.prune)
        self.open_inodes = OpenInodes()
        self.directories = Directories(fs, self.inodes, _blank(), self._fill, atimes)
        self._removed = Removed()
        self.contention = Contention(fs)
        self.push = Push(fs)
        self._time_ns = fs.session.cluster.clock.time_ns
        if not self._alone:
            fs.session.on_change(self._changed_elsewhere)

    # ------------------------------------------------------------------ encoding

    def _attributes(self, attr: Attr) -> pyfuse3.EntryAttributes:
        return self._fill(_blank(), attr)

    def _fill(self, entry: pyfuse3.EntryAttributes, attr: Attr) -> pyfuse3.EntryAttributes:
        """Put attributes into a `_blank` entry, or one that was filled before."""
        if self._atimes is not None:
            self._atimes.overlay(attr)
        entry.st_ino = attr.ino
        entry.st_mode = attr.kind << 12 | attr.mode
        entry.st_nlink = attr.nlink
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_rdev = attr.rdev
        entry.st_size = size = attr.size
        entry.st_blocks = (size + 511) >> 9
        entry.st_atime_ns = attr.atime
        entry.st_mtime_ns = attr.mtime
        entry.st_ctime_ns = attr.ctime
        return entry

    def _entry(self, parent: int, name: bytes, attr: Attr) -> pyfuse3.EntryAttributes:
        """Attributes of an entry; the kernel will hold the inode."""
        key = items.entry_key(parent, self._fs.namespace.cookie(name))
        self.inodes.looked_up(attr.ino, key, name)
        return self._attributes(attr)

    def _changed_elsewhere(self, keys: Sequence[bytes] | None) -> None:
        """Another session's commit: have the kernel forget what it knows of these items."""
        inodes, invalidator = self.inodes, self._invalidator
        if keys is None:
            for parent, name in inodes.places():
                invalidator.entry(parent, name)
            for ino in inodes.all():
                invalidator.inode(ino)
            self.push.forget_all()
            return
        for key in keys:
            ino, kind, _ = items.split_key(key)
            if kind == items.ENTRY:
                for name in inodes.names(key):
                    invalidator.entry(ino, name)
            elif kind in (items.INODE, items.EXTENT) and ino in inodes:
                invalidator.inode(ino)
                self.push.forget(ino)

    # ------------------------------------------------------------------ names

    async def _in(self, work: Awaitable[T], *directories: int) -> T:
        """Do something with names in directories of which the kernel may know the wrong ones.

        Where one was replaced by another client, ESTALE makes the kernel look its path up again:
        the names may well be in the new one.  What was removed here the kernel knows itself.
        """
        try:
            return await work
        except FsError as e:
            if e.errno == errno.ENOENT:
                for ino in directories:
                    if ino not in self._removed:
                        await self._fs.getattr(ino)  # raises ESTALE
            raise

    async def lookup(self, parent: int, name: bytes, _ctx: Any) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        find = self.contention.look_up if self.contention.active else self._fs.find
        attr = await self._in(find(parent, name), parent)
        if attr is None:
            return _ABSENT
        if self.directories.listings:
            self.directories.listings.looked_up(parent, name)
        return self._entry(parent, name, attr)

    async def forget(self, forgotten: Sequence[tuple[int, int]]) -> None:
        """FORGET and BATCH_FORGET; must not fail."""
        for ino, count in forgotten:
            if self.inodes.forget(ino, count):
                self._removed.forget(ino)
                self.push.forget(ino)

    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """MKNOD."""
        work = self._fs.mknod(parent, name, mode, rdev, Caller(ctx.uid, ctx.gid))
        attr = await self._in(work, parent)
        return self._entry(parent, name, attr)

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """MKDIR."""
        work = self._fs.mkdir(parent, name, mode & 0o7777, Caller(ctx.uid, ctx.gid))
        attr = await self._in(work, parent)
        return self._entry(parent, name, attr)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """SYMLINK."""
        work = self._fs.symlink(parent, name, target, Caller(ctx.uid, ctx.gid))
        attr = await self._in(work, parent)
        return self._entry(parent, name, attr)

    async def link(self, ino: int, parent: int, name: bytes, _ctx: Any) -> pyfuse3.EntryAttributes:
        """LINK."""
        attr = await self._in(self._fs.link(ino, parent, name), parent)
        return self._entry(parent, name, attr)

    async def readlink(self, ino: int, _ctx: Any) -> bytes:
        """READLINK."""
        if self._atimes is not None:
            self._atimes.accessed(await self._fs.getattr(ino))
        return await self._fs.readlink(ino)

    async def unlink(self, parent: int, name: bytes, _ctx: Any) -> None:
        """UNLINK."""
        self._remember(await self._in(self._fs.unlink(parent, name), parent))

    async def rmdir(self, parent: int, name: bytes, _ctx: Any) -> None:
        """RMDIR."""
        self._remember(await self._in(self._fs.rmdir(parent, name), parent))

    def _remember(self, removed: Attr | None) -> None:
        """Keep the attributes of what was removed, as long as the kernel holds the inode."""
        if removed is not None and removed.ino in self.inodes:
            self._removed.add(removed, self._time_ns())

    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        _ctx: Any,
    ) -> None:
        """RENAME and RENAME2."""
        fs, inodes, cookie = self._fs, self.inodes, self._fs.namespace.cookie
        old_key = items.entry_key(parent, cookie(name))
        new_key = items.entry_key(new_parent, cookie(new_name))
        moved, other = inodes.find(old_key, name), inodes.find(new_key, new_name)
        replaced = None
        if other and not flags:
            try:
                replaced = await fs.getattr(other)
            except FsError:  # it is gone already
                replaced = None
        await self._in(fs.rename(parent, name, new_parent, new_name, flags), parent, new_parent)
        self._remember(replaced)
        if moved:
            inodes.moved(moved, new_key, new_name)
        if other and flags & RENAME_EXCHANGE:
            inodes.moved(other, old_key, name)

    # ------------------------------------------------------------------ attributes

    async def getattr(self, ino: int, _ctx: Any) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        try:
            attr = await self._fs.getattr(ino)
        except FsError as e:
            attr = self._removed.instead_of(e, ino)
        return self._attributes(attr)

    async def setattr(
        self, ino: int, attr: pyfuse3.EntryAttributes, fields: Any, _fh: Any, _ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """SETATTR: chmod, chown, truncate, utimens."""
        if self._atimes is not None and fields.update_atime:
            self._atimes.set(ino)
        changes = {
            "mode": stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            "uid": attr.st_uid if fields.update_uid else None,
            "gid": attr.st_gid if fields.update_gid else None,
            "size": attr.st_size if fields.update_size else None,
            "atime": attr.st_atime_ns if fields.update_atime else None,
            "mtime": attr.st_mtime_ns if fields.update_mtime else None,
            "ctime": attr.st_ctime_ns if fields.update_ctime else None,
        }
        try:
            changed = await self._fs.setattr(ino, **changes)
        except FsError as e:
            changed = self._removed.instead_of(e, ino)
            self._removed.change(changed, changes, self._time_ns())
        return self._attributes(changed)

    async def statfs(self, _ctx: Any) -> pyfuse3.StatvfsData:
        """STATFS."""
        stats = await self._fs.statfs()
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = BLOCK_SIZE
        total = stats.total or NO_LIMIT
        free = stats.free if stats.total else NO_LIMIT - min(stats.used, NO_LIMIT)
        found.f_blocks = total // BLOCK_SIZE
        found.f_bfree = found.f_bavail = free // BLOCK_SIZE
        found.f_files = stats.inodes + stats.free_inodes
        found.f_ffree = found.f_favail = stats.free_inodes
        found.f_namemax = items.MAX_NAME
        return found

    async def access(self, _ino: int, _mode: int, _ctx: Any) -> bool:
        """ACCESS; the kernel checks permissions itself (`default_permissions`)."""
        return True

    async def getxattr(self, ino: int, name: bytes, _ctx: Any) -> bytes:
        """GETXATTR."""
        if not self._xattrs:
            raise _ENOSYS
        return await self._fs.getxattr(ino, name)

    async def listxattr(self, ino: int, _ctx: Any) -> Sequence[bytes]:
        """LISTXATTR."""
        if not self._xattrs:
            raise _ENOSYS
        return await self._fs.listxattr(ino)

    async def setxattr(self, ino: int, name: bytes, value: bytes, _ctx: Any) -> None:
        """SETXATTR; pyfuse3 does not hand over the flags."""
        if not self._xattrs:
            raise _ENOSYS
        if name.startswith(b"system.") and not self.enable_acl:
            # A list that is kept and that nobody enforces would be a hole.
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        await self._fs.setxattr(ino, name, value)

    async def removexattr(self, ino: int, name: bytes, _ctx: Any) -> None:
        """REMOVEXATTR."""
        if not self._xattrs:
            raise _ENOSYS
        await self._fs.removexattr(ino, name)

    # ------------------------------------------------------------------ files

    async def open(self, ino: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """OPEN; O_TRUNC arrives here.  ESTALE makes the kernel look the name up again, once."""
        mode = flags & os.O_ACCMODE
        if flags & os.O_TRUNC and ctx.uid:
            await self._clear_privileges(ino)
        try:
            handle = await self._fs.open(
                ino,
                # To write a part of a page the kernel reads the page first.
                readable=mode != os.O_WRONLY or self._alone,
                writable=mode != os.O_RDONLY,
                truncate=bool(flags & os.O_TRUNC),
            )
        except FsError as e:
            if e.errno == errno.ESTALE:
                self.contention.failed()
                if await self.contention.absent(ino):
                    raise pyfuse3.FUSEError(errno.ENOENT) from None
            raise
        # What others changed was queued for invalidation while the open brought the view up to
        # date; the kernel must have dropped its size and pages before it reads: close-to-open.
        if self._invalidator.is_pending(ino):
            await self._invalidator.wait_inode(ino)
        self.open_inodes.opened(handle, ino)
        if self._atimes is not None and mode == os.O_RDONLY and not flags & os.O_NOATIME:
            # Reads of pages that the kernel has do not arrive here, so this counts as one.
            with suppress(FsError):  # the handle is open, even if the file is gone meanwhile
                self._atimes.accessed(await self._fs.getattr(ino))
        if mode == os.O_RDONLY:
            self.push.opened(ino, handle)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    async def _clear_privileges(self, ino: int) -> None:
        """Clear set-ID bits: the kernel does that before any change of content but O_TRUNC's."""
        attr = await self._fs.getattr(ino)
        cleared = without_privileges(attr.mode)
        if cleared != attr.mode and attr.is_file:
            await self._fs.setattr(ino, mode=cleared)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """CREATE: make and open; never opens what is there."""
        work = self._fs.create(parent, name, stat.S_IMODE(mode), Caller(ctx.uid, ctx.gid))
        try:
            attr, handle = await self._in(work, parent)
        except FsError as e:
            if e.errno != errno.EEXIST or flags & os.O_EXCL:
                raise
            # Another client made it since the kernel found nothing.  What it is and whether this
            # caller may open it is for the kernel to check: ESTALE makes it look again.
            self.contention.failed()
            raise pyfuse3.FUSEError(errno.ESTALE) from None
        self.open_inodes.opened(handle, attr.ino)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True), self._entry(parent, name, attr)

    async def read(self, fh: int, offset: int, size: int) -> Any:
        """READ."""
        return await self._fs.read(fh, offset, size)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """WRITE."""
        return await self._fs.write(fh, offset, data)

    async def flush(self, fh: int) -> None:
        """FLUSH: close(2) of one descriptor."""
        await self._fs.flush(fh)

    async def fsync(self, fh: int, _datasync: bool) -> None:
        """FSYNC."""
        await self._fs.fsync(fh)

    async def release(self, fh: int) -> None:
        """RELEASE: the last descriptor is closed."""
        self.open_inodes.released(fh)
        await self._fs.release(fh)

    # ------------------------------------------------------------------ directories

    async def opendir(self, ino: int, _ctx: Any) -> int:
        """OPENDIR."""
        try:
            handle = await self._fs.opendir(ino)
        except FsError as e:
            if e.errno != errno.ENOENT or ino not in self._removed:
                raise
            return REMOVED  # a working directory, say; the kernel itself lists it as empty
        return self.open_inodes.opened(handle, ino)

    async def readdir(self, fh: int, start: int, token: Any) -> None:
        """READDIRPLUS, from the cookie `start` until the kernel's buffer is full."""
        await self.directories.read(fh, self.open_inodes.inode(fh), start, token)

    async def fsyncdir(self, fh: int, _datasync: bool) -> None:
        """FSYNCDIR."""
        if fh != REMOVED:  # which has nothing left to sync
            await self._fs.fsyncdir(fh)

    async def releasedir(self, fh: int) -> None:
        """RELEASEDIR."""
        if fh == REMOVED:
            return
        self.open_inodes.released(fh)
        self.directories.listings.end(fh)
        await self._fs.releasedir(fh)


HANDLERS = tuple(
    name
    for name, value in vars(Operations).items()
    if not name.startswith("_") and callable(value) and name != "forget"
)
for _name in HANDLERS:
    setattr(Operations, _name, _answering(getattr(Operations, _name)))
