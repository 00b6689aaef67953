"""The cluster map: who is in the cluster and which nodes are home to which slice of the hash space.

A map is an immutable value with an epoch and the digest of the map before it, so that maps form one
chain.  It *contains* the placement tables, one per role, `PARTITIONS` rows of N node numbers each:
look-ups are indexing, and no two machines can disagree about a home because their logarithms do.

Encoded form (`FORMAT` 1), all of it canonical, so that equal maps are equal bytes:

    b"dfsmap" | u16 format | body | BLAKE3-256 of everything before

with the body a `dfs.codec` tuple (epoch, prev_hash, cluster_id, (n, w, r, pw), nodes, voters,
banned, ((rows, changes) for metadata, (rows, changes) for chunks)); `rows` are big-endian u16 node
numbers, row after row; `changes` is the epoch (u32) in which each partition's row last changed, or
one u32 if it is the same for all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from struct import iter_unpack, pack, unpack
from typing import Any

from dfs import codec
from dfs.cluster.address import is_address
from dfs.cluster.placement import Candidate, Placer
from dfs.errors import ConfigError, Corrupt, RemoteProtocolError, WrongVersion
from dfs.hashing import DIGEST_SIZE, PARTITIONS, digest, partition_of
from dfs.ids import NODE_BITS

METADATA = "metadata"
CHUNK = "chunk"
ROLES = (METADATA, CHUNK)
FORMAT = 1
MAX_VOTERS = 7
_MAGIC = b"dfsmap"
_HEADER = len(_MAGIC) + 2


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


Row = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterMap:
    """See the module's docstring.  Make one with `create`, `successor` or `decode`."""

    epoch: int
    prev_hash: bytes  # digest of the map of epoch - 1; zeros for epoch 1
    cluster_id: bytes  # 16 bytes
    params: Params
    nodes: tuple[Node, ...]  # in the order of their numbers
    voters: tuple[int, ...]  # who agrees on the next map
    banned: tuple[tuple[int, bytes], ...]  # (number, node id) of nodes that were removed
    tables: tuple[tuple[Row, ...], tuple[Row, ...]] = field(repr=False)  # metadata, chunk
    changes: tuple[tuple[int, ...], tuple[int, ...]] = field(repr=False)
    n: int = field(init=False)
    w: int = field(init=False)
    digest: bytes = field(init=False, repr=False)
    _encoded: bytes = field(init=False, repr=False)
    _by_number: dict[int, Node] = field(init=False, repr=False)
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
        _validate(self)
        set_(self, "_encoded", _encode(self))
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
        members = tuple(sorted(nodes, key=lambda node: node.number))
        counts = [sum(node.weight(role) > 0 for node in members) for role in ROLES]
        params = params or Params.for_nodes(max(1, min(counts)))
        return cls(
            epoch=1,
            prev_hash=bytes(DIGEST_SIZE),
            cluster_id=cluster_id,
            params=params,
            nodes=members,
            voters=_voters(members, voters),
            banned=(),
            tables=(
                _table(members, METADATA, params),
                _table(members, CHUNK, params),
            ),
            changes=((1,) * PARTITIONS, (1,) * PARTITIONS),
        )

    def successor(
        self, nodes: Iterable[Node], *, voters: Sequence[int] | None = None
    ) -> "ClusterMap":
        """The map of the next epoch with other members; those left out are banned for ever."""
        members = tuple(sorted(nodes, key=lambda node: node.number))
        kept = {node.node_id for node in members}
        gone = tuple((x.number, x.node_id) for x in self.nodes if x.node_id not in kept)
        epoch = self.epoch + 1
        tables = (
            _table(members, METADATA, self.params),
            _table(members, CHUNK, self.params),
        )
        changes = tuple(
            tuple(
                last if old == new else epoch
                for old, new, last in zip(old_rows, new_rows, old_changes, strict=True)
            )
            for old_rows, new_rows, old_changes in zip(
                self.tables, tables, self.changes, strict=True
            )
        )
        return ClusterMap(
            epoch=epoch,
            prev_hash=self.digest,
            cluster_id=self.cluster_id,
            params=self.params,
            nodes=members,
            voters=_voters(members, voters),
            banned=tuple(sorted(self.banned + gone)),
            tables=tables,
            changes=(changes[0], changes[1]),
        )

    def encode(self) -> bytes:
        """The canonical bytes; computed once."""
        return self._encoded

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> "ClusterMap":
        """Decode and validate; raises `Corrupt`, or `WrongVersion` for a newer format."""
        data = bytes(data)
        if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEADER + DIGEST_SIZE:
            raise Corrupt(f"not a cluster map: starts with {data[:8]!r}")
        (version,) = unpack(">H", data[len(_MAGIC) : _HEADER])
        if version != FORMAT:
            raise WrongVersion(
                f"the cluster map has format {version}, this program knows {FORMAT}: upgrade dfs"
            )
        if digest(data[:-DIGEST_SIZE]) != data[-DIGEST_SIZE:]:
            raise Corrupt("the cluster map's checksum is wrong: copy it from another node")
        try:
            found = cls._from_body(codec.unpack(data[_HEADER:-DIGEST_SIZE]))
        except (TypeError, ValueError, IndexError, RemoteProtocolError) as e:
            raise Corrupt(f"malformed cluster map: {e}") from e
        except ConfigError as e:
            raise Corrupt(f"inconsistent cluster map: {e}") from e
        if found.encode() != data:
            raise Corrupt("the cluster map is not in canonical form")
        return found

    @classmethod
    def _from_body(cls, body: tuple[Any, ...]) -> "ClusterMap":
        epoch, prev_hash, cluster_id, params, nodes, voters, banned, (metadata, chunk) = body
        replication = Params(*params)
        return cls(
            epoch=epoch,
            prev_hash=prev_hash,
            cluster_id=cluster_id,
            params=replication,
            nodes=tuple(Node(*fields) for fields in nodes),
            voters=voters,
            banned=banned,
            tables=(
                _unpack_rows(metadata[0], replication.n),
                _unpack_rows(chunk[0], replication.n),
            ),
            changes=(_unpack_changes(metadata[1]), _unpack_changes(chunk[1])),
        )

    # --------------------------------------------------------------------------------- look-ups

    def node(self, number: int) -> Node:
        """The member of that number; raises `ConfigError` if there is none."""
        try:
            return self._by_number[number]
        except KeyError:
            raise ConfigError(f"the map of epoch {self.epoch} has no node {number}") from None

    def homes(self, role: str, partition: int) -> Row:
        """Numbers of the N nodes that hold the partition."""
        return self.tables[role == CHUNK][partition]

    def preference(self, role: str, partition: int) -> Row:
        """The homes, then every other node of the role: a stable permutation."""
        key = (role, partition)
        found = self._preferences.get(key)
        if found is None:
            found = self._preferences[key] = self._prefer(role, partition)
        return found

    def address(self, role: str, number: int) -> str:
        """Where node `number` serves `role`; "" if it does not."""
        return self.node(number).address(role)

    def last_change(self, role: str, partition: int) -> int:
        """The epoch in which the partition's homes last changed."""
        return self.changes[role == CHUNK][partition]

    def volume_homes(self, volume: bytes) -> Row:
        """The homes of a volume's journal."""
        return self.homes(METADATA, partition_of(digest(volume)))

    def _prefer(self, role: str, partition: int) -> Row:
        if role not in self._placers:
            members = tuple(node for node in self.nodes if node.address(role))
            self._placers[role] = (Placer(candidates(members, role)), members)
        placer, members = self._placers[role]
        index = {node.number: i for i, node in enumerate(members)}
        first = [index[number] for number in self.homes(role, partition)]
        order = placer.place(partition, len(members), first)
        numbers = [members[i].number for i in order]
        # nodes that are being emptied may still hold something: they come last
        numbers += [node.number for node in members if node.number not in set(numbers)]
        return tuple(numbers)


def candidates(nodes: Iterable[Node], role: str) -> list[Candidate]:
    """Nodes as placement sees them, in the same order."""
    return [Candidate(x.node_id, x.zone, x.rack, x.host, x.weight(role)) for x in nodes]


def _table(members: Sequence[Node], role: str, params: Params) -> tuple[Row, ...]:
    usable = [node for node in members if node.weight(role) > 0]
    if len(usable) < params.n:
        raise ConfigError(
            f"{params.n} copies need {params.n} {role} nodes of weight > 0, "
            f"but there are {len(usable)}: add nodes or ask for fewer copies"
        )
    rows = Placer(candidates(usable, role)).table(params.n)
    return tuple(tuple(usable[i].number for i in row) for row in rows)


def _voters(members: Sequence[Node], voters: Sequence[int] | None) -> tuple[int, ...]:
    if voters is not None:
        return tuple(sorted(voters))
    return tuple(node.number for node in members if node.metadata_addr)[:MAX_VOTERS]


# ------------------------------------------------------------------------------------- encoding


def _encode(m: ClusterMap) -> bytes:
    tables = tuple(
        (_pack_rows(rows), _pack_changes(changes))
        for rows, changes in zip(m.tables, m.changes, strict=True)
    )
    body = codec.pack(
        (
            m.epoch,
            m.prev_hash,
            m.cluster_id,
            astuple(m.params),
            tuple(astuple(node) for node in m.nodes),
            m.voters,
            m.banned,
            tables,
        )
    )
    head = _MAGIC + pack(">H", FORMAT) + body
    return head + digest(head)


def _pack_rows(rows: Sequence[Row]) -> bytes:
    flat = [number for row in rows for number in row]
    return pack(f">{len(flat)}H", *flat)


def _unpack_rows(data: bytes, width: int) -> tuple[Row, ...]:
    if not 0 < width < 256 or len(data) != PARTITIONS * width * 2:
        raise ValueError(f"a placement table of {len(data)} bytes for {width} copies")
    return tuple(iter_unpack(f">{width}H", data))


def _pack_changes(changes: Sequence[int]) -> bytes:
    if len(set(changes)) == 1:
        return pack(">I", changes[0])
    return pack(f">{len(changes)}I", *changes)


def _unpack_changes(data: bytes) -> tuple[int, ...]:
    if len(data) == 4:
        return tuple(unpack(">I", data)) * PARTITIONS
    if len(data) != 4 * PARTITIONS:
        raise ValueError(f"{len(data)} bytes of changes")
    return tuple(unpack(f">{PARTITIONS}I", data))


# ----------------------------------------------------------------------------------- validation


def _validate(m: ClusterMap) -> None:
    """Raise `ConfigError` with the first thing that makes the map unusable."""
    _require(type(m.epoch) is int and 0 < m.epoch < 1 << 32, f"epoch {m.epoch!r} is out of range")
    _require(_is_bytes(m.prev_hash, DIGEST_SIZE), "prev_hash is not 32 bytes")
    _require((m.epoch == 1) == (not any(m.prev_hash)), "only epoch 1 has no map before it")
    _require(_is_bytes(m.cluster_id, 16), "cluster_id is not 16 bytes")
    _validate_params(m.params)
    _require(bool(m.nodes), "a cluster needs nodes")
    for node in m.nodes:
        _validate_node(node)
    numbers = [node.number for node in m.nodes]
    _require(numbers == sorted(numbers), "nodes are not in the order of their numbers")
    for what, values in (
        ("number", numbers),
        ("node id", [node.node_id for node in m.nodes]),
        ("name", [node.name for node in m.nodes]),
        ("address", [a for node in m.nodes for r in ROLES if (a := node.address(r))]),
    ):
        twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
        _require(twice is None, f"two nodes have the same {what}: {_show(twice)}")
    _validate_voters(m)
    _require(
        isinstance(m.banned, tuple)
        and all(type(n) is int and _is_bytes(i, 16) for n, i in m.banned)
        and list(m.banned) == sorted(m.banned),
        "the list of banned nodes is malformed",
    )
    for number, node_id in m.banned:
        for node in m.nodes:
            _require(
                node.number != number and node.node_id != node_id,
                f"node {node.name} reuses the number or id of a removed node",
            )
    _require(len(m.tables) == len(ROLES) == len(m.changes), "there must be one table per role")
    for role, rows, changes in zip(ROLES, m.tables, m.changes, strict=True):
        usable = {node.number for node in m.nodes if node.address(role)}
        _require(len(rows) == PARTITIONS == len(changes), f"the {role} table has the wrong length")
        for row in set(rows):
            _require(
                len(set(row)) == len(row) == m.params.n and usable.issuperset(row),
                f"the {role} table names nodes it must not: {row}",
            )
        _require(
            min(changes) > 0 and max(changes) <= m.epoch, f"the {role} changes are out of range"
        )


def _validate_params(params: Params) -> None:
    n, w, r, pw = values = astuple(params)
    _require(all(type(v) is int for v in values) and 1 <= n <= 16, f"unusable {params}")
    _require(
        1 <= w <= n and 1 <= r <= n and 0 <= pw <= w, f"w, r and pw are out of range: {params}"
    )
    _require(w + r > n, f"a read would miss the latest write: w + r <= n in {params}")


def _validate_node(node: Node) -> None:
    texts = (node.name, node.zone, node.rack, node.host, node.metadata_addr, node.chunk_addr)
    _require(
        type(node.number) is int
        and 0 <= node.number < 1 << NODE_BITS
        and _is_bytes(node.node_id, 16)
        and all(isinstance(t, str) for t in texts)
        and bool(node.name),
        f"malformed node {node!r}",
    )
    weights = (node.metadata_weight, node.chunk_weight)
    _require(
        all(type(x) is float and 0 <= x < float("inf") for x in weights),
        f"node {node.name}: weights must be floats >= 0, not {weights}",
    )
    addresses = [a for a in (node.metadata_addr, node.chunk_addr) if a]
    _require(bool(addresses), f"node {node.name} has no address")
    for address in addresses:
        _require(is_address(address), f"node {node.name}: no address of ours: {address!r}")


def _validate_voters(m: ClusterMap) -> None:
    metadata = {node.number for node in m.nodes if node.metadata_addr}
    _require(
        isinstance(m.voters, tuple)
        and 1 <= len(m.voters) <= MAX_VOTERS
        and list(m.voters) == sorted(set(m.voters))
        and metadata.issuperset(m.voters),
        f"voters must be 1 to {MAX_VOTERS} metadata nodes, not {m.voters!r}",
    )


def _is_bytes(value: object, length: int) -> bool:
    return isinstance(value, bytes) and len(value) == length


def _show(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
