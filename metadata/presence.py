"""A metadata node's part in the gossip: it is seen, sees who is alive, and hears of newer maps.

Liveness orders whom a coordinator asks, sends hints on their way and wakes anti-entropy; it never
changes where anything belongs.  A later life of this very node, seen anywhere, ends this one.
"""

from collections.abc import Callable

from dfs.cluster.map import METADATA
from dfs.cluster.swimeffects import Snapshot
from dfs.env import Env
from dfs.rpc import presence
from dfs.rpc.mapkeeper import MapKeeper


class Presence(presence.Presence):
    """The gossip, connected with the map keeper and with those who want to know of returns."""

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
        super().__init__(env, number, METADATA, keeper, boot=boot, load=load)
        self._number = number
        self._returned = returned
        self.gossip.on_usurped = usurped

    def is_up(self, node: int) -> bool:
        """Whether metadata node `node` answers, as far as is known; always true for this one."""
        return node == self._number or self.gossip.is_up(node, METADATA)

    def _status(self, member: Snapshot, old: str, new: str) -> None:
        """Also a restart that nobody missed is told: as "alive" to "alive"."""
        if member.role == METADATA and member.number != self._number and new == "alive":
            self._returned(member.number)
