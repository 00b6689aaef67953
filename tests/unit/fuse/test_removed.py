"""What was removed and is still asked about."""

import errno

import pytest

from dfs.client.attributes import Attr, fs_error
from dfs.errors import FsError
from dfs.volume.items import DIR, FIFO, Inode
from fuse.removed import Removed


def attr(ino, kind, nlink):
    return Attr(ino, Inode(kind, 0o644, nlink=nlink, ctime=5))


def test_only_what_lost_its_last_name_is_remembered():
    removed = Removed()
    removed.add(attr(10, FIFO, 2), 7)
    assert 10 not in removed
    removed.add(attr(10, FIFO, 1), 7)
    removed.add(attr(11, DIR, 2), 3)
    assert len(removed) == 2
    stale = fs_error(errno.ESTALE)
    got = removed.instead_of(stale, 10)
    assert (got.nlink, got.ctime) == (0, 7)
    assert removed.instead_of(stale, 11).ctime == 5  # never back
    removed.forget(10)
    with pytest.raises(FsError):
        removed.instead_of(stale, 10)


def test_only_a_missing_inode_is_answered_from_memory():
    removed = Removed()
    removed.add(attr(10, FIFO, 1), 7)
    with pytest.raises(FsError) as caught:
        removed.instead_of(fs_error(errno.EIO), 10)
    assert caught.value.errno == errno.EIO


def test_changes_stay_while_it_is_held():
    removed = Removed()
    removed.add(attr(10, FIFO, 1), 7)
    held = removed.instead_of(fs_error(errno.ESTALE), 10)
    removed.change(held, {"mode": 0o600, "uid": None, "mtime": 9}, 8)
    assert (held.mode, held.uid, held.mtime, held.ctime) == (0o600, 0, 9, 8)
