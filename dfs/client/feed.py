"""Feeding a view: journal entries in order, tree nodes when they are missing."""

import errno
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from dfs.client.connect import BlobSource
from dfs.client.warmup import Warmup
from dfs.errors import DfsError, FsError
from dfs.volume import effects as fx
from dfs.volume import entries
from dfs.volume.tree import Missing
from dfs.volume.view import NodeCache, View

LOOK_AHEAD = 256  # entries
AT_ONCE = 16  # nodes that whoever misses some waits for; the others follow, and are on their way

Entries = Iterable[tuple[int, bytes]]
Note = Callable[[entries.Entry, list[bytes]], None]
Known = Callable[[entries.Entry, int], bool]


class Feed:
    """The view of one session, and what keeps it up.

    Entries come from several tasks in any order; they wait in a dict until it is their turn.  No
    lock is needed, because an entry leaves the dict in the same step that applies it.
    `known(entry, seq)` is asked before each: True = the view holds it already, and was told so.
    `note(entry, changed keys)` is called for each one applied.
    """

    def __init__(
        self, blobs: BlobSource, volume: bytes, known: Known, note: Note, timeout: float
    ) -> None:
        """`timeout` seconds are given to a fetch of tree nodes."""
        self.nodes = NodeCache()
        self.view: View
        self.fetched = 0
        self._blobs = blobs
        self._volume = volume
        self._known = known
        self._note = note
        self._timeout = timeout
        self._pending: dict[int, bytes] = {}
        self._fetching: dict[bytes, trio.Event] = {}
        self.warmup = Warmup(partial(self.fetch, ahead=True))

    def start(self, root: bytes, seq: int, salt: bytes) -> None:
        """The view from a checkpoint, when there is none yet or another session begins."""
        self._pending.clear()
        if hasattr(self, "view"):
            self.view.reset(root, seq)
        else:
            self.view = View(self.nodes, root, seq, salt)
        self.warmup.begin(self.view)

    def reset(self, root: bytes, seq: int) -> None:
        """Jump ahead to a checkpoint; what was done here and is in no entry yet is kept."""
        self.view.jump(root, seq)
        self.warmup.begin(self.view)
        self._pending = {at: e for at, e in self._pending.items() if at > seq}

    async def absorb(self, received: Entries) -> bool:
        """Apply entries in order, fetching the tree nodes that needs; whether the view moved."""
        seq = self.view.seq
        for at in [at for at in self._pending if at <= seq]:
            del self._pending[at]
        for at, entry in received:
            if at > seq:
                self._pending[at] = entry
        while (missing := self._apply_pending()) is not None:
            await self.fetch(list(dict.fromkeys((*missing.hashes, *self._missing_later()))))
        return self.view.seq > seq

    def _missing_later(self) -> tuple[bytes, ...]:
        """Nodes that the entries after the next one need: one round trip for many of them."""
        wanted: list[fx.Effect] = []
        first = self.view.seq + 2
        for seq in range(first, first + LOOK_AHEAD):
            entry = self._pending.get(seq)
            if entry is None:
                break
            wanted += fx.of_entry(entries.decode(entry))
        return self.view.missing_for(wanted) if wanted else ()

    def _apply_pending(self) -> Missing | None:
        view, pending = self.view, self._pending
        while (entry := pending.get(view.seq + 1)) is not None:
            seq = view.seq + 1
            decoded = entries.decode(entry)
            if self._known(decoded, seq):
                del pending[seq]
                self._note(decoded, [])
                continue
            try:
                changed = view.apply_effects(seq, fx.of_entry(decoded))
            except Missing as e:
                return e
            if decoded.kind == entries.CHECKPOINT:
                self.warmup.move(view, decoded.body[1], decoded.body[0])
            del pending[seq]
            self._note(decoded, changed)
        return None

    async def fetch(self, hashes: Sequence[bytes], *, ahead: bool = False) -> None:
        """Get tree nodes into the cache; concurrent calls for one node share the fetch.

        `ahead`: perhaps nobody will look at them.
        """
        if not ahead and len(hashes) > AT_ONCE and self.warmup.follow(hashes[AT_ONCE:]):
            hashes = hashes[:AT_ONCE]
        wanted = [h for h in hashes if h not in self._fetching]
        others = [self._fetching[h] for h in hashes if h in self._fetching]
        if wanted:
            event = trio.Event()
            self._fetching.update(dict.fromkeys(wanted, event))
            try:
                found = await self._blobs.get_many(wanted, timeout=self._timeout)
                if ahead:
                    self.nodes.keep(found)
                else:
                    self.nodes.add(found)
                self.fetched += len(found)
            except DfsError as e:
                raise FsError(f"tree of volume {self._volume.hex()}: {e}", errno.EIO) from e
            finally:
                for h in wanted:
                    del self._fetching[h]
                event.set()
        for event in others:
            await event.wait()
