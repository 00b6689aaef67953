"""Opens of names that are replaced or removed meanwhile, as the kernel makes them."""

import contextlib
import errno
import os

import pyfuse3
import pytest
import trio

from dfs.volume import items
from fuse import contention
from fuse.operations import Operations
from tests.unit.client.support import filesystem, new_home, write_file
from tests.unit.fuse.test_adapter import Told


class Root:
    uid = gid = 0


@contextlib.asynccontextmanager
async def mount(home, **options):
    """Operations whose holds are let go in the background."""
    async with filesystem(home, **options) as fs, trio.open_nursery() as nursery:
        ops = Operations(fs, Told())
        nursery.start_soon(ops.contention.run)
        yield ops
        nursery.cancel_scope.cancel()
        await ops.contention.end()


async def make(ops, name, data):
    return await write_file(ops._fs, 1, name, data)


async def look_up(ops, name):
    return (await ops.lookup(1, name, Root)).st_ino


async def opened(ops, ino, flags=os.O_RDONLY):
    """The handle, or the errno."""
    try:
        return (await ops.open(ino, flags, Root)).fh
    except pyfuse3.FUSEError as e:
        return errno.errorcode[e.errno]


async def replace(ops, data):
    await make(ops, b"new", data)
    await ops.rename(1, b"new", 1, b"f", 0, Root)


@pytest.mark.parametrize("delegate", [False, True])
async def test_the_second_attempt_opens_what_it_found_though_that_is_replaced_again(delegate):
    home = new_home()
    home.delegates = delegate
    async with mount(home, delegate=delegate) as ops:
        await make(ops, b"f", b"first")
        first = await look_up(ops, b"f")
        await replace(ops, b"second")
        assert await opened(ops, first) == "ESTALE"
        second = await look_up(ops, b"f")
        await replace(ops, b"third")
        handle = await opened(ops, second)
        assert bytes(await ops.read(handle, 0, 100)) == b"second"
        await ops.release(handle)
        third = await look_up(ops, b"f")
        assert len({first, second, third}) == 3
        await ops.unlink(1, b"f", Root)
        handle = await opened(ops, third)
        assert bytes(await ops.read(handle, 0, 100)) == b"third"
        await trio.sleep(3 * contention.MOMENT)
        # What was held is let go: the one that nobody opened is gone, and nothing is held any more.
        assert await opened(ops, second) == "ESTALE"
        assert not ops.contention._held
        await ops.release(handle)


async def test_nothing_is_held_while_no_open_fails():
    home = new_home()
    async with mount(home) as ops:
        await make(ops, b"f", b"first")
        await look_up(ops, b"f")
        assert not ops._fs.files._files
        ops.contention.failed()
        ino = await look_up(ops, b"f")
        assert ops._fs.files.is_open(ino)
        await trio.sleep(2 * contention.MOMENT)
        assert not ops._fs.files._files
        await look_up(ops, b"f")
        assert not ops._fs.files._files


async def test_what_is_held_and_removed_is_purged_and_at_most_so_many_are_held(monkeypatch):
    monkeypatch.setattr(contention, "HELD", 3)
    home = new_home()
    async with mount(home) as ops:
        ops.contention.failed()
        for i in range(10):
            name = b"f%d" % i
            await make(ops, name, b"x")
            ino = await look_up(ops, name)
            await ops.unlink(1, name, Root)
        await trio.sleep(contention.MOMENT / 2)
        assert len(ops.contention._held) <= 3
        assert isinstance(await opened(ops, ino), int)
        await trio.sleep(2 * contention.MOMENT)
        left = await ops._fs.session.read(
            lambda txn: txn.scan(items.group(items.ADMIN_INO, items.ORPHAN), limit=10)
        )
        assert len(left) == 1  # which is open


@pytest.mark.parametrize("held", [False, True])
async def test_who_opens_while_the_removal_is_on_its_way_waits_for_the_outcome(held):
    home = new_home()
    async with mount(home) as ops:
        fs = ops._fs
        await make(ops, b"f", b"first")
        ino = await look_up(ops, b"f")
        if held:
            ops.contention.failed()
        done = {}

        async def open_it():
            await trio.sleep(0.1)  # the removal is worked out, and on its way
            if held:
                done["found"] = await look_up(ops, b"f")
            done["opened"] = await opened(ops, ino)
            done["at"] = trio.current_time()

        fs.rpc.delay = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await ops.unlink(1, b"f", Root)
            ended = trio.current_time()
        assert done["opened"] == "ESTALE"
        assert done["at"] >= ended
        assert done.get("found", 0) == 0
        assert not fs._leaving


async def test_what_another_mount_removed_is_absent_if_its_name_is():
    home = new_home()
    async with mount(home) as ops, mount(home, seed=1) as other:
        for last in (False, True):
            await make(ops, b"f", b"first")
            first = await look_up(ops, b"f")
            await replace(other, b"second")
            assert await opened(ops, first) == "ESTALE"
            second = await look_up(ops, b"f")
            if last:
                await other.unlink(1, b"f", Root)
            else:
                await replace(other, b"third")
            assert await opened(ops, second) == ("ENOENT" if last else "ESTALE")
            if not last:
                await other.unlink(1, b"f", Root)
            await trio.sleep(2 * contention.MOMENT)
