"""The chunkserver: answers `chunk.*`, and keeps its chunks whole in the background.

A put is verified completely, every block, before anything of it is stored or acknowledged; a get is
not verified here, because the reader does it and knows what to do about it.  Requests carry the map
epoch the caller acted on; a write that is older than the partition's last change is refused, so
that no caller counts a node towards a quorum of homes that it is no longer.  A chunk never changes,
so what is here is given to readers of any epoch; only to say "absent" to a reader with an old map
would mislead it, and it is given the map instead.
"""

import logging
from collections.abc import Callable
from typing import Any

import trio

from chunkserver.boot import ChunkBoot
from chunkserver.catchup import CatchUp
from chunkserver.door import Door
from chunkserver.handover import HandOver
from chunkserver.membership import Presence
from chunkserver.metrics import measure
from chunkserver.peers import Peers
from chunkserver.repair import Repair
from chunkserver.scrub import Scrub
from chunkserver.segments import Segments, StoreOptions, room_for
from dfs.chunks import format as chunks
from dfs.cluster.map import CHUNK, ClusterMap
from dfs.env import Context, Env, Handler, Reply
from dfs.errors import Corrupt, DfsError, InvalidArgument, NotFound, StoreFailed
from dfs.hashing import DIGEST_SIZE, PARTITIONS, partition_of
from dfs.limits import Level
from dfs.metrics import Page
from dfs.rpc.gossip import next_boot
from dfs.rpc.mapkeeper import MapKeeper, stale
from dfs.workers import Worker, lines
from dfs.workers import handlers as worker_handlers

log = logging.getLogger(__name__)

VERSION = "0.1.0"
ROLE = "chunkserver"
INLINE = 72 << 10  # bytes (a block and its header) hashed in the loop rather than on a thread
LIST_LIMIT = 10_000
AHEAD = 3600 * 10**9  # ns; a stamp further in the future than this is a broken clock's


class ChunkNode:
    """One chunkserver.  `store` and `workers` are there once `run` has recovered the disk."""

    store_class: type[Segments] = Segments
    presence_class: type[Presence] | None = Presence  # None: no gossip, no boot number
    boot_class: type[ChunkBoot] = ChunkBoot

    def __init__(
        self,
        env: Env,
        number: int,
        get_map: Callable[[], ClusterMap],
        *,
        options: StoreOptions | None = None,
    ) -> None:
        """`number` is the node's in the map; `get_map` returns the newest map known here."""
        self._env = env
        self._number = number
        self._get_map = get_map
        self._options = options
        self._started = 0.0
        self._errors: dict[str, int] = {}
        self._checking: set[bytes] = set()
        self.boot = env.random.getrandbits(62)
        self.peers = Peers(env, number, get_map)
        self.store: Segments
        self.repair: Repair
        self.scrub: Scrub
        self.catch_up: CatchUp
        self.hand_over: HandOver
        self.door: Door
        self.workers: tuple[Worker, ...] = ()
        self.metrics_address = ""
        self.presence: Presence | None = None
        self.life: ChunkBoot | None = None

    async def run(
        self, address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Recover the store, serve `address` until cancelled; reports the bound address.

        Raises `StoreFailed` when the disk cannot be used, `ConfigError` for the address.
        """
        env = self._env
        self._started = env.clock.monotonic()
        self.store = store = await self.store_class.open(env, self._options)
        self.repair = Repair(env, store, self.peers)
        self.scrub = Scrub(env, store, self.bad)
        self.catch_up = CatchUp(env, store, self.peers)
        self.hand_over = HandOver(env, store, self.peers)
        self.door = Door(env, store, lambda: self.boot)
        self.workers = (self.repair, self.catch_up, self.hand_over, self.scrub)
        for text in store.recovery.notes:
            log.info("recovery: %s", text)
        for text in store.recovery.errors:
            log.error("recovery: %s", text)
            self._count(text)
        for chunk_id, reason in store.recovery.suspects:
            log.warning("recovery: chunk %s was written before a crash: %s", chunk_id.hex(), reason)
            await store.drop([chunk_id])
            self.repair.add(chunk_id, reason, doubtful=True)
        for chunk_id, reason in store.recovery.missing:
            self.repair.add(chunk_id, reason)
        for chunk_id in sorted(store.quarantine.ids):
            self.repair.add(chunk_id, "quarantined earlier")
        keeper = self._get_map
        if isinstance(keeper, MapKeeper) and self.presence_class is not None:
            number = await env.disk.run(next_boot, env.disk)
            node = keeper().node(self._number)
            self.life = self.boot_class(env, node, keeper, number)
            while await self.life.tell():  # gossip begins with a number that is new
                pass
            self.presence = self.presence_class(
                env, self._number, keeper, self.catch_up, boot=self.life.boot, load=self._load
            )
        unsubscribe = self._follow_map()
        try:
            async with trio.open_nursery() as nursery:
                for worker in self.workers:
                    nursery.start_soon(worker.run)
                if self.presence is not None:
                    nursery.start_soon(self.presence.run)
                if self.life is not None:
                    nursery.start_soon(self.life.run)
                nursery.start_soon(self.door.run)
                await env.rpc.serve(address, self.handlers(), started=task_status.started)
        finally:
            unsubscribe()
            with trio.move_on_after(10, shield=True):
                try:
                    await store.close()
                except DfsError as e:  # the next start verifies more, nothing else
                    log.warning("the store was not closed cleanly: %s", e)

    def _follow_map(self) -> Callable[[], None]:
        """Begin to move chunks as soon as homes do; returns what ends it."""
        keeper = self._get_map
        if not isinstance(keeper, MapKeeper):
            return lambda: None

        def changed(_old: ClusterMap, _new: ClusterMap) -> None:
            self.catch_up.wake()
            self.hand_over.wake()

        return keeper.subscribe(changed)

    def handlers(self) -> dict[str, Handler]:
        """Every method of a chunkserver; see `dfs.wire.messages`."""
        keeper = self._get_map
        if not isinstance(keeper, MapKeeper):
            return self._handlers()

        def one(args: tuple[Any, ...]) -> list[int]:
            return [_partition(args[0])]

        def many(args: tuple[Any, ...]) -> list[int]:
            return [_partition(i) for i in args[0]]

        methods = self._handlers()
        if self.presence is not None:
            methods |= self.presence.gossip.handlers()
        for name, partitions in (("put", one), ("touch", many), ("delete", many)):
            method = f"chunk.{name}"
            methods[method] = keeper.guard(methods[method], partitions, role=CHUNK)
        return methods

    def _handlers(self) -> dict[str, Handler]:
        return {
            "ping": self._ping,
            "map.get": self._map,
            "node.status": self._status,
            **worker_handlers(lambda: self.workers),
            "chunk.put": self._put,
            "chunk.touch": self._touch,
            "chunk.sync": self._sync,
            "chunk.get": self._get,
            "chunk.report": self._report,
            "chunk.list": self._list,
            "chunk.summary": self._summary,
            "chunk.delete": self._delete,
            "chunk.fence": self._fence,
            "chunk.progress": self._progress,
            **self.door.handlers(),
        }

    # ------------------------------------------------------------------------------------- chunks

    async def _put(self, ctx: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
        chunk_id, durable, stamp, *more = args
        self._check(ctx, chunk_id)
        store = self.store
        copy = bool(more and more[0])
        # By a clock of a writer that is wrong the chunk could seem old enough to be collected.
        stamp = self._stamp(stamp if copy else 0)
        if copy and store.condemned(chunk_id, stamp):
            return (False, self.boot), b""  # a copy of garbage: as good as stored
        new = False
        if not await store.renew(chunk_id, stamp):
            header, pages = await self._verify(chunk_id, data)
            # whom it is not home to, a nearly full disk leaves to the next fallback
            moved = copy or not self.peers.is_home(partition_of(chunk_id))
            new = await store.put(
                chunk_id, [data], len(data), header.length, stamp, moved=moved, pages=pages
            )
        if durable:
            await store.sync()
        if chunk_id in store.quarantine.ids:
            await store.sync()
            await store.healed(chunk_id)
        return (new, self.boot), b""

    async def _verify(
        self, chunk_id: bytes, data: memoryview
    ) -> tuple[chunks.Header, memoryview | None]:
        """The verified header; and pages to write, with room for that of the record, if large."""
        if len(data) <= INLINE:
            return chunks.verify(data, chunk_id), None
        return await self._env.disk.run(_verify, chunk_id, data)

    async def _touch(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        ids, _, *more = args
        for chunk_id in ids:
            self._check(ctx, chunk_id)
        if more and len(more[0]) != len(ids):
            raise InvalidArgument(f"{len(more[0])} stamps for {len(ids)} chunks")
        stamps = [self._stamp(s) for s in more[0]] if more else self._stamp(0)
        return (tuple(await self.store.touch(ids, stamps)),), b""

    async def _sync(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        await self.store.sync()
        return (self.boot,), b""

    async def _get(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        chunk_id, first, count = args
        partition = _partition(chunk_id)
        entry = self.store.index.get(chunk_id)
        try:
            plain, buffers = await self.store.read(chunk_id, first, count)
        except NotFound:
            self._check_epoch(ctx, partition)
            raise
        except Corrupt as e:
            await self.bad(chunk_id, str(e))
            raise
        return (plain, entry.stamp if entry else 0), buffers

    async def _report(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        (chunk_id,) = args
        if chunk_id in self._checking:
            return ("ok",), b""  # the first report is being looked into
        self._checking.add(chunk_id)
        try:
            await self.store.check(chunk_id)
        except NotFound:
            if self.peers.is_home(partition_of(chunk_id)):
                self.repair.add(chunk_id, "a reader missed it here")
            return ("absent",), b""
        except Corrupt as e:
            await self.bad(chunk_id, f"reported by a reader: {e}")
            return ("quarantined",), b""
        finally:
            self._checking.discard(chunk_id)
        return ("ok",), b""

    def _list(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        after, limit, *more = args
        last = more[0] if more else 0
        page = self.store.index.after(after, max(1, min(limit, LIST_LIMIT)), last)
        return (tuple((i, e.plain, e.stored, e.stamp) for i, e in page),), b""

    def _summary(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (PARTITIONS,), self.store.index.summary()

    async def _delete(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        ids, *more = args
        before = more[0] if more else 0
        for chunk_id in ids:
            self._check(ctx, chunk_id)
        if before:  # what was touched since the collector decided stays
            entries = ((i, self.store.index.get(i)) for i in ids)
            ids = [i for i, e in entries if e is None or e.stamp < before]
        await self.store.delete(ids, before - 1 if before else self._env.clock.time_ns())
        return (), b""

    async def bad(self, chunk_id: bytes, reason: str) -> None:
        """The copy here is bad: quarantine it, tell it, fetch a good one."""
        log.error("chunk %s is bad: %s", chunk_id.hex(), reason)
        self._count("a copy of a chunk was bad and is quarantined until a good one is here")
        try:
            await self.store.set_aside(chunk_id, reason)
        except StoreFailed as e:  # nothing can be written any more; readers verify
            self._count(str(e))
            return
        self.repair.add(chunk_id, reason)

    async def _fence(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        """What is listed after the answer has every write of epochs before it."""
        (epoch,) = args
        keeper = self._get_map
        fenced = keeper().epoch
        if isinstance(keeper, MapKeeper):
            if epoch > fenced:
                await keeper.catch_up(epoch)
            fenced = keeper.fenced
        doubtful = sorted({partition_of(chunk_id) for chunk_id in self.repair.queue})
        return (fenced, tuple(doubtful)), b""

    def _progress(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return self.catch_up.complete(), b""

    def _check(self, ctx: Context, chunk_id: Any) -> None:
        self._check_epoch(ctx, _partition(chunk_id))

    def _check_epoch(self, ctx: Context, partition: int) -> None:
        node_map = self._get_map()
        if ctx.epoch and ctx.epoch < node_map.epoch:
            changed = node_map.last_change(CHUNK, partition)
            if ctx.epoch < changed:
                raise stale(node_map, ctx.epoch, changed)

    def _stamp(self, stamp: Any) -> int:
        now = self._env.clock.time_ns()
        return stamp if isinstance(stamp, int) and 0 < stamp < now + AHEAD else now

    def _count(self, text: str) -> None:
        self._errors[text] = self._errors.get(text, 0) + 1

    # --------------------------------------------------------------------------------------- node

    def _ping(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        node_map = self._get_map()
        return (ROLE, self._number, node_map.node(self._number).node_id, node_map.epoch), b""

    def _map(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (self._get_map().encode(),), b""

    def _status(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (self.status(),), b""

    def _load(self) -> float:
        """Workers that move or repair something now."""
        return float(sum(worker.state == "running" for worker in self.workers))

    def measure(self, page: Page) -> None:
        """Write the numbers of now into a page of metrics."""
        measure(page, self)

    def health(self) -> str:
        """Why writes are refused; "" if they are not."""
        if self.store.failed:
            return f"writes are refused: {self.store.failed}"
        level = self.store.room.level()
        return "the disk is full" if level == Level.FULL else ""

    def to_move(self) -> int:
        """Chunks that are not where they belong, as far as this server is concerned."""
        return self.hand_over.foreign() + self.catch_up.waiting

    def status(self) -> dict[str, Any]:
        """The fields of `node.status`."""
        total, free = self._env.disk.usage()
        node_map = self._get_map()
        store = self.store
        errors = list(self._errors.items())
        if store.failed:
            errors.append((f"writes are refused: {store.failed}", 1))
        if self.repair.lost:
            errors.append(("chunks of which no server has a good copy", len(self.repair.lost)))
        return {
            "role": ROLE,
            "number": self._number,
            "name": node_map.node(self._number).name,
            "map_epoch": node_map.epoch,
            "version": VERSION,
            "uptime": self._env.clock.monotonic() - self._started,
            "disk_total": total,
            "disk_free": free,
            "disk_level": store.room.level().label,
            "disk_room": store.room.room(),
            "disk_path": self._env.disk.path(),
            "used": store.index.stored_bytes,
            "errors": tuple(errors),
            "metrics": self.metrics_address,
            "workers": lines(self.workers),
            "chunks": len(store.index),
            "chunk_bytes": store.index.stored_bytes,
            "to_move": self.to_move(),
            "incomplete": self.catch_up.incomplete(),
            "quarantined": len(store.quarantine.ids),
            "repair_queue": len(self.repair.queue),
            "store": store.statistics(),
        }


def _verify(chunk_id: bytes, data: memoryview) -> tuple[chunks.Header, memoryview]:
    """Verify a large chunk while copying it to where it can be written from."""
    pages, chunk = room_for(len(data))
    return chunks.verify(data, chunk_id, chunk), pages


def _partition(chunk_id: Any) -> int:
    if not isinstance(chunk_id, bytes) or len(chunk_id) != DIGEST_SIZE:
        raise InvalidArgument("a chunk id has 32 bytes")
    return partition_of(chunk_id)
