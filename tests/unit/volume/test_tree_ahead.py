"""Reading ahead in the tree: gets in the order of keys fetch many leaves at once."""

import pytest

from dfs.volume import tree
from dfs.volume.node import Missing
from dfs.volume.nodecache import NodeCache


def get(cache, root, key):
    return tree.get(cache.get, root, key)


def scan(cache, root, key):
    return dict(tree.scan(cache.get, root, key, key + b"\0"))[key]


def fetches(read, keys, root, blobs):
    cache = NodeCache()
    rounds = fetched = 0
    for key in keys:
        while True:
            try:
                assert read(cache, root, key) == b"v" * 500
                break
            except Missing as e:
                cache.add({h: blobs[h] for h in e.hashes})
                rounds += 1
                fetched += len(e.hashes)
    return rounds, fetched


@pytest.mark.parametrize("read", [get, scan])
def test_reads_in_order_fetch_ahead_and_others_do_not(read):
    keys = [b"%06d" % i for i in range(4000)]
    root, blobs = tree.build([(k, b"v" * 500) for k in keys], b"s" * 16)
    rounds, fetched = fetches(read, keys, root, blobs)
    assert fetched == len(blobs)  # nothing twice
    assert rounds < len(blobs) / (20 if read is get else 8)  # the longer in a row, the more
    leaves_apart = keys[:: len(keys) // 20]
    rounds, fetched = fetches(read, leaves_apart, root, blobs)
    assert fetched <= 2 * rounds  # far from the last one: its own leaf, and where its range ends
