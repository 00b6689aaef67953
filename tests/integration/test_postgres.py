"""PostgreSQL 15 with its data directory on an exclusive mount: pgbench, kill -9, amcheck.

Needs Debian's package postgresql; only with --slow.  `DFS_PG_SCALE` and `DFS_PG_SECONDS` set the size of
the tables and the length of each load; the defaults are a quick run, 10 and 60 the full one.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from localcluster import wait_gone

BIN = Path("/usr/lib/postgresql/15/bin")
SCALE = int(os.environ.get("DFS_PG_SCALE", "2"))
SECONDS = int(os.environ.get("DFS_PG_SECONDS", "10"))
CLIENTS = 4
SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{socket}'
wal_init_zero = off
wal_recycle = off
full_page_writes = on
shared_buffers = 64MB
log_min_messages = warning
"""

AS_POSTGRES = {"user": "postgres", "group": "postgres", "extra_groups": []}

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BIN / "pg_amcheck").exists(),
        reason="PostgreSQL 15 is not installed: apt-get install postgresql",
    ),
]


class Postgres:
    """One server, its data directory, and clients of it; all as the user postgres."""

    def __init__(self, base, data):
        self.base, self.data = base, data
        self.number = 0

    def run(self, program, *args, check=True, timeout=300, **kw):
        done = subprocess.run(
            [BIN / program, *map(str, args)],
            **AS_POSTGRES,
            cwd=self.base,
            env={"PATH": os.defpath, "PGHOST": str(self.base), "PGDATABASE": "postgres"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **kw,
        )
        if check and done.returncode:
            raise AssertionError(f"{program} {args}: {done.stdout}{done.stderr}\n{self.log()}")
        return done

    def log(self):
        with contextlib.suppress(OSError):
            return (self.base / "log").read_text()[-4000:]
        return ""

    def create(self):
        self.run("initdb", "-D", self.data, "--data-checksums", "--auth=trust", "-E", "UTF8")
        with open(self.data / "postgresql.conf", "a") as f:
            f.write(SETTINGS.format(socket=self.base))
        return self

    def start(self):
        """Returns when it takes connections; seconds that this took, recovery included."""
        began = time.monotonic()
        with open(self.base / "log", "a") as log:
            # A child of ours: as a zombie of somebody else's it would seem to hold its lock file.
            self.server = subprocess.Popen(
                [BIN / "postgres", "-D", self.data], **AS_POSTGRES, cwd=self.base, stderr=log
            )
        while self.run("pg_isready", "-q", check=False).returncode:
            assert self.server.poll() is None, self.log()
            assert time.monotonic() < began + 120, self.log()
            time.sleep(0.1)
        return time.monotonic() - began

    def stop(self):
        self.server.send_signal(signal.SIGINT)
        assert self.server.wait(120) == 0, self.log()

    def kill(self):
        """kill -9 of the server and all its processes."""
        main = self.server.pid
        children = list(map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split()))
        self.server.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server.wait(60)
        for pid in children:
            wait_gone(pid, 60)

    def sql(self, text):
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", text).stdout.strip()

    def check(self, acknowledged):
        """No committed transaction is lost, tables agree with each other, no page is damaged."""
        there = {tuple(map(int, row.split("|"))) for row in self.sql("TABLE acked").split()}
        assert acknowledged <= there, sorted(acknowledged - there)[:20]
        total = "SELECT coalesce(sum({}), 0) FROM pgbench_{}"
        sums = {
            self.sql(total.format(column, table))
            for column, table in (
                ("bbalance", "branches"),
                ("tbalance", "tellers"),
                ("abalance", "accounts"),
                ("delta", "history"),
            )
        }
        assert len(sums) == 1, sums
        done = self.run("pg_amcheck", "--all", "--heapallindexed", "--parent-check", check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == ""

    def writer(self, acknowledged, stopping):
        """Insert rows until told to stop or the server is gone; note each one once it is committed."""
        self.number += 1
        mine = self.number
        psql = subprocess.Popen(
            [BIN / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1"],
            **AS_POSTGRES,
            cwd=self.base,
            env={"PATH": os.defpath, "PGHOST": str(self.base), "PGDATABASE": "postgres"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        n = 0
        with contextlib.suppress(OSError), psql:
            while not stopping.is_set():
                n += 1
                psql.stdin.write(f"INSERT INTO acked VALUES ({mine}, {n}) RETURNING n;\n")
                if psql.stdout.readline().strip() != str(n):
                    return
                acknowledged.add((mine, n))

    def load(self, acknowledged, fault=None):
        """TPC-B for a while beside two writers, a fault in the middle; what pgbench says."""
        stopping = threading.Event()
        writers = [
            threading.Thread(target=self.writer, args=(acknowledged, stopping)) for _ in range(2)
        ]
        timer = threading.Timer(SECONDS / 2, fault or (lambda: None))
        for thread in (*writers, timer):
            thread.start()
        try:
            return self.run(
                "pgbench", "-n", "-c", CLIENTS, "-j", 2, "-T", SECONDS, "-P", 5, check=False
            )
        finally:
            stopping.set()
            for thread in (*writers, timer):
                thread.join(60)


def tps(done):
    found = re.search(r"tps = ([0-9.]+) \(without", done.stdout)
    return float(found[1]) if found else 0.0


@pytest.fixture
def base():
    """A directory that the user postgres may enter."""
    where = Path(tempfile.mkdtemp(prefix="dfs-pg-", dir="/tmp"))
    os.chmod(where, 0o755)
    shutil.chown(where, "postgres", "postgres")
    yield where
    shutil.rmtree(where, ignore_errors=True)


@pytest.fixture
def server(cluster, base):
    cluster.dfs("volume", "create", "pg")
    data = cluster.mount("pg", base / "data", "--exclusive")
    shutil.chown(data, "postgres", "postgres")
    os.chmod(data, 0o700)
    pg = Postgres(base, data).create()
    pg.start()
    try:
        yield pg
    finally:
        if pg.server.poll() is None:
            pg.kill()
        cluster.umount(data)


def test_pgbench_survives_kills_of_the_server_and_of_a_storage_node(cluster, server):
    pg, acknowledged = server, set()
    began = time.monotonic()
    pg.run("pgbench", "-i", "-s", SCALE)
    print(f"\npgbench -i -s {SCALE}: {time.monotonic() - began:.1f} s")
    pg.sql("CREATE EXTENSION amcheck; CREATE TABLE acked (w int, n int, PRIMARY KEY (w, n))")

    done = pg.load(acknowledged)
    assert done.returncode == 0, done.stderr + pg.log()
    assert acknowledged
    print(f"undisturbed: {tps(done):.0f} tps and {len(acknowledged)} inserts in {SECONDS} s")
    pg.check(acknowledged)

    before = len(acknowledged)
    done = pg.load(acknowledged, pg.kill)
    assert done.returncode != 0
    assert len(acknowledged) > before
    print(f"the server was killed; recovered in {pg.start():.1f} s")
    pg.check(acknowledged)

    before = len(acknowledged)
    done = pg.load(acknowledged, lambda: cluster.kill("node2"))
    assert done.returncode == 0, done.stderr + pg.log()
    assert len(acknowledged) > before
    print(f"a storage node was killed: {tps(done):.0f} tps\n{done.stderr}")
    pg.check(acknowledged)
    cluster.up("node2")

    pg.stop()
    cluster.umount(pg.data)
    cluster.mounts.remove(pg.data)
    cluster.mount("pg", pg.data, "--exclusive")
    pg.start()
    pg.check(acknowledged)
    pg.stop()
