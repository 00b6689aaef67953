"""The limit of hard links, without making that many."""

import errno

import pytest

from dfs.client.attributes import patch_inode
from dfs.client.namespace import MAX_LINKS
from dfs.errors import FsError
from dfs.volume import effects as fx
from dfs.volume import items
from tests.unit.client.support import filesystem, new_home, write_file


async def test_a_file_has_as_many_links_as_ext4_allows_and_no_more():
    assert MAX_LINKS == 65_000
    async with filesystem(new_home()) as fs:
        ino = await write_file(fs, 1, b"f", b"x")
        change = (items.F_NLINK, fx.SET, MAX_LINKS - 1)
        await fs.session.transact(lambda txn: patch_inode(txn, ino, change))
        assert (await fs.link(ino, 1, b"last")).nlink == MAX_LINKS
        with pytest.raises(FsError) as caught:
            await fs.link(ino, 1, b"more")
        assert caught.value.errno == errno.EMLINK
        await fs.unlink(1, b"last")
        assert (await fs.link(ino, 1, b"more")).nlink == MAX_LINKS
