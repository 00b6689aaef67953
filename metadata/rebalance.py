"""Pushing partitions to their new homes: what a node of A does in the first phase of a transition.

It begins once this node is *fenced*: nothing that was judged by an older map is worked on here any
more, so all it accepts from then on goes to both sets of homes by itself, and what it holds already
is all there is to push.  Each new home has a task of its own, so that one which is down keeps only
its own partitions waiting.  What was pushed is remembered durably (row `n` `rebalance`): after a
restart the push goes on where it was.

What moves a partition is passed in as `push(partition, to)`, which returns the number of bytes or
rows it sent once all of it is durable there, and raises when it is not.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from dfs.cluster.joint import BITMAP_SIZE, bitmap, has
from dfs.cluster.map import METADATA, ClusterMap
from dfs.codec import pack, unpack
from dfs.env import Env, Priority
from dfs.errors import Corrupt, DfsError
from dfs.hashing import PARTITIONS, digest
from dfs.rpc.mapkeeper import MapKeeper
from metadata.blobs import PREFIX
from metadata.store.engine import Store

log = logging.getLogger(__name__)

KEY = b"nrebalance"
FORMAT = 1
LOOK = 0.5  # seconds between looks for a transition
SAVE_EVERY = 5.0  # seconds between notes of what was pushed
AGAIN = (1.0, 30.0)  # seconds after a failed push: first, longest
STREAMS = 8  # partitions pushed to one new home at the same time
RATE = 64 << 20  # bytes a second and new home
PUT_TIMEOUT = 5.0  # seconds for one request, which has at most 64 blobs

GROUP = 64  # blobs in one request

Push = Callable[[int, int], Awaitable[int]]


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
        self.sent = 0  # bytes or rows, since the start
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
            if began and self.rule_fenced(began):
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
            await trio.sleep(LOOK)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_with, nursery.cancel_scope, began)
            async with trio.open_nursery() as pushes:
                for node, partitions in sorted(todo.items()):
                    for stream in range(STREAMS):
                        pushes.start_soon(self._push_to, node, partitions[stream::STREAMS])
            nursery.cancel_scope.cancel()
        await self._save(now=True)

    async def _stop_with(self, scope: trio.CancelScope, began: int) -> None:
        while beginning(self._keeper()) == began:
            await self._keeper.wait_for(self._keeper().epoch + 1)
        scope.cancel()

    async def _push_to(self, node: int, partitions: list[int]) -> None:
        pause = AGAIN[0]
        for p in partitions:
            while True:
                try:
                    sent = await self.push(p, node)
                except DfsError as e:
                    self.errors[node] = str(e)
                    log.info("pushing partition %d to node %d: %s", p, node, e)
                    await trio.sleep(pause * self._env.random.uniform(0.5, 1.0))
                    pause = min(2 * pause, AGAIN[1])
                    continue
                break
            pause = AGAIN[0]
            self.errors.pop(node, None)
            self._done.setdefault(node, set()).add(p)
            self._dirty = True
            self.sent += sent
            self.left -= 1
            await self._save()
            await trio.sleep(sent * STREAMS / RATE)

    # ------------------------------------------------------------------------------------ memory

    def _load(self, began: int) -> dict[int, set[int]]:
        stored = self._store.get(KEY) if began else None
        if stored is None:
            return {}
        try:
            version, epoch, pushed = unpack(stored)
            if version != FORMAT or epoch != began:
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


def beginning(current: ClusterMap) -> int:
    """Epoch in which the metadata transition began, while in its first phase; else 0."""
    if current.phase(METADATA) != 1:
        return 0
    return current.last_change(METADATA, current.changed(METADATA)[0])


class BlobPush:
    """Pushes the blobs of a partition with `blob.put`; what is there already costs a look-up."""

    def __init__(self, env: Env, keeper: MapKeeper, store: Store) -> None:
        """Read blobs from `store`, row `b` hash."""
        self._env = env
        self._keeper = keeper
        self._store = store

    async def __call__(self, partition: int, to: int) -> int:
        """Push one partition; the number of bytes sent."""
        after = PREFIX + (partition << 4).to_bytes(2, "big")  # no name is as short as that
        end = PREFIX + ((partition + 1) << 4).to_bytes(3, "big")[-2:]
        if partition == PARTITIONS - 1:
            end = bytes([PREFIX[0] + 1])
        sent = 0
        while True:
            rows = self._store.scan(PREFIX, after, GROUP, end=end)
            if not rows:
                return sent
            after = rows[-1][0]
            good = [(key[1:], data) for key, data in rows if digest(data) == key[1:]]
            names = [(name, len(data)) for name, data in good]
            blobs = [data for _, data in good]
            current = self._keeper()
            await self._env.rpc.call(
                current.address(METADATA, to),
                "blob.put",
                (tuple(names),),
                blobs,
                timeout=PUT_TIMEOUT,
                priority=Priority.BACKGROUND,
                epoch=current.epoch,
            )
            sent += sum(map(len, blobs))
