"""Copies of chunks: counting the good ones, and waiting until servers have made missing ones.

Each server verifies its own copy, block by block against the chunk's id (`chunk.report`), so no
data crosses the network.  A copy found bad is quarantined, and a bad or missing one is fetched from
another server by the one that should have it: whoever asks here has begun the repair by that.
"""

from collections.abc import Callable, Iterable, Iterator

import trio

from dfs.client.connect import Cluster
from dfs.cluster.map import CHUNK
from dfs.errors import DfsError
from dfs.hashing import partition_of

AT_ONCE = 8  # chunks being verified at a time
TIMEOUT = 60.0  # seconds; a server reads and hashes up to 4 MiB for each
AGAIN = 1.0  # seconds between looks at copies that are being made
PATIENCE = 30.0  # seconds without any progress after which no more is expected

GOOD = "ok"
ABSENT = ("absent", "quarantined")  # a server's word that it has none

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Copies:
    """What the servers say of one chunk: node number -> "ok", "absent", "quarantined", or why not.

    `homes` should have it; `others` are asked only when no home has a good one.
    """

    __slots__ = ("homes", "others")

    def __init__(self, homes: dict[int, str], others: dict[int, str]) -> None:
        """As the servers answered."""
        self.homes = homes
        self.others = others

    @property
    def good(self) -> int:
        """Good copies where they belong."""
        return sum(state == GOOD for state in self.homes.values())

    @property
    def lost(self) -> bool:
        """Whether nobody has a good copy, as far as anybody answers."""
        return not self.good and GOOD not in self.others.values()

    @property
    def coming(self) -> bool:
        """Whether a server that answers has none, and somebody has one that it can fetch."""
        return not self.lost and any(state in ABSENT for state in self.homes.values())

    def silent(self) -> list[int]:
        """Servers that may have a copy: they did not answer."""
        said = {**self.homes, **self.others}
        return [n for n, state in said.items() if state != GOOD and state not in ABSENT]


async def count(
    cluster: Cluster, chunks: Iterable[bytes], progress: Progress | None = None
) -> dict[bytes, Copies]:
    """What the servers say of each chunk."""
    wanted = sorted(chunks)
    found: dict[bytes, Copies] = {}

    async def worker(pending: Iterator[bytes]) -> None:
        for chunk_id in pending:
            found[chunk_id] = await _ask_all(cluster, chunk_id)
            if progress is not None:
                progress("chunks", len(found), len(wanted))

    pending = iter(wanted)
    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(worker, pending)
    return found


async def wait_repaired(
    cluster: Cluster, chunks: Iterable[bytes], *, patience: float = PATIENCE
) -> dict[bytes, Copies]:
    """Wait until each home that answers has a good copy; returns what the servers said last.

    Gives up what has no good copy anywhere, and the rest when nothing got better for `patience`
    seconds.
    """
    found = await count(cluster, chunks)
    best, since = -1, trio.current_time()
    while True:
        left = [chunk_id for chunk_id, copies in found.items() if copies.coming]
        good = sum(copies.good for copies in found.values())
        if good > best:
            best, since = good, trio.current_time()
        if not left or trio.current_time() - since >= patience:
            return found
        await trio.sleep(AGAIN)
        found.update(await count(cluster, left))


async def _ask_all(cluster: Cluster, chunk_id: bytes) -> Copies:
    node_map = cluster.get_map()
    homes = tuple(node_map.homes(CHUNK, partition_of(chunk_id)))
    copies = Copies({n: await _ask(cluster, n, chunk_id) for n in homes}, {})
    if not copies.good:
        numbers = [n.number for n in node_map.nodes if n.chunk_addr and n.number not in homes]
        copies.others = {n: await _ask(cluster, n, chunk_id) for n in numbers}
    return copies


async def _ask(cluster: Cluster, number: int, chunk_id: bytes) -> str:
    node_map = cluster.get_map()
    try:
        (state,), _ = await cluster.rpc.call(
            node_map.address(CHUNK, number),
            "chunk.report",
            (chunk_id,),
            timeout=TIMEOUT,
            epoch=node_map.epoch,
        )
    except DfsError as e:
        return f"unknown ({e})"
    return str(state)
