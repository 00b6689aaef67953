"""Daemons and mounts as processes: starting, refusing to start, stopping."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from localcluster import LocalCluster, wait_gone

from dfs.mountinfo import mounts_at

pytestmark = pytest.mark.realtime


def daemon(*args, timeout=20):
    """Run a daemon that is expected to end; returns (status, stderr)."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


def last_line(text):
    return text.strip().splitlines()[-1]


def test_up_down_and_status(tmp_path):
    c = LocalCluster(tmp_path)
    try:
        c.init()
        down = c.dfs("cluster", "status", check=False)
        assert down.returncode == 1
        assert "UNAVAILABLE" in down.stdout
        none = c.dfs("volume", "list", check=False)
        assert none.returncode == 1
        assert len(none.stderr.splitlines()) == 1
        c.up()
        pids = {p.name: p.read_text() for p in (c.dir / "run").glob("*.pid")}
        assert sorted(pids) == sorted(f"{n}-{r}.pid" for n in c.nodes for r in c_roles())
        c.up()
        assert {p.name: p.read_text() for p in (c.dir / "run").glob("*.pid")} == pids
        assert "system volume" in c.dfs("cluster", "bootstrap").stdout
        assert c.status(check=True)["available"]

        # one node is killed, the cluster stays available, the node comes back
        c.kill("node2")
        report = c.status(check=True)
        assert [n["roles"]["metadata"]["up"] for n in report["nodes"]] == [True, False, True]
        c.up("node2")
        assert all(n["roles"]["metadata"]["up"] for n in c.status(check=True)["nodes"])
        c.down("node3")
        assert not list((c.dir / "run").glob("node3-*"))

        # a paused process is no reason to hang
        paused = c.pid("node1", "chunkserver")
        os.kill(paused, signal.SIGSTOP)
        t = time.monotonic()
        assert "chunkserver" in json.dumps(c.status())
        assert time.monotonic() - t < 15
        c.down()
        wait_gone(paused)
        assert not list((c.dir / "run").glob("*.pid"))
        log = (c.dir / "log" / "node1-metadata.log").read_text()
        assert "stopping: SIGTERM" in log
        assert "Traceback" not in log
        unknown = c.dfs("cluster", "up", "--dir", c.dir, "node9", check=False)
        assert unknown.returncode == 1
        assert "node9" in unknown.stderr
    finally:
        c.destroy()


def c_roles():
    return ("metadata", "chunkserver")


def test_up_tells_why_a_process_fails(tmp_path):
    c = LocalCluster(tmp_path)
    try:
        c.init()
        node_map = c.dir / "node1" / "map"
        seed = json.loads((c.dir / "cluster.json").read_text())["seeds"][0]
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", int(seed.rpartition(":")[2])))
            taken.listen()
            failed = c.dfs("cluster", "up", "--dir", c.dir, check=False)
        assert failed.returncode == 1
        port = seed.rpartition(":")[2]
        assert port in failed.stderr
        assert last_line(failed.stderr).startswith(
            "dfs: node1-metadata: ended with status 1: cannot listen"
        )
        assert node_map.exists()
        c.up()  # the others run on; now the first can start, too
    finally:
        c.destroy()


def test_daemons_refuse_what_is_not_theirs(tmp_path):
    c = LocalCluster(tmp_path)
    try:
        c.init()
        node1, node2 = c.dir / "node1", c.dir / "node2"
        node_map = node1 / "map"
        run = ("metadata", "--map", node_map, "--data")
        (tmp_path / "empty").mkdir()

        status, said = daemon(*run, tmp_path / "empty")
        assert status == 1
        assert "no data directory" in last_line(said)
        status, said = daemon(*run, node1 / "chunks")
        assert status == 1
        assert "for chunk, not for metadata" in last_line(said)
        status, said = daemon("metadata", "--data", node1 / "metadata", "--map", tmp_path / "nope")
        assert status == 1
        assert "no cluster map" in last_line(said)
        status, said = daemon("metadata", "--data", node1 / "metadata", "--map", node1)
        assert status == 1
        assert "Is a directory" in last_line(said)

        other = LocalCluster(tmp_path / "other")
        other.init()
        status, said = daemon(*run, other.dir / "node1" / "metadata")
        assert status == 1
        assert "belongs to" in last_line(said)
        marker = json.loads((node1 / "metadata" / "MARKER").read_text())
        marker["node_id"] = "00" * 16
        (node1 / "metadata" / "MARKER").write_text(json.dumps(marker))
        status, said = daemon(*run, node1 / "metadata")
        assert status == 1
        assert "another incarnation" in last_line(said)

        status, said = daemon(
            "metadata",
            "--map",
            node_map,
            "--data",
            node2 / "metadata",
            "--listen",
            "tcp://0.0.0.0:1",
        )
        assert status == 1
        assert "--insecure-listen-any" in last_line(said)
        damaged = bytearray(node_map.read_bytes())
        damaged[99] ^= 1
        (tmp_path / "map").write_bytes(damaged)
        status, said = daemon("metadata", "--map", tmp_path / "map", "--data", node2 / "metadata")
        assert status == 1
        assert "checksum" in said
        assert "Traceback" not in said
    finally:
        c.destroy()


def test_only_one_process_owns_a_data_directory(shared_cluster):
    node = shared_cluster.dir / "node1"
    run = ("--data", node / "chunks", "--map", node / "map", "--listen", "unix:///tmp/never")
    status, said = daemon("chunkserver", *run)
    assert status == 1
    assert "in use" in last_line(said)
    assert not Path("/tmp/never").exists()


def at_once(cluster, *commands):
    """Run `dfs mount` several times at once; (status, standard error) of each."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dfs.cli.main", "mount", *map(str, command)],
            env=cluster.env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate(timeout=60)[1] for process in running]
    return [(p.returncode, text) for p, text in zip(running, said, strict=True)]


@pytest.mark.mount
def test_mounts_that_are_made_at_once(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    where = tmp_path / "m"
    where.mkdir()
    for _ in range(3):
        done = at_once(cluster, ("v", where), ("v", where))
        assert sorted(status for status, _ in done) == [0, 1]
        assert any("dfs:v (fuse.dfs)" in text for status, text in done if status)
        assert [str(m) for m in mounts_at(where)] == ["dfs:v (fuse.dfs)"]
        cluster.umount(where)
        assert not list((cluster.dir / "run").glob("mount*"))

    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places:
        place.mkdir()
    done = at_once(cluster, *(("v", place) for place in places))
    assert [status for status, _ in done] == [0, 0, 0]
    run = cluster.dir / "run"
    said = {file.read_text().strip() for file in run.glob("mount*.mountpoint")}
    assert said == {str(place) for place in places}
    assert len({file.read_text() for file in run.glob("mount*.pid")}) == 3
    cluster.down()  # it knows all of them
    assert not any(mounts_at(place) for place in places)


@pytest.mark.mount
def test_mount_and_umount(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    where = cluster.mount("v", tmp_path / "m")
    (where / "file").write_text("hello")
    assert cluster.dfs("cat", "v:/file").stdout == "hello"
    again = cluster.dfs("mount", "v", where, check=False)
    assert again.returncode == 1
    assert "has dfs:v (fuse.dfs) mounted on it already" in again.stderr
    pid_file = cluster.dir / "run" / "mount-v.pid"
    pid = int(pid_file.read_text())
    cluster.umount(where)
    wait_gone(pid)
    assert not pid_file.exists()
    assert "nothing is mounted" in cluster.dfs("umount", where, check=False).stderr

    second = tmp_path / "second"
    second.mkdir()
    pid_file = tmp_path / "my.pid"
    cluster.mount("v", where)
    cluster.dfs("mount", "v", second, "--read-only")
    assert (cluster.dir / "run" / "mount-v-2.pid").exists()
    with pytest.raises(OSError, match="Read-only"):
        (second / "x").write_text("y")
    assert (second / "file").read_text() == "hello"
    cluster.down()
    assert not os.path.ismount(where)
    assert not os.path.ismount(second)
    assert not list((cluster.dir / "run").iterdir())
