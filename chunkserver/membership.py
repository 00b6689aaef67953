"""A chunkserver in the gossip: it is seen, hears of newer maps and of servers that return."""

from collections.abc import Callable

from chunkserver.catchup import CatchUp
from dfs.cluster.map import CHUNK
from dfs.cluster.swimeffects import Snapshot
from dfs.env import Env
from dfs.rpc import presence
from dfs.rpc.mapkeeper import MapKeeper


class Presence(presence.Presence):
    """The gossip, connected with the map keeper and the worker that catches up."""

    def __init__(
        self,
        env: Env,
        number: int,
        keeper: MapKeeper,
        catch_up: CatchUp,
        *,
        boot: int,
        load: Callable[[], float],
    ) -> None:
        """`boot` is higher at every start; `load` counts requests under way."""
        super().__init__(env, number, CHUNK, keeper, boot=boot, load=load)
        self._catch_up = catch_up

    def _status(self, member: Snapshot, old: str, new: str) -> None:
        """A server that was away has chunks to give, or lacks some that only we have noticed."""
        if member.role == CHUNK and old == "dead" and new == "alive":
            self._catch_up.wake()
