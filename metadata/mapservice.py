"""Agreement on cluster maps: a journal whose members are the voters and whose entries are maps.

The map journal is a journal like those of volumes (`JOURNAL.md`), under a reserved id.  Its genesis
is a decree: a pure function of the map of epoch 1, which every voter of that map has from its
beginning, so each of them makes it on its own and all make the same.  A voter that joins later
starts blank and is filled.

An entry is `("map", stamp_ns, note, encoded map)`.  It *counts* if its map follows the newest one
that counts before it; any other is ignored, by every replica alike, so two proposers that raced are
harmless.  What counts is offered to this node's keeper, and goes on from there by gossip, by
`StaleEpoch` answers and by polling.

Voters change with the map, one per epoch: the map first, then a config entry of the journal.
Before anything else is proposed the members are made to be the voters of the newest map, so a
chain of changes never runs ahead of them.
"""

import logging
from typing import Any

import trio

from dfs.cluster.map import METADATA, ClusterMap
from dfs.codec import pack, unpack
from dfs.env import Context, Env, Handler, Priority, Reply
from dfs.errors import (
    DeadlineExceeded,
    DfsError,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    NotFound,
    NotHome,
    StaleEpoch,
    StoreFailed,
    Unreachable,
)
from dfs.ids import MAP_JOURNAL
from dfs.rpc.mapkeeper import MapKeeper
from dfs.volume import entries
from metadata.journalhandle import Journal
from metadata.journals import JournalHost
from metadata.journalstate import config_of
from metadata.mapsteps import check_step

log = logging.getLogger(__name__)

KEPT = 8  # maps that stay in the journal
LOOK = 1.0  # seconds between looks whether the members are the voters
PATIENCE = 3.0  # seconds a voter waits for the owner to change the members, times its rank
ATTEMPT = 2.0
MAX_HANDLING = 30.0
_ELSEWHERE = (Unreachable, DeadlineExceeded, NotHome, NoQuorum, DiskFull, StoreFailed, NotFound)
_KIND = "map"


def genesis_of(first: ClusterMap) -> bytes:
    """The genesis entry of the map journal: a pure function of the map of epoch 1."""
    if first.epoch != 1:
        raise InvalidArgument("the map journal begins with the map of epoch 1")
    return entries.encode(entries.GENESIS, 0, {"map": first.encode()}, 1, first.voters)


def encode_entry(stamp: int, note: str, data: bytes) -> bytes:
    """A map as an entry."""
    return pack((_KIND, stamp, note, data))


def decode_entry(payload: bytes) -> tuple[int, str, ClusterMap] | None:
    """(stamp, note, map) of an entry; None if it holds none.  Raises `Corrupt`."""
    config = config_of(payload)
    if config is not None:
        if config[0] != entries.GENESIS:
            return None
        params = entries.decode(payload).body[0]
        return 0, "the cluster was made", ClusterMap.decode(params["map"])
    kind, stamp, note, data = unpack(payload)
    if kind != _KIND:
        return None
    return stamp, note, ClusterMap.decode(data)


class MapService:
    """The map journal at one node, and `map.*`.  Works on nodes that are no voters too."""

    def __init__(self, env: Env, number: int, keeper: MapKeeper, journals: JournalHost) -> None:
        """Nothing happens before `run`."""
        self._env = env
        self._number = number
        self.keeper = keeper
        self._journals = journals
        self._journal: Journal | None = None
        self._counted: list[tuple[int, int, str, ClusterMap]] = []  # seq, stamp, note, map
        self._lock = trio.Lock()
        self._waiting_since: float | None = None

    # ---------------------------------------------------------------------------------- journal

    @property
    def newest(self) -> ClusterMap | None:
        """The newest map of the journal here; None without a journal."""
        return self._counted[-1][3] if self._counted else None

    @property
    def owned(self) -> bool:
        """Whether this node owns the map journal: it drives what somebody has to drive."""
        return self._journal is not None and self._journal.owned

    def status(self) -> dict[str, Any]:
        """For `node.status`."""
        journal = self._journal
        if journal is None:
            return {}
        return {"members": journal.members, "owner": journal.owner, "chosen": journal.chosen}

    def _find(self) -> Journal | None:
        """The journal here, begun by decree where that is this node's right."""
        if self._journal is None:
            found = self._journals.get(MAP_JOURNAL)
            first = self.keeper()
            if found is None and first.epoch == 1 and self._number in first.voters:
                found = self._journals.begin(MAP_JOURNAL, genesis_of(first))
            if found is not None:
                self._journal = found
                self._replay(found)
                found.subscribe(self._chosen, self._reset)
        return self._journal

    def _replay(self, journal: Journal) -> None:
        self._counted = []
        seq = journal.base
        while seq < journal.chosen:
            for number, payload in journal.entries(seq):
                self._count(number, payload)
                seq = number
        self._offer()

    def _chosen(self, seq: int, payload: bytes) -> None:
        before = self.newest
        self._count(seq, payload)
        if self.newest is not before:
            self._offer()

    def _reset(self, _base: int) -> None:
        self._counted = []

    def _count(self, seq: int, payload: bytes) -> None:
        try:
            found = decode_entry(payload)
        except (DfsError, ValueError, TypeError, KeyError) as e:
            log.error("entry %d of the map journal is not usable: %s", seq, e)  # noqa: TRY400 - damage, not a bug: no traceback
            return
        if found is None:
            return
        stamp, note, new = found
        newest = self.newest
        if newest is not None and not self.rule_follows(newest, new):
            return
        self._counted.append((seq, stamp, note, new))

    def rule_follows(self, newest: ClusterMap, new: ClusterMap) -> bool:
        """An entry counts only if it was made from the newest map that counts."""
        return new.epoch == newest.epoch + 1 and new.prev_hash == newest.digest

    def _offer(self) -> None:
        newest = self.newest
        if newest is None:
            return
        try:
            self.keeper.offer(newest)
        except (DfsError, OSError) as e:
            # told by the keeper's status; a failed disk is met again by the next offer
            log.error("the chosen map of epoch %d: %s", newest.epoch, e)  # noqa: TRY400 - damage, not a bug: no traceback

    # ------------------------------------------------------------------------------------ worker

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the journal and keep its members the voters, until cancelled."""
        if self._find() is not None:
            await self._journals.sync()
        task_status.started()
        while True:
            await trio.sleep(LOOK)
            try:
                await self._look()
            except DfsError as e:
                log.info("the voters of the map: %s", e)

    async def _look(self) -> None:
        journal = self._find()
        newest = self.newest
        if journal is None or newest is None:
            return
        if self._number not in journal.members:
            journal.hand_over()
            return
        if len(self._counted) > KEPT:
            self._counted = self._counted[-KEPT:]
            # the entry that the journal then begins with is one that counts
            await journal.trim(self._counted[0][0])
        if set(journal.members) == set(newest.voters):
            self._waiting_since = None
            return
        now = self._env.clock.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        rank = journal.members.index(self._number)
        if journal.owned or now - self._waiting_since > PATIENCE * (1 + rank):
            async with self._lock:
                await journal.acquire(ATTEMPT)
                await self._configure(journal)

    async def _configure(self, journal: Journal) -> None:
        """Make the voters of the newest map the members."""
        newest = self.newest
        if newest is None or set(journal.members) == set(newest.voters):
            return
        entry = entries.encode(
            entries.CONFIG, self._env.clock.time_ns(), journal.config_version + 1, newest.voters
        )
        await journal.propose(entry, ATTEMPT)

    # ----------------------------------------------------------------------------------- proposing

    async def propose(self, new: ClusterMap, note: str = "", *, timeout: float = 10.0) -> int:
        """Make `new` the next map; returns its epoch.

        Raises `StaleEpoch` (details: the newest map) when another map was first, `InvalidArgument`
        when it may not follow, `NoQuorum` when too few voters answer: it may be chosen later then.
        """
        return await self._propose(new, note, False, self._env.clock.monotonic() + timeout)

    async def _propose(self, new: ClusterMap, note: str, told: bool, deadline: float) -> int:
        clock = self._env.clock
        error: DfsError = NoQuorum("no voter answered in time")
        while True:
            journal = self._find()
            if journal is not None and self._number in journal.members:
                try:
                    return await self._propose_here(journal, new, note, deadline)
                except (NotHome, NoQuorum) as e:
                    error = e
            elif told:
                raise NotHome(
                    f"node {self._number} holds no journal of the map", *self.keeper().voters
                )
            if not told:
                found = await self._forward(new, note, deadline)
                if isinstance(found, int):
                    return found
                error = found or error
            pause = self._env.random.uniform(0.02, 0.2)
            if clock.monotonic() + pause >= deadline:
                raise error
            await trio.sleep(pause)

    async def _propose_here(
        self, journal: Journal, new: ClusterMap, note: str, deadline: float
    ) -> int:
        clock = self._env.clock
        async with self._lock:
            while True:
                left = deadline - clock.monotonic()
                if left <= 0:
                    raise NoQuorum("the voters did not agree on the map in time")
                await journal.acquire(min(left, ATTEMPT))
                newest = self.newest
                if newest is None:
                    raise NotHome("the map journal here is not filled yet", *journal.members)
                if newest.epoch >= new.epoch:
                    if any(m == new for _, _, _, m in self._counted):
                        await self._journals.sync()
                        return new.epoch
                    raise StaleEpoch(
                        f"the cluster has a map of epoch {newest.epoch} by now: make the change "
                        "from that one",
                        newest.encode(),
                    )
                check_step(newest, new)
                if set(journal.members) != set(newest.voters):
                    await self._configure(journal)
                    continue
                entry = encode_entry(clock.time_ns(), note, new.encode())
                await journal.propose(entry, min(left, ATTEMPT))

    async def _forward(self, new: ClusterMap, note: str, deadline: float) -> int | DfsError | None:
        """Ask the other voters, one after the other: the epoch, or why nobody could."""
        current = self.keeper()
        targets = [v for v in current.voters if v != self._number]
        self._env.random.shuffle(targets)
        error: DfsError | None = None
        for target in targets:
            left = deadline - self._env.clock.monotonic()
            if left <= 0:
                break
            try:
                (epoch,), _ = await self._env.rpc.call(
                    current.address(METADATA, target),
                    "map.propose",
                    (new.epoch - 1, new.encode(), note, 1),
                    timeout=min(left, 2 * ATTEMPT),
                    priority=Priority.HIGH,
                )
            except _ELSEWHERE as e:
                error = e
            except StaleEpoch as e:
                self.keeper.learn(e)
                raise
            else:
                return int(epoch)
        return error

    # ------------------------------------------------------------------------------------ handlers

    def handlers(self) -> dict[str, Handler]:
        """`map.*`; see `dfs.wire.messages`."""
        return {
            "map.get": self._on_get,
            "map.propose": self._on_propose,
            "map.history": self._on_history,
        }

    def _on_get(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        epoch = args[0] if args else 0
        current = self.keeper()
        if not epoch or epoch == current.epoch:
            return (current.encode(),), b""
        for _, _, _, found in self._counted:
            if found.epoch == epoch:
                return (found.encode(),), b""
        raise NotFound(
            f"the map of epoch {epoch!r} is not kept here; the newest is {current.epoch}"
        )

    async def _on_propose(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        expected, data, *more = args
        note, told = (*more, "", 0)[:2] if len(more) != 1 else (more[0], 0)
        if type(expected) is not int or type(data) is not bytes or type(note) is not str:
            raise InvalidArgument("map.propose takes (epoch, map, note)")
        new = ClusterMap.decode(data)
        if new.epoch != expected + 1:
            raise InvalidArgument(f"the map of epoch {new.epoch} cannot follow {expected}")
        deadline = min(ctx.deadline, self._env.clock.monotonic() + MAX_HANDLING)
        return (await self._propose(new, note, bool(told), deadline),), b""

    def _on_history(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        found = tuple((m.epoch, m.digest, stamp, note) for _, stamp, note, m in self._counted)
        return (found,), b""
