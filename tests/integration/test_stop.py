"""A daemon that is told to stop does so in order, in whatever state of its start it is."""

import re
import signal
import subprocess
import sys
import time

import pytest
from localcluster import LocalCluster

DIRECTORIES = {"metadata": "metadata", "chunkserver": "chunks"}
UP = "INFO dfs.daemon: node node1"
SERVING = "INFO dfs.daemon: serving"
# what it says to the end, and how many seconds later it is told to stop
MOMENTS = [
    *[(UP, delay) for delay in (0.0, 0.01, 0.03, 0.08)],
    *[(SERVING, delay) for delay in (0.0, 0.01, 0.05, 0.3)],
]


class Daemon:
    """One daemon of node1, as systemd runs it."""

    def __init__(self, cluster, program):
        self.log = cluster.dir / f"{program}.log"
        data = cluster.dir / "node1" / DIRECTORIES[program]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", program, "--data", data, "--map", cluster.dir / "map"],
                stderr=log,
            )

    def wait_for(self, text, timeout=30):
        end = time.monotonic() + timeout
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"{text!r} is not in\n{self.log.read_text()}"
            time.sleep(0.001)

    def stop(self):
        """SIGTERM; it must end well, and say nothing that would alarm anybody."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(20)
        said = self.log.read_text()
        assert status == 0, said
        # alone it is right to complain that it is
        alarming = [x for x in said.splitlines() if not re.match(r"\S+Z (INFO|.*not serving)", x)]
        assert not alarming, said
        assert said.splitlines()[-1].endswith("INFO dfs.daemon: stopped"), said

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def node1(tmp_path):
    """A formatted cluster of three of which nothing runs, and a list of daemons to end."""
    cluster = LocalCluster(tmp_path).init()
    daemons = []

    def start():
        daemons[:] = [Daemon(cluster, program) for program in DIRECTORIES]
        return daemons

    try:
        yield cluster, start
    finally:
        for daemon in daemons:
            daemon.kill()
        cluster.destroy()


def test_at_any_moment_of_the_start(node1):
    _, start = node1
    for text, delay in MOMENTS:
        daemons = start()
        for daemon in daemons:
            daemon.wait_for(text)
            time.sleep(delay)
            daemon.stop()


def test_the_others_are_told(node1):
    cluster, start = node1
    cluster.up("node2", "node3")
    for _ in range(3):
        daemons = start()
        for daemon in daemons:
            daemon.wait_for("metadata 2 at")  # by gossip: it is a member
        marks = {name: len(cluster.log(name)) for name in ("node2", "node3")}
        for daemon in daemons:
            daemon.stop()
        end = time.monotonic() + 20
        for name, mark in marks.items():
            for role in ("metadata", "chunk"):
                while not re.search(f"{role} 1 at .*-> left", cluster.log(name)[mark:]):
                    assert time.monotonic() < end, (role, cluster.log(name)[mark:])
                    time.sleep(0.02)
