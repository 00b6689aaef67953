"""Chunkservers and writers under faults: power loss, torn writes, full disks, rotten bits.

Checked invariants:

- C1a  after a power loss of every server at once, each chunk whose `sync` was acknowledged has W
       verified copies (copies that the scenario damaged itself are forgiven);
- C1b  after everything healed and calmed down, each of them is verified at all N homes;
- C3   a read returns the right bytes or an error, never anything else;
- C4   a server that acknowledged a deletion does not hold the chunk afterwards.

`run(seed)` returns what was violated; with a mutant's name it must not be empty for some seed.
"""

from random import Random
from typing import TYPE_CHECKING, Any

import trio

from chunkserver.segments import Segments
from chunkserver.service import ChunkNode
from dfs.chunks import format as chunks
from dfs.client.chunkio import ChunkClient
from dfs.client.chunkread import ChunkReader
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Buffer, Rpc
from dfs.errors import DfsError, StoreFailed
from dfs.hashing import partition_of
from dfs.testing.chunkcluster import ChunkCluster, SimClock
from dfs.testing.network import SimNetwork
from dfs.testing.seeded import run_seeded

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "chunks"
MUTANTS = (
    "ack-before-sync",
    "sync-ignores-boot",
    "read-without-verify",
    "ingest-without-verify",
    "fewer-acks",
    "no-catch-up",
    "resurrect",
)
SERVERS = 4
CLIENTS = 2
BUSY = 50.0  # virtual seconds of work under faults
DELETE_AGE = 30.0  # no request of a writer is under way any more


# -------------------------------------------------------------------------------------- mutants


class _NoSync(Segments):
    async def sync(self) -> None:
        """Acknowledge without touching the disk."""
        await trio.lowlevel.checkpoint()


class _Resurrect(Segments):
    def condemned(self, chunk_id: bytes, stamp: int) -> bool:
        """Forget every verdict."""
        return False


class _NoSyncNode(ChunkNode):
    store_class: type[Segments] = _NoSync


class _ResurrectNode(ChunkNode):
    store_class: type[Segments] = _Resurrect


class _TrustingNode(ChunkNode):
    async def _verify(
        self, chunk_id: bytes, data: memoryview
    ) -> tuple[chunks.Header, memoryview | None]:
        return chunks.Header.parse(data), None


class _IgnoresBoot(ChunkClient):
    def proven(self, acks: dict[int, int], boots: dict[int, int]) -> int:
        """Take any answer to a sync as a proof."""
        return sum(node in boots for node in acks)


class _FewerAcks(ChunkClient):
    def quorum(self, cluster: ClusterMap) -> int:
        """One server less than W."""
        return cluster.w - 1


class _TrustingReader(ChunkReader):
    async def _verified(self, answer: Buffer, chunk_id: bytes, offset: int, length: int) -> Any:
        header = chunks.Header.parse(answer)
        skip = header.size + offset % chunks.BLOCK
        return bytes(answer[skip : skip + length])


class _TrustingClient(ChunkClient):
    reader_class: type[ChunkReader] = _TrustingReader


_NODES: dict[str | None, type[ChunkNode]] = {
    "ack-before-sync": _NoSyncNode,
    "ingest-without-verify": _TrustingNode,
    "resurrect": _ResurrectNode,
}
_CLIENTS: dict[str | None, type[ChunkClient]] = {
    "sync-ignores-boot": _IgnoresBoot,
    "fewer-acks": _FewerAcks,
    "read-without-verify": _TrustingClient,
}


# ------------------------------------------------------------------------------------- scenario


class _BadCable:
    """An `Rpc` that now and then flips a bit of a chunk on its way."""

    def __init__(self, rpc: Rpc, random: Random) -> None:
        self._rpc = rpc
        self._random = random

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rpc, name)

    def request(
        self, to: str, method: str, args: tuple[Any, ...] = (), data: Any = b"", **more: Any
    ) -> None:
        """See `Rpc.request`."""
        if method == "chunk.put" and self._random.random() < 0.05:
            whole = bytearray(b"".join(data))
            whole[self._random.randrange(len(whole))] ^= 1 << self._random.randrange(8)
            data = bytes(whole)
        self._rpc.request(to, method, args, data, **more)


class _Scenario:
    def __init__(self, seed: int, mutant: str | None) -> None:
        self.random = Random(seed)
        self.clock = SimClock()
        self.mutant = mutant
        self.violations: list[str] = []
        self.acked: dict[bytes, bytes] = {}  # chunk id -> data; synced
        self.since: dict[bytes, float] = {}  # chunk id -> when it was acknowledged
        self.damaged: set[tuple[int, bytes]] = set()  # (server, chunk) with a flipped bit
        self.deleted: set[tuple[int, bytes]] = set()  # (server, chunk) deletion acknowledged
        self.condemned: set[bytes] = set()
        self.reused: set[bytes] = set()  # written more than once: never condemned
        self.rotten = 1 + self.random.randrange(SERVERS)  # bits flip on one disk only

    async def main(self) -> None:
        random = self.random
        network = SimNetwork(random, self.clock)
        async with network, trio.open_nursery() as nursery:
            self.cluster = cluster = ChunkCluster(
                random,
                network,
                self.clock,
                nursery,
                SERVERS,
                node_class=_NODES.get(self.mutant, ChunkNode),
            )
            for number in cluster.disks:
                await self.start(number)
            clients = []
            for i in range(CLIENTS):
                client = cluster.client(
                    f"client{i}", client_class=_CLIENTS.get(self.mutant, ChunkClient)
                )
                client.rpc = _BadCable(client.rpc, random)
                await nursery.start(client.run)
                clients.append(client)
            network.drop = random.choice((0.0, 0.0, 0.01))
            network.duplicate = random.choice((0.0, 0.02))
            with trio.move_on_after(BUSY):
                async with trio.open_nursery() as busy:
                    for client in clients:
                        busy.start_soon(self.work, client)
                    busy.start_soon(self.nemesis)
                    busy.start_soon(self.collect)
            network.heal()
            network.drop = 0.0
            await self.power_loss()
            await self.calm(clients[0])
            nursery.cancel_scope.cancel()

    async def start(self, number: int) -> None:
        try:
            node = await self.cluster.start(number)
        except StoreFailed:  # by the fault of `fail_sync`, if nothing was synced before the crash
            node = await self.cluster.start(number)
        if self.mutant == "no-catch-up":
            node.catch_up.run_once = _idle  # type: ignore[method-assign]  # for one instance
            node.hand_over.run_once = _idle  # type: ignore[method-assign]  # for one instance

    # --------------------------------------------------------------------------------- workload

    async def work(self, client: ChunkClient) -> None:
        random = self.random
        fresh: dict[bytes, bytes] = {}
        while True:
            await trio.sleep(random.random() * 0.6)
            what = random.random()
            try:
                if what < 0.65:
                    data = self.data()
                    durable = random.random() < 0.2
                    chunk_id = await client.put(data, durable=durable)
                    if durable:
                        self.ack({chunk_id: data})
                    else:
                        fresh[chunk_id] = data
                elif what < 0.73:
                    covered = dict(fresh)
                    await client.sync()
                    self.ack(covered)
                    for chunk_id in covered:
                        fresh.pop(chunk_id, None)
                elif self.acked:
                    await self.read(client, random.choice(list(self.acked)))
            except DfsError:
                await trio.sleep(random.random())

    def data(self) -> bytes:
        random = self.random
        kind = random.random()
        if kind < 0.1 and self.acked:
            chunk_id = random.choice(list(self.acked))
            self.reused.add(chunk_id)
            return self.acked[chunk_id]
        if kind < 0.3:
            return random.randbytes(8) + b"text " * random.randrange(1, 20_000)
        return random.randbytes(random.choice((20, 3000, 70_000)) + random.randrange(9))

    def ack(self, some: dict[bytes, bytes]) -> None:
        for chunk_id, data in some.items():
            if chunk_id not in self.condemned:
                self.acked[chunk_id] = data
                self.since.setdefault(chunk_id, self.clock.monotonic())

    async def read(self, client: ChunkClient, chunk_id: bytes) -> None:
        data = self.acked[chunk_id]
        offset = self.random.randrange(len(data))
        length = self.random.randrange(len(data) - offset) + 1
        got = await client.read(chunk_id, offset, length)
        if bytes(got) != data[offset : offset + length]:
            self.violations.append(f"C3: wrong bytes read from chunk {chunk_id.hex()[:16]}")

    async def collect(self) -> None:
        """Delete old chunks at every server that answers."""
        rpc = self.cluster.network.endpoint("collector")
        while True:
            await trio.sleep(self.random.random() * 10)
            now = self.clock.monotonic()
            old = [i for i in self.acked if self.since[i] < now - DELETE_AGE]
            old = [i for i in old if i not in self.reused]
            if not old:
                continue
            chunk_id = self.random.choice(old)
            del self.acked[chunk_id]
            self.condemned.add(chunk_id)
            for number in self.cluster.disks:
                address = self.cluster.map.address(CHUNK, number)
                try:
                    await rpc.call(address, "chunk.delete", ((chunk_id,),), timeout=5)
                except DfsError:
                    continue
                self.deleted.add((number, chunk_id))

    # ---------------------------------------------------------------------------------- nemesis

    async def nemesis(self) -> None:
        random, cluster = self.random, self.cluster
        actions: list[Callable[[], Any]] = [
            self.blink,
            self.blink,
            self.outage,
            self.flip,
            self.flip,
            self.fill,
            self.fail_sync,
            self.cut,
        ]
        while True:
            await trio.sleep(random.random() * 3)
            await random.choice(actions)()
            for number in cluster.disks:
                if number not in cluster.nodes:
                    await self.start(number)

    async def blink(self) -> None:
        """Power loss and immediate restart of one or all."""
        numbers = list(self.cluster.disks)
        if self.random.random() < 0.7:
            numbers = [self.random.choice(numbers)]
        for number in numbers:
            self.cluster.crash(number)
        await trio.sleep(self.random.random() * 0.1)

    async def outage(self) -> None:
        self.cluster.crash(self.random.choice(list(self.cluster.disks)))
        await trio.sleep(self.random.random() * 8)

    async def flip(self) -> None:
        """Damage one stored copy."""
        node = self.cluster.nodes.get(self.rotten)
        held = list(node.store.index) if node else []
        if node is None or not held:
            return
        chunk_id = self.random.choice(held)
        entry = node.store.index.get(chunk_id)
        if entry is not None:
            name = f"segments/{entry.segment:08d}.seg"
            at = entry.offset + self.random.randrange(entry.stored)
            self.cluster.disks[self.rotten].flip(name, at, self.random.randrange(8))
            self.damaged.add((self.rotten, chunk_id))

    async def fill(self) -> None:
        disk = self.cluster.disks[self.random.choice(list(self.cluster.disks))]
        disk.full = True
        await trio.sleep(self.random.random() * 5)
        disk.full = False

    async def fail_sync(self) -> None:
        """An fsync fails: that server refuses writes until it is restarted."""
        number = self.random.choice(list(self.cluster.disks))
        self.cluster.disks[number].fail_next("sync", "segments/")
        await trio.sleep(self.random.random() * 4)
        self.cluster.crash(number)

    async def cut(self) -> None:
        network = self.cluster.network
        names = [f"n{i}" for i in self.cluster.disks] + [f"client{i}" for i in range(CLIENTS)]
        self.random.shuffle(names)
        at = self.random.randrange(1, len(names))
        network.partition([names[:at], names[at:]])
        await trio.sleep(self.random.random() * 6)
        network.heal()

    # ----------------------------------------------------------------------------------- checks

    async def power_loss(self) -> None:
        """C1a: crash everything, start it again without neighbours, and count."""
        for number in self.cluster.disks:
            self.cluster.crash(number)
            self.cluster.disks[number].full = False
            self.cluster.disks[number]._faults.clear()  # a fault that nobody met yet
        self.cluster.network.partition([[f"n{i}"] for i in self.cluster.disks])
        for number in self.cluster.disks:
            await self.start(number)
        for chunk_id in self.acked:
            copies = await self.good_copies(chunk_id)
            forgiven = {n for n, i in self.damaged if i == chunk_id} - copies
            if len(copies) + len(forgiven) < self.cluster.map.w:
                self.violations.append(
                    f"C1a: chunk {chunk_id.hex()[:16]} was synced and survives at "
                    f"{sorted(copies)} only"
                )
        self.cluster.network.heal()

    async def good_copies(self, chunk_id: bytes) -> set[int]:
        good = set()
        for number, node in self.cluster.nodes.items():
            try:
                await node.store.check(chunk_id)
            except DfsError:
                continue
            good.add(number)
        return good

    async def calm(self, client: ChunkClient) -> None:
        """C1b, C3, C4 after a scrub and a quiet while."""
        for node in self.cluster.nodes.values():
            await node.scrub.run_once()
        await trio.sleep(450)
        for chunk_id in self.acked:
            homes = set(self.cluster.map.homes(CHUNK, partition_of(chunk_id)))
            if missing := homes - await self.good_copies(chunk_id):
                self.violations.append(
                    f"C1b: chunk {chunk_id.hex()[:16]} is still not at homes {sorted(missing)}"
                )
            try:
                await self.read(client, chunk_id)
            except DfsError as e:
                self.violations.append(f"C1b: {e}")
        for number, chunk_id in sorted(self.deleted):
            if self.cluster.nodes[number].store.held(chunk_id):
                self.violations.append(f"C4: chunk {chunk_id.hex()[:16]} came back at {number}")


async def _idle() -> int:
    return 0


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """One seeded run; the violations found, empty = all invariants hold."""
    if mutant is not None and mutant not in MUTANTS:
        raise ValueError(f"unknown mutant {mutant!r}; known: {', '.join(MUTANTS)}")
    return _play(seed, mutant).violations


def fingerprint(seed: int) -> tuple[int, int]:
    """What went over the network in a run: equal for equal seeds."""
    scenario = _play(seed, None)
    return scenario.cluster.network.fingerprint, len(scenario.acked)


def _play(seed: int, mutant: str | None) -> _Scenario:
    scenario = _Scenario(seed, mutant)
    run_seeded(scenario.main, seed=seed)
    return scenario
