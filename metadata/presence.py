"""A metadata node's part in the gossip: it is seen, sees who is alive, and hears of newer maps.

Liveness orders whom a coordinator asks, sends hints on their way and wakes anti-entropy; it never
changes where anything belongs.  A later life of this very node, seen anywhere, ends this one.
"""

from collections.abc import Callable

import trio

from dfs.cluster.map import METADATA, ClusterMap
from dfs.cluster.membership import Snapshot
from dfs.env import Env
from dfs.errors import DfsError
from dfs.rpc.gossip import Gossip, Info
from dfs.rpc.mapkeeper import MapKeeper


class Presence:
    """Connects `Gossip` with the map keeper and with those who want to know of returns."""

    gossip_class: type[Gossip] = Gossip

    def __init__(
        self,
        env: Env,
        number: int,
        keeper: MapKeeper,
        *,
        boot: int,
        load: Callable[[], float],
        returned: Callable[[int], None],
        usurped: Callable[[str], None],
    ) -> None:
        """`boot` is higher at every start; `returned(node)`: a metadata node is alive again."""
        self._env = env
        self._number = number
        self._keeper = keeper
        self._load = load
        self._returned = returned
        self._news = trio.Event()
        self._source = ("", 0)  # address and epoch of the newest map heard of
        self.last_error = ""
        self.gossip = Gossip(env, number, METADATA, keeper, boot=boot, info=self._info)
        self.gossip.on_usurped = usurped
        self.gossip.on_epoch(self._heard)
        self.gossip.subscribe(self._status)

    def is_up(self, node: int) -> bool:
        """Whether metadata node `node` answers, as far as is known; always true for this one."""
        return node == self._number or self.gossip.is_up(node, METADATA)

    async def run(self) -> None:
        """Take part until cancelled; raises `Usurped` when another process has our identity."""
        unsubscribe = self._keeper.subscribe(self._switched)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.gossip.run)
                nursery.start_soon(self._follow)
        finally:
            unsubscribe()

    def _info(self) -> Info:
        total, free = self._env.disk.usage()
        return Info(total, free, self._load())

    def _switched(self, _old: ClusterMap, _new: ClusterMap) -> None:
        self.gossip.map_changed()

    def _heard(self, address: str, epoch: int, digest: bytes) -> None:
        if self._keeper.heard(epoch, digest, address):
            self._source = (address, epoch)
            self._news.set()

    def _status(self, member: Snapshot, _old: str, new: str) -> None:
        """Also a restart that nobody missed is told: as "alive" to "alive"."""
        if member.role == METADATA and member.number != self._number and new == "alive":
            self._returned(member.number)

    async def _follow(self) -> None:
        """Get each newer map from whoever showed it; who does not have it is asked no more."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            address, epoch = self._source
            try:
                await self._keeper.catch_up(epoch, [address])
            except DfsError as e:  # heard again within a second or so, as long as it is newer
                self.last_error = str(e)
