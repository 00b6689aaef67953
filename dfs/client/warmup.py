"""Warm-up: the tree's nodes are fetched before anybody asks for them.

Twice a view has next to nothing of its tree at hand, and whoever reads next would wait for it node
by node.  A view that was just opened has an empty cache: the tree is fetched from the root down,
the newest leaves first, as far as half of the cache goes.  And a checkpoint moves to the tree what
the view had as journal entries, in memory: the view stays with the tree that it has until nobody
changes anything for a moment and the nodes that hold those items are here, then moves over.  While
the volume is changed all the time there is no time for that, and it moves over without.  Nothing
but speed depends on either.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence

import trio

from dfs.errors import DfsError
from dfs.volume import tree
from dfs.volume.node import Missing, Node
from dfs.volume.view import View

log = logging.getLogger(__name__)

BATCH = 64  # nodes fetched at once, about half a MiB: others wait 2 ms for the loop meanwhile
SHARE = 2  # the part of the cache that one warm-up may fill
SLICE = 1000  # keys that are looked up without giving others a turn
LULL = 0.5  # seconds without an entry
UNSEEN = 300.0  # seconds after which nodes that nobody has looked at are dropped
PATIENCE = 10.0  # seconds that the view stays with its old tree for the sake of the new one


class Warmup:
    """Keeps one view's tree at hand, while `run` runs; without it, every move is made at once."""

    def __init__(self, fetch: Callable[[Sequence[bytes]], Awaitable[None]]) -> None:
        """`fetch` gets nodes into the view's cache, and raises a `DfsError` when it cannot."""
        self.fetched = 0
        self._fetch = fetch
        self._view: View | None = None
        self._cold = False
        self._next: tuple[bytes, int] | None = None  # the tree to move over to, and what it covers
        self._running = False
        self._nursery: trio.Nursery | None = None
        self._room = 0  # bytes that may still be fetched
        self._work = trio.lowlevel.ParkingLot()
        self._warm = trio.Event()

    def begin(self, view: View) -> None:
        """The view stands at a checkpoint that it has not seen before."""
        self._view, self._cold, self._next = view, True, None
        self._work.unpark_all()

    def move(self, view: View, root: bytes, seq: int) -> None:
        """A checkpoint holds everything up to `seq`: have the view move over, soon."""
        if self._running:
            if self._next is not None:  # what the view holds in memory is of two trees at most
                view.rebase(*self._next)
            self._next = (root, seq)
            self._work.unpark_all()
        else:
            view.rebase(root, seq)

    def follow(self, names: Sequence[bytes]) -> bool:
        """Fetch nodes that somebody will want in a moment; whether that will be done."""
        nursery, view = self._nursery, self._view
        if nursery is None or view is None:
            return False
        names = [name for name in names if name not in view.nodes]
        if names:
            nursery.start_soon(self._quietly, self._fetch(names))
        return True

    async def wait_warm(self) -> None:
        """Until as much of the tree as there is room for was fetched once, or could not be."""
        await self._warm.wait()

    async def run(self) -> None:
        """Until cancelled."""
        self._running = True
        try:
            async with trio.open_nursery() as self._nursery:
                await self._work_on()
        finally:
            self._running, self._nursery = False, None
            if self._view is not None and self._next is not None:
                self._view.rebase(*self._next)
                self._next = None

    async def _work_on(self) -> None:
        kept = False
        while True:
            view = self._view
            if view is not None and self._next is not None:
                kept = True
                await self._move_over(view, self._next)
            elif view is not None and self._cold:
                self._cold, kept = False, True
                with trio.move_on_after(PATIENCE):
                    await self._quietly(self._fetch_tree(view, view.root))
                self._warm.set()
            else:
                with trio.move_on_after(UNSEEN if kept else math.inf) as unused:
                    await self._work.park()
                if unused.cancelled_caught and view is not None:
                    view.nodes.drop_unseen()
                    kept = False

    async def _move_over(self, view: View, target: tuple[bytes, int]) -> None:
        with trio.move_on_after(PATIENCE):
            seq = -1
            while seq != view.seq and self._next is target:
                seq = view.seq
                await trio.sleep(LULL)
            await self._quietly(self._fetch_changed(view, target))
        if self._next is target:  # no later checkpoint, no other session
            self._next = None
            view.rebase(*target)

    async def _quietly(self, fetching: Awaitable[None]) -> None:
        try:
            await fetching
        except DfsError as e:  # whoever needs a node will try again, and be told
            log.debug("warm-up: %s", e)

    async def _fetch_tree(self, view: View, root: bytes) -> None:
        """Everything from the root down, inner nodes first, as far as there is room."""
        self._room = view.nodes.budget // SHARE
        names, level = [root] if root else [], -1  # not known
        while names:
            for start in range(0, len(names), BATCH):
                if view.root != root or self._next is not None:
                    self._cold = True  # go on with the next tree: they have most nodes in common
                    return
                if not await self._bring(view, names[start : start + BATCH]):
                    return
            if level == 0:  # to look at leaves would decode them
                return
            nodes = _held(view, names)
            if not nodes or nodes[0].level == 0:
                return
            level = nodes[0].level - 1
            names = [child for node in nodes for child in node.values]
            if level == 0:  # the root directory's leaf, then from the newest inodes back
                names[1:] = names[:0:-1]

    async def _fetch_changed(self, view: View, target: tuple[bytes, int]) -> None:
        """The nodes of another tree that hold what the view has in memory and would drop."""
        root, covered = target
        self._room = view.nodes.budget // SHARE
        keys = view.changed_until(covered)
        for start in range(0, len(keys), SLICE):
            part = keys[start : start + SLICE]
            while absent := tree.missing(view.nodes.get, root, part):
                for at in range(0, len(absent), BATCH):
                    if self._next is not target or not await self._bring(
                        view, absent[at : at + BATCH]
                    ):
                        return
            await trio.lowlevel.checkpoint()

    async def _bring(self, view: View, names: Sequence[bytes]) -> bool:
        """Fetch those that are not here; whether there is room for more."""
        nodes = view.nodes
        absent = [name for name in names if name not in nodes]
        if absent:
            before = nodes.added
            await self._fetch(absent)
            self.fetched += len(absent)
            self._room -= nodes.added - before
        return self._room > 0


def _held(view: View, names: Sequence[bytes]) -> list[Node]:
    found: list[Node] = []
    for name in names:
        try:
            found.append(view.nodes.get(name))
        except Missing:
            continue
    return found
