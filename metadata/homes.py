"""The volume homes of a metadata node: the service behind `vol.*`.

Any home of a volume answers for it.  The one that owns the journal's ballot serves; another
forwards to the owner, once (a request carries how often it was forwarded), and takes the ballot
over only when its own calls to the owner failed for `PATIENCE`, or at once when no owner is known
and the homes before it in the map's order cannot be reached.  So a volume has one owner as long as
nothing fails, and nobody needs a clock or an election: two homes that both want the ballot cost
each other round trips, never a wrong answer.

`HOME.md` has the data, the invariants and the failure cases.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from dfs.cluster.map import METADATA, ClusterMap
from dfs.env import Context, Deferred, Env, Handler, Reply
from dfs.errors import (
    ConfigError,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    NotHome,
    StaleEpoch,
    StoreFailed,
    Unreachable,
    VolumeNotFound,
)
from dfs.hashing import digest, partition_of
from dfs.ids import NodeNumber
from dfs.rpc.blobs import BlobClient
from metadata.checkpoint import inline_folder
from metadata.journals import JournalHost
from metadata.requests import check_open
from metadata.sessionids import SessionIds
from metadata.store.engine import Store
from metadata.volumehome import Folder, OwnershipLost
from metadata.volumeservice import MAX_WATCH, VolumeService

log = logging.getLogger(__name__)

PATIENCE = 1.0  # seconds of failing calls to the owner before its ballot is taken
FORWARD_TIMEOUT = 1.5  # seconds for one forwarded call, besides what it waits on purpose
MAX_HANDLING = 30.0  # seconds, whatever deadline the caller has
TICK = 1.0  # seconds between rounds of housekeeping
VOLUME_SIZE = 16

# What a call to the owner may fail with when another home would perhaps do better.
_UNDECIDED = (
    Unreachable,
    DeadlineExceeded,
    NoQuorum,
    NotHome,
    VolumeNotFound,
    StaleEpoch,
    DiskFull,
    StoreFailed,
)

__all__ = ["Folder", "Homes"]

Local = Callable[[VolumeService], Awaitable[tuple[Any, ...]]]


class _Route:
    """What this node experienced with the owner of one volume."""

    __slots__ = ("failing_since", "owner", "patience", "unreachable")

    def __init__(self) -> None:
        self.owner: NodeNumber | None = None  # whom the rest is about
        self.failing_since: float | None = None
        self.patience = PATIENCE
        self.unreachable: set[NodeNumber] = set()

    def reset(self) -> None:
        """A call succeeded, or things changed."""
        self.failing_since = None
        self.unreachable.clear()


class Homes:
    """All the volumes this node is a home of; see the module's docstring.

    `folder` computes checkpoints; by default inline, on this node's own blob client.
    """

    def __init__(
        self,
        env: Env,
        number: NodeNumber,
        get_map: Callable[[], ClusterMap],
        journals: JournalHost,
        blobs: BlobClient,
        store: Store,
        *,
        folder: Folder | None = None,
    ) -> None:
        """Nothing is served before `run`."""
        self._env = env
        self._number = number
        self._get_map = get_map
        self._journals = journals
        self._folder = folder or inline_folder(blobs)
        self._sids = SessionIds(store, number)
        self._homes: dict[bytes, VolumeService] = {}
        self._routes: dict[bytes, _Route] = {}
        self._nursery: trio.Nursery | None = None
        self.forwarded = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the background work of all volumes until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                for volume in self._journals.volumes():
                    home = self.find(volume)
                    if home is not None:
                        home.tick(self._env.clock.monotonic())
                await trio.sleep(TICK)

    def handlers(self) -> dict[str, Handler]:
        """The methods `vol.*`."""
        return {
            "vol.open": self._open,
            "vol.commit": self._commit,
            "vol.watch": self._watch,
            "vol.sync": self._sync,
            "vol.delegate": self._delegate,
            "vol.return": self._return,
            "vol.close": self._close,
        }

    def status(self) -> list[tuple[bytes, int, int]]:
        """(volume, last chosen seq known here, number of the owner or -1) of each journal here."""
        found = []
        for volume in self._journals.volumes():
            journal = self._journals.get(volume)
            if journal is not None:
                owner = self._number if journal.owned else journal.owner
                found.append((volume, journal.chosen, -1 if owner is None else owner))
        return found

    def statistics(self) -> dict[str, int]:
        """Counters since the start, for people."""
        homes = self._homes.values()
        return {
            "volumes": len(homes),
            "owned": sum(home.core is not None for home in homes),
            "take_overs": sum(home.take_overs for home in homes),
            "forwarded": self.forwarded,
        }

    # -------------------------------------------------------------------------------- handlers

    async def _open(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, own, hops = _parse(args, 3)
        mode, nonce, name = own
        check_open(mode, nonce, name)

        async def local(home: VolumeService) -> tuple[Any, ...]:
            return await home.open(await self._sids.mint(), mode, nonce, name)

        return await self._serve(ctx, "vol.open", volume, own, hops, local)

    def _commit(
        self, ctx: Context, args: tuple[Any, ...], _data: memoryview
    ) -> Deferred | Awaitable[Reply]:
        """Without a task where nothing has to be waited for but the entry; see `commit_soon`."""
        if len(args) == 7:  # without the epoch, which is optional unless a home forwards
            args = (*args, 0)
        volume, own, hops = _parse(args, 7)
        home = self._homes.get(volume)
        if home is not None and home.ready():
            later = Deferred()

            def decided(answer: tuple[Any, ...] | DfsError) -> None:
                if isinstance(answer, tuple):
                    later.answer((answer, b""))
                elif isinstance(answer, _UNDECIDED) and self._nursery is not None:
                    self._nursery.start_soon(self._commit_again, later, ctx, volume, own, hops)
                else:
                    later.answer(answer)

            if home.commit_soon(own, decided):
                return later
        return self._serve(ctx, "vol.commit", volume, own, hops, lambda h: h.commit(own))

    async def _commit_again(
        self, later: Deferred, ctx: Context, volume: bytes, own: tuple[Any, ...], hops: int
    ) -> None:
        try:
            later.answer(
                await self._serve(ctx, "vol.commit", volume, own, hops, lambda h: h.commit(own))
            )
        except DfsError as e:
            later.answer(e)

    async def _watch(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, own, hops = _parse(args, 3)
        sid, have, wait = own
        if type(sid) is not int or type(have) is not int or type(wait) not in (int, float):
            raise InvalidArgument(f"vol.watch takes (volume, sid, have, wait), not {own!r:.80}")

        async def local(home: VolumeService) -> tuple[Any, ...]:
            return await home.watch(sid, have, wait)

        return await self._serve(ctx, "vol.watch", volume, own, hops, local, waits=MAX_WATCH)

    async def _sync(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, own, hops = _parse(args, 0)
        return await self._serve(ctx, "vol.sync", volume, own, hops, VolumeService.sync)

    async def _delegate(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, own, hops = _parse(args, 1)
        if type(own[0]) is not int:
            raise InvalidArgument(f"vol.delegate takes (volume, sid), not {own!r:.80}")
        return await self._serve(
            ctx, "vol.delegate", volume, own, hops, lambda h: h.delegate(own[0])
        )

    async def _return(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, own, hops = _parse(args, 2)
        sid, epoch = own
        if type(sid) is not int or type(epoch) is not int:
            raise InvalidArgument(f"vol.return takes (volume, sid, epoch), not {own!r:.80}")
        return await self._serve(
            ctx, "vol.return", volume, own, hops, lambda h: h.give_back(sid, epoch)
        )

    async def _close(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, own, hops = _parse(args, 1)
        if type(own[0]) is not int:
            raise InvalidArgument(f"vol.close takes (volume, sid), not {own!r:.80}")
        return await self._serve(ctx, "vol.close", volume, own, hops, lambda h: h.close(own))

    # --------------------------------------------------------------------------------- routing

    def find(self, volume: bytes) -> VolumeService | None:
        """The volume here, if its journal has a replica here."""
        home = self._homes.get(volume)
        if home is None:
            journal = self._journals.get(volume)
            if journal is None:
                return None
            if self._nursery is None:
                raise OwnershipLost(f"node {self._number} is still starting")
            home = self._homes[volume] = VolumeService(
                volume, journal, self._number, self._env.clock, self._nursery, self._folder
            )
            self._routes[volume] = _Route()
        return home

    async def _serve(
        self,
        ctx: Context,
        method: str,
        volume: bytes,
        own: tuple[Any, ...],
        hops: int,
        local: Local,
        *,
        waits: float = 0.0,
    ) -> Reply:
        """Answer here or where the owner is; a request without a final outcome is tried again."""
        clock, random = self._env.clock, self._env.random
        deadline = min(ctx.deadline, clock.monotonic() + MAX_HANDLING)
        hint: NodeNumber | None = None
        while True:
            home = self.find(volume)
            if home is None:
                return await self._serve_blank(method, volume, own, hops, deadline, waits)
            started = clock.monotonic()
            try:
                if home.ready():
                    return await local(home), b""
                target = self._target(home, hops, hint, started)
                if target is None:
                    await home.take_over()
                    self._routes[volume].reset()
                    continue
                if hops:
                    raise NotHome(
                        f"node {target} owns volume {volume.hex()}, not node {self._number}",
                        *self._homes_of(home, target),
                    )
                hint = None
                reply = await self._forward(target, method, volume, own, deadline, waits)
            except OwnershipLost as e:
                error: DfsError = e
            except _UNDECIDED as e:
                if hops:
                    raise
                error = e
                if not home.ready():
                    hint = self._failed(home, e, started)
            except DfsError:
                self._routes[volume].reset()  # an answer, if no good one: the owner is alive
                raise
            else:
                self._routes[volume].reset()
                return reply
            pause = random.uniform(0.02, 0.1)
            if clock.monotonic() + pause >= deadline:
                raise error
            await trio.sleep(pause)

    def _homes_of(self, home: VolumeService, first: NodeNumber) -> tuple[NodeNumber, ...]:
        return (first, *(m for m in home.journal.members if m != first))

    def _target(
        self, home: VolumeService, hops: int, hint: NodeNumber | None, now: float
    ) -> NodeNumber | None:
        """Whom to ask; None: take the ballot.  Raises `NotHome` when this node is no member."""
        me, journal, route = self._number, home.journal, self._routes[home.volume]
        members = journal.members
        if me not in members:
            raise NotHome(
                f"node {me} is no home of volume {home.volume.hex()}: nodes {members} are", *members
            )
        owner = None if journal.owner == me else journal.owner
        if owner != route.owner:
            route.owner = owner
            route.reset()
        since = route.failing_since
        if since is not None and now - since >= route.patience:
            return None
        if hint is not None and hint != me:
            return hint
        if owner is not None or hops:
            return owner
        order = [m for m in self._get_map().volume_homes(home.volume) if m in members]
        order += [m for m in members if m not in order]
        first = next(m for m in order if m == me or m not in route.unreachable)
        return None if first == me else first

    def _failed(self, home: VolumeService, error: DfsError, started: float) -> NodeNumber | None:
        """Note a call that failed; whom it said to ask instead."""
        route = self._routes[home.volume]
        if route.failing_since is None:
            route.failing_since = started
            # Homes that lost the same owner must not all prepare at the same time.
            route.patience = PATIENCE + self._env.random.uniform(0.0, 0.5)
        if isinstance(error, NotHome) and error.details:
            told = error.details[0]
            return told if isinstance(told, int) else None
        return None

    async def _forward(
        self,
        target: NodeNumber,
        method: str,
        volume: bytes,
        own: tuple[Any, ...],
        deadline: float,
        waits: float,
    ) -> Reply:
        left = deadline - self._env.clock.monotonic()
        try:
            address = self._get_map().address(METADATA, target)
        except ConfigError as e:
            raise Unreachable(str(e)) from e
        self.forwarded += 1
        try:
            return await self._env.rpc.call(
                address,
                method,
                (volume, *own, 1),
                timeout=max(0.0, min(left, FORWARD_TIMEOUT + waits)),
            )
        except Unreachable:
            route = self._routes.get(volume)
            if route is not None:
                route.unreachable.add(target)
            raise

    async def _serve_blank(
        self,
        method: str,
        volume: bytes,
        own: tuple[Any, ...],
        hops: int,
        deadline: float,
        waits: float,
    ) -> Reply:
        """Answer for a volume without a journal here: it is new to this home, or there is none."""
        new = self._get_map().volume_homes(volume)
        # While homes move, no volume is born: it exists if a majority of the old ones have it.
        deciding = self._get_map().old_homes(METADATA, partition_of(digest(volume))) or new
        homes = tuple(dict.fromkeys((*deciding, *new)))
        if self._number not in homes:
            raise NotHome(
                f"node {self._number} is no home of volume {volume.hex()}: nodes {homes} are",
                *homes,
            )
        absent = VolumeNotFound(f"no home holds a journal of volume {volume.hex()}")
        if hops:
            raise absent
        others = [number for number in homes if number != self._number]
        missing, error, asked = {self._number}, None, set()
        while others:
            target = others.pop(0)
            asked.add(target)
            try:
                return await self._forward(target, method, volume, own, deadline, waits)
            except VolumeNotFound:
                missing.add(target)
            except _UNDECIDED as e:
                error = e
                told = e.details[0] if isinstance(e, NotHome) and e.details else None
                if isinstance(told, int) and told in homes and told not in asked:
                    others = [told, *(n for n in others if n != told)]
        # A volume exists once a majority of its homes hold its genesis.
        if len(missing.intersection(deciding)) > len(deciding) // 2 or error is None:
            raise absent
        raise error


def _parse(args: tuple[Any, ...], count: int) -> tuple[bytes, tuple[Any, ...], int]:
    """(volume, the method's own arguments, hops); raises `InvalidArgument`."""
    if len(args) not in (count + 1, count + 2):
        raise InvalidArgument(f"{len(args)} arguments instead of {count + 1}")
    volume, hops = args[0], args[count + 1] if len(args) == count + 2 else 0
    if type(volume) is not bytes or len(volume) != VOLUME_SIZE:
        raise InvalidArgument(f"no volume id: {volume!r:.80}")
    if type(hops) is not int:
        raise InvalidArgument(f"malformed hop count {hops!r:.20}")
    return volume, args[1 : count + 1], hops
