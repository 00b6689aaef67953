"""When a transition may go on: the thresholds for leaving each of its phases, from nodes' reports.

While homes move from A to B, nodes know different epochs, messages come late, and some members of
A may be dead for ever.  A phase is left when no outcome of that can matter (joint quorums as in
Raft's membership changes: Ongaro and Ousterhout, USENIX ATC 2014, section 6):

Phase 1 (write A and B, read A) -> 2.  A write of the epochs before has W copies in A, none of them
accepted by a member after it was *fenced*, that is, has refused requests older than the partition's
last change.  So of any N - W + 1 fenced members one has the write, and if each of them, after its
fence, has pushed the partition to N - R + 1 members of B (itself counting if it is one), then every
R of B meet it.

Phase 2 (write A and B, read B) -> stable.  A reader of an older epoch needs R answers in A; once
N - R + 1 members of A are fenced at phase 2 it cannot get them.

Journals decide their members themselves, in config entries.  Of the entries of a journal a majority
of A has each, so any N - N // 2 members of A know every journal between them, and its newest config
that matters.  Phase 1 is left when of each of these journals a majority of B holds, durably, the
newest config anybody reports, and its members are B.  For that a fenced member accepts no *genesis*
of an older epoch: a journal that is born after the reports would be missed.

Chunks are immutable and read from B, then A: their side is done when each new member of B has
everything of the partition.

None of it needs more than quorums: one dead member of A blocks nothing, unless W = 1 or R = 1 asks
for all N.  The W copies are those on homes: a write that counted hints on other nodes (PW < W) is
promised no more during a transition than at any other time, until its hints have arrived.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfs.cluster.map import CHUNK, METADATA, ClusterMap
from dfs.cluster.node import Row
from dfs.errors import ConfigError, RemoteProtocolError
from dfs.hashing import PARTITIONS, digest, partition_of

BITMAP_SIZE = PARTITIONS // 8  # bytes
Journal = tuple[bytes, Row, int, bool]  # volume, members of its config, config version, held


def bitmap(partitions: Iterable[int]) -> bytes:
    """A set of partitions in 512 bytes: p is the bit of value 1 << p % 8 in byte p // 8."""
    bits = bytearray(BITMAP_SIZE)
    for p in partitions:
        bits[p >> 3] |= 1 << (p & 7)
    return bytes(bits)


def has(bits: bytes, partition: int) -> bool:
    """Whether the partition is in the set."""
    return bool(bits[partition >> 3] >> (partition & 7) & 1)


@dataclass(frozen=True, slots=True)
class Progress:
    """What one metadata node says about its part in the present transition.

    The node vouches for it durably: nothing of it may become untrue by a crash.
    """

    epoch: int  # it refuses requests that are older than the last changes of this map epoch
    # per member of B: partitions that were pushed there completely, by a push that began after the
    # node was fenced in phase 1 or 2 of this transition
    pushed: Mapping[int, bytes] = field(default_factory=dict)
    # of each journal the node has whose partition is changed: the newest config it knows, and
    # whether it holds that config and everything before it durably
    journals: tuple[Journal, ...] = ()
    complete: bool = True  # `journals` lists all of them, looked up after the fence

    def fields(self) -> tuple[Any, ...]:
        """As a `dfs.codec` value."""
        return (self.epoch, tuple(sorted(self.pushed.items())), self.journals, self.complete)

    @classmethod
    def from_fields(cls, value: Any) -> "Progress":
        """From a decoded value; raises `RemoteProtocolError` if it is not one."""
        try:
            epoch, pushed, journals, complete = value
            found = cls(
                epoch,
                dict(pushed),
                tuple((volume, tuple(m), version, held) for volume, m, version, held in journals),
                complete,
            )
            good = (
                type(epoch) is int
                and type(complete) is bool
                and all(type(b) is int and _is_bitmap(x) for b, x in found.pushed.items())
                and all(
                    type(volume) is bytes
                    and all(type(m) is int for m in members)
                    and type(version) is int
                    and type(held) is bool
                    for volume, members, version, held in found.journals
                )
            )
        except (TypeError, ValueError) as e:
            raise RemoteProtocolError(f"malformed progress report: {e}") from e
        if not good:
            raise RemoteProtocolError(f"malformed progress report of epoch {epoch!r}")
        return found


@dataclass(frozen=True, slots=True)
class ChunkProgress:
    """What one chunkserver says: the partitions of which it has every chunk.

    "Every" means all that N - W + 1 members of A have, listed after they refused writes that are
    older than the partition's last change.
    """

    epoch: int  # of the map under which `complete` was found out
    complete: bytes  # bitmap

    def fields(self) -> tuple[Any, ...]:
        """As a `dfs.codec` value."""
        return (self.epoch, self.complete)

    @classmethod
    def from_fields(cls, value: Any) -> "ChunkProgress":
        """From a decoded value; raises `RemoteProtocolError` if it is not one."""
        if not (
            type(value) is tuple
            and len(value) == 2
            and type(value[0]) is int
            and _is_bitmap(value[1])
        ):
            raise RemoteProtocolError("malformed chunk progress report")
        return cls(*value)


class Rules:
    """The thresholds.  Methods, so that tests can break one at a time."""

    def fenced(self, m: ClusterMap) -> int:
        """Members of A that must be fenced and have pushed before reads move to B."""
        return m.params.n - m.params.w + 1

    def pushed(self, m: ClusterMap) -> int:
        """Members of B to which each of them must have pushed."""
        return m.params.n - m.params.r + 1

    def read_fenced(self, m: ClusterMap) -> int:
        """Members of A that must refuse readers of A before writes leave A."""
        return m.params.n - m.params.r + 1

    def witnesses(self, m: ClusterMap) -> int:
        """Members of A that must have listed their journals: each majority of A has one."""
        return m.params.n - m.params.n // 2

    def journal_majority(self, m: ClusterMap) -> int:
        """Members of B that must hold a journal's config."""
        return m.params.n // 2 + 1

    def newest(self, version: int, versions: Sequence[int]) -> bool:
        """Whether a reported config version is the journal's present one."""
        return version == max(versions)

    def holds(self, held: bool) -> bool:
        """Whether a replica that reports `held` has the config and everything before it."""
        return held

    def since(self, m: ClusterMap, role: str, partition: int) -> int:
        """The epoch from which on a report about the partition counts."""
        return m.last_change(role, partition)


RULES = Rules()


@dataclass(frozen=True, slots=True)
class Lacking:
    """What a phase still waits for; falsy if it can be left."""

    partitions: Row  # without a quorum
    journals: tuple[bytes, ...]  # volumes whose journal has not moved
    reasons: tuple[str, ...]  # in words, for people

    def __bool__(self) -> bool:
        """Whether anything is lacking."""
        return bool(self.partitions or self.journals)


def lacking(m: ClusterMap, role: str, reports: Mapping[int, Any], rules: Rules = RULES) -> Lacking:
    """What the role's present phase waits for: exactly what forcing the next step would give up.

    `reports` are `Progress` of metadata nodes or `ChunkProgress` of chunkservers, by node number.
    Raises `ConfigError` if the role is not in transition.
    """
    if not m.phase(role):
        raise ConfigError(f"no {role} homes are changing in epoch {m.epoch}")
    if role == CHUNK:
        return _chunks(m, reports, rules)
    return (
        _reads_of_a(m, reports, rules) if m.phase(role) == 1 else _readers_of_a(m, reports, rules)
    )


def missing_for_phase_2(
    m: ClusterMap, reports: Mapping[int, Progress], rules: Rules = RULES
) -> list[str]:
    """Why reads may not move to B yet, in words; [] = `m.advance()` is safe."""
    if m.phase(METADATA) != 1:
        raise ConfigError(f"the metadata is not in phase 1 in epoch {m.epoch}")
    return list(lacking(m, METADATA, reports, rules).reasons)


def missing_for_stable(
    m: ClusterMap, reports: Mapping[int, Progress], rules: Rules = RULES
) -> list[str]:
    """Why A may not be left yet, in words; [] = `m.advance()` is safe."""
    if m.phase(METADATA) != 2:
        raise ConfigError(f"the metadata is not in phase 2 in epoch {m.epoch}")
    return list(lacking(m, METADATA, reports, rules).reasons)


def chunks_missing(
    m: ClusterMap, reports: Mapping[int, ChunkProgress], rules: Rules = RULES
) -> list[str]:
    """Why the chunk side is not done, in words; [] = `m.finish_chunks()` is safe."""
    return list(lacking(m, CHUNK, reports, rules).reasons)


# -------------------------------------------------------------------------------------- phases


def _reads_of_a(m: ClusterMap, reports: Mapping[int, Progress], rules: Rules) -> Lacking:
    waits = _Waits(m)
    for p in m.changed(METADATA):
        old, new = m.old_homes(METADATA, p), m.homes(METADATA, p)
        fenced = _fenced(m, METADATA, p, old, reports, rules)
        ready = 0
        gaps: list[tuple[int, int]] = []
        for a in fenced:
            pushed = reports[a].pushed
            gap = [b for b in new if b != a and not (b in pushed and has(pushed[b], p))]
            if len(new) - len(gap) >= rules.pushed(m):
                ready += 1
            else:
                gaps += [(a, b) for b in gap]
        told = sum(reports[a].complete for a in fenced)
        if ready < rules.fenced(m) or told < rules.witnesses(m):
            waits.fence(p, [a for a in old if a not in fenced], reports)
            if ready < rules.fenced(m):
                waits.push(p, gaps)
            if told < rules.witnesses(m):
                waits.listing(p, [a for a in fenced if not reports[a].complete])
    return waits.result(*_journals(m, reports, rules))


def _readers_of_a(m: ClusterMap, reports: Mapping[int, Progress], rules: Rules) -> Lacking:
    waits = _Waits(m)
    for p in m.changed(METADATA):
        old = m.old_homes(METADATA, p)
        fenced = _fenced(m, METADATA, p, old, reports, rules)
        if len(fenced) < rules.read_fenced(m):
            waits.fence(p, [a for a in old if a not in fenced], reports)
    # looked at again: whatever would still live at A only is about to become unreachable
    return waits.result(*_journals(m, reports, rules))


def _chunks(m: ClusterMap, reports: Mapping[int, ChunkProgress], rules: Rules) -> Lacking:
    waits = _Waits(m)
    for p in m.changed(CHUNK):
        old = m.old_homes(CHUNK, p)
        for b in m.homes(CHUNK, p):
            if b in old:
                continue
            report = reports.get(b)
            if report is None or report.epoch < rules.since(m, CHUNK, p):
                waits.fence(p, [b], reports)
            elif not has(report.complete, p):
                waits.fill(p, b)
    return waits.result([], [])


def _fenced(
    m: ClusterMap,
    role: str,
    partition: int,
    members: Row,
    reports: Mapping[int, Progress],
    rules: Rules,
) -> list[int]:
    since = rules.since(m, role, partition)
    return [a for a in members if a in reports and reports[a].epoch >= since]


def _journals(
    m: ClusterMap, reports: Mapping[int, Progress], rules: Rules
) -> tuple[list[bytes], list[str]]:
    """Journals of which too few new homes hold the newest config, and why in words."""
    found: dict[bytes, dict[int, tuple[Row, int, bool]]] = {}
    for number in sorted(reports):
        for volume, members, version, held in reports[number].journals:
            found.setdefault(volume, {})[number] = (members, version, held)
    volumes, reasons = [], []
    for volume in sorted(found):
        partition = partition_of(digest(volume))
        if not m.old_homes(METADATA, partition):
            continue
        known = found[volume]
        homes = m.homes(METADATA, partition)
        versions = [version for _, version, _ in known.values()]
        holders = [
            b
            for b in homes
            if b in known
            and rules.holds(known[b][2])
            and set(known[b][0]) == set(homes)
            and rules.newest(known[b][1], versions)
        ]
        if len(holders) < rules.journal_majority(m):
            volumes.append(volume)
            reasons.append(
                f"the journal of volume {volume.hex()} (partition {partition}) has "
                f"{len(holders)} of {rules.journal_majority(m)} new homes: waiting for "
                f"{_names(m, [b for b in homes if b not in holders])}"
            )
    return volumes, reasons


class _Waits:
    """Counts which node keeps how many partitions waiting, to say it in few lines."""

    def __init__(self, m: ClusterMap) -> None:
        self._map = m
        self._partitions: dict[int, None] = {}
        self._counts: Counter[str] = Counter()

    def fence(self, p: int, nodes: Iterable[int], reports: Mapping[int, Any]) -> None:
        for a in nodes:
            report = reports.get(a)
            said = "has not reported" if report is None else f"is still at epoch {report.epoch}"
            self._add(p, f"node {self._map.node(a).name} {said}")
        self._partitions[p] = None

    def push(self, p: int, gaps: Iterable[tuple[int, int]]) -> None:
        for a, b in gaps:
            self._add(p, f"node {self._map.node(a).name} has more to push to {self._name(b)}")

    def listing(self, p: int, nodes: Iterable[int]) -> None:
        for a in nodes:
            self._add(p, f"node {self._map.node(a).name} has not listed all its journals")

    def fill(self, p: int, b: int) -> None:
        self._add(p, f"node {self._map.node(b).name} has not got all chunks")

    def _add(self, p: int, what: str) -> None:
        self._partitions[p] = None
        self._counts[what] += 1

    def _name(self, number: int) -> str:
        return self._map.node(number).name

    def result(self, journals: list[bytes], words: list[str]) -> Lacking:
        reasons = [
            f"{what}: {count} partition{'s' * (count != 1)} waiting"
            for what, count in sorted(self._counts.items(), key=lambda x: (-x[1], x[0]))
        ]
        return Lacking(tuple(self._partitions), tuple(journals), (*reasons, *words))


def _names(m: ClusterMap, numbers: Iterable[int]) -> str:
    return ", ".join(m.node(x).name for x in numbers)


def _is_bitmap(value: object) -> bool:
    return type(value) is bytes and len(value) == BITMAP_SIZE
