"""Where replicas belong: weighted straw2 draws, spread over zones, racks and hosts in one sort.

For each partition every candidate draws `-ln(u) / weight` with `u` uniform in (0, 1), for ever the
same for one node and partition; taking the smallest draw chooses nodes in proportion to their
weight and moves only what must move when a node comes or goes (straw2: Weil et al., "CRUSH",
SC 2006, as corrected in Ceph's `bucket_straw2_choose`).  Replicas are taken one after the other,
always the least

    (replicas already in its zone, in its rack, on its host, draw)

so that with at least as many zones as replicas no zone holds two of them, and with fewer the spread
is as even as it can be.  Unlike CRUSH nothing is retried: the result always has as many distinct
nodes as were asked for, if there are that many.

The result is materialised in the cluster map, so that floating point never has to agree between two
machines; only the order of fallback nodes is computed where it is needed.
"""

from collections import Counter
from collections.abc import Sequence
from math import log
from struct import unpack
from typing import NamedTuple

from blake3 import blake3

from dfs.hashing import PARTITIONS


class Candidate(NamedTuple):
    """A node as placement sees it; failure domains nest: a rack is named within its zone."""

    node_id: bytes
    zone: str
    rack: str
    host: str
    weight: float  # capacity, in any unit; 0 = never chosen


def draws(node_id: bytes) -> tuple[float, ...]:
    """`-ln(u)` of one node for every partition, u from 64 bits of BLAKE3(node id) at offset 8p."""
    raw = blake3(b"dfs placement" + node_id).digest(8 * PARTITIONS)
    # + 0.5 keeps u away from 0, and from 1 up to rounding: a draw of 0.0 is harmless
    return tuple(-log((word + 0.5) * 2.0**-64) for word in unpack(f">{PARTITIONS}Q", raw))


Calibrated = tuple[tuple[int, float], ...]  # (node number, weight as placement uses it)


class Placer:
    """Placement of one role over a fixed set of candidates, given in the order of their numbers.

    Results are indexes into `candidates`.  The order of the candidates changes nothing but these
    indexes, as long as node ids differ.
    """

    def __init__(
        self, candidates: Sequence[Candidate], drawn: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Draw for every candidate, about 0.7 ms each, unless `drawn` has the draws already."""
        self.candidates = tuple(candidates)
        self._live = [i for i, c in enumerate(self.candidates) if c.weight > 0]
        self._scores = {
            i: [d / c.weight for d in (drawn[i] if drawn else draws(c.node_id))]
            for i, c in enumerate(self.candidates)
            if c.weight > 0
        }
        # small numbers instead of names: the sort below counts in lists
        self._zone = _numbered([(c.zone,) for c in self.candidates])
        self._rack = _numbered([(c.zone, c.rack) for c in self.candidates])
        self._host = _numbered([(c.zone, c.rack, c.host) for c in self.candidates])

    def place(self, partition: int, count: int, first: Sequence[int] = ()) -> tuple[int, ...]:
        """`first`, then further candidates up to `count` in all (or as many as there are)."""
        scores, zone, rack, host = self._scores, self._zone, self._rack, self._host
        size = len(self.candidates)
        zones, racks, hosts = [0] * size, [0] * size, [0] * size
        chosen = list(first)
        taken = set(first)
        rest = sorted(
            (i for i in self._live if i not in taken),
            key=lambda i: (scores[i][partition], self.candidates[i].node_id),
        )
        for i in chosen:
            zones[zone[i]] += 1
            racks[rack[i]] += 1
            hosts[host[i]] += 1
        while rest and len(chosen) < count:
            # the first in order of draws whose domains are the least used is the minimum asked for
            best, least = -1, (size, size, size)
            for i in rest:
                used = (zones[zone[i]], racks[rack[i]], hosts[host[i]])
                if used < least:
                    best, least = i, used
                    if used == (0, 0, 0):
                        break
            rest.remove(best)
            chosen.append(best)
            zones[zone[best]] += 1
            racks[rack[best]] += 1
            hosts[host[best]] += 1
        return tuple(chosen)

    def table(self, count: int) -> list[tuple[int, ...]]:
        """The first `count` choices of every partition."""
        return [self.place(partition, count) for partition in range(PARTITIONS)]


TOLERANCE = 0.05  # a node may get this much more or less than it should before weights are bent
_GOAL = 0.01
_ROUNDS = 12


def calibrate(
    candidates: Sequence[Candidate], count: int, weights: Sequence[float]
) -> tuple[list[tuple[int, ...]], list[float]]:
    """A table of `count` choices and the weights it was made with; all weights must be > 0.

    Placement starts with `weights` and bends them only if some node ends up more than `TOLERANCE`
    away from its `achievable` share: chance (4096 partitions are a sample) and the cap of one
    replica per node or zone push shares away from weights, the more the more weights differ.  The
    correction is `weight *= (target / actual) ** 0.7`, a few times.
    """
    drawn = [draws(c.node_id) for c in candidates]
    targets = [share * PARTITIONS for share in achievable(candidates, count)]

    def attempt(weights: Sequence[float]) -> tuple[float, list[tuple[int, ...]], list[int]]:
        bent = [c._replace(weight=w) for c, w in zip(candidates, weights, strict=True)]
        table = Placer(bent, drawn).table(count)
        counts = Counter(i for row in table for i in row)
        actual = [counts[i] for i in range(len(candidates))]
        worst = max(abs(a / t - 1) for a, t in zip(actual, targets, strict=True))
        return worst, table, actual

    first, first_table, actual = attempt(weights)
    if first <= TOLERANCE:
        return first_table, list(weights)
    best, best_table, best_weights = first, first_table, list(weights)
    total = sum(c.weight for c in candidates)
    now = list(weights)
    for _ in range(_ROUNDS):
        now = [w * (t / max(a, 1)) ** 0.7 for w, t, a in zip(now, targets, actual, strict=True)]
        now = [w * total / sum(now) for w in now]
        worst, table, actual = attempt(now)
        if worst < best:
            best, best_table, best_weights = worst, table, now
        if best <= _GOAL:
            break
    if first - best < _GOAL:  # not worth bending: whatever keeps shares uneven, weights do not
        return first_table, list(weights)
    return best_table, best_weights


def achievable(candidates: Sequence[Candidate], count: int) -> list[float]:
    """Replicas per partition that each candidate can get at best, given the spread over domains.

    Shares follow weights as far as no zone, then rack, host and node, gets more than its turn:
    a domain has its second replica of a partition when every other one has had its first or is
    full.  All weights must be > 0.
    """
    shares = [0.0] * len(candidates)

    def fill(members: list[int], copies: float, depth: int) -> None:
        if depth == 4:
            shares[members[0]] = copies
            return
        groups: dict[object, list[int]] = {}
        for i in members:
            c = candidates[i]
            groups.setdefault((c.zone, c.rack, c.host, i)[depth], []).append(i)
        lists = list(groups.values())
        weights = [sum(candidates[i].weight for i in group) for group in lists]
        for group, part in zip(lists, _fill(weights, list(map(len, lists)), copies), strict=True):
            fill(group, part, depth + 1)

    fill(list(range(len(candidates))), float(min(count, len(candidates))), 0)
    return shares


def _fill(weights: Sequence[float], sizes: Sequence[int], copies: float) -> list[float]:
    """Divide `copies` by weight among domains that take turns and hold at most `sizes`."""
    turn = 1
    while sum(min(turn, size) for size in sizes) < copies - 1e-9:
        turn += 1
    low = [min(turn - 1, size) for size in sizes]
    high = [min(turn, size) for size in sizes]

    def at(level: float) -> list[float]:
        return [min(max(w * level, a), b) for w, a, b in zip(weights, low, high, strict=True)]

    below, above = 0.0, turn / min(weights)
    for _ in range(100):
        middle = (below + above) / 2
        if sum(at(middle)) < copies:
            below = middle
        else:
            above = middle
    return at(above)


class Balance(NamedTuple):
    """How a table turned out: for `dfs cluster plan` and for tests."""

    partitions: dict[int, int]  # replicas per candidate index
    deviation: dict[int, float]  # share against the ideal by weight, -0.05 = 5 % too little
    shared_zone: int  # partitions with two replicas in one zone
    shared_rack: int
    shared_host: int


def balance(candidates: Sequence[Candidate], table: Sequence[Sequence[int]]) -> Balance:
    """Count what a table gives each candidate and how often failure domains are shared.

    The ideal share of a node is its share of the weight, but at most one replica of a partition.
    """
    replicas = Counter(i for row in table for i in row)
    total_weight = sum(c.weight for c in candidates)
    total = sum(replicas.values())
    deviation = {}
    for i, c in enumerate(candidates):
        if c.weight > 0:
            ideal = min(float(len(table)), total * c.weight / total_weight)
            deviation[i] = replicas[i] / ideal - 1 if ideal else 0.0
    zone = _numbered([(c.zone,) for c in candidates])
    rack = _numbered([(c.zone, c.rack) for c in candidates])
    host = _numbered([(c.zone, c.rack, c.host) for c in candidates])
    shared = [
        sum(len({domain[i] for i in row}) < len(row) for row in table)
        for domain in (zone, rack, host)
    ]
    return Balance(
        {i: replicas[i] for i in range(len(candidates))}, deviation, shared[0], shared[1], shared[2]
    )


def _numbered(names: Sequence[tuple[str, ...]]) -> list[int]:
    """Replace equal names by equal small numbers."""
    numbers: dict[tuple[str, ...], int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]
