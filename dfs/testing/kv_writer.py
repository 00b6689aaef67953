"""The one writer of a simulated node: whatever changes its rows is in line for a batch.

A batch is applied, written and, a while later, durable; a crash may come between any two of these.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dfs.errors import DfsError
from dfs.testing.kv_store import Op
from metadata import hints as hintfile
from metadata import registers

if TYPE_CHECKING:
    from dfs.testing.kv_shell import Shell

Callback = Callable[[Any], None]


class Writer:
    """Group commit of one process."""

    def __init__(self, process: "Shell") -> None:
        """Nothing is in line."""
        self.process = process
        self.node, self.world = process.node, process.world
        self.queue: list[tuple[int, Any, Callback, bytes]] = []
        self.writing = False

    def enqueue(
        self, request: Any, callback: Callback, epoch: int | None = None, write: bytes = b""
    ) -> None:
        """Get in line for the next batch; `write` is the id of the write that mints."""
        epoch = self.process.map.epoch if epoch is None else epoch
        self.queue.append((epoch, request, callback, write))
        if not self.writing:
            self.writing = True
            self.world.scheduler.after(0.0, self._write)

    def _write(self) -> None:
        if not self.process.alive:
            return
        if self.world.network.stopped(self.node.number):
            self.world.when_continued(self.node.number, self._write)
            return
        work, self.queue = self.queue, []
        process, world, node, store = self.process, self.world, self.node, self.node.store
        node.batches += 1
        before = {r[1]: store.get(r[1]) for _, r, _, _ in work if r[0] == registers.PURGE}
        epoch = process.map.epoch
        ops, replies = process.registers.apply(node.wall_us(), [item[:2] for item in work])
        try:
            store.batch(ops)
        except DfsError as e:
            process.registers.abandon(ops)
            self._next_batch()
            for item in work:
                item[2](e)
            return
        for (_, request, _, write), reply in zip(work, replies, strict=True):
            if request[0] == "p" and not isinstance(reply, DfsError):
                world.minted(process, write, request[2], reply)
            elif request[0] == registers.PURGE and reply is True:
                world.oracle.purge(request[1], before[request[1]], request[2])
        if world.crash_at_write():
            node.crash()
            return
        for item, reply in zip(work, replies, strict=True):
            if self._early(item):
                item[2](reply)
        delay = world.random.random() * world.sync_time if not world.calm else 0.001
        world.scheduler.after(delay, lambda: self._durable(epoch, ops, work, replies))

    def _durable(
        self, epoch: int, ops: Sequence[Op], work: Sequence[Any], replies: Sequence[Any]
    ) -> None:
        if not self.process.alive:
            return
        world = self.world
        if world.network.stopped(self.node.number):
            world.when_continued(self.node.number, lambda: self._durable(epoch, ops, work, replies))
            return
        self.node.store.sync()
        self.process.registers.settle()
        for key, value in ops:
            if value is not None:
                self.kept(key, value)
            elif key[:1] == b"r":
                world.oracle.dropped(key, self.node.number, epoch)
        if world.crash_at_write():
            self.node.crash()
            return
        self._next_batch()
        for item, reply in zip(work, replies, strict=True):
            if not self._early(item):
                item[2](reply)

    def _early(self, item: Any) -> bool:
        """Whether a broken node answers this before it is durable."""
        mutant = self.world.mutant
        return mutant == "hasty" or (mutant == "owncopy" and item[1][0] == "p")

    def kept(self, key: bytes, value: bytes) -> None:
        """A row is on the disk."""
        if key[:1] == b"r":
            self.world.oracle.durable(key, value, self.node.number, hint=False)
        elif key[:1] == b"h":
            hint = hintfile.decode(key, value)
            self.world.oracle.durable(hint.row, hint.register, self.node.number, hint=True)

    def _next_batch(self) -> None:
        self.writing = bool(self.queue)
        if self.writing:
            self.world.scheduler.after(0.0, self._write)
