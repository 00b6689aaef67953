"""Transitions with one rule broken each: what proves that the traces can see such a fault."""

from collections.abc import Callable, Sequence

from dfs.cluster.joint import RULES, Rules
from dfs.cluster.map import METADATA, ClusterMap
from dfs.cluster.node import Row
from dfs.testing.joint_cores import PARTITION, World


class _Fenced(Rules):
    def fenced(self, m: ClusterMap) -> int:
        return super().fenced(m) - 1


class _Pushed(Rules):
    def pushed(self, m: ClusterMap) -> int:
        return super().pushed(m) - 1


class _ReadFenced(Rules):
    def read_fenced(self, m: ClusterMap) -> int:
        return super().read_fenced(m) - 1


class _NoReadFence(Rules):
    def read_fenced(self, m: ClusterMap) -> int:
        return 0


class _Witnesses(Rules):
    def witnesses(self, m: ClusterMap) -> int:
        return super().witnesses(m) - 1


class _JournalMajority(Rules):
    def journal_majority(self, m: ClusterMap) -> int:
        return super().journal_majority(m) - 1


class _Newest(Rules):
    def newest(self, version: int, versions: Sequence[int]) -> bool:
        return True


class _Holds(Rules):
    def holds(self, held: bool) -> bool:
        return True


class _Since(Rules):
    def since(self, m: ClusterMap, role: str, partition: int) -> int:
        return 0


class _NoFence(World):
    def rule_refuses(self, write: bool) -> bool:
        return False


class _NoWriteFence(World):
    def rule_refuses(self, write: bool) -> bool:
        return not write


class _NoReaderFence(World):
    def rule_refuses(self, write: bool) -> bool:
        return write


class _Begun(World):
    def rule_last_change(self, m: ClusterMap) -> int:
        return min(m.last_change(METADATA, PARTITION), self.maps[1].epoch)


class _NotBegun(World):
    def rule_last_change(self, m: ClusterMap) -> int:
        last = m.last_change(METADATA, PARTITION)
        return 1 if last == self.maps[1].epoch else last


class _EarlyPush(World):
    def rule_push_counts(self, epoch: int) -> bool:
        return True


class _LateGenesis(World):
    def rule_genesis_fenced(self) -> bool:
        return False


class _OnlyOld(World):
    def rule_write_sets(self, m: ClusterMap) -> tuple[Row, ...]:
        return m.write_sets(METADATA, PARTITION)[:1]


class _OnlyNew(World):
    def rule_write_sets(self, m: ClusterMap) -> tuple[Row, ...]:
        return m.write_sets(METADATA, PARTITION)[-1:]


class _EarlyRead(World):
    def rule_read_homes(self, m: ClusterMap) -> Row:
        return m.homes(METADATA, PARTITION)


class _LateRead(World):
    def rule_read_homes(self, m: ClusterMap) -> Row:
        return m.old_homes(METADATA, PARTITION) or m.homes(METADATA, PARTITION)


# name -> (what is broken, world, rules, shapes in which it must be seen, invariant that sees it)
Mutant = tuple[str, Callable[..., World], Rules, tuple[str, ...], str]
MUTANTS: dict[str, Mutant] = {
    "fenced": (
        "one member of A too few is fenced",
        World,
        _Fenced(),
        ("disjoint", "five"),
        "write lost",
    ),
    "pushed": (
        "pushes reach one member of B too few",
        World,
        _Pushed(),
        ("disjoint",),
        "write lost",
    ),
    "readfenced": (
        "one reader's fence too few",
        World,
        _ReadFenced(),
        ("disjoint", "write-all"),
        "stale read",
    ),
    "noreadfence": (
        "phase 2 is left at once",
        World,
        _NoReadFence(),
        ("disjoint", "five"),
        "stale read",
    ),
    "witnesses": (
        "one list of journals too few",
        World,
        _Witnesses(),
        ("disjoint", "write-all"),
        "journal lost",
    ),
    "majority": (
        "one new home of a journal too few",
        World,
        _JournalMajority(),
        ("disjoint", "four"),
        "journal lost",
    ),
    "newest": (
        "any config with the right members counts",
        World,
        _Newest(),
        ("disjoint", "five"),
        "journal lost",
    ),
    "holds": (
        "a chosen config is enough",
        World,
        _Holds(),
        ("disjoint", "overlapping"),
        "journal lost",
    ),
    "since": (
        "reports of nodes that are not fenced count",
        World,
        _Since(),
        ("disjoint", "five"),
        "stale read",
    ),
    "nofence": ("nodes serve stale requests", _NoFence, RULES, ("disjoint", "five"), "write lost"),
    "nowritefence": ("nodes take stale writes", _NoWriteFence, RULES, ("disjoint",), "write lost"),
    "noreaderfence": (
        "nodes answer stale reads",
        _NoReaderFence,
        RULES,
        ("disjoint",),
        "stale read",
    ),
    "m3": ("stale requests count", _NoFence, RULES, ("overlapping",), "M3 a stale request counted"),
    "begun": (
        "the last change does not move with the second phase",
        _Begun,
        RULES,
        ("disjoint", "overlapping"),
        "stale read",
    ),
    "notbegun": (
        "the last change does not move with the first phase",
        _NotBegun,
        RULES,
        ("disjoint",),
        "write lost",
    ),
    "earlypush": (
        "pushes from before the fence count",
        _EarlyPush,
        RULES,
        ("disjoint",),
        "write lost",
    ),
    "lategenesis": (
        "fenced members accept a genesis",
        _LateGenesis,
        RULES,
        ("disjoint",),
        "journal lost",
    ),
    "onlyold": ("writes need no quorum in B", _OnlyOld, RULES, ("disjoint",), "write lost"),
    "onlynew": ("writes need no quorum in A", _OnlyNew, RULES, ("disjoint",), "write lost"),
    "earlyread": ("phase 1 reads B", _EarlyRead, RULES, ("disjoint",), "stale read"),
    "lateread": ("phase 2 reads A", _LateRead, RULES, ("disjoint",), "stale read"),
}
