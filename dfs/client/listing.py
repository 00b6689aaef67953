"""What a directory contains, a page at a time: with attributes or names only, as pure operations.

A directory's entries lie in the order of a hash, its inodes in the order in which they were made.
So a page of names is a leaf or two of the tree, and their attributes are spread over as many leaves
as there are names: in a large directory whoever wants names only should not ask for more.
"""

from collections.abc import Collection, Iterator

from dfs.client import attributes
from dfs.client.attributes import Attr
from dfs.volume import items
from dfs.volume.node import Missing
from dfs.volume.view import Txn

Name = tuple[bytes, int, int, int]  # (name, cookie, inode, kind)
Entry = tuple[bytes, int, Attr]  # (name, cookie, attributes)


def names(txn: Txn, ino: int, cookie: int, limit: int, taken: Collection[bytes]) -> Iterator[Name]:
    """Names after `cookie`, or at it and not in `taken` if that is given, of `limit` buckets."""
    prefix = items.group(ino, items.ENTRY)
    after = cookie - 1 if taken else cookie
    begin = items.entry_key(ino, after) if after > 0 else b""
    suffix, decode = items.suffix_u64, items.decode_entries
    for key, value in txn.scan(prefix, begin, limit):
        at = suffix(key)
        bucket = decode(value)
        if at != cookie and len(bucket) == 1:
            name, child, kind = bucket[0]
            yield name, at, child, kind
            continue
        for name, child, kind in sorted(bucket):
            if at != cookie or name not in taken:
                yield name, at, child, kind


def entries(txn: Txn, ino: int, cookie: int, limit: int, taken: Collection[bytes]) -> list[Entry]:
    """The same with attributes.

    Raises `Missing` with all that the attributes of the page need, so that it is fetched at once.
    """
    found: list[Entry] = []
    absent: list[bytes] = []
    get_attr = attributes.get_attr
    for name, at, child, _ in names(txn, ino, cookie, limit, taken):
        try:
            found.append((name, at, get_attr(txn, child)))
        except Missing as e:
            absent += e.hashes
    if absent:
        raise Missing(*dict.fromkeys(absent))
    return found
