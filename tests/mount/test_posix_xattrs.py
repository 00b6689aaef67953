"""Extended attributes, served on request; POSIX ACLs are refused unless they are enforced."""

import errno
import os
import struct

import pytest

from tests.mount.differential import create, put, user

pytestmark = pytest.mark.mount
KEEP, CREATE, REPLACE = 0, os.XATTR_CREATE, os.XATTR_REPLACE
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, bits, who)
    for tag, bits, who in ((1, 6, 2**32 - 1), (2, 4, 4001), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1))
)  # fmt: skip


def on_request(same, script):
    same(script, "--xattrs", volume="xattrs")


def everything(s, name):
    s.do(lambda: sorted(os.listxattr(name, follow_symlinks=False)))


def test_user_attributes(same):
    def script(s):
        create("f")
        os.mkdir("d")
        for name in ("f", "d"):
            s.do(os.getxattr, name, "user.none")
            s.do(os.removexattr, name, "user.none")
            s.do(os.setxattr, name, "user.a", b"1", KEEP)
            s.do(os.setxattr, name, "user.a", b"2", CREATE)
            s.do(os.setxattr, name, "user.b", b"2", REPLACE)
            s.do(os.setxattr, name, "user.b", b"22", CREATE)
            s.do(os.setxattr, name, "user.a", b"", REPLACE)
            s.do(os.setxattr, name, "user.bytes", bytes(range(256)), KEEP)
            s.do(os.setxattr, name, "user." + "n" * 250, b"long", KEEP)
            s.do(os.setxattr, name, "user." + "n" * 251, b"too long", KEEP)
            s.do(os.setxattr, name, "user.", b"nothing", KEEP)
            for key in ("user.a", "user.b", "user.bytes", "user." + "n" * 250):
                s.do(os.getxattr, name, key)
            everything(s, name)
            s.do(os.removexattr, name, "user.b")
            everything(s, name)
        os.rename("f", "g")
        os.link("g", "h")
        s.do(os.getxattr, "h", "user.bytes")
        os.unlink("g")
        os.unlink("h")

    on_request(same, script)


def test_attributes_go_with_the_file_and_change_ctime(same):
    def script(s):
        create("f")
        s.changes(os.setxattr, "f", "user.a", b"1", watch=("f",))
        s.changes(os.getxattr, "f", "user.a", watch=("f",))
        s.changes(os.listxattr, "f", watch=("f",))
        s.changes(os.removexattr, "f", "user.a", watch=("f",))
        os.setxattr("f", "user.a", b"1")
        os.unlink("f")
        create("f")
        everything(s, "f")

    on_request(same, script)


def test_who_may_and_which_namespaces(same):
    def script(s):
        create("f", mode=0o644)
        os.symlink("f", "l")
        os.mkfifo("p")
        os.setxattr("f", "user.a", b"1")
        os.mkdir("t")
        os.chmod("t", 0o1777)
        with user(4001):
            s.do(os.getxattr, "f", "user.a")
            s.do(os.setxattr, "f", "user.b", b"1")
            s.do(os.removexattr, "f", "user.a")
            s.do(os.getxattr, "f", "trusted.a")
            s.do(os.setxattr, "f", "trusted.a", b"1")
            s.do(os.setxattr, "t", "user.b", b"1")  # only the owner, of a sticky directory
        for name in ("p", "l"):
            s.do(os.setxattr, name, "user.a", b"1", follow_symlinks=False)
            s.do(os.getxattr, name, "user.a", follow_symlinks=False)
        for key in ("trusted.a", "security.a"):
            s.do(os.setxattr, "f", key, b"1")
            s.do(os.getxattr, "f", key)
        os.removexattr("f", "security.a")
        os.removexattr("f", "trusted.a")
        for key in ("user", "user.", "trusted.", "foo.a", "system.a", "foo", "USER.a"):
            s.do(os.setxattr, "f", key, b"1")
            s.do(os.getxattr, "f", key)
            s.do(os.removexattr, "f", key)
        everything(s, "f")

    on_request(same, script)


def test_capabilities_go_with_what_they_were_given_to(same):
    """A write, a truncation and a change of owner take `security.capability` away."""

    def script(s):
        create("f", b"content")
        for fn, *args in (
            (put, "f", b"x"),
            (os.truncate, "f", 3),
            (os.chown, "f", 1, 1),
            (os.chmod, "f", 0o600),
            (os.link, "f", "l"),
        ):
            os.setxattr("f", "security.capability", b"\1\0\0\2" + bytes(16))
            s.do(fn, *args)
            s.do(os.getxattr, "f", "security.capability")

    on_request(same, script)


def test_large_values(sides):
    """As much as the item of one attribute holds, 62 KiB; Linux allows 64 KiB."""
    f = sides.mount("xattrs", "--xattrs") / "large"
    create(f)
    os.setxattr(f, "user.large", b"v" * 60_000)
    assert os.getxattr(f, "user.large") == b"v" * 60_000
    with pytest.raises(OSError, match="too long") as caught:
        os.setxattr(f, "user.large", b"v" * 65_000)
    assert caught.value.errno == errno.E2BIG


def test_without_the_flag_there_are_none(mnt):
    """And with it a write costs one request more: the kernel asks for `security.capability`."""
    create(mnt / "f")
    for call, *args in (
        (os.setxattr, "user.a", b"1"),
        (os.getxattr, "user.a"),
        (os.listxattr,),
        (os.removexattr, "user.a"),
    ):
        with pytest.raises(OSError, match="not supported") as caught:
            call(mnt / "f", *args)
        assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("options", [(), ("--xattrs",)], ids=["default", "xattrs"])
def test_posix_acls_are_refused_not_ignored(sides, options):
    """An ACL that is kept but not enforced would be a hole: setting one is an error."""
    m = sides.mount(*(("xattrs", *options) if options else ("posix",)))
    os.makedirs(m / "acl", exist_ok=True)
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        with pytest.raises(OSError, match="not supported") as caught:
            os.setxattr(m / "acl", name, ACL)
        assert caught.value.errno == errno.EOPNOTSUPP
        with pytest.raises(OSError, match=r"not supported|No data") as caught:
            os.getxattr(m / "acl", name)
        assert caught.value.errno in (errno.EOPNOTSUPP, errno.ENODATA)
