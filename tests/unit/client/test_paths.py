"""Paths for the command line."""

import errno
import io

import pytest

from dfs.client import paths
from dfs.errors import FsError
from tests.unit.client.support import filesystem, new_home


async def fails(code, call):
    with pytest.raises(FsError) as caught:
        await call
    assert caught.value.errno == code


async def test_resolving():
    async with filesystem(new_home()) as fs:
        d = await paths.make_directories(fs, b"/a/b/c")
        assert (await paths.make_directories(fs, b"a/b/c")).ino == d.ino
        await paths.write_path(fs, b"/a/b/c/f", b"hello")
        a = await paths.resolve(fs, b"/a")
        await fs.symlink(a.ino, b"rel", b"b/c")
        await fs.symlink(d.ino, b"abs", b"/a/rel/f")
        await fs.symlink(1, b"loop", b"loop")
        await fs.symlink(1, b"up", b"a/rel/../../rel/f")
        for path in (b"/a/b/c/f", b"a//rel/./f", b"/a/rel/abs", b"up", b"/../a/b/../rel/f"):
            assert await paths.read_path(fs, path) == b"hello"
        assert (await paths.resolve(fs, b"/a/rel", follow=False)).is_symlink
        await fails(errno.ELOOP, paths.resolve(fs, b"/loop"))
        await fails(errno.ENOTDIR, paths.resolve(fs, b"/a/b/c/f/x"))
        await fails(errno.ENOENT, paths.resolve(fs, b"/nope/x"))
        await fails(errno.EINVAL, paths.resolve_parent(fs, b"/"))
        await fails(errno.ENOTDIR, paths.make_directories(fs, b"/a/b/c/f/g"))
        assert await paths.exists(fs, b"/loop")
        assert not await paths.exists(fs, b"/a/x")


async def test_walking_counting_and_removing():
    async with filesystem(new_home()) as fs:
        await paths.make_directories(fs, b"/t/x/y")
        for n in range(5):
            await paths.write_path(fs, b"/t/x/f%d" % n, bytes(n))
        ino = (await paths.resolve(fs, b"/t/x/f4")).ino
        await fs.link(ino, (await paths.resolve(fs, b"/t")).ino, b"again")
        root = await paths.resolve(fs, b"/t")
        found = [path async for path, _ in paths.walk(fs, b"/t", root)]
        assert found == [
            b"/t", b"/t/again", b"/t/x", *(b"/t/x/f%d" % n for n in range(5)), b"/t/x/y",
        ]  # fmt: skip
        assert await paths.disk_usage(fs, b"/t") == (0 + 1 + 2 + 3 + 4, 5, 3)
        assert await paths.remove_tree(fs, b"/t") == 9
        assert (await fs.statfs()).inodes == 1


async def test_streaming_in_and_out():
    async with filesystem(new_home()) as fs:
        data = bytes(range(256)) * 20_000
        assert await paths.put_file(fs, b"/f", io.BytesIO(data)) == len(data)
        out = io.BytesIO()
        assert await paths.get_file(fs, b"/f", out) == len(data)
        assert out.getvalue() == data
        await paths.put_file(fs, b"/f", io.BytesIO(b"short"))
        assert await paths.read_path(fs, b"/f") == b"short"
