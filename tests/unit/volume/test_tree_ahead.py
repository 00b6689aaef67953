"""Reading ahead in the tree: gets in the order of keys fetch many leaves at once."""

from dfs.volume import tree
from dfs.volume.node import Missing
from dfs.volume.nodecache import NodeCache


def fetches(keys, root, blobs):
    cache = NodeCache()
    rounds = fetched = 0
    for key in keys:
        while True:
            try:
                assert tree.get(cache.get, root, key) == b"v" * 500
                break
            except Missing as e:
                cache.add({h: blobs[h] for h in e.hashes})
                rounds += 1
                fetched += len(e.hashes)
    return rounds, fetched


def test_gets_in_order_fetch_ahead_and_others_do_not():
    keys = [b"%06d" % i for i in range(4000)]
    root, blobs = tree.build([(k, b"v" * 500) for k in keys], b"s" * 16)
    rounds, fetched = fetches(keys, root, blobs)
    assert fetched == len(blobs)  # nothing twice
    assert rounds < len(blobs) / 8
    leaves_apart = keys[:: len(keys) // 20]
    rounds, fetched = fetches(leaves_apart, root, blobs)
    assert fetched == rounds  # a get far from the last one takes its own leaf only
