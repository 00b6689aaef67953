"""Identifiers and how they are made.

A node has 16 random bytes (`node_id`, made with its data directory) and a number of 13 bits that
the map gives it and never reuses.  A session id is `node number (13) | counter (26)`: unique in
the cluster without agreement, since each node keeps its counter durably.  An inode number is
`session id (39) | counter (24)`: a session mints 2**24 inodes without a round trip.
"""

from typing import NewType

NodeId = NewType("NodeId", bytes)  # 16 bytes
NodeNumber = int  # 0..8191
VolumeId = NewType("VolumeId", bytes)  # 16 bytes
Digest = NewType("Digest", bytes)  # 32 bytes, BLAKE3
SessionId = int
Ino = int

NODE_BITS, SESSION_BITS, COUNTER_BITS = 13, 26, 24
SYSTEM_VOLUME = VolumeId(bytes(16))  # volume 0: registry of volumes, policies, snapshots
MAP_JOURNAL = VolumeId(b"dfs cluster map\0")  # the journal in which cluster maps are agreed
ROOT_INO: Ino = 1


def session_id(node: NodeNumber, counter: int) -> SessionId:
    """Session id of the `counter`-th session that node `node` opened."""
    if not (0 <= node < 1 << NODE_BITS and 0 < counter < 1 << SESSION_BITS):
        raise ValueError(f"session id out of range: node {node}, counter {counter}")
    return node << SESSION_BITS | counter


def first_ino(session: SessionId) -> Ino:
    """First inode number that the session may mint; the last is `first_ino + 2**24 - 1`."""
    return session << COUNTER_BITS
