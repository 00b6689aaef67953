"""What operators do to a cluster's members, as values, and the map that results.

Edits are staged, looked at (`dfs.cluster.change.plan`) and applied together: `apply_edits` turns
a list of them into one transition.  Each has a form for the wire and for storage: a `dfs.codec`
tuple that starts with its verb.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NoReturn

from dfs.cluster.map import METADATA, ROLES, ClusterMap, Node
from dfs.errors import ConfigError, RemoteProtocolError


@dataclass(frozen=True, slots=True)
class NewNode:
    """A node that is to come; the fields of `Node` without the number, which the map gives it."""

    node_id: bytes
    name: str
    zone: str
    rack: str
    host: str
    metadata_addr: str
    chunk_addr: str
    metadata_weight: float = 1.0
    chunk_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Add:
    """A new node takes its share."""

    node: NewNode


@dataclass(frozen=True, slots=True)
class Drain:
    """A node gives away all it has and stays a member, to be removed or undrained."""

    name: str


@dataclass(frozen=True, slots=True)
class Undrain:
    """A node of weight 0 takes its share again; `weight` 0.0 = the mean of the other nodes'."""

    name: str
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Remove:
    """A node leaves for ever, alive or dead: others take over, then its id is banned."""

    name: str


@dataclass(frozen=True, slots=True)
class Replace:
    """A node leaves for ever and a new one comes, in one move of the data.

    The new one may have the name and the addresses of the old one, which then counts as dead.
    """

    old: str
    node: NewNode


@dataclass(frozen=True, slots=True)
class SetWeight:
    """A node's capacity in one role."""

    name: str
    role: str
    weight: float


Edit = Add | Drain | Undrain | Remove | Replace | SetWeight
_VERBS: dict[str, type[Edit]] = {
    "add": Add,
    "drain": Drain,
    "undrain": Undrain,
    "remove": Remove,
    "replace": Replace,
    "weight": SetWeight,
}
_NAMES = {verb: name for name, verb in _VERBS.items()}


def edit_fields(edit: Edit) -> tuple[Any, ...]:
    """The edit as a `dfs.codec` value."""
    return (_NAMES[type(edit)], *astuple(edit))


def edit_from_fields(value: Any) -> Edit:
    """The edit of a decoded value; raises `RemoteProtocolError` if it is none."""
    try:
        name, *fields = value
        match name, fields:
            case ("add", [node]):
                return Add(_new_node(node))
            case ("replace", [str(old), node]):
                return Replace(old, _new_node(node))
            case (("drain" | "remove") as verb, [str(target)]):
                return Drain(target) if verb == "drain" else Remove(target)
            case ("undrain", [str(target), float(weight)]):
                return Undrain(target, weight)
            case ("weight", [str(target), str(role), float(weight)]):
                return SetWeight(target, role, weight)
    except (TypeError, ValueError) as e:
        raise RemoteProtocolError(f"malformed change of the cluster: {e}") from e
    raise RemoteProtocolError(f"unknown change of the cluster: {value!r}")


def describe(edit: Edit) -> str:
    """The edit in a few words."""
    match edit:
        case Add(node):
            return f"add {node.name}"
        case Replace(old, node):
            return f"replace {old} by {node.name}"
        case SetWeight(name, role, weight):
            return f"set the {role} weight of {name} to {weight:g}"
        case Drain(name) | Undrain(name) | Remove(name):
            return f"{_NAMES[type(edit)]} {name}"


def apply_edits(m: ClusterMap, edits: Sequence[Edit]) -> ClusterMap:
    """The map in which all the edits begin; raises `ConfigError` naming the one that cannot be.

    The order of edits matters only where one speaks of what another one made.
    """
    if not edits:
        raise ConfigError("nothing to change: add, drain, remove or replace a node first")
    draft = _Draft(m)
    for edit in edits:
        draft.apply(edit)
    return m.begin(draft.nodes, leaving=draft.leaving)


def replacement_weights(m: ClusterMap, old: str) -> tuple[float, float]:
    """Metadata and chunk weight of a node that takes the place of `old`: the same capacity.

    For a node that is drained, in a role that it does not have, and if there is no such node: the
    mean of the others.
    """
    usual = [_usual(m.nodes, role) for role in ROLES]
    for node in m.nodes:
        if node.name == old and any(node.weight(role) for role in ROLES):
            return (
                node.metadata_weight if node.metadata_addr else usual[0],
                node.chunk_weight if node.chunk_addr else usual[1],
            )
    return usual[0], usual[1]


def nowhere(number: int) -> str:
    """The address of a removed node whose own was taken over: nobody can ever listen there."""
    return f"unix:///dev/null/removed-node-{number}"


class _Draft:
    """The members while edits are applied one after the other."""

    def __init__(self, m: ClusterMap) -> None:
        self._map = m
        self._number = m.number_for_new()
        self.nodes = list(m.nodes)
        self.leaving: list[int] = []

    def apply(self, edit: Edit) -> None:
        match edit:
            case Add(node):
                self._add(node)
            case Drain(name):
                at = self._find(name)
                node_now = self.nodes[at]
                if not any(node_now.weight(role) for role in ROLES):
                    raise ConfigError(f"node {name} is drained already")
                self.nodes[at] = replace(node_now, metadata_weight=0.0, chunk_weight=0.0)
            case Undrain(name, weight):
                self._undrain(name, weight)
            case Remove(name):
                self.leaving.append(self.nodes[self._find(name)].number)
            case Replace(old, node):
                self._replace(old, node)
            case SetWeight(name, role, weight):
                self._set_weight(name, role, weight)

    def _find(self, name: str) -> int:
        for at, node in enumerate(self.nodes):
            if node.name == name:
                if node.number in self.leaving:
                    raise ConfigError(f"node {name} is to be removed by another change")
                return at
        known = ", ".join(sorted(node.name for node in self.nodes))
        raise ConfigError(f"there is no node {name} in the cluster; its nodes are {known}")

    def _add(self, new: NewNode) -> None:
        if any(node.name == new.name for node in self.nodes):
            raise ConfigError(f"there is a node {new.name} already: give the new one another name")
        if any(node_id == new.node_id for _, node_id in self._map.banned):
            raise ConfigError(
                f"node {new.name} has the id of a removed node, which is banned for ever: "
                "empty its data directories and let it make a new id"
            )
        self.nodes.append(Node(self._number, *astuple(new)))
        self._number += 1

    def _undrain(self, name: str, weight: float) -> None:
        at = self._find(name)
        node = self.nodes[at]
        if any(node.weight(role) for role in ROLES):
            raise ConfigError(f"node {name} is not drained: set its weight instead")
        given = [weight or _usual(self.nodes, role) for role in ROLES]
        self.nodes[at] = replace(node, metadata_weight=given[0], chunk_weight=given[1])

    def _replace(self, old: str, new: NewNode) -> None:
        at = self._find(old)
        node = self.nodes[at]
        if node.name == new.name:
            node = replace(node, name=f"{node.name} (replaced {node.number})")
        if {node.metadata_addr, node.chunk_addr} & {new.metadata_addr, new.chunk_addr} - {""}:
            # the new process must never be taken for the old one, and so be counted twice
            gone = nowhere(node.number)
            node = replace(
                node,
                metadata_addr=gone + "/metadata" if node.metadata_addr else "",
                chunk_addr=gone + "/chunk" if node.chunk_addr else "",
            )
        self.nodes[at] = node
        self.leaving.append(node.number)
        self._add(new)

    def _set_weight(self, name: str, role: str, weight: float) -> None:
        at = self._find(name)
        node = self.nodes[at]
        if role not in ROLES or not node.address(role):
            raise ConfigError(f"node {name} has no role {role!r}")
        self.nodes[at] = (
            replace(node, metadata_weight=weight)
            if role == METADATA
            else replace(node, chunk_weight=weight)
        )


def _usual(nodes: Sequence[Node], role: str) -> float:
    """The mean weight in a role of the nodes that have any; 1 if none has."""
    weights = [w for node in nodes if (w := node.weight(role)) > 0]
    return sum(weights) / len(weights) if weights else 1.0


def _new_node(fields: Any) -> NewNode:
    new = NewNode(*fields)
    texts = (new.name, new.zone, new.rack, new.host, new.metadata_addr, new.chunk_addr)
    if (
        type(new.node_id) is not bytes
        or not all(type(x) is str for x in texts)
        or not all(type(x) is float for x in (new.metadata_weight, new.chunk_weight))
    ):
        _malformed(fields)
    return new


def _malformed(fields: Any) -> NoReturn:
    raise RemoteProtocolError(f"malformed node: {fields!r}")
