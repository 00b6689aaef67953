"""READDIRPLUS: filling the kernel's buffer with a directory's entries, or with their names only.

`fuse.listing` says which, `fuse.bare` how.  The kernel counts each entry with attributes as looked
up if it took it, but neither `.` and `..` nor bare names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyfuse3

from dfs.client.atimes import AccessTimes
from dfs.client.filesystem import Attr, FileSystem
from dfs.volume import items
from fuse import bare
from fuse.inodes import InodeTable
from fuse.listing import Listings

PAGE_MIN, PAGE_FIRST, PAGE_MAX = 32, 256, 2048  # entries that are asked for at once

Fill = Callable[[pyfuse3.EntryAttributes, Attr], pyfuse3.EntryAttributes]


class Directories:
    """What all open directories of a mount have in common, and who reads large ones."""

    def __init__(
        self,
        fs: FileSystem,
        inodes: InodeTable,
        blank: pyfuse3.EntryAttributes,
        fill: Fill,
        atimes: AccessTimes | None = None,
    ) -> None:
        """`fill(blank, attr)` puts attributes into an entry: one for all, since a reply copies it.

        `atimes` keeps access times.
        """
        self._fs = fs
        self._inodes = inodes
        self._blank = blank
        self._fill = fill
        self._atimes = atimes
        self._bare = bare.BareEntry() if bare.SUPPORTED else None
        self._page = PAGE_FIRST  # entries that fit in the kernel's buffer, as seen last
        self.listings = Listings()

    async def read(self, fh: int, ino: int, start: int, token: Any) -> None:
        """Fill the buffer behind `token` from the cookie `start` on."""
        for cookie, name in ((1, b"."), (2, b"..")):
            if start < cookie:
                attr = await self._fs.lookup(ino, name)
                if cookie == 1:
                    if self._atimes is not None:
                        self._atimes.accessed(attr)
                    self.listings.begin(fh, ino, attr.size if self._bare is not None else 0)
                if not pyfuse3.readdir_reply(token, name, self._fill(self._blank, attr), cookie):
                    return
                start = cookie
        listing = self.listings.get(fh)
        if listing is None or self._bare is None:
            await self._entries(fh, ino, start, token, None)
        elif listing.turn():
            listing.shown(await self._names(fh, start, token, self._bare))
        else:
            listing.shown(1, await self._entries(fh, ino, start, token, self._bare))

    async def _entries(
        self, fh: int, ino: int, start: int, token: Any, first: bare.BareEntry | None
    ) -> bytes:
        """Entries with attributes; returns the name of the first one, bare if `first` is given."""
        fs, looked_up, fill, blank = self._fs, self._inodes.looked_up, self._fill, self._blank
        reply, entry_key = pyfuse3.readdir_reply, items.entry_key
        limit, total, probe = self._page, 0, b""
        while True:
            entries = await fs.readdir(fh, start, limit)
            taken = len(entries)
            for n, (name, cookie, attr) in enumerate(entries):
                if first is not None:
                    if not reply(token, name, first.fill(attr.ino, attr.kind), cookie):
                        taken = n
                        break
                    probe, first = name, None
                else:
                    if not reply(token, name, fill(blank, attr), cookie):
                        taken = n
                        break
                    looked_up(attr.ino, entry_key(ino, cookie), name)
                start = cookie
            if self._done(fh, entries, taken, total):
                return probe
            total += taken
            limit = PAGE_MIN

    async def _names(self, fh: int, start: int, token: Any, entry: bare.BareEntry) -> int:
        """Entries without attributes; returns how many."""
        fs, reply, fill = self._fs, pyfuse3.readdir_reply, entry.fill
        limit, total = self._page, 0
        while True:
            names = await fs.readdir_names(fh, start, limit)
            taken = len(names)
            for n, (name, cookie, child, kind) in enumerate(names):
                if not reply(token, name, fill(child, kind), cookie):
                    taken = n
                    break
                start = cookie
            done = self._done(fh, names, taken, total)
            total += taken
            if done:
                return total
            limit = PAGE_MIN

    def _done(self, fh: int, found: Sequence[tuple[Any, ...]], taken: int, before: int) -> bool:
        """Note that the kernel took the first `taken` of `found`, and so many before them.

        Returns whether its buffer is full or the directory at its end.
        """
        # The reader's place is a cookie and which of its names were taken; mostly that is one.
        place = found[taken - 1][1] if taken else 0
        for name, cookie, *_ in reversed(found[:taken]):
            if cookie != place:
                break
            self._fs.returned(fh, name, cookie)
        if taken < len(found):
            # As many fit, and one more is needed to see that: fetch no more the next time.
            self._page = max(PAGE_MIN, min(before + taken + 1, PAGE_MAX))
            return True
        return not found
