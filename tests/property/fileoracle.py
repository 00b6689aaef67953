"""What files may contain while several operations on them are under way, and what a home holds.

Each operation takes effect at one moment between its call and its return.  A write does when the
client takes it into its buffer, of which the test is told.  A truncation does at a moment that
nobody knows: until it has returned, the file may be as it was or cut.  So a file's past is a list
of versions, and a version is every content that it may have had then.
"""

from itertools import pairwise

from dfs.codec import Buffer
from dfs.volume import effects as fx
from dfs.volume import entries, extents, items
from tests.unit.client.support import VOLUME


class Model:
    """The oracle of one file; `certain`: a truncation that was seen to be done will not fail."""

    def __init__(self, ino: int, *, certain: bool = True) -> None:
        self.ino = ino
        self.certain = certain
        self.leaving = 0  # names and handles that are on their way to be removed
        self.names: set[bytes] = set()
        self.handles = 0
        self.states: list[tuple[bytes, bool]] = [(b"", False)]  # (content, whether it is cut)
        self.versions: list[tuple[bytes, ...]] = [(b"",)]
        self.edges = {0}  # where contents may differ from each other
        self.floor = 0  # index of the oldest version that may be found after a crash
        self.cut_at = 0  # index of the newest version that is there because of a truncation
        self.cutting: int | None = None  # size of the truncation under way
        self.gone = False  # it has neither names nor handles
        self.owed = False  # something was lost that nobody was told
        self.busy = 0  # changes of times under way
        self.mtime = 0
        self.times: tuple[int, int] | None = None  # (mtime that was set, version then)

    @property
    def now(self) -> int:
        """Index of the newest version."""
        return len(self.versions) - 1

    @property
    def newest(self) -> bytes:
        """A content that it may have now."""
        return self.states[-1][0]

    def _push(self, states: list[tuple[bytes, bool]]) -> None:
        self.states = list(dict.fromkeys(states))
        self.versions.append(tuple(dict.fromkeys(c for c, _ in self.states)))

    def write(self, at: int, data: bytes) -> None:
        """A write was accepted."""
        self.edges |= {at, at + len(data)}
        states = [(over(c, at, data), cut) for c, cut in self.states]
        if self.cutting is not None:
            states += [(resized(c, self.cutting), True) for c, cut in states if not cut]
        self._push(states)

    def begin_cut(self, size: int) -> None:
        """A truncation was asked for."""
        self.cutting = size
        self.edges.add(size)
        self._push(self.states + [(resized(c, size), True) for c, _ in self.states])
        self.cut_at = self.now

    def end_cut(self, done: bool | None) -> None:
        """It was done, or not, or nobody knows."""
        self.cutting = None
        left = [(c, False) for c, cut in self.states if done is None or cut == done]
        self._push(left)
        self.cut_at = self.now

    def rebase(self, content: bytes) -> None:
        """What was not on stable storage is lost."""
        self._push([(content, False)])
        if self.cutting is not None:
            self._push([*self.states, (resized(content, self.cutting), True)])
        self.floor = self.now

    # ------------------------------------------------------------------ checks

    def check_read(self, since: int, at: int, length: int, got: Buffer) -> None:
        """What a read that began at version `since` returned now."""
        seen = {c[at : at + length] for v in self.versions[since:] for c in v}
        assert bytes(got) in seen, f"{len(seen)} contents possible: {describe(got, at, seen)}"
        left = [s for s in self.states if s[0][at : at + length] == bytes(got)]
        known = self.certain and (self.cutting is None or all(cut for _, cut in left))
        if since == self.now and known and len(left) < len(self.states):
            self._push(left)  # later ones will not see what this one could not have

    def check_size(self, since: int, size: int) -> None:
        """What getattr said."""
        seen = {len(c) for v in self.versions[since:] for c in v}
        assert size in seen, f"size {size}, not one of {sorted(seen)}"

    def check_disk(self, content: bytes | None, since: int) -> None:
        """What a crash leaves now must not be older than version `since`."""
        if content is None:
            assert not since, "a file that was synced is not there"
            return
        possible = list(dict.fromkeys(c for v in self.versions[since:] for c in v))
        if self.cut_at < since:
            assert content in possible, describe(content, 0, possible)
            return
        # Data before a truncation may be committed after it: each byte may be of another version.
        assert len(content) in {len(c) for c in possible}
        edges = [*sorted(e for e in self.edges if e < len(content)), len(content)]
        for begin, end in pairwise(edges):
            part = content[begin:end]
            wanted = {c[begin:end].ljust(end - begin, b"\0") for c in possible}
            assert part in wanted, describe(part, begin, wanted)


def over(content: bytes, at: int, data: bytes) -> bytes:
    """`content` after a write."""
    return content[:at].ljust(at, b"\0") + data + content[at + len(data) :]


def resized(content: bytes, size: int) -> bytes:
    """`content` after a truncation."""
    return content[:size].ljust(size, b"\0")


def describe(got: Buffer, at: int, wanted: "set[bytes] | list[bytes]") -> str:
    """Where bytes differ from the nearest of those that were possible."""

    def first(other: bytes) -> int:
        same = next((i for i, (a, b) in enumerate(zip(got, other, strict=False)) if a != b), None)
        return min(len(got), len(other)) if same is None else same

    best = max(wanted, key=first, default=b"")
    i = first(best)
    return (
        f"{len(got)} bytes at {at}, {bytes(got[i : i + 16])!r} at {at + i};"
        f" nearest: {len(best)} bytes, {best[i : i + 16]!r}"
    )


class Disk:
    """What a crash of the client leaves: the home's journal, folded, and chunks that are durable."""

    def __init__(self, home) -> None:
        self.home = home
        self.items: dict[bytes, bytes] = {}
        self.seq = 0

    def get(self, key: bytes) -> bytes | None:
        return self.items.get(key)

    def put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            self.items.pop(key, None)
        else:
            self.items[key] = value

    def delete_range(self, start: bytes, end: bytes) -> None:
        for key in [k for k in self.items if start <= k < end]:
            del self.items[key]

    def look(self) -> None:
        """Take in what was committed since."""
        log = self.home.volumes[VOLUME].log
        for data in log[self.seq :]:
            fx.apply(self, fx.of_entry(entries.decode(data)))
        self.seq = len(log)

    def content(self, ino: int) -> bytes | None:
        """A file's bytes; None if it is not there."""
        self.look()
        value = self.items.get(items.inode_key(ino))
        if value is None:
            return None
        prefix = items.group(ino, items.EXTENT)
        found = extents.decode(sorted((k, v) for k, v in self.items.items() if k[:9] == prefix))
        parts = []
        for piece in extents.plan_read(found, 0, items.Inode.decode(value).size):
            if piece.kind == extents.CHUNK:
                chunks = self.home.chunks
                assert piece.chunk_id in chunks.durable, "a chunk that is committed is not durable"
                chunk = chunks.stored[piece.chunk_id]
                parts.append(chunk[piece.chunk_offset : piece.chunk_offset + piece.length])
            else:
                parts.append(piece.data or bytes(piece.length))
        return b"".join(parts)
