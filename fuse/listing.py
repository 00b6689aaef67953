"""Who reads a large directory: only its names, or does it look at what it is shown?

Attributes make an entry ten times as expensive: they are spread over the tree, the kernel makes an
inode of each, and it has to be forgotten later.  So a large directory is first shown as bare names.
A reader that wants more looks each of them up; then the next page has attributes, but for its first
entry: as long as that is looked up, the reader is still interested.  (Linux has the same rule for
file systems that let it choose, FUSE_READDIRPLUS_AUTO; pyfuse3 does not.)
"""

LARGE = 50_000  # entries; about as many as are listed within the second that attributes are valid
SHARE = 4  # of the entries of a page one in so many must be looked up


class Listing:
    """One reader of a large directory."""

    __slots__ = ("_looked", "_probe", "_shown", "bare", "ino")

    def __init__(self, ino: int) -> None:
        """At its beginning."""
        self.ino = ino
        self.bare = True  # whether the page to come, or being read, has names only
        self._probe: bytes | None = None
        self._shown = self._looked = 0

    def turn(self) -> bool:
        """The next page begins; whether it has names only."""
        if self._shown:
            self.bare = self._looked * SHARE < self._shown
        self._probe = None
        self._shown = self._looked = 0
        return self.bare

    def shown(self, count: int, probe: bytes | None = None) -> None:
        """So many bare names were shown; `probe` is the only one if the others have attributes."""
        self._shown += count
        self._probe = probe

    def looked_up(self, name: bytes) -> None:
        """Somebody looked up a name of this directory."""
        if self._probe is None or name == self._probe:
            self._looked += 1


class Listings:
    """The readers of large directories, by handle and by directory."""

    __slots__ = ("_by_handle", "_by_ino", "large")

    def __init__(self, large: int = LARGE) -> None:
        """A directory of more than `large` entries is large."""
        self.large = large
        self._by_handle: dict[int, Listing] = {}
        self._by_ino: dict[int, list[Listing]] = {}

    def __len__(self) -> int:
        """Number of readers."""
        return len(self._by_handle)

    def begin(self, handle: int, ino: int, size: int) -> None:
        """A reader is at the beginning of a directory of `size` entries."""
        self.end(handle)
        if size > self.large:
            listing = self._by_handle[handle] = Listing(ino)
            self._by_ino.setdefault(ino, []).append(listing)

    def get(self, handle: int) -> Listing | None:
        """The reader, if its directory is large."""
        return self._by_handle.get(handle)

    def end(self, handle: int) -> None:
        """The handle is closed, or read from the beginning again."""
        listing = self._by_handle.pop(handle, None)
        if listing is not None:
            others = self._by_ino[listing.ino]
            others.remove(listing)
            if not others:
                del self._by_ino[listing.ino]

    def looked_up(self, ino: int, name: bytes) -> None:
        """A name of a directory was looked up and found."""
        for listing in self._by_ino.get(ino, ()):
            listing.looked_up(name)
