"""`Gossip`: a daemon's membership, driven by the real clock and sent over its RPC connections.

The shell around `dfs.cluster.membership.Membership`.  Every message is one cast of the method
"swim"; casts may be lost, which is what the protocol is made for.  One task (`run`) does what is
due; messages are handled inline where they arrive.  Nothing here awaits between looking at the core
and acting on it, so no lock is needed.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import trio

from dfs.cluster import swimeffects
from dfs.cluster.map import ROLES, ClusterMap
from dfs.cluster.membership import Membership
from dfs.cluster.swim import member_key
from dfs.cluster.swimeffects import Changed, Effect, OtherMap, Send, Snapshot
from dfs.env import Context, Disk, Env, Handler, Priority, Reply
from dfs.errors import ConfigError, Corrupt, LocalProtocolError, RemoteProtocolError

log = logging.getLogger(__name__)

METHOD = "swim"
LONELY = 30.0  # seconds without any answer after which that is logged
BOOT_FILE = "boot"  # in the data directory
_DONE: Reply = ((), b"")

OnStatus = Callable[[Snapshot, str, str], None]
OnEpoch = Callable[[str, int, bytes], None]


class Usurped(ConfigError):
    """Another process has this node's identity; this one must not go on."""


class Info(NamedTuple):
    """What a daemon tells the others about itself, besides its map."""

    disk_total: int  # bytes
    disk_free: int  # bytes
    load: float  # any unit all daemons share, such as requests under way


def next_boot(disk: Disk) -> int:
    """A number higher than at every start before: the data directory's counter, durably raised.

    Raises `Corrupt` when the file is not a number.
    """
    last = 0
    if disk.exists(BOOT_FILE):
        file = disk.open(BOOT_FILE)
        try:
            text = file.pread(64, 0)
        finally:
            file.close()
        if not text.strip().isdigit():
            raise Corrupt(
                f"{disk.path(BOOT_FILE)} holds {text!r} instead of a number: write a number into "
                "it that is higher than the boot this node was last seen with"
            )
        last = int(text)
    disk.write_atomic(BOOT_FILE, b"%d\n" % (last + 1))
    return last + 1


class Gossip:
    """The membership of one daemon; call `run` in a task and serve `handlers`.

    `boot` must be higher at every start of the daemon.  `info` is asked every ten seconds or more
    seldom.  `address` and `node_id` default to what the map says of this node.
    """

    core_class: type[Membership] = Membership

    def __init__(
        self,
        env: Env,
        number: int,
        role: str,
        get_map: Callable[[], ClusterMap],
        *,
        boot: int,
        info: Callable[[], Info],
        address: str = "",
        node_id: bytes = b"",
    ) -> None:
        """Silent until `run`.

        Raises `ConfigError` if the map lacks this node and `address` or `node_id` is not given.
        """
        self._env = env
        self._get_map = get_map
        self._map = node_map = get_map()
        self._info = info
        if not (address and node_id):
            node = node_map.node(number)
            address = address or node.address(role)
            node_id = node_id or node.node_id
        if not address:
            raise ConfigError(f"node {number} has no {role} address in the cluster map")
        self.core = self.core_class(number, role, node_id, address, boot, env.random)
        self.on_usurped: Callable[[str], None] | None = None
        self._running = False
        self._scope: trio.CancelScope | None = None
        self._usurped = ""
        self._subscribers: list[OnStatus] = []
        self._on_epoch: list[OnEpoch] = []
        self._counts = dict.fromkeys(("sent", "received", "malformed", "callback_errors"), 0)

    # ----------------------------------------------------------------------------------- running

    def handlers(self) -> dict[str, Handler]:
        """What to serve at this daemon's address."""
        return {METHOD: self._handle, "node.members": self._on_members}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled, then say good-bye.

        Raises `Usurped` when another process turns out to have this identity; `on_usurped`, if set,
        is called before that.
        """
        if self._running or self.core.stopped:
            raise LocalProtocolError("a Gossip runs once")
        core = self.core
        start = self._now()
        self._running = True
        core.start(start)
        self._configure(start)
        task_status.started()
        lonely = start + LONELY
        try:
            while not self._usurped:
                now = self._now()
                self._refresh(now)
                self._do(core.tick(now))
                if not core.joined and now >= lonely and len(self._map.nodes) > 1:
                    lonely = now + LONELY
                    self._say_lonely(now - start)
                with trio.CancelScope() as self._scope:
                    self._set_alarm()
                    await trio.sleep_forever()
            if self.on_usurped is not None:
                self.on_usurped(self._usurped)
            raise Usurped(self._usurped)
        finally:
            self._scope = None
            self.leave()

    def leave(self) -> None:
        """Say good-bye now, so that nobody has to find out; the daemon is about to stop.

        Call it while the endpoint still runs, some tenths of a second before it is cancelled.
        """
        if self._running and not self.core.stopped:
            self._do(self.core.leave())

    def _now(self) -> float:
        return self._env.clock.monotonic()

    def _set_alarm(self) -> None:
        """Wake the task when the core wants it; from handlers too, as they bring that forward."""
        scope = self._scope
        if scope is not None:
            core = self.core
            due = min(core.next_deadline(), core.refresh_at)
            wait = 0.0 if self._usurped else max(0.0, due - self._now())
            scope.deadline = trio.current_time() + wait

    def _handle(self, _context: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        if not self._running:
            return _DONE
        self._counts["received"] += 1
        try:
            effects = self.core.handle(args, self._now())
        except RemoteProtocolError as e:
            self._counts["malformed"] += 1
            log.debug("dropped gossip: %s", e)
            raise
        self._do(effects)
        self._set_alarm()
        return _DONE

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._counts["sent"] += 1
                self._env.rpc.cast(effect.address, METHOD, effect.message, priority=Priority.HIGH)
            elif isinstance(effect, Changed):
                member, old, new = effect
                log.info("%s %d at %s: %s -> %s", member.role, member.number, member.address,
                         old, new)  # fmt: skip
                for fn in tuple(self._subscribers):
                    self._call(fn, member, old, new)
            elif isinstance(effect, OtherMap):
                for told in tuple(self._on_epoch):
                    self._call(told, effect.address, effect.epoch, effect.digest)
            else:
                log.error("%s", effect.reason)
                self._usurped = effect.reason

    def _call(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            fn(*args)
        except Exception:  # one bad subscriber must not end the membership of the whole daemon
            self._counts["callback_errors"] += 1
            log.exception("a subscriber of the membership failed")

    # ----------------------------------------------------------------------------- map and info

    def _refresh(self, now: float) -> None:
        node_map = self._get_map()
        changed = node_map is not self._map
        if changed:
            self._map = node_map
            self._configure(now)
        if changed or now >= self.core.refresh_at:
            total, free, load = self._info()
            self.core.refresh(
                swimeffects.Info(node_map.epoch, node_map.digest, total, free, float(load)), now
            )

    def map_changed(self) -> None:
        """Tell the others of a new map at once; without this they hear of it within a second."""
        if self._running:
            self._refresh(self._now())
            self._set_alarm()

    def _configure(self, now: float) -> None:
        seeds = [
            (member_key(node.number, role), node.node_id, node.address(role))
            for node in self._map.nodes
            for role in ROLES
            if node.address(role)
        ]
        self._do(self.core.configure(seeds, self._map.banned, now))

    def _say_lonely(self, seconds: float) -> None:
        tried = [m.address for m in self.core.members()]
        log.warning(
            "no other daemon has answered for %.0f s; tried %s: do they run, and does the network "
            "let us through?", seconds, ", ".join(tried[:10]),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------- views

    def _on_members(self, _ctx: Context, _args: tuple[Any, ...], _data: memoryview) -> Reply:
        """`node.members() -> (map, ...)`: everybody else, as this daemon sees them."""
        now = self._now()
        found = []
        for member in self.members():
            row: dict[str, Any] = {
                "number": member.number,
                "role": member.role,
                "status": member.status,
                "since": now - member.since,
                "boot": member.boot,
                "incarnation": member.incarnation,
            }
            if member.vitals is not None:
                row |= {
                    "heartbeat": member.vitals.heartbeat,
                    "map_epoch": member.vitals.epoch,
                    "disk_total": member.vitals.total,
                    "disk_free": member.vitals.free,
                    "load": member.vitals.load,
                }
            found.append(row)
        return (tuple(found),), b""

    def status(self, number: int, role: str) -> str:
        """Of a member: "alive", "suspect", "dead" (also: has left), "unknown" (never heard of)."""
        return self.core.status(member_key(number, role))

    def is_up(self, number: int, role: str) -> bool:
        """Whether nothing speaks against the member: alive, or on the map and not yet tried.

        A suspect is not up: ask others first, they are likely to answer sooner.
        """
        return self.core.is_up(member_key(number, role))

    def members(self) -> tuple[Snapshot, ...]:
        """All members other than this one, by number and role."""
        return self.core.members()

    def subscribe(self, fn: OnStatus) -> Callable[[], None]:
        """Call `fn(member, old, new)` whenever a status changes; returns how to end that.

        A member that started again without being missed comes as `alive -> alive`.  `fn` runs
        inline and must not block.
        """
        self._subscribers.append(fn)
        return lambda: self._subscribers.remove(fn)

    def on_epoch(self, fn: OnEpoch) -> Callable[[], None]:
        """Call `fn(address, epoch, digest)` when a member shows a newer map, or another one of our
        epoch; again every second or so as long as it is not ours.  Returns how to end that.
        """
        self._on_epoch.append(fn)
        return lambda: self._on_epoch.remove(fn)

    def statistics(self) -> dict[str, int]:
        """Counters and sizes, for status pages."""
        return {**self._counts, **self.core.statistics()}
