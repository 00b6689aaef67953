"""Cost of the prolly tree and of views on a volume of files: `python tests/bench/bench_tree.py`.

Prints microseconds per item; asserts nothing.
"""

import os
import random
import time

from dfs.volume import items, tree
from dfs.volume.node import Missing
from dfs.volume.nodecache import NodeCache
from dfs.volume.view import View

SALT = b"s" * 16


def files(first, count):
    """Three items for each file: inode, directory entry, extent."""
    made = []
    for i in range(first, first + count):
        ino = i + 10
        now = 1_700_000_000_000_000_000 + i
        attributes = items.Inode(8, 0o644, 1000, 1000, 0, 4096, 1, now, now, now, now, 1)
        made.append((items.inode_key(ino), attributes.encode()))
        name = b"file%08d" % i
        key = items.entry_key(1, items.name_hash(SALT, name))
        made.append((key, items.encode_entries(((name, ino, 8),))))
        made.append((items.extent_key(ino, 0), items.encode_chunk(4096, os.urandom(32), 0, 4096)))
    made.sort()
    return made


def report(what, seconds, count, note=""):
    """One line."""
    print(f"{what:28s} {seconds / count * 1e6:8.2f} us/item  {note}")


def main():
    """Run all."""
    content = files(0, 100_000)
    clock = time.process_time
    t = clock()
    root, nodes = tree.build(content, SALT)
    size = sum(map(len, nodes.values()))
    report(
        "build",
        clock() - t,
        len(content),
        f"{len(nodes)} nodes, {size / len(nodes):.0f} bytes mean, {size / 1e6:.1f} MB",
    )
    cache = NodeCache(1 << 30)
    t = clock()
    cache.add(nodes)
    report(
        "add to cache (verify+decode)",
        clock() - t,
        len(content),
        f"{(clock() - t) / len(nodes) * 1e6:.0f} us/node, {cache.used / 1e6:.0f} MB used",
    )
    print("height", cache.get(root).level + 1)
    t = clock()
    count = sum(1 for _ in tree.scan(cache.get, root))
    report("scan, warm", clock() - t, count)
    t = clock()
    cold = NodeCache(1 << 30)
    rounds = 0
    while True:
        try:
            for _ in tree.scan(cold.get, root):
                pass
            break
        except Missing as e:
            rounds += 1
            for name in e.hashes:
                cold.add({name: nodes[name]})
            # a caller goes on where it stopped; here: only fetch
            try:
                for _, node in tree.reachable(cold.get, root, set()):
                    if node.level == 1:
                        for name in node.values:
                            if name not in cold:
                                cold.add({name: nodes[name]})
            except Missing:
                pass
    report("scan, cold", clock() - t, count, f"{rounds} rounds")
    new = files(100_000, 10_000)
    t = clock()
    root2, made = tree.apply(cache.get, root, new, SALT)
    report("apply 30k creations", clock() - t, len(new), f"{len(made)} new nodes")
    cache.add(made)
    chosen = sorted(random.Random(1).sample(content, 3000))
    t = clock()
    root3, made = tree.apply(cache.get, root2, [(k, v + b"x") for k, v in chosen], SALT)
    report("apply 3000 scattered", clock() - t, 3000, f"{len(made)} new nodes")
    cache.add(made)
    t = clock()
    changed = len(tree.diff(cache.get, root2, root3))
    report("diff", clock() - t, changed)
    chosen = [k for k, _ in random.Random(2).sample(content, 20000)]
    t = clock()
    for key in chosen:
        tree.get(cache.get, root3, key)
    report("tree.get", clock() - t, len(chosen))
    view = View(cache, root3, 0, SALT)
    t = clock()
    for key in chosen:
        view.get(key)
    report("View.get from the tree", clock() - t, len(chosen))
    txn = view.begin()
    t = clock()
    for key in chosen:
        txn.get(key)
    report("Txn.get from the tree", clock() - t, len(chosen))


if __name__ == "__main__":
    main()
