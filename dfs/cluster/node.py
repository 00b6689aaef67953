"""The parts of a cluster map: nodes, replication, rows of homes, and a change under way."""

from dataclasses import dataclass
from typing import Final

METADATA: Final = "metadata"
CHUNK: Final = "chunk"
ROLES: Final = (METADATA, CHUNK)

Row = tuple[int, ...]  # numbers of the nodes that hold one partition
Table = tuple[Row, ...]  # one row per partition


@dataclass(frozen=True, slots=True)
class Node:
    """One member: a metadata node, a chunkserver, or both, on one data directory's node id.

    An address is `tcp://host:port` or `unix:///path`; "" means that the node does not have the
    role.  Weights are capacities in any unit; 0 keeps the node readable but gives it nothing new.
    """

    number: int  # 0..8191, never reused
    node_id: bytes  # 16 bytes, made with the data directory
    name: str
    zone: str
    rack: str
    host: str
    metadata_addr: str
    chunk_addr: str
    metadata_weight: float = 1.0
    chunk_weight: float = 1.0

    def address(self, role: str) -> str:
        """Where the node serves `role`; "" if it does not."""
        return self.metadata_addr if role == METADATA else self.chunk_addr

    def weight(self, role: str) -> float:
        """Capacity for `role`; 0.0 if it does not have the role."""
        if not self.address(role):
            return 0.0
        return self.metadata_weight if role == METADATA else self.chunk_weight


@dataclass(frozen=True, slots=True)
class Params:
    """Replication: copies, copies for an acknowledgement, answers for a read, homes among W."""

    n: int = 3
    w: int = 2
    r: int = 2
    pw: int = 2

    @classmethod
    def for_nodes(cls, nodes: int) -> "Params":
        """The defaults for a cluster of `nodes`: three copies or as many as there are nodes."""
        n = min(3, nodes)
        return cls(n, n // 2 + 1, n // 2 + 1, n // 2 + 1)


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of homes under way, from the tables kept here (A) to the map's own (B).

    Metadata goes through two phases, each an epoch of its own, so that no write is lost and no read
    is stale while nodes know different epochs (`dfs.cluster.joint`):

    1. writes need W copies in A *and* in B, reads R answers in A;
    2. writes need W copies in A *and* in B, reads R answers in B.

    Chunks are immutable and verified by their readers: they are written to B and read from B, then
    A, until B has everything.
    """

    phase: int  # of the metadata side, 1 or 2; 2 once that side is done
    metadata: Table | None  # A; None when the metadata side is done
    chunk: Table | None  # A; None when the chunk side is done
    leaving: tuple[int, ...]  # nodes that are dropped and banned when both sides are done

    def old(self, role: str) -> Table | None:
        """Table A of the role; None when its side is done."""
        return self.metadata if role == METADATA else self.chunk


def same_homes(a: Row, b: Row) -> bool:
    """Whether two rows name the same nodes: their order decides nothing about quorums."""
    return a == b or frozenset(a) == frozenset(b)
