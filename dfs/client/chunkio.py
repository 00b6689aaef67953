"""Writing chunks to their homes, and the barrier that makes them durable.

A put is sent to all N homes at once and returns when W servers have the chunk; the last copy
finishes behind the caller's back, bounded by a byte budget.  A home that cannot take it is replaced
by the next node of the preference list, which hands the chunk over later.  Puts are acknowledged
from the page cache; `sync` is the barrier before a commit may name them: every server that
acknowledged something is asked to sync, and answers with its `boot`, the random number of its run.
A server that restarted between put and sync may have lost the put, shows another boot, and proves
nothing: then the chunk is put again from the buffers, which are kept until W servers proved it.

No task, lock or timer per request: a put is an object with a counter, moved along by the callbacks
of `Rpc.request`.  Nothing here retries for ever; what fails names every server's answer.

Puts, barriers and touches are kept together, which makes the module longer than most: what a
barrier covers is decided by what the others have noted.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from random import Random
from typing import Any
from weakref import WeakValueDictionary, finalize

import trio

from dfs.chunks import format as chunks
from dfs.client.chunkread import ChunkReader, learn_map
from dfs.client.store import Prepared
from dfs.clock import Clock
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Buffer, Priority, Rpc
from dfs.errors import DfsError, DiskFull, NoQuorum, StaleEpoch, Unreachable
from dfs.hashing import partition_of
from dfs.rpc.descriptors import machine as this_machine
from dfs.threads import ThreadPool

log = logging.getLogger(__name__)

INLINE = 64 << 10  # bytes encoded or verified in the loop rather than on a thread
SHORT = 64 << 10  # bytes; pieces of a chunk that are shorter on average are copied into one
IN_FLIGHT = 256 << 20  # bytes of puts that some server has not answered yet
THREADS = 2  # that hash and compress
PER_SERVER = 64 << 20  # the same for one server; one that is so far behind is passed over
KEEP = 64 << 20  # bytes of un-synced buffers that start a barrier; at twice that, puts wait for it
PUT_TIMEOUT = 20.0  # of one request
WRITE_TIMEOUT = 60.0  # of a put with all its attempts
PATIENCE = 2.0  # seconds before a silent server is backed up by another
SYNC_TIMEOUT = 20.0
AGAIN = 8  # chunks that a barrier puts again at once

Offload = Callable[..., Awaitable[Any]]


class _Put:
    """One chunk on its way: who has it, who failed, who is next."""

    __slots__ = (
        "acks", "buffers", "changed", "chunk_id", "client", "durable", "epoch", "errors", "next",
        "open", "outdated", "preference", "size", "stamp", "wanted",
    )  # fmt: skip

    def __init__(
        self, client: "ChunkClient", chunk_id: bytes, buffers: Sequence[Buffer], *, durable: bool
    ) -> None:
        self.client = client
        self.chunk_id = chunk_id
        self.buffers = buffers
        self.size = sum(memoryview(b).nbytes for b in buffers)
        self.durable = durable
        self.stamp = client.clock.time_ns()
        self.acks: dict[int, int] = {}  # node -> boot
        self.errors: dict[int, DfsError] = {}
        self.open = 0  # requests without an answer
        self.next = 0
        self.preference: tuple[int, ...] = ()
        self.wanted = 0
        self.epoch = 0
        self.outdated = False  # a newer map arrived with a refusal
        self.changed = trio.Event()

    def start(self) -> None:
        """Send to all the homes of the newest map, but those that have it already."""
        cluster = self.client.get_map()
        self.epoch = cluster.epoch
        self.preference = tuple(cluster.preference(CHUNK, partition_of(self.chunk_id)))
        self.wanted = self.client.quorum(cluster)
        self.next = 0
        self.errors.clear()
        homes = self.preference[: cluster.n]
        # Copies that stand in for others do not count towards another set of homes.
        self.acks = {node: boot for node, boot in self.acks.items() if node in homes}
        for _ in range(len(homes) - len(self.acks)):
            self.send_next()

    def send_next(self) -> bool:
        """Send to the next server of the preference list; False if there is none left.

        A server that is far behind is passed over: it must not make everybody wait, and its
        catch-up gets the chunk later.
        """
        while True:
            if self.next >= len(self.preference):
                return False
            node = self.preference[self.next]
            self.next += 1
            if node not in self.acks and self.client.has_room(node):
                break
        self.open += 1
        self.client.sent(node, self.size)
        cluster = self.client.get_map()
        try:
            self.client.rpc.request(
                cluster.address(CHUNK, node),
                "chunk.put",
                (self.chunk_id, self.durable, self.stamp),
                self.buffers,
                timeout=PUT_TIMEOUT,
                on_reply=partial(self.answered, node),
                priority=Priority.BULK,
                epoch=cluster.epoch,
            )
        except Unreachable as e:  # our own endpoint is closing
            self.open -= 1
            self.client.sent(node, -self.size)
            self.errors[node] = e
            return False
        return True

    def answered(self, node: int, answer: tuple[Any, Buffer] | DfsError) -> None:
        """Count an acknowledgement, or let the next server replace one that failed."""
        self.open -= 1
        self.client.sent(node, -self.size)
        if isinstance(answer, DfsError):
            self.errors[node] = answer
            learn_map(self.client.get_map, answer)
            if self.epoch < self.client.get_map().epoch and isinstance(answer, StaleEpoch):
                self.outdated = True  # nobody stands in for a home that is none: start again
            elif len(self.acks) + self.open < self.client.get_map().n:
                self.send_next()
        else:
            self.acks[node] = answer[0][1]
        if not self.open:
            self.client.put_ended(self)
        if self.enough() or not self.open or self.outdated:
            self.changed.set()

    def enough(self) -> bool:
        """Whether W servers have the chunk."""
        return len(self.acks) >= self.wanted

    def error(self, text: str) -> DfsError:
        """What to raise: the servers' own cause if they agree, else `NoQuorum` naming each."""
        causes = list(self.errors.values())
        kinds = {type(e) for e in causes}
        said = "; ".join(f"node {n}: {e}" for n, e in self.errors.items())
        message = (
            f"chunk {self.chunk_id.hex()[:16]}: {text}, {len(self.acks)} of {self.wanted} "
            f"servers have it; {said or 'no answer'}"
        )
        if kinds <= {DiskFull} and causes:
            return DiskFull(message)
        return NoQuorum(message)


class ChunkClient:
    """Puts and reads chunks of one volume family; see the module's docstring.

    Concurrency: any number of tasks may put, read and sync.  `sync` covers every put that returned
    before it was called.  Buffers given to `put` must not change until `sync` returned.
    """

    reader_class: type[ChunkReader] = ChunkReader

    def __init__(
        self,
        rpc: Rpc,
        get_map: Callable[[], ClusterMap],
        clock: Clock,
        *,
        salt: bytes,
        compress: bool = True,
        random: Random,
        host: str = "",
        offload: Offload | None = None,
        machine: bytes | None = None,
    ) -> None:
        """`host`: name of our own host in the map, whose chunkserver is read first.

        `offload`: how to run hashing and compression of large chunks; default: two threads.
        `machine`: see `dfs.rpc.descriptors`; default: the real one, b"": read nothing directly.
        """
        self.rpc = rpc
        self.get_map = get_map
        self.clock = clock
        self._salt = salt
        self._compress = compress
        if offload is None:
            pool = ThreadPool(THREADS, name="chunks")
            finalize(self, pool.close)
            offload = pool.run
        self._offload = offload
        self._reader = self.reader_class(
            rpc,
            get_map,
            clock,
            random=random,
            host=host,
            offload=self._offload,
            inline=INLINE,
            machine=this_machine() if machine is None else machine,
        )
        # Chunks that no server has yet; who prepared them owns them.
        self._prepared: WeakValueDictionary[bytes, Prepared] = WeakValueDictionary()
        self._unsynced: dict[bytes, _Put] = {}
        self._unsynced_bytes = 0
        self._in_flight = 0
        self._behind: dict[int, int] = {}  # node -> bytes sent to it and not answered
        self._room = trio.lowlevel.ParkingLot()
        self._barrier = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._background = False
        self._puts = self._put_bytes = self._syncs = self._reputs = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Home of the barriers that `put` starts in the background; nothing outlives it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._reader.shortcut.run)
            task_status.started()

    def quorum(self, cluster: ClusterMap) -> int:
        """How many servers must have a chunk before it counts as written."""
        return cluster.w

    # ------------------------------------------------------------------------------------ writing

    async def put(self, data: Buffer | Sequence[Buffer], *, durable: bool = False) -> bytes:
        """Store plain data (1 byte to 4 MiB) as a chunk on >= W servers; returns its id.

        Without `durable` the chunk may be named in a commit only after `sync`.  Raises `DiskFull`,
        `NoQuorum` naming what each server said, `StaleEpoch` when the map stays too old.
        """
        prepared = await self.prepare(data)
        await self.put_prepared(prepared, durable=durable)
        return prepared.chunk_id

    async def prepare(self, data: Buffer | Sequence[Buffer]) -> Prepared:
        """Hash and encode a chunk; see `dfs.client.store.ChunkStore.prepare`.

        Does not yield up to 64 KiB.  Raises `InvalidArgument` for a size outside the limits.
        """
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
        if sum([len(p) for p in pieces]) <= INLINE:
            pieces, chunk_id, buffers = self._encode(pieces)
        else:
            pieces, chunk_id, buffers = await self._offload(partial(self._encode, pieces))
        prepared = self._prepared.get(chunk_id)  # equal data under way already: one object for both
        if prepared is None:
            prepared = self._prepared[chunk_id] = Prepared(chunk_id, buffers, pieces)
        return prepared

    def _encode(self, pieces: list[Buffer]) -> tuple[list[Buffer], bytes, list[Buffer]]:
        """The pieces as they are kept from now on, the chunk's id and its buffers; on a thread."""
        if len(pieces) > 1 and sum([len(p) for p in pieces]) < SHORT * len(pieces):
            # Hundreds of buffers would be counted, cut and handed on for each of the servers.
            pieces = [b"".join([_whole(p) for p in pieces])]
        chunk_id, buffers = chunks.encode(pieces, self._salt, compress=self._compress)
        return pieces, chunk_id, buffers

    async def put_prepared(self, prepared: Prepared, *, durable: bool = False) -> None:
        """Send a prepared chunk to >= W servers; see `put` for what that means and raises."""
        put = _Put(self, prepared.chunk_id, prepared.buffers, durable=durable)
        await self._wait_for_room(put)
        await self._send(put)
        self._prepared.pop(prepared.chunk_id, None)
        self._puts += 1
        self._put_bytes += put.size
        if not durable:
            self._keep(put)
            await self._limit()

    def has_room(self, node: int) -> bool:
        """Whether the server is not too far behind to be sent more."""
        return self._behind.get(node, 0) < PER_SERVER

    def sent(self, node: int, size: int) -> None:
        """Account for bytes sent to a server (or answered by it, then negative)."""
        self._behind[node] = self._behind.get(node, 0) + size
        if size < 0:
            self._room.unpark_all()

    async def _wait_for_room(self, put: _Put) -> None:
        """Wait until the budget of bytes allows the put, and W servers take it."""
        cluster = self.get_map()
        preference = cluster.preference(CHUNK, partition_of(put.chunk_id))
        while (self._in_flight and self._in_flight + put.size > IN_FLIGHT) or (
            sum(map(self.has_room, preference)) < min(cluster.w, len(preference))
        ):
            await self._room.park()

    async def _send(self, put: _Put) -> None:
        """Send until W servers have it; raises when they cannot be had."""
        self._in_flight += put.size
        put.start()
        deadline = self.clock.monotonic() + WRITE_TIMEOUT
        stale = 0
        while not put.enough():
            with trio.move_on_after(PATIENCE):
                await put.changed.wait()
            put.changed = trio.Event()
            if put.enough():
                break
            if self.clock.monotonic() >= deadline:
                raise put.error("timed out")
            if put.open and not put.outdated:
                put.send_next()  # somebody is silent: let another stand in
                continue
            old = [e for e in put.errors.values() if isinstance(e, StaleEpoch)]
            if not old or stale >= 10:
                raise old[0] if old else put.error("not written")
            stale += 1
            if not put.outdated:
                await trio.sleep(0.1 * stale)  # whoever owns our map is fetching a newer one
            put.outdated = False
            if not put.open:
                self._in_flight += put.size
            put.start()

    def put_ended(self, put: _Put) -> None:
        """Every server asked so far has answered: its bytes are not in flight any more."""
        self._in_flight -= put.size
        self._room.unpark_all()

    def _keep(self, put: _Put) -> None:
        old = self._unsynced.pop(put.chunk_id, None)
        self._unsynced_bytes += put.size - (old.size if old else 0)
        self._unsynced[put.chunk_id] = put

    async def _limit(self) -> None:
        """Start a barrier when many buffers are kept; wait for it when there are too many."""
        if self._unsynced_bytes < KEEP:
            return
        if self._nursery is not None and not self._background:
            self._background = True
            self._nursery.start_soon(self._sync_behind)
        if self._unsynced_bytes >= 2 * KEEP:
            await self._sync_all()

    async def _sync_behind(self) -> None:
        try:
            await self._sync_all()
        except DfsError as e:  # the buffers are kept; the next `sync` tries again and raises
            log.warning("a barrier in the background failed: %s", e)
        finally:
            self._background = False

    # ------------------------------------------------------------------------------------ barrier

    async def sync(self) -> None:
        """Make every chunk put by this client durable on >= W servers.

        Raises `NoQuorum` or `DiskFull`; then the chunks are still kept and the next call tries
        again.
        """
        await self._sync_all()

    async def _sync_all(self) -> None:
        wanted = list(self._unsynced.values())
        if not wanted:
            return
        async with self._barrier:  # who waited here finds that the one before did its work
            puts = [p for p in wanted if self._unsynced.get(p.chunk_id) is p]
            if not puts:
                return
            self._syncs += 1
            unproven = await self._sync_servers(puts)
            again = [p for p in puts if p.chunk_id in unproven]
            for put in puts:
                if put.chunk_id not in unproven:
                    self._proven(put)
            if again:
                await self._put_all_again(again)

    def _proven(self, put: _Put) -> None:
        """W servers have it durably: its buffers need not be kept, unless for a later put."""
        if self._unsynced.get(put.chunk_id) is put:
            del self._unsynced[put.chunk_id]
            self._unsynced_bytes -= put.size

    async def _sync_servers(self, puts: list[_Put]) -> set[bytes]:
        """Ask every server that acknowledged something to sync; ids that fewer than W proved.

        Returns as soon as every chunk is proven, or when all answered or were silent for long.
        """
        cluster = self.get_map()
        # Only acknowledgements that are here when the requests leave are covered by the answers.
        acks = {p.chunk_id: dict(p.acks) for p in puts}
        boots: dict[int, int] = {}
        waiting: set[int] = set()
        changed = trio.Event()

        def answered(node: int, answer: tuple[Any, Buffer] | DfsError) -> None:
            waiting.discard(node)
            if not isinstance(answer, DfsError):
                boots[node] = answer[0][0]
            changed.set()

        for node in sorted({n for a in acks.values() for n in a}):
            waiting.add(node)
            self.rpc.request(
                cluster.address(CHUNK, node),
                "chunk.sync",
                (),
                timeout=SYNC_TIMEOUT,
                on_reply=partial(answered, node),
                priority=Priority.NORMAL,
            )
        while True:
            left = {p.chunk_id for p in puts if self.proven(acks[p.chunk_id], boots) < p.wanted}
            if not left or not waiting:
                return left
            with trio.move_on_after(PATIENCE) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                return left
            changed = trio.Event()

    def proven(self, acks: dict[int, int], boots: dict[int, int]) -> int:
        """How many servers proved a chunk durable: synced in the run that acknowledged it."""
        return sum(boots.get(node) == boot for node, boot in acks.items())

    async def _put_all_again(self, puts: list[_Put]) -> None:
        """Servers restarted or vanished since they acknowledged: send the kept buffers again.

        Each waits for disks, which a few at a time share.  After an error nothing new is sent.
        """
        left = iter(puts)
        errors: list[DfsError] = []

        async def send() -> None:
            for put in left:
                again = _Put(self, put.chunk_id, put.buffers, durable=True)
                self._reputs += 1
                try:
                    await self._send(again)
                except DfsError as e:
                    errors.append(e)
                else:
                    self._proven(put)
                if errors:
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(min(AGAIN, len(puts))):
                nursery.start_soon(send)
        if errors:
            raise errors[0]

    async def touch(self, ids: Iterable[bytes]) -> list[bool]:
        """Renew chunks that may exist already: True = W homes hold it durably, stamp renewed.

        False means: put it.  Raises nothing for servers that do not answer; they do not count.
        """
        wanted = list(ids)
        cluster = self.get_map()
        by_node: dict[int, list[bytes]] = {}
        for chunk_id in dict.fromkeys(wanted):
            for node in cluster.homes(CHUNK, partition_of(chunk_id)):
                by_node.setdefault(node, []).append(chunk_id)
        held = dict.fromkeys(wanted, 0)
        left = len(by_node)
        done = trio.Event()
        stamp = self.clock.time_ns()

        def answered(asked: list[bytes], answer: tuple[Any, Buffer] | DfsError) -> None:
            nonlocal left
            left -= 1
            if isinstance(answer, DfsError):
                learn_map(self.get_map, answer)
            else:
                for chunk_id, yes in zip(asked, answer[0][0], strict=True):
                    held[chunk_id] += yes
            if not left:
                done.set()

        for node, asked in by_node.items():
            self.rpc.request(
                cluster.address(CHUNK, node),
                "chunk.touch",
                (tuple(asked), stamp),
                timeout=SYNC_TIMEOUT,
                on_reply=partial(answered, asked),
                epoch=cluster.epoch,
            )
        if left:
            await done.wait()
        return [held[chunk_id] >= self.quorum(cluster) for chunk_id in wanted]

    # ------------------------------------------------------------------------------------ reading

    async def read(self, chunk_id: bytes, offset: int, length: int) -> Buffer:
        """Verified plain bytes of a chunk; see `ChunkReader.read`.

        A chunk that was prepared but is not put yet is read from memory.
        """
        prepared = self._prepared.get(chunk_id)
        if prepared is not None:
            return prepared.read(offset, length)
        return await self._reader.read(chunk_id, offset, length)

    def read_nowait(self, chunk_id: bytes, offset: int, length: int) -> Buffer | None:
        """Verified plain bytes that can be had without waiting, else None."""
        prepared = self._prepared.get(chunk_id)
        if prepared is not None:
            return prepared.read(offset, length)
        return self._reader.shortcut.read_nowait(chunk_id, offset, length)

    def statistics(self) -> dict[str, int]:
        """Counts for status pages and tests."""
        return {
            "puts": self._puts,
            "put_bytes": self._put_bytes,
            "in_flight": self._in_flight,
            "unsynced": len(self._unsynced),
            "unsynced_bytes": self._unsynced_bytes,
            "syncs": self._syncs,
            "reputs": self._reputs,
            **self._reader.statistics(),
        }


def _whole(piece: Buffer) -> Buffer:
    """The bytes that a view shows all of, else the view: a join of bytes lets other threads run."""
    if isinstance(piece, memoryview) and type(piece.obj) is bytes and len(piece.obj) == len(piece):
        return piece.obj
    return piece
