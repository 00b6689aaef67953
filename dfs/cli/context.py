"""What commands share: choosing the cluster, running trio, showing errors and tables."""

import json
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from dfs.errors import ConfigError, DfsError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = (Path(".demo/cluster.json"), Path("cluster.json"))


def cluster_option(command: F) -> F:
    """Add `--cluster`, the choice of the cluster, to a command."""
    return click.option(
        "--cluster",
        "cluster_path",
        metavar="FILE|DIR",
        help="The cluster's file cluster.json, or its directory.",
    )(command)


def json_option(command: F) -> F:
    """Add `--json`, output for programs, to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def cluster_file(choice: str | None) -> Path:
    """The cluster file that was chosen, or the first default that exists; raises `ConfigError`.

    A command's own `--cluster` wins over that of `dfs`, which wins over DFS_CLUSTER.
    """
    choice = choice or click.get_current_context().find_root().params.get("cluster_path")
    if choice:
        path = Path(choice)
        if path.is_dir():
            path /= "cluster.json"
        if not path.exists():
            raise ConfigError(
                f"there is no cluster file {path}: `dfs cluster init` makes one, "
                "--cluster or DFS_CLUSTER chooses another"
            )
        return path
    for path in DEFAULTS:
        if path.exists():
            return path
    raise ConfigError(
        "no cluster is chosen: give --cluster FILE, set DFS_CLUSTER, or make a cluster here "
        "with `dfs cluster init`"
    )


def run(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run an async function to its end; a group of one error is raised as that error.

    What the client library logs is shown only if DFS_LOG names a level: its errors are raised, and
    we show them in one line.
    """
    import logging

    import trio

    logging.basicConfig(level=os.environ.get("DFS_LOG", "critical").upper())
    try:
        return trio.run(fn, *args)
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        interrupts = [e for e in leaves if isinstance(e, KeyboardInterrupt)]
        if len(leaves) == 1 or interrupts:
            raise (interrupts or leaves)[0] from None
        raise


def explain(error: BaseException) -> list[str] | None:
    """The lines to show for an error that people can act on; None for one that is a defect."""
    lines: list[str] = []
    for leaf in _leaves(error):
        if isinstance(leaf, DfsError):
            text = str(leaf)
        elif isinstance(leaf, OSError) and leaf.errno:
            names = [os.fspath(n) for n in (leaf.filename, leaf.filename2) if n is not None]
            shown = " -> ".join(os.fsdecode(n) for n in names)
            reason = os.strerror(leaf.errno)
            text = f"{shown}: {reason}" if shown else reason
        else:
            return None
        line = " ".join(text.split())
        if line not in lines:
            lines.append(line)
    return lines


def echo_json(value: Any) -> None:
    """Print a value as JSON; bytes as hex."""
    click.echo(json.dumps(value, indent=1, default=_jsonable))


def human_size(size: float) -> str:
    """A byte count as people read it, such as `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    raise TypeError(f"no JSON for {type(value).__name__}")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
