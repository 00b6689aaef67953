"""What commands share: choosing the cluster, running trio, showing errors and tables."""

import contextlib
import contextvars
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dfs.errors import ConfigError, DfsError, leaves

if TYPE_CHECKING:
    import trio

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = (Path(".demo/cluster.json"), Path("cluster.json"))
PATIENCE = 15.0  # seconds a command waits for a quorum, unless --timeout says otherwise
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Interrupted(Exception):
    """A signal ended the command after it had cleaned up."""

    def __init__(self, number: int) -> None:
        """The signal's number."""
        super().__init__(number)
        self.number = number


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


def patience() -> float:
    """Seconds to wait for a quorum: `dfs --timeout`."""
    ctx = click.get_current_context(silent=True)
    chosen = ctx.find_root().params.get("timeout") if ctx is not None else None
    return float(chosen) if chosen else PATIENCE


def run(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run an async function to its end; a group of one error is raised as that error.

    SIGINT and SIGTERM cancel the innermost `interruptible` block, and the command ends with
    `Interrupted` once it has cleaned up; a second signal ends it without.  What the client library
    logs is shown only if DFS_LOG names a level: its errors are raised, and we show them in one
    line.
    """
    import logging

    import trio

    level = os.environ.get("DFS_LOG", "critical").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"DFS_LOG={level.lower()} is no level: debug, info, warning or error")
    logging.basicConfig(level=level)
    received: list[int] = []
    scopes: list[trio.CancelScope] = []

    async def main() -> T:
        import signal

        async def listen() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                nursery.start_soon(work)
                async for number in signals:
                    received.append(number)
                    # all scopes at the second one: whoever is impatient need not wait for cleaning
                    for scope in scopes if received[1:] else scopes[-1:]:
                        scope.cancel()

        async def work() -> None:
            with interruptible():
                result.append(await fn(*args))
            nursery.cancel_scope.cancel()

        result: list[T] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
        if not result:
            raise Interrupted(received[0])
        return result[0]

    token = _scopes.set(scopes)
    try:
        return trio.run(main)
    except BaseException as e:
        if received and not isinstance(e, Interrupted):
            raise Interrupted(received[0]) from e
        causes = list(leaves(e))
        if len(causes) == 1 and causes[0] is not e:
            raise causes[0] from None
        raise
    finally:
        _scopes.reset(token)


_scopes: "contextvars.ContextVar[list[trio.CancelScope]]" = contextvars.ContextVar("scopes")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What a signal cancels: the code around the block still has everything it needs to clean up.

    Raises `Interrupted` at its end when it was cancelled.
    """
    import trio

    scopes = _scopes.get()
    with trio.CancelScope() as scope:
        scopes.append(scope)
        try:
            yield
        finally:
            scopes.remove(scope)
    if scope.cancelled_caught:
        raise Interrupted(0)


def standard_stream(name: str) -> Any:
    """The binary stream of `stdin` or `stdout`; raises `ConfigError` when it is closed."""
    stream = getattr(sys, name)
    if stream is None:
        raise ConfigError(f"standard {name.removeprefix('std')}put is closed: redirect it")
    return stream.buffer


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """Name standard output in errors of the block, which writes there and nowhere else."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise OSError(e.errno, e.strerror, "standard output") from e


def count(number: int, noun: str) -> str:
    """`1 file`, `2 files`, `2 processes`."""
    ending = "es" if noun.endswith(("s", "sh")) else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"


def printable(text: str) -> str:
    """Text with control characters escaped, so that a file's name cannot play with a terminal."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def explain(error: BaseException) -> list[str] | None:
    """The lines to show for an error that people can act on; None for one that is a defect."""
    lines: list[str] = []
    for leaf in leaves(error):
        if isinstance(leaf, DfsError):
            text = str(leaf)
        elif isinstance(leaf, OSError) and leaf.errno:
            names = [os.fspath(n) for n in (leaf.filename, leaf.filename2) if n is not None]
            shown = " -> ".join(printable(os.fsdecode(n)) for n in names)
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
