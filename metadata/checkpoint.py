"""Checkpoints: folding journal entries into the volume's tree.

A fold reads the nodes it needs as blobs, computes the tree that holds the entries' effects, and
stores the new nodes on W homes each *before* it returns, so that a root that reaches the journal
can be read.  It is a pure function of its arguments (equal content, equal tree): two folds of the
same entries, at two homes or twice at one, store the same blobs and return the same root.

Folding holds the GIL for seconds, so production runs it in another process (`process_folder`); the
simulator and tests run it in place (`inline_folder`).  It goes through the keys in slices
(`dfs.volume.slices`): it holds a part of the effects and the nodes of one slice, however many
nodes of a large tree the entries touch, and the entries lie outside the process (`metadata.spool`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from random import SystemRandom

import trio

from dfs.clock import SystemClock
from dfs.cluster.map import ClusterMap
from dfs.env import Processes
from dfs.rpc.blobs import BlobClient
from dfs.rpc.endpoint import RpcEndpoint
from dfs.volume import entries as journal
from dfs.volume.effects import Effect, of_entry
from dfs.volume.fold import fold as fold_effects
from dfs.volume.node import GetNode, Missing, Node
from dfs.volume.nodecache import NodeCache
from dfs.volume.slices import settle, slices
from metadata.spool import Spooled, spool
from metadata.volumehome import Folder

CACHE_BYTES = 16 << 20  # of nodes; a slice touches some 10 MiB, and needs them at the same time
ROUNDS = 16  # of fetching nodes for one slice, after which it gets twice the room
PUT_BYTES = 4 << 20  # of nodes that are stored at a time
TIMEOUT = 60.0  # seconds for each exchange of blobs
SAMPLE = 256  # nodes of a level that an estimate looks at
WORKER = "metadata.checkpoint:fold_in_worker"


class _Effects:
    """The effects of journal entries, in order, decoded anew each time."""

    def __init__(self, entries: Iterable[bytes]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[Effect]:
        for entry in self._entries:
            yield from of_entry(journal.decode(entry))


async def fold(
    blobs: BlobClient, root: bytes, salt: bytes, entries: Iterable[bytes]
) -> tuple[bytes, int]:
    """(new root, estimated bytes of the tree) after the effects of DATA entries, oldest first.

    The entries are gone through several times.  Raises `NoQuorum` or `NotFound` when nodes cannot
    be read or stored, `Corrupt` for an entry or a node that is none.
    """
    cache = NodeCache(CACHE_BYTES, pack=False)
    made: dict[bytes, bytes] = {}  # final ones, not stored yet
    held: dict[bytes, bytes] = {}  # those that the next slice may replace
    for part, beyond in slices(_Effects(entries)):
        for attempt in count(1):
            try:
                root, nodes = fold_effects(cache.get, root, salt, part)
                break
            except Missing as e:
                # What is not stored yet is on no home, whatever the cache has dropped.
                here = {
                    name: found for name in e.hashes if (found := held.get(name) or made.get(name))
                }
                absent = [name for name in e.hashes if name not in here]
                cache.add(here | await blobs.get_many(absent, timeout=TIMEOUT))
            if attempt % ROUNDS == 0:  # what came last drove out what came first
                cache.budget *= 2
        cache.add(nodes)
        held.update(nodes)
        final, held = settle(held, root, beyond)
        made.update(final)
        if not beyond or sum(map(len, made.values())) >= PUT_BYTES:
            await blobs.put_many(list(made.values()), timeout=TIMEOUT)
            made = {}
    return root, estimate(cache.get, root)


def estimate(get_node: GetNode, root: bytes) -> int:
    """Rough bytes of a tree from the part of it that is at hand: fan-out and size per level."""
    total = 0.0
    count = 1.0  # of nodes on the level
    names = [root] if root else []
    while names:
        nodes = _held(get_node, names)
        if not nodes:
            break
        size = sum(map(_size, nodes)) / len(nodes)
        total += count * size
        if nodes[0].level == 0:
            break
        count *= sum(len(node.values) for node in nodes) / len(nodes)
        names = [child for node in nodes for child in node.values]
    return int(total)


def _held(get_node: GetNode, names: Sequence[bytes]) -> list[Node]:
    nodes: list[Node] = []
    for name in names:
        try:
            nodes.append(get_node(name))
        except Missing:
            continue
        if len(nodes) == SAMPLE:
            break
    return nodes


def _size(node: Node) -> int:
    return sum(map(len, node.keys)) + sum(map(len, node.values))


def inline_folder(blobs: BlobClient) -> Folder:
    """Fold in this process, over `blobs`."""

    async def folder(root: bytes, salt: bytes, entries: Sequence[bytes]) -> tuple[bytes, int]:
        return await fold(blobs, root, salt, entries)

    return folder


def process_folder(processes: Processes, get_map: Callable[[], ClusterMap]) -> Folder:
    """Fold in a worker process, which connects to the cluster itself."""

    async def folder(root: bytes, salt: bytes, entries: Sequence[bytes]) -> tuple[bytes, int]:
        with spool(entries) as path:
            new_root, tree_bytes = await processes.run(WORKER, get_map().encode(), root, salt, path)
        return new_root, tree_bytes

    return folder


async def fold_in_worker(
    map_bytes: bytes, root: bytes, salt: bytes, path: str
) -> tuple[bytes, int]:
    """`fold` of spooled entries, for a process that has nothing but its arguments."""
    cluster = ClusterMap.decode(map_bytes)
    clock = SystemClock()
    endpoint = RpcEndpoint(
        cluster_id=cluster.cluster_id, name="checkpoint", clock=clock, random=SystemRandom()
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run)
        blobs = BlobClient(endpoint, lambda: cluster, clock)
        result = await fold(blobs, root, salt, Spooled(path))
        nursery.cancel_scope.cancel()
    return result
