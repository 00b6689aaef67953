"""A tour of the metadata store on a local cluster of five: commands and what they print.

`python tests/tour.py` runs it and prints Markdown; `--write` puts it into metadata/README.md between
its markers.  tests/integration/test_tour.py runs the same commands and judges them: each must end
as it is marked and show what it promises, so that the page stays true.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "metadata" / "README.md"
BEGIN, END = "<!-- tour: begin -->\n", "<!-- tour: end -->\n"


class Step(NamedTuple):
    """A command, what its output must match, and whether it must fail."""

    command: str
    shows: str = ""  # regular expression
    fails: bool = False
    tries: int = 1  # seconds apart, until it shows that
    lines: int = 14  # of output to print


class Part(NamedTuple):
    title: str
    text: str
    steps: tuple[Step, ...]


KILL = "kill -9 $(cat tour/run/{0}-metadata.pid)"

PARTS = (
    Part(
        "Five nodes",
        "Everything below was typed on one machine; the nodes are processes on loopback ports.",
        (
            Step("dfs cluster init --dir tour --nodes 5 --base-port {port}", "5 nodes"),
            Step("export DFS_CLUSTER=$PWD/tour/cluster.json"),
            Step("dfs cluster up", "up: node1, node2, node3, node4, node5"),
            Step("dfs cluster status | head -8", "available, 5 nodes"),
        ),
    ),
    Part(
        "Membership and failure detection",
        "SWIM over the RPC connections. A node that is killed is suspected within seconds and "
        "declared dead when it does not object; it comes back by itself. A client needs one seed.",
        (
            Step("dfs node members node1", r"node5 +metadata +alive", tries=10),
            Step(KILL.format("node5")),
            Step("dfs node members node1 | grep node5", r"metadata +(suspect|dead)", tries=25),
            Step("dfs cluster up node5", "1 process started"),
            Step("dfs node members node1 | grep node5", r"metadata +alive", tries=25),
        ),
    ),
    Part(
        "Registers, quorums and levels",
        "Any home coordinates. `where` shows them. Levels are per request; numbers, too.",
        (
            Step("dfs kv put colour blue", "durable on [23] nodes"),
            Step("dfs kv get colour; echo", "blue"),
            Step("dfs kv put colour green --level all", "durable on 3 nodes"),
            Step("dfs kv get colour --level one; echo", "green"),
            Step("dfs kv get colour --r 3 --json", '"green"'),
            Step("dfs kv where colour", r"partition \d+, homes"),
            Step("dfs kv put colour red --w 1", "R . W|eventual", fails=True),
        ),
    ),
    Part(
        "Versions",
        "Concurrent writes are kept side by side until somebody who saw them writes again. "
        "A put supersedes what its coordinator sees; `--blind` supersedes nothing.",
        (
            Step("dfs kv put cart milk", "ok"),
            Step("dfs kv put cart bread --blind", "ok"),
            Step("dfs kv get cart", "(?s)bread.*milk.*2 siblings"),
            Step(
                "dfs kv put cart 'milk and bread' "
                '--context "$(dfs kv get cart --json | python3 -c '
                '\'import json, sys; print(json.load(sys.stdin)["context"])\')"',
                "ok",
            ),
            Step("dfs kv get cart; echo", "^milk and bread\n"),
            Step("dfs kv delete cart", "ok"),
            Step("dfs kv get cart", "no value", fails=True),
            Step("dfs kv scan c", "colour\tgreen"),
        ),
    ),
    Part(
        "Temporary failure: hints",
        "With a home away another node takes the copy and keeps it for the home. A strict quorum "
        "of homes is still needed (PW = 2); without one the error says who answered.",
        (
            Step(
                "for n in $(dfs kv where colour --json | python3 -c "
                "'import json, sys; print(*json.load(sys.stdin)[\"homes\"][1:])'); "
                "do kill -9 $(cat tour/run/$n-metadata.pid); done"
            ),
            Step("dfs kv put colour red", "2 of 3 needed", fails=True),
            Step("dfs kv put colour red --blind --w 2 --pw 1", "a hint for"),
            Step("dfs hints list", r"for +hints", fails=True, lines=8),
            Step("dfs kv get colour --level one; echo", "red"),
            Step("dfs cluster up", "2 processes started"),
            Step("dfs hints list", r"^node. +node. +0 +0 B +- +1 +1 +0$", tries=40, lines=8),
            Step("dfs kv get colour --level all; echo", "red"),
        ),
    ),
    Part(
        "Permanent failure: anti-entropy",
        "What neither writes nor hints delivered is found by comparing digests, every ten minutes "
        "and when a node comes back.",
        (
            Step(KILL.format("node2")),
            Step(
                "for i in $(seq 40); do dfs kv put key$i value$i > tour/out || echo lost; done",
            ),
            Step("dfs hints drop node2", "dropped"),
            Step("dfs cluster up node2", "1 process started"),
            Step(
                "dfs node workers | grep -E 'anti-entropy|storage-repair'",
                r"[1-9]\d* (pulled|pushed)|pulled, [1-9]",
                tries=60,
            ),
            Step("dfs kv get key7 --level all; echo", "value7"),
            Step("dfs kv scan key --level all --keys | wc -l", "40"),
        ),
    ),
    Part(
        "Consistent hashing: nodes come and go",
        "Changes are staged, planned, applied; then data moves while reads and writes go on. "
        "Maps are agreed by the voters; each step of a move is an epoch.",
        (
            Step("dfs cluster node add node6", "staged: add node6"),
            Step("dfs cluster plan", r"epoch 1 -> 2", lines=24),
            Step("dfs cluster apply --epoch 2 --wait 90", "is stable", lines=8),
            Step("dfs cluster map --history", "add node6"),
            Step("dfs cluster node drain node1", "staged: drain node1"),
            Step("dfs cluster apply --epoch 7 --wait 90", "is stable"),
            Step("dfs kv scan key --level all --keys | wc -l", "40"),
            Step(KILL.format("node2") + "; kill -9 $(cat tour/run/node2-chunkserver.pid)"),
            Step("dfs cluster node remove node2", "staged: remove node2"),
            Step(
                "dfs cluster apply --wait 90 --epoch "
                "$(dfs cluster map --json | python3 -c "
                "'import json, sys; print(json.load(sys.stdin)[\"epoch\"] + 1)')",
                "is stable",
            ),
            Step("dfs kv scan key --level all --keys | wc -l", "40"),
            Step("dfs cluster map", "removed for ever: 2", lines=9),
        ),
    ),
    Part(
        "The engine",
        "",
        (Step("dfs kv lsm node3", "write"),),
    ),
    Part(
        "Background loops and metrics",
        "Every loop can be listed, run, paused and resumed; every number is there for Prometheus.",
        (
            Step("dfs node workers node3", "anti-entropy", lines=24),
            Step("dfs node workers node3 --run anti-entropy", "anti-entropy"),
            Step(
                "curl -s $(dfs cluster status --json | python3 -c 'import json, sys; "
                'print(json.load(sys.stdin)["nodes"][1]["roles"]["metadata"]["metrics"])\')/metrics'
                " | grep -E '^dfs_(kv_puts|hints|merkle|disk_free|map_epoch|stale)'",
                "dfs_map_epoch",
            ),
            Step("dfs cluster down", "stopped"),
        ),
    ),
)


class Tour:
    """Runs the steps in one shell."""

    def __init__(self, where: Path, port: int) -> None:
        """In directory `where`, the cluster's ports from `port` on."""
        self.where = where
        self.port = port
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "NO_COLOR": "1", "COLUMNS": "100"}
        environment.pop("DFS_CLUSTER", None)
        self.environment = environment
        self.shell = subprocess.Popen(
            ["/bin/bash", "--norc"],
            cwd=where,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> tuple[str, int]:
        """Output and exit status of one command."""
        assert self.shell.stdin
        assert self.shell.stdout
        end = "---end-of-command---"
        self.shell.stdin.write(f"{command}\nstatus=$?; echo; echo {end} $status\n")
        self.shell.stdin.flush()
        lines: list[str] = []
        for line in self.shell.stdout:
            if line.startswith(end):
                break
            lines.append(line)
        output = "".join(lines)
        return output.removesuffix("\n"), int(line.split()[-1])

    def step(self, step: Step) -> tuple[str, str]:
        """(what is wrong or "", output) of a step."""
        command = step.command.replace("{port}", str(self.port))
        for left in reversed(range(step.tries)):
            began = time.monotonic()
            output, status = self.run(command)
            if re.search(step.shows, output, re.MULTILINE) and bool(status) == step.fails:
                return "", output
            if left:
                time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
        return f"`{command}` ({status}) does not show {step.shows!r}:\n{output}", output

    def close(self) -> None:
        """End the shell, and the cluster if it is still there."""
        if (self.where / "tour" / "cluster.json").exists():
            subprocess.run(
                [sys.executable, "-m", "dfs.cli.main", "cluster", "down", "--dir", "tour"],
                cwd=self.where,
                env={**self.environment, "PYTHONPATH": str(ROOT)},
                check=False,
                capture_output=True,
                timeout=60,
            )
        self.shell.terminate()
        self.shell.communicate()


def markdown(tour: Tour) -> str:
    """Run everything; the page.  Raises `AssertionError` at the first step that is not true."""
    out = []
    for part in PARTS:
        out.append(f"### {part.title}\n")
        if part.text:
            out.append(textwrap.fill(part.text, 118) + "\n")
        out.append("```console")
        for step in part.steps:
            wrong, output = tour.step(step)
            assert not wrong, wrong
            shown = [line.rstrip() for line in output.splitlines() if line.strip()]
            if len(shown) > step.lines:
                shown = [*shown[: step.lines - 1], f"... {len(shown) - step.lines + 1} more lines"]
            out.append(f"$ {step.command.replace('{port}', str(tour.port))}")
            out += [line.replace(str(tour.where), "/srv") for line in shown]
        out.append("```\n")
    return "\n".join(out)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the result into the page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        tour = Tour(Path(where), 7400)
        try:
            text = markdown(tour)
        finally:
            tour.close()
    if not args.write:
        print(text)
        return
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    PAGE.write_text(head + BEGIN + "\n" + text + "\n" + END + tail)


if __name__ == "__main__":
    main()
