"""POSIX access control lists as values, and through a `FileSystem`."""

import errno

import pytest

from dfs.client import acl
from dfs.client.acl import ACCESS, DEFAULT, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ
from dfs.errors import FsError
from tests.unit.client.support import filesystem, new_home

PLAIN = [(USER_OBJ, 6, 0), (GROUP_OBJ, 4, 0), (OTHER, 4, 0)]
NAMED = [(USER_OBJ, 7, 0), (USER, 6, 4001), (GROUP_OBJ, 5, 0), (MASK, 6, 0), (OTHER, 1, 0)]


def test_bits_of_a_list_have_the_mask_for_the_group():
    assert acl.bits(PLAIN) == 0o644
    assert acl.bits(NAMED) == 0o761
    assert acl.is_minimal(PLAIN)
    assert not acl.is_minimal(NAMED)


def test_a_list_is_what_the_kernel_writes():
    value = acl.encode(NAMED)
    assert value[:4] == b"\2\0\0\0"
    assert len(value) == 4 + 5 * 8
    assert acl.decode(value) == NAMED


@pytest.mark.parametrize(
    "value",
    [b"", b"\1\0\0\0", acl.encode(PLAIN)[:-1], acl.encode(PLAIN[:2]), acl.encode(PLAIN + PLAIN[:1]),
     acl.encode([*PLAIN, (USER, 7, 1)])],
)  # fmt: skip
def test_nonsense_is_refused(value):
    with pytest.raises(FsError) as caught:
        acl.decode(value)
    assert caught.value.errno == errno.EINVAL


def test_chmod_decides_and_creation_only_takes_away():
    assert acl.bits(acl.limited(NAMED, 0o077, keep=False)) == 0o077
    assert acl.bits(acl.limited(NAMED, 0o077, keep=True)) == 0o061
    kept = acl.limited(NAMED, 0o000, keep=True)
    assert (USER, 6, 4001) in kept
    assert (GROUP_OBJ, 5, 0) in kept  # the mask stands for the group's bits


async def test_lists_come_and_go_with_their_files():
    async with filesystem(new_home()) as fs:
        d = (await fs.mkdir(1, b"d", 0o755)).ino
        await fs.setxattr(d, DEFAULT, acl.encode(NAMED))
        sub = await fs.mkdir(d, b"sub", 0o777)
        assert sub.mode == 0o761
        assert await fs.getxattr(sub.ino, DEFAULT) == acl.encode(NAMED)
        attr, fh = await fs.create(d, b"f", 0o660)
        await fs.release(fh)
        assert attr.mode == 0o660
        assert acl.bits(acl.decode(await fs.getxattr(attr.ino, ACCESS))) == 0o660
        await fs.setxattr(attr.ino, ACCESS, acl.encode(PLAIN))
        assert (await fs.getattr(attr.ino)).mode == 0o644
        assert await fs.listxattr(attr.ino) == []
        for name, ino, code in (
            (DEFAULT, attr.ino, errno.EACCES),
            (b"system.other", attr.ino, errno.EOPNOTSUPP),
            (b"user.", attr.ino, errno.EINVAL),
        ):
            with pytest.raises(FsError) as caught:
                await fs.setxattr(ino, name, acl.encode(NAMED))
            assert caught.value.errno == code
        await fs.removexattr(d, ACCESS)  # there is none: that is fine
        link = await fs.symlink(d, b"l", b"x")
        assert link.mode == 0o777
        assert await fs.listxattr(link.ino) == []
