"""`python -m fuse`: mount a volume."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import trio

from dfs.client.capacity import ClusterWatch
from dfs.client.chunkio import ChunkClient
from dfs.client.connect import Cluster, ClusterRef, connect
from dfs.client.filesystem import open_filesystem
from dfs.client.registry import open_volume_by_name
from dfs.client.session import Session
from dfs.errors import DfsError
from dfs.memory import give_back_often, tune_allocator
from fuse.mount import MountOptions, check_system, serve
from fuse.mountpoint import check_mountpoint

log = logging.getLogger("fuse")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fuse", description="Mount a dfs volume.")
    parser.add_argument(
        "--cluster",
        default=os.environ.get("DFS_CLUSTER", "cluster.json"),
        metavar="FILE",
        help="cluster file (default: $DFS_CLUSTER or cluster.json)",
    )
    parser.add_argument("--volume", required=True, metavar="NAME")
    access = parser.add_mutually_exclusive_group()
    access.add_argument("--read-only", action="store_true", help="refuse changes")
    access.add_argument(
        "--exclusive",
        action="store_true",
        help="be the volume's only writer, with the kernel's writeback cache; for databases",
    )
    parser.add_argument(
        "--xattrs",
        action="store_true",
        help="serve extended attributes; costs a request more for each write",
    )
    parser.add_argument(
        "--acls",
        action="store_true",
        help="serve and enforce POSIX access control lists; includes --xattrs",
    )
    parser.add_argument(
        "--relatime",
        action="store_true",
        help="keep access times, as seldom as relatime does; without: noatime",
    )
    parser.add_argument("--cache", type=int, default=64, metavar="MIB", help="data cache (64)")
    parser.add_argument("--log", metavar="FILE", help="write messages there instead of stderr")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write one line when mounted")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--foreground", action="store_true", help="stay in the foreground (default)")
    group.add_argument("--daemon", action="store_true", help="go to the background once mounted")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    return parser.parse_args(argv)


class Ready:
    """Tells whoever started us, once, that the mount is there or why it is not."""

    def __init__(self, fd: int | None) -> None:
        """Tell through a file descriptor, or nobody."""
        self._fd = fd

    def tell(self, line: str) -> None:
        """Write the line; later calls do nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):  # nobody listens any more
                os.write(fd, line.replace("\n", " ").encode() + b"\n")
                os.close(fd)


async def mount(arguments: argparse.Namespace, ready: Ready) -> None:
    """Mount and serve until the end."""
    options = MountOptions(
        mountpoint=arguments.mountpoint,
        volume=arguments.volume,
        read_only=arguments.read_only,
        exclusive=arguments.exclusive,
        xattrs=arguments.xattrs,
        acls=arguments.acls,
        relatime=arguments.relatime,
    )
    check_system()
    check_mountpoint(options.mountpoint)
    ref = ClusterRef.load(arguments.cluster)
    name = f"fuse {os.uname().nodename}:{options.mountpoint}"
    mode = "ro" if arguments.read_only else "rwx" if arguments.exclusive else "rw"
    async with connect(ref, name=name) as cluster, trio.open_nursery() as nursery:
        watch = ClusterWatch(cluster)
        nursery.start_soon(watch.run)
        nursery.start_soon(give_back_often)
        info = await open_volume_by_name(cluster, arguments.volume)
        async with open_filesystem(
            cluster,
            info.volume_id,
            lambda session: chunk_client(cluster, session),
            mode=mode,
            name=name[:200],
            cache_bytes=arguments.cache << 20,
            clear_privileges=False,
            kernel_times=arguments.exclusive,
            warm=True,
            capacity=watch.capacity,
        ) as fs:
            watch.tell(info.volume_id, fs.refuse)
            await serve(fs, options, lambda: ready.tell("ready"))
            log.info("unmounted %s", options.mountpoint)
        nursery.cancel_scope.cancel()


def chunk_client(cluster: Cluster, session: Session) -> Any:
    """The chunk client for a session's volume."""
    params = session.params
    return ChunkClient(
        cluster.rpc,
        cluster.get_map,
        cluster.clock,
        salt=params["salt"],
        compress=params.get("compress", True),
        random=cluster.random,
    )


def _errors(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _errors(inner)
    else:
        yield error


def _detach() -> Ready:
    """Continue in a child; the parent waits for its word and exits with it."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read) as answer:
            line = answer.readline().strip()
        if line != "ready":
            sys.stderr.write(f"{line or 'error: the mount process died'}\n")
        os._exit(0 if line == "ready" else 1)
    os.close(read)
    os.setsid()
    os.chdir("/")
    return Ready(write)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 after a clean unmount, 1 after an error, 2 for a wrong command line."""
    arguments = parse(argv)
    for name in ("cluster", "log", "mountpoint"):  # a daemon has another working directory
        if getattr(arguments, name):
            setattr(arguments, name, os.path.realpath(getattr(arguments, name)))
    ready = Ready(arguments.ready_fd)
    if arguments.daemon:
        if arguments.ready_fd is not None:
            sys.stderr.write("error: --daemon and --ready-fd exclude each other\n")
            return 2
        ready = _detach()
    logging.basicConfig(
        filename=arguments.log,
        level=logging.DEBUG if arguments.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    tune_allocator()
    try:
        trio.run(mount, arguments, ready)
    except KeyboardInterrupt:
        return 130
    except BaseException as e:
        causes = list(_errors(e))
        if not all(isinstance(cause, DfsError) for cause in causes):
            log.exception("mount failed")
        message = "; ".join(str(cause) or type(cause).__name__ for cause in causes)
        ready.tell(f"error: {message}")
        sys.stderr.write(f"error: {message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
