"""What is mounted on this machine, as the kernel tells this process in /proc/self/mountinfo.

Nothing here looks at a mount point itself: one whose server is stopped would keep the caller.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

_ESCAPED = re.compile(rb"\\([0-7]{3})")  # space, tab, newline and backslash in names


class Mount(NamedTuple):
    """One mounted file system; `str` names it for people."""

    device: str  # major:minor
    point: str
    kind: str  # fuse.dfs, ext4 ...
    source: str  # dfs:VOLUME, /dev/sda1 ...

    def __str__(self) -> str:
        """What and of which type."""
        return f"{self.source} ({self.kind})"


def mounts() -> list[Mount]:
    """Everything mounted; of several at one place the visible one is the last."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


def mounts_at(path: str | os.PathLike[str]) -> list[Mount]:
    """What is mounted at exactly this path, absolute and without links; the visible one last."""
    wanted = os.fspath(path)
    return [mount for mount in mounts() if mount.point == wanted]


def parse(text: bytes) -> list[Mount]:
    """The lines of proc(5)'s mountinfo."""
    found = []
    for line in text.splitlines():
        fields = line.split(b" ")
        # optional fields follow the sixth, up to a dash
        kind, source = fields[fields.index(b"-", 6) + 1 :][:2]
        found.append(Mount(*map(_text, (fields[2], fields[4], kind, source))))
    return found


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda m: bytes([int(m[1], 8)]), field))
