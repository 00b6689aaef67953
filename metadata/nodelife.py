"""What a metadata node does about the cluster map: agree on it, follow it, move with it.

Composed here so that `metadata.service` has one thing to start: the map journal (`mapservice`),
journal members (`journalmoves`), pushing to new homes (`rebalance`) and the driver of transitions
(`mapdriver`).  MEMBERSHIP.md tells how they work together.
"""

from collections.abc import Iterable
from typing import Any

import trio

from dfs.cluster.joint import Progress
from dfs.cluster.map import METADATA
from dfs.env import Context, Env, Handler, Reply
from dfs.errors import Busy, InvalidArgument
from dfs.hashing import DIGEST_SIZE, digest, partition_of
from dfs.rpc.mapkeeper import MapKeeper, settled
from metadata.homes import Homes
from metadata.journalmoves import JournalMoves
from metadata.journals import JournalHost
from metadata.mapdriver import MapDriver
from metadata.mapservice import MapService
from metadata.rebalance import Push, Rebalance
from metadata.store.engine import Store


class NodeLife:
    """The parts; see the module's docstring.  `run` follows `JournalHost.run` and `Homes.run`."""

    maps_class: type[MapService] = MapService
    moves_class: type[JournalMoves] = JournalMoves
    rebalance_class: type[Rebalance] = Rebalance
    driver_class: type[MapDriver] = MapDriver

    def __init__(
        self,
        env: Env,
        number: int,
        keeper: MapKeeper,
        store: Store,
        journals: JournalHost,
        homes: Homes,
        push: Push,
    ) -> None:
        """Nothing happens before `run`."""
        self._number = number
        self._journals = journals
        self.keeper = keeper
        self.maps = self.maps_class(env, number, keeper, journals)
        self.moves = self.moves_class(env, number, keeper, journals, homes)
        self.rebalance = self.rebalance_class(env, number, keeper, store, push)
        self.driver = self.driver_class(env, number, keeper, self.maps, self.progress)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Everything, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.maps.run)
            nursery.start_soon(self.moves.run)
            nursery.start_soon(self.rebalance.run)
            nursery.start_soon(self.driver.run)
            task_status.started()

    async def progress(self) -> Progress:
        """How far this node is; the fence is looked up before what it must cover."""
        fenced = self.keeper.fenced
        pushed = self.rebalance.pushed
        return Progress(fenced, pushed, await self.moves.progress(), True)

    def handlers(self) -> dict[str, Handler]:
        """`map.*`."""
        return {**self.maps.handlers(), **self.driver.handlers()}

    def guarded(self, handlers: dict[str, Handler]) -> dict[str, Handler]:
        """Handlers of blobs and journals, those that depend on the homes behind a guard."""
        guard = self.keeper.guard
        found = dict(handlers)
        found["blob.put"] = guard(handlers["blob.put"], _of_blobs)
        # A blob proves itself, but that it is absent here means nothing to a reader who asks
        # the homes of an older map.
        for name in ("blob.get", "blob.has"):
            found[name] = guard(handlers[name], _of_names, writes=False)
        found["jrnl.genesis"] = guard(self._birth(handlers["jrnl.genesis"]), _of_volume)
        return found

    def _birth(self, genesis: Handler) -> Handler:
        """No journal is born while its homes move: nobody would have listed it."""

        async def birth(ctx: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
            volume = args[0]
            (partition,) = _of_volume(args)
            current = self.keeper()
            moving = current.old_homes(METADATA, partition)
            if moving and self._journals.get(volume) is None:
                raise Busy(
                    f"the homes of volume {volume.hex()} are moving from nodes {moving} to "
                    f"{current.homes(METADATA, partition)}: create it when that is done, "
                    "`dfs cluster status` shows it"
                )
            return await settled(genesis(ctx, args, data))

        return birth

    def status(self) -> dict[str, Any]:
        """For `node.status`."""
        return {
            "maps": self.maps.status(),
            "waiting": self.driver.waiting,
            "volumes": self.moves.statistics(),
            "rebalance": self.rebalance.statistics(),
        }


def _of_volume(args: tuple[Any, ...]) -> tuple[int]:
    if not args or type(args[0]) is not bytes:
        raise InvalidArgument("no volume id")
    return (partition_of(digest(args[0])),)


def _of_blobs(args: tuple[Any, ...]) -> Iterable[int]:
    return _of_names((tuple(item[0] for item in args[0]),))


def _of_names(args: tuple[Any, ...]) -> Iterable[int]:
    names = args[0]
    if any(type(name) is not bytes or len(name) != DIGEST_SIZE for name in names):
        raise InvalidArgument("a blob's name has 32 bytes")
    return map(partition_of, names)
