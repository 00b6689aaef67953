"""What the kernel knows of our inodes: lookup counts and names.

The kernel counts how often it was given an inode (lookup, create, mkdir, link, an entry of readdir)
and takes that back with FORGET.  What it has not forgotten it may have cached, so this table says
what to invalidate when somebody else changes something.
"""

Name = tuple[int, bytes]  # (parent, name)


class InodeTable:
    """Inodes that the kernel holds; the root is always held."""

    __slots__ = ("_buckets", "_counts", "_places")

    def __init__(self) -> None:
        """Empty."""
        self._counts: dict[int, int] = {}
        self._places: dict[int, tuple[bytes, Name]] = {}  # inode -> its last known place
        self._buckets: dict[bytes, dict[bytes, int]] = {}  # ENTRY key -> name -> inode

    def __len__(self) -> int:
        """Number of inodes held."""
        return len(self._counts)

    def __contains__(self, ino: object) -> bool:
        """Whether the kernel holds the inode."""
        return ino in self._counts or ino == 1

    def looked_up(self, ino: int, key: bytes, parent: int, name: bytes) -> None:
        """The kernel was given an inode by name; `key` is the ENTRY's key."""
        self._counts[ino] = self._counts.get(ino, 0) + 1
        old = self._places.get(ino)
        if old is not None:
            if old[0] == key and old[1][1] == name:
                return
            self._forget_place(ino, old)
        self._places[ino] = (key, (parent, name))
        self._buckets.setdefault(key, {})[name] = ino

    def moved(self, ino: int, key: bytes, parent: int, name: bytes) -> None:
        """A held inode has another name now; `key` is the new ENTRY's."""
        old = self._places.get(ino)
        if old is not None:
            self._forget_place(ino, old)
            self._places[ino] = (key, (parent, name))
            self._buckets.setdefault(key, {})[name] = ino

    def forget(self, ino: int, count: int) -> bool:
        """The kernel gives back references; True when it holds the inode no more."""
        left = self._counts.get(ino, 0) - count
        if left > 0:
            self._counts[ino] = left
            return False
        self._counts.pop(ino, None)
        place = self._places.pop(ino, None)
        if place is not None:
            self._forget_place(ino, place)
        return True

    def _forget_place(self, ino: int, place: tuple[bytes, Name]) -> None:
        bucket = self._buckets.get(place[0])
        if bucket is not None and bucket.get(place[1][1]) == ino:
            del bucket[place[1][1]]
            if not bucket:
                del self._buckets[place[0]]

    def find(self, key: bytes, name: bytes) -> int:
        """The inode that the kernel knows by a name, 0 if none."""
        bucket = self._buckets.get(key)
        return bucket.get(name, 0) if bucket is not None else 0

    def names(self, key: bytes) -> list[bytes]:
        """Names that the kernel may have cached from a bucket of a directory."""
        return list(self._buckets.get(key, ()))

    def all(self) -> list[int]:
        """All inodes held."""
        return list(self._counts)

    def places(self) -> list[Name]:
        """All names the kernel may have cached."""
        return [place[1] for place in self._places.values()]
