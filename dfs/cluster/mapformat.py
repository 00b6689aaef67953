"""The encoded form of a cluster map, and everything that makes a map unusable.

All of it is canonical, so that equal maps are equal bytes:

    b"dfsmap" | u16 format | body | BLAKE3-256 of everything before

Format 1: the body is a `dfs.codec` tuple (epoch, prev_hash, cluster_id, (n, w, r, pw), nodes,
voters, banned, ((rows, changes) for metadata, (rows, changes) for chunks)); `rows` are big-endian
u16 node numbers, row after row; `changes` is the epoch (u32) in which each partition's homes last
changed, or one u32 if it is the same for all of them.

Format 2 adds two items: the transition, None or (phase, rows of the old metadata table or None,
rows of the old chunk table or None, leaving), and the calibrated weights, one tuple of (number,
weight) per role.  It is written only if there is a transition or a calibrated weight: a map that
has neither has one encoding, and the chain of a cluster that never changed its members goes on.
"""

from collections.abc import Sequence
from dataclasses import astuple
from struct import iter_unpack, pack, unpack
from typing import TYPE_CHECKING, Any

from dfs import codec
from dfs.cluster.address import is_address
from dfs.cluster.node import ROLES, Node, Params, Row, Table, Transition, same_homes
from dfs.errors import ConfigError, Corrupt, RemoteProtocolError, WrongVersion
from dfs.hashing import DIGEST_SIZE, PARTITIONS, digest
from dfs.ids import NODE_BITS

if TYPE_CHECKING:
    from dfs.cluster.map import ClusterMap

FORMATS = (1, 2)
MAX_VOTERS = 7
_MAGIC = b"dfsmap"
_HEADER = len(_MAGIC) + 2


def encode(m: "ClusterMap") -> bytes:
    """The canonical bytes of a valid map; the last 32 are its digest."""
    tables = tuple(
        (_pack_rows(rows), _pack_changes(changes))
        for rows, changes in zip(m.tables, m.changes, strict=True)
    )
    body: tuple[Any, ...] = (
        m.epoch,
        m.prev_hash,
        m.cluster_id,
        astuple(m.params),
        tuple(astuple(node) for node in m.nodes),
        m.voters,
        m.banned,
        tables,
    )
    version = 1
    if m.transition is not None or any(m.calibrated):
        version = 2
        body = (*body, _pack_transition(m.transition), m.calibrated)
    head = _MAGIC + pack(">H", version) + codec.pack(body)
    return head + digest(head)


def decode(data: bytes) -> dict[str, Any]:
    """The fields of `ClusterMap`, not yet validated; `Corrupt`, or `WrongVersion` if newer.

    Malformed bodies may also raise TypeError, ValueError or IndexError.
    """
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEADER + DIGEST_SIZE:
        raise Corrupt(f"not a cluster map: starts with {data[:8]!r}")
    (version,) = unpack(">H", data[len(_MAGIC) : _HEADER])
    if version not in FORMATS:
        raise WrongVersion(
            f"the cluster map has format {version}, this program knows up to {FORMATS[-1]}: "
            "upgrade dfs"
        )
    if digest(data[:-DIGEST_SIZE]) != data[-DIGEST_SIZE:]:
        raise Corrupt("the cluster map's checksum is wrong: copy it from another node")
    try:
        body = codec.unpack(data[_HEADER:-DIGEST_SIZE])
    except RemoteProtocolError as e:
        raise Corrupt(f"malformed cluster map: {e}") from e
    if version == 1:
        body = (*body, None, ((), ()))
    epoch, prev_hash, cluster_id, params, nodes, voters, banned, tables, transition, weights = body
    metadata, chunk = tables
    replication = Params(*params)
    return {
        "epoch": epoch,
        "prev_hash": prev_hash,
        "cluster_id": cluster_id,
        "params": replication,
        "nodes": tuple(Node(*fields) for fields in nodes),
        "voters": voters,
        "banned": banned,
        "tables": (
            _unpack_rows(metadata[0], replication.n),
            _unpack_rows(chunk[0], replication.n),
        ),
        "changes": (_unpack_changes(metadata[1]), _unpack_changes(chunk[1])),
        "transition": _unpack_transition(transition, replication.n),
        "calibrated": weights,
    }


def _pack_transition(transition: Transition | None) -> tuple[Any, ...] | None:
    if transition is None:
        return None
    old = [None if rows is None else _pack_rows(rows) for rows in map(transition.old, ROLES)]
    return (transition.phase, *old, transition.leaving)


def _unpack_transition(fields: tuple[Any, ...] | None, width: int) -> Transition | None:
    if fields is None:
        return None
    phase, metadata, chunk, leaving = fields
    return Transition(
        phase,
        None if metadata is None else _unpack_rows(metadata, width),
        None if chunk is None else _unpack_rows(chunk, width),
        leaving,
    )


def _pack_rows(rows: Sequence[Row]) -> bytes:
    flat = [number for row in rows for number in row]
    return pack(f">{len(flat)}H", *flat)


def _unpack_rows(data: bytes, width: int) -> Table:
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


def validate(m: "ClusterMap") -> None:
    """Raise `ConfigError` with the first thing that makes the map unusable."""
    _require(type(m.epoch) is int and 0 < m.epoch < 1 << 32, f"epoch {m.epoch!r} is out of range")
    _require(_is_bytes(m.prev_hash, DIGEST_SIZE), "prev_hash is not 32 bytes")
    _require((m.epoch == 1) == (not any(m.prev_hash)), "only epoch 1 has no map before it")
    _require(_is_bytes(m.cluster_id, 16), "cluster_id is not 16 bytes")
    _validate_params(m.params)
    _validate_nodes(m)
    _validate_voters(m)
    _validate_banned(m)
    _require(len(m.tables) == len(ROLES) == len(m.changes), "there must be one table per role")
    for role, rows, changes in zip(ROLES, m.tables, m.changes, strict=True):
        _validate_table(m, f"{role} table", role, rows)
        _require(len(changes) == PARTITIONS, f"the {role} changes have the wrong length")
        _require(
            min(changes) > 0 and max(changes) <= m.epoch, f"the {role} changes are out of range"
        )
    _validate_transition(m)
    _validate_calibrated(m)


def _validate_nodes(m: "ClusterMap") -> None:
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
        if len(set(values)) < len(values):
            twice = next(v for i, v in enumerate(values) if v in values[:i])
            raise ConfigError(f"two nodes have the same {what}: {_show(twice)}")


def _validate_table(m: "ClusterMap", what: str, role: str, rows: Table) -> None:
    usable = {node.number for node in m.nodes if node.address(role)}
    _require(len(rows) == PARTITIONS, f"the {what} has the wrong length")
    for row in set(rows):
        _require(
            len(set(row)) == len(row) == m.params.n and usable.issuperset(row),
            f"the {what} names nodes it must not: {row}",
        )


def _validate_transition(m: "ClusterMap") -> None:
    transition = m.transition
    if transition is None:
        return
    _require(type(transition.phase) is int and transition.phase in {1, 2}, "unknown phase")
    _require(
        transition.metadata is not None or transition.chunk is not None,
        "a transition of which both sides are done",
    )
    _require(
        transition.phase == 2 or transition.metadata is not None,
        "the phase of a metadata side that is done is 2",
    )
    for role, new in zip(ROLES, m.tables, strict=True):
        old = transition.old(role)
        if old is not None:
            _validate_table(m, f"old {role} table", role, old)
            _require(
                not all(map(same_homes, old, new)), f"the old {role} table is the same as the new"
            )
    leaving = transition.leaving
    members = {node.number for node in m.nodes}
    _require(
        isinstance(leaving, tuple)
        and members.issuperset(leaving)
        and list(leaving) == sorted(set(leaving)),
        "the list of leaving nodes is malformed",
    )
    for number in leaving:
        node = m.node(number)
        _require(
            node.metadata_weight == 0 == node.chunk_weight,
            f"node {node.name} is leaving but has a weight",
        )


def _validate_calibrated(m: "ClusterMap") -> None:
    _require(
        isinstance(m.calibrated, tuple) and len(m.calibrated) == len(ROLES),
        "calibrated weights must be given per role",
    )
    for role, weights in zip(ROLES, m.calibrated, strict=True):
        _require(isinstance(weights, tuple), f"the calibrated {role} weights are malformed")
        if weights:
            _require(
                [number for number, _ in weights]
                == [node.number for node in m.nodes if node.weight(role) > 0]
                and all(type(w) is float and 0 < w < float("inf") for _, w in weights),
                f"the calibrated {role} weights do not fit the nodes",
            )


def _validate_banned(m: "ClusterMap") -> None:
    _require(
        isinstance(m.banned, tuple)
        and all(type(n) is int and _is_bytes(i, 16) for n, i in m.banned)
        and list(m.banned) == sorted(m.banned),
        "the list of banned nodes is malformed",
    )
    numbers = {number for number, _ in m.banned}
    ids = {node_id for _, node_id in m.banned}
    for node in m.nodes:
        _require(
            node.number not in numbers and node.node_id not in ids,
            f"node {node.name} reuses the number or id of a removed node",
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


def _validate_voters(m: "ClusterMap") -> None:
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
