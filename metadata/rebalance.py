"""Pushing partitions to their new homes: what a node of A does in the first phase of a transition.

It begins once this node is *fenced*: nothing that was judged by an older map is worked on here any
more, so all it accepts from then on goes to both sets of homes by itself, and what it holds already
is all there is to push.  Each new home has a task of its own, so that one which is down keeps only
its own partitions waiting.  What was pushed is remembered durably (row `n` `rebalance`): after a
restart the push goes on where it was.

Partitions are pushed in batches, since most cost a comparison and no more: a batch grows while it
is done quickly, shrinks while it is slow, and what fails of it is tried again.

What moves partitions is passed in as `push(partitions, to, rest)`; it says which of them failed
once all of the others is durable there, raises when it cannot say, and awaits
`rest(bytes, backlog)` between its steps.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from dfs.cluster.joint import BITMAP_SIZE, bitmap, has
from dfs.cluster.map import METADATA, ClusterMap
from dfs.codec import pack, unpack
from dfs.env import Env
from dfs.errors import Corrupt, DfsError
from dfs.rpc.mapkeeper import MapKeeper
from metadata.exchange import Outcome
from metadata.store.engine import Store
from metadata.synchronise import Resting

log = logging.getLogger(__name__)

KEY = b"nrebalance"
FORMAT = 1
LOOK = 0.05  # seconds between looks whether this node is fenced
SAVE_EVERY = 5.0  # seconds between notes of what was pushed
AGAIN = (0.2, 5.0)  # seconds after a failed push: first, longest
STREAMS = 4  # batches pushed to one new home at the same time
RATE = 64 << 20  # bytes a second and new home
BATCH = (1, 64, 1024)  # partitions: least, at first, most
QUICK, SLOW = 0.3, 2.0  # seconds: a batch that took less (more) makes the next one larger (smaller)

Push = Callable[[Sequence[int], int, Resting], Awaitable[Outcome]]


class Rebalance:
    """The worker.  `pushed` is what `dfs.cluster.joint.Progress` reports."""

    def __init__(self, env: Env, number: int, keeper: MapKeeper, store: Store, push: Push) -> None:
        """Nothing happens before `run`."""
        self._env = env
        self._number = number
        self._keeper = keeper
        self._store = store
        self.push = push
        self._epoch = 0  # in which the present transition began
        self._done: dict[int, set[int]] = {}  # new home -> partitions
        self._dirty = False
        self._saved_at = 0.0
        self.sent = 0  # bytes, since the start
        self.left = 0  # (partition, new home) pairs to go
        self.errors: dict[int, str] = {}  # new home -> why its last push failed

    @property
    def pushed(self) -> dict[int, bytes]:
        """New home -> bitmap of the partitions that it has from here, in this transition."""
        if self._epoch != beginning(self._keeper()):
            return {}
        return {node: bitmap(found) for node, found in self._done.items()}

    async def run(self) -> None:
        """Push what the map asks for, until cancelled."""
        while True:
            current = self._keeper()
            began = beginning(current)
            if began != self._epoch:
                self._epoch, self._done = began, self._load(began)
                self.left = 0
                self.errors = {}
            if not began:
                await self._keeper.wait_for(current.epoch + 1)
            elif self.rule_fenced(began):
                await self._push_all(current, began)
            else:
                await trio.sleep(LOOK)

    def rule_fenced(self, began: int) -> bool:
        """A push counts only if nothing judged by an older map is under way when it begins."""
        return self._keeper.fenced >= began

    def todo(self, current: ClusterMap) -> dict[int, list[int]]:
        """New home -> partitions it does not have from here yet."""
        found: dict[int, list[int]] = {}
        me = self._number
        for p in current.changed(METADATA):
            if me not in current.old_homes(METADATA, p):
                continue
            for node in current.homes(METADATA, p):
                if node != me and p not in self._done.get(node, ()):
                    found.setdefault(node, []).append(p)
        return found

    async def _push_all(self, current: ClusterMap, began: int) -> None:
        """One round: every new home in its own task; ends when the map changes, too."""
        todo = self.todo(current)
        self.left = sum(map(len, todo.values()))
        if not todo:
            await self._save(now=True)
            await self._keeper.wait_for(current.epoch + 1)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_with, nursery.cancel_scope, began)
            async with trio.open_nursery() as pushes:
                for node, partitions in sorted(todo.items()):
                    home = _Home(node, deque(partitions))
                    for _ in range(STREAMS):
                        pushes.start_soon(self._push_to, home)
            nursery.cancel_scope.cancel()
        await self._save(now=True)

    async def _stop_with(self, scope: trio.CancelScope, began: int) -> None:
        while beginning(self._keeper()) == began:
            await self._keeper.wait_for(self._keeper().epoch + 1)
        scope.cancel()

    async def _push_to(self, home: "_Home") -> None:
        """One stream: take batches until none are left, failed ones included."""
        clock, node = self._env.clock, home.node

        async def rest(size: int, _backlog: int) -> None:
            self.sent += size
            await trio.sleep(size * STREAMS / RATE)

        while home.queue or home.under_way:
            if not home.queue:  # what others are at may come back
                await home.news.wait()
                continue
            batch = [home.queue.popleft() for _ in range(min(home.batch, len(home.queue)))]
            home.under_way += 1
            began = clock.monotonic()
            failed: Sequence[int] = batch
            try:
                outcome = await self.push(batch, node, rest)
            except DfsError as e:
                why = str(e)
            else:
                failed = outcome.failed
                why = outcome.errors[0] if failed else ""
            missing = set(failed)
            self._pushed(node, [p for p in batch if p not in missing])
            home.took(clock.monotonic() - began, len(batch), bool(failed))
            if failed:
                self.errors[node] = why
                log.info("pushing %d partitions to node %d: %s", len(failed), node, why)
                pause = home.pause
                await trio.sleep(pause * self._env.random.uniform(0.5, 1.0))
                home.queue.extend(failed)
            else:
                self.errors.pop(node, None)
            home.ended()
            await self._save()

    def _pushed(self, node: int, partitions: list[int]) -> None:
        if partitions:
            self._done.setdefault(node, set()).update(partitions)
            self._dirty = True
            self.left -= len(partitions)

    # ------------------------------------------------------------------------------------ memory

    def _load(self, began: int) -> dict[int, set[int]]:
        stored = self._store.get(KEY) if began else None
        if stored is None:
            return {}
        try:
            version, *rest = unpack(stored)
            if version != FORMAT:
                return {}  # a newer version's; pushing again costs comparisons
            epoch, pushed = rest
            if epoch != began:
                return {}  # of another transition
            if any(len(bits) != BITMAP_SIZE for _, bits in pushed):
                raise ValueError("bitmaps of another size")  # noqa: TRY301 - judged below
        except (DfsError, TypeError, ValueError) as e:
            raise Corrupt(f"the note of what was pushed is unreadable: {e}") from e
        return {node: {p for p in range(8 * len(bits)) if has(bits, p)} for node, bits in pushed}

    async def _save(self, *, now: bool = False) -> None:
        time = self._env.clock.monotonic()
        if self._dirty and (now or time >= self._saved_at + SAVE_EVERY):
            self._dirty, self._saved_at = False, time
            value = pack((FORMAT, self._epoch, tuple(sorted(self.pushed.items()))))
            await self._store.batch([(KEY, value)])

    def statistics(self) -> dict[str, Any]:
        """For status lines."""
        return {"left": self.left, "sent": self.sent, "failing": tuple(self.errors.values())}


class _Home:
    """What is to be pushed to one new home, shared by the streams to it."""

    def __init__(self, node: int, queue: deque[int]) -> None:
        self.node = node
        self.queue = queue
        self.under_way = 0  # batches
        self.batch = BATCH[1]
        self.pause = AGAIN[0]
        self.news = trio.Event()

    def took(self, seconds: float, size: int, failed: bool) -> None:
        """Judge the next batch by one of `size`."""
        least, _, most = BATCH
        if failed:
            self.pause = min(2 * self.pause, AGAIN[1])
        else:
            self.pause = AGAIN[0]
        if seconds > SLOW or failed:
            self.batch = max(least, min(self.batch, size // 2))
        elif seconds < QUICK and size >= self.batch:
            self.batch = min(most, 2 * self.batch)

    def ended(self) -> None:
        self.under_way -= 1
        news, self.news = self.news, trio.Event()
        news.set()


def beginning(current: ClusterMap) -> int:
    """Epoch in which the metadata transition began, while in its first phase; else 0."""
    if current.phase(METADATA) != 1:
        return 0
    return current.last_change(METADATA, current.changed(METADATA)[0])
