"""`dfs cluster`: make a cluster, start and stop its local processes, look at it."""

import secrets
from functools import partial
from pathlib import Path

import click

from dfs.cli.context import cluster_file, cluster_option, count, json_option
from dfs.cli.context import run as run_async
from dfs.cli.member_cmd import node
from dfs.errors import ConfigError

DEFAULT_DIR = ".demo"


@click.group()
def cluster() -> None:
    """Make, start, stop and look at a cluster."""


_DIR = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The cluster's directory. [default: the chosen cluster's]",
)
_SPEC = click.option(
    "--spec",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="List of nodes, YAML or JSON, instead of --nodes.",
)
_NODES = click.option("--nodes", default=3, show_default=True, type=click.IntRange(1, 1000))
_ZONES = click.option("--zones", type=click.IntRange(1), help="[default: 3, or one per node]")


@cluster.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_DIR,
    show_default=True,
)
@_NODES
@click.option("--base-port", default=7400, show_default=True, help="First of 2 ports per node.")
@_ZONES
@_SPEC
def init(directory: Path, nodes: int, base_port: int, zones: int | None, spec: Path | None) -> None:
    """Make a cluster: map, cluster file, data directories.

    Without --spec all nodes are on this machine, on loopback ports.  With --spec the directories of
    nodes with loopback or unix addresses are made here; on other machines use `dfs node format`.

    \b
    Examples:
      dfs cluster init
      dfs cluster init --dir /srv/dfs --nodes 5 --zones 3 --base-port 7500
      dfs cluster init --dir /etc/dfs --spec nodes.yaml
    """
    from dfs.cli.local import ClusterDir
    from dfs.cli.spec import local_nodes, read_spec
    from dfs.cluster.address import is_local
    from dfs.cluster.map import ROLES, ClusterMap

    if spec is None:
        members, params = local_nodes(nodes, zones or min(3, nodes), base_port), None
    else:
        members, params = read_spec(spec)
    new = ClusterMap.create(secrets.token_bytes(16), members, params=params)
    here = [node for node in new.nodes if is_local(node.metadata_addr or node.chunk_addr)]
    target = ClusterDir(directory)
    target.create(new, here)
    click.echo(
        f"made cluster {new.cluster_id.hex()[:8]} with {len(new.nodes)} nodes "
        f"({new.n} copies, {new.w} of them before a write is acknowledged) in {target.path}"
    )
    counts = {role: sum(node.weight(role) > 0 for node in new.nodes) for role in ROLES}
    least = min(counts, key=lambda role: counts[role])
    if new.n < 3 <= max(counts.values()):
        click.echo(
            f"WARNING: {count(counts[least], f'{least} node')} only, so of everything, metadata "
            f"too, there {'is 1 copy' if new.n == 1 else f'are {new.n} copies'}",
            err=True,
        )
    away = len(new.nodes) - len(here)
    if away:
        click.echo(
            f"on the machines of the other {away}: "
            f"dfs node format --cluster-map {target.path / 'map'} --name NAME --data DIR"
        )
    if here:
        click.echo(f"start it: dfs cluster up --dir {directory}")


@cluster.command()
@_DIR
@cluster_option
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait for answers.")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
def up(
    directory: Path | None, cluster_path: str | None, timeout: float, nodes: tuple[str, ...]
) -> None:
    """Start local nodes, all or some, and wait until they answer.

    What runs already stays as it is. A node whose data directory is gone is not started: it would
    have forgotten what it promised.

    \b
    Examples:
      dfs cluster up
      dfs cluster up node2 node3
    """
    from dfs.cli.local import ClusterDir
    from dfs.cli.updown import start

    path = _directory(directory, cluster_path)
    with ClusterDir(path).locked(timeout):
        run_async(start, path, nodes, timeout)


@cluster.command()
@_DIR
@cluster_option
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
def down(directory: Path | None, cluster_path: str | None, nodes: tuple[str, ...]) -> None:
    """Stop local nodes, all or some; with all of them also mounts made from here."""
    from dfs.cli.local import ClusterDir
    from dfs.cli.updown import LOCK_PATIENCE, stop_nodes

    path = _directory(directory, cluster_path)
    with ClusterDir(path).locked(LOCK_PATIENCE):
        stop_nodes(path, nodes)


@cluster.command()
@cluster_option
@click.option(
    "--wait", "timeout", default=60.0, show_default=True, help="Seconds to wait for answers."
)
def bootstrap(cluster_path: str | None, timeout: float) -> None:
    """Give a new cluster its system volume, as `up` does.

    Needed once for a cluster whose daemons something else starts. Harmless to repeat.
    """
    from dfs.cli.updown import bootstrap_cluster

    made = run_async(bootstrap_cluster, cluster_file(cluster_path), timeout)
    click.echo("made the system volume" if made else "the cluster has its system volume")


@cluster.command()
@_DIR
@cluster_option
@json_option
@click.pass_context
def status(
    ctx: click.Context, directory: Path | None, cluster_path: str | None, as_json: bool
) -> None:
    """Show nodes, disks, volumes, and what is wrong.

    Exit status 1 if some partition cannot be written. dfs/cli/README.md describes --json.
    """
    from dfs.cli.status import show

    file = directory / "cluster.json" if directory else cluster_file(cluster_path)
    ctx.exit(0 if show(file, as_json=as_json) else 1)


@cluster.command()
@cluster_option
@click.option("--nodes", type=click.IntRange(1, 1000), help="Plan a new cluster of N local nodes.")
@_ZONES
@_SPEC
@json_option
def plan(
    cluster_path: str | None,
    nodes: int | None,
    zones: int | None,
    spec: Path | None,
    as_json: bool,
) -> None:
    """Show what a change would do before it is done.

    Without --nodes or --spec: the changes that `dfs cluster node` staged. With them: a cluster that
    is not made yet.

    \b
    Examples:
      dfs cluster plan
      dfs cluster plan --nodes 5 --zones 3
    """
    from dfs.cli.members import show_change
    from dfs.cli.plan import show_plan
    from dfs.cli.spec import local_nodes, read_spec

    if spec is not None:
        show_plan(*read_spec(spec), as_json=as_json)
    elif nodes is not None:
        show_plan(local_nodes(nodes, zones or min(3, nodes), 1024), None, as_json=as_json)
    else:
        run_async(partial(show_change, cluster_file(cluster_path), as_json=as_json))


@cluster.command()
@cluster_option
@click.option("--epoch", required=True, type=int, help="The epoch that `dfs cluster plan` showed.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="Wait until the change is complete.")
@click.option(
    "--start-timeout", default=30.0, show_default=True, help="Seconds to wait for new nodes."
)
def apply(cluster_path: str | None, epoch: int, wait: float, start_timeout: float) -> None:
    """Do what is staged, if the cluster is still the one that was planned for.

    New nodes join first, without data; those of this machine are started. When they answer, the
    change begins: data moves in the background while reads and writes go on. `dfs cluster status`
    shows how far it is and what it waits for.
    """
    from dfs.cli.members import apply as apply_staged

    run_async(
        partial(
            apply_staged, cluster_file(cluster_path), epoch, wait=wait, start_timeout=start_timeout
        )
    )


@cluster.command("wait")
@cluster_option
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait.")
def wait_(cluster_path: str | None, timeout: float) -> None:
    """Wait until no change of members is under way."""
    from dfs.cli.members import wait_for_change

    run_async(wait_for_change, cluster_file(cluster_path), timeout)


@cluster.command("map")
@cluster_option
@json_option
@click.option("--history", is_flag=True, help="Show the last maps and why they were made.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write it there.")
def map_(cluster_path: str | None, as_json: bool, history: bool, output: Path | None) -> None:
    """Show the cluster map: who is home to what."""
    from dfs.cli.members import show_map

    run_async(
        partial(show_map, cluster_file(cluster_path), output, history=history, as_json=as_json)
    )


cluster.add_command(node)


def _directory(directory: Path | None, cluster_path: str | None) -> Path:
    if directory is None:
        return cluster_file(cluster_path).parent
    if not (directory / "cluster.json").exists():
        raise ConfigError(
            f"there is no cluster in {directory}: dfs cluster init --dir {directory} makes one"
        )
    return directory
