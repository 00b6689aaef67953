"""`dfs sim` and `dfs fsck`: they look for violations, and their exit status tells."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Protocol

import click

from dfs.cli.context import cluster_file, cluster_option, echo_json, explain, json_option
from dfs.cli.context import run as run_async
from dfs.errors import ConfigError, DfsError


class Scenario(Protocol):
    """What a module `dfs.testing.scenario_*` offers."""

    NAME: str
    MUTANTS: Mapping[str, str]  # name -> what it breaks
    run: Callable[..., list[str]]


@click.command()
@click.option("--scenario", help="Its name; see --list.")
@click.option("--seeds", default="1..20", show_default=True, metavar="FIRST..LAST")
@click.option("--mutant", help="Break one rule on purpose: the checks must notice.")
@click.option("--mutants", is_flag=True, help="Look for every mutant; a table of seed and time.")
@click.option(
    "--nightly", type=int, metavar="N", help="N seeds, shared between all scenarios; a table."
)
@click.option("--list", "list_all", is_flag=True, help="Show scenarios and their mutants.")
@json_option
@click.pass_context
def sim(
    ctx: click.Context,
    scenario: str | None,
    seeds: str,
    mutant: str | None,
    mutants: bool,
    nightly: int | None,
    list_all: bool,
    as_json: bool,
) -> None:
    """Run a scenario of the deterministic simulator once per seed.

    Every violation is printed with its seed; the same seed gives the same run on any machine.
    Exit status 1 if there were violations.
    """
    known = scenarios()
    if list_all:
        listed: list[dict[str, Any]] = [
            {"name": name, "about": _about(s), "mutants": _mutants(s)} for name, s in known.items()
        ]
        if as_json:
            echo_json(listed)
            return
        for entry in listed:
            click.echo(f"{entry['name']}: {entry['about']}")
            for name, broken in entry["mutants"].items():
                click.echo(f"    --mutant {name:20} {broken}")
        return
    if nightly is not None:
        chosen_ones = known if scenario is None else {scenario: known[scenario]}
        ctx.exit(1 if _nightly(chosen_ones, nightly, parse_seeds(seeds)[0], as_json) else 0)
    if scenario not in known:
        raise click.UsageError(f"--scenario must be one of: {', '.join(known)}")
    chosen = known[scenario]
    if mutant is not None and mutant not in chosen.MUTANTS:
        raise click.UsageError(f"--mutant must be one of: {', '.join(sorted(chosen.MUTANTS))}")
    first, last = parse_seeds(seeds)
    if mutants:
        ctx.exit(1 if _find_mutants(chosen, range(first, last + 1), as_json) else 0)
    found: list[dict[str, Any]] = []
    for seed in range(first, last + 1):
        for violation in chosen.run(seed, mutant=mutant):
            found.append({"seed": seed, "violation": violation})
            if not as_json:
                click.echo(f"seed {seed}: {violation}")
    count = last - first + 1
    if as_json:
        echo_json({"scenario": scenario, "mutant": mutant, "seeds": count, "violations": found})
    else:
        click.echo(f"{count} seeds, {len(found)} violations")
    ctx.exit(1 if found else 0)


def _nightly(known: Mapping[str, Scenario], count: int, first: int, as_json: bool) -> int:
    """Seeds in turn for each scenario, until `count` in all; returns how many violations."""
    share = max(1, count // len(known))
    table = []
    for name, one in known.items():
        began, found = perf_counter(), 0
        for seed in range(first, first + share):
            for violation in one.run(seed):
                found += 1
                click.echo(f"{name}: seed {seed}: {violation}", err=as_json)
        row = {"scenario": name, "seeds": share, "violations": found}
        table.append(row | {"seconds": round(perf_counter() - began, 1)})
        if not as_json:
            click.echo(f"{name:12} {share:7} seeds {found:5} violations {table[-1]['seconds']:9} s")
    if as_json:
        echo_json(table)
    return sum(int(str(row["violations"])) for row in table)


def _find_mutants(chosen: Scenario, seeds: range, as_json: bool) -> int:
    """The first seed that shows each mutant; returns how many stay unseen."""
    table = []
    for name in chosen.MUTANTS:
        began, seen = perf_counter(), None
        violation = ""
        for seed in seeds:
            try:
                found = chosen.run(seed, mutant=name)
            except Exception as e:  # what is broken may also break down: that shows it, too
                found = [f"{type(e).__name__}: {e}"]
            if found:
                seen, violation = seed, found[0]
                break
        seconds = round(perf_counter() - began, 1)
        table.append({"mutant": name, "seed": seen, "seconds": seconds, "violation": violation})
        if not as_json:
            shown = "not seen" if seen is None else f"seed {seen}"
            click.echo(f"{name:16} {shown:12} {seconds:7} s  {violation[:90]}")
    if as_json:
        echo_json(table)
    return sum(row["seed"] is None for row in table)


def scenarios() -> dict[str, Scenario]:
    """All scenario modules by name."""
    import dfs.testing

    found: dict[str, Scenario] = {}
    for module in pkgutil.iter_modules(dfs.testing.__path__):
        if module.name.startswith("scenario_"):
            loaded: Any = importlib.import_module(f"dfs.testing.{module.name}")
            found[loaded.NAME] = loaded
    return dict(sorted(found.items()))


def parse_seeds(text: str) -> tuple[int, int]:
    """(first, last) of `FIRST..LAST` or of a single number."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else -1
    if first > last:
        raise click.UsageError(f"--seeds takes FIRST..LAST, such as 1..20, not {text}")
    return first, last


def _mutants(scenario: Any) -> dict[str, str]:
    """Name and meaning of each mutant; a scenario may also just name them."""
    mutants = scenario.MUTANTS
    if isinstance(mutants, Mapping):
        return {str(name): str(about) for name, about in mutants.items()}
    return {str(name): "" for name in mutants}


def _about(scenario: Any) -> str:
    return str(scenario.__doc__ or "").strip().splitlines()[0]


@click.command()
@cluster_option
@json_option
@click.option("--all-copies", is_flag=True, help="Every chunk must have all its copies, not W.")
@click.option("--repair", is_flag=True, help="Make good what can be; nobody else may write.")
@click.argument("volume")
@click.pass_context
def fsck(
    ctx: click.Context,
    cluster_path: str | None,
    as_json: bool,
    all_copies: bool,
    repair: bool,
    volume: str,
) -> None:
    """Check VOLUME: its tree, link counts, usage, and that every chunk is there and intact.

    Without --repair it only reads, and others may go on writing.

    --repair corrects link counts, parents, sizes of directories and the usage, drops names that
    lead to nothing, finishes removals of files whose user is gone, gives what has lost its name one
    in /lost+found, and waits for servers to copy chunks again. It prints what it did. It never
    guesses: data that nobody has is listed with file, range and what to do. Chunks that nothing
    refers to are left alone.

    \b
    Exit status, as of fsck(8):
      0  sound
      1  problems were found and all of them corrected
      4  problems are left
      8  the check could not be done; a line on stderr says why
    """
    from dfs.cli.client import connected, registry

    module: Any
    try:
        module = importlib.import_module("dfs.client.fsck")
    except ModuleNotFoundError as e:
        raise ConfigError("this installation of dfs has no fsck") from e

    async def check() -> Any:
        async with connected(cluster_file(cluster_path)) as cluster:
            async with registry(cluster, mode="ro") as volumes:
                await volumes.find(volume)
            return await module.fsck(cluster, volume, all_copies=all_copies, repair=repair)

    try:
        report = run_async(check)
    except (DfsError, OSError) as e:
        for line in explain(e) or [str(e)]:
            click.echo(f"dfs: {line}", err=True)
        ctx.exit(8)
    if as_json:
        echo_json(report.as_dict())
    else:
        for line in report.lines():
            click.echo(line)
    ctx.exit(report.status)
