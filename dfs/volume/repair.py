"""Repairs of a damaged volume state, as a pure function of its items.

`plan` reads every item, decides what a sound volume with the same content looks like, and gives the
difference as effects, with a line for each thing that was done.  Items that are sound are not
touched.  The rules, in the order in which they are applied:

- What no longer decodes is dropped, except an extent: that is for people to decide.
- An inode that is gone comes back if something of it is left: entries make a directory, extents a
  file, a target a link.  It belongs to root and nobody else may open it, since who might is lost.
- Names are dropped that lead to nothing, that stand in no directory, or that are there twice.
- A directory keeps the name in the directory that it calls its parent, else the first one.
- What has no name, or is cut off from the root, gets one in `lost+found`; except a file without
  links or marked as an orphan: that was deleted, and removing it is finished.  Hence nobody may
  have a file of the volume open for writing meanwhile.
- Link counts, parents, further names, sizes of directories and the usage are counted again.  A file
  ends no earlier than its last extent.

Nothing is guessed: of bytes that are stored twice none is chosen (overlapping extents), and what is
gone is not replaced (the target of a link).  `dfs.volume.check` still tells those afterwards.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dfs.errors import Corrupt
from dfs.ids import ROOT_INO
from dfs.volume import items
from dfs.volume.effects import DELETE, PUT, Effect
from dfs.volume.items import DIR, LNK, REG, EntryRecord, Inode

LOST_FOUND = b"lost+found"
MODES = {DIR: 0o700, REG: 0o600, LNK: 0o777}
XATTRS = 1  # INODE.flags: it has extended attributes, so they are removed with it

Link = tuple[int, bytes]  # (directory, name)


@dataclass(slots=True)
class Plan:
    """What to do: effects, creations first, and a line (invariant, text) for each repair."""

    effects: list[Effect] = field(default_factory=list)
    done: list[tuple[str, str]] = field(default_factory=list)


def plan(
    content: Iterable[tuple[bytes, bytes]], salt: bytes, now: int, mint: Callable[[], int]
) -> Plan:
    """Plan the repair of the items of a volume, given in key order.

    `salt`: of the volume's names; `now`: time of what is made, ns; `mint`: makes inode numbers.
    """
    repair = _Repair(salt, now, mint)
    for key, value in content:
        repair.read(key, value)
    repair.revive()
    repair.check_names()
    repair.check_directories()
    repair.check_files()
    repair.count()
    return Plan(
        repair.difference(), [(kind, repair.show(text, ino)) for kind, text, ino in repair.done]
    )


class _Repair:
    """The state of a volume while it is put in order; see `plan`."""

    def __init__(self, salt: bytes, now: int, mint: Callable[[], int]) -> None:
        self.salt = salt
        self.now = now
        self.mint = mint
        self.done: list[tuple[str, str, int]] = []  # (invariant, text, inode that it is about)
        self.before: dict[bytes, bytes] = {}  # items that may be changed, as they are stored
        self.inodes: dict[int, Inode] = {}
        self.names: dict[int, dict[bytes, EntryRecord]] = {}  # directory -> name -> record
        self.links: dict[int, list[Link]] = {}
        self.extra: dict[int, list[Link]] = {}  # further names, as backlinks say
        self.orphans: dict[int, None] = {}
        self.end: dict[int, int] = {}  # where extents of an inode end
        self.targets: dict[int, int] = {}  # inode -> length of the link's target
        self.attached: dict[int, list[bytes]] = {}  # keys that go when their inode goes
        self.counted: tuple[int, int] | None = None  # what the usage says
        self.usage = b""
        self.lost_found = 0
        self.made: dict[int, None] = {}  # inodes: nothing in them was wrong

    def note(self, invariant: str, text: str, ino: int = 0) -> None:
        self.done.append((invariant, text, ino))

    # ------------------------------------------------------------------------------- reading

    def read(self, key: bytes, value: bytes) -> None:
        """Take an item; what does not decode is dropped, if it may be."""
        try:
            ino, kind, suffix = items.split_key(key)
        except Corrupt:
            return  # nothing that could be asked for
        try:
            self._read(key, ino, kind, suffix, value)
        except (Corrupt, TypeError, ValueError) as e:
            if kind == items.EXTENT:
                self.attached.setdefault(ino, []).append(key)
                self.end[ino] = max(items.suffix_u64(key), self.end.get(ino, 0))
                return
            self.before[key] = value
            self.note("format", f"dropped an unreadable item, key {key.hex()}: {e}", ino)

    def _read(self, key: bytes, ino: int, kind: int, suffix: bytes, value: bytes) -> None:
        if ino == items.ADMIN_INO:
            if kind == items.ORPHAN:
                self.orphans[items.suffix_u64(key)] = None
            elif kind == items.QUOTA:
                items.decode_quota(value)
                return
            elif kind == items.USAGE:
                self.counted = items.decode_usage(value)
            else:
                return  # of a newer version, perhaps
            self.before[key] = value
        elif kind == items.INODE:
            inode = Inode.decode(value)
            if inode.kind not in items.KINDS or not all(type(f) is int for f in inode.fields()):
                raise Corrupt("an inode of no kind")
            self.inodes[ino] = inode
            self.before[key] = value
        elif kind == items.ENTRY:
            records = items.decode_entries(value)
            names = self.names.setdefault(ino, {})
            bucket = items.suffix_u64(key)
            for name, child, child_kind in records:
                if items.name_hash(self.salt, name) != bucket:
                    self.note("V1", f"moved the name {name!r} to where it is looked for", ino)
                if name in names:
                    self.note("V1", f"dropped the name {name!r}, which was there already", ino)
                else:
                    names[name] = (name, child, child_kind)
            if not records:
                self.note("V1", "dropped a bucket without names", ino)
            self.before[key] = value
        elif kind == items.BACKLINK:
            parent = int.from_bytes(suffix[:8], "big")
            further = [(parent, name) for name in items.decode_backlinks(value)]
            bucket = int.from_bytes(suffix[8:16], "big")
            if any(items.name_hash(self.salt, name) != bucket for _, name in further):
                self.note("V2", "moved a backlink to where it is looked for", ino)
            self.extra.setdefault(ino, []).extend(further)
            self.before[key] = value
        elif kind == items.SYMLINK:
            self.targets[ino] = len(items.decode_symlink(value))
            self.attached.setdefault(ino, []).append(key)
        elif kind == items.EXTENT:
            end = items.suffix_u64(key) + items.decode_extent(value)[0]
            self.end[ino] = max(end, self.end.get(ino, 0))
            self.attached.setdefault(ino, []).append(key)
        elif kind == items.XATTR:
            items.decode_xattr(value)
            self.attached.setdefault(ino, []).append(key)

    # ------------------------------------------------------------------------------- inodes

    def revive(self) -> None:
        """Bring inodes back of which something else is left."""
        root = self.inodes.get(ROOT_INO)
        if root is None or root.kind != DIR:
            self._make(ROOT_INO, DIR)
        for ino in sorted({*self.names, *self.end, *self.targets} - self.inodes.keys()):
            if self.names.get(ino):
                self._make(ino, DIR)
            elif ino in self.end:
                self._make(ino, REG, self.end[ino])
            elif ino in self.targets:
                self._make(ino, LNK, self.targets[ino])

    def _make(self, ino: int, kind: int, size: int = 0) -> None:
        now = self.now
        flags = XATTRS if any(k[8] == items.XATTR for k in self.attached.get(ino, ())) else 0
        self.inodes[ino] = Inode(
            kind, MODES[kind], size=size, nlink=2 if kind == DIR else 1, atime=now, mtime=now,
            ctime=now, btime=now, parent=ROOT_INO, flags=flags, dataver=int(kind == REG),
        )  # fmt: skip
        self.made[ino] = None
        what = {DIR: "directory", REG: "file", LNK: "symbolic link"}[kind]
        self.note("V1", f"made the inode of a {what} again, for root only", ino)

    def _remove(self, ino: int) -> None:
        """Drop an inode with all that belongs to it; its items are found missing in the end."""
        del self.inodes[ino]
        self.orphans.pop(ino, None)

    # ------------------------------------------------------------------------------- names

    def check_names(self) -> None:
        """Drop names that lead nowhere or stand nowhere; note the links that are left."""
        for parent in sorted(self.names):
            holder = self.inodes.get(parent)
            records = self.names[parent]
            if holder is None or holder.kind != DIR:
                for name in records:
                    self.note("V1", f"dropped the name {name!r}: this is no directory", parent)
                del self.names[parent]
                continue
            for name, (_, ino, kind) in list(records.items()):
                inode = self.inodes.get(ino)
                if inode is None or ino == ROOT_INO:
                    what = "no inode" if inode is None else "the root"
                    self.note("V1", f"dropped the name {name!r}, which led to {what}", parent)
                    del records[name]
                    continue
                if inode.kind != kind:
                    self.note("V1", f"corrected what kind the name {name!r} stands for", parent)
                    records[name] = (name, ino, inode.kind)
                self.links.setdefault(ino, []).append((parent, name))
        for ino in self.made:
            if links := self.links.get(ino):
                self.inodes[ino].parent, self.inodes[ino].nlink = links[0][0], len(links)
                self.extra[ino] = links[1:]
        for ino in sorted(self.attached.keys() | self.extra.keys()):
            if ino not in self.inodes:
                self.note("V2", "dropped what was left of an inode that is gone", ino)

    def _unlink(self, ino: int, link: Link) -> None:
        del self.names[link[0]][link[1]]
        self.links[ino].remove(link)

    def _attach(self, ino: int, why: str) -> None:
        """Give an inode a name in lost+found."""
        holder = self.lost_found or self._find_lost_found()
        names = self.names.setdefault(holder, {})
        name = base = b"#%x" % ino
        again = 0
        while name in names:
            again += 1
            name = b"%s-%d" % (base, again)
        names[name] = (name, ino, self.inodes[ino].kind)
        self.links[ino] = [(holder, name)]
        self.inodes[ino].parent = holder
        self.extra.pop(ino, None)
        self.note("V1", f"{why}: named it {name.decode()} in {LOST_FOUND.decode()}", ino)

    def _find_lost_found(self) -> int:
        names = self.names.setdefault(ROOT_INO, {})
        name = LOST_FOUND
        while name in names:
            if names[name][2] == DIR:
                self.lost_found = names[name][1]
                return self.lost_found
            name += b"_"
        ino = self.lost_found = self.mint()
        self.made[ino] = None
        now = self.now
        self.inodes[ino] = Inode(
            DIR, 0o700, nlink=2, atime=now, mtime=now, ctime=now, btime=now, parent=ROOT_INO
        )
        names[name] = (name, ino, DIR)
        self.links[ino] = [(ROOT_INO, name)]
        return ino

    # ------------------------------------------------------------------------------- directories

    def check_directories(self) -> None:
        """One name each, all reachable from the root, parents that are so."""
        directories = sorted(ino for ino, inode in self.inodes.items() if inode.kind == DIR)
        for ino in directories:
            if ino in self.orphans:
                del self.orphans[ino]
                self.note("V2", "dropped the mark of an orphan from a directory", ino)
            links = self.links.get(ino, [])
            if len(links) > 1:
                mine = [link for link in links if link[0] == self.inodes[ino].parent]
                for link in [x for x in links if x != (mine or links)[0]]:
                    self.note("V1", f"dropped the name {link[1]!r} of it, one of several", ino)
                    self._unlink(ino, link)
        reached = self._reach({ROOT_INO}, [ROOT_INO])
        for ino in directories:
            if ino not in reached and not self.links.get(ino):
                self._attach(ino, "a directory without a name")
                self._reach(reached, [ino])
        for ino in directories:
            if ino not in reached:  # in a loop of directories, or below one: cut that
                first = self._loop(ino)
                self._unlink(first, self.links[first][0])
                self._attach(first, "a directory that was its own ancestor")
                self._reach(reached, [first])
        for ino, inode in self.inodes.items():
            if inode.kind == DIR:
                above = ROOT_INO if ino == ROOT_INO else self.links[ino][0][0]
                if inode.parent != above:
                    self.note("V1", f"corrected its parent, {inode.parent} to {above}", ino)
                    inode.parent = above

    def _reach(self, reached: set[int], todo: list[int]) -> set[int]:
        """Add directories, and those below them, to what is reached."""
        reached.update(todo)
        while todo:
            for _, ino, kind in self.names.get(todo.pop(), {}).values():
                if kind == DIR and ino not in reached:
                    reached.add(ino)
                    todo.append(ino)
        return reached

    def _loop(self, ino: int) -> int:
        """The smallest inode of the loop above a directory."""
        seen: dict[int, None] = {}
        while ino not in seen:
            seen[ino] = None
            ino = self.links[ino][0][0]
        path = list(seen)
        return min(path[path.index(ino) :])

    # ------------------------------------------------------------------------------- files

    def check_files(self) -> None:
        """Names, marks and further names of everything but directories."""
        for ino in sorted(self.inodes):
            inode = self.inodes[ino]
            if inode.kind == DIR:
                continue
            links = self.links.get(ino)
            if not links:
                if ino in self.orphans or inode.nlink == 0:
                    self._remove(ino)
                    self.note("V2", "finished the removal of a deleted file", ino)
                    continue
                self._attach(ino, "a file without a name")
                links = self.links[ino]
            elif self.orphans.pop(ino, 0) is None:
                self.note("V2", "dropped the mark of an orphan from a file with a name", ino)
            if inode.nlink != len(links):
                self.note("V2", f"corrected nlink {inode.nlink} to {len(links)}", ino)
                inode.nlink = len(links)
            self._choose_primary(ino, inode, links)
            if self.end.get(ino, 0) > inode.size and inode.kind == REG:
                end = self.end[ino]
                self.note("V2", f"extended it from {inode.size} to {end} bytes, its data", ino)
                inode.size = end
        for ino in sorted(self.orphans.keys() - self.inodes.keys()):
            del self.orphans[ino]
            self.note("V2", "dropped the mark of an orphan that is gone", ino)

    def _choose_primary(self, ino: int, inode: Inode, links: list[Link]) -> None:
        """One name is the primary one, in the directory that the inode names; others backlinks."""
        extra = self.extra.get(ino, [])
        primary = [link for link in links if link not in extra]
        if (
            len(primary) == 1
            and primary[0][0] == inode.parent
            and len(extra) == len(links) - 1
            and all(link in links for link in extra)
        ):
            return
        here = [link for link in primary or links if link[0] == inode.parent]
        chosen = (here or primary or links)[0]
        self.extra[ino] = [link for link in links if link != chosen]
        self.note("V2", f"recorded {chosen[1]!r} as its first name", ino)
        inode.parent = chosen[0]

    # ------------------------------------------------------------------------------- counting

    def count(self) -> None:
        """Directories' link counts and sizes, and the volume's usage."""
        total = 0
        for ino in sorted(self.inodes):
            inode = self.inodes[ino]
            if inode.kind == REG:
                total += inode.size
            if inode.kind != DIR:
                continue
            records = self.names.get(ino, {}).values()
            nlink = 2 + sum(kind == DIR for _, _, kind in records)
            for what, old, new in (
                ("nlink", inode.nlink, nlink),
                ("its number of entries,", inode.size, len(records)),
            ):
                if old != new and ino not in self.made:
                    self.note("V2", f"corrected {what} {old} to {new}", ino)
            inode.nlink, inode.size = nlink, len(records)
        self.usage = items.encode_usage(total, len(self.inodes))
        if self.counted != (total, len(self.inodes)):
            said = "it was not there"
            if self.counted is not None:
                said = f"it said {self.counted[0]} bytes in {self.counted[1]}"
            self.note("V2", f"the usage is {total} bytes in {len(self.inodes)} inodes; {said}")

    # ------------------------------------------------------------------------------- the outcome

    def difference(self) -> list[Effect]:
        """Effects from what is stored to what was decided."""
        after = {items.inode_key(ino): inode.encode() for ino, inode in self.inodes.items()}
        after[items.USAGE_KEY] = self.usage
        buckets: dict[bytes, list[EntryRecord]] = {}
        for parent, records in self.names.items():
            for record in records.values():
                key = items.entry_key(parent, items.name_hash(self.salt, record[0]))
                buckets.setdefault(key, []).append(record)
        after.update((key, items.encode_entries(tuple(r))) for key, r in buckets.items())
        further: dict[bytes, list[bytes]] = {}
        for ino in self.extra:
            for parent, name in self.extra[ino] if ino in self.inodes else ():
                key = items.backlink_key(ino, parent, items.name_hash(self.salt, name))
                further.setdefault(key, []).append(name)
        after.update((key, items.encode_backlinks(tuple(n))) for key, n in further.items())
        after.update((items.orphan_key(ino), items.ORPHAN_VALUE) for ino in self.orphans)
        effects: list[Effect] = [
            (PUT, key, after[key]) for key in sorted(after) if self.before.get(key) != after[key]
        ]
        gone = [key for key in self.before if key not in after]
        for ino in self.attached:
            if ino not in self.inodes:
                gone += self.attached[ino]
        return effects + [(DELETE, key) for key in sorted(gone)]

    def show(self, text: str, ino: int) -> str:
        """A line about an inode, with its path if it has one now."""
        if not ino:
            return text
        path = self._path(ino)
        return f"inode {ino}{f' ({path})' if path else ''}: {text}"

    def _path(self, ino: int) -> str:
        parts: list[bytes] = []
        while ino != ROOT_INO:
            links = self.links.get(ino)
            if not links or len(parts) > 4096:
                return ""
            ino, name = links[0]
            parts.append(name)
        return "/" + b"/".join(reversed(parts)).decode(errors="backslashreplace")
