"""What is mounted, as the kernel tells it."""

import os
from pathlib import Path

from dfs import mountinfo

TEXT = (
    rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
50 27 0:45 / /mnt/with\040space rw,nosuid - fuse.dfs dfs:my\040volume rw,user_id=0
52 50 0:46 / /mnt/with\040space rw shared:7 master:3 - tmpfs tmpfs rw
53 22 0:47 / /mnt/"""
    + "\u00fc".encode()
    + rb""" rw - fuse.dfs dfs:v rw
54 22 0:48 / /mnt/"""
    + b"\xff"
    + rb""" rw - none  rw
"""
)


def test_lines_of_every_form():
    found = mountinfo.parse(TEXT)
    assert [m.point for m in found] == [
        "/",
        "/mnt/with space",
        "/mnt/with space",
        "/mnt/\u00fc",
        os.fsdecode(b"/mnt/\xff"),
    ]
    assert str(found[1]) == "dfs:my volume (fuse.dfs)"
    assert (found[2].device, str(found[2])) == ("0:46", "tmpfs (tmpfs)")
    assert found[4].source == ""


def test_of_this_machine():
    assert [str(m) for m in mountinfo.mounts_at("/proc")][-1:] == ["proc (proc)"]
    assert mountinfo.mounts_at(Path("/proc/self")) == []
