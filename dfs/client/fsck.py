"""`dfs fsck`: prove that a volume is sound, and with `repair` make it so.

1. V3: the checkpoint's tree is the canonical tree of its content (`dfs.volume.tree.check`).
2. V1, V2: names, parents, link counts, usage and extents agree (`dfs.volume.check`), on the state
   that the tree and the journal's tail give together at one sequence number.
3. C1: every chunk that the volume refers to has at least W good copies on its homes
   (`dfs.client.copies`).

A check only reads, beside mounts that write.  A repair has the volume for itself, by an exclusive
session: what it decides from the whole volume must not change meanwhile, and files that were
deleted while they were open are of nobody then.  It commits what `dfs.volume.repair` plans, in
transactions of a few hundred items, new ones first, so that one that is interrupted has lost
nothing and is taken up by the next; then it checks again.  Missing copies are made by the servers,
and waited for.  What nobody can make good is listed with path, range and what to do.

The whole metadata of the volume is held in memory while it is checked, about 300 bytes an item, and
twice while it is repaired.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dfs.client.connect import Cluster
from dfs.client.copies import Copies, Progress, count, wait_repaired
from dfs.client.registry import open_volume_by_name
from dfs.client.session import DEADLINE, Session, open_session
from dfs.errors import Corrupt
from dfs.volume import tree
from dfs.volume.check import Findings, Range, check
from dfs.volume.effects import PUT, Effect
from dfs.volume.nodecache import NodeCache
from dfs.volume.repair import plan
from dfs.volume.view import Txn

FETCH = 256  # tree nodes asked for at once
PASSES = 3  # of planning: what one finds may show more
EFFECTS = 256  # in one transaction of a repair
EFFECT_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Loss:
    """Bytes of a file that nobody can make good, and what people can do."""

    path: str
    offset: int
    length: int
    why: str
    advice: str

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.path}, bytes {self.offset} to {self.offset + self.length - 1}: {self.why};"
            f" {self.advice}"
        )


@dataclass(slots=True)
class Report:
    """Outcome of a check; `ok` when nothing is wrong (any more)."""

    volume: str
    seq: int = 0
    root: str = ""
    inodes: int = 0
    directories: int = 0
    size: int = 0
    chunks: int = 0
    copies: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # (invariant, text)
    repaired: list[tuple[str, str]] = field(default_factory=list)  # (invariant, text)
    lost: list[Loss] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the volume is sound."""
        return not self.problems

    @property
    def status(self) -> int:
        """As fsck(8) exits: 0 sound, 1 everything was corrected, 4 something is left."""
        return 4 if self.problems else 1 if self.repaired else 0

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
            "repaired": [{"invariant": i, "text": t} for i, t in self.repaired],
            "lost": [
                {
                    "path": loss.path,
                    "offset": loss.offset,
                    "length": loss.length,
                    "why": loss.why,
                    "advice": loss.advice,
                }
                for loss in self.lost
            ],
        }

    def lines(self) -> list[str]:
        """For people."""
        verdict = "sound" if self.ok else _count(len(self.problems), "problem")
        done = f", {_count(len(self.repaired), 'repair')}" if self.repaired else ""
        return [
            *(f"repaired {invariant}: {text}" for invariant, text in self.repaired),
            f"volume {self.volume} at commit {self.seq}: {verdict}{done}",
            f"  {self.inodes} inodes, {self.directories} of them directories, {self.size} bytes",
            f"  {self.chunks} chunks with {self.copies} verified copies",
            *(f"  {invariant}: {text}" for invariant, text in self.problems),
            *(f"  lost: {loss}" for loss in self.lost),
        ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


async def fsck(
    cluster: Cluster,
    name: str,
    *,
    all_copies: bool = False,
    repair: bool = False,
    deadline: float = DEADLINE,
    progress: Progress | None = None,
) -> Report:
    """Check the volume called `name`; with `all_copies`, fewer than N good copies is a problem too.

    `repair`: make good what can be.  Raises `VolumeNotFound`, `InUse` when somebody else writes to
    a volume to be repaired, and `DfsError` when the volume cannot be read at all.
    """
    info = await open_volume_by_name(cluster, name)
    mode = "rwx" if repair else "ro"
    async with open_session(
        cluster, info.volume_id, mode=mode, name="dfs fsck", deadline=deadline
    ) as session:
        session.nodes = NodeCache(1 << 40)
        session.view.nodes = session.nodes
        await session.refresh()
        report = Report(name)
        findings = await _read_state(session, report, progress)
        if repair:
            findings = await _repair(session, report, findings, progress)
        report.problems += findings.problems
        report.inodes, report.directories = findings.inodes, findings.directories
        report.size, report.chunks = findings.file_bytes, len(findings.chunks)
        await _check_chunks(cluster, session, findings, report, all_copies, repair, progress)
        for where, why in findings.damaged:
            advice = "restore it from a backup, or write it again"
            report.lost.append(_loss(findings, where, why, advice))
        report.lost.sort(key=lambda loss: (loss.path, loss.offset))
        return report


def _loss(findings: Findings, where: Range, why: str, advice: str) -> Loss:
    ino, offset, length = where
    return Loss(findings.path(ino), offset, length, why, advice)


async def _read_state(session: Session, report: Report, progress: Progress | None) -> Findings:
    while True:
        root = session.view.root
        await _load_tree(session, root, progress)
        if session.view.root == root:
            break  # no checkpoint came in between: the rest runs without giving up control
    view = session.view
    report.seq, report.root = view.seq, root.hex()
    report.problems = []
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


# ------------------------------------------------------------------------------------- repairs


async def _repair(
    session: Session, report: Report, findings: Findings, progress: Progress | None
) -> Findings:
    """Plan, commit, and check again, until a plan has nothing to do."""
    for _ in range(PASSES):
        view = session.view
        now = session.cluster.clock.time_ns()
        planned = plan(view.scan(), view.salt, now, session.mint_ino)
        if not planned.effects:
            break
        done = 0
        for part in parts(planned.effects):
            await session.transact(_committing(part))
            done += len(part)
            if progress is not None:
                progress("repairs", done, len(planned.effects))
        report.repaired += planned.done
        await session.refresh()
        findings = await _read_state(session, report, progress)
    return findings


def parts(effects: list[Effect]) -> list[list[Effect]]:
    """The effects in their order, in parts that each fit into a transaction."""
    found: list[list[Effect]] = []
    size = EFFECT_BYTES
    for effect in effects:
        more = sum(map(len, effect[1:]))
        if size + more > EFFECT_BYTES or len(found[-1]) == EFFECTS:
            found.append([])
            size = 0
        found[-1].append(effect)
        size += more
    return found


def _committing(part: list[Effect]) -> Callable[[Txn], None]:
    def op(txn: Txn) -> None:
        for effect in part:
            if effect[0] == PUT:
                txn.put(effect[1], effect[2])
            else:
                txn.delete(effect[1])

    return op


# ------------------------------------------------------------------------------------- chunks


async def _check_chunks(
    cluster: Cluster,
    session: Session,
    findings: Findings,
    report: Report,
    all_copies: bool,
    repair: bool,
    progress: Progress | None,
) -> None:
    node_map = cluster.get_map()
    least = int(session.params.get("w", node_map.w))
    every = int(session.params.get("n", node_map.n))
    wanted = every if all_copies else least
    found = await count(cluster, findings.chunks, progress)
    if repair:
        poor = {c: copies.good for c, copies in found.items() if copies.good < every}
        found.update(await wait_repaired(cluster, poor))
        for chunk_id, before in poor.items():
            now = found[chunk_id].good
            if now > before:
                text = f"chunk {chunk_id.hex()} has {now} good copies again, it had {before}"
                report.repaired.append(("C1", text))
    report.copies = sum(copies.good for copies in found.values())
    for chunk_id, copies in sorted(found.items()):
        if copies.good < wanted:
            told = ", ".join(
                f"{node_map.node(n).name} {state}"
                for n, state in {**copies.homes, **copies.others}.items()
            )
            report.problems.append(
                ("C1", f"chunk {chunk_id.hex()} has {copies.good} of {wanted} good copies ({told})")
            )
        if copies.lost:
            silent = [node_map.node(n).name for n in copies.silent()]
            why, advice = _explain(chunk_id, copies, silent)
            for where in findings.references[chunk_id]:
                report.lost.append(_loss(findings, where, why, advice))
    report.problems.sort()


def _explain(chunk_id: bytes, copies: Copies, silent: list[str]) -> tuple[str, str]:
    """Why a chunk cannot be had, and what to do about it."""
    short = chunk_id.hex()[:16]
    if silent:
        return (
            f"no server that answers has a good copy of chunk {short}",
            f"bring back {', '.join(silent)} and check again",
        )
    bad = sum(state == "quarantined" for state in {**copies.homes, **copies.others}.values())
    return (
        f"no server has a good copy of chunk {short}" + (f", {bad} have a bad one" if bad else ""),
        "restore it from a backup, or write it again; reading it is an error until then",
    )
