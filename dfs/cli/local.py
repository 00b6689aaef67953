"""A cluster directory on this machine: its nodes' data directories and their processes.

    DIR/cluster.json              how clients find the cluster
    DIR/map                       the first cluster map
    DIR/NODE/map, metadata/, chunks/    what a node's two daemons are given
    DIR/run/NODE-PROGRAM.pid      one per process; mounts have mount*.pid and mount*.mountpoint
    DIR/log/NODE-PROGRAM.log      what the process said

A process is only ever signalled after its command line has shown that it is the one we started: the
number in a pid file may long belong to somebody else.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from dfs.cluster.address import is_local
from dfs.cluster.map import ROLES, ClusterMap, Node
from dfs.datadir import DIRECTORIES, MARKER, PROGRAMS, Marker, format_directory, read_map
from dfs.disk import RealDisk
from dfs.errors import ConfigError, DfsError

STOP_TIMEOUT = 10.0  # seconds from SIGTERM to SIGKILL
_POLL = 0.02  # seconds
BULK = frozenset(("chunkserver", "fuse"))  # programs that move megabytes
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # of glibc 2.35 and newer; others do not know it


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a cluster directory, running or not."""

    name: str  # NODE-PROGRAM, or mount-...
    pid_file: Path
    command: tuple[str, ...]  # consecutive arguments that it has
    log: Path
    unique: bool = False  # no other process has these arguments: it is found without a pid file

    def pid(self) -> int | None:
        """The pid if the process runs, else None."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            pid = 0
        if pid > 0 and self._is(pid):
            return pid
        if not self.unique:
            return None
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return next((pid for pid in sorted(found) if self._is(pid)), None)

    def _is(self, pid: int) -> bool:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        wanted = [os.fsencode(part) for part in self.command]
        return state not in "ZX" and any(
            arguments[i : i + len(wanted)] == wanted
            for i in range(len(arguments) - len(wanted) + 1)
        )

    def last_words(self, lines: int = 8) -> str:
        """The end of the log."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return f"(no log {self.log})"
        return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


class ClusterDir:
    """The directory of a cluster and what of it lives on this machine."""

    def __init__(self, path: Path) -> None:
        """Use a directory that may not exist yet."""
        self.path = path.absolute()
        self.file = self.path / "cluster.json"
        self.run = self.path / "run"
        self.log = self.path / "log"

    @classmethod
    def of_file(cls, file: Path) -> "ClusterDir":
        """The directory that a cluster file lies in."""
        return cls(file.parent)

    def create(self, cluster: ClusterMap, local: Iterable[Node]) -> None:
        """Write the cluster file, the map and the directories of the `local` nodes.

        Raises `ConfigError` if there is a cluster already.
        """
        if self.file.exists() or (self.path / "map").exists():
            raise ConfigError(
                f"there is a cluster in {self.path} already: choose another --dir, "
                "or remove it when its data is not needed any more"
            )
        names = {node.name for node in cluster.nodes}
        for name in names:
            if "/" in name or name in {".", "..", "run", "log", "map", "mnt"}:
                raise ConfigError(f"{name!r} cannot be the name of a node: it names a directory")
        taken = sorted(name for name in names if (self.path / name).exists())
        if taken:
            raise ConfigError(f"{self.path / taken[0]} exists already: refusing to use it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"cannot make {self.path}: {e.strerror}") from e
        for directory in (self.run, self.log):
            directory.mkdir(exist_ok=True)
        for node in local:
            format_node(self.path / node.name, cluster, node)
        RealDisk(self.path).write_atomic("map", cluster.encode())
        self._write_file(cluster)  # last: the cluster exists once this file does

    def has_map(self) -> bool:
        """Whether the cluster's map is here."""
        return (self.path / "map").exists()

    def load_map(self) -> ClusterMap:
        """The newest map any local node has, else the first one; raises `ConfigError`.

        Maps that cannot be read are told and passed over: a daemon that needs one refuses itself.
        """
        maps: list[ClusterMap] = []
        damage: list[str] = []
        for path in [self.path / "map", *self.path.glob("*/map"), *self.path.glob("*/*/map")]:
            try:
                maps.append(read_map(path))
            except FileNotFoundError:
                continue
            except ConfigError as e:
                damage.append(str(e))
        if not maps:
            if damage:
                raise ConfigError("; ".join(damage))
            how = f"`dfs cluster init --dir {self.path}` makes one"
            raise ConfigError(f"there is no cluster in {self.path}: {how}")
        for text in damage:
            click.echo(f"dfs: {text}", err=True)
        return max(maps, key=lambda m: m.epoch)

    def adopt(self, cluster: ClusterMap) -> None:
        """Keep a newer map, and its members as the addresses that clients begin with."""
        if self.load_map().epoch <= cluster.epoch:
            RealDisk(self.path).write_atomic("map", cluster.encode())
            self._write_file(cluster)

    def _write_file(self, cluster: ClusterMap) -> None:
        seeds = [node.metadata_addr for node in cluster.nodes if node.metadata_addr]
        value = {"format": 1, "cluster_id": cluster.cluster_id.hex(), "seeds": seeds}
        text = json.dumps(value, indent=1).encode() + b"\n"
        RealDisk(self.path).write_atomic("cluster.json", text)

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        """Only one command at a time starts or stops processes; raises `ConfigError`."""
        with locked(self.path, timeout, "`dfs cluster up` or `down`"):
            yield

    def missing(self, node: Node) -> list[Path]:
        """Data directories that a node on this machine should have here and has not."""
        if not is_local(node.metadata_addr or node.chunk_addr):
            return []
        wanted = [role for role in ROLES if node.address(role)]
        here = self.roles(node)
        return [self.path / node.name / DIRECTORIES[role] for role in wanted if role not in here]

    def local_nodes(self, cluster: ClusterMap) -> list[Node]:
        """The nodes whose data directories are here."""
        return [node for node in cluster.nodes if self.roles(node)]

    def processes(self, node: Node) -> list[Process]:
        """The daemons of a local node."""
        return [self.process(node, role) for role in self.roles(node)]

    def process(self, node: Node, role: str) -> Process:
        """The daemon of a node's role."""
        name = f"{node.name}-{PROGRAMS[role]}"
        data = str(self.path / node.name / DIRECTORIES[role])
        return Process(
            name,
            self.run / f"{name}.pid",
            ("-m", PROGRAMS[role], "--data", data),
            self.log / f"{name}.log",
            unique=True,
        )

    def mounts(self) -> list[tuple[Process, str]]:
        """Mounts started from this directory, with their mount points."""
        found = []
        for file in sorted(self.run.glob("mount*.pid")):
            with contextlib.suppress(OSError):
                where = file.with_suffix(".mountpoint").read_text().strip()
                process = Process(file.stem, file, ("-m", "fuse"), self.log / f"{file.stem}.log")
                found.append((process, where))
        return found

    def start(self, node: Node, role: str) -> subprocess.Popen[bytes] | None:
        """Start one daemon in a session of its own; None if it runs already."""
        process = self.process(node, role)
        if process.pid() is not None:
            return None
        node_dir = self.path / node.name
        return spawn(
            process,
            ["--map", str(node_dir / "map"), "--metrics", "0"],
        )

    def roles(self, node: Node) -> list[str]:
        """Roles of a node whose data directories are here."""
        return [
            role for role in ROLES if (self.path / node.name / DIRECTORIES[role] / MARKER).exists()
        ]


@contextlib.contextmanager
def locked(directory: Path, timeout: float, what: str) -> Iterator[None]:
    """Hold the lock of a directory, which ends with the process; raises `ConfigError`."""
    end = time.monotonic() + timeout
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"another {what} is at work in {directory}: wait for it, or stop it"
                    ) from None
                time.sleep(_POLL)
        yield
    finally:
        os.close(lock)


def environment(program: str) -> dict[str, str]:
    """The environment of one of our programs; what the user has set counts.

    Arenas of malloc for each thread cost memory and bring nothing to a program with one busy
    thread.  Those that move megabytes have their memory in huge pages: where a disk or FUSE copies
    to or from it, the kernel then looks up one page for 2 MiB and not 512.
    """
    tuned = {"MALLOC_ARENA_MAX": "2"}
    if program in BULK:
        tuned["GLIBC_TUNABLES"] = HUGE_PAGES
    return {**tuned, **os.environ}


def spawn(
    process: Process, arguments: list[str], pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start `python -P process.command arguments...` detached, with its log and pid file."""
    process.pid_file.parent.mkdir(parents=True, exist_ok=True)
    process.log.parent.mkdir(parents=True, exist_ok=True)
    with process.log.open("ab") as log:
        child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", *process.command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment(process.command[1]),
            pass_fds=pass_fds,
        )
    process.pid_file.write_text(f"{child.pid}\n")
    # the kernel shows the command line a moment after exec; until then nobody would recognise it
    while process.pid() is None and child.poll() is None:
        time.sleep(0.001)
    return child


def stop(processes: Iterable[Process], *, timeout: float = STOP_TIMEOUT) -> list[str]:
    """Stop processes, politely first; returns the names of those that had to be killed."""
    running = {process: pid for process in processes if (pid := process.pid()) is not None}
    for pid in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGCONT)  # a stopped one could not even hear it
    killed = []
    end = time.monotonic() + timeout
    for process, pid in running.items():
        while process.pid() == pid and time.monotonic() < end:
            time.sleep(_POLL)
        if process.pid() == pid:
            killed.append(process.name)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _wait_gone(process, pid)
        process.pid_file.unlink(missing_ok=True)
    return killed


def _wait_gone(process: Process, pid: int) -> None:
    end = time.monotonic() + STOP_TIMEOUT
    while process.pid() == pid:
        if time.monotonic() > end:
            raise DfsError(
                f"{process.name} (pid {pid}) does not die: it hangs in the kernel; "
                "look at its disk or mount"
            )
        time.sleep(_POLL)


def format_node(directory: Path, cluster: ClusterMap, node: Node) -> list[Path]:
    """Make a node's data directories for the roles it has; returns those that are new."""
    made: list[Path] = []
    for role in ROLES:
        if node.address(role):
            made += format_data(directory / DIRECTORIES[role], cluster, node, role, own_map=False)
    disk = RealDisk(directory)
    if not disk.exists("map"):
        disk.write_atomic("map", cluster.encode())
    return made


def format_data(
    path: Path, cluster: ClusterMap, node: Node, role: str, *, own_map: bool = True
) -> list[Path]:
    """Make one data directory of a node, with a map in it if asked; [path] if it is new."""
    if not node.address(role):
        raise ConfigError(f"node {node.name} has no {role} role in the map")
    if not format_directory(path, Marker.of(cluster.cluster_id, node, role)):
        return []
    if own_map:
        RealDisk(path).write_atomic("map", cluster.encode())
    return [path]
