"""`dfs node`: prepare a node on its machine; list and steer what it does in the background."""

from pathlib import Path

import click

from dfs.cli.context import cluster_file, cluster_option, json_option
from dfs.datadir import PROGRAMS
from dfs.errors import ConfigError

ROLE_OF = {program: role for role, program in PROGRAMS.items()}


@click.group()
def node() -> None:
    """Prepare the data directories of a node, list and steer its background loops."""


@node.command("format")
@click.option(
    "--cluster-map",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The map that `dfs cluster init --spec` made.",
)
@click.option("--name", required=True, help="The node's name in the map.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The node's directory; with --role, the data directory of that role itself.",
)
@click.option(
    "--role",
    type=click.Choice(sorted(PROGRAMS.values())),
    help="Make the data directory of one daemon only.",
)
@click.option(
    "--new",
    is_flag=True,
    help="Make a metadata directory although the cluster is in use; see below.",
)
def format_(cluster_map: Path, name: str, data: Path, role: str | None, new: bool) -> None:
    """Make DATA/metadata and DATA/chunks, with their markers, and DATA/map.

    With --role make DATA, with its marker and map, for one daemon of the node.

    Harmless to repeat: directories that belong to this node already stay as they are.

    A metadata node that has served and lost its disk must not come back empty under its old name:
    it would vote without remembering its promises, and acknowledged changes could be lost. So an
    empty metadata directory is refused while other nodes already hold the system volume, unless
    --new says that this node has never served.
    """
    import trio

    from dfs.cli.local import format_data, format_node
    from dfs.cli.network import somebody_serves
    from dfs.cluster.map import METADATA
    from dfs.datadir import DIRECTORIES, MARKER, read_map

    cluster = read_map(cluster_map)
    member = next((n for n in cluster.nodes if n.name == name), None)
    if member is None:
        names = ", ".join(n.name for n in cluster.nodes)
        raise ConfigError(f"{cluster_map} has no node {name}; it has {names}")
    wants_metadata = role in (None, PROGRAMS[METADATA]) and bool(member.metadata_addr)
    directory = data / DIRECTORIES[METADATA] if role is None else data
    if wants_metadata and not new and not (directory / MARKER).exists():
        holder = trio.run(somebody_serves, cluster, member)
        if holder is not None:
            raise ConfigError(
                f"{directory} is empty, but {holder} says that the cluster is in use: if {name} has"
                " served before and lost its disk, it must not return empty under this name"
                " (restore its directory); if it never served, say --new"
            )
    if role is None:
        made = format_node(data, cluster, member)
    else:
        made = format_data(data, cluster, member, ROLE_OF[role])
    for path in made:
        click.echo(f"made {path}")
    if not made:
        click.echo(f"{data} is ready for {name} already")


@node.command()
@click.argument("name", metavar="[NODE]", required=False)
@click.option("--run", "action", metavar="WORKER", help="Begin a round of this loop of NODE now.")
@click.option("--pause", metavar="WORKER", help="Stop it between two steps, until it is resumed.")
@click.option("--resume", metavar="WORKER", help="Let it go on.")
@cluster_option
@json_option
@click.pass_context
def workers(
    ctx: click.Context,
    name: str | None,
    action: str | None,
    pause: str | None,
    resume: str | None,
    cluster_path: str | None,
    as_json: bool,
) -> None:
    """List the background loops of NODE, or of every node: state, progress, rate, last error.

    A paused loop stays paused until it is resumed, run, or its daemon restarts. Exit status 1 if a
    daemon does not answer.
    """
    from dfs.cli import workers as listing

    file = cluster_file(cluster_path)
    wanted = [(w, a) for w, a in ((action, "run"), (pause, "pause"), (resume, "resume")) if w]
    if not wanted:
        ctx.exit(0 if listing.show(file, name, as_json=as_json) else 1)
    if name is None or len(wanted) > 1:
        raise click.UsageError("say which NODE, and one of --run, --pause and --resume")
    listing.steer(file, name, *wanted[0])


@node.command()
@click.argument("name", metavar="[NODE]", required=False)
@cluster_option
@json_option
def members(name: str | None, cluster_path: str | None, as_json: bool) -> None:
    """Show who is alive as NODE, or the first node that answers, has it from the gossip.

    Other nodes may see it differently for some seconds. Liveness changes nothing about where data
    belongs; it decides who is asked first and when hints are delivered.
    """
    from dfs.cli.gossip import show_members

    show_members(cluster_file(cluster_path), name, as_json=as_json)
