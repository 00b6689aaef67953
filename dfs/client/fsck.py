"""`dfs fsck`: prove that a volume is sound, reading only.

1. V3: the checkpoint's tree is the canonical tree of its content (`dfs.volume.tree.check`).
2. V1, V2: names, parents, link counts, usage and extents agree (`dfs.volume.check`), on the state
   that the tree and the journal's tail give together at one sequence number.
3. C1: every chunk that the volume refers to has at least W good copies on its homes. Each server
   verifies its own copy, block by block against the chunk's id (`chunk.report`), so that no data
   crosses the network; a copy found bad is quarantined and repaired by its server.

The whole metadata of the volume is held in memory while it is checked, about 300 bytes an item.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from dfs.client.connect import Cluster
from dfs.client.registry import open_volume_by_name
from dfs.client.session import Session, open_session
from dfs.cluster.map import CHUNK
from dfs.errors import Corrupt, DfsError
from dfs.hashing import partition_of
from dfs.volume import tree
from dfs.volume.check import Findings, check
from dfs.volume.nodecache import NodeCache

FETCH = 256  # tree nodes asked for at once
VERIFY_AT_ONCE = 8  # chunks being verified at a time
VERIFY_TIMEOUT = 60.0  # seconds; a server reads and hashes up to 4 MiB for each

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(slots=True)
class Report:
    """Outcome of a check; `ok` when nothing is wrong."""

    volume: str
    seq: int = 0
    root: str = ""
    inodes: int = 0
    directories: int = 0
    size: int = 0
    chunks: int = 0
    copies: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # (invariant, text)

    @property
    def ok(self) -> bool:
        """Whether the volume is sound."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "volume": self.volume,
            "ok": self.ok,
            "seq": self.seq,
            "root": self.root,
            "inodes": self.inodes,
            "directories": self.directories,
            "bytes": self.size,
            "chunks": self.chunks,
            "copies": self.copies,
            "problems": [{"invariant": i, "text": t} for i, t in self.problems],
        }

    def lines(self) -> list[str]:
        """For people."""
        verdict = "sound" if self.ok else f"{len(self.problems)} problems"
        return [
            f"volume {self.volume} at commit {self.seq}: {verdict}",
            f"  {self.inodes} inodes, {self.directories} of them directories, {self.size} bytes",
            f"  {self.chunks} chunks with {self.copies} verified copies",
            *(f"  {invariant}: {text}" for invariant, text in self.problems),
        ]


async def fsck(
    cluster: Cluster, name: str, *, all_copies: bool = False, progress: Progress | None = None
) -> Report:
    """Check the volume called `name`; with `all_copies`, fewer than N good copies is a problem too.

    Raises `VolumeNotFound`, and `DfsError` when the volume cannot be read at all.
    """
    info = await open_volume_by_name(cluster, name)
    async with open_session(cluster, info.volume_id, mode="ro", name="fsck") as session:
        session.nodes = NodeCache(1 << 40)
        session.view.nodes = session.nodes
        await session.refresh()
        report = Report(name)
        findings = await _read_state(session, report, progress)
        report.problems += findings.problems
        report.inodes, report.directories = findings.inodes, findings.directories
        report.size, report.chunks = findings.file_bytes, len(findings.chunks)
        await _verify_chunks(cluster, session, findings, report, all_copies, progress)
        return report


async def _read_state(session: Session, report: Report, progress: Progress | None) -> Findings:
    while True:
        root = session.view.root
        await _load_tree(session, root, progress)
        if session.view.root == root:
            break  # no checkpoint came in between: the rest runs without giving up control
    view = session.view
    report.seq, report.root = view.seq, root.hex()
    try:
        tree.check(session.nodes.get, root, view.salt)
    except Corrupt as e:
        report.problems.append(("V3", str(e)))
    return check(view.scan(), view.salt)


async def _load_tree(session: Session, root: bytes, progress: Progress | None) -> None:
    """Fetch all nodes below `root`, level by level."""
    row = [root] if root else []
    loaded = 0
    while row:
        absent = [node for node in row if node not in session.nodes]
        for start in range(0, len(absent), FETCH):
            await session.fetch(absent[start : start + FETCH])
            loaded += len(absent[start : start + FETCH])
            if progress is not None:
                progress("tree nodes", loaded, loaded)
        nodes = [session.nodes.get(node) for node in row]  # nothing is evicted: no bound
        row = [child for node in nodes if node.level for child in node.values]


async def _verify_chunks(
    cluster: Cluster,
    session: Session,
    findings: Findings,
    report: Report,
    all_copies: bool,
    progress: Progress | None,
) -> None:
    node_map = cluster.get_map()
    wanted = int(session.params.get("w", node_map.w))
    if all_copies:
        wanted = int(session.params.get("n", node_map.n))
    pending = iter(sorted(findings.chunks))
    done = 0

    async def worker(chunks: Iterable[bytes]) -> None:
        nonlocal done
        for chunk_id in chunks:
            homes = node_map.homes(CHUNK, partition_of(chunk_id))
            states = {n: await _verify(cluster, n, chunk_id) for n in homes}
            good = sum(state == "ok" for state in states.values())
            report.copies += good
            if good < wanted:
                told = ", ".join(f"{node_map.node(n).name} {state}" for n, state in states.items())
                report.problems.append(
                    ("C1", f"chunk {chunk_id.hex()} has {good} of {wanted} good copies ({told})")
                )
            done += 1
            if progress is not None:
                progress("chunks", done, report.chunks)

    async with trio.open_nursery() as nursery:
        for _ in range(VERIFY_AT_ONCE):
            nursery.start_soon(worker, pending)
    report.problems.sort()


async def _verify(cluster: Cluster, number: int, chunk_id: bytes) -> str:
    """State of one copy: "ok", "quarantined", "absent", or why nobody knows."""
    node_map = cluster.get_map()
    try:
        (action,), _ = await cluster.rpc.call(
            node_map.address(CHUNK, number),
            "chunk.report",
            (chunk_id,),
            timeout=VERIFY_TIMEOUT,
            epoch=node_map.epoch,
        )
    except DfsError as e:
        return f"unknown ({e})"
    return str(action)
