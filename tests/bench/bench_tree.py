"""Cost of the prolly tree and of views on a volume of files: `python tests/bench/bench_tree.py`.

Prints microseconds per item; asserts nothing.
"""

import os
import random
import time

from dfs.volume import effects as fx
from dfs.volume import entries, items, tree
from dfs.volume.effects import of_entry
from dfs.volume.fold import fold
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


def creation(i):
    """Journal entry of the creation of a file."""
    ino, name = 1_000_000 + i, b"new%d" % i
    made = (
        (
            fx.PUT,
            items.entry_key(1, items.name_hash(SALT, name)),
            items.encode_entries(((name, ino, 8),)),
        ),
        (fx.PUT, items.inode_key(ino), items.Inode(8, 0o644).encode()),
        (fx.PATCH, items.inode_key(1), ((items.F_MTIME, fx.LAST, i), (items.F_CTIME, fx.LAST, i))),
        (fx.PATCH, items.USAGE_KEY, ((items.F_USAGE_INODES, fx.ADD, 1),)),
    )
    return entries.encode(entries.DATA, i, ((7, i, (True,), made),))


def operation(view, ino):
    """What a creation does, as a transaction."""
    txn = view.begin()
    name = b"name%d" % ino
    txn.get(items.inode_key(1))
    key = items.entry_key(1, items.name_hash(SALT, name))
    if txn.get(key) is None:
        txn.put(key, items.encode_entries(((name, ino, 8),)))
        txn.put(items.inode_key(ino), items.Inode(8, 0o644).encode())
        txn.patch(items.inode_key(1), ((items.F_MTIME, fx.LAST, 1),))
        txn.patch(items.USAGE_KEY, ((items.F_USAGE_INODES, fx.ADD, 1),))


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
    journal = [creation(i) for i in range(20_000)]
    view.get(items.USAGE_KEY)
    t = clock()
    for seq, entry in enumerate(journal, 1):
        view.apply_entry(seq, entry)
    report("apply_entry, one creation", clock() - t, len(journal))
    chosen = [items.inode_key(1_000_000 + i) for i in range(20_000)]
    t = clock()
    for key in chosen:
        view.get(key)
    report("View.get from the overlay", clock() - t, len(chosen))
    t = clock()
    for key in chosen:
        view.begin().get(key)
    report("begin + Txn.get, overlay", clock() - t, len(chosen))
    t = clock()
    for i in range(5000):
        operation(view, 2_000_000 + i)
    report("creation as a Txn", clock() - t, 5000)
    t = clock()
    found = view.begin().scan(items.group(1, items.ENTRY))
    report("scan a directory", clock() - t, len(found), f"{len(found)} entries")
    pages, after = 0, b""
    t = clock()
    while page := view.begin().scan(items.group(1, items.ENTRY), after, 128):
        after = page[-1][0]
        pages += 1
    report(
        "scan it by pages of 128",
        clock() - t,
        len(found),
        f"{(clock() - t) / pages * 1e6:.0f} us/page",
    )
    effects = [e for entry in journal for e in of_entry(entries.decode(entry))]
    t = clock()
    _, made = fold(cache.get, root3, SALT, effects)
    report("fold 20k creations", clock() - t, len(journal), f"{len(made)} new nodes")
    t = clock()
    view.rebase(root3, 20_000)
    report("rebase", clock() - t, len(journal))


if __name__ == "__main__":
    main()
