"""`File`: what this client knows of a regular file that is open or dirty."""

from typing import TYPE_CHECKING

import trio

from dfs.client.writebuffer import WriteBuffer

if TYPE_CHECKING:
    from dfs.errors import FsError
    from dfs.volume import extents


class File:
    """State of one file; owned by `dfs.client.files`, read by `dfs.client.reader`."""

    __slots__ = (
        "before", "buffer", "counted", "cut", "dirty_since", "error", "handles",
        "held", "ino", "lock", "looks", "lost", "mtime", "orphan", "pins", "rhythm", "size", "span",
        "syncs", "writes",
    )  # fmt: skip

    def __init__(self, ino: int) -> None:
        """A file without handles or dirty data."""
        self.ino = ino
        self.handles = 0
        self.buffer = WriteBuffer()
        self.lock = trio.Lock()
        self.error: FsError | None = None  # of a write-back, until raised or made up for
        self.lost = False  # the session ended while the file was dirty: to be told once
        self.mtime = 0  # of the newest write that is not committed
        self.dirty_since = 0.0
        self.looks = 0  # commits so far
        self.writes = 0  # since the last sync; see `dfs.client.foresight`
        self.syncs = 0  # of something written
        self.before = 0  # writes before the last sync, 0 = there was none
        self.rhythm = 0  # writes after which a sync is expected, 0 = who knows
        self.pins = 0  # operations under way that need the file to stay the same object
        self.cut = -1  # size that a truncation under way gives it; -1 = there is none
        self.counted = 0  # size beyond which `held` counts meanwhile
        self.orphan = False  # the last name is gone: purge at the last close
        self.size = -1  # committed size; -1 = ask the view
        self.held = 0  # bytes of the volume's quota for what is not committed
        self.span: tuple[int, int, list[extents.Extent]] | None = None  # cached committed extents
