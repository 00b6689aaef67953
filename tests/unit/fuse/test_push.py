"""Pushing small files to the kernel when they are opened."""

import errno
import os

from fuse.operations import Operations
from fuse.push import LIMIT
from tests.unit.client.support import filesystem, new_home, write_file
from tests.unit.fuse.test_adapter import Told


class Ctx:
    uid = gid = 0


class Kernel:
    """Notes what is stored; may refuse."""

    def __init__(self, code=0):
        self.code = code
        self.stored = []

    def __call__(self, ino, offset, data):
        self.stored.append((ino, offset, bytes(data)))
        if self.code:
            raise OSError(self.code, "refused")


def mounted(fs, kernel):
    operations = Operations(fs, Told())
    operations.push.store = kernel
    return operations


async def read_only(operations, ino, flags=os.O_RDONLY):
    info = await operations.open(ino, flags, Ctx)
    await operations.release(info.fh)


async def test_a_small_file_is_pushed_once_and_again_when_the_kernel_has_forgotten_it():
    async with filesystem(new_home()) as fs:
        ino = await write_file(fs, 1, b"f", b"abc" * 1000)
        kernel = Kernel()
        operations = mounted(fs, kernel)
        await operations.lookup(1, b"f", Ctx)
        await read_only(operations, ino)
        await read_only(operations, ino)
        assert kernel.stored == [(ino, 0, b"abc" * 1000)]
        await operations.forget([(ino, 1)])
        await read_only(operations, ino)
        assert kernel.stored == [(ino, 0, b"abc" * 1000)] * 2


async def test_what_somebody_else_wrote_is_pushed():
    home = new_home()
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        ino = await write_file(fs, 1, b"f", b"old")
        kernel = Kernel()
        operations = mounted(fs, kernel)
        await operations.lookup(1, b"f", Ctx)
        await read_only(operations, ino)
        handle = await other.open(ino, writable=True)
        await other.write(handle, 0, b"newer")
        await other.release(handle)
        await read_only(operations, ino)
        assert [data for _, _, data in kernel.stored] == [b"old", b"newer"]


async def test_only_what_the_kernel_can_know_no_better_is_pushed():
    async with filesystem(new_home()) as fs:
        kernel = Kernel()
        operations = mounted(fs, kernel)
        open_here = await write_file(fs, 1, b"a", b"abc")
        info = await operations.open(open_here, os.O_RDWR, Ctx)
        await read_only(operations, open_here)  # the other handle may be writing
        await operations.release(info.fh)
        await read_only(operations, open_here, os.O_RDWR)
        dirty = await write_file(fs, 1, b"b", b"abc")
        file = fs.files.open(dirty)
        await fs.files.write(file, 0, b"ABC")
        file.handles -= 1
        await read_only(operations, dirty)
        for name, size in ((b"empty", 0), (b"large", LIMIT + 1)):
            await read_only(operations, await write_file(fs, 1, name, bytes(size)))
        chunk = await write_file(fs, 1, b"chunk", os.urandom(LIMIT - 1))
        await read_only(operations, chunk)
        assert kernel.stored == []
        hole, handle = await fs.create(1, b"hole", 0o644)
        await fs.write(handle, 100, b"x")
        await fs.release(handle)
        await read_only(operations, hole.ino)
        assert kernel.stored == [(hole.ino, 0, bytes(100) + b"x")]


async def test_a_kernel_that_does_not_take_it_is_not_asked_again():
    async with filesystem(new_home()) as fs:
        inos = [await write_file(fs, 1, b"f%d" % i, b"abc") for i in range(3)]
        for code, times in ((errno.ENOENT, 3), (errno.ENOMEM, 3), (errno.ENOSYS, 1)):
            kernel = Kernel(code)
            operations = mounted(fs, kernel)
            for ino in inos:
                await read_only(operations, ino)
            assert len(kernel.stored) == times
