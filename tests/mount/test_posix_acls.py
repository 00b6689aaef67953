"""POSIX access control lists on a mount with --acls: kept, inherited, enforced; compared with tmpfs."""

import os
import struct
import time

import pytest

from dfs.client.acl import ACCESS, DEFAULT, GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ
from tests.mount.differential import content, create, put, umask, user

pytestmark = pytest.mark.mount
ALICE, BOB, TEAM = 4001, 4002, 5000
NOBODY = 2**32 - 1


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)


def listed(owner, group, other, *named, mask=None):
    """A list from permissions; `named` are (tag, permissions, id)."""
    entries = [
        (USER_OBJ, owner, NOBODY),
        *(n for n in named if n[0] == USER),
        (GROUP_OBJ, group, NOBODY),
    ]
    entries += [n for n in named if n[0] == GROUP]
    if mask is not None:
        entries.append((MASK, mask, NOBODY))
    return acl(*entries, (OTHER, other, NOBODY))


ALICE_READS = listed(6, 0, 0, (USER, 4, ALICE), mask=4)
TEAM_WRITES = listed(7, 5, 0, (GROUP, 7, TEAM), (USER, 0, BOB), mask=7)


def show(s, *names):
    for name in names:
        s.look(name)
        for key in (ACCESS, DEFAULT):
            s.do(os.getxattr, name, key.decode())


def on_acls(same, script):
    same(script, "--acls", volume="acls")


def test_a_list_sets_the_bits_and_chmod_changes_the_list(same):
    def script(s):
        create("f")
        os.mkdir("d")
        for name in ("f", "d"):
            show(s, name)
            s.do(os.setxattr, name, ACCESS, ALICE_READS)
            show(s, name)
            for mode in (0o777, 0o640, 0o007):
                s.do(os.chmod, name, mode)
                show(s, name)
            s.do(os.setxattr, name, ACCESS, listed(7, 5, 1))  # says no more than bits: not kept
            show(s, name)
            s.do(os.setxattr, name, ACCESS, TEAM_WRITES)
            s.do(os.removexattr, name, ACCESS)
            show(s, name)
            s.do(os.setxattr, name, DEFAULT, TEAM_WRITES)
            show(s, name)
            s.do(os.removexattr, name, DEFAULT)
            s.do(os.setxattr, name, ACCESS, b"nonsense")
            s.do(os.setxattr, name, ACCESS, acl((USER_OBJ, 7, NOBODY)))

    on_acls(same, script)


def test_lists_are_enforced(same):
    def script(s):
        create("f", b"secret", 0o600)
        os.mkdir("d")
        create("d/x", b"x")
        os.setxattr("f", ACCESS, ALICE_READS)
        os.setxattr("d", ACCESS, TEAM_WRITES)
        for who, groups in (
            (ALICE, ()),
            (BOB, ()),
            (BOB, (TEAM,)),
            (ALICE, (TEAM,)),
            (4009, (TEAM,)),
        ):
            with user(who, groups=groups):
                s.note(who, groups)
                s.do(content, "f")
                s.do(put, "f", b"x")
                s.do(lambda: sorted(os.listdir("d")))
                s.do(content, "d/x")
                s.do(create, f"d/new{who}{len(groups)}")
                s.do(os.setxattr, "f", ACCESS, TEAM_WRITES)
        os.chmod("f", 0o600)  # the mask goes: Alice may not any more
        with user(ALICE):
            s.do(content, "f")

    on_acls(same, script)


def test_default_lists_are_inherited(same):
    def script(s):
        os.mkdir("d")
        os.setxattr("d", DEFAULT, TEAM_WRITES)
        with umask(0):
            for mode in (0o666, 0o777, 0o600, 0o2751):
                os.close(os.open(f"d/f{mode:o}", os.O_CREAT | os.O_WRONLY, mode))
                os.mkdir(f"d/d{mode:o}", mode)
                os.mkfifo(f"d/p{mode:o}", mode)
                show(s, f"d/f{mode:o}", f"d/d{mode:o}", f"d/p{mode:o}")
            os.symlink("x", "d/l")
            s.look("d/l")
            os.mkdir("d/d777/below")
            show(s, "d/d777/below")
        os.mkdir("plain")
        os.setxattr("plain", DEFAULT, listed(7, 5, 0))
        with umask(0):
            os.mkdir("plain/d", 0o777)
            create("plain/f", mode=0o640)
        show(s, "plain/d", "plain/f")
        os.removexattr("d", DEFAULT)
        os.mkdir("d/after")
        show(s, "d/after")

    on_acls(same, script)


def test_with_a_default_list_the_umask_counts_too(sides):
    """Not so on Linux: the kernel applies it before it asks, and this binding cannot say not to."""
    d = sides.mount("acls", "--acls") / "masked"
    os.mkdir(d)
    os.setxattr(d, DEFAULT, TEAM_WRITES)
    with umask(0o077):
        os.close(os.open(d / "f", os.O_CREAT | os.O_WRONLY, 0o666))
    assert os.stat(d / "f").st_mode & 0o777 == 0o600
    assert os.getxattr(d / "f", ACCESS) == listed(6, 5, 0, (GROUP, 7, TEAM), (USER, 0, BOB), mask=0)


def test_a_mount_without_the_flag_shows_no_lists_and_goes_by_the_bits(sides):
    with_lists, without = sides.mount("acls", "--acls"), sides.mount("acls", which=1)
    create(with_lists / "f", b"x", 0o600)
    os.setxattr(with_lists / "f", ACCESS, ALICE_READS)
    os.chmod(with_lists, 0o755)

    def opened_by_alice(where):
        """By a path from the mount: the directories above it are root's."""
        top = os.open(where, os.O_RDONLY)
        try:
            with user(ALICE):
                os.close(os.open("f", os.O_RDONLY, dir_fd=top))
        finally:
            os.close(top)

    opened_by_alice(with_lists)
    deadline = time.monotonic() + 5
    while not (without / "f").exists():
        assert time.monotonic() < deadline
    with pytest.raises(OSError, match=r"not supported|No data"):
        os.getxattr(without / "f", ACCESS)
    with pytest.raises(PermissionError):
        opened_by_alice(without)
    sides.umount("acls", which=1)
