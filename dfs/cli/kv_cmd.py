"""`dfs kv`: the registers of a cluster, from the command line."""

import base64
import binascii
import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dfs.cli.context import (
    cluster_file,
    cluster_option,
    count,
    echo_json,
    human_size,
    json_option,
    patience,
    standard_stream,
    writing_stdout,
)
from dfs.cli.context import run as run_async
from dfs.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from dfs.client.kv import KV, Entry

F = TypeVar("F", bound=Callable[..., Any])
_CHECK = 6  # bytes in front of a context
_NUMBERS = {
    "n": "Replicas that take part.",
    "r": "Answers a read needs.",
    "w": "Durable copies a write needs.",
    "pr": "Answers of homes a read needs.",
    "pw": "Durable copies on homes a write needs.",
}


def _options(*names: str) -> Callable[[F], F]:
    """Add --level, the numbers that matter to a command, and --eventual."""

    def add(command: F) -> F:
        command = click.option(
            "--eventual",
            is_flag=True,
            help="Allow R + W <= N, and do not wait for repair: reads may be old.",
        )(command)
        for name in reversed(names):
            command = click.option(f"--{name}", type=click.IntRange(0), help=_NUMBERS[name])(
                command
            )
        levels = click.Choice(["one", "quorum", "all", "local-quorum", "each-zone"])
        return click.option("--level", type=levels, help="How many replicas. [default: quorum]")(
            command
        )

    return add


_hex_option = click.option(
    "--hex", "as_hex", is_flag=True, help="Keys and values are hexadecimal: for binary ones."
)


def _bytes(text: str, what: str, *, as_hex: bool) -> bytes:
    """What an argument says; one that is no UTF-8 is the bytes that were typed."""
    if not as_hex:
        return os.fsencode(text)
    try:
        return bytes.fromhex(text)
    except ValueError as e:
        raise InvalidArgument(f"{what} {text!r:.60} is not hexadecimal, as --hex says") from e


def _chosen(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in options.items() if value is not None and value is not False
    }


@click.group()
def kv() -> None:
    """Read and write the cluster's key-value store.

    A key may hold several values that were written concurrently. `get` shows them all with a
    context; a put with that context resolves them.
    """


@kv.command()
@cluster_option
@json_option
@_options("n", "r", "pr")
@_hex_option
@click.argument("key")
def get(cluster_path: str | None, as_json: bool, as_hex: bool, key: str, **options: Any) -> None:
    """Print the value of KEY.

    With several values (siblings): all of them, newest first, one a line, and the context on
    standard error. Exit status 1 if there is none.  A value is written as it is; with --hex in
    hexadecimal.

    \b
    Examples:
      dfs kv get colour
      dfs kv get --hex 00ff
      dfs kv get colour --level all --json
    """

    name = _bytes(key, "the key", as_hex=as_hex)

    async def work(store: "KV") -> "Entry":
        return await store.get(name, **_chosen(options))

    entry = _run(cluster_path, work)
    if as_json:
        echo_json(_as_dict(entry))
        return
    if not entry.values:
        raise NotFound(f"the key {_key_text(name)} has no value")
    with writing_stdout():
        out = standard_stream("stdout")
        for value in entry.values:
            out.write(value.hex().encode() if as_hex else value)
            if as_hex or len(entry.values) > 1 or sys.stdout.isatty():
                out.write(b"\n")
        out.flush()
    if len(entry.values) > 1:
        click.echo(
            f"{count(len(entry.values), 'sibling')}; resolve: "
            f"dfs kv put {'--hex ' if as_hex else ''}{shlex.quote(key)} VALUE --context "
            f"{_show(entry.key, entry.context)}",
            err=True,
        )


@kv.command()
@cluster_option
@json_option
@_options("n", "w", "pw", "r")
@click.option("--context", metavar="CONTEXT", help="What `get` printed: supersede just that.")
@click.option("--blind", is_flag=True, help="Supersede nothing: leave a sibling if there is one.")
@_hex_option
@click.argument("key")
@click.argument("value")
def put(
    cluster_path: str | None,
    as_json: bool,
    context: str | None,
    blind: bool,
    as_hex: bool,
    key: str,
    value: str,
    **options: Any,
) -> None:
    """Set KEY to VALUE (`-`: standard input).

    Without --context it supersedes what its coordinator sees at that moment.

    \b
    Examples:
      dfs kv put colour blue
      dfs kv put colour green --level all
      dfs kv put photo - < photo.jpg
      dfs kv put --hex 00ff cafe
    """
    name = _bytes(key, "the key", as_hex=as_hex)
    if value == "-":
        content = standard_stream("stdin").read()
    else:
        content = _bytes(value, "the value", as_hex=as_hex)
    seen = _context(context, name, blind=blind)

    async def work(store: "KV") -> "Entry":
        return await store.put(name, content, context=seen, **_chosen(options))

    _tell(_run(cluster_path, work), as_json=as_json)


@kv.command()
@cluster_option
@json_option
@_options("n", "w", "pw", "r")
@click.option("--context", metavar="CONTEXT", help="What `get` printed: delete just that.")
@_hex_option
@click.argument("key")
def delete(
    cluster_path: str | None,
    as_json: bool,
    context: str | None,
    as_hex: bool,
    key: str,
    **options: Any,
) -> None:
    """Delete what KEY holds; harmless if it holds nothing."""
    name = _bytes(key, "the key", as_hex=as_hex)
    seen = _context(context, name, blind=False)

    async def work(store: "KV") -> "Entry":
        return await store.delete(name, context=seen, **_chosen(options))

    _tell(_run(cluster_path, work), as_json=as_json)


@kv.command()
@cluster_option
@json_option
@_options("n", "r", "pr")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--keys", "only_keys", is_flag=True, help="Print keys without values.")
@_hex_option
@click.argument("prefix", default="")
def scan(
    cluster_path: str | None,
    as_json: bool,
    limit: int,
    only_keys: bool,
    as_hex: bool,
    prefix: str,
    **options: Any,
) -> None:
    """List the keys that start with PREFIX, with their values, in order.

    The order is complete as long as there are at most --limit keys; of more, some are shown.
    """

    start = _bytes(prefix, "the prefix", as_hex=as_hex)
    shown_as: Callable[[bytes], str] = bytes.hex if as_hex else _text

    async def work(store: "KV") -> "tuple[list[Entry], bool]":
        found: list[Entry] = []
        async with contextlib.aclosing(store.scan(start, **_chosen(options))) as entries:
            async for entry in entries:
                if len(found) == limit:
                    return found, True
                found.append(entry)
        return found, False

    found, more = _run(cluster_path, work)
    found.sort(key=lambda entry: entry.key)
    if as_json:
        echo_json([_as_dict(entry) for entry in found])
    else:
        for entry in found:
            values = "" if only_keys else "\t" + " | ".join(map(shown_as, entry.values))
            name = entry.key.hex() if as_hex else _key_text(entry.key)
            click.echo(name + values)
    if more:
        click.echo(f"there are more than {limit} keys: --limit shows more", err=True)


@kv.command()
@cluster_option
@json_option
@click.argument("key")
def where(cluster_path: str | None, as_json: bool, key: str) -> None:
    """Show where KEY lives: its partition, its homes, and who stands in for them."""
    from dfs.cli.client import connected
    from dfs.client.kv import partition_of_key
    from dfs.cluster.map import METADATA

    async def work() -> dict[str, Any]:
        async with connected(cluster_file(cluster_path)) as cluster:
            newest = cluster.get_map()
            partition = partition_of_key(key.encode())
            homes = newest.homes(METADATA, partition)
            rest = [n for n in newest.preference(METADATA, partition) if n not in homes]
            return {
                "partition": partition,
                "homes": [newest.node(n).name for n in homes],
                "fallbacks": [newest.node(n).name for n in rest],
            }

    found = run_async(work)
    if as_json:
        echo_json(found)
        return
    click.echo(f"partition {found['partition']}, homes {', '.join(found['homes'])}")
    if found["fallbacks"]:
        click.echo(f"then {', '.join(found['fallbacks'])}")


@kv.command()
@cluster_option
@json_option
@click.argument("node", default="")
def lsm(cluster_path: str | None, as_json: bool, node: str) -> None:
    """Show the storage engine of every metadata node, or of NODE.

    Levels with their tables and sizes, amplification, caches and filters.
    """
    from dfs.cli.lsm import show_lsm

    show_lsm(cluster_file(cluster_path), node, as_json=as_json)


def _run(cluster_path: str | None, work: Callable[["KV"], Any]) -> Any:
    from dfs.cli.client import connected
    from dfs.client.kv import KV

    async def main() -> Any:
        async with connected(cluster_file(cluster_path)) as cluster:
            return await work(KV(cluster, timeout=patience()))

    return run_async(main)


def _context(text: str | None, key: bytes, *, blind: bool) -> bytes | None:
    if text is None:
        return b"" if blind else None
    if blind:
        raise InvalidArgument("--blind supersedes nothing, --context something: give one of them")
    try:
        plain = base64.b64decode(
            text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
        )
    except (ValueError, binascii.Error):
        plain = b""
    context = plain[_CHECK:]
    if len(plain) < _CHECK or plain[:_CHECK] != _check(key, context):
        raise InvalidArgument(
            f"{text!r:.60} is no context of the key {_key_text(key)}: use the one that "
            "`dfs kv get` shows for this key"
        )
    return context


def _check(key: bytes, context: bytes) -> bytes:
    """What ties a context to its key: a node could not tell that it is another key's."""
    from dfs.hashing import digest_parts

    return digest_parts(b"dfs kv context", len(key).to_bytes(2, "big"), key, context)[:_CHECK]


def _show(key: bytes, context: bytes) -> str:
    return base64.urlsafe_b64encode(_check(key, context) + context).decode().rstrip("=")


def _json_text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"hex": value.hex()}


def _tell(entry: "Entry", *, as_json: bool) -> None:
    if as_json:
        echo_json(_as_dict(entry))
        return
    acked, hinted = entry.info.get("acked", ()), entry.info.get("hinted", ())
    late = f", a hint for {count(len(hinted), 'node')}" if hinted else ""
    click.echo(f"ok: durable on {count(len(acked), 'node')}{late}")


def _text(value: bytes) -> str:
    """A value in one line: text as it is, anything else by its size."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return f"({human_size(len(value))} of binary data)"
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _key_text(key: bytes) -> str:
    """A key in one line, such that different keys look different."""
    text = key.decode(errors="backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _as_dict(entry: "Entry") -> dict[str, Any]:
    """Key and values that are text as text, others as {"hex": ...}."""
    return {
        "key": _json_text(entry.key),
        "values": [_json_text(value) for value in entry.values],
        "context": _show(entry.key, entry.context),
        **({"info": entry.info} if entry.info else {}),
    }
