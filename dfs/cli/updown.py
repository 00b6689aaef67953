"""Starting and stopping the processes of a cluster directory."""

import os
import re
import subprocess
from pathlib import Path

import click
import trio

from dfs.cli.context import count
from dfs.cli.diagnosis import reason
from dfs.cli.local import ClusterDir, Process, stop
from dfs.cli.mounts import unmount_all
from dfs.cli.network import bootstrap, endpoint, reach, wait_for_ping
from dfs.cluster.map import METADATA, ROLES, ClusterMap, Node
from dfs.datadir import AMNESIA
from dfs.env import Rpc
from dfs.errors import ConfigError, DfsError, Unreachable

Child = subprocess.Popen[bytes] | None
Started = tuple[Node, str, Process, Child]
Failure = tuple[str, str]  # the process or node, what is wrong with it
LOCK_PATIENCE = 60.0  # seconds that `down` waits for an `up` at work
LOSS = re.compile("lost disk|must not vote")  # what a daemon says whose data is worth nothing
END_PATIENCE = 3.0  # seconds a process is given to notice that its port is taken


async def start(path: Path, names: tuple[str, ...], timeout: float) -> None:
    """Start local nodes, wait until each answers, and bootstrap the cluster if it is new.

    Raises `DfsError` that names every process that failed, after all others have been started.
    """
    directory = ClusterDir(path)
    cluster = directory.load_map()
    nodes = _choose(directory, cluster, names)
    failures = _refuse_blank(directory, nodes)
    started: list[Started] = []
    for node in nodes:
        for process, role in zip(directory.processes(node), directory.roles(node), strict=True):
            started.append((node, role, process, directory.start(node, role)))
    async with endpoint(cluster) as rpc:
        failures += await _wait_for_all(rpc, started, timeout)
        if not failures and not names:
            await bootstrap(rpc, cluster, timeout=timeout)
    if failures:
        raise ExceptionGroup("up", [DfsError(f"{name}: {why}") for name, why in sorted(failures)])
    new = sum(child is not None for *_, child in started)
    click.echo(
        f"up: {', '.join(node.name for node in nodes)} "
        f"({count(new, 'process')} started, {len(started) - new} already running)"
    )


def _refuse_blank(directory: ClusterDir, nodes: list[Node]) -> list[Failure]:
    """Say so where data is missing; the rest of such a node is started all the same."""
    missing = [(node.name, " and ".join(map(str, directory.missing(node)))) for node in nodes]
    return [(name, f"{gone}: gone, or without MARKER. {AMNESIA}") for name, gone in missing if gone]


async def _wait_for_all(rpc: Rpc, started: list[Started], timeout: float) -> list[Failure]:
    failures: list[Failure] = []

    async def wait(node: Node, role: str, process: Process, child: Child) -> None:
        address = node.address(role)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, child, process, node, role, nursery.cancel_scope)
            try:
                await wait_for_ping(rpc, node, role, timeout=timeout)
            except DfsError as e:
                if child is not None:
                    await trio.sleep(END_PATIENCE)  # if somebody else has its port, it will tell
                why = f"runs, but at {address} it does not answer: {reason(e, address)}"
                failures.append((process.name, f"{why}; see {process.log}"))
            nursery.cancel_scope.cancel()

    async def watch(
        child: Child, process: Process, node: Node, role: str, scope: trio.CancelScope
    ) -> None:
        """Notice at once that a process ended instead of waiting for it to answer."""
        if child is None:
            return
        ended = os.pidfd_open(child.pid)
        try:
            await trio.lowlevel.wait_readable(ended)
        finally:
            os.close(ended)
        child.wait()
        # the last line is the daemon's reason, after its own name
        said = re.sub(r"^ *dfs \w+: ", "", process.last_words(1))
        said += after_loss(said, node, role)
        failures.append((process.name, f"ended with status {child.returncode}: {said}"))
        process.pid_file.unlink(missing_ok=True)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for entry in started:
            nursery.start_soon(wait, *entry)
    return failures


def after_loss(said: str, node: Node, role: str) -> str:
    """What to add to the last words of a daemon whose data cannot be trusted any more."""
    if role == METADATA and LOSS.search(said):
        return f": `dfs cluster node replace {node.name} NEW` stages a new node in its place"
    return ""


async def bootstrap_cluster(file: Path, timeout: float) -> bool:
    """Wait for a cluster's nodes and make its system volume; False if it has one."""
    with trio.move_on_after(timeout):
        while True:
            try:
                async with reach(file) as cluster:
                    return await bootstrap(cluster.rpc, cluster.get_map(), timeout=timeout)
            except Unreachable:
                await trio.sleep(1)
    async with reach(file) as cluster:
        return await bootstrap(cluster.rpc, cluster.get_map(), timeout=timeout)


def stop_nodes(path: Path, names: tuple[str, ...]) -> None:
    """Stop local nodes; without names also unmount what is mounted from this directory."""
    directory = ClusterDir(path)
    cluster = directory.load_map()
    nodes = _choose(directory, cluster, names)
    if not names:
        unmount_all(directory)
    # also those whose data directories were removed meanwhile
    processes = [
        directory.process(node, role) for node in nodes for role in ROLES if node.address(role)
    ]
    running = [process for process in processes if process.pid() is not None]
    for name in stop(processes):
        click.echo(f"dfs: {name} did not stop by itself and was killed", err=True)
    click.echo(
        f"down: {', '.join(node.name for node in nodes)} ({count(len(running), 'process')} stopped)"
    )


def _choose(directory: ClusterDir, cluster: ClusterMap, names: tuple[str, ...]) -> list[Node]:
    here = directory.local_nodes(cluster)
    local = [node for node in cluster.nodes if node in here or directory.missing(node)]
    if not names:
        if not local:
            raise ConfigError(
                f"no node of the cluster has its data in {directory.path}: "
                "`dfs node format` makes a node's directories"
            )
        return local
    known = {node.name: node for node in local}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"no node {', '.join(unknown)} in {directory.path}; there are: {', '.join(known)}"
        )
    return [known[name] for name in names]
