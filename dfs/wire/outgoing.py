"""What a connection has yet to send: by priority, small things joined, bulk never copied."""

from collections import deque
from collections.abc import Sequence

from dfs.codec import Buffer
from dfs.wire.frame import PRIORITIES

SMALL = 4096  # shorter data is copied behind its header: cheaper than one more buffer to gather
_BATCH = 256 << 10  # bytes after which a batch is closed, so that a higher priority can overtake
_GATHER = 256  # buffers handed out at once; the kernel's limit is 1024


class SendQueue:
    """Frames wait here; `batch()` gives the next buffers to send, `sent(n)` says how much went out.

    A frame is sent whole: higher priorities overtake between frames, never inside one.  Bulk
    buffers are sent from where they are; the caller must leave them alone until they are sent.
    """

    __slots__ = ("_batch", "_queues", "size")

    def __init__(self) -> None:
        """Empty."""
        self._queues: tuple[deque[tuple[bytes, Sequence[Buffer]]], ...] = tuple(
            deque() for _ in range(PRIORITIES)
        )
        self._batch: list[Buffer] = []
        self.size = 0  # bytes not sent yet

    def put(self, priority: int, head: bytes, data: Sequence[Buffer], data_length: int) -> None:
        """Queue a frame: its encoded header and meta, its data."""
        if data and data_length <= SMALL:
            head = b"".join((head, *data))
            data = ()
            data_length = 0
        self._queues[priority].append((head, data))
        self.size += len(head) + data_length

    def batch(self) -> list[Buffer]:
        """The next buffers to send, in order; empty when there is nothing."""
        if self._batch or not self.size:
            return self._batch[:_GATHER]
        out: list[Buffer] = []
        small: list[bytes] = []
        total = 0
        for queue in self._queues:
            while queue and total < _BATCH:
                head, data = queue.popleft()
                small.append(head)
                total += len(head)
                for part in data:
                    if small:
                        out.append(b"".join(small))
                        small.clear()
                    out.append(part)
                    total += len(part)
        if small:
            out.append(small[0] if len(small) == 1 else b"".join(small))
        self._batch = out
        return out[:_GATHER]

    def sent(self, n: int) -> None:
        """`n` bytes of what `batch()` gave are with the kernel."""
        self.size -= n
        batch = self._batch
        done = 0
        for part in batch:
            length = len(part)
            if n < length:
                break
            n -= length
            done += 1
        del batch[:done]
        if n:
            batch[0] = memoryview(batch[0])[n:]

    def clear(self) -> None:
        """Drop everything."""
        for queue in self._queues:
            queue.clear()
        self._batch = []
        self.size = 0
