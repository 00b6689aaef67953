"""What the kernel knows of our inodes: lookup counts and names, in few bytes each.

The kernel counts how often it was given an inode (lookup, create, mkdir, link, an entry of readdir)
and takes that back with FORGET.  What it has not forgotten it may have cached, so this table says
what to invalidate when somebody else changes something.

The kernel forgets when it wants memory, which on a large machine is never: a walk over a million
files leaves a million inodes here.  So an inode costs two places in dicts and two bytes objects,
and the table has a budget: beyond it `prune` is called with those that were first looked up
longest ago.  Whoever serves that asks the kernel to forget those of them that nobody uses.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from dfs.volume.items import GROUP_SIZE

Name = tuple[int, bytes]  # (parent, name)

BUDGET = 128 << 20  # bytes: half a million inodes with short names
PER_INODE = 256  # bytes of an inode beyond its name, roughly
KEY_SIZE = GROUP_SIZE + 8  # bytes of an ENTRY's key: parent, type, hash of the name


class InodeTable:
    """Inodes that the kernel holds; the root is always held.

    A *place* is an ENTRY's key and the name behind it, in one bytes object; it begins with the
    parent.  Hashes of two names of a directory are hardly ever equal, so a key has one inode, and
    any others stand aside.
    """

    __slots__ = ("_also", "_by_key", "_counts", "_places", "_prune", "_prune_at", "budget", "used")

    def __init__(
        self, budget: int = BUDGET, prune: Callable[[list[int]], None] = lambda _: None
    ) -> None:
        """Empty; `prune(inodes)` is called, and must not block, when it takes over `budget` bytes.

        The inodes stay until `forget`.  Those that are refused are offered again when all others
        were.
        """
        self.budget = budget
        self.used = 0  # bytes, roughly
        self._prune = prune
        self._prune_at = budget
        self._places: dict[int, bytes] = {}  # inode -> its last known place
        self._counts: dict[int, int] = {}  # inode -> lookup count, if that is more than 1
        self._by_key: dict[bytes, int] = {}  # ENTRY key -> inode
        self._also: dict[bytes, list[int]] = {}  # ENTRY key -> other inodes

    def __len__(self) -> int:
        """Number of inodes held."""
        return len(self._places)

    def __contains__(self, ino: object) -> bool:
        """Whether the kernel holds the inode."""
        return ino in self._places or ino == 1

    def looked_up(self, ino: int, key: bytes, name: bytes) -> None:
        """The kernel was given an inode by name; `key` is the ENTRY's key."""
        place = key + name
        old = self._places.get(ino)
        if old is not None:
            self._counts[ino] = self._counts.get(ino, 1) + 1
            if old == place:
                return
            self._leave(ino, old)
            self._enter(ino, key, place)
            return
        self._enter(ino, key, place)
        if self.used > self._prune_at:
            self._crowded()

    def moved(self, ino: int, key: bytes, name: bytes) -> None:
        """A held inode has another name now; `key` is the new ENTRY's."""
        old = self._places.get(ino)
        if old is not None:
            self._leave(ino, old)
            self._enter(ino, key, key + name)

    def forget(self, ino: int, count: int) -> bool:
        """The kernel gives back references; True when it holds the inode no more."""
        counts = self._counts
        left = (counts.get(ino, 1) if counts else 1) - count
        if left > 0:
            if left > 1:
                counts[ino] = left
            else:
                del counts[ino]
            return False
        counts.pop(ino, None)
        place = self._places.pop(ino, None)
        if place is not None:
            self._leave(ino, place)
            if self.used <= self.budget:
                self._prune_at = self.budget
        return True

    def _enter(self, ino: int, key: bytes, place: bytes) -> None:
        self._places[ino] = place
        self.used += PER_INODE + len(place)
        if self._by_key.setdefault(key, ino) != ino:
            self._also.setdefault(key, []).append(ino)

    def _leave(self, ino: int, place: bytes) -> None:
        self.used -= PER_INODE + len(place)
        key = place[:KEY_SIZE]
        others = self._also.get(key)
        if others is None:
            del self._by_key[key]
            return
        if self._by_key[key] == ino:
            self._by_key[key] = others.pop()
        else:
            others.remove(ino)
        if not others:
            del self._also[key]

    def _crowded(self) -> None:
        """Offer the oldest sixteenth to `prune`; they count as the youngest from now on."""
        places = self._places
        oldest = list(islice(places, len(places) // 16 + 1))
        for ino in oldest:
            places[ino] = places.pop(ino)
        # What is refused shall not be asked for with each lookup: some room until the next time.
        self._prune_at = self.used + (self.budget >> 5)
        self._prune(oldest)

    def _held(self, key: bytes) -> Iterator[int]:
        """Inodes whose names have this hash."""
        first = self._by_key.get(key)
        if first is not None:
            yield first
            yield from self._also.get(key, ())

    def find(self, key: bytes, name: bytes) -> int:
        """The inode that the kernel knows by a name, 0 if none."""
        place = key + name
        return next((ino for ino in self._held(key) if self._places[ino] == place), 0)

    def names(self, key: bytes) -> list[bytes]:
        """Names that the kernel may have cached from a bucket of a directory."""
        return [self._places[ino][KEY_SIZE:] for ino in self._held(key)]

    def all(self) -> list[int]:
        """All inodes held."""
        return list(self._places)

    def places(self) -> list[Name]:
        """All names the kernel may have cached."""
        return [
            (int.from_bytes(place[:8], "big"), place[KEY_SIZE:]) for place in self._places.values()
        ]

    def statistics(self) -> dict[str, int]:
        """Counters for people."""
        return {"inodes": len(self._places), "used": self.used, "budget": self.budget}
