"""Broken discarders, each without one of the rules that keep data alive; a test must see each."""

from collections.abc import Sequence

from dfs.cluster.map import METADATA, ClusterMap
from metadata.discard import Discard


class DuringTransitions(Discard):
    """Discards while homes are moving: what old homes still have to push, or reads still need."""

    def rule_complete(self, cluster: ClusterMap) -> bool:
        """Always."""
        return True

    def foreign_now(self, cluster: ClusterMap, partition: int) -> bool:
        """Judges by where homes are going."""
        return self.sync.me not in cluster.homes(METADATA, partition)


class OneHomeLacksIt(Discard):
    """Discards blobs that most homes hold."""

    def rule_everywhere(self, held: Sequence[bool]) -> bool:
        """All but one are enough."""
        return sum(held) >= len(held) - 1
