"""Two links per peer: control for small and urgent requests, bulk for the rest.

Apart, so that a heartbeat never queues behind megabytes.
"""

from collections.abc import Callable
from random import Random
from typing import Any

import trio

from dfs.env import Priority
from dfs.rpc.breaker import Breaker
from dfs.rpc.client import Link
from dfs.rpc.timers import Timers
from dfs.wire.connection import Connection

BULK_SIZE = 64 << 10  # a request with more data than this is bulk whatever its priority


class Pool:
    """All links of an endpoint, by address."""

    def __init__(
        self,
        *,
        greet: Callable[[], Connection],
        timers: Timers,
        nursery: trio.Nursery,
        random: Random,
        counts: dict[str, int],
    ) -> None:
        """Empty; the links' tasks run in `nursery`."""
        self._shared: dict[str, Any] = {
            "greet": greet,
            "timers": timers,
            "nursery": nursery,
            "random": random,
            "counts": counts,
        }
        self._random = random
        self._breakers: dict[str, Breaker] = {}  # one for both links: the peer is the same
        self._control: dict[str, Link] = {}
        self._bulk: dict[str, Link] = {}

    def link(self, address: str, priority: int, size: int) -> Link:
        """The link for a request of this priority with `size` bytes of data."""
        bulk = priority >= Priority.BULK or size > BULK_SIZE
        links = self._bulk if bulk else self._control
        link = links.get(address)
        if link is None:
            breaker = self._breakers.get(address)
            if breaker is None:
                breaker = self._breakers[address] = Breaker(self._random)
            links[address] = link = Link(address, bulk=bulk, breaker=breaker, **self._shared)
        return link

    def breakers(self) -> dict[str, dict[str, Any]]:
        """State of the circuit breaker of every peer."""
        return {address: b.statistics() for address, b in self._breakers.items()}

    def statistics(self) -> list[dict[str, Any]]:
        """State of every link."""
        return [x.statistics() for links in (self._control, self._bulk) for x in links.values()]
