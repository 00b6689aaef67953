"""A cluster whose nodes live in network namespaces, so that links between them can be cut.

Each node has a namespace with one address on a bridge that lives in a namespace of its own; nothing
touches the machine's network.  Packets are dropped where they leave or arrive, by iptables rules in the
node's namespace.  Needs root, iproute2 and iptables.
"""

import os
import subprocess
import sys

from localcluster import COPIES, LocalCluster, wait_until

METADATA_PORT, CHUNK_PORT = 7400, 7401


def run(*args):
    """Run a command; raises AssertionError with what it said."""
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, args))}: {done.stderr}"
    return done.stdout


def within(netns):
    """Words before a command that is to run in a network namespace.

    `ip netns exec` would give it a mount namespace as well, in which whatever is mounted at that
    moment stays mounted: a FUSE mount of another test would not end with its `umount`.
    """
    return ("nsenter", f"--net=/run/netns/{netns}")


class NetCluster(LocalCluster):
    """Metadata nodes, node N at 10.99.0.N; clients run beside any of them (`netns`)."""

    def __init__(self, base, nodes=5):
        super().__init__(base, nodes, ("metadata",))
        self.processes = []
        self.tag = f"dfs{os.getpid()}"
        self.hub = f"{self.tag}-hub"
        self.addresses = {name: f"10.99.0.{i}" for i, name in enumerate(self.nodes, 1)}
        self.beside = self.nodes[0]  # where `dfs` runs

    def netns(self, node):
        """The name of a node's namespace."""
        return f"{self.tag}-{node}"

    def __enter__(self):
        try:
            return self._begin()
        except BaseException:
            self.destroy()
            raise

    def __exit__(self, *exc):
        self.destroy()

    def _begin(self):
        run("ip", "netns", "add", self.hub)
        run("ip", "-n", self.hub, "link", "add", "hub", "type", "bridge")
        run("ip", "-n", self.hub, "link", "set", "hub", "up")
        for i, (node, address) in enumerate(self.addresses.items(), 1):
            ns = self.netns(node)
            run("ip", "netns", "add", ns)
            run(
                *("ip", "link", "add", "eth0", "netns", ns, "type", "veth"),
                *("peer", "name", f"port{i}", "netns", self.hub),
            )
            run("ip", "-n", self.hub, "link", "set", f"port{i}", "master", "hub", "up")
            run("ip", "-n", ns, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", ns, "link", "set", "eth0", "up")
            run("ip", "-n", ns, "link", "set", "lo", "up")
        ports = [f"tcp://{a}:{METADATA_PORT}" for a in self.addresses.values()]
        ports += [f"tcp://{a}:{CHUNK_PORT}" for a in [*self.addresses.values()][:COPIES]]
        self.dfs("cluster", "init", "--dir", self.dir, "--spec", self.spec(ports))
        of_all = ("node", "format", "--new", "--cluster-map", self.dir / "map")
        self.at_once(
            (node, (*of_all, "--name", node, "--data", self.dir / node)) for node in self.nodes
        )
        self.up(*self.nodes)
        return self

    def up(self, *names):
        """Start the daemons of nodes; returns when the metadata nodes serve.

        Not with `dfs cluster up`, which rightly refuses to listen where strangers could come by.
        """
        begun = {}
        for name in names:
            for role, data in (("metadata", "metadata"), ("chunkserver", "chunks")):
                if (self.dir / name / data).exists():
                    begun[name, role] = self.start(name, role, data)
        for (name, role), process in begun.items():
            self.wait_for_service(name, role, process)
        return self

    def wait_for_service(self, name, role, process):
        def begun():
            return "dfs.daemon: serving" in self.log(name, role) or process.poll() is not None

        wait_until(begun, 60, f"{name} {role} serves")
        assert process.poll() is None, self.logs()

    def start(self, name, role, data):
        """Start one daemon beside its node's address."""
        path = self.dir / name
        log = self.dir / "log" / f"{name}-{role}.log"
        command = (
            "-P",
            "-m",
            role,
            "--data",
            path / data,
            "--map",
            path / "map",
            "--insecure-listen-any",
        )
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*within(self.netns(name)), sys.executable, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        (self.dir / "run" / f"{name}-{role}.pid").write_text(f"{process.pid}\n")
        self.processes.append(process)
        return process

    def at_once(self, commands):
        """Run `dfs ...` beside nodes, all at the same time; (node, arguments)."""
        processes = [
            subprocess.Popen(
                [*within(self.netns(node)), *self.command(*args)],
                env=self.env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node, args in commands
        ]
        said = [process.communicate(timeout=90)[1] for process in processes]
        assert not any(process.returncode for process in processes), "".join(said) + self.logs()

    def command(self, *args):
        return [sys.executable, "-m", "dfs.cli.main", *map(str, args)]

    def dfs(self, *args, beside=None, **kw):
        """Run `dfs ...` beside a node."""
        ns = self.netns(beside or self.beside)
        return super().dfs(*args, prefix=within(ns), **kw)

    # ------------------------------------------------------------------------------------- faults

    def rule(self, node, *rule):
        run(*within(self.netns(node)), "iptables", "-A", *rule, "-j", "DROP")

    def cut(self, one_side, other_side):
        """No packet passes between any of these and any of those."""
        for node in one_side:
            for peer in other_side:
                self.deafen(node, peer)
                self.rule(node, "OUTPUT", "-d", self.addresses[peer])

    def deafen(self, node, peer):
        """`node` hears nothing of `peer`, which goes on hearing `node`."""
        self.rule(node, "INPUT", "-s", self.addresses[peer])

    def lose(self, node, share):
        """A share of the packets that reach a node is lost."""
        self.rule(
            node, "INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random",
            "--probability", share,
        )  # fmt: skip

    def heal(self):
        """The network is whole again."""
        for node in self.nodes:
            run(*within(self.netns(node)), "iptables", "-F")

    def destroy(self):
        super().destroy()
        for process in self.processes:
            process.wait(10)
        for name in [*map(self.netns, self.nodes), self.hub]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
