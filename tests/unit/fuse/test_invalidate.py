"""What the thread tells the kernel: everything once, names and inodes first, then what to prune."""

import errno
import struct
import threading

from fuse.invalidate import PRUNE, PRUNE_AT_ONCE, Invalidator, notify_prune


class Kernel:
    """Notes what it is told; `hold` makes it slow."""

    def __init__(self, prune_error=None):
        self.told = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.done = threading.Event()
        self.prune_error = prune_error

    def inode(self, ino):
        self.entered.set()
        assert self.free.wait(5)
        self.told.append(ino)

    def entry(self, parent, name):
        self.told.append((parent, name))
        if name == b"last":
            self.done.set()

    def prune(self, device, inos):
        self.told.append((device, list(inos)))
        if self.prune_error is not None:
            self.done.set()
            raise self.prune_error
        if inos[-1] == 0:
            self.done.set()

    def invalidator(self):
        return Invalidator(
            invalidate_inode=self.inode, invalidate_entry=self.entry, prune=self.prune
        )


def test_pruning_waits_until_everything_else_is_told():
    kernel = Kernel()
    invalidator = kernel.invalidator()
    invalidator.device = 7
    kernel.free.clear()
    invalidator.inode(1)
    assert kernel.entered.wait(5)
    inos = [*range(1000, 1000 + PRUNE_AT_ONCE), 0]
    invalidator.prune(list(inos))
    invalidator.prune([5])  # the last ones still wait
    invalidator.inode(2)
    invalidator.entry(1, b"x")
    kernel.free.set()
    assert kernel.done.wait(5)
    invalidator.stop()
    assert kernel.told == [1, 2, (1, b"x"), (7, inos[:-1]), (7, [0])]


def test_without_a_device_nothing_is_pruned():
    kernel = Kernel()
    invalidator = kernel.invalidator()
    invalidator.prune([1, 2])
    invalidator.entry(1, b"last")
    assert kernel.done.wait(5)
    assert kernel.told == [(1, b"last")]
    invalidator.device = 3
    invalidator.stop()
    invalidator.prune([1])
    assert kernel.told == [(1, b"last")]


def test_a_kernel_that_cannot_prune_is_asked_once():
    kernel = Kernel(OSError(errno.EINVAL, "Invalid argument"))
    invalidator = kernel.invalidator()
    invalidator.device = 7
    invalidator.prune([1, *range(2, 2000)])
    assert kernel.done.wait(5)
    kernel.done.clear()
    invalidator.entry(1, b"last")  # told after that
    assert kernel.done.wait(5)
    invalidator.prune([9])
    kernel.done.clear()
    invalidator.entry(2, b"last")
    assert kernel.done.wait(5)
    invalidator.stop()
    assert kernel.told == [(7, [1, *range(2, PRUNE_AT_ONCE + 1)]), (1, b"last"), (2, b"last")]


def test_the_notification_is_what_the_kernel_wants(tmp_path):
    with (tmp_path / "device").open("wb") as f:
        notify_prune(f.fileno(), [3, 1 << 60])
    data = (tmp_path / "device").read_bytes()
    assert data == struct.pack("=IiQ", len(data), PRUNE, 0) + struct.pack(
        "=IIQQQ", 2, 0, 0, 3, 1 << 60
    )
