"""Who is to be in a cluster: from a count, or from a file in YAML or JSON.

A file lists the nodes; everything but `name` and one address has a default:

    replication: {n: 3, w: 2, r: 2, pw: 2}
    nodes:
      - name: node1
        zone: a                        # default: the name
        rack: r1                       # default: ""
        host: machine1                 # default: the host part of the address
        metadata_addr: tcp://10.0.0.1:7400   # or unix:///path; leave out for no metadata role
        chunk_addr: tcp://10.0.0.1:7401      # likewise
        metadata_weight: 1             # capacity in any unit
        chunk_weight: 1
        number: 1                      # default: its place in the list
"""

import json
import secrets
from pathlib import Path
from typing import Any

import yaml

from dfs.cluster.map import Node, Params
from dfs.errors import ConfigError

_FIELDS = {
    "name",
    "zone",
    "rack",
    "host",
    "metadata_addr",
    "chunk_addr",
    "metadata_weight",
    "chunk_weight",
    "number",
}


def local_nodes(count: int, zones: int, base_port: int) -> list[Node]:
    """`count` nodes on loopback ports from `base_port` on, two each, in `zones` zones.

    Their hosts get different names although they are one machine: the point of such a cluster is
    to behave like one of many machines.
    """
    if not (base_port >= 1 and base_port + 2 * count <= 65536):
        raise ConfigError(f"{2 * count} ports from {base_port} on do not exist")
    return [
        Node(
            number=i + 1,
            node_id=secrets.token_bytes(16),
            name=f"node{i + 1}",
            zone=f"zone{i % zones + 1}",
            rack="",
            host=f"host{i + 1}",
            metadata_addr=f"tcp://127.0.0.1:{base_port + 2 * i}",
            chunk_addr=f"tcp://127.0.0.1:{base_port + 2 * i + 1}",
        )
        for i in range(count)
    ]


def read_spec(path: Path) -> tuple[list[Node], Params | None]:
    """Nodes (with fresh node ids) and replication of a file; raises `ConfigError`."""
    try:
        text = path.read_text()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    spec = _parse(path, text)
    if not isinstance(spec, dict) or not isinstance(spec.get("nodes"), list) or not spec["nodes"]:
        raise ConfigError(f"{path}: there must be a list `nodes`")
    unknown = set(spec) - {"nodes", "replication"}
    if unknown:
        raise ConfigError(f"{path}: unknown {_words(unknown)}; known are nodes, replication")
    params = None
    if "replication" in spec:
        try:
            params = Params(**spec["replication"])
        except TypeError as e:
            raise ConfigError(f"{path}: replication takes n, w, r and pw ({e})") from e
    return [_node(path, i, fields) for i, fields in enumerate(spec["nodes"], 1)], params


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as e:
            raise ConfigError(f"{path} is no JSON: {e}") from e
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is no YAML: {e}") from e


def _node(path: Path, position: int, fields: Any) -> Node:
    where = f"{path}, node {position}"
    if not isinstance(fields, dict) or not fields.get("name"):
        raise ConfigError(f"{where}: a node needs a name")
    unknown = set(fields) - _FIELDS
    if unknown:
        raise ConfigError(f"{where}: unknown {_words(unknown)}; known are {_words(_FIELDS)}")
    metadata, chunk = (_address(fields.get(name)) for name in ("metadata_addr", "chunk_addr"))
    name = str(fields["name"])
    try:
        return Node(
            number=int(fields.get("number", position)),
            node_id=secrets.token_bytes(16),
            name=name,
            zone=str(fields.get("zone", name)),
            rack=str(fields.get("rack", "")),
            host=str(fields.get("host", _host(metadata or chunk))),
            metadata_addr=metadata,
            chunk_addr=chunk,
            metadata_weight=float(fields.get("metadata_weight", 1)),
            chunk_weight=float(fields.get("chunk_weight", 1)),
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}") from e


def _address(value: Any) -> str:
    text = str(value or "")
    return text if not text or "://" in text else f"tcp://{text}"


def _host(address: str) -> str:
    return address.removeprefix("tcp://").rpartition(":")[0]


def _words(names: set[str]) -> str:
    return ", ".join(sorted(map(str, names)))
