"""Boot numbers of a chunkserver: of two processes with one directory's copies, the older one stops.

A chunk directory promises nothing that an older copy of it could break: chunks prove themselves,
and what a copy lacks is filled in again.  So a restored directory may run, but never twice: two
servers at one identity would each be counted for what the other has.  Each start takes the next
number with a random nonce and has the metadata nodes remember it (`node.boot`, role "chunk").  A
*starting* process that meets its number or a higher one with another nonce takes the next one after
that; a process that has *started*, in that it was noted once, meets one only if a later one has
started since, and ends.

On disk: the file `boot` of `dfs.rpc.gossip`, which counts the same starts.
"""

import logging
from typing import Any

import trio

from dfs.cluster.map import CHUNK, METADATA, Node
from dfs.env import Env, Priority
from dfs.errors import ConfigError, DfsError
from dfs.rpc.gossip import BOOT_FILE
from dfs.rpc.mapkeeper import MapKeeper

log = logging.getLogger(__name__)

NONCE = 16  # bytes
ASK = 2.0  # seconds a metadata node may take
EVERY = 30.0  # seconds between rounds
AGAIN = 1.0  # seconds between rounds until a metadata node has noted the number


class Usurped(ConfigError):
    """A later process runs as this chunkserver; this one must not go on."""


class ChunkBoot:
    """The present number, and the task that keeps it known."""

    def __init__(self, env: Env, node: Node, keeper: MapKeeper, boot: int) -> None:
        """`boot` is what `next_boot` returned: durable already."""
        self._env = env
        self._node = node
        self._keeper = keeper
        self.boot = boot
        self.nonce = env.random.randbytes(NONCE)
        self.started = False

    def rule_later(self, boot: int, nonce: bytes) -> bool:
        """Whether what a metadata node has seen belongs to another process than this one."""
        return boot >= self.boot and nonce != self.nonce

    async def run(self) -> None:
        """Until cancelled.  Raises `Usurped` when a later process runs as this server."""
        while True:
            again = await self.tell()
            if not again:
                await trio.sleep(EVERY if self.started else AGAIN)

    async def tell(self) -> bool:
        """One round: tell all metadata nodes; whether the number grew and must be told again."""
        seen: list[tuple[int, bytes, str]] = []
        current = self._keeper()
        async with trio.open_nursery() as nursery:
            for node in current.nodes:
                if node.metadata_addr:
                    nursery.start_soon(self._tell, node, seen)
        later = [answer for answer in seen if self.rule_later(*answer[:2])]
        if not later:
            self.started = self.started or bool(seen)
            return False
        boot, _, witness = max(later)
        if self.started:
            raise Usurped(
                f"chunkserver {self._node.name} stops: {witness} has seen its boot number {boot}, "
                f"this process has {self.boot}, so another process was started as the same server "
                f"after it, on a copy of {self._env.disk.path()}. One of the two must go: remove "
                "the copy, then start the server again"
            )
        self.boot = boot + 1
        disk = self._env.disk
        await disk.run(disk.write_atomic, BOOT_FILE, b"%d\n" % self.boot)
        log.warning(
            "this directory is an older copy, or its server ran elsewhere: %s has seen boot "
            "number %d of %s; going on with %d, and any other process of it stops",
            witness,
            boot,
            self._node.name,
            self.boot,
        )
        return True

    async def _tell(self, node: Node, seen: list[tuple[int, bytes, str]]) -> None:
        args: tuple[Any, ...] = (
            self._node.number, self._node.node_id, self.boot, self.nonce, CHUNK,
        )  # fmt: skip
        try:
            (boot, nonce), _ = await self._env.rpc.call(
                node.address(METADATA), "node.boot", args, timeout=ASK, priority=Priority.HIGH
            )
        except ConfigError:  # this server was removed from the cluster
            raise
        except DfsError as e:
            log.debug("node %s does not note the boot number: %s", node.name, e)
        else:
            seen.append((boot, nonce, node.name))
