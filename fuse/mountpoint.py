"""The directory that a mount covers: what it must be like, and that only one process takes it.

The kernel stacks mounts: a second one on the same directory hides the first, whose data is then
neither seen nor unmounted by who believes that there is one.  So whoever mounts locks the directory
(flock) while it looks and mounts, and finds what others have mounted before.  The lock is on the
directory below the mount and ends with the process, whatever that dies of; a mount that stands
needs none, since it is seen.
"""

import errno
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from dfs.errors import ConfigError
from dfs.mountinfo import mounts_at

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for another process to mount, which takes milliseconds
POLL = 0.01  # seconds


def check_mountpoint(mountpoint: str) -> None:
    """Raise `ConfigError` that says why nothing can be mounted there.

    `mountpoint` is absolute and without symbolic links.
    """
    path = Path(mountpoint)
    try:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist; create it first"
            raise ConfigError(f"mount point {path} {what}")
        _check_free(mountpoint)
        if any(path.iterdir()):
            raise ConfigError(f"mount point {path} is not empty; a mount would hide its content")
    except OSError as e:
        if e.errno == errno.ENOTCONN:
            raise ConfigError(
                f"mount point {path} holds a dead mount; remove it with `fusermount3 -uz {path}`"
            ) from e
        raise ConfigError(f"mount point {path} is not usable: {e.strerror}") from e


def _check_free(mountpoint: str) -> None:
    mounted = mounts_at(mountpoint)
    if mounted:
        raise ConfigError(
            f"mount point {mountpoint} is busy: {mounted[-1]} is mounted there;"
            f" `umount {mountpoint}` unmounts it"
        )


@asynccontextmanager
async def claimed(mountpoint: str) -> AsyncIterator[None]:
    """Nobody else mounts there during the block, and nothing is mounted when it begins.

    Raises `ConfigError` that names what is mounted, or says that somebody is about to mount.
    """
    _check_free(mountpoint)
    try:
        directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise ConfigError(f"mount point {mountpoint} is not usable: {e.strerror}") from e
    try:
        await _lock(directory, mountpoint)
        _check_free(mountpoint)  # by who had the lock before
        yield
    finally:
        os.close(directory)


async def _lock(directory: int, mountpoint: str) -> None:
    give_up = trio.current_time() + PATIENCE
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if trio.current_time() >= give_up:
                raise ConfigError(
                    f"mount point {mountpoint} is locked by another process, which has been about"
                    f" to mount there for {PATIENCE:g} s: `lslocks` shows it, stop it or wait"
                ) from None
            await trio.sleep(POLL)
        except OSError as e:  # not every file system can lock a directory
            log.warning("mount point %s cannot be locked: %s", mountpoint, e.strerror)
            return
        else:
            return
