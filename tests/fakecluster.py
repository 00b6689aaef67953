"""A cluster for commands: its map, registers and daemons are dicts of this process.

`FakeCluster` answers what `dfs.client` and the command line ask of metadata nodes, without a
network: registers with siblings and contexts, agreement on maps, and whatever a test puts into
`answers` (method -> function of (address, args), or a value).  `down` are addresses nobody is at.
"""

import contextlib
import itertools
from random import Random

from dfs.cli.spec import local_nodes
from dfs.client.connect import Cluster
from dfs.clock import SystemClock
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap
from dfs.errors import InvalidArgument, StaleEpoch, UnknownMethod, Unreachable

CONTEXT = b"seen %d"


class FakeCluster:
    def __init__(self, nodes=3):
        self.map = ClusterMap.create(bytes(range(16)), local_nodes(nodes, nodes, 7400))
        self.registers = {}  # (space, key) -> values, newest first
        self.answers = {}
        self.down = set()
        self.asked = []  # (address, method, args)
        self.proposed = []  # (note, map)
        self.moves = True  # whether a change that begins also ends
        self._count = itertools.count(1)

    def client(self):
        return Cluster(self, lambda: self.map, None, SystemClock(), Random(1), set_map=self._take)

    def _take(self, new):
        if new.epoch > self.map.epoch:
            self.map = new

    def address(self, name):
        return next(n.metadata_addr for n in self.map.nodes if n.name == name)

    def patch(self, monkeypatch, *modules):
        """Let these modules, and those that import late, connect to this cluster."""

        @contextlib.asynccontextmanager
        async def connected(_file):
            yield self.client()

        for module in ("dfs.cli.client", *modules):
            monkeypatch.setattr(f"{module}.connected", connected)

    async def call(self, address, method, args=(), _data=(), *, timeout, **_given):
        assert timeout > 0
        self.asked.append((address, method, args))
        if address in self.down:
            raise Unreachable(f"{address}: connection refused")
        found = self.answers.get(method, getattr(self, "do_" + method.replace(".", "_"), None))
        if found is None:
            raise UnknownMethod(f"no method {method}")
        found = found(address, args) if callable(found) else found
        if isinstance(found, Exception):
            raise found
        return found, b""

    # -- what daemons do

    def do_kv_get(self, _address, args):
        space, key, _ = args
        values = self.registers.get((space, key), ())
        return values, CONTEXT % len(values) if values else b"", {"coordinator": 1}

    def do_kv_put(self, _address, args):
        space, key, value, context, _ = args
        old = self.registers.get((space, key), ())
        kept = old if context == b"" else ()
        self.registers[space, key] = (() if value is None else (value,)) + kept
        return CONTEXT % next(self._count), len(kept) + 1, {"acked": (1, 2, 3), "hinted": ()}

    def do_kv_scan(self, _address, args):
        space, prefix, _cursor, _limit, _ = args
        found = [
            (key, values, b"c")
            for (where, key), values in self.registers.items()
            if where == space and key.startswith(prefix) and values
        ]
        return found, b""

    def do_ping(self, address, _args):
        node, role = next(
            (n, role) for n in self.map.nodes for role in ROLES if n.address(role) == address
        )
        return (role, node.number, node.node_id, self.map.epoch)

    def do_map_history(self, _address, _args):
        first = (1, bytes(32), 0, "the cluster was made")
        return ((first, *((m.epoch, m.digest, 10**18, note) for note, m in self.proposed)),)

    def do_map_get(self, _address, _args):
        return (self.map.encode(),)

    def do_map_propose(self, _address, args):
        epoch, data, note = args
        new = ClusterMap.decode(data)
        if new.epoch != epoch + 1:
            raise InvalidArgument(f"the map of epoch {new.epoch} cannot follow {epoch}")
        if any(new == agreed for _, agreed in self.proposed):
            return (new.epoch,)
        if epoch != self.map.epoch:
            raise StaleEpoch("there is a newer map", self.map.encode())
        self.map = new
        self.proposed.append((note, new))
        if self.moves:
            while self.map.transition is not None:
                self.map = self.map.step(METADATA if self.map.phase(METADATA) else CHUNK)
        return (self.map.epoch,)
