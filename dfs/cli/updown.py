"""Starting and stopping the processes of a cluster directory."""

import os
import subprocess
from pathlib import Path

import click
import trio

from dfs.cli.local import ClusterDir, Process, stop
from dfs.cli.mounts import unmount_all
from dfs.cli.network import bootstrap, endpoint, reach, wait_for_ping
from dfs.cluster.map import ROLES, ClusterMap, Node
from dfs.env import Rpc
from dfs.errors import ConfigError, DfsError, Unreachable

Child = subprocess.Popen[bytes] | None
Started = tuple[Node, str, Process, Child]


async def start(path: Path, names: tuple[str, ...], timeout: float) -> None:
    """Start local nodes, wait until each answers, and bootstrap the cluster if it is new.

    Raises `DfsError` with the last words of every process that failed.
    """
    directory = ClusterDir(path)
    cluster = directory.load_map()
    nodes = _choose(directory, cluster, names)
    started: list[Started] = []
    for node in nodes:
        for role in ROLES:
            process = directory.process(node, role)
            if process in directory.processes(node):
                started.append((node, role, process, directory.start(node, role)))
    async with endpoint(cluster) as rpc:
        failures = await _wait_for_all(rpc, started, timeout)
        if not failures and not names:
            await bootstrap(rpc, cluster, timeout=timeout)
    if failures:
        raise DfsError("; ".join(failures))
    new = sum(child is not None for *_, child in started)
    click.echo(
        f"up: {', '.join(node.name for node in nodes)} "
        f"({new} processes started, {len(started) - new} already running)"
    )


async def _wait_for_all(rpc: Rpc, started: list[Started], timeout: float) -> list[str]:
    failures = []

    async def wait(node: Node, role: str, process: Process, child: Child) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, child, process, nursery.cancel_scope)
            try:
                await wait_for_ping(rpc, node, role, timeout=timeout)
            except DfsError as e:
                failures.append(f"{process.name} runs but does not answer: {e}; see {process.log}")
            nursery.cancel_scope.cancel()

    async def watch(child: Child, process: Process, scope: trio.CancelScope) -> None:
        """Notice at once that a process ended instead of waiting for it to answer."""
        if child is None:
            return
        ended = os.pidfd_open(child.pid)
        try:
            await trio.lowlevel.wait_readable(ended)
        finally:
            os.close(ended)
        child.wait()
        failures.append(f"{process.name} ended with status {child.returncode}")
        click.echo(f"{process.name} said ({process.log}):\n{process.last_words()}", err=True)
        process.pid_file.unlink(missing_ok=True)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for entry in started:
            nursery.start_soon(wait, *entry)
    return failures


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
    processes = [process for node in nodes for process in directory.processes(node)]
    running = [process for process in processes if process.pid() is not None]
    killed = stop(processes)
    for name in killed:
        click.echo(f"{name} did not stop by itself and was killed", err=True)
    click.echo(f"down: {', '.join(node.name for node in nodes)} ({len(running)} processes stopped)")


def _choose(directory: ClusterDir, cluster: ClusterMap, names: tuple[str, ...]) -> list[Node]:
    local = directory.local_nodes(cluster)
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
