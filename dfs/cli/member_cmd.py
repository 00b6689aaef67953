"""`dfs cluster node`: stage changes of a cluster's members."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dfs.cli.context import cluster_file, cluster_option
from dfs.cli.context import run as run_async
from dfs.errors import ConfigError

if TYPE_CHECKING:
    from dfs.cluster.edits import Edit
    from dfs.cluster.map import ClusterMap

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def node() -> None:
    """Change who is in the cluster: stage changes, look at the plan, apply.

    \b
      dfs cluster node add node4 node5
      dfs cluster plan
      dfs cluster apply --epoch 2
    """


def _description(*, zone: str, rack: str, weight: str) -> Callable[[F], F]:
    """The options that describe a new node; the arguments say what some of them are by default."""
    options = (
        click.option(
            "--metadata",
            metavar="ADDRESS",
            help="Where its metadata node listens: tcp://HOST:PORT or unix:///PATH. "
            "[default: free ports on a local cluster; no metadata if only --chunk is given]",
        ),
        click.option(
            "--chunk", metavar="ADDRESS", help="Likewise, for its chunkserver; no chunks without."
        ),
        click.option("--zone", help=f"Failure domain. [default: {zone}]"),
        click.option(
            "--rack", default="", help=f"Failure domain within the zone. [default: {rack}]"
        ),
        click.option(
            "--host",
            help="Failure domain within the rack. [default: the host of its address; "
            "host-NAME if ports are chosen]",
        ),
        click.option(
            "--weight",
            type=click.FloatRange(0.0),
            help="Capacity in each role, in the unit of the other nodes' weights: its share of "
            f"the data is in proportion. [default: {weight}]",
        ),
    )

    def describe(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return describe


@node.command()
@cluster_option
@_description(
    zone="if ports are chosen, the zone with the least capacity; else a zone of its own, NAME",
    rack="none",
    weight="1",
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def add(
    cluster_path: str | None, names: tuple[str, ...], weight: float | None, **given: Any
) -> None:
    """Stage new nodes.

    On a local cluster their ports are chosen; elsewhere give addresses, for one node at a time.
    """
    from dfs.cli.members import new_node
    from dfs.cluster.change import Add

    file = cluster_file(cluster_path)
    if len(names) > 1 and (given["metadata"] or given["chunk"]):
        raise ConfigError("one node at a time when addresses are given")
    weights = (1.0, 1.0) if weight is None else (weight, weight)

    def make(cluster: "ClusterMap", staged: "Sequence[Edit]") -> "list[Edit]":
        edits: list[Edit] = []
        for name in names:
            new = new_node(file, cluster, [*staged, *edits], name, weights=weights, **given)
            edits.append(Add(new))
        return edits

    _stage(file, make)


@node.command()
@cluster_option
@click.argument("name")
def drain(cluster_path: str | None, name: str) -> None:
    """Stage that NAME gives away all it has, and stays a member."""
    from dfs.cluster.change import Drain

    _stage(cluster_file(cluster_path), lambda *_: [Drain(name)])


@node.command()
@cluster_option
@click.option(
    "--weight", default=0.0, help="Capacity in each role. [default: the mean of the others]"
)
@click.argument("name")
def undrain(cluster_path: str | None, name: str, weight: float) -> None:
    """Stage that NAME, once drained, takes its share again."""
    from dfs.cluster.change import Undrain

    _stage(cluster_file(cluster_path), lambda *_: [Undrain(name, weight)])


@node.command()
@cluster_option
@click.argument("name")
def remove(cluster_path: str | None, name: str) -> None:
    """Stage that NAME, alive or dead, leaves for ever.

    Others take over from the copies that are left; then the id of NAME is banned.
    """
    from dfs.cluster.change import Remove

    _stage(cluster_file(cluster_path), lambda *_: [Remove(name)])


@node.command()
@cluster_option
@_description(
    zone="that of OLD",
    rack="that of OLD, unless --zone is given",
    weight="that of OLD; if it is drained, the mean of the others",
)
@click.argument("old")
@click.argument("new")
def replace(
    cluster_path: str | None, old: str, new: str, weight: float | None, **given: Any
) -> None:
    """Stage that the new node NEW takes the place of OLD, which leaves for ever.

    For a lost disk: a node must not come back empty under its old name.
    On a local cluster the ports of NEW are chosen; elsewhere give addresses.
    """
    from dfs.cli.members import new_node
    from dfs.cluster.change import Replace
    from dfs.cluster.edits import replacement_weights

    file = cluster_file(cluster_path)
    if old == new:
        raise ConfigError("give the new node another name: the old one's directories may be left")

    def make(cluster: "ClusterMap", staged: "Sequence[Edit]") -> "list[Edit]":
        if given["zone"] is None:  # it stands where the old one stood
            for place in (n for n in cluster.nodes if n.name == old):
                given.update(zone=place.zone, rack=given["rack"] or place.rack)
        weights = replacement_weights(cluster, old) if weight is None else (weight, weight)
        return [Replace(old, new_node(file, cluster, staged, new, weights=weights, **given))]

    _stage(file, make)


@node.command()
@cluster_option
@click.option("--role", type=click.Choice(["metadata", "chunk"]), required=True)
@click.argument("name")
@click.argument("weight", type=click.FloatRange(0.0))
def weight(cluster_path: str | None, role: str, name: str, weight: float) -> None:
    """Stage another capacity of NAME in one role."""
    from dfs.cluster.change import SetWeight

    _stage(cluster_file(cluster_path), lambda *_: [SetWeight(name, role, weight)])


@node.command()
@cluster_option
def staged(cluster_path: str | None) -> None:
    """Show what is staged."""
    from dfs.cli.members import show_staged

    run_async(show_staged, cluster_file(cluster_path))


@node.command()
@cluster_option
def reset(cluster_path: str | None) -> None:
    """Drop what is staged."""
    from dfs.cli.members import membership

    async def work() -> int:
        async with membership(cluster_file(cluster_path)) as (_, members):
            return await members.reset()

    click.echo("dropped what was staged" if run_async(work) else "nothing was staged")


def _stage(file: Any, make: Any) -> None:
    from dfs.cli.members import stage

    run_async(stage, file, make)
