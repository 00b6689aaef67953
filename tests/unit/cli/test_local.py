"""Cluster directories, their processes and their markers, without any daemon of ours."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dfs.cli.local import (
    ClusterDir,
    Process,
    environment,
    format_data,
    format_node,
    spawn,
    stop,
)
from dfs.cli.spec import local_nodes, read_spec
from dfs.cli.updown import after_loss
from dfs.cluster.map import CHUNK, METADATA, ClusterMap, Params
from dfs.datadir import MARKER, Marker, read_marker
from dfs.errors import ConfigError


@pytest.fixture
def cluster():
    return ClusterMap.create(bytes(range(16)), local_nodes(3, 3, 7400))


def test_create_lays_out_everything(tmp_path, cluster):
    directory = ClusterDir(tmp_path / "c")
    directory.create(cluster, cluster.nodes)
    again = ClusterDir.of_file(directory.file)
    assert again.load_map() == cluster
    assert again.local_nodes(cluster) == list(cluster.nodes)
    for node in cluster.nodes:
        for name, role in (("metadata", METADATA), ("chunks", CHUNK)):
            marker = read_marker(tmp_path / "c" / node.name / name, role)
            assert marker == Marker.of(cluster.cluster_id, node, role)
    assert {p.name for n in cluster.nodes for p in again.processes(n)} >= {
        "node1-metadata",
        "node3-chunkserver",
    }
    with pytest.raises(ConfigError, match="already"):
        directory.create(cluster, cluster.nodes)


def test_maps_that_cannot_be_read_are_no_reason_to_make_a_new_cluster(tmp_path, cluster):
    with pytest.raises(ConfigError, match=r"there is no cluster in .* `dfs cluster init"):
        ClusterDir(tmp_path / "none").load_map()
    directory = ClusterDir(tmp_path / "c")
    directory.create(cluster, cluster.nodes)
    for path in (tmp_path / "c").glob("**/map"):
        path.write_bytes(path.read_bytes()[:-1] + b"?" if path.parent == directory.path else b"")
    with pytest.raises(ConfigError, match="copy it from another node") as raised:
        directory.load_map()
    assert "init" not in str(raised.value)
    assert str(raised.value).count("is damaged") == 4


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (
            "log x at offset 9: damaged; promises may be lost, so this node must not vote: keep",
            True,
        ),
        ("MANIFEST is no manifest; treat this data directory as a lost disk", True),
        ("cannot listen at tcp://h:1: Address already in use", False),
    ],
)
def test_a_daemon_whose_data_is_lost_is_to_be_replaced(said, what, cluster):
    node = cluster.nodes[0]
    assert bool(after_loss(said, node, METADATA)) == what
    assert after_loss(said, node, CHUNK) == ""
    if what:
        assert "`dfs cluster node replace node1 NEW`" in after_loss(said, node, METADATA)


def test_create_overwrites_nothing(tmp_path, cluster):
    (tmp_path / "node2").mkdir()
    with pytest.raises(ConfigError, match="node2"):
        ClusterDir(tmp_path).create(cluster, cluster.nodes)
    assert not (tmp_path / "cluster.json").exists()
    assert not (tmp_path / "node1").exists()


def test_format_is_idempotent_and_refuses_strangers(tmp_path, cluster):
    one, two, _ = cluster.nodes
    assert len(format_node(tmp_path, cluster, one)) == 2
    assert format_node(tmp_path, cluster, one) == []
    with pytest.raises(ConfigError, match="belongs to node 1"):
        format_node(tmp_path, cluster, two)
    other = ClusterMap.create(bytes(16), cluster.nodes)
    with pytest.raises(ConfigError, match="belongs to"):
        format_node(tmp_path, other, one)


def test_format_of_one_role(tmp_path, cluster):
    node = cluster.nodes[0]
    path = tmp_path / "d"
    assert format_data(path, cluster, node, CHUNK) == [path]
    assert format_data(path, cluster, node, CHUNK) == []
    assert ClusterMap.decode((path / "map").read_bytes()) == cluster
    with pytest.raises(ConfigError, match="for chunk, not for metadata"):
        read_marker(path, METADATA)


def test_format_refuses_a_directory_with_data(tmp_path, cluster):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        format_data(tmp_path, cluster, cluster.nodes[0], CHUNK)
    (tmp_path / "precious").unlink()
    assert format_data(tmp_path, cluster, cluster.nodes[0], CHUNK)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no data directory"),
        ("", "damaged"),
        ("{}", "damaged"),
        ('{"cluster_id":"","node_id":"","number":1,"role":"chunk","format":2}', "upgrade"),
    ],
)
def test_markers_that_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / MARKER).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_marker(tmp_path, CHUNK)


# ------------------------------------------------------------------------------------- processes


def sleeper(tmp_path, name, code="import time; time.sleep(100)", *arguments):
    """A process that is recognised by its command, as a daemon is."""
    return Process(
        name, tmp_path / f"{name}.pid", ("-c", code, *arguments), tmp_path / f"{name}.log"
    )


def test_stop_stops_what_was_started(tmp_path):
    process = sleeper(tmp_path, "a")
    child = spawn(process, [])
    assert process.pid() == child.pid
    assert stop([process]) == []
    assert process.pid() is None
    assert not process.pid_file.exists()
    assert child.wait() == -signal.SIGTERM
    assert os.getsid(0) != child.pid


def test_stop_kills_what_does_not_listen(tmp_path):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    process = sleeper(tmp_path, "deaf", deaf)
    child = spawn(process, [])
    end = time.monotonic() + 20
    while "deaf" not in process.last_words():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert stop([process], timeout=0.1) == ["deaf"]
    assert child.wait() == -signal.SIGKILL


def test_a_paused_process_is_stopped(tmp_path):
    process = sleeper(tmp_path, "paused")
    child = spawn(process, [])
    os.kill(child.pid, signal.SIGSTOP)
    assert stop([process]) == []
    assert child.wait() == -signal.SIGTERM


def test_a_pid_of_somebody_else_is_not_touched(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)", "other"])
    try:
        process = sleeper(tmp_path, "mine")
        process.pid_file.write_text(f"{other.pid}\n")
        mine = sleeper(tmp_path, "mine", "import time; time.sleep(99)", "mine")
        assert mine.pid() is None
        assert stop([mine]) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("content", ["", "x", "999999999", "-1"])
def test_a_useless_pid_file_means_not_running(tmp_path, content):
    process = sleeper(tmp_path, "p")
    process.pid_file.write_text(content)
    assert process.pid() is None


def test_last_words(tmp_path):
    process = sleeper(tmp_path, "p")
    assert "no log" in process.last_words()
    process.log.write_text("\n".join(map(str, range(100))))
    assert process.last_words(2) == "  98\n  99"


# ------------------------------------------------------------------------------------------ specs


def test_spec_in_yaml_and_json(tmp_path):
    yaml = tmp_path / "c.yaml"
    yaml.write_text(
        "replication: {n: 2, w: 2, r: 1, pw: 1}\n"
        "nodes:\n"
        "  - {name: a, zone: z1, metadata_addr: 10.0.0.1:1, chunk_addr: 'unix:///s', chunk_weight: 4}\n"
        "  - {name: b, number: 7, host: h, chunk_addr: tcp://h:2}\n"
    )
    nodes, params = read_spec(yaml)
    a, b = nodes
    assert params == Params(2, 2, 1, 1)
    assert (a.number, a.zone, a.host, a.rack) == (1, "z1", "10.0.0.1", "")
    assert (a.metadata_addr, a.chunk_addr, a.chunk_weight) == ("tcp://10.0.0.1:1", "unix:///s", 4.0)
    assert (b.number, b.zone, b.host, b.metadata_addr) == (7, "b", "h", "")
    assert len({a.node_id, b.node_id}) == 2
    js = tmp_path / "c.json"
    js.write_text('{"nodes": [{"name": "x", "chunk_addr": "h:1"}]}')
    assert read_spec(js)[1] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "no YAML"),
        ("a: 1", "list `nodes`"),
        ("nodes: []", "list `nodes`"),
        ("nodes: [1]", "node 1: a node needs a name"),
        ("nodes: [{name: a}]\nextra: 1", "unknown extra"),
        ("nodes: [{name: a, port: 1}]", "unknown port"),
        ("nodes: [{name: a, chunk_weight: big}]", "node 1"),
        ("nodes: [{name: a}]\nreplication: {copies: 3}", "replication takes"),
    ],
)
def test_specs_that_are_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_spec(path)


def test_local_nodes_use_ports_in_a_row():
    nodes = local_nodes(5, 3, 7400)
    ports = [int(a.rpartition(":")[2]) for n in nodes for a in (n.metadata_addr, n.chunk_addr)]
    assert ports == list(range(7400, 7410))
    assert [n.zone for n in nodes] == ["zone1", "zone2", "zone3", "zone1", "zone2"]
    with pytest.raises(ConfigError):
        local_nodes(3, 3, 65533)


def test_programs_that_move_megabytes_do_it_in_huge_pages(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for program, huge in (("fuse", True), ("chunkserver", True), ("metadata", False)):
        given = environment(program)
        assert given["PATH"] == os.environ["PATH"]
        assert ("GLIBC_TUNABLES" in given) is huge
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert environment("fuse")["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"
