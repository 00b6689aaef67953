"""Who a node is when it writes registers, and what time it is then: the two halves of a dot.

An actor may mint only while the node knows every dot that the actor ever minted.  Whoever forgets
one mints a later one that covers it, and a merge drops an acknowledged value.  So the actor of a
partition is

    BLAKE3(node id | actor epoch u64 | since u32)[:8]

`since` is the map epoch from which on the node has been one of the homes that coordinate (members
of the read set) without a gap: a node that lost the partition, dropped its rows and came back is
another actor.  The *actor epoch* grows when the node finds that it lost something: damage in the
store, or a dot of its own that it does not know.

Times are hybrid logical clocks in microseconds (Kulkarni et al. 2014): never below the clock, above
every time this node used before, and above what the register shows, as far as that is no more than
`MAX_AHEAD` in the future.  A clock that is set back, or skewed by hours, therefore costs the order
of concurrent writes and nothing else.  A merge never refuses a time: data from a node with a broken
clock stays mergeable.  A *ceiling* is durable before any time below it is used, so that a restart
with a clock that was set back continues above.

Rows of the store: `nactors` -> (version, actor epoch, map epoch, packed since of every partition),
`nhlc` -> u64 ceiling.
"""

from struct import pack, unpack

from blake3 import blake3

from dfs import codec
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Corrupt, InvalidArgument
from dfs.hashing import PARTITIONS
from metadata.merkle import Op, Table
from metadata.versions import ACTOR_SIZE, MAX_HLC, Vector

ACTORS_ROW = b"nactors"
CEILING_ROW = b"nhlc"
VERSION = 1
MAX_AHEAD = 25 * 3600 * 1_000_000  # us that a register's times may be ahead and are still followed
RESERVE = 10_000_000  # us by which the ceiling is raised at once


class Actors:
    """The actors of one node; changes it returns as operations must be durable before they count.

    A crash before that is harmless: nothing that was minted with them was sent.
    """

    def __init__(self, table: Table, number: int, cluster_map: ClusterMap) -> None:
        """Read the state, or begin with it; `ops` then has what is to be written."""
        self._node_id = cluster_map.node(number).node_id
        self._number = number
        self._known: dict[int, bytes] = {}  # partition -> actor
        self.forgotten = 0  # own dots met that this node did not know
        ceiling = table.get(CEILING_ROW)
        self.ceiling = self.last = unpack(">Q", ceiling)[0] if ceiling else 0
        self._ops: list[Op] = []
        state = table.get(ACTORS_ROW)
        if state is None:
            self.epoch = 1
            self._map_epoch = 0
            self._since = [0] * PARTITIONS
        else:
            version, self.epoch, self._map_epoch, since = codec.unpack(state)
            if version != VERSION or len(since) != 4 * PARTITIONS:
                raise Corrupt(f"the row {ACTORS_ROW!r} has format version {version}")
            self._since = list(unpack(f">{PARTITIONS}I", since))
        self.follow(cluster_map)

    def take_ops(self) -> list[Op]:
        """What must be in the next batch."""
        ops, self._ops = self._ops, []
        return ops

    def unsaved(self) -> None:
        """The last operations may not have happened: they are in the next batch again."""
        self._save()
        self._ops.append((CEILING_ROW, pack(">Q", self.ceiling)))

    # ------------------------------------------------------------------------------------- actors

    def follow(self, cluster_map: ClusterMap) -> None:
        """Note since when the node is a home, by a newer map.

        When maps were skipped, a partition that changed meanwhile counts as lost and regained.
        """
        epoch, seen, number = cluster_map.epoch, self._map_epoch, self._number
        if epoch <= seen:
            return
        since = self._since
        changed = False
        for partition in range(PARTITIONS):
            if number not in cluster_map.read_homes(METADATA, partition):
                now = 0
            elif not since[partition] or self._gap(cluster_map, partition, seen):
                now = epoch
            else:
                continue
            if since[partition] != now:
                since[partition] = now
                self._known.pop(partition, None)
                changed = True
        self._map_epoch = epoch
        if changed or not seen:
            self._save()

    def _gap(self, cluster_map: ClusterMap, partition: int, seen: int) -> bool:
        return cluster_map.epoch > seen + 1 and cluster_map.last_change(METADATA, partition) > seen

    def renew(self) -> None:
        """Mint as somebody else from now on: this node may have forgotten dots of its own."""
        self.epoch += 1
        self._known.clear()
        self._save()

    def _save(self) -> None:
        state = (VERSION, self.epoch, self._map_epoch, pack(f">{PARTITIONS}I", *self._since))
        self._ops.append((ACTORS_ROW, codec.pack(state)))

    def actor(self, partition: int) -> bytes | None:
        """As whom to mint in the partition; None: this node must not."""
        found = self._known.get(partition)
        if found is None:
            since = self._since[partition]
            if not since:
                return None
            name = self._node_id + pack(">QI", self.epoch, since)
            found = self._known[partition] = blake3(name).digest(ACTOR_SIZE)
        return found

    def recognise(self, partition: int, theirs: Vector, own: Vector) -> None:
        """Look for dots of this node that it does not know; a new actor epoch if there are any.

        `own` is what this node's copy has seen, () when it has none: then only a dot later than
        any this node minted is a proof, since a copy that was purged is forgotten on purpose.
        """
        actor = self.actor(partition)
        for known, hlc in theirs:
            if known == actor and (hlc > self.last or (own and hlc > dict(own).get(actor, 0))):
                self.forgotten += 1
                self.renew()
                return

    # -------------------------------------------------------------------------------------- times

    def tick(self, now_us: int, actor: bytes, seen: Vector) -> int:
        """A new time for a write of `actor` that has seen `seen`.

        Raises `InvalidArgument` when the actor's own time is used up, which only a forged context
        can do.
        """
        limit = now_us + MAX_AHEAD
        hlc = max(self.last + 1, now_us)
        for known, used in seen:
            if used >= hlc and (used <= limit or known == actor):
                hlc = used + 1
        if hlc > MAX_HLC:
            raise InvalidArgument(
                "the context names a write from the end of time; get the key again"
            )
        self.last = hlc
        if hlc > self.ceiling:
            self.ceiling = min(hlc + RESERVE, MAX_HLC)
            self._ops.append((CEILING_ROW, pack(">Q", self.ceiling)))
        return hlc
