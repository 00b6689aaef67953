"""A real local cluster for tests: processes, loopback ports, a mount; all through the command line.

Everything a test does to the cluster, a user could do: `dfs cluster init`, `up`, `mount`.  Faults are
signals sent to the pids of the pid files, which are this cluster's own.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROLES = ("metadata", "chunkserver")


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
    """Three nodes (two processes each) in one directory, and the mounts made from it."""

    def __init__(self, base, nodes=3):
        self.dir = Path(base) / "cluster"
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.mounts = []
        self.env = {**os.environ, "DFS_CLUSTER": str(self.dir / "cluster.json"), "NO_COLOR": "1"}

    def dfs(self, *args, check=True, timeout=120, **kw):
        """Run `dfs ...`; returns the CompletedProcess (text)."""
        kw.setdefault("text", True)
        done = subprocess.run(
            [sys.executable, "-m", "dfs.cli.main", *map(str, args)],
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
        self.dfs(
            "cluster", "init", "--dir", self.dir, "--nodes", len(self.nodes), "--base-port", base
        )
        return self

    def up(self, *names):
        self.dfs("cluster", "up", "--dir", self.dir, *names)
        return self

    def down(self, *names):
        self.dfs("cluster", "down", "--dir", self.dir, *names)

    def pid(self, node, role):
        return int((self.dir / "run" / f"{node}-{role}.pid").read_text())

    def kill(self, node, roles=ROLES, sig=signal.SIGKILL):
        for role in roles:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(node, role), sig)
        if sig == signal.SIGKILL:
            for role in roles:
                wait_gone(self.pid(node, role))

    def kill_all(self):
        """kill -9 of every process of the cluster, mounts included, as close together as possible."""
        pids = [self.pid(n, r) for n in self.nodes for r in ROLES]
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
