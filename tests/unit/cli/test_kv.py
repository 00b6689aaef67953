"""`dfs kv` against registers of a dict: every command, what it prints, what it refuses."""

import json

import pytest
from click.testing import CliRunner
from fakecluster import FakeCluster

from dfs.cli.main import cli
from dfs.errors import ConfigError, InvalidArgument, NoQuorum, NotFound, Unreachable


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    made = FakeCluster()
    made.patch(monkeypatch, "dfs.cli.lsm")
    (tmp_path / "cluster.json").write_text("{}")
    monkeypatch.setenv("DFS_CLUSTER", str(tmp_path))
    return made


def run(*args, stdin=None, fails=None):
    """The result of a command; `fails` is the error it must end with."""
    result = CliRunner().invoke(cli, [*args], input=stdin)
    if fails is None:
        assert result.exit_code == 0, (result.output, result.exception)
    else:
        assert isinstance(result.exception, fails), (result.output, result.exception)
    return result


def shown_context(result):
    return result.stderr.split("--context ")[1].split()[0]


def test_put_get_delete(cluster):
    assert run("kv", "put", "colour", "blue").stdout == "ok: durable on 3 nodes\n"
    assert cluster.registers[0, b"colour"] == (b"blue",)
    assert run("kv", "get", "colour").stdout == "blue"
    assert run("kv", "delete", "colour").stdout == "ok: durable on 3 nodes\n"
    error = run("kv", "get", "colour", fails=NotFound)
    assert str(error.exception) == "the key colour has no value"
    assert json.loads(run("kv", "get", "colour", "--json").stdout)["values"] == []


def test_a_missing_key_is_one_line_and_status_one(cluster, capsys):
    from dfs.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["kv", "get", "nothing\n"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "dfs: the key nothing\\n has no value\n"


def test_hints_are_told(cluster):
    cluster.answers["kv.put"] = (b"c", 1, {"acked": (1, 2), "hinted": (3,)})
    assert run("kv", "put", "k", "v").stdout == "ok: durable on 2 nodes, a hint for 1 node\n"
    told = json.loads(run("kv", "put", "k", "v", "--json").stdout)
    assert told["info"] == {"acked": [1, 2], "hinted": [3]}


def test_siblings_are_shown_with_a_context_that_resolves_them(cluster):
    run("kv", "put", "k", "one")
    run("kv", "put", "k", "two", "--blind")
    found = run("kv", "get", "k")
    assert found.stdout == "two\none\n"
    assert "2 siblings; resolve: dfs kv put k VALUE --context " in found.stderr
    run("kv", "put", "k", "both", "--context", shown_context(found))
    assert cluster.registers[0, b"k"] == (b"both",)
    assert cluster.asked[-1][2][3] == b"seen 2"
    again = json.loads(run("kv", "get", "k", "--json").stdout)
    assert (again["key"], again["values"]) == ("k", ["both"])
    run("kv", "delete", "k", "--context", again["context"])
    assert cluster.asked[-1][2][2:4] == (None, b"seen 1")


def test_contexts_of_other_keys_and_garbage_are_refused(cluster):
    run("kv", "put", "k", "one")
    run("kv", "put", "k", "two", "--blind")
    context = shown_context(run("kv", "get", "k"))
    for key, given in (("other", context), ("k", "AAAA"), ("k", ""), ("k", "?!"), ("k", "é")):
        for command in (("put", key, "v"), ("delete", key)):
            error = run("kv", *command, "--context", given, fails=InvalidArgument)
            assert f"is no context of the key {key}: use the one that `dfs kv get` shows" in str(
                error.exception
            )
    assert cluster.registers[0, b"k"] == (b"two", b"one")
    error = run("kv", "put", "k", "v", "--blind", "--context", context, fails=InvalidArgument)
    assert "give one of them" in str(error.exception)


def test_binary_keys_and_values(cluster):
    run("kv", "put", "--hex", "00ff", "fe01")
    assert cluster.registers == {(0, b"\0\xff"): (b"\xfe\x01",)}
    assert run("kv", "get", "--hex", "00ff").stdout == "fe01\n"
    told = json.loads(run("kv", "get", "--hex", "00FF", "--json").stdout)
    assert (told["key"], told["values"]) == ({"hex": "00ff"}, [{"hex": "fe01"}])
    assert run("kv", "scan", "--hex", "00").stdout == "00ff\tfe01\n"
    assert run("kv", "scan").stdout == "\\x00\\\\xff\t(2 B of binary data)\n"
    run("kv", "put", "--hex", "00ff", "02", "--blind")
    found = run("kv", "get", "--hex", "00ff")
    assert found.stdout == "02\nfe01\n"
    assert "dfs kv put --hex 00ff VALUE --context " in found.stderr
    run("kv", "put", "--hex", "00ff", "-", stdin=b"\x80raw")
    assert cluster.registers[0, b"\0\xff"] == (b"\x80raw",)
    run("kv", "delete", "--hex", "00ff")
    assert cluster.registers[0, b"\0\xff"] == ()
    for command, what in (
        (("get", "--hex", "xy"), "the key 'xy'"),
        (("put", "--hex", "00", "0"), "the value '0'"),
        (("delete", "--hex", "0"), "the key '0'"),
        (("scan", "--hex", "g"), "the prefix 'g'"),
    ):
        error = run("kv", *command, fails=InvalidArgument)
        assert str(error.exception) == f"{what} is not hexadecimal, as --hex says"


def test_values_are_written_as_they_are(cluster):
    run("kv", "put", "photo", "-", stdin=b"\xff\xd8\n")
    result = run("kv", "get", "photo")
    assert result.stdout_bytes == b"\xff\xd8\n"
    run("kv", "put", "a key", "x")
    run("kv", "put", "a key", "y", "--blind")
    assert "dfs kv put 'a key' VALUE" in run("kv", "get", "a key").stderr


def test_scan(cluster):
    for name in ("b", "a", "ab"):
        run("kv", "put", name, f"value of {name}")
    assert run("kv", "scan").stdout == "a\tvalue of a\nab\tvalue of ab\nb\tvalue of b\n"
    assert run("kv", "scan", "a", "--keys").stdout == "a\nab\n"
    limited = run("kv", "scan", "--limit", "2")
    assert limited.stdout.count("\n") == 2
    assert limited.stderr == "there are more than 2 keys: --limit shows more\n"
    told = json.loads(run("kv", "scan", "b", "--json").stdout)
    assert [(e["key"], e["values"]) for e in told] == [("b", ["value of b"])]
    assert run("kv", "scan", "zzz").stdout == ""


def test_options_reach_the_coordinator(cluster):
    run("kv", "put", "k", "v", "--level", "all", "--w", "2", "--pw", "0", "--eventual")
    options = dict(cluster.asked[-1][2][4])
    assert len(options.pop("request")) == 16
    assert options == {"level": "all", "w": 2, "pw": 0, "eventual": True}
    run("kv", "get", "k", "--r", "1", "--n", "3", "--pr", "0")
    assert cluster.asked[-1][2][2] == {"r": 1, "n": 3, "pr": 0}
    assert CliRunner().invoke(cli, ["kv", "get", "k", "--level", "most"]).exit_code == 2
    assert CliRunner().invoke(cli, ["kv", "get", "k", "--r", "-1"]).exit_code == 2


def test_errors_of_the_cluster_come_through(cluster):
    cluster.answers["kv.get"] = NoQuorum("1 of 2 homes answered")
    assert "1 of 2 homes" in str(run("kv", "get", "k", fails=NoQuorum).exception)
    run("kv", "get", "", fails=InvalidArgument)
    run("kv", "put", "k" * 1025, "v", fails=InvalidArgument)
    error = run("kv", "put", "k", "-", stdin=b"x" * ((1 << 20) + 1), fails=InvalidArgument)
    assert "put large things into a volume" in str(error.exception)


# -------------------------------------------------------------------------------------------- lsm

LSM = {
    "levels": [
        {
            "level": 0, "runs": 1, "tables": 2, "bytes": 2048, "entries": 10, "tombstones": 1,
            "filter_bits_per_key": 9.5, "filter_hits": 7, "filter_negatives": 5,
            "filter_false_positives": 1,
        }
    ],
    "write_amplification": 3.25, "space_amplification": 1.5, "cache_hit_rate": 0.5,
    "memory": {
        "total": 4096, "budget": 8192, "memtables": 1024, "cache": 1024, "indexes": 1024,
        "snapshots": 0,
    },
    "log": {"segments": 2, "bytes": 100, "unsynced_bytes": 0},
    "reserve": {"missing": 0},
    "flushes": 1, "merges": 0, "frozen_memtables": 0, "pending_merge": 0,
    "quarantined": (), "lost": (),
}  # fmt: skip


def test_lsm_shows_every_node_or_one(cluster):
    cluster.answers["node.lsm"] = lambda _address, _args: (LSM,)
    text = run("kv", "lsm").stdout
    for node in ("node1", "node2", "node3"):
        assert node in text
    assert "amplification  write 3.25, space at most 1.50" in text
    assert "hit rate 50.0%" in text
    assert "2 segments, 100 B" in text
    assert "1 flush, 0 merges" in text
    assert "QUARANTINED" not in text
    assert "node2" not in run("kv", "lsm", "node1").stdout
    assert json.loads(run("kv", "lsm", "--json").stdout)["node1"]["flushes"] == 1
    error = run("kv", "lsm", "nobody", fails=ConfigError)
    assert str(error.exception) == "there is no metadata node nobody; there are node1, node2, node3"


def test_lsm_tells_damage_full_disks_and_silence(cluster):
    bad = {
        **LSM, "quarantined": ("7.sst",), "lost": ((b"a", b"b", "7.sst"),),
        "reserve": {"missing": 5},
    }  # fmt: skip
    cluster.answers["node.lsm"] = lambda _address, _args: (bad,)
    cluster.down.add(cluster.address("node2"))
    text = run("kv", "lsm").stdout
    assert "QUARANTINED    7.sst" in text
    assert "LOST           b'a' to b'b' of 7.sst: fetched from other homes" in text
    assert "FULL DISK" in text
    assert "node2: tcp://127.0.0.1:7402: connection refused" in text
    told = json.loads(run("kv", "lsm", "--json").stdout)
    assert "refused" in told["node2"]["error"]
    assert told["node1"]["lost"] == [["61", "62", "7.sst"]]


# ------------------------------------------------------------------------------------------ hints


def kept(node, count, **more):
    return {
        "node": node, "count": count, "bytes": 2048 * count, "age": 12.0, "dirty": False,
        "stored": 5, "delivered": 2, "dropped": 1, **more,
    }  # fmt: skip


def test_hints_list(cluster):
    held = {
        cluster.address("node1"): (kept(3, 2), kept(17, 0, dirty=True)),
        cluster.address("node2"): (),
        cluster.address("node3"): (),
    }
    cluster.answers["hints.list"] = lambda address, _args: (held[address],)
    rows = [line.split() for line in run("hints", "list").stdout.splitlines()]
    assert rows[1] == ["node1", "node3", "2", "4.0", "KiB", "12", "s", "5", "2", "1"]
    assert rows[2][:3] == ["node1", "17", "0"]
    assert rows[2][-3:] == ["left", "to", "anti-entropy"]
    told = json.loads(run("hints", "list", "--json").stdout)
    assert [t["target"] for t in told[0]["targets"]] == ["node3", "17"]
    assert told[1] == {"node": "node2", "targets": []}
    assert run("hints", "list", "node2").stdout == "no hints are kept\n"
    cluster.down.add(cluster.address("node1"))
    silent = CliRunner().invoke(cli, ["hints", "list"])
    assert silent.exit_code == 1
    assert "node1: tcp://127.0.0.1:7400: connection refused" in silent.stdout
    silent = CliRunner().invoke(cli, ["hints", "list", "--json"])
    assert "refused" in json.loads(silent.stdout)[0]["error"]
    error = run("hints", "list", "nobody", fails=ConfigError)
    assert "there is no metadata node nobody" in str(error.exception)


def test_hints_drop(cluster):
    held = {
        cluster.address("node1"): (kept(3, 2), kept(17, 1)),
        cluster.address("node2"): (kept(3, 3),),
        cluster.address("node3"): (),
    }
    dropped = []

    def drop(address, args):
        dropped.append((address, args[0]))
        return (next(t["count"] for t in held[address] if t["node"] == args[0]),)

    cluster.answers["hints.list"] = lambda address, _args: (held[address],)
    cluster.answers["hints.drop"] = drop
    text = run("hints", "drop", "node3").stdout
    assert text == (
        "dropped 5 hints for node3 (2 at node1, 3 at node2); anti-entropy brings the rest\n"
    )
    assert run("hints", "drop", "17").stdout.startswith("dropped 1 hint for 17 (1 at node1)")
    assert run("hints", "drop", "node3", "--at", "node2").stdout.startswith("dropped 3 hints")
    assert dropped[-1] == (cluster.address("node2"), 3)
    error = run("hints", "drop", "nobody", fails=InvalidArgument)
    assert "there is no node nobody; there are node1, node2, node3" in str(error.exception)
    cluster.down.add(cluster.address("node1"))
    error = run("hints", "drop", "17", fails=NotFound)
    assert "no node that answers keeps hints for 17 (node1: " in str(error.exception)
    found = run("hints", "drop", "node3")
    assert "not asked: node1: " in found.stderr
    run("hints", "drop", "node1", "--at", "nobody", fails=ConfigError)


def test_a_cluster_that_cannot_be_reached(cluster):
    cluster.down |= {n.metadata_addr for n in cluster.map.nodes}
    error = CliRunner().invoke(cli, ["--timeout", "0.3", "kv", "get", "k"])
    assert isinstance(error.exception, Unreachable)
