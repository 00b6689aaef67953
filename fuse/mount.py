"""One mount: checks, options, the kernel's knobs, the main loop, a clean end."""

import contextlib
import errno
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from dfs.client.atimes import AccessTimes
from dfs.client.filesystem import FileSystem
from dfs.errors import ConfigError, DfsError, FsError
from dfs.mountinfo import mounts_at
from fuse.invalidate import Invalidator
from fuse.listen import Listener, devices, install
from fuse.mountpoint import claimed
from fuse.operations import Operations

log = logging.getLogger(__name__)

# Workers.  Each keeps a 1 MiB buffer once it has received a request; which of them do, and that
# they stay, is up to the listener: with it pyfuse3 starts all and ends none.
MIN_TASKS, MAX_TASKS = 16, 64
READ_AHEAD_KB = 1024  # the kernel's default of 128 makes 128 KiB requests
MAX_BACKGROUND, CONGESTION = 64, 48
DIRTY_PERCENT = 10  # of memory that may wait in the writeback cache; the kernel's default here is 1
WARM_TIMEOUT = 0.2  # seconds that a mount is not ready yet because tree nodes are on their way
FLUSH_TIMEOUT = 60.0  # seconds that an unmount waits for dirty data


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount: `mountpoint` without symbolic links, `volume` a name for /proc/mounts."""

    mountpoint: str
    volume: str
    read_only: bool = False
    exclusive: bool = False  # so is the session: the kernel keeps back what is written
    xattrs: bool = False
    acls: bool = False  # extended attributes too
    relatime: bool = False
    allow_other: bool = True  # only has an effect for root

    def fuse_options(self) -> set[str]:
        """Options for libfuse.  Never `max_read`: libfuse refuses it in this combination."""
        options = set(pyfuse3.default_options)
        options |= {"default_permissions", f"fsname=dfs:{self.volume}", "subtype=dfs"}
        if not self.relatime:
            options.add("noatime")
        if self.read_only:
            options.add("ro")
        if self.allow_other and os.geteuid() == 0:
            options.add("allow_other")
        return options


def check_system(device: str = "/dev/fuse") -> None:
    """Raise `ConfigError` when this machine cannot mount FUSE file systems."""
    if not Path(device).exists():
        raise ConfigError(
            f"{device} does not exist: load the kernel module (`modprobe fuse`), or give the"
            " container the device"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        raise ConfigError(f"{device} may not be opened by this user")
    paths = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not any(os.access(Path(p, "fusermount3"), os.X_OK) for p in paths):
        raise ConfigError("fusermount3 is not installed; install the package fuse3")


def tune(real_mountpoint: str, *, writeback: bool = False) -> None:
    """Raise the kernel's read-ahead and background limits; needs root, does nothing without.

    `writeback`: its limit for dirty pages too.

    libfuse offers no option for either, but both may be set once the mount is there.  The argument
    must be resolved already: looking at the mount point now would wait for ourselves.
    """
    minors = [mount.device.split(":")[1] for mount in mounts_at(real_mountpoint)]
    if not minors:
        return
    wanted = [
        (f"/sys/class/bdi/0:{minors[-1]}/read_ahead_kb", READ_AHEAD_KB),
        (f"/sys/fs/fuse/connections/{minors[-1]}/max_background", MAX_BACKGROUND),
        (f"/sys/fs/fuse/connections/{minors[-1]}/congestion_threshold", CONGESTION),
    ]
    if writeback:
        wanted.append((f"/sys/class/bdi/0:{minors[-1]}/max_ratio", DIRTY_PERCENT))
    for path, value in wanted:
        try:
            Path(path).write_text(str(value))
        except OSError as e:
            log.debug("%s stays as it is: %s", path, e)


def tune_collector() -> None:
    """Keep the garbage collector away from what start-up made, and make it rarer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@contextlib.asynccontextmanager
async def mounted(fs: FileSystem, options: MountOptions) -> AsyncIterator[Listener]:
    """The file system in the kernel for the length of the block; `serve` must run inside."""
    invalidator = Invalidator()
    atimes = AccessTimes(fs.session) if options.relatime and not options.read_only else None
    operations = Operations(
        fs, invalidator, xattrs=options.xattrs, acls=options.acls, atimes=atimes
    )
    try:
        device = await _mount(operations, options)
    except BaseException:
        invalidator.stop()
        raise
    invalidator.device = device
    listener = Listener(device)
    operations.waits = listener.pass_on
    if not fs.session.exclusive:  # there the kernel may have newer pages than we
        operations.push.store = pyfuse3.notify_store
    listener.answered = fs.files.begin_expected
    uninstall = install(listener)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(operations.contention.run)
            if atimes is not None:
                nursery.start_soon(atimes.run)
            yield listener
            nursery.cancel_scope.cancel()
        with trio.move_on_after(FLUSH_TIMEOUT):
            await operations.contention.end()
        if atimes is not None:
            try:
                with trio.move_on_after(FLUSH_TIMEOUT):
                    await atimes.commit()
            except DfsError as e:  # data is what an unmount must not lose
                log.warning("access times are not committed: %s", e)
    finally:
        uninstall()
        invalidator.stop()
        pyfuse3.close(unmount=True)


async def _mount(operations: Operations, options: MountOptions) -> int:
    """Mount where nothing is mounted; returns the descriptor that requests come from."""
    async with claimed(options.mountpoint):
        before = devices()
        try:
            pyfuse3.init(operations, options.mountpoint, options.fuse_options())
        except RuntimeError as e:
            raise ConfigError(
                f"cannot mount on {options.mountpoint}: {e}; the lines above tell what libfuse says"
            ) from e
        return min(devices() - before)


async def serve(fs: FileSystem, options: MountOptions, ready: Callable[[], None]) -> None:
    """Mount, call `ready`, serve until SIGTERM, SIGINT or an unmount; then commit what is dirty.

    An exclusive mount also ends when its session is lost: the kernel holds what was written before,
    and would write it over what others did since.

    Raises `ConfigError` when it cannot mount, `FsError` when dirty data could not be committed.
    """
    async with mounted(fs, options) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(_until_signal, fs, listener)
        nursery.start_soon(_when_served, fs, options, ready)
        if options.exclusive:
            nursery.start_soon(_until_lost, fs, listener)
        await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()
    if options.exclusive and fs.session.over:
        raise FsError(_LOST, errno.EIO)
    with trio.move_on_after(FLUSH_TIMEOUT) as limit:
        await fs.shut_down()
    if limit.cancelled_caught:
        raise FsError("data that was written could not be committed before the end", errno.EIO)


_LOST = (
    "the exclusive session was lost, and with it what was not on stable storage: mount again, and"
    " let the programs recover as after a crash"
)


async def _until_lost(fs: FileSystem, listener: Listener) -> None:
    lost = trio.Event()
    fs.session.on_fenced(lambda _held, _inos: lost.set())
    if not fs.session.over:
        await lost.wait()
    log.error("unmounting: %s", _LOST)
    listener.close()
    pyfuse3.terminate()


async def _when_served(fs: FileSystem, options: MountOptions, ready: Callable[[], None]) -> None:
    """Wait until the kernel's first request was answered, then tune and say so.

    Earlier would be in vain: the answer to INIT, the very first request, resets the read-ahead.
    A moment is given to the warm-up, or whoever comes first would find it in the way.
    """
    with contextlib.suppress(OSError):  # the volume has no quorum now; it is mounted all the same
        await trio.to_thread.run_sync(os.stat, options.mountpoint, abandon_on_cancel=True)
    tune(options.mountpoint, writeback=options.exclusive)
    with trio.move_on_after(WARM_TIMEOUT):
        await fs.session.wait_warm()
    tune_collector()
    ready()


async def _until_signal(fs: FileSystem, listener: Listener) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            try:  # while the mount still serves: whatever is written from now on comes after
                with trio.move_on_after(FLUSH_TIMEOUT):
                    await fs.shut_down()
            except DfsError as e:
                log.warning("not everything is committed: %s", e)
            listener.close()
            pyfuse3.terminate()
            return
