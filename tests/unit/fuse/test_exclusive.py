"""An exclusive mount without a kernel: what it asks the kernel for, and what it leaves to it."""

import os
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dfs.cli.mount_cmd import mount
from dfs.ids import ROOT_INO
from fuse.__main__ import parse
from fuse.operations import Operations
from tests.unit.client.support import filesystem, new_home, write_file
from tests.unit.fuse.test_adapter import Told

CONTEXT = SimpleNamespace(uid=0, gid=0)


@pytest.mark.parametrize("mode", ["rw", "rwx"])
async def test_only_an_exclusive_mount_has_the_writeback_cache(mode):
    async with filesystem(new_home(), mode=mode) as fs:
        assert Operations(fs, Told()).enable_writeback_cache == (mode == "rwx")


@pytest.mark.parametrize("mode", ["rw", "rwx"])
async def test_the_kernel_may_read_through_a_handle_for_writing_if_it_keeps_pages(mode):
    async with filesystem(new_home(), mode=mode) as fs:
        ino = await write_file(fs, ROOT_INO, b"f", b"content")
        operations = Operations(fs, Told())
        info = await operations.open(ino, os.O_WRONLY, CONTEXT)
        handle = fs.handles.file(info.fh)
        assert (handle.readable, handle.writable) == (mode == "rwx", True)
        await operations.release(info.fh)


async def test_an_exclusive_mount_invalidates_nothing():
    home = new_home()
    async with filesystem(home, mode="rwx") as fs:
        told = Told()
        operations = Operations(fs, told)
        await write_file(fs, ROOT_INO, b"f", b"content")
        await operations.lookup(ROOT_INO, b"f", CONTEXT)
        for fn in fs.session._on_change:
            fn(None)
        assert told.inodes == told.entries == []


@pytest.mark.parametrize("kernel", [False, True])
async def test_a_write_leaves_times_to_the_kernel_that_has_them(kernel):
    async with filesystem(new_home(), mode="rwx", kernel_times=kernel) as fs:
        ino = await write_file(fs, ROOT_INO, b"f", b"content")
        before = await fs.setattr(ino, mtime=1_000_000_000, ctime=2_000_000_000)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 100, b"more")
        seen = await fs.getattr(ino)
        await fs.release(fh)
        after = await fs.getattr(ino)
        assert (before.mtime, seen.size, after.size) == (1_000_000_000, 104, 104)
        for attr in (seen, after):
            same = (attr.mtime, attr.ctime) == (before.mtime, before.ctime)
            assert same == kernel


def test_read_only_and_exclusive_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--volume", "v", "--read-only", "--exclusive", "/m"])
    assert e.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    done = CliRunner().invoke(mount, ["--read-only", "--exclusive", "v", str(tmp_path)])
    assert done.exit_code == 2
    assert "exclude each other" in done.output
