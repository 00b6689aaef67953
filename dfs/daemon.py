"""What every daemon of a node does around its service: arguments, checks, map, logs, signals.

`main` is the whole life of a process: read the marker, take the lock, load the newest map, bind the
environment to the kernel, run the service until SIGTERM or SIGINT, and leave with status 0, or with
status 1 and one line that says what is wrong and what to do.
"""

import argparse
import faulthandler
import gc
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import NoReturn, Protocol

import trio

from dfs.clock import SystemClock
from dfs.cluster.address import is_address, is_local
from dfs.cluster.map import ClusterMap
from dfs.datadir import PROGRAMS, Marker, read_map, read_marker
from dfs.disk import RealDisk
from dfs.env import Disk, Env
from dfs.errors import ConfigError, DfsError, leaves
from dfs.memory import give_back_often, tune_allocator
from dfs.metrics import MetricsServer, Page, measure_disk, measure_rpc, parse_listen
from dfs.rpc.endpoint import RpcEndpoint
from dfs.rpc.mapkeeper import MapKeeper
from dfs.rpc.processes import WorkerProcesses

log = logging.getLogger(__name__)

FORK = "fork"  # in the data directory: what was said when two maps of one epoch were met


class Service(Protocol):
    """A node of one role, as `metadata.service` and `chunkserver.service` implement it."""

    async def run(
        self, address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; report the bound address once it serves."""
        ...

    metrics_address: str  # HOST:PORT of our metrics, for `node.status`; set once they are served

    def measure(self, page: Page) -> None:
        """Write the numbers of now into a page of metrics."""
        ...

    def health(self) -> str:
        """Why the node cannot do its work; "" if it can."""
        ...


MakeService = Callable[[Env, int, MapKeeper], Service]


def main(role: str, make: MakeService, argv: list[str] | None = None) -> NoReturn:
    """Run the daemon of `role`; never returns."""
    faulthandler.enable()
    program = f"dfs {PROGRAMS[role]}"
    args = _arguments(role, argv)
    start_logging(args.log_level)
    try:
        _run(role, make, args)
    except BaseException as e:
        lines = {str(leaf) for leaf in leaves(e) if isinstance(leaf, DfsError)}
        if not lines or any(not isinstance(leaf, DfsError) for leaf in leaves(e)):
            log.exception("stopped by an unexpected error")
        for line in sorted(lines) or [f"internal error, see above: {e!r}"]:
            sys.stderr.write(f"{program}: {line}\n")
        sys.exit(1)
    sys.exit(0)


def _run(role: str, make: MakeService, args: argparse.Namespace) -> None:
    marker = read_marker(args.data, role)
    disk = RealDisk(args.data)
    disk.lock()
    try:
        cluster = load_map(disk, args.map, marker)
        node = cluster.node(marker.number)
        address = args.listen or node.address(role)
        check_address(address, insecure=args.insecure_listen_any)
        metrics = parse_listen(args.metrics) if args.metrics else None
        _raise_file_limit()
        tune_allocator()
        service = _Service(role, make, marker.number, address, args.insecure_listen_any, metrics)
        trio.run(service.run, disk, cluster)
    finally:
        disk.close()


@dataclass(frozen=True, slots=True)
class _Service:
    """What to run, and where it is to listen."""

    role: str
    make: MakeService
    number: int
    address: str
    insecure: bool
    metrics: tuple[str, int] | None

    async def run(self, disk: RealDisk, cluster: ClusterMap) -> None:
        clock, random = SystemClock(), SystemRandom()
        endpoint = RpcEndpoint(
            cluster_id=cluster.cluster_id,
            name=f"{cluster.node(self.number).name}/{self.role}",
            clock=clock,
            random=random,
            epoch=lambda: keeper.current.epoch,
            insecure=self.insecure,
        )
        keeper = MapKeeper(
            cluster,
            save=lambda data: disk.write_atomic("map", data),
            rpc=endpoint,
            clock=clock,
            random=random,
            own=self.address,
            alarm=read_alarm(disk),
            note=lambda text: disk.write_atomic(FORK, text.encode()),
        )
        async with WorkerProcesses() as processes:
            env = Env(clock, disk, endpoint, processes, random)
            service = self.make(env, self.number, keeper)
            async with trio.open_nursery() as outer:
                # Signals first and the endpoint before what uses it: it ends last, so that a node
                # that stops can still say good-bye, in whatever state of its start it is.
                scope = trio.CancelScope()
                await outer.start(_cancel_on_signal, scope)
                self._introduce(cluster)
                await outer.start(endpoint.run)
                with scope:
                    await self._serve(env, disk, keeper, service)
                outer.cancel_scope.cancel()
        log.info("stopped")

    def _introduce(self, cluster: ClusterMap) -> None:
        log.info(
            "node %s (%s) of cluster %s, map epoch %d",
            cluster.node(self.number).name,
            self.role,
            cluster.cluster_id.hex(),
            cluster.epoch,
        )

    async def _serve(self, env: Env, disk: RealDisk, keeper: MapKeeper, service: Service) -> None:
        """Run the service and what belongs to it, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.poll)
            nursery.start_soon(give_back_often)
            nursery.start_soon(_stop_when_removed, keeper, keeper().node(self.number).node_id)
            bound = await nursery.start(service.run, self.address)
            if self.metrics is not None:
                server = MetricsServer(partial(_measure, service, env, disk), service.health)
                service.metrics_address = await nursery.start(server.run, *self.metrics)
                log.info("metrics at http://%s/metrics", server.address)
            _tune_gc()
            log.info("serving %s", bound)


async def _stop_when_removed(keeper: MapKeeper, node_id: bytes) -> None:
    """Raise `ConfigError` once the map says that this node is no member any more."""
    while True:
        check_not_removed(keeper.current, node_id)
        await keeper.wait_for(keeper.current.epoch + 1)


def _measure(service: Service, env: Env, disk: RealDisk, page: Page) -> None:
    service.measure(page)
    measure_disk(page, disk.usage(), disk.statistics())
    if isinstance(env.rpc, RpcEndpoint):
        measure_rpc(page, env.rpc.statistics())


async def _cancel_on_signal(
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stopping: %s", signal.Signals(number).name)
            scope.cancel()
            return


def load_map(disk: RealDisk, seed: Path | None, marker: Marker) -> ClusterMap:
    """The newest map of the daemon's own copy (`map` in its directory) and the file it was given.

    Keeps the result as its own copy.  Raises `ConfigError` when there is none, when it is another
    cluster's, when the two contradict each other, or when this node is not in it.
    """
    data = Path(disk.path())
    own = data / "map"
    paths = [path for path in (own, seed) if path is not None and path.exists()]
    found = [read_map(path) for path in paths]
    if not found:
        raise ConfigError(f"no cluster map: neither {own} nor {seed or 'a file given by --map'}")
    for path, m in zip(paths, found, strict=True):
        if m.cluster_id.hex() != marker.cluster_id:
            raise ConfigError(
                f"the map in {path} is of cluster {m.cluster_id.hex()}, "
                f"but {data} belongs to {marker.cluster_id}: give it the map of its own cluster"
            )
    newest = max(found, key=lambda m: m.epoch)
    if any(m.epoch == newest.epoch and m != newest for m in found):
        raise ConfigError(
            f"{own} and {seed} are different maps of epoch {newest.epoch}: "
            "find out which one the other nodes have and remove the other"
        )
    check_not_removed(newest, bytes.fromhex(marker.node_id))
    node = newest.node(marker.number)
    if node.node_id.hex() != marker.node_id:
        raise ConfigError(
            f"{data} was made for node id {marker.node_id}, but in the map node {node.number} "
            f"has id {node.node_id.hex()}: this disk belongs to another incarnation of the node"
        )
    if not node.address(marker.role):
        raise ConfigError(f"node {node.name} has no role {marker.role} in the map")
    if not own.exists() or own.read_bytes() != newest.encode():
        disk.write_atomic("map", newest.encode())
    return newest


def read_alarm(disk: Disk) -> str:
    """What a former run noted about a fork of the map; "" if it met none."""
    if not disk.exists(FORK):
        return ""
    file = disk.open(FORK)
    try:
        return file.pread(file.size(), 0).decode(errors="replace") or "the cluster map is forked"
    finally:
        file.close()


def check_not_removed(cluster: ClusterMap, node_id: bytes) -> None:
    """Raise `ConfigError` if the map bans the node."""
    for number, banned in cluster.banned:
        if banned == node_id:
            raise ConfigError(
                f"node {number} (id {node_id.hex()}) was removed from the cluster in epoch "
                f"{cluster.epoch} or before, for ever: its data directory is not needed any more. "
                "To use the machine again, format an empty directory and add it as a new node"
            )


def check_address(address: str, *, insecure: bool) -> None:
    """Refuse to listen where strangers can connect, since there are no credentials to ask for."""
    if not is_address(address):
        raise ConfigError(f"{address!r} is no address: write tcp://HOST:PORT or unix:///PATH")
    if not insecure and not is_local(address):
        raise ConfigError(
            f"refusing to listen on {address}: without credentials anybody who can connect can "
            "read and write everything. Use a loopback address, or --insecure-listen-any where "
            "the network itself keeps strangers out"
        )


def start_logging(level: str) -> None:
    """Log to stderr, one line a record, with UTC time stamps."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _arguments(role: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAMS[role]}",
        description=f"The {role} daemon of a dfs node.",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="data directory, with its MARKER"
    )
    parser.add_argument(
        "--map", type=Path, metavar="FILE", help="cluster map; the newer of it and DIR/map is used"
    )
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="listen here instead of at the map's address"
    )
    parser.add_argument(
        "--insecure-listen-any",
        action="store_true",
        help="allow an address that is not loopback, although nothing asks for credentials",
    )
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        help="serve numbers for Prometheus and /healthz here (without HOST: loopback only)",
    )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
    return parser.parse_args(argv)


def _raise_file_limit() -> None:
    """Use as many open files as the system lets us: segments, tables and connections need them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tune_gc() -> None:
    """Keep what recovery built out of every later collection and collect rarely.

    A full collection of 600,000 objects takes 0.17 s, in which a node answers nobody.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
