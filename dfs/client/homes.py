"""Asking the homes of a volume: the owner first, another one when that fails."""

from collections.abc import Callable
from typing import Any

import trio

from dfs.client.connect import Cluster
from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Priority
from dfs.errors import (
    DeadlineExceeded,
    DfsError,
    Fenced,
    InUse,
    InvalidArgument,
    NotHome,
    StaleEpoch,
    Unreachable,
)
from dfs.hashing import digest, partition_of

SILENT = 5.0  # seconds during which a node that did not answer is asked last


class Homes:
    """Where a session's next request goes.

    Any home answers for its volume, by forwarding if need be; asking the owner saves that hop.
    """

    def __init__(self, cluster: Cluster, volume: bytes) -> None:
        """Know no owner yet."""
        self._cluster = cluster
        self._volume = volume
        self.owner: int | None = None
        self._rotation = 0
        self._map: ClusterMap | None = None  # which `_numbers` are of
        self._numbers: tuple[int, ...] = ()
        self._told: int | None = None  # whom a node that is no home named instead

    def numbers(self) -> tuple[int, ...]:
        """Numbers of the homes, by the newest map; while they move the new ones, then the old."""
        current = self._cluster.get_map()
        if current is not self._map:
            old = current.old_homes(METADATA, partition_of(digest(self._volume)))
            self._numbers = tuple(dict.fromkeys((*current.volume_homes(self._volume), *old)))
            self._map = current
        return self._numbers

    def _next(self) -> int:
        if self._told is not None:
            told, self._told = self._told, None
            return told
        homes = self.numbers()
        if self.owner is not None and self.owner in homes:
            return self.owner
        at = self._rotation % len(homes)
        homes = (*homes[at:], *homes[:at])
        silent = self._cluster.silent
        if not silent:
            return homes[0]
        now = self._cluster.clock.monotonic()
        return next((home for home in homes if silent.get(home, 0.0) <= now), homes[0])

    def heard(self, owner: int | None) -> None:
        """An answer named the owner (None or negative: it does not know)."""
        if owner is not None and owner >= 0:
            self.owner = owner

    async def ask(
        self, method: str, args: tuple[Any, ...], *, timeout: float, priority: int = Priority.NORMAL
    ) -> Any:
        """One attempt at one home; a failure makes the next attempt go to another one."""
        home = self._next()
        try:
            current = self._cluster.get_map()
            result, _ = await self._cluster.rpc.call(
                current.address(METADATA, home),
                method,
                args,
                timeout=timeout,
                priority=priority,
                epoch=current.epoch,
            )
        except (Fenced, InUse, InvalidArgument):  # answers, not failures
            raise
        except DfsError as e:
            self._failed(home, e)
            if isinstance(e, StaleEpoch) and not self._cluster.learn(e):
                await self._cluster.refresh_map()
            elif isinstance(e, NotHome):
                await self._moved(home, e)
            raise
        self._cluster.silent.pop(home, None)
        return result

    def launch(
        self,
        method: str,
        args: tuple[Any, ...],
        *,
        timeout: float,
        then: Callable[[Any], None],
    ) -> None:
        """`ask` without a task that waits: calls `then` from the loop with the result or the error.

        `then` is called once, never from inside; what a failure says about the map is left to the
        next `ask`.  May raise `ConfigError` or `Unreachable` instead.
        """
        home = self._next()
        current = self._cluster.get_map()

        def answered(answer: tuple[Any, Any] | DfsError) -> None:
            if not isinstance(answer, DfsError):
                then(answer[0])
                return
            if not isinstance(answer, Fenced | InUse | InvalidArgument):
                self._failed(home, answer)
            then(answer)

        self._cluster.rpc.request(
            current.address(METADATA, home),
            method,
            args,
            timeout=timeout,
            on_reply=answered,
            epoch=current.epoch,
        )

    def _failed(self, home: int, error: DfsError) -> None:
        """An attempt at `home` came to nothing: the next one goes to another.

        What did not answer at all is asked last for a while, by the process's other sessions too:
        opening a volume takes two of them, and each would wait anew for a node that is stopped.
        """
        if isinstance(error, Unreachable | DeadlineExceeded):
            self._cluster.silent[home] = self._cluster.clock.monotonic() + SILENT
        if self.owner == home:
            homes = self.numbers()
            self.owner = None
            self._rotation = homes.index(home) + 1 if home in homes else 0
        elif self.owner is None:
            self._rotation += 1

    async def _moved(self, home: int, error: NotHome) -> None:
        """A node said that it is no home, or not the owner, and who is."""
        told = error.details[0] if error.details else None
        if not isinstance(told, int) or told == home:
            return
        members = {node.number for node in self._cluster.get_map().nodes}
        if told in members:
            self._told = told
        if told not in self.numbers():
            await self._cluster.refresh_map()

    async def pause(self, attempt: int) -> None:
        """Wait before another attempt: exponential, with jitter, half a second at most."""
        await trio.sleep(self._cluster.random.uniform(0.5, 1.0) * min(0.5, 0.01 * 2**attempt))

    def no_quorum(self, deadline: float) -> str:
        """What to tell when nobody gave a confirmed answer for `deadline` seconds."""
        homes = ", ".join(map(str, self.numbers()))
        return (
            f"no quorum for volume {self._volume.hex()}: none of its homes (nodes {homes}) gave a"
            f" confirmed answer for {deadline:g} s; `dfs cluster status` shows which are up"
        )
