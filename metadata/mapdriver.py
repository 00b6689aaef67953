"""The driver of a transition: asks all nodes how far they are and proposes the next step.

It runs at every voter, but one acts: the owner of the map journal, or, when the epoch has not moved
for a while, the next one in line, since whoever proposes becomes the owner.  Two that act at the
same time are harmless: one map is chosen.  Whether a step is safe is for `dfs.cluster.joint` to
say; here is only who is asked and when.  Nodes that do not answer are left out, which is what the
thresholds are made for.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from dfs.cluster.joint import RULES, ChunkProgress, Progress, Rules, lacking
from dfs.cluster.map import CHUNK, METADATA, ClusterMap
from dfs.cluster.node import Node
from dfs.env import Context, Env, Handler, Priority, Reply
from dfs.errors import Busy, DeadlineExceeded, DfsError, RemoteProtocolError
from dfs.rpc.mapkeeper import MapKeeper
from metadata.mapservice import MapService

log = logging.getLogger(__name__)

LOOK = (0.05, 1.0)  # seconds between polls: at the beginning of an epoch, when nothing happens
SLOWER = 0.1  # of the age of the epoch: how the first becomes the second
ASK = (1.0, 4.0)  # seconds a node may take to report, in each attempt
FOLLOW = 0.5  # seconds a node may take to get the map that it is asked about
PATIENCE = 10.0  # seconds without a step until the next voter acts as well
TELL = 10.0  # seconds between log lines that say the same

Report = Callable[[], Awaitable[Progress]]


class MapDriver:
    """The worker, and `map.progress` and `map.waiting`.  `report` tells this node's progress."""

    rules: Rules = RULES

    def __init__(
        self, env: Env, number: int, keeper: MapKeeper, maps: MapService, report: Report
    ) -> None:
        """Nothing happens before `run`."""
        self._env = env
        self._number = number
        self._keeper = keeper
        self._maps = maps
        self._report = report
        self._since = (0, 0.0)  # epoch, when it was first seen
        self._told: tuple[str, float] = ("", 0.0)
        self.waiting: tuple[str, ...] = ()  # why the transition does not go on, for people
        self.steps = 0

    def handlers(self) -> dict[str, Handler]:
        """`map.progress() -> fields of Progress`, `map.waiting() -> (epoch, phases, reasons)`."""
        return {"map.progress": self._on_progress, "map.waiting": self._on_waiting}

    async def _on_progress(self, ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        if ctx.epoch > self._keeper().epoch:  # the question is how this node learns of the map
            with contextlib.suppress(Busy):  # then what it says is of the map it has
                await self._keeper.catch_up(ctx.epoch, self._voters(), timeout=FOLLOW)
        return (await self._report()).fields(), b""

    def _voters(self) -> list[str]:
        current = self._keeper()
        return [current.address(METADATA, v) for v in current.voters if v != self._number]

    def _on_waiting(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        current = self._keeper()
        phases = (current.phase(METADATA), current.phase(CHUNK))
        return (current.epoch, phases, self.waiting, self._maps.owned), b""

    async def run(self) -> None:
        """Drive transitions until cancelled."""
        while True:
            current = self._keeper()
            if current.transition is None:
                self.waiting = ()
                await self._keeper.wait_for(current.epoch + 1)
                continue
            mine = self._mine(current)
            if mine:
                try:
                    await self._drive(current)
                except DfsError as e:
                    self.waiting = (f"the voters of the map: {e}",)
                    log.info("cannot drive the transition now: %s", e)
            else:
                self.waiting = ()
            age = self._env.clock.monotonic() - self._since[1]
            pause = min(LOOK[1], LOOK[0] + SLOWER * age) * self._env.random.uniform(0.8, 1.2)
            with trio.move_on_after(pause):
                await self._keeper.wait_for(current.epoch + 1)

    def _mine(self, current: ClusterMap) -> bool:
        now = self._env.clock.monotonic()
        if self._since[0] != current.epoch:
            self._since = (current.epoch, now)
        if self._number not in current.voters:
            return False
        rank = current.voters.index(self._number)
        return self._maps.owned or now - self._since[1] > PATIENCE * rank + 1.0

    async def _drive(self, current: ClusterMap) -> None:
        """Take the step that is safe, if one is."""
        reasons: list[str] = []
        for role in (METADATA, CHUNK):
            if not current.phase(role):
                continue
            reports = await self._ask_all(current, role)
            missing = lacking(current, role, reports, self.rules)
            if missing:
                reasons += missing.reasons
                continue
            new = current.step(role)
            done = _words(current, new, role)
            await self._maps.propose(new, done)
            self.steps += 1
            self.waiting = ()
            log.info("the transition went on to epoch %d: %s", new.epoch, done)
            return
        self.waiting = tuple(reasons)
        self._tell()

    def _tell(self) -> None:
        text = "; ".join(self.waiting[:5])
        now = self._env.clock.monotonic()
        if text != self._told[0] or now > self._told[1] + TELL:
            self._told = (text, now)
            log.info("the transition waits: %s", text)

    async def _ask_all(self, current: ClusterMap, role: str) -> Mapping[int, Any]:
        """The reports of all nodes of the role that answer."""
        found: dict[int, Any] = {}
        async with trio.open_nursery() as nursery:
            for node in current.nodes:
                if node.address(role):
                    nursery.start_soon(self._ask, node, role, current.epoch, found)
        return found

    async def _ask(self, node: Node, role: str, epoch: int, found: dict[int, Any]) -> None:
        method = "map.progress" if role == METADATA else "chunk.progress"
        decode = Progress.from_fields if role == METADATA else ChunkProgress.from_fields
        for timeout in ASK:
            try:
                answer, _ = await self._env.rpc.call(
                    node.address(role), method, timeout=timeout, priority=Priority.HIGH, epoch=epoch
                )
                found[node.number] = decode(answer)
            except DeadlineExceeded as e:
                log.debug("node %d reports nothing: %s", node.number, e)
                continue
            except RemoteProtocolError as e:
                log.warning("node %d: %s", node.number, e)
            except DfsError as e:
                log.debug("node %d reports nothing: %s", node.number, e)
            return


def _words(current: ClusterMap, new: ClusterMap, role: str) -> str:
    """What a step from `current` to `new` means, for the history of maps."""
    if new.transition == current.transition:
        return "voters change before nodes leave"
    if role == CHUNK:
        return "chunks are at their new homes"
    if current.phase(METADATA) == 1:
        return "metadata is read from its new homes"
    return "metadata is at its new homes"
