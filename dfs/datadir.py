"""Data directories of a node: how they are laid out, and the marker that says whose they are.

A node's data directory carries a file `MARKER`.  A daemon that finds none, or another node's,
refuses to start: an unmounted disk, a mixed-up volume or a directory of another cluster would
otherwise look like an empty node, and an empty node that votes is how acknowledged data gets lost.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dfs.cluster.map import CHUNK, METADATA, ClusterMap, Node
from dfs.disk import RealDisk
from dfs.errors import ConfigError, DfsError

MARKER = "MARKER"
AMNESIA = (
    "A node that has served never starts blank, since it would vote without remembering its "
    "promises: bring its data back, or leave it down while the others go on; only a node that "
    "never served may be made with `dfs node format`"
)
FORMAT = 1
DIRECTORIES = {METADATA: "metadata", CHUNK: "chunks"}  # role -> name in a node's directory
PROGRAMS = {METADATA: "metadata", CHUNK: "chunkserver"}  # role -> `python -m` name


@dataclass(frozen=True, slots=True)
class Marker:
    """Whose data directory this is."""

    cluster_id: str  # hex
    node_id: str  # hex
    number: int
    role: str
    format: int = FORMAT

    @classmethod
    def of(cls, cluster_id: bytes, node: Node, role: str) -> "Marker":
        """The marker that `node` must find in its directory for `role`."""
        return cls(cluster_id.hex(), node.node_id.hex(), node.number, role)


def read_marker(directory: Path, role: str) -> Marker:
    """The marker of a directory that must be one of `role`; raises `ConfigError`."""
    path = directory / MARKER
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(
            f"{directory} is no data directory of dfs (no {MARKER} file): is its disk mounted? "
            f"{AMNESIA}"
        ) from None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    try:
        marker = Marker(**json.loads(text))
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{path} is damaged ({e}): restore it, do not format over data") from e
    if marker.format != FORMAT:
        raise ConfigError(
            f"{directory} has format {marker.format}, this program knows {FORMAT}: upgrade dfs"
        )
    if marker.role != role:
        raise ConfigError(f"{directory} is a data directory for {marker.role}, not for {role}")
    return marker


def read_map(path: Path) -> ClusterMap:
    """The cluster map in a file; raises `ConfigError` naming it, `FileNotFoundError`."""
    try:
        return ClusterMap.decode(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ConfigError(f"cannot read the cluster map {path}: {e.strerror}") from e
    except DfsError as e:
        hint = "" if "copy it" in str(e) else ": copy it from another node"
        raise ConfigError(f"the cluster map {path} is damaged ({e}{hint})") from e


def format_directory(directory: Path, marker: Marker) -> bool:
    """Make a data directory; False if it is there already with the same marker.

    Raises `ConfigError` if it belongs to somebody else or holds files without a marker.
    """
    if (directory / MARKER).exists():
        found = read_marker(directory, marker.role)
        if found != marker:
            raise ConfigError(
                f"{directory} belongs to node {found.number} ({found.node_id}) of cluster "
                f"{found.cluster_id}, not to node {marker.number} of {marker.cluster_id}"
            )
        return False
    directory.mkdir(parents=True, exist_ok=True)
    # a file system's own lost+found is no data
    if any(entry.name != "lost+found" for entry in directory.iterdir()):
        raise ConfigError(f"{directory} is not empty and has no {MARKER} file: refusing to use it")
    directory.chmod(0o700)
    RealDisk(directory).write_atomic(MARKER, json.dumps(asdict(marker), indent=1).encode() + b"\n")
    return True
