"""Snapshots: the state of a store at one moment, for reads that take longer than one turn."""

from collections.abc import Iterator
from typing import Self

from dfs.errors import InvalidArgument
from metadata.store.reader import Reader

SCAN_LIMIT = 1000

Item = tuple[bytes, bytes]


class Snapshot:
    """A consistent view, also of the time: what had not expired then is there.

    Holds memtables in memory and tables on disk, even those that merges replace meanwhile, until
    it is closed or dropped, and its iterators are.  Their names are gone by then; the kernel frees
    the space when the last reader goes, or the process dies.
    """

    __slots__ = ("_reader",)

    def __init__(self, reader: Reader) -> None:
        """Made by `Store.snapshot`."""
        self._reader: Reader | None = reader

    def _open(self) -> Reader:
        if self._reader is None:
            raise InvalidArgument("the snapshot is closed; take another one")
        return self._reader

    def get(self, key: bytes) -> bytes | None:
        """See `Store.get`."""
        return self._open().get(key)

    def scan(
        self,
        prefix: bytes,
        after: bytes = b"",
        limit: int = SCAN_LIMIT,
        *,
        end: bytes = b"",
        skip_lost: bool = False,
    ) -> list[Item]:
        """See `Store.scan`."""
        start, stop = bounds(prefix, after, end)
        return self._open().scan(start, stop, limit, skip_lost=skip_lost)

    def iterate(
        self,
        prefix: bytes = b"",
        after: bytes = b"",
        end: bytes = b"",
        *,
        skip_lost: bool = False,
    ) -> Iterator[Item]:
        """See `Store.iterate`."""
        start, stop = bounds(prefix, after, end)
        return _items(self._open(), start, stop, skip_lost)

    def close(self) -> None:
        """Let go of everything; iterators that are under way go on.  Fine to call twice."""
        self._reader = None

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *exc: object) -> None:
        """See `close`."""
        self.close()


def _items(reader: Reader, start: bytes, end: bytes, skip_lost: bool) -> Iterator[Item]:
    for stretch in reader.stretches(start, end, skip_lost=skip_lost):
        yield from stretch


def bounds(prefix: bytes, after: bytes, end: bytes) -> tuple[bytes, bytes]:
    """[start, end) of the keys with a prefix, above one key and below another if given."""
    start = max(prefix, after + b"\0") if after else prefix
    stop = prefix_end(prefix)
    if end:
        stop = min(end, stop) if stop else end
    return start, stop


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with the prefix; empty if there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b""
