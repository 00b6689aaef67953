"""What a user is told when something is wrong: one line, a status, in time, and nothing half done."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from localcluster import ROLES, LocalCluster, free_ports, wait_gone, wait_until

pytestmark = pytest.mark.realtime


def refused(cluster, *args, status=1, **kw):
    """Run `dfs ...`, which must fail with one line; returns that line."""
    done = cluster.dfs(*args, check=False, **kw)
    assert done.returncode == status, (args, done.stdout, done.stderr)
    assert done.stderr.startswith("dfs: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


@contextlib.contextmanager
def started(cluster, *args, **kw):
    """`dfs ...`, running; it has ended, and its pipes are closed, after the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "dfs.cli.main", *map(str, args)],
        env=cluster.env,
        stderr=subprocess.PIPE,
        **kw,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def volume(shared_cluster):
    shared_cluster.dfs("volume", "create", "v")
    return shared_cluster


def names(cluster):
    return {entry["name"] for entry in json.loads(cluster.dfs("ls", "--json", "v:/").stdout)}


# ------------------------------------------------------------------------------- files and streams


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_put_leaves_nothing(volume, number, status):
    before = names(volume)
    with started(volume, "put", "-", "v:/slow", stdin=subprocess.PIPE) as putting:
        putting.stdin.write(bytes(8 << 20))
        putting.stdin.flush()
        wait_until(lambda: names(volume) != before, what="the temporary file")
        assert "slow" not in names(volume)
        putting.send_signal(number)
        assert putting.wait(15) == status
        assert putting.stderr.read() == b"dfs: interrupted\n"
    assert names(volume) == before


def test_an_interrupted_get_leaves_nothing(volume, tmp_path):
    volume.dfs("put", "-", "v:/big", input=os.urandom(64 << 20), text=False)
    with started(volume, "get", "v:/big", tmp_path / "big") as getting:
        wait_until(lambda: list(tmp_path.iterdir()) or getting.poll() is not None, what="a file")
        getting.send_signal(signal.SIGTERM)
        if getting.wait(15):  # it may have been done already
            assert getting.returncode == 143
            assert list(tmp_path.iterdir()) == []


def test_a_killed_put_shows_no_partial_file(volume):
    with started(volume, "put", "-", "v:/never", stdin=subprocess.PIPE) as putting:
        putting.stdin.write(bytes(8 << 20))
        putting.stdin.flush()
        wait_until(lambda: any(n.startswith(".dfs-put-") for n in names(volume)), what="a part")
        putting.kill()
        putting.wait()
    assert "never" not in names(volume)
    for name in names(volume):
        if name.startswith(".dfs-put-"):
            volume.dfs("rm", f"v:/{name}")


def test_streams_that_are_closed_full_or_gone(volume):
    volume.dfs("put", "-", "v:/stream", input=b"x" * (9 << 20), text=False)
    program = f"{sys.executable} -m dfs.cli.main"

    def shell(line):
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            env={**volume.env, "DFS": program},
            capture_output=True,
            timeout=60,
            check=False,
        )

    assert b"standard input is closed" in shell("$DFS put - v:/closed <&-").stderr
    assert b"standard output is closed" in shell("$DFS cat v:/stream >&-").stderr
    for command in ("cat v:/stream", "ls v:/", "get v:/stream -"):
        full = shell(f"$DFS {command} >/dev/full")
        assert (full.returncode, full.stderr) == (
            1,
            b"dfs: standard output: No space left on device\n",
        )
    gone = shell("$DFS cat v:/stream | head -c1")
    assert (gone.returncode, gone.stdout, gone.stderr) == (141, b"x", b"")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("ls", "v:/nope"), "v:/nope: No such file or directory"),
        (("put", "/nope", "v:/"), "/nope: No such file or directory"),
        (("put", "/etc/hostname", "v:/no/x"), "v:/no/x: No such file or directory"),
        (("put", "/etc", "v:/"), "/etc is a directory: use -r"),
        (("put", "/dev/null", "v:/"), "/dev/null is a device, pipe or socket"),
        (("put", "/proc/self/mem", "v:/"), "/proc/self/mem: Input/output error"),
        (("put", "/no\npe", "v:/"), "/no\\npe: No such file or directory"),
        (("get", "v:/nope", "/tmp/x"), "v:/nope: No such file or directory"),
        (("get", "v:/", "-"), "cannot go to standard output"),
        (("get", "v:/nope", "/no/such"), "/no is no directory"),
        (("rm", "-r", "v:/"), "v:/ is the root of the volume"),
        (("mkdir", "v:/"), "v:/ is the root of the volume"),
        (("mv", "v:/", "v:/x"), "v:/ is the root of the volume"),
        (("volume", "delete", "none"), "no volume is named 'none'"),
        (("ls", "v:/a\nb\x1b[31m"), "v:/a\\nb\\x1b[31m: No such file"),
        (("volume", "create", "v"), "volume 'v' exists"),
        (("volume", "create", "a/b"), "'a/b' is no volume name"),
        (("ls", "none:/"), "no volume is named 'none'"),
    ],
)
def test_what_is_named(volume, args, told):
    assert told in refused(volume, *args)


def test_what_cannot_be_read_keeps_nothing_else_from_being_copied(volume, tmp_path):
    for name in ("a", "z"):
        (tmp_path / name).write_text(name)
    volume.dfs("mkdir", "v:/some")
    done = volume.dfs(
        "put", tmp_path / "a", "/proc/self/mem", tmp_path / "z", "v:/some", check=False
    )
    assert (done.returncode, done.stdout) == (1, "put 2 files, 2 B\n")
    assert done.stderr == "dfs: /proc/self/mem: Input/output error\n"
    listed = json.loads(volume.dfs("ls", "--json", "v:/some").stdout)
    assert [entry["name"] for entry in listed] == ["a", "z"]
    volume.dfs("rm", "-r", "v:/some")


def test_a_slash_at_the_end_means_a_directory(volume):
    volume.dfs("put", "/etc/hostname", "v:/file")
    for command in (("rm", "-r"), ("ls",), ("cat",)):
        assert "v:/file: Not a directory" in refused(volume, *command, "v:/file/")
    volume.dfs("rm", "v:/file")


def test_a_device_is_not_replaced(volume, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    volume.dfs("put", "/etc/hostname", "v:/hostname")
    line = refused(volume, "get", "-f", "v:/hostname", tmp_path / "fifo")
    assert "is a device, pipe or socket, which dfs get does not replace" in line
    assert (tmp_path / "fifo").is_fifo()


def test_nothing_is_deleted_where_nobody_says_yes(volume):
    volume.dfs("volume", "create", "kept")
    for answer in ("", "n\n", "y"):  # nobody is there, no, and not even a whole line
        done = volume.dfs("volume", "delete", "kept", input=answer, check=False)
        if answer == "y":
            assert done.returncode == 0
        else:
            assert done.returncode == 1
            assert done.stderr.endswith("dfs: volume kept is kept: --yes deletes it unasked\n")
    assert "no volume is named 'kept'" in refused(volume, "volume", "info", "kept")


# ------------------------------------------------------------------------------- peers and addresses


@contextlib.contextmanager
def peer(answer):
    """A server that is no dfs node; yields its port."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                kept.append(connection)
                if answer:
                    connection.sendall(answer)

    kept = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()
    thread.join(5)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 64, "is the peer a dfs node?"),
        (b"dF\x63\x01" + bytes(60), "wire format 99"),
        (b"", "no answer within"),
    ],
    ids=["http", "version", "silent"],
)
def test_a_port_where_something_else_listens(tmp_path, answer, told):
    c = LocalCluster(tmp_path)
    c.dir.mkdir()
    with peer(answer) as port:
        value = {"format": 1, "cluster_id": "ab" * 16, "seeds": [f"tcp://127.0.0.1:{port}"]}
        (c.dir / "cluster.json").write_text(json.dumps(value))
        line = refused(c, "volume", "list", timeout=20)
    assert told in line
    assert f"tcp://127.0.0.1:{port}" in line


def test_the_cluster_file_of_another_cluster(volume, tmp_path):
    c = LocalCluster(tmp_path)
    c.dir.mkdir()
    value = json.loads((volume.dir / "cluster.json").read_text())
    (c.dir / "cluster.json").write_text(json.dumps({**value, "cluster_id": "ab" * 16}))
    line = refused(c, "ls", "v:/")
    assert "is not of the cluster that answers" in line
    assert f"serves cluster {value['cluster_id'][:8]}, not abababab" in line


# ------------------------------------------------------------------------------- processes and quorums


def test_without_quorum_and_back(tmp_path):
    c = LocalCluster(tmp_path)
    try:
        c.init().up()
        c.dfs("volume", "create", "v")
        c.mount("v", tmp_path / "mounted")
        c.kill("node2")
        c.kill("node3")
        commands = [("ls", "v:/"), ("put", "/etc/hostname", "v:/"), ("volume", "list")]
        commands += [("volume", "create", "w"), ("mount", "v", tmp_path / "m"), ("fsck", "v")]
        (tmp_path / "m").mkdir()
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            for command, process in [
                (command[0], stack.enter_context(started(c, "--timeout", "3", *command)))
                for command in commands
            ]:
                assert process.wait(30) == (8 if command == "fsck" else 1)
                said = process.stderr.read().decode()
                assert "no quorum within 3 s (" in said
                assert "node2" in said
                assert "node3" in said
                assert len(said.splitlines()) == 1
        assert time.monotonic() - began < 20
        status = c.dfs("cluster", "status", check=False)
        assert status.returncode == 1
        assert "no quorum: 4096 of 4096 partitions of role metadata" in status.stdout
        assert max(map(len, status.stdout.splitlines()[:7])) < 80

        c.kill("node1")
        began = time.monotonic()  # what is mounted would answer in 30 s: it is not asked
        c.umount(tmp_path / "mounted")
        assert time.monotonic() - began < 10
        assert "Connection refused): start it with `dfs cluster up`" in refused(c, "ls", "v:/")

        # pid files that lie: one names a stranger, one is gone while its process runs
        stranger = subprocess.Popen(["sleep", "100"])
        try:
            (c.dir / "run" / "node1-metadata.pid").write_text(f"{stranger.pid}\n")
            with (
                started(c, "cluster", "up", stdout=subprocess.PIPE) as first,
                started(c, "cluster", "up", stdout=subprocess.PIPE) as second,
            ):
                assert (first.wait(60), second.wait(60)) == (0, 0)
                told = sorted(up.stdout.read().decode() for up in (first, second))
            assert "(0 processes started, 6 already running)" in told[0]
            assert "(6 processes started, 0 already running)" in told[1]
            (c.dir / "run" / "node2-metadata.pid").unlink()
            assert c.dfs("ls", "v:/").returncode == 0
            pids = [c.pid(n, r) for n in ("node1", "node3") for r in ROLES]
            assert "(6 processes stopped)" in c.dfs("cluster", "down").stdout
            for pid in pids:
                wait_gone(pid)
            assert stranger.poll() is None
            assert "(0 processes stopped)" in c.dfs("cluster", "down").stdout
        finally:
            stranger.kill()
            stranger.wait()
    finally:
        c.destroy()


def test_a_node_without_its_data_is_not_started_blank(tmp_path):
    c = LocalCluster(tmp_path)
    try:
        c.init()
        hidden = tmp_path / "hidden"
        (c.dir / "node1").rename(hidden)
        line = refused(c, "cluster", "up")
        assert "dfs: node1: " in line
        assert "never starts blank" in line
        assert not (c.dir / "node1").exists()
        assert c.status()["nodes"][1]["roles"]["metadata"]["up"]  # the others run
        hidden.rename(c.dir / "node1")
        (c.dir / "map").write_bytes(b"junk")
        up = c.dfs("cluster", "up")
        assert "(2 processes started, 4 already running)" in up.stdout
        assert f"the cluster map {c.dir / 'map'} is damaged" in up.stderr
        assert "there is a cluster" in refused(c, "cluster", "init", "--dir", c.dir)
    finally:
        c.destroy()


def test_ports_of_another_cluster(volume, tmp_path):
    c = LocalCluster(tmp_path)
    port = int(json.loads((volume.dir / "cluster.json").read_text())["seeds"][0].rpartition(":")[2])
    c.dfs("cluster", "init", "--dir", c.dir, "--base-port", port)
    try:
        done = c.dfs("cluster", "up", check=False)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert len(lines) == 6
        assert all("ended with status 1: cannot listen at tcp://" in line for line in lines)
        assert not list((c.dir / "run").iterdir())
        assert volume.dfs("ls", "v:/").returncode == 0
    finally:
        c.destroy()


# ------------------------------------------------------------------------------- mounts and disks


@pytest.mark.mount
def test_mount_points(volume, tmp_path):
    where = tmp_path / "m"
    assert "does not exist: mkdir" in refused(volume, "mount", "v", where)
    where.mkdir()
    (where / "x").write_text("x")
    assert "is not empty" in refused(volume, "mount", "v", where)
    assert "is no directory" in refused(volume, "mount", "v", where / "x")
    (where / "x").unlink()
    assert "no volume is named 'none'" in refused(volume, "mount", "none", where)
    volume.mount("v", where)
    assert "mounted on it already" in refused(volume, "mount", "v", where)
    with (where / "held").open("w") as held:
        assert "is busy: close what uses it" in refused(volume, "umount", where)
        pid = int((volume.dir / "run" / "mount-v.pid").read_text())
        began = time.monotonic()
        done = volume.dfs("umount", "--lazy", where)
        assert time.monotonic() - began < 20
        assert f"{where} is detached; process " in done.stderr
        held.write("written after")
    wait_gone(pid)
    assert volume.dfs("cat", "v:/held").stdout == "written after"
    volume.mount("v", where)
    pid = int((volume.dir / "run" / "mount-v.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert f"dead mount whose process has ended: `dfs umount {where}`" in refused(
        volume, "mount", "v", where
    )
    volume.umount(where)
    volume.mount("v", where)
    volume.umount(where)


def free_bytes(path):
    s = os.statvfs(path)
    return s.f_bavail * s.f_frsize


@pytest.mark.mount
def test_full_disks(tmp_path):
    """Chunk data on small file systems: 256 MiB of each are kept free, so 24 MiB are left."""
    c = LocalCluster(tmp_path)
    disks = [c.dir / node / "chunks" for node in c.nodes]
    data = os.urandom(16 << 20)
    base = free_ports(6)
    try:
        c.dfs("cluster", "init", "--dir", c.dir, "--base-port", base)
        for disk in disks:
            marker = (disk / "MARKER").read_bytes()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=280m", "dfs", disk], check=True)
            (disk / "MARKER").write_bytes(marker)
        c.up()
        c.dfs("volume", "create", "v")
        where = c.mount("v", tmp_path / "m")

        (disks[2] / "filler").write_bytes(bytes(24 << 20))
        c.dfs("put", "-", "v:/one", input=data, text=False)  # two of three have room
        report = c.status(check=True)
        full = [node["roles"]["chunkserver"]["full"] for node in report["nodes"]]
        assert full[2]
        assert "disk full: " in c.dfs("cluster", "status").stdout

        other = os.urandom(16 << 20)
        told = c.dfs("put", "-", "v:/two", input=other, text=False, check=False)
        assert told.returncode == 1
        assert told.stderr.startswith(b"dfs: v:/two: no space left")
        for disk in disks:  # as on a mount, what cannot be kept is refused before it is sent
            (disk / "filler").write_bytes(bytes(max(0, free_bytes(disk) - (256 << 20))))
        told = c.dfs("put", "-", "v:/two", input=other[:5000], text=False, check=False)
        assert told.returncode == 1
        assert re.fullmatch(
            rb"dfs: v:/two: no space left: [01] of 3 chunkservers have room and 2 must; disk full:"
            rb" (node[123] \S+/chunks,? ?){2,3}; delete data or add capacity"
            rb" \(`dfs cluster status`\)\n",
            told.stderr,
        )
        c.dfs("put", "-", "v:/small", input=other[:3000], text=False)  # it needs no chunkserver
        c.dfs("rm", "v:/small")
        assert names(c) == {"one"}
        with pytest.raises(OSError, match="No space left"):
            (where / "three").write_bytes(other)
        c.dfs("rm", "v:/one")
        (where / "three").unlink()
        assert names(c) == set()

        for disk in disks:
            subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)

        def accepted():  # the mount looks at full disks every second
            try:
                (where / "four").write_bytes(other)
            except OSError as e:
                assert e.errno == errno.ENOSPC  # noqa: PT017 - any other is a failure
                return False
            return True

        wait_until(accepted, 15, "the mount sees that there is room")
        c.dfs("put", "-", "v:/five", input=data, text=False)
        assert (where / "four").read_bytes() == other
        assert c.dfs("cat", "v:/five", text=False).stdout == data
    finally:
        for m in c.mounts:
            subprocess.run(["umount", "-l", m], check=False, capture_output=True)
        c.dfs("cluster", "down", check=False)
        for disk in disks:
            subprocess.run(["umount", "-l", disk], check=False, capture_output=True)
        c.destroy()


def test_an_empty_disk_does_not_return_under_a_used_name(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    where = tmp_path / "again"
    args = (
        "node",
        "format",
        "--cluster-map",
        cluster.dir / "map",
        "--name",
        "node1",
        "--data",
        where,
    )
    refused = cluster.dfs(*args, check=False)
    assert refused.returncode == 1
    assert "lost its disk" in refused.stderr
    assert not (where / "metadata").exists()
    cluster.dfs(*args, "--role", "chunkserver")  # chunks are copied back from the others
    cluster.dfs(
        "node",
        "format",
        "--cluster-map",
        cluster.dir / "map",
        "--name",
        "node1",
        "--data",
        tmp_path / "n",
        "--new",
    )
    assert (tmp_path / "n" / "metadata" / "MARKER").exists()
