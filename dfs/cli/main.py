"""The `dfs` command: a tree of commands, each loaded only when it is used.

Start-up is what a user feels, so this module imports click and nothing else of weight; the table
`COMMANDS` knows where each command lives and what `dfs --help` says about it.
"""

import importlib
import os
import sys

import click

COMMANDS = {
    # name: (module, attribute, one line for --help)
    "cluster": ("dfs.cli.cluster_cmd", "cluster", "Make, start, stop and look at a cluster."),
    "node": (
        "dfs.cli.node_cmd",
        "node",
        "Prepare a node; list and steer its background loops.",
    ),
    "volume": ("dfs.cli.volume_cmd", "volume", "Create, list and delete volumes."),
    "put": ("dfs.cli.transfer_cmd", "put", "Copy local files into a volume."),
    "get": ("dfs.cli.transfer_cmd", "get", "Copy files out of a volume."),
    "ls": ("dfs.cli.file_cmd", "ls", "List a directory of a volume."),
    "cat": ("dfs.cli.file_cmd", "cat", "Write files of a volume to standard output."),
    "stat": ("dfs.cli.file_cmd", "stat", "Show what is known about a file."),
    "mkdir": ("dfs.cli.file_cmd", "mkdir", "Make directories in a volume."),
    "mv": ("dfs.cli.file_cmd", "mv", "Rename within a volume."),
    "rm": ("dfs.cli.file_cmd", "rm", "Remove files or directories of a volume."),
    "du": ("dfs.cli.file_cmd", "du", "Add up the sizes below a directory."),
    "kv": ("dfs.cli.kv_cmd", "kv", "Read and write the cluster's key-value store."),
    "hints": ("dfs.cli.hints_cmd", "hints", "List or drop what is kept for nodes that are away."),
    "mount": ("dfs.cli.mount_cmd", "mount", "Mount a volume on a directory."),
    "umount": ("dfs.cli.mount_cmd", "umount", "Unmount a directory."),
    "fsck": ("dfs.cli.check_cmd", "fsck", "Check a volume: tree, links, usage, chunk copies."),
    "sim": ("dfs.cli.check_cmd", "sim", "Run a simulation of the protocols from seeds."),
    "version": ("dfs.cli.main", "version", "Show the version."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; None if there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(importlib.import_module(entry[0]), entry[1])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dfs", message="dfs %(version)s")
@click.option(
    "--cluster",
    "cluster_path",
    envvar="DFS_CLUSTER",
    metavar="FILE|DIR",
    help="The cluster's file cluster.json, or its directory. [env: DFS_CLUSTER]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    envvar="DFS_TIMEOUT",
    metavar="SECONDS",
    help="How long to wait for a quorum. [default: 15; env: DFS_TIMEOUT]",
)
def cli(cluster_path: str | None, timeout: float | None) -> None:
    """Use and run dfs, a distributed file system.

    The cluster is chosen by --cluster FILE|DIR or the environment variable DFS_CLUSTER; without
    either, ./.demo/cluster.json and ./cluster.json are tried.

    \b
    Begin with:
      dfs cluster init && dfs cluster up
      dfs volume create photos
      dfs put -r ~/Pictures photos:/
      dfs mount photos /mnt/photos

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """


@click.command()
def version() -> None:
    """Show the version."""
    from importlib.metadata import version as version_of

    click.echo(f"dfs {version_of('dfs')}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; every failure is one line on stderr and an exit status."""
    _fill_standard_descriptors()
    try:
        status = cli.main(argv, prog_name="dfs", standalone_mode=False)
        if sys.stdout is not None:
            from dfs.cli.context import writing_stdout

            with writing_stdout():
                sys.stdout.flush()  # here, where a failure is still told
    except click.UsageError as e:
        e.show()
        sys.exit(2)
    except click.ClickException as e:
        click.echo(f"dfs: {e.format_message()}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("dfs: interrupted", err=True)
        sys.exit(130)
    except SystemExit as e:
        # click itself exits with 1 only when whoever read our output went away, as `| head` does
        sys.exit(141 if e.code == 1 else e.code)
    except BrokenPipeError:
        sys.stdout = None  # the interpreter does not flush None
        sys.exit(141)
    except Exception as e:
        from dfs.cli.context import Interrupted, explain

        if isinstance(e, Interrupted):
            click.echo("dfs: interrupted", err=True)
            sys.exit(128 + e.number)
        if isinstance(e, OSError) and e.filename in (None, "standard output"):
            e.filename = "standard output"  # all other files are named where they are used
            sys.stdout = None  # do not try to write to it again at exit
        lines = explain(e)
        if lines is None:
            raise
        for line in lines:
            click.echo(f"dfs: {line}", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _fill_standard_descriptors() -> None:
    """Keep files and sockets that we open from becoming standard input or output.

    Python leaves the stream of a descriptor that was closed when we started at None.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
