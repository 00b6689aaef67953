"""A metadata node: store, blobs, journals and volume homes behind one RPC address.

The node is composed here and nowhere else.  Start order is what recovery needs: the store first
(session counters, blobs), then the journals (their log is replayed), then the homes, which only
act once somebody asks for a volume; the address is served last, so that nobody meets a half-started
node.  Everything runs in one nursery: an error in any part ends the node, because a node that lost
a part must not go on answering for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Context, Env, Handler, Reply
from dfs.errors import DfsError, DiskFull
from dfs.limits import DiskWatch, Level, Limits
from dfs.metrics import Page, measure_limit
from dfs.rpc.blobs import BlobClient
from dfs.rpc.budget import InFlight
from dfs.rpc.mapkeeper import MapKeeper
from dfs.workers import Listed, lines
from dfs.workers import handlers as worker_handlers
from metadata.boot import Boot
from metadata.checkpoint import process_folder
from metadata.discard import Discard
from metadata.homes import Folder, Homes
from metadata.journals import JournalHost
from metadata.kv import KV
from metadata.loops import life_loops, loops
from metadata.metrics import measure
from metadata.nodelife import NodeLife
from metadata.presence import Presence
from metadata.repair import OWN
from metadata.scrub import StoreScrub
from metadata.steps import Steps, Write
from metadata.store.engine import Store
from metadata.store.options import StoreOptions
from metadata.synchronise import Synchroniser
from metadata.syncworkers import workers as sync_workers

VERSION = "0.1.0"
LEAST_RESERVE = 8 << 20  # bytes
MOST_RESERVE = 5 * (32 << 20)  # one table of each input of a merge, and of its output


class MetadataNode:
    """One metadata node of a cluster.

    `number` is the node's number in the map, `get_map` returns the newest map known here; with a
    `MapKeeper` the node takes part in changing it, with a plain function the map never changes.
    `folder` overrides how checkpoints are computed (the simulator folds inline).
    """

    boot_class: type[Boot] = Boot
    life_class: type[NodeLife] = NodeLife
    journals_class: type[JournalHost] = JournalHost

    def __init__(
        self,
        env: Env,
        number: int,
        get_map: Callable[[], ClusterMap],
        *,
        folder: Folder | None = None,
        reserve: int = 0,
    ) -> None:
        """Keep what the node is made of; nothing is opened before `run`.

        `reserve` is how many bytes at most are set aside for work on a full disk.
        """
        self._reserve = reserve
        self._env = env
        self._number = number
        self._get_map = get_map
        self._folder = folder
        self._started = 0.0
        self._room = DiskWatch(Limits(), env.disk.usage, env.disk.path(), credit=True)
        self.store: Store
        self.journals: JournalHost
        self.homes: Homes
        self.kv: KV
        self.sync: Synchroniser
        self.workers: tuple[Listed, ...] = ()
        self.metrics_address = ""
        self.boot: Boot | None = None
        self.life: NodeLife | None = None
        self.presence: Presence | None = None

    async def run(
        self,
        address: str,
        *,
        task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Recover, serve `address` until cancelled; reports the bound address when it serves.

        Raises `StoreFailed` or `Corrupt` when the data directory cannot be trusted, `ConfigError`
        when the address cannot be bound.
        """
        env = self._env
        self._started = env.clock.monotonic()
        self.store = store = await Store.open(env, options=self._options())
        self.sync = sync = Synchroniser(env, self._number, self._get_map, store)
        # Blobs pass: they are checkpoints, which let journals be trimmed.
        sync.admit_move = self._room.check_move
        sync.load()
        self.blobs = blobs = sync.blobs
        self._inflight = inflight = InFlight()
        self.kv = kv = KV(
            env, self._number, self._get_map, store,
            digests=sync.digests, hints=sync.keeper, is_up=self.is_up,
            admit=self._admit, waiting=sync.pull_first.waiting, inflight=inflight,
        )  # fmt: skip
        sync.alive = self.is_up
        sync.writer = kv.replica
        self.journals = journals = self.journals_class(env, self._number, self._get_map)
        client = BlobClient(env.rpc, self._get_map, env.clock, inflight=inflight)
        folder = self._folder or process_folder(env.processes, self._get_map)
        self.homes = homes = Homes(
            env, self._number, self._get_map, journals, client, store, folder=folder
        )
        scrub = StoreScrub(env, store)
        self.workers = (*loops(env.clock, store, journals, homes), scrub)
        handlers: dict[str, Handler] = {
            "ping": self._ping,
            "map.get": self._map_get,
            "node.status": self._status,
            "node.lsm": self._lsm,
            **worker_handlers(lambda: self.workers),
            **blobs.handlers(),
            **journals.handlers(),
            **homes.handlers(),
            **kv.handlers(),
            **sync.handlers(),
        }
        keeper = self._get_map
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            nursery.start_soon(scrub.run)
            if isinstance(keeper, MapKeeper):
                await self._live(keeper, nursery, address, handlers, task_status)
            else:
                await nursery.start(journals.run)
                await nursery.start(homes.run)
                await nursery.start(kv.run)
                await env.rpc.serve(address, handlers, started=task_status.started)

    async def _live(
        self,
        keeper: MapKeeper,
        nursery: trio.Nursery,
        address: str,
        handlers: dict[str, Handler],
        task_status: trio.TaskStatus[str],
    ) -> None:
        """Serve as a member of a cluster that changes.

        Until a majority of the metadata nodes knows of this start the node answers for itself only
        and takes no part in anything; see `metadata.boot`.
        """
        env, number, store = self._env, self._number, self.store
        self.boot = boot = self.boot_class(env, number, keeper().node(number), keeper, store)
        sync = self.sync
        self.life = life = self.life_class(
            env, number, keeper, store, self.journals, self.homes, sync.push
        )
        synchronising = sync_workers(env, sync, self._lost_registers)
        discard = Discard(env, sync)
        self.workers += (*life_loops(env.clock, life), *synchronising, discard)
        boot.begin()
        entropy, hints, _, _, repair = synchronising

        def returned(node: int) -> None:
            entropy.returned(node)
            hints.returned(node)
            repair.returned(node)

        self.presence = presence = Presence(
            env, number, keeper, boot=boot.boot, load=self._load,
            returned=returned, usurped=boot.on_usurped,
        )  # fmt: skip
        handlers |= life.handlers() | presence.gossip.handlers()
        real = life.guarded(handlers) | boot.handlers()
        early = {name: real[name] for name in ("ping", "map.get", "node.status", "node.boot")}
        serving = boot.gate(real) | early
        nursery.start_soon(partial(env.rpc.serve, address, serving, started=task_status.started))
        await boot.check()
        await nursery.start(self.journals.run)
        await nursery.start(self.homes.run)
        await nursery.start(self.kv.run)
        await nursery.start(life.run)
        await sync.start()
        keeper.subscribe(entropy.map_changed)
        keeper.subscribe(repair.map_changed)
        keeper.subscribe(discard.map_changed)
        for worker in (*synchronising, discard):
            nursery.start_soon(worker.run)
        nursery.start_soon(presence.run)
        serving.update(real)  # the server looks methods up in this very dict
        boot.admitted.set()
        await boot.run()

    def _lost_registers(self) -> Steps[None]:
        """Mint under another name from now on; what follows is in the same queue, behind it."""
        self.kv.registers.actors.renew()
        yield Write(())

    def _options(self) -> StoreOptions:
        """A reserve as large as the store, up to what a merge can need; small nodes need little."""
        if not self._reserve:
            return StoreOptions(own=OWN)
        disk = self._env.disk
        held = 0
        for name in disk.listdir("lsm"):
            file = disk.open(f"lsm/{name}")
            held += file.size()
            file.close()
        reserve = min(self._reserve, max(LEAST_RESERVE, held))
        return StoreOptions(own=OWN, reserve_bytes=reserve)

    def _admit(self, size: int) -> None:
        """Raise `DiskFull` or `Busy` when a client's value of that size is not taken now."""
        self._room.check_write(size)
        self._inflight.check(size)

    def is_up(self, node: int) -> bool:
        """Whether metadata node `node` answers, as far as gossip knows."""
        return self.presence is None or self.presence.is_up(node)

    def _load(self) -> float:
        return float(self.kv.statistics().get("under_way", 0))

    def measure(self, page: Page) -> None:
        """Write the numbers of now into a page of metrics."""
        measure(
            page,
            self._get_map(),
            self._number,
            store=self.store.statistics(),
            journals=self.journals.statistics(),
            homes=self.homes.statistics(),
            kv={**self.kv.statistics(), **self.sync.statistics()},
        )
        page.workers(self.workers)
        measure_limit(page, self._room.level().label)

    def health(self) -> str:
        """What of this node must not be trusted; "" if nothing."""
        if self.store.quarantined:
            return f"quarantined tables: {', '.join(map(str, self.store.quarantined))}"
        return "the disk is full" if self._room.level() == Level.FULL else ""

    def _lsm(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (self.store.lsm(),), b""

    def _ping(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        node_map = self._get_map()
        node_id = node_map.node(self._number).node_id
        return (METADATA, self._number, node_id, node_map.epoch), b""

    def _map_get(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        return (self._get_map().encode(),), b""

    def _journals_full(self) -> bool:
        """Whether the disk has no room for another entry of a journal."""
        try:
            self.journals.check()
        except DfsError as e:
            return isinstance(e, DiskFull)
        return False

    def _status(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        total, free = self._env.disk.usage()
        node_map = self._get_map()
        errors = [(f"table {name} is quarantined", 1) for name in self.store.quarantined]
        errors += [(text, 1) for text in (*self.store.errors, *self.blobs.errors)]
        errors += self.journals.errors.items()
        if isinstance(self._get_map, MapKeeper):
            errors += self._get_map.errors()
        statistics = self.store.statistics()
        used = statistics["bytes"] + statistics["memtable_bytes"]  # of which the log has a copy
        used += self.journals.statistics().get("bytes", 0)
        return (
            {
                "role": METADATA,
                "number": self._number,
                "name": node_map.node(self._number).name,
                "map_epoch": node_map.epoch,
                "version": VERSION,
                "uptime": self._env.clock.monotonic() - self._started,
                "disk_total": total,
                "disk_free": free,
                "used": used,
                "errors": tuple(errors),
                "workers": lines(self.workers),
                "metrics": self.metrics_address,
                "disk_level": self._room.level().label,
                "journals_full": self._journals_full(),
                "disk_room": self._room.room(),
                "disk_path": self._env.disk.path(),
                "volumes": tuple(self.homes.status()),
                "store": statistics,
                "kv": self.kv.statistics(),
                "sync": self.sync.statistics(),
                "life": self.life.status() if self.life is not None else {},
            },
        ), b""
