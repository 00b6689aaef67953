"""`Quota`: the limits of a volume as one client keeps to them, and what it holds of them already.

A volume may be limited in bytes (the sum of the sizes of its files, holes included) and in inodes.
The limits are an item of the volume (QUOTA; without one, the parameters the volume was made with),
so every client learns of a change from the journal.  They are compared with the USAGE item, which
counts the same.

What counts is size, not allocated bytes: the sum of sizes moves by one ADD with every change, while
allocated bytes would have to be read from all extents at every truncate and unlink.

A write is acknowledged before it is committed, so the bytes by which it makes its file longer are
*held* from then on: a write that does not fit is refused with EDQUOT, and the commit of one that
was accepted never is.  So the bytes are exact where one client writes, and several may exceed the
limit together by what they have accepted and not committed: `files.MAX_DIRTY` and a second of
writing each, at most.  Inodes are exact up to what is on its way to the home at one moment.

A cluster that runs full (`dfs.client.capacity`) is met at the same places, with ENOSPC.
"""

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dfs.client.attributes import fs_error
from dfs.volume import items
from dfs.volume.items import Inode
from dfs.volume.tree import Missing

if TYPE_CHECKING:
    from dfs.client.openfile import File
    from dfs.client.session import Session
    from dfs.errors import FsError
    from dfs.volume.view import Txn

Get = Callable[[bytes], bytes | None]

NO_LIMIT = (0, 0)
SMALL = 4 << 10  # bytes of a file that need no chunkserver, see `dfs.client.contents`


class Quota:
    """See the module's docstring.  `limited` is all that a volume without limits ever looks at.

    It is true as well while nobody looked since the limits may have changed.
    """

    __slots__ = ("_holders", "_params", "_session", "full", "full_of_data", "held", "limited")

    def __init__(self, params: dict[str, Any], session: "Session | None" = None) -> None:
        """Of a volume with these genesis parameters; follows the session's view."""
        self._params = params
        self._session = session
        self._holders: dict[int, File] = {}
        self.held = 0  # bytes accepted and not committed, of all files
        self.limited = True
        self.full = ""  # why nothing may be added to the volume,
        self.full_of_data = ""  # and why no file data that does not fit into an inode
        if session is not None:
            session.on_change(self._on_change)

    def _on_change(self, keys: Sequence[bytes] | None) -> None:
        if keys is None or items.QUOTA_KEY in keys:
            self.limited = True

    def limits(self, get: Get) -> tuple[int, int]:
        """(bytes, inodes) as items say, 0 = no limit.  May raise `Missing`, as `get` does."""
        limits = limits_of(self._params, get(items.QUOTA_KEY))
        self.limited = limits != NO_LIMIT or bool(self.full or self.full_of_data)
        return limits

    def refuse(self, full: str, full_of_data: str) -> None:
        """From now on nothing may be added, or no file data; "": it may.

        What was accepted before is committed all the same, or that fails by itself.
        """
        self.full, self.full_of_data = full, full_of_data
        self.limited = True

    def admit(self, get: Get, size: int, inodes: int) -> None:
        """Raise EDQUOT or ENOSPC where so many bytes and inodes more would be too many."""
        limits = self.limits(get)
        if self.full:
            raise fs_error(errno.ENOSPC, self.full)
        if limits == NO_LIMIT:
            return
        value = get(items.USAGE_KEY)
        used = items.decode_usage(value) if value is not None else (0, 0)
        if size > 0 and 0 < limits[0] < used[0] + self.held + size:
            for file in list(self._holders.values()):
                self.recount(file)
        if size > 0 and 0 < limits[0] < used[0] + self.held + size:
            raise exceeded("bytes in files", limits[0], used[0] + self.held)
        if inodes > 0 and 0 < limits[1] < used[1] + inodes:
            raise exceeded("files and directories", limits[1], used[1])

    # ------------------------------------------------------------------ writes not committed yet

    async def hold(self, file: "File", end: int) -> None:
        """Take what a write up to `end` makes the file longer; raises EDQUOT, ENOSPC."""
        if self.full or (self.full_of_data and end > SMALL):
            raise fs_error(errno.ENOSPC, self.full or self.full_of_data)
        await self.reserve(file, end)

    async def reserve(self, file: "File", end: int) -> None:
        """`hold` for what needs no chunkserver."""
        if self._session is None:
            raise RuntimeError("a quota without a session holds nothing")
        while True:
            try:
                self._hold(file, end, self._session.view.get)
            except Missing as e:
                await self._session.fetch(e.hashes)
            else:
                return

    def _hold(self, file: "File", end: int, get: Get) -> None:
        if file.size < 0:
            value = get(items.inode_key(file.ino))
            file.size = 0 if value is None else Inode.decode(value).size
        more = end - (file.size if file.cut < 0 else file.counted) - file.held
        if more > 0:
            self.admit(get, more, 0)
            if self.limited:
                self.regain(file, more)

    def settle(self, file: "File", size: int) -> None:
        """The file has `size` bytes committed: hold no more than what its buffer adds to that."""
        self.regain(file, min(0, max(0, file.buffer.end - size) - file.held))

    def recount(self, file: "File") -> None:
        """Settle with the size that is committed as far as the view knows.

        The view has a commit a while before who asked for it goes on; until then what it added is
        used and held.
        """
        if self._session is None or file.cut >= 0:
            return
        value = self._session.view.get(items.inode_key(file.ino))
        file.size, file.span = -1 if value is None else Inode.decode(value).size, None
        self.settle(file, max(0, file.size))

    def release(self, file: "File") -> int:
        """Hold nothing for a file; returns what was held, for `regain`."""
        held = file.held
        self.regain(file, -held)
        return held

    def regain(self, file: "File", held: int) -> None:
        """Hold again what was released: what it was for is still there."""
        file.held += held
        self.held += held
        if file.held:
            self._holders[file.ino] = file
        else:
            self._holders.pop(file.ino, None)


def limits_of(params: dict[str, Any], value: bytes | None) -> tuple[int, int]:
    """(bytes, inodes) that the QUOTA item `value` says, or without one the genesis parameters."""
    if value is not None:
        return items.decode_quota(value)
    return params.get("quota_bytes", 0), params.get("quota_inodes", 0)


async def read_limits(session: "Session") -> tuple[int, int]:
    """(bytes, inodes) of the volume of a session, 0 = no limit."""
    value = await session.read(lambda txn: txn.get(items.QUOTA_KEY))
    return limits_of(session.params, value)


async def read_usage(session: "Session") -> tuple[int, int]:
    """(bytes, inodes) that the volume of a session holds."""
    value = await session.read(lambda txn: txn.get(items.USAGE_KEY))
    return items.decode_usage(value) if value is not None else (0, 0)


async def set_limits(
    session: "Session", size: int | None = None, inodes: int | None = None
) -> tuple[int, int]:
    """Change one limit or both, 0 = no limit; returns what they are then.

    A limit may be less than what is used: then nothing is added until enough is deleted.
    """

    def change(txn: "Txn") -> tuple[int, int]:
        before = limits_of(session.params, txn.get(items.QUOTA_KEY))
        after = before[0] if size is None else size, before[1] if inodes is None else inodes
        txn.put(items.QUOTA_KEY, items.encode_quota(*after))
        return after

    return await session.transact(change)


def exceeded(what: str, limit: int, used: int) -> "FsError":
    """The error of something that goes over a limit."""
    return fs_error(
        errno.EDQUOT,
        f"the volume's quota is {limit} {what} and {used} are used;"
        " delete something or raise it with `dfs volume set`",
    )
