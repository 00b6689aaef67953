"""The parts of the FUSE adapter that need no kernel: errors, lookup counts, invalidation."""

import errno
import logging
import os
import threading
import time
from types import SimpleNamespace

import pyfuse3
import pytest
import trio

from dfs.client.atimes import AccessTimes
from dfs.client.filesystem import Caller
from dfs.errors import ConfigError, FsError, NoQuorum
from fuse.__main__ import Ready, main
from fuse.invalidate import Invalidator
from fuse.mount import MountOptions, check_system
from fuse.mountpoint import check_mountpoint
from fuse.operations import HANDLERS, TIMEOUT, Operations, _answering
from tests.unit.client.support import filesystem, new_home, write_file


class Told:
    """An `Invalidator` that only notes."""

    def __init__(self):
        self.inodes, self.entries = [], []

    def inode(self, ino):
        self.inodes.append(ino)

    def entry(self, parent, name):
        self.entries.append((parent, name))

    def prune(self, inos):
        pass

    def is_pending(self, ino):
        return False


async def answer(error):
    @_answering
    async def handler(self):
        raise error

    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handler(SimpleNamespace(waits=lambda: None))
    return caught.value.errno


async def test_every_error_becomes_an_errno(caplog):
    assert await answer(FsError("x", errno.ENOTEMPTY)) == errno.ENOTEMPTY
    assert await answer(NoQuorum("x")) == errno.EIO
    assert await answer(pyfuse3.FUSEError(errno.ENOSYS)) == errno.ENOSYS
    caplog.clear()
    assert await answer(KeyError("bug")) == errno.EIO
    assert caplog.records[-1].levelno == logging.ERROR
    assert caplog.records[-1].exc_info


async def test_a_cancelled_handler_answers():
    @_answering
    async def handler(self):
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await handler(SimpleNamespace(waits=lambda: None))
        assert caught.value.errno == errno.EIO


def test_every_handler_is_wrapped():
    assert {"lookup", "open", "read", "write", "rename", "readdir", "setattr"} <= set(HANDLERS)
    for name in HANDLERS:
        assert hasattr(getattr(Operations, name), "__wrapped__"), name
    fuse = {n for n in vars(pyfuse3.Operations) if not n.startswith("_")}
    ours = set(HANDLERS) | {"forget", "init", "poll", "stacktrace"}
    assert {n for n in fuse if callable(getattr(pyfuse3.Operations, n))} <= ours


async def test_changes_of_others_are_invalidated_and_our_own_are_not():
    home = new_home()
    told = Told()
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        operations = Operations(fs, told)
        ino = await write_file(fs, 1, b"f", b"x")
        entry = await operations.lookup(1, b"f", None)
        assert (entry.st_ino, entry.entry_timeout, entry.attr_timeout) == (ino, TIMEOUT, TIMEOUT)
        await fs.setattr(ino, mode=0o600)
        await fs.rename(1, b"f", 1, b"g")
        await fs.rename(1, b"g", 1, b"f")
        assert not told.inodes
        assert not told.entries
        await write_file(other, 1, b"new", b"x")
        await other.setattr(ino, mode=0o644)
        await fs.session.refresh()
        assert ino in told.inodes
        assert not told.entries
        await other.unlink(1, b"f")
        await fs.session.refresh()
        assert (1, b"f") in told.entries


async def test_a_name_that_is_absent_is_inode_0_and_not_cached():
    home = new_home()
    async with filesystem(home) as fs:
        operations = Operations(fs, Told())
        ino = await write_file(fs, 1, b"f", b"x")
        entry = await operations.lookup(1, b"none", None)
        assert (entry.st_ino, entry.entry_timeout, entry.attr_timeout) == (0, 0, 0)
        assert ino not in operations.inodes
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.lookup(ino, b"none", None)
        assert caught.value.errno == errno.ENOTDIR
        with pytest.raises(FsError, match="No such file"):
            await fs.lookup(1, b"none")


async def test_an_open_file_does_not_need_its_access_time(monkeypatch):
    """The handle is there already: failing would leave it open for ever."""
    home = new_home()
    async with filesystem(home) as fs:
        operations = Operations(fs, Told(), atimes=AccessTimes(fs.session))
        ino = await write_file(fs, 1, b"f", b"x")

        async def gone(_ino):
            raise FsError("No such file or directory", errno.ENOENT)

        monkeypatch.setattr(fs, "getattr", gone)
        info = await operations.open(ino, os.O_RDONLY, SimpleNamespace(uid=0))
        assert bytes(await operations.read(info.fh, 0, 10)) == b"x"
        await operations.release(info.fh)
        assert not fs.files.is_open(ino)


@pytest.mark.realtime
async def test_an_open_waits_until_the_kernel_dropped_what_changed():
    home = new_home()
    order = []

    def slow(ino):
        time.sleep(0.1)
        order.append(("inode", ino))

    loop = Invalidator(invalidate_inode=slow, invalidate_entry=lambda *_: None)
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        operations = Operations(fs, loop)
        ino = await write_file(fs, 1, b"f", b"x")
        await operations.lookup(1, b"f", None)
        fh = await other.open(ino, writable=True)
        await other.write(fh, 0, b"yy")
        await other.flush(fh)
        info = await operations.open(ino, 0, None)
        assert ("inode", ino) in order
        assert bytes(await operations.read(info.fh, 0, 10)) == b"yy"
        await operations.release(info.fh)
        await other.release(fh)
    loop.stop()


def test_the_queue_of_invalidations_coalesces_and_is_bounded():
    gate, seen, started = threading.Event(), [], threading.Event()

    def inode(ino):
        started.set()
        gate.wait(10)
        seen.append(ino)

    queue = Invalidator(limit=5, invalidate_inode=inode, invalidate_entry=lambda *_: None)
    queue.inode(0)
    assert started.wait(10)
    assert queue.is_pending(0)  # the kernel is being told right now
    for _ in range(3):
        for n in range(1, 9):
            queue.inode(n)
    assert queue.statistics()["pending"] == 5
    assert queue.statistics()["dropped"] > 0
    gate.set()
    while queue.statistics()["pending"]:
        time.sleep(0.01)
    queue.stop()
    assert seen[0] == 0
    assert len(seen) <= 6


async def test_xattrs_are_served_only_on_request():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"f", b"")
        off, on = Operations(fs, Told()), Operations(fs, Told(), xattrs=True)
        for call in (off.getxattr(ino, b"user.a", None), off.listxattr(ino, None)):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call
            assert caught.value.errno == errno.ENOSYS
        await on.setxattr(ino, b"user.a", b"1", None)
        assert await on.getxattr(ino, b"user.a", None) == b"1"


async def test_the_caller_owns_what_it_makes():
    home = new_home()

    class Ctx:
        uid, gid = 12, 34

    async with filesystem(home) as fs:
        made = await Operations(fs, Told()).mkdir(1, b"d", 0o40755, Ctx)
        assert (made.st_uid, made.st_gid, made.st_mode) == (*Caller(12, 34), 0o40755)


def test_mount_points_that_will_not_do(tmp_path):
    for path, why in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "not a directory"),
        (tmp_path / "full", "not empty"),
        ("/proc", "busy"),
    ):
        if path == tmp_path / "file":
            path.write_text("")
        if path == tmp_path / "full":
            path.mkdir()
            (path / "x").write_text("")
        with pytest.raises(ConfigError, match=why):
            check_mountpoint(str(path))
    (tmp_path / "ok").mkdir()
    check_mountpoint(str(tmp_path / "ok"))


def test_a_machine_without_fuse(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="modprobe fuse"):
        check_system(str(tmp_path / "fuse"))
    (tmp_path / "fuse").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="fuse3"):
        check_system(str(tmp_path / "fuse"))


def test_options_for_the_kernel():
    options = MountOptions("/mnt", "v", read_only=True).fuse_options()
    assert {"default_permissions", "fsname=dfs:v", "subtype=dfs", "ro"} <= options
    assert not any("max_read" in option for option in options)


def test_whoever_started_us_is_told_why_not(tmp_path, capsys):
    read, write = os.pipe()
    (tmp_path / "mnt").mkdir()
    cluster = str(tmp_path / "cluster.json")
    arguments = ["--cluster", cluster, "--volume", "v", "--ready-fd", str(write)]
    assert main([*arguments, str(tmp_path / "mnt")]) == 1
    with os.fdopen(read) as line:
        assert line.readline().startswith("error: cluster file")
    assert "dfs cluster init" in capsys.readouterr().err
    Ready(None).tell("nobody listens")


async def test_a_file_that_another_client_made_first_is_not_opened_without_a_look():
    """The kernel has found nothing and so checked nothing: it must look, and check, again."""
    home = new_home()
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        operations = Operations(fs, Told())
        ino = await write_file(other, 1, b"f", b"theirs")
        ctx = SimpleNamespace(uid=4001, gid=4001)
        for flags, code in (
            (os.O_CREAT | os.O_RDWR, errno.ESTALE),
            (os.O_CREAT | os.O_WRONLY | os.O_TRUNC, errno.ESTALE),
            (os.O_CREAT | os.O_EXCL | os.O_WRONLY, errno.EEXIST),
        ):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await operations.create(1, b"f", 0o100600, flags, ctx)
            assert caught.value.errno == code
        assert not fs.files.is_open(ino)
        assert (await fs.getattr(ino)).size == 6


async def test_names_in_a_directory_that_another_client_removed_are_looked_up_again():
    """ESTALE, not ENOENT: the kernel may find another directory of that name."""
    home = new_home()
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        operations = Operations(fs, Told())
        gone = (await other.mkdir(1, b"d", 0o755)).ino
        ino = await write_file(fs, 1, b"f", b"x")
        await other.rmdir(1, b"d")
        ctx = SimpleNamespace(uid=0, gid=0)
        for call, args in (
            (operations.lookup, (gone, b"x", ctx)),
            (operations.mknod, (gone, b"x", 0o100644, 0, ctx)),
            (operations.mkdir, (gone, b"x", 0o755, ctx)),
            (operations.symlink, (gone, b"x", b"target", ctx)),
            (operations.link, (ino, gone, b"x", ctx)),
            (operations.unlink, (gone, b"x", ctx)),
            (operations.rmdir, (gone, b"x", ctx)),
            (operations.rename, (gone, b"x", 1, b"y", 0, ctx)),
            (operations.rename, (1, b"f", gone, b"y", 0, ctx)),
            (operations.create, (gone, b"x", 0o100644, os.O_CREAT | os.O_WRONLY, ctx)),
        ):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call(*args)
            assert caught.value.errno == errno.ESTALE, call
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.unlink(1, b"none", ctx)
        assert caught.value.errno == errno.ENOENT
