"""Journal members follow the map: what each home does so that volumes move with their partitions.

Members are decided by the journal itself, in a config entry; the map only says where they should
be.  The owner of a volume proposes that entry when the two differ; if it does not, the other
members do, after a while, each later than the one before, by taking the volume over.  It is
proposed only when a majority of the new members has this map and answers: a config that names
homes which are not there yet would leave the volume without a majority until they come.

A home that is no member any more tells the new members what it knows until all have confirmed, and
answers whoever asks with who they are.  `progress` is what this node says about its journals while
partitions change homes.
"""

import logging
from typing import Any

import trio

from dfs.cluster.joint import Journal as JournalReport
from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Env, Priority
from dfs.errors import ConfigError, DfsError
from dfs.hashing import digest, partition_of
from dfs.rpc.mapkeeper import MapKeeper
from metadata.homes import Homes
from metadata.journals import JournalHost

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between looks
HAND_OVER = 2.0  # seconds between two tellings of the new members
PATIENCE = 3.0  # seconds a member waits for those before it to move a volume
AGAIN = (0.3, 2.0)  # seconds after a failed attempt: first, longest
AT_ONCE = 8  # volumes moved at the same time
PING = 1.0


class JournalMoves:
    """The worker; `waiting` says which volumes have not moved and why."""

    def __init__(
        self, env: Env, number: int, keeper: MapKeeper, journals: JournalHost, homes: Homes
    ) -> None:
        """Nothing happens before `run`."""
        self._env = env
        self._number = number
        self._keeper = keeper
        self._journals = journals
        self._homes = homes
        self._since: dict[bytes, float] = {}  # volume -> when it was seen at the wrong members
        self._due: dict[bytes, float] = {}
        self._pause: dict[bytes, float] = {}
        self._moving: set[bytes] = set()
        self._handed = 0.0
        self.moved = 0
        self.waiting: dict[bytes, str] = {}

    async def run(self) -> None:
        """Move volumes until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                seen = self._keeper().epoch
                self._look(nursery)
                with trio.move_on_after(LOOK):
                    await self._keeper.wait_for(seen + 1)

    def _look(self, nursery: trio.Nursery) -> None:
        now = self._env.clock.monotonic()
        current = self._keeper()
        telling = now >= self._handed + HAND_OVER
        if telling:
            self._handed = now
        wrong: dict[bytes, float] = {}
        for volume in self._journals.volumes():
            journal = self._journals.get(volume)
            if journal is None:
                continue
            if self._number not in journal.members:
                if telling:
                    journal.hand_over()
                continue
            if set(journal.members) == set(current.volume_homes(volume)):
                continue
            since = wrong[volume] = self._since.get(volume, now)
            rank = journal.members.index(self._number)
            mine = journal.owned or now - since > PATIENCE * (1 + rank)
            if (
                mine
                and volume not in self._moving
                and len(self._moving) < AT_ONCE
                and self._due.get(volume, 0.0) <= now
            ):
                self._moving.add(volume)
                nursery.start_soon(self._move, volume, current)
        self._since = wrong
        self._due = {v: t for v, t in self._due.items() if v in wrong}
        self._pause = {v: t for v, t in self._pause.items() if v in wrong}
        self.waiting = {v: t for v, t in self.waiting.items() if v in wrong}

    async def _move(self, volume: bytes, current: ClusterMap) -> None:
        try:
            target = current.volume_homes(volume)
            silent = await self._silent(current, target)
            if len(target) - len(silent) <= len(target) // 2:
                self._later(volume, f"new homes {silent} do not answer with this map yet")
                return
            home = self._homes.find(volume)
            if home is None:
                return
            if not home.ready():
                await home.take_over()
            await home.configure(target)
            self.moved += 1
            log.info("volume %s moved to nodes %s", volume.hex(), target)
        except DfsError as e:
            self._later(volume, str(e))
        finally:
            self._moving.discard(volume)

    def _later(self, volume: bytes, why: str) -> None:
        self.waiting[volume] = why
        pause = self._pause.get(volume, AGAIN[0])
        self._pause[volume] = min(2 * pause, AGAIN[1])
        self._due[volume] = self._env.clock.monotonic() + pause
        log.info("volume %s cannot move yet: %s", volume.hex(), why)

    async def _silent(self, current: ClusterMap, target: tuple[int, ...]) -> list[int]:
        """Those of the new homes that do not answer, or have an older map, until most are ready."""
        ready = {self._number} & set(target)

        async def ask(number: int) -> None:
            try:
                (_, _, node_id, epoch), _ = await self._env.rpc.call(
                    current.address(METADATA, number), "ping", timeout=PING, priority=Priority.HIGH
                )
                if epoch >= current.epoch and node_id == current.node(number).node_id:
                    ready.add(number)
                if len(ready) > len(target) // 2:
                    nursery.cancel_scope.cancel()
            except (DfsError, ConfigError) as e:
                log.debug("node %d: %s", number, e)

        async with trio.open_nursery() as nursery:
            for number in target:
                if number != self._number:
                    nursery.start_soon(ask, number)
        return [number for number in target if number not in ready]

    # ------------------------------------------------------------------------------------ reports

    async def progress(self) -> tuple[JournalReport, ...]:
        """(volume, members, version, held) of each journal here whose partition changes homes.

        Looked up first and made durable then, so that "held" survives a power cut.
        """
        current = self._keeper()
        found: list[JournalReport] = []
        for volume in self._journals.volumes():
            journal = self._journals.get(volume)
            if journal is None or not current.old_homes(METADATA, partition_of(digest(volume))):
                continue
            found.append((volume, journal.members, journal.config_version, True))
        await self._journals.sync()
        return tuple(found)

    def statistics(self) -> dict[str, Any]:
        """For status lines."""
        return {"moved": self.moved, "waiting": len(self.waiting), "moving": len(self._moving)}
