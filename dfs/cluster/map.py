"""The cluster map: who is in the cluster and which nodes are home to which slice of the hash space.

A map is an immutable value with an epoch and the digest of the map before it, so that maps form one
chain.  It *contains* the placement tables, one per role, `PARTITIONS` rows of N node numbers each:
look-ups are indexing, and no two machines can disagree about a home because their logarithms do.

Homes change in a *transition* (`dfs.cluster.node.Transition`) of a few epochs: `begin`, then
`advance` for metadata (twice) and `finish_chunks`, each when `dfs.cluster.joint` says that nothing
can be lost.  The encoding is in `dfs.cluster.mapformat`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dfs.cluster.mapformat import MAX_VOTERS, decode, encode, validate
from dfs.cluster.node import (
    CHUNK,
    METADATA,
    ROLES,
    Node,
    Params,
    Row,
    Table,
    Transition,
    same_homes,
)
from dfs.cluster.placement import Calibrated, Placer
from dfs.cluster.tables import candidates, differing, in_order, kept_weights, place, touch
from dfs.cluster.voting import first_voters, next_voters
from dfs.errors import ConfigError, Corrupt
from dfs.hashing import DIGEST_SIZE, PARTITIONS, digest, partition_of
from dfs.ids import NODE_BITS

__all__ = [
    "CHUNK",
    "MAX_VOTERS",
    "METADATA",
    "ROLES",
    "ClusterMap",
    "Node",
    "Params",
    "Row",
    "Transition",
]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterMap:
    """See the module's docstring.  Make one with `create`, the verbs of change, or `decode`."""

    epoch: int
    prev_hash: bytes  # digest of the map of epoch - 1; zeros for epoch 1
    cluster_id: bytes  # 16 bytes
    params: Params
    nodes: tuple[Node, ...]  # in the order of their numbers
    voters: tuple[int, ...]  # who agrees on the next map
    banned: tuple[tuple[int, bytes], ...]  # (number, node id) of nodes that were removed
    tables: tuple[Table, Table] = field(repr=False)  # metadata, chunk: the homes, or B
    changes: tuple[tuple[int, ...], tuple[int, ...]] = field(repr=False)
    transition: Transition | None = field(default=None, repr=False)
    # per role, (number, weight) as placement uses them; () if it uses the weights of the nodes
    calibrated: tuple[Calibrated, Calibrated] = field(default=((), ()), repr=False)
    n: int = field(init=False)
    w: int = field(init=False)
    digest: bytes = field(init=False, repr=False)
    _encoded: bytes = field(init=False, repr=False)
    _by_number: dict[int, Node] = field(init=False, repr=False)
    _changed: dict[str, Row] = field(init=False, repr=False, default_factory=dict)
    _preferences: dict[tuple[str, int], Row] = field(init=False, repr=False, default_factory=dict)
    _placers: dict[str, tuple[Placer, tuple[Node, ...]]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        """Validate everything and compute what look-ups need; raises `ConfigError`."""
        set_ = object.__setattr__
        set_(self, "n", self.params.n)
        set_(self, "w", self.params.w)
        set_(self, "_by_number", {node.number: node for node in self.nodes})
        validate(self)
        set_(self, "_encoded", encode(self))
        set_(self, "digest", self._encoded[-DIGEST_SIZE:])

    def __eq__(self, other: object) -> bool:
        """Maps are equal when their bytes are."""
        return isinstance(other, ClusterMap) and self.digest == other.digest

    def __hash__(self) -> int:
        """Hash of the digest."""
        return hash(self.digest)

    # ------------------------------------------------------------------------------ making maps

    @classmethod
    def create(
        cls,
        cluster_id: bytes,
        nodes: Iterable[Node],
        *,
        params: Params | None = None,
        voters: Sequence[int] | None = None,
    ) -> "ClusterMap":
        """The first map (epoch 1) of a new cluster; raises `ConfigError` naming what is wrong.

        `params` default to three copies (fewer with fewer nodes), `voters` to the first seven
        metadata nodes.
        """
        members = in_order(nodes)
        counts = [sum(node.weight(role) > 0 for node in members) for role in ROLES]
        params = params or Params.for_nodes(max(1, min(counts)))
        tables, calibrated = place(members, params, ((), ()))
        return cls(
            epoch=1,
            prev_hash=bytes(DIGEST_SIZE),
            cluster_id=cluster_id,
            params=params,
            nodes=members,
            voters=first_voters(members, voters),
            banned=(),
            tables=tables,
            changes=((1,) * PARTITIONS, (1,) * PARTITIONS),
            calibrated=calibrated,
        )

    def successor(
        self, nodes: Iterable[Node], *, voters: Sequence[int] | None = None
    ) -> "ClusterMap":
        """The next map with other members at once; those left out are banned for ever.

        Only for a cluster that holds nothing yet, and for tests: it waits for nobody's data.
        """
        members = in_order(nodes)
        kept = {node.node_id for node in members}
        gone = tuple((x.number, x.node_id) for x in self.nodes if x.node_id not in kept)
        tables, calibrated = place(
            members, self.params, kept_weights(self.nodes, self.calibrated, members)
        )
        moved = [
            {p for p, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
            for old, new in zip(self.tables, tables, strict=True)
        ]
        return replace(
            self,
            epoch=self.epoch + 1,
            prev_hash=self.digest,
            nodes=members,
            voters=first_voters(members, voters),
            banned=tuple(sorted(self.banned + gone)),
            tables=tables,
            changes=(
                touch(self.changes[0], moved[0], self.epoch + 1),
                touch(self.changes[1], moved[1], self.epoch + 1),
            ),
            transition=None,
            calibrated=calibrated,
        )

    def begin(
        self,
        nodes: Iterable[Node],
        *,
        leaving: Iterable[int] = (),
        voters: Sequence[int] | None = None,
    ) -> "ClusterMap":
        """The next map, in which homes begin to move to where `nodes` belong.

        `nodes` are all members from now on; those in `leaving` need not be among them, get
        weight 0, and are dropped and banned by the step that ends the transition.  A role whose
        homes stay the same is done at once.  `voters`, if given, may differ from the present ones
        by one; by default they are kept, replaced and filled up to an odd number of at most seven,
        one per epoch.  Raises `ConfigError` if a transition is under way, or naming what is wrong.
        """
        if self.transition is not None:
            raise ConfigError(
                f"the cluster is changing already (epoch {self.epoch}): wait until "
                "`dfs cluster status` shows no transition, then try again"
            )
        going = tuple(sorted(set(leaving)))
        members = self._members(nodes, going)
        tables, calibrated = place(
            members, self.params, kept_weights(self.nodes, self.calibrated, members)
        )
        old = [
            None if all(map(same_homes, before, after)) else before
            for before, after in zip(self.tables, tables, strict=True)
        ]
        at_once = old[0] is None and old[1] is None
        if voters is None:
            voters = next_voters(members, self.voters, going)
        elif len(set(voters) ^ set(self.voters)) > 1:
            raise ConfigError(
                f"voters change one per epoch: {sorted(voters)} differ from "
                f"{list(self.voters)} in more than one node; add or remove one"
            )
        still = [v for v in self.voters if v in going]
        if still and at_once:  # it would end with this very map; see `shift_voters`
            names = ", ".join(self.node(v).name for v in still)
            raise ConfigError(
                f"{names} still vote on the cluster map: drain these nodes first, then remove them"
            )
        return self._step(
            nodes=members,
            voters=tuple(sorted(voters)),
            tables=tables,
            calibrated=calibrated,
            transition=Transition(1 if old[0] is not None else 2, old[0], old[1], going),
            moved=[
                () if rows is None else differing(rows, new)
                for rows, new in zip(old, tables, strict=True)
            ],
        )

    def advance(self) -> "ClusterMap":
        """The next map, with the metadata side one phase on: 1 -> 2 -> done.

        Whether that is safe is for `dfs.cluster.joint` to say.  Raises `ConfigError` if the
        metadata side is not in transition.
        """
        transition = self.transition
        if transition is None or transition.metadata is None:
            raise ConfigError(f"no metadata is moving in epoch {self.epoch}: nothing to advance")
        if transition.phase == 1:
            after = replace(transition, phase=2)
        else:
            after = replace(transition, metadata=None)
        return self._onward(after, METADATA)

    def finish_chunks(self) -> "ClusterMap":
        """The next map, with the chunk side done; raises `ConfigError` if it is not moving."""
        if self.transition is None or self.transition.chunk is None:
            raise ConfigError(f"no chunks are moving in epoch {self.epoch}: nothing to finish")
        return self._onward(replace(self.transition, chunk=None), CHUNK)

    def shift_voters(self) -> "ClusterMap":
        """The next map, with one voter more or less and nothing else changed.

        What ends a transition drops the nodes that leave, which may then be wiped.  So the map that
        ends it must be chosen by voters who stay: while one of those who leave votes, that step is
        refused, and this one comes first, as often as it takes.  Raises `ConfigError` if no
        transition is under way or nobody who leaves votes.
        """
        transition = self.transition
        if transition is None or not self.leaving_voters:
            raise ConfigError(f"nobody who leaves votes in epoch {self.epoch}")
        voters = next_voters(self.nodes, self.voters, transition.leaving)
        if voters == self.voters:
            raise ConfigError("no node that stays can vote on the cluster map: add one first")
        return self._step(
            nodes=self.nodes,
            voters=voters,
            tables=self.tables,
            calibrated=self.calibrated,
            transition=transition,
            moved=[(), ()],
        )

    def step(self, role: str) -> "ClusterMap":
        """The next step of a role's side: `advance` or `finish_chunks`, or voters first."""
        if self.ends_with(role) and self.leaving_voters:
            return self.shift_voters()
        return self.advance() if role == METADATA else self.finish_chunks()

    @property
    def leaving_voters(self) -> Row:
        """Voters that the present transition drops."""
        if self.transition is None:
            return ()
        return tuple(v for v in self.voters if v in self.transition.leaving)

    def ends_with(self, role: str) -> bool:
        """Whether the next step of `role` ends the transition."""
        t = self.transition
        if t is None:
            return False
        if role == METADATA:
            return t.chunk is None and t.metadata is not None and t.phase == 2
        return t.metadata is None and t.chunk is not None

    def _onward(self, after: Transition, role: str) -> "ClusterMap":
        if self.ends_with(role) and self.leaving_voters:
            names = ", ".join(self.node(v).name for v in self.leaving_voters)
            raise ConfigError(
                f"{names} still vote on the cluster map: their votes go before they do"
            )
        return self._step(
            nodes=self.nodes,
            voters=next_voters(self.nodes, self.voters, after.leaving),
            tables=self.tables,
            calibrated=self.calibrated,
            transition=after,
            moved=[self.changed(r) if r == role else () for r in ROLES],
        )

    def _step(
        self,
        *,
        nodes: tuple[Node, ...],
        voters: tuple[int, ...],
        tables: tuple[Table, Table],
        calibrated: tuple[Calibrated, Calibrated],
        transition: Transition,
        moved: Sequence[Iterable[int]],
    ) -> "ClusterMap":
        """The map of the next epoch; drops and bans who leaves if both sides are done."""
        epoch = self.epoch + 1
        banned = self.banned
        later: Transition | None = transition
        if transition.metadata is None and transition.chunk is None:
            gone = tuple((x.number, x.node_id) for x in nodes if x.number in transition.leaving)
            banned = tuple(sorted(banned + gone))
            nodes = tuple(x for x in nodes if x.number not in transition.leaving)
            later = None
        return ClusterMap(
            epoch=epoch,
            prev_hash=self.digest,
            cluster_id=self.cluster_id,
            params=self.params,
            nodes=nodes,
            voters=voters,
            banned=banned,
            tables=tables,
            changes=(
                touch(self.changes[0], moved[0], epoch),
                touch(self.changes[1], moved[1], epoch),
            ),
            transition=later,
            calibrated=calibrated,
        )

    def _members(self, nodes: Iterable[Node], leaving: Row) -> tuple[Node, ...]:
        """Who is in the map of a change that begins: `nodes` and those who leave, emptied."""
        listed = list(nodes)
        given = {node.number: node for node in listed}
        for number in leaving:
            node = given[number] if number in given else self.node(number)
            emptied = replace(node, metadata_weight=0.0, chunk_weight=0.0)
            listed = [x for x in listed if x.number != number] + [emptied]
        given = {node.number: node for node in listed}
        for before in self.nodes:
            after = given.get(before.number)
            if after is None:
                raise ConfigError(
                    f"node {before.name} is missing from the new members: remove it by name"
                )
            if after.node_id != before.node_id:
                raise ConfigError(
                    f"node number {before.number} is {before.name}, whose id cannot change: "
                    "replace it by a new node"
                )
            for role in ROLES:
                if before.address(role) and not after.address(role):
                    raise ConfigError(
                        f"node {before.name} cannot drop its {role} role while it is a member: "
                        "give it weight 0, or remove it"
                    )
        return in_order(listed)

    # ----------------------------------------------------------------------------------- bytes

    def encode(self) -> bytes:
        """The canonical bytes; computed once."""
        return self._encoded

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> "ClusterMap":
        """Decode and validate; raises `Corrupt`, or `WrongVersion` for a newer format."""
        data = bytes(data)
        try:
            found = cls(**decode(data))
        except (TypeError, ValueError, IndexError, AttributeError) as e:
            raise Corrupt(f"malformed cluster map: {e}") from e
        except ConfigError as e:
            raise Corrupt(f"inconsistent cluster map: {e}") from e
        if found.encode() != data:
            raise Corrupt("the cluster map is not in canonical form")
        return found

    # --------------------------------------------------------------------------------- look-ups

    def node(self, number: int) -> Node:
        """The member of that number; raises `ConfigError` if there is none."""
        try:
            return self._by_number[number]
        except KeyError:
            raise ConfigError(f"the map of epoch {self.epoch} has no node {number}") from None

    def number_for_new(self) -> int:
        """A number that no node has or had; raises `ConfigError` when all of them are used up."""
        numbers = [node.number for node in self.nodes] + [number for number, _ in self.banned]
        number = max(numbers) + 1
        if number >= 1 << NODE_BITS:
            raise ConfigError(
                f"all {1 << NODE_BITS} node numbers have been used: make a new cluster and copy"
            )
        return number

    def homes(self, role: str, partition: int) -> Row:
        """Numbers of the N nodes that hold the partition; during a transition those of B."""
        return self.tables[role == CHUNK][partition]

    def old_homes(self, role: str, partition: int) -> Row:
        """The homes in A while the role is in transition and they differ from B; else ()."""
        old = self._old(role)
        if old is None or same_homes(old[partition], self.homes(role, partition)):
            return ()
        return old[partition]

    def write_sets(self, role: str, partition: int) -> tuple[Row, ...]:
        """The sets of homes in each of which a write needs its quorum."""
        homes = self.homes(role, partition)
        if role == METADATA and (old := self.old_homes(role, partition)):
            return old, homes
        return (homes,)

    def read_homes(self, role: str, partition: int) -> Row:
        """The homes among which a read needs its quorum."""
        if self.phase(role) == 1 and (old := self.old_homes(role, partition)):
            return old
        return self.homes(role, partition)

    def phase(self, role: str) -> int:
        """0 = stable; metadata 1 or 2 while it is in transition, chunks 2."""
        if self._old(role) is None or self.transition is None:
            return 0
        return self.transition.phase if role == METADATA else 2

    def changed(self, role: str) -> Row:
        """The partitions whose homes differ between A and B; () when the role is stable."""
        found = self._changed.get(role)
        if found is None:
            old = self._old(role)
            found = () if old is None else differing(old, self.tables[role == CHUNK])
            self._changed[role] = found
        return found

    def preference(self, role: str, partition: int) -> Row:
        """The homes (B), then those of A, then every other node of the role: stable."""
        key = (role, partition)
        found = self._preferences.get(key)
        if found is None:
            found = self._preferences[key] = self._prefer(role, partition)
        return found

    def address(self, role: str, number: int) -> str:
        """Where node `number` serves `role`; "" if it does not."""
        return self.node(number).address(role)

    def last_change(self, role: str, partition: int) -> int:
        """The epoch in which the sets that the partition is read from or written to last changed.

        A request of an earlier epoch is refused: it may count copies in the wrong set.
        """
        return self.changes[role == CHUNK][partition]

    def volume_homes(self, volume: bytes) -> Row:
        """The homes of a volume's journal."""
        return self.homes(METADATA, partition_of(digest(volume)))

    def _old(self, role: str) -> Table | None:
        return None if self.transition is None else self.transition.old(role)

    def _prefer(self, role: str, partition: int) -> Row:
        if role not in self._placers:
            members = tuple(node for node in self.nodes if node.address(role))
            weights = self.calibrated[role == CHUNK]
            self._placers[role] = (Placer(candidates(members, role, weights)), members)
        placer, members = self._placers[role]
        index = {node.number: i for i, node in enumerate(members)}
        homes = self.homes(role, partition)
        before = [x for x in self.old_homes(role, partition) if x not in homes]
        first = [index[number] for number in (*homes, *before)]
        order = placer.place(partition, len(members), first)
        numbers = [members[i].number for i in order]
        # nodes that are being emptied may still hold something: they come last
        numbers += [node.number for node in members if node.number not in set(numbers)]
        return tuple(numbers)
