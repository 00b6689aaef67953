"""A real local cluster for tests: processes, loopback ports, a mount; all through the command line.

Everything a test does to the cluster, a user could do: `dfs cluster init`, `up`, `mount`.  Faults are
signals sent to the pids of the pid files, which are this cluster's own.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import trio

from dfs.client.connect import ClusterRef, connect
from dfs.clock import SystemClock
from dfs.cluster.map import METADATA
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.errors import DfsError
from metadata.registers import GET, PREFIX, partition_of_row, row_of
from metadata.store.engine import Store

ROLES = ("metadata", "chunkserver")
COPIES = 3


def free_ports(count):
    """A base port with `count` free loopback ports from it on."""
    for base in range(21000 + os.getpid() % 5000, 60000, count + 7):
        socks = []
        try:
            for port in range(base, base + count):
                s = socket.socket()
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                socks.append(s)
                s.bind(("127.0.0.1", port))
        except OSError:
            continue
        else:
            return base
        finally:
            for s in socks:
                s.close()
    raise RuntimeError("no free ports")


class LocalCluster:
    """Some nodes (a process for each of `roles`) in one directory, and the mounts made from it."""

    def __init__(self, base, nodes=3, roles=ROLES):
        self.dir = Path(base) / "cluster"
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.roles = roles
        self.mounts = []
        self.env = {**os.environ, "DFS_CLUSTER": str(self.dir / "cluster.json"), "NO_COLOR": "1"}

    def dfs(self, *args, check=True, timeout=120, prefix=(), **kw):
        """Run `dfs ...`; returns the CompletedProcess (text)."""
        kw.setdefault("text", True)
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "dfs.cli.main", *map(str, args)],
            env=self.env,
            capture_output=True,
            timeout=timeout,
            check=False,
            **kw,
        )
        if check and done.returncode:
            raise AssertionError(
                f"dfs {' '.join(map(str, args))}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
            )
        return done

    def init(self):
        base = free_ports(2 * len(self.nodes))
        if self.roles != ROLES:
            spec = self.spec(
                [f"tcp://127.0.0.1:{base + i}" for i in range(len(self.nodes) + COPIES)]
            )
            self.dfs("cluster", "init", "--dir", self.dir, "--spec", spec)
            return self
        self.dfs(
            "cluster", "init", "--dir", self.dir, "--nodes", len(self.nodes), "--base-port", base
        )
        return self

    def spec(self, addresses):
        """Write the description of a cluster of metadata nodes, each in a zone of its own.

        Copies are as many as there are chunkservers, so the first three nodes have one.
        """
        nodes = [
            {"name": name, "zone": f"zone{i + 1}", "host": f"host-{name}"}
            | {"metadata_addr": addresses[i]}
            for i, name in enumerate(self.nodes)
        ]
        for node, address in zip(nodes, addresses[len(nodes) :], strict=False):
            node["chunk_addr"] = address
        path = self.dir.parent / "spec.json"
        path.write_text(json.dumps({"nodes": nodes}))
        return path

    def up(self, *names):
        self.dfs("cluster", "up", "--dir", self.dir, *names)
        return self

    def refused(self, *args, **kw):
        """Run `dfs ...`, which fails with one line; returns that line."""
        done = self.dfs(*args, check=False, **kw)
        assert done.returncode == 1, (args, done.stdout, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr.strip()

    def apply(self, *edit, wait=60):
        """Stage one edit, if given, and apply what is staged; waits so many seconds for the end."""
        if edit:
            self.dfs("cluster", "node", *edit)
        epoch = json.loads(self.dfs("cluster", "plan", "--json").stdout)["epoch"]
        return self.dfs("cluster", "apply", "--epoch", epoch, "--wait", wait)

    def down(self, *names):
        self.dfs("cluster", "down", "--dir", self.dir, *names)

    def pid(self, node, role):
        return int((self.dir / "run" / f"{node}-{role}.pid").read_text())

    def kill(self, node, roles=None, sig=signal.SIGKILL):
        roles = self.roles if roles is None else roles
        for role in roles:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(node, role), sig)
        if sig == signal.SIGKILL:
            for role in roles:
                wait_gone(self.pid(node, role))

    def kill_all(self):
        """kill -9 of every process of the cluster, mounts included, as close together as possible."""
        pids = [self.pid(n, r) for n in self.nodes for r in self.roles]
        pids += [int(p.read_text()) for p in (self.dir / "run").glob("mount*.pid")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            wait_gone(pid)
        for m in self.mounts:
            subprocess.run(["umount", "-l", str(m)], check=False, capture_output=True)
        for p in (self.dir / "run").glob("mount*.pid"):
            p.unlink()

    def mount(self, volume, where, *options):
        where = Path(where)
        where.mkdir(parents=True, exist_ok=True)
        self.dfs("mount", volume, where, *options)
        if where not in self.mounts:
            self.mounts.append(where)
        return where

    def umount(self, where):
        self.dfs("umount", where)

    def status(self, check=False):
        return json.loads(self.dfs("cluster", "status", "--json", check=check).stdout)

    def ask(self, work):
        """The result of `await work(cluster)` over a connection of our own."""

        async def main():
            async with connect(ClusterRef.load(self.dir / "cluster.json"), name="test") as c:
                return await work(c)

        return trio.run(main)

    def map(self):
        """The newest map that any metadata node has."""

        async def newest(c):
            await c.refresh_map()
            return c.get_map()

        return self.ask(newest)

    def node_status(self, *names):
        """What the metadata nodes say of themselves; those that are silent are left out."""

        async def work(c):
            found = {}
            for node in c.get_map().nodes:
                if names and node.name not in names:
                    continue
                with contextlib.suppress(DfsError):
                    (status,), _ = await c.rpc.call(node.metadata_addr, "node.status", timeout=3)
                    found[node.name] = status
            return found

        return self.ask(work)

    def copies(self, keys, space=0):
        """key -> {home: register bytes, or the error}, as each home itself answers."""

        async def work(c):
            await c.refresh_map()
            current = c.get_map()
            wanted = {}  # node -> rows
            for key in keys:
                row = row_of(space, key)
                for home in current.read_homes(METADATA, partition_of_row(row)):
                    wanted.setdefault(home, []).append((key, row))
            found = {key: {} for key in keys}
            for home, rows in wanted.items():
                for i in range(0, len(rows), 100):
                    part = rows[i : i + 100]
                    requests = tuple((GET, row) for _, row in part)
                    (replies,), _ = await c.rpc.call(
                        current.address(METADATA, home), "reg.batch", (home, requests),
                        timeout=10, epoch=current.epoch,
                    )  # fmt: skip
                    for (key, _), reply in zip(part, replies, strict=True):
                        found[key][current.node(home).name] = reply
            return found

        return self.ask(work)

    def differing(self, keys):
        """Keys whose homes do not all hold the same bytes."""
        return [key for key, held in self.copies(keys).items() if len(set(held.values())) > 1]

    def rows(self, node):
        """The registers in the store of a node that is down: row -> bytes."""
        env = Env(
            SystemClock(), RealDisk(self.dir / node / "metadata"), None, None, random.Random(1)
        )

        async def work():
            store = await Store.open(env)
            try:
                return dict(store.iterate(PREFIX, bytes((PREFIX[0] + 1,))))
            finally:
                store.close()

        return trio.run(work)

    def log(self, node, role="metadata"):
        """All that a daemon said."""
        return (self.dir / "log" / f"{node}-{role}.log").read_text(errors="replace")

    def logs(self, lines=15):
        text = ""
        for p in sorted((self.dir / "log").glob("*.log")) if (self.dir / "log").exists() else []:
            text += (
                f"== {p.name}\n"
                + "\n".join(p.read_text(errors="replace").splitlines()[-lines:])
                + "\n"
            )
        return text

    def destroy(self):
        for m in self.mounts:
            subprocess.run(["umount", "-l", str(m)], check=False, capture_output=True)
        for p in (self.dir / "run").glob("*.pid") if (self.dir / "run").exists() else []:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(p.read_text()), signal.SIGKILL)
        shutil.rmtree(self.dir, ignore_errors=True)


def wait_gone(pid, timeout=10):
    """Wait until the process is dead (a zombie counts: its parent is not us)."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} does not die")


def wait_until(condition, timeout=30, what="condition"):
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"timeout: {what}")
        time.sleep(0.1)
