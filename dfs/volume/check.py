"""Consistency check of a whole volume state, as a pure function of its items.

`check` reads every item once, in key order, and compares what is stored twice: names against
inodes, link counts and usage against a recount, extents against sizes.  It is the judge of
invariants V1 (every directory reaches the root and has one parent) and V2 (link counts and usage
equal a recount); the caller adds V3 (tree) and C1 (chunk copies), which need more than the items.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dfs.errors import Corrupt
from dfs.ids import ROOT_INO
from dfs.volume import items
from dfs.volume.items import Inode

DEEP = 4096  # directories above a file; more of them are a loop

Range = tuple[int, int, int]  # inode, offset, length


@dataclass(slots=True)
class Findings:
    """What a check found: counts, chunk references, and a line for each problem."""

    inodes: int = 0
    directories: int = 0
    file_bytes: int = 0
    items: int = 0
    chunks: dict[bytes, int] = field(default_factory=dict)  # chunk id -> plain length
    problems: list[tuple[str, str]] = field(default_factory=list)  # (invariant, text)
    # What refers to a chunk, and ranges of files that nobody can make good: (ino, offset, length).
    references: dict[bytes, list[Range]] = field(default_factory=dict)
    damaged: list[tuple[Range, str]] = field(default_factory=list)
    links: dict[int, set[tuple[int, bytes]]] = field(default_factory=dict)

    def problem(self, invariant: str, text: str) -> None:
        """Note a problem."""
        self.problems.append((invariant, text))

    def path(self, ino: int) -> str:
        """A path of an inode, or what stands for one."""
        parts: list[bytes] = []
        at = ino
        while at != ROOT_INO:
            if at not in self.links or len(parts) > DEEP:
                return f"inode {ino}"
            at, name = min(self.links[at])
            parts.append(name)
        return "/" + b"/".join(reversed(parts)).decode(errors="backslashreplace")


@dataclass(slots=True)
class _State:
    inodes: dict[int, Inode] = field(default_factory=dict)
    links: dict[int, set[tuple[int, bytes]]] = field(default_factory=dict)
    backlinks: dict[int, set[tuple[int, int, bytes]]] = field(default_factory=dict)
    subdirs: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)  # of directories: entries
    kinds: dict[tuple[int, bytes], int] = field(default_factory=dict)  # as a name says, if no file
    attached: dict[int, None] = field(default_factory=dict)  # inodes with attributes or backlinks
    symlinks: set[int] = field(default_factory=set)
    orphans: set[int] = field(default_factory=set)
    extent_end: dict[int, int] = field(default_factory=dict)
    usage: tuple[int, int] | None = None


def check(content: Iterable[tuple[bytes, bytes]], salt: bytes) -> Findings:
    """Check the items of one volume, given in key order; `salt` is the volume's name-hash salt."""
    found, state = Findings(), _State()
    for key, value in content:
        found.items += 1
        try:
            _read(key, value, salt, found, state)
        except Corrupt as e:
            found.problem("format", f"item {key.hex()}: {e}")
            if len(key) > items.GROUP_SIZE and key[8] == items.EXTENT:
                where = int.from_bytes(key[:8], "big"), items.suffix_u64(key), 1
                found.damaged.append((where, "what is stored there cannot be read"))
    found.links = state.links
    _check_names(found, state)
    _check_directories(found, state)
    _check_usage(found, state)
    return found


def _read(key: bytes, value: bytes, salt: bytes, found: Findings, state: _State) -> None:
    ino, kind, suffix = items.split_key(key)
    if ino == items.ADMIN_INO:
        if kind == items.ORPHAN:
            state.orphans.add(items.suffix_u64(key))
        elif kind == items.USAGE:
            state.usage = items.decode_usage(value)
        elif kind == items.QUOTA:
            items.decode_quota(value)
        else:
            found.problem("format", f"unknown administrative item {key.hex()}")
    elif kind == items.INODE:
        state.inodes[ino] = Inode.decode(value)
    elif kind == items.ENTRY:
        _read_entries(ino, items.suffix_u64(key), value, salt, found, state)
    elif kind == items.BACKLINK:
        parent, bucket = int.from_bytes(suffix[:8], "big"), int.from_bytes(suffix[8:16], "big")
        names = items.decode_backlinks(value)
        state.attached[ino] = None
        if any(items.name_hash(salt, name) != bucket for name in names):
            found.problem("V2", f"inode {ino} has a backlink in a wrong bucket")
        state.backlinks.setdefault(ino, set()).update((parent, bucket, n) for n in names)
    elif kind == items.SYMLINK:
        items.decode_symlink(value)
        state.symlinks.add(ino)
    elif kind == items.EXTENT:
        _read_extent(ino, items.suffix_u64(key), value, found, state)
    elif kind == items.XATTR:
        items.decode_xattr(value)
        state.attached[ino] = None
    else:
        found.problem("format", f"item {key.hex()} has unknown type {kind}")


def _read_entries(
    parent: int, bucket: int, value: bytes, salt: bytes, found: Findings, state: _State
) -> None:
    records = items.decode_entries(value)
    if not records:
        found.problem("V1", f"directory {parent} has an empty bucket {bucket:x}")
    if len({name for name, _, _ in records}) != len(records):
        found.problem("V1", f"directory {parent} has a name twice in bucket {bucket:x}")
    for name, ino, kind in records:
        if items.name_hash(salt, name) != bucket:
            found.problem("V1", f"name {name!r} of directory {parent} is in a wrong bucket")
        state.links.setdefault(ino, set()).add((parent, name))
        if kind != items.REG:
            state.kinds[parent, name] = kind
        if kind == items.DIR:
            state.subdirs[parent] = state.subdirs.get(parent, 0) + 1
    state.sizes[parent] = state.sizes.get(parent, 0) + len(records)


def _read_extent(ino: int, offset: int, value: bytes, found: Findings, state: _State) -> None:
    extent = items.decode_extent(value)
    if offset < state.extent_end.get(ino, 0):
        found.problem("V2", f"inode {ino} has overlapping extents at offset {offset}")
        length = min(state.extent_end[ino] - offset, extent[0])
        found.damaged.append(((ino, offset, length), "two versions of these bytes are stored"))
    state.extent_end[ino] = max(offset + extent[0], state.extent_end.get(ino, 0))
    if extent[1] == 1:
        _, _, chunk_id, chunk_offset, chunk_length = extent
        if chunk_offset + extent[0] > chunk_length:
            found.problem("C1", f"inode {ino} at {offset} reads past the end of its chunk")
            where = ino, offset, extent[0]
            found.damaged.append((where, "more bytes are named than their chunk has"))
        found.chunks[chunk_id] = chunk_length
        found.references.setdefault(chunk_id, []).append((ino, offset, extent[0]))


def _check_names(found: Findings, state: _State) -> None:
    for ino, links in state.links.items():
        inode = state.inodes.get(ino)
        if inode is None:
            parent, name = min(links)
            found.problem("V1", f"name {name!r} of directory {parent} leads to no inode ({ino})")
            continue
        for parent, name in links:
            if state.kinds.get((parent, name), items.REG) != inode.kind:
                found.problem("V1", f"name {name!r} of directory {parent} tells a wrong kind")
            holder = state.inodes.get(parent)
            if holder is None or holder.kind != items.DIR:
                found.problem("V1", f"name {name!r} stands in {parent}, which is no directory")
        if inode.kind == items.DIR:
            if len(links) != 1:
                found.problem("V1", f"directory {ino} has {len(links)} names")
            if inode.parent not in {parent for parent, _ in links}:
                found.problem("V1", f"directory {ino} names {inode.parent} as its parent wrongly")
        else:
            _check_links(ino, inode, links, found, state)
    for ino in state.orphans:
        if ino in state.links:
            found.problem("V2", f"inode {ino} is marked as an orphan but has a name")
        elif ino not in state.inodes:
            found.problem("V2", f"inode {ino} is marked as an orphan but does not exist")
        elif state.inodes[ino].nlink:
            found.problem("V2", f"orphan {ino} has nlink {state.inodes[ino].nlink} but no names")
    for ino, inode in state.inodes.items():
        if ino != ROOT_INO and ino not in state.links and ino not in state.orphans:
            found.problem("V2", f"inode {ino} has no name and is not marked as an orphan")
        if inode.kind == items.LNK and ino not in state.symlinks:
            found.problem("V2", f"symbolic link {ino} has no target")
            found.damaged.append(((ino, 0, inode.size), "the target of the link is gone"))


def _check_links(
    ino: int, inode: Inode, links: set[tuple[int, bytes]], found: Findings, state: _State
) -> None:
    if inode.nlink != len(links):
        found.problem("V2", f"inode {ino} has nlink {inode.nlink} but {len(links)} names")
    extra = {(parent, name) for parent, _, name in state.backlinks.get(ino, ())}
    primary = links - extra
    if not extra <= links:
        found.problem("V2", f"inode {ino} has a backlink to a name that is gone")
    if len(primary) != 1 or {parent for parent, _ in primary} != {inode.parent}:
        found.problem("V2", f"inode {ino} has {len(primary)} primary names")


def _check_directories(found: Findings, state: _State) -> None:
    root = state.inodes.get(ROOT_INO)
    if root is None or root.kind != items.DIR:
        found.problem("V1", "the root directory is missing")
    reaches: set[int] = {ROOT_INO}
    for ino, inode in state.inodes.items():
        if inode.kind != items.DIR:
            continue
        found.directories += 1
        want = 2 + state.subdirs.get(ino, 0)
        if inode.nlink != want and ino not in state.orphans:
            found.problem("V2", f"directory {ino} has nlink {inode.nlink}, a recount says {want}")
        size = state.sizes.get(ino, 0)
        if inode.size != size:
            found.problem("V2", f"directory {ino} has size {inode.size}, a recount says {size}")
        path: list[int] = []
        at = ino
        while at not in reaches:
            if ino in state.orphans or at in path or at not in state.inodes:
                break
            path.append(at)
            at = state.inodes[at].parent
        if at in reaches:
            reaches.update(path)
        elif ino not in state.orphans:
            found.problem("V1", f"directory {ino} does not reach the root")


def _check_usage(found: Findings, state: _State) -> None:
    for ino, inode in state.inodes.items():
        if inode.kind == items.REG:
            found.file_bytes += inode.size
            if state.extent_end.get(ino, 0) > inode.size:
                found.problem("V2", f"inode {ino} has extents past its size {inode.size}")
    found.inodes = len(state.inodes)
    for ino in state.extent_end.keys() - state.inodes.keys():
        found.problem("V2", f"extents of inode {ino}, which does not exist")
    for ino in state.attached:
        if ino not in state.inodes:
            found.problem("V2", f"attributes or backlinks of inode {ino}, which does not exist")
    for ino in state.symlinks - state.inodes.keys():
        found.problem("V2", f"link target of inode {ino}, which does not exist")
    if state.usage is None:
        found.problem("V2", "the usage record is missing")
    elif state.usage != (found.file_bytes, found.inodes):
        found.problem(
            "V2",
            f"usage says {state.usage[0]} bytes in {state.usage[1]} inodes, a recount says"
            f" {found.file_bytes} in {found.inodes}",
        )
