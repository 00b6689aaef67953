"""The command line where it needs no cluster: usage, errors, plans, reports."""

import json
import subprocess
import sys
import types

import click
import pytest
from click.testing import CliRunner

from dfs.cli import check_cmd, context
from dfs.cli.main import COMMANDS, cli, main
from dfs.cli.network import partitions_without_quorum, system_genesis
from dfs.cli.plan import words
from dfs.cli.spec import local_nodes
from dfs.cli.status import summarise
from dfs.cluster.map import CHUNK, METADATA, ClusterMap, Params
from dfs.cluster.placement import Placer, balance
from dfs.cluster.tables import candidates
from dfs.errors import ConfigError, NoQuorum, Unreachable
from dfs.ids import SYSTEM_VOLUME
from dfs.volume import entries

CLUSTER = ClusterMap.create(bytes(range(16)), local_nodes(3, 3, 7400))


def run(*args, env=None):
    """Run in this process; returns click's `Result`."""
    return CliRunner().invoke(cli, [*map(str, args)], env={"DFS_CLUSTER": None, **(env or {})})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom dfs.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print('HEAVY', [m for m in ('trio', 'rich', 'msgpack', 'blake3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (NoQuorum("no quorum: two\nnodes are down"), 1, "dfs: no quorum: two nodes are down\n"),
        (FileNotFoundError(2, "x", "/nope"), 1, "dfs: /nope: No such file or directory\n"),
        (
            ExceptionGroup("g", [NoQuorum("a"), ExceptionGroup("h", [NoQuorum("a")])]),
            1,
            "dfs: a\n",
        ),
        (click.UsageError("wrong"), 2, "Error: wrong\n"),
        (click.ClickException("bad"), 1, "dfs: bad\n"),
        (KeyboardInterrupt(), 130, "dfs: interrupted\n"),
    ],
)
def test_errors_are_one_line_and_a_status(monkeypatch, capsys, error, status, text):
    def fail(*_args, **_kw):
        raise error

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == status
    assert capsys.readouterr().err == text


def test_a_defect_is_shown_with_its_traceback(monkeypatch):
    def fail(*_args, **_kw):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(ZeroDivisionError):
        main([])


def test_choice_of_the_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with click.Context(cli) as ctx:
        ctx.params = {}
        with pytest.raises(ConfigError, match="no cluster is chosen"):
            context.cluster_file(None)
        (tmp_path / "cluster.json").write_text("{}")
        assert context.cluster_file(None).name == "cluster.json"
        (tmp_path / ".demo").mkdir()
        (tmp_path / ".demo" / "cluster.json").write_text("{}")
        assert str(context.cluster_file(None)) == ".demo/cluster.json"
        ctx.params = {"cluster_path": str(tmp_path)}
        assert context.cluster_file(None) == tmp_path / "cluster.json"
        with pytest.raises(ConfigError, match="there is no cluster file"):
            context.cluster_file("elsewhere")


def test_init_makes_a_cluster_and_refuses_to_make_it_twice(tmp_path):
    result = run("cluster", "init", "--dir", tmp_path / "c", "--nodes", 4, "--base-port", 9000)
    assert result.exit_code == 0, result.output
    ref = json.loads((tmp_path / "c" / "cluster.json").read_text())
    assert ref["format"] == 1
    assert ref["seeds"][0] == "tcp://127.0.0.1:9000"
    assert len(ref["seeds"]) == 4
    again = run("cluster", "init", "--dir", tmp_path / "c")
    assert isinstance(again.exception, ConfigError)


def test_init_and_format_from_a_spec(tmp_path):
    spec = tmp_path / "c.json"
    nodes = [
        {"name": n, "metadata_addr": f"10.0.0.{i}:1", "chunk_addr": f"10.0.0.{i}:2"}
        for i, n in enumerate("abc", 1)
    ]
    spec.write_text(json.dumps({"nodes": nodes}))
    result = run("cluster", "init", "--dir", tmp_path / "c", "--spec", spec)
    assert "dfs node format" in result.output
    assert not (tmp_path / "c" / "a").exists()
    made = ["node", "format", "--cluster-map", tmp_path / "c" / "map", "--data", tmp_path / "d"]
    assert "made" in run(*made, "--name", "a").output
    assert "already" in run(*made, "--name", "a").output
    assert isinstance(run(*made, "--name", "b").exception, ConfigError)
    assert isinstance(run(*made, "--name", "z").exception, ConfigError)


def test_plan_says_what_is_shared():
    good = local_nodes(3, 3, 7400)
    found = candidates(good, CHUNK)
    lines = words(good, balance(found, Placer(found).table(3)), Params())
    assert not any("WARNING" in line for line in lines)
    bad = local_nodes(4, 2, 7400)
    found = candidates(bad, CHUNK)
    lines = words(bad, balance(found, Placer(found).table(3)), Params())
    assert "4096 of 4096 partitions have two copies in one zone (2 zones)" in lines[0]
    report = json.loads(run("cluster", "plan", "--nodes", 5, "--json").stdout)
    assert sum(n["partitions"] for n in report["chunk"]["nodes"]) == 3 * 4096
    assert run("cluster", "plan", "--nodes", 1).exit_code == 0


def answers(down=()):
    up = {"role": "x", "map_epoch": 1, "used": 5, "disk_free": 7, "uptime": 1.0}
    return {
        (n, role): Unreachable("refused") if (n, role) in down else dict(up)
        for n in (1, 2, 3)
        for role in (METADATA, CHUNK)
    }


def test_status_of_a_healthy_cluster():
    told = answers()
    told[1, METADATA]["volumes"] = ((SYSTEM_VOLUME, 4, None), (b"v" * 16, 9, 2))
    told[2, METADATA]["volumes"] = ((SYSTEM_VOLUME, 5, 3),)
    told[3, CHUNK].update(errors=(("corrupt copy", 2),), quarantined=1)
    report = summarise(CLUSTER, told)
    assert report["available"]
    assert [n["name"] for n in report["nodes"]] == ["node1", "node2", "node3"]
    assert report["nodes"][0]["roles"]["chunkserver"]["up"]
    assert report["nodes"][0]["roles"]["metadata"]["used"] == 5
    assert report["volumes"] == [
        {"id": "00" * 16, "system": True, "seq": 5, "owner": 3},
        {"id": (b"v" * 16).hex(), "system": False, "seq": 9, "owner": 2},
    ]
    assert report["errors"] == [
        {"node": "node3", "role": "chunkserver", "text": "corrupt copy", "count": 2}
    ]
    assert report["quarantined"] == 1


def test_status_without_quorum():
    one_down = summarise(CLUSTER, answers({(1, METADATA), (2, CHUNK)}))
    assert one_down["available"]
    assert one_down["nodes"][0]["roles"]["metadata"] == {
        "up": False,
        "address": "tcp://127.0.0.1:7400",
        "error": "refused",
    }
    two_down = summarise(CLUSTER, answers({(1, METADATA), (2, METADATA)}))
    assert not two_down["available"]
    assert two_down["partitions_without_quorum"] == {METADATA: 4096, CHUNK: 0}
    five = ClusterMap.create(bytes(16), local_nodes(5, 5, 7400))
    up = [(n, role) for n in (1, 2, 3) for role in (METADATA, CHUNK)]
    lost = partitions_without_quorum(five, up)
    assert 0 < lost[METADATA] < 4096


def test_a_node_with_another_map_is_reported():
    told = answers()
    told[2, CHUNK]["map_epoch"] = 3
    (error,) = summarise(CLUSTER, told)["errors"]
    assert "epoch 3" in error["text"]


def test_the_system_genesis_is_a_function_of_the_map():
    first = system_genesis(CLUSTER)
    assert system_genesis(ClusterMap.decode(CLUSTER.encode())) == first
    entry = entries.decode(first)
    params, version, members = entry.body
    assert (entry.kind, entry.stamp, version) == (entries.GENESIS, 1, 1)
    assert members == (1, 2, 3)
    assert len(params["salt"]) == 16
    other = ClusterMap.create(bytes(16), local_nodes(3, 3, 7400))
    assert system_genesis(other) != first


# -------------------------------------------------------------------------------------------- sim


@pytest.fixture
def scenario(monkeypatch):
    def simulate(seed, mutant=None):
        """One run."""
        return [f"bad {mutant}"] if mutant and seed % 2 else []

    module = types.SimpleNamespace(
        __doc__="A toy.\nMore.", NAME="toy", MUTANTS={"odd": "odd seeds fail"}, run=simulate
    )
    monkeypatch.setattr(check_cmd, "scenarios", lambda: {"toy": module})


@pytest.mark.usefixtures("scenario")
def test_sim():
    good = run("sim", "--scenario", "toy", "--seeds", "1..4")
    assert (good.exit_code, good.output) == (0, "4 seeds, 0 violations\n")
    bad = run("sim", "--scenario", "toy", "--seeds", "1..4", "--mutant", "odd")
    assert bad.exit_code == 1
    assert bad.output == "seed 1: bad odd\nseed 3: bad odd\n4 seeds, 2 violations\n"
    told = json.loads(
        run("sim", "--scenario", "toy", "--seeds", "3", "--mutant", "odd", "--json").output
    )
    assert told["violations"] == [{"seed": 3, "violation": "bad odd"}]
    assert "toy: A toy." in run("sim", "--list").output


@pytest.mark.usefixtures("scenario")
@pytest.mark.parametrize(
    "args",
    [
        ["--scenario", "nope"],
        [],
        ["--scenario", "toy", "--mutant", "even"],
        ["--scenario", "toy", "--seeds", "4..1"],
        ["--scenario", "toy", "--seeds", "x"],
    ],
)
def test_sim_usage(args):
    assert run("sim", *args).exit_code == 2


def test_human_size():
    shown = [context.human_size(n) for n in (0, 1023, 1024, 1536, 10 << 20, 250 << 30, 3 << 50)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "10.0 MiB", "250 GiB", "3072 TiB"]
