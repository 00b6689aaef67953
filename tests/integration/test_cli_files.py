"""Volume and file commands against a real cluster, run in this process."""

import json
import os
import random
import stat

import pytest
from click.testing import CliRunner

from dfs.cli.context import explain
from dfs.cli.main import cli

pytestmark = pytest.mark.realtime


@pytest.fixture(scope="module")
def volume(shared_cluster):
    shared_cluster.dfs("volume", "create", "files")
    return "files"


@pytest.fixture
def dfs(shared_cluster, volume):
    """Run `dfs ...`, check the exit status, return stdout."""

    def run(*args, status=0, stdin=None):
        env = {"DFS_CLUSTER": str(shared_cluster.dir)}
        result = CliRunner().invoke(cli, [*map(os.fspath, args)], env=env, input=stdin)
        told = result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            lines = explain(result.exception)
            if lines is None:
                raise result.exception
            assert len(lines) == 1, lines
            result.exit_code = 1
            told += lines[0]
        assert result.exit_code == status, told
        return result.stdout_bytes if status == 0 else told

    return run


def make_tree(root):
    rnd = random.Random(1)
    for i, size in enumerate([0, 1, 4096, 4097, 65536, 300_000, 4 << 20, (5 << 20) + 3]):
        d = root / f"d{i % 3}" / "deep"
        d.mkdir(parents=True, exist_ok=True)
        (d / f"file {i}").write_bytes(rnd.randbytes(size))
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("run.sh")
    (root / "broken").symlink_to("nowhere")
    (root / "empty").mkdir()
    (root / os.fsdecode(b"n\xe4me")).write_bytes(b"not utf-8")
    return root


def snapshot(root):
    found = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(directory, name)
            mode = os.lstat(path).st_mode
            key = os.path.relpath(path, root)
            if stat.S_ISLNK(mode):
                found[key] = ("link", os.readlink(path))
            elif stat.S_ISDIR(mode):
                found[key] = ("dir", stat.S_IMODE(mode))
            else:
                with open(path, "rb") as f:
                    found[key] = (stat.S_IMODE(mode), f.read())
    return found


def test_a_tree_goes_in_and_comes_out_the_same(dfs, tmp_path):
    src = make_tree(tmp_path / "src")
    told = json.loads(dfs("put", "-r", "--json", src, "files:/tree"))
    size = sum(len(v[1]) for v in snapshot(src).values() if isinstance(v[1], bytes))
    assert told["files"] == 12
    assert told["bytes"] == size
    dfs("get", "-r", "files:/tree", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(src)
    # into an existing directory: under its own name
    (tmp_path / "in").mkdir()
    dfs("get", "-r", "files:/tree", tmp_path / "in")
    assert snapshot(tmp_path / "in" / "tree") == snapshot(src)
    dfs("mkdir", "files:/box")
    dfs("put", "-r", src, "files:/box")
    assert dfs("ls", "files:/box").split() == [b"src"]


def test_only_unknown_chunks_are_sent(dfs, tmp_path):
    data = random.Random(2).randbytes(9 << 20)
    (tmp_path / "a").write_bytes(data)
    assert json.loads(dfs("put", "--json", tmp_path / "a", "files:/a"))["bytes_known"] == 0
    again = json.loads(dfs("put", "--json", tmp_path / "a", "files:/copy"))
    assert again == {"files": 1, "bytes": 9 << 20, "bytes_known": 9 << 20}
    (tmp_path / "a").write_bytes(data[: 8 << 20] + b"changed" + data[(8 << 20) + 7 :])
    third = json.loads(dfs("put", "--json", "-f", tmp_path / "a", "files:/copy"))
    assert third["bytes_known"] == 8 << 20
    assert dfs("cat", "files:/copy") == (tmp_path / "a").read_bytes()
    assert dfs("cat", "files:/a") == data


def test_standard_streams(dfs):
    dfs("put", "-", "files:/stream", stdin=b"one\ntwo\n")
    assert dfs("get", "files:/stream", "-") == b"one\ntwo\n"
    assert dfs("cat", "files:/stream", "files:/stream") == b"one\ntwo\n" * 2
    assert "directory" in dfs("put", "-", "files:/", stdin=b"x", status=1)


def test_nothing_is_replaced_unasked(dfs, tmp_path):
    (tmp_path / "new").write_text("new")
    dfs("put", "-", "files:/keep", stdin=b"old")
    told = dfs("put", tmp_path / "new", "files:/keep", status=1)
    assert told.strip() == "files:/keep exists already: -f replaces it"
    assert dfs("cat", "files:/keep") == b"old"
    assert "exists already" in dfs("get", "files:/keep", tmp_path / "new", status=1)
    assert (tmp_path / "new").read_text() == "new"
    dfs("put", "--force", tmp_path / "new", "files:/keep")
    dfs("get", "--force", "files:/keep", tmp_path / "new")
    assert dfs("cat", "files:/keep") == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_an_upload_that_fails_leaves_nothing(dfs, tmp_path, monkeypatch):
    from dfs.client.filesystem import FileSystem

    async def fail(self, handle):
        raise OSError(5, "injected")

    (tmp_path / "x").write_bytes(b"x" * 100_000)
    monkeypatch.setattr(FileSystem, "flush", fail)
    assert "Input/output error" in dfs("put", tmp_path / "x", "files:/half", status=1)
    monkeypatch.undo()
    assert "No such file" in dfs("stat", "files:/half", status=1)


def test_names(dfs):
    dfs("mkdir", "-p", "files:/m/a/b")
    dfs("mkdir", "-p", "files:/m/a/b")
    assert "File exists" in dfs("mkdir", "files:/m/a", status=1)
    dfs("put", "-", "files:/m/f", stdin=b"12345")
    dfs("mv", "files:/m/f", "files:/m/g")
    dfs("mv", "files:/m/g", "files:/m/a")
    assert dfs("ls", "files:/m/a").split() == [b"b", b"g"]
    long = dfs("ls", "-l", "files:/m/a").decode().splitlines()
    assert long[1].startswith("-rw-r--r--   1     0     0 5 ")
    listed = json.loads(dfs("ls", "--json", "files:/m/a"))
    assert [(e["name"], e["type"], e["size"]) for e in listed][1] == ("g", "file", 5)
    told = json.loads(dfs("stat", "--json", "files:/m/a/g"))
    assert (told["size"], told["nlink"], told["mode"]) == (5, 1, 0o644)
    used = json.loads(dfs("du", "--json", "files:/m"))
    assert used == [{"path": "files:/m", "bytes": 5, "files": 1, "directories": 3}]
    assert "is a directory: use -r" in dfs("rm", "files:/m", status=1)
    dfs("rm", "-r", "files:/m")
    assert "files:/m: " in dfs("ls", "files:/m", status=1)
    dfs("rm", "-f", "files:/m")


@pytest.mark.parametrize(
    "args",
    [
        ("ls", "no-colon"),
        ("ls", "/local:x"),
        ("put", "files:/a", "files:/b"),
        ("get", "files:/a", "other:/b", "t"),
        ("get", "-r", "files:/a", "-"),
        ("get", "files:/a", "files:/b"),
        ("mv", "files:/a", "other:/a"),
        ("put", "-", "-", "files:/a"),
    ],
)
def test_wrong_usage(dfs, args):
    dfs(*args, status=2)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("ls", "nope:/"), "nope"),
        (("cat", "files:/nope"), "files:/nope: "),
        (("get", "files:/", "/tmp/never"), "use -r"),
        (("put", "/nope", "files:/x"), "/nope: No such file or directory"),
        (("put", "/etc", "files:/x"), "use -r"),
        (("put", "/etc/hostname", "files:/nope/"), "files:/nope: "),
        (("put", "/etc/hostname", "/etc/passwd", "files:/nope"), "no directory"),
    ],
)
def test_errors_name_the_thing(dfs, args, text):
    assert text in dfs(*args, status=1)


def test_volumes(dfs):
    dfs("volume", "create", "second", "--no-compress")
    assert "exists" in dfs("volume", "create", "second", status=1)
    assert "no volume name" in dfs("volume", "create", "a/b", status=1)
    listed = json.loads(dfs("volume", "list", "--json"))
    assert {"files", "second"} <= {v["name"] for v in listed}
    info = json.loads(dfs("volume", "info", "--json", "second"))
    assert info["params"]["compress"] is False
    assert info["state"] == "created"
    assert sorted(info["homes"]) == ["node1", "node2", "node3"]
    status = json.loads(dfs("cluster", "status", "--json"))
    assert {"files", "second"} <= {v.get("name") for v in status["volumes"]}
    assert status["errors"] == []
    dfs("volume", "delete", "second", stdin=b"n\n", status=1)
    dfs("volume", "delete", "second", "--yes")
    assert "second" in dfs("volume", "info", "second", status=1)
