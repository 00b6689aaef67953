"""Small parts for tests of registers: a table, hints, maps of a few nodes."""

from dfs.cluster.map import ClusterMap
from dfs.cluster.node import Node, Params


class Dict(dict):
    """A table that is a dict."""

    def scan(self, prefix, after=b"", limit=1000):
        return sorted((k, v) for k, v in self.items() if k.startswith(prefix) and k > after)[:limit]


class KeepsHints:
    def __init__(self):
        self.kept = []

    def add(self, row, register, target, written):
        self.kept.append((row, register, target))
        return [(b"h%d" % len(self.kept), register)]

    def find(self, row):
        return [register for kept, register, _ in self.kept if kept == row]


def member(number, zone=None, weight=1.0):
    return Node(
        number, bytes([number]) * 16, f"n{number}", zone or f"z{number}", "", f"h{number}",
        f"tcp://n{number}:1", f"tcp://n{number}:2", weight, 1.0,
    )  # fmt: skip


def make_map(count, n=3, zones=None, params=None):
    nodes = [member(i, zones[i] if zones else None) for i in range(count)]
    return ClusterMap.create(
        bytes(16), nodes, params=params or Params(n, n // 2 + 1, n // 2 + 1, n // 2 + 1)
    )
