"""Session ids: unique in the cluster, minted without agreement.

An id is the node's number and a counter that the node keeps in its store.
"""

import trio

from dfs.codec import pack, unpack
from dfs.errors import Corrupt, DfsError
from dfs.ids import SESSION_BITS, NodeNumber, SessionId, session_id
from metadata.store.engine import Store

COUNTER_KEY = b"s/sid"  # in the node's store: (version, first counter of the next block)
COUNTER_BLOCK = 1024


class SessionIds:
    """Mints session ids that this node never minted before, whatever crashes.

    Counters are reserved durably, a block at a time; what is left of a block at a crash is never
    used.
    """

    def __init__(self, store: Store, number: NodeNumber) -> None:
        """Mint for node `number` with counters kept in `store`."""
        self._store = store
        self._number = number
        self._next = 0
        self._end = 0
        self._reserving = trio.Lock()

    async def mint(self) -> SessionId:
        """A new id; raises what the store raises, and `DfsError` when the counters are used up."""
        while self._next >= self._end:
            async with self._reserving:
                if self._next >= self._end:
                    await self._reserve()
        counter = self._next
        self._next += 1
        return session_id(self._number, counter)

    async def _reserve(self) -> None:
        """Make the next block durable, then use it."""
        stored = self._store.get(COUNTER_KEY)
        try:
            start = 1 if stored is None else unpack(stored)[1]
        except (DfsError, TypeError, IndexError) as e:
            raise Corrupt(f"the session counter of this node is unreadable: {stored!r}") from e
        end = start + COUNTER_BLOCK
        if end > 1 << SESSION_BITS:
            raise DfsError(
                f"node {self._number} has opened {start} sessions, which is all its number allows:"
                " move its homes to a node with a new number"
            )
        await self._store.batch([(COUNTER_KEY, pack((1, end)))])
        self._next, self._end = start, end
