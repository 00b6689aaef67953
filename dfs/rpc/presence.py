"""`Presence`: a daemon's part in the gossip.  It is seen, and fetches newer maps it hears of.

Only with a `MapKeeper`: a map that never changes needs no news.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import trio

from dfs.cluster.map import ClusterMap
from dfs.cluster.swimeffects import Snapshot
from dfs.env import Env
from dfs.errors import DfsError
from dfs.rpc.gossip import Gossip, Info
from dfs.rpc.mapkeeper import MapKeeper


class Presence(ABC):
    """Connects `Gossip` with the map keeper; subclasses say whose changes of status matter."""

    def __init__(
        self,
        env: Env,
        number: int,
        role: str,
        keeper: MapKeeper,
        *,
        boot: int,
        load: Callable[[], float],
    ) -> None:
        """`boot` is higher at every start; `load` counts requests under way."""
        self._env = env
        self._keeper = keeper
        self._load = load
        self._news = trio.Event()
        self._source = ("", 0)  # address and epoch of the newest map heard of
        self.last_error = ""
        self.gossip = Gossip(env, number, role, keeper, boot=boot, info=self._info)
        self.gossip.on_epoch(self._heard)
        self.gossip.subscribe(self._status)

    async def run(self) -> None:
        """Take part until cancelled; raises `Usurped` when another process has our identity."""
        unsubscribe = self._keeper.subscribe(self._switched)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.gossip.run)
                nursery.start_soon(self._follow)
        finally:
            unsubscribe()

    @abstractmethod
    def _status(self, member: Snapshot, old: str, new: str) -> None:
        """A member's status changed, or it started again."""

    def _info(self) -> Info:
        total, free = self._env.disk.usage()
        return Info(total, free, self._load())

    def _switched(self, _old: ClusterMap, _new: ClusterMap) -> None:
        self.gossip.map_changed()

    def _heard(self, address: str, epoch: int, digest: bytes) -> None:
        if self._keeper.heard(epoch, digest, address):
            self._source = (address, epoch)
            self._news.set()

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
