"""Folding entries into a tree, here and in a worker process."""

from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.cluster.map import ClusterMap, Node
from dfs.errors import NoQuorum, NotFound
from dfs.hashing import digest
from dfs.rpc.endpoint import RpcEndpoint
from dfs.rpc.processes import WorkerProcesses
from dfs.volume import entries, tree
from dfs.volume.effects import ADD, DELETE, DELETE_RANGE, PATCH, PUT, apply
from dfs.volume.items import (
    DIR,
    EXTENT,
    F_NLINK,
    Inode,
    encode_inline,
    extent_key,
    group,
    group_end,
    inode_key,
)
from dfs.volume.nodecache import NodeCache
from metadata import checkpoint
from metadata.checkpoint import estimate, fold, process_folder

SALT = b"salt of a volume"


class FakeBlobs:
    """A `BlobClient` on a dict."""

    def __init__(self):
        self.stored = {}
        self.gets = 0
        self.broken = False

    async def put_many(self, blobs, *, timeout):
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise NoQuorum("broken")
        self.stored.update((digest(b), b) for b in blobs)
        return [digest(b) for b in blobs]

    async def get_many(self, hashes, *, timeout):
        await trio.lowlevel.checkpoint()
        self.gets += 1
        assert self.gets < 1000, "the same nodes again and again"
        absent = [h for h in hashes if h not in self.stored]
        if absent:
            raise NotFound("absent", *absent)
        return {h: self.stored[h] for h in hashes}


class Target(dict):
    def put(self, key, value):
        if value is None:
            self.pop(key, None)
        else:
            self[key] = value

    def delete_range(self, start, end):
        for key in [k for k in self if start <= k < end]:
            del self[key]


def effect(r):
    ino = r.randrange(1, 400)
    x = r.random()
    if x < 0.5:
        return (PUT, inode_key(ino), Inode(DIR, 0, size=r.randrange(1 << 40)).encode())
    if x < 0.65:
        return (PUT, extent_key(ino, r.randrange(20)), encode_inline(bytes(r.randrange(1, 300))))
    if x < 0.8:
        return (PATCH, inode_key(ino), ((F_NLINK, ADD, 1),))
    if x < 0.95:
        return (DELETE, inode_key(ino))
    return (DELETE_RANGE, group(ino, EXTENT), group_end(group(ino, EXTENT)))


def data(effects):
    return entries.encode(entries.DATA, 1, ((1, 1, (True,), tuple(effects)),))


@pytest.mark.parametrize("seed", range(4))
async def test_a_fold_is_the_tree_of_what_the_entries_leave(seed):
    r, blobs, target, root = Random(seed), FakeBlobs(), Target(), b""
    for _ in range(6):
        batch = [[effect(r) for _ in range(r.randrange(1, 40))] for _ in range(10)]
        for effects in batch:
            apply(target, effects)
        root, size = await fold(blobs, root, SALT, [data(effects) for effects in batch])
        assert root == tree.build(sorted(target.items()), SALT)[0]
        stored = sum(len(k) + len(v) for k, v in target.items())
        assert stored / 3 < size < stored * 3
    cache = NodeCache()
    cache.add(blobs.stored)
    assert tree.check(cache.get, root, SALT) == len(target)


async def test_twice_the_same_fold_is_the_same_root():
    r, blobs = Random(1), FakeBlobs()
    batch = [data([effect(r) for _ in range(50)])]
    first = await fold(blobs, b"", SALT, batch)
    stored = dict(blobs.stored)
    assert await fold(blobs, b"", SALT, batch) == first
    assert blobs.stored == stored


async def test_nodes_come_level_by_level():
    r, blobs = Random(1), FakeBlobs()
    root, _ = await fold(blobs, b"", SALT, [data([effect(r) for _ in range(3000)])])
    await fold(blobs, root, SALT, [data([effect(r) for _ in range(200)])])
    assert 1 <= blobs.gets <= 4


async def test_a_slice_that_needs_more_room_gets_it(monkeypatch):
    r, blobs = Random(1), FakeBlobs()
    effects = [(PUT, extent_key(7, n), encode_inline(bytes(200))) for n in range(3000)]
    root, _ = await fold(blobs, b"", SALT, [data(effects)])
    monkeypatch.setattr(checkpoint, "CACHE_BYTES", 100_000)
    everything = (DELETE_RANGE, group(7, EXTENT), group_end(group(7, EXTENT)))
    emptied, _ = await fold(blobs, root, SALT, [data([everything, effect(r)])])
    assert emptied != root
    monkeypatch.setattr(checkpoint, "ROUNDS", 1 << 30)  # a mutant: it gets none
    with pytest.raises(AssertionError, match="again and again"):
        await fold(blobs, root, SALT, [data([everything])])


@pytest.mark.parametrize("seed", range(4))
async def test_nodes_that_are_not_stored_yet_outlast_the_cache(monkeypatch, seed):
    """Slices of large values make more nodes than fit; the next slice needs the last of them."""
    monkeypatch.setattr(checkpoint, "CACHE_BYTES", 50_000)
    r, blobs, target, root = Random(seed), FakeBlobs(), Target(), b""
    for _ in range(3):
        numbers = [(r.randrange(3), r.randrange(1500)) for _ in range(2500)]
        effects = [(PUT, extent_key(i + 7, n), encode_inline(r.randbytes(300))) for i, n in numbers]
        apply(target, effects)
        root, _ = await fold(blobs, root, SALT, [data(effects)])
        assert root == tree.build(sorted(target.items()), SALT)[0]
    cache = NodeCache()
    cache.add(blobs.stored)
    assert tree.check(cache.get, root, SALT) == len(target)


async def test_a_root_is_only_returned_when_its_nodes_are_stored():
    blobs = FakeBlobs()
    blobs.broken = True
    with pytest.raises(NoQuorum):
        await fold(blobs, b"", SALT, [data([effect(Random(1))])])


async def test_what_is_deleted_leaves_the_empty_tree():
    blobs = FakeBlobs()
    root, _ = await fold(blobs, b"", SALT, [data([(PUT, inode_key(5), Inode(DIR, 0).encode())])])
    assert await fold(blobs, root, SALT, [data([(DELETE, inode_key(5))])]) == (b"", 0)
    assert estimate(NodeCache().get, b"") == 0


@pytest.mark.realtime
async def test_a_worker_process_folds_over_the_network():
    stored = {}

    def put(_ctx, args, blobs):
        offset = 0
        for name, length in args[0]:
            stored[name] = bytes(blobs[offset : offset + length])
            offset += length
        return (len(args[0]),), b""

    def get(_ctx, args, _data):
        found = [stored.get(name) for name in args[0]]
        lengths = tuple(-1 if blob is None else len(blob) for blob in found)
        return (lengths,), [blob for blob in found if blob is not None]

    cluster_id = b"c" * 16
    server = RpcEndpoint(
        cluster_id=cluster_id, name="server", clock=SystemClock(), random=Random(1)
    )
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, WorkerProcesses(1) as processes:
            await nursery.start(server.run)

            async def serve(task_status):
                handlers = {"blob.put": put, "blob.get": get}
                await server.serve("tcp://127.0.0.1:0", handlers, started=task_status.started)

            address = await nursery.start(serve)
            node = Node(1, b"n" * 16, "node1", "z", "r", "h", address, "tcp://127.0.0.1:9")
            cluster = ClusterMap.create(cluster_id, [node])
            folder = process_folder(processes, lambda: cluster)
            r, target = Random(2), Target()
            first, second = ([effect(r) for _ in range(500)] for _ in range(2))
            root, _ = await folder(b"", SALT, [data(first)])
            root, size = await folder(root, SALT, [data(second)])
            apply(target, first + second)
            assert root == tree.build(sorted(target.items()), SALT)[0]
            assert size > 0
            nursery.cancel_scope.cancel()
