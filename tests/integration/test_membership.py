"""Members of a real cluster come and go, alive and dead, under a load of registers and of files.

After every change all files have all their copies; in the end all acknowledged values are there at level
`all`.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from kvload import Load
from localcluster import LocalCluster, wait_until

pytestmark = pytest.mark.mount
CHANGED = 60  # seconds that a change is given


class Files:
    """Writes files on a mount and reads older ones again, in a thread."""

    def __init__(self, where):
        self.where = where
        self.hashes = {}
        self.slowest = 0.0
        self.problems = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, *_):
        self._stop.set()
        self._thread.join(60)
        assert kind is not None or not self._thread.is_alive(), "the mount hangs"
        if kind is None:
            print(f"  {len(self.hashes)} files, slowest of them {self.slowest:.2f} s")
            assert not self.problems, self.problems[:5]

    def _run(self):
        rnd = random.Random(1)
        number = 0
        while not self._stop.wait(0.1):
            number += 1
            data = rnd.randbytes(rnd.choice([100, 20_000, 300_000]))
            path = self.where / f"f{number}"
            began = time.monotonic()
            try:
                with path.open("wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                self.hashes[path.name] = hashlib.sha256(data).digest()
                self.look(rnd.choice(sorted(self.hashes)))
            except OSError as e:
                self.problems.append(f"{path.name}: {e}")
            self.slowest = max(self.slowest, time.monotonic() - began)

    def look(self, name):
        if hashlib.sha256((self.where / name).read_bytes()).digest() != self.hashes[name]:
            self.problems.append(f"{name} has changed")


def check_change(cluster, load, began):
    """What holds after every change; the load goes on."""
    print(f"  changed after {time.monotonic() - began:.1f} s")
    wait_until(
        lambda: cluster.dfs("fsck", "v", "--all-copies", check=False).returncode == 0,
        CHANGED,
        "every chunk has all its copies",
    )


def change(cluster, load, name, *edit):
    """Stage an edit, apply it, wait for its end."""
    load.enter(name)
    began = time.monotonic()
    cluster.apply(*edit, wait=CHANGED)
    check_change(cluster, load, began)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cluster_changes_its_members(tmp_path, everything):
    c = LocalCluster(tmp_path, 3)
    try:
        c.init().up()
        c.dfs("volume", "create", "v")
        where = c.mount("v", tmp_path / "m")
        load = Load(c, clients=4, pace=0.05).preload(300)
        with Files(where), load:
            load.wait_for_acks(20)

            # two operators at once: one of them changes the cluster
            load.enter("3 -> 5 nodes")
            began = time.monotonic()
            c.dfs("cluster", "node", "add", "node4", "node5")
            epoch = json.loads(c.dfs("cluster", "plan", "--json").stdout)["epoch"]
            operators = [started(c, "cluster", "apply", "--epoch", epoch) for _ in range(2)]
            ends = [(*o.communicate(timeout=60), o.returncode) for o in operators]
            assert any(status == 0 for *_, status in ends), ends
            assert all(status == 0 or len(said.splitlines()) == 1 for _, said, status in ends), ends
            c.dfs("cluster", "wait", "--timeout", CHANGED)
            c.nodes += ["node4", "node5"]
            check_change(c, load, began)
            assert "epoch" in c.refused("cluster", "apply", "--epoch", epoch)
            if everything:
                change(c, load, "drain node2", "drain", "node2")
                change(c, load, "remove node3, alive", "remove", "node3")
                change(c, load, "undrain node2", "undrain", "node2")
            c.kill("node4")
            change(c, load, "remove node4, dead", "remove", "node4")
            if everything:
                change(c, load, "replace node5", "replace", "node5", "node6")
        load.check()
    finally:
        c.destroy()


def started(cluster, *args):
    """`dfs ...`, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "dfs.cli.main", *map(str, args)],
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
