"""All journals of a node: `JournalHost` drives their replicas, `Journal` is the handle of one.

This is the only part of the journal that waits, sends and writes.  Per node there are one log, one
task that writes and syncs it, one that makes room ahead of it, one that tidies it, and one timer
task; a message costs no task:
the `jrnl` handler is a plain function that feeds the replica and carries out its effects.  Votes
leave, grouped, when the log's writer has synced what they speak of.

Concurrency: everything runs on the loop and nothing here awaits between reading a replica's state
and carrying out the effects.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from dfs.cluster.map import ClusterMap
from dfs.env import Context, Env, Handler, Priority, Reply
from dfs.errors import (
    AlreadyExists,
    DfsError,
    DiskFull,
    NoQuorum,
    NotFound,
    StoreFailed,
)
from dfs.ids import MAP_JOURNAL
from metadata.journal import Replica, Ticket
from metadata.journalacceptor import ACCEPT, FILL, PREPARE, Message
from metadata.journalhandle import Journal, Trimmed
from metadata.journallog import SEGMENT_BYTES, JournalLog
from metadata.journalstate import State

TICK = 0.02  # seconds between looks at the timers of busy journals
IDLE_LOOK = 1.0  # seconds between looks at timers that are far away
MAX_ERRORS = 100

__all__ = ["Journal", "JournalHost", "Trimmed"]


class JournalHost:
    """All journals of node `number`; `run` recovers and drives them.

    Without a journal the node votes as a blank replica, when a message arrives for a volume that
    the map places here; it then fills itself from whoever sent the message.
    """

    replica_class: type[Replica] = Replica
    journal_class: type[Journal] = Journal

    def __init__(
        self,
        env: Env,
        number: int,
        get_map: Callable[[], ClusterMap],
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Nothing is opened before `run`."""
        self.env = env
        self.number = number
        self.log: JournalLog
        self.now = env.clock.monotonic
        self.active: set[Journal] = set()  # they have timers that may be due soon
        self._timers_parked: trio.Event | None = None
        self._resting = False  # the timers' task waits, and nobody has to be told of any time
        self.errors: dict[str, int] = {}
        self.failed: StoreFailed | None = None
        self._get_map = get_map
        self._map: ClusterMap | None = None
        self._addresses: dict[int, str] = {}
        self._journals: dict[bytes, Journal] = {}
        self._later: dict[Journal, float] = {}
        self._segment_bytes = segment_bytes
        self._running = False
        self._tickets = 0
        self._tidy = trio.Event()
        self._broken = trio.Event()

    # ------------------------------------------------------------------------------------- use

    def get(self, volume: bytes) -> Journal | None:
        """The journal of a volume; None when this node holds no entry of it."""
        journal = self._journals.get(volume)
        return None if journal is None or journal.replica.blank else journal

    def volumes(self) -> list[bytes]:
        """Volumes that have a journal here; the journal of the cluster map is of none."""
        return sorted(
            v for v, j in self._journals.items() if not j.replica.blank and v != MAP_JOURNAL
        )

    def begin(self, volume: bytes, entry: bytes) -> Journal:
        """Start a journal with a genesis that is a decree: every member makes the same one."""
        journal = self._journals.get(volume) or self._blank(volume)
        if journal.replica.blank:
            journal.genesis_entry(entry)
        return journal

    async def sync(self) -> None:
        """Return once every record made so far is durable."""
        await self.log.sync()

    async def create(self, volume: bytes, entry: bytes, *, timeout: float) -> None:
        """Place the genesis entry at the volume's homes; returns when a majority holds it.

        Idempotent as long as the entry is the same, byte for byte.  Only for a volume that the
        registry calls `creating`.  Raises `AlreadyExists` when a home holds another genesis,
        `NoQuorum` naming who answered.
        """
        homes = self._get_map().volume_homes(volume)
        answers: dict[int, Any] = {}
        news = trio.Event()

        def answered(home: int, answer: Any) -> None:
            answers[home] = answer
            news.set()

        for home in homes:
            self.env.rpc.request(
                self.address(home),
                "jrnl.genesis",
                (volume, entry),
                timeout=timeout,
                on_reply=partial(answered, home),
                priority=Priority.NORMAL,
                epoch=self._get_map().epoch,
            )
        held: list[int] = []
        while len(answers) < len(homes) and len(held) <= len(homes) // 2:
            await news.wait()
            news = trio.Event()
            for answer in answers.values():
                if isinstance(answer, AlreadyExists):
                    raise answer
            held = [h for h, a in answers.items() if not isinstance(a, DfsError)]
        if len(held) <= len(homes) // 2:
            why = "; ".join(
                f"node {h}: {answers[h]}"
                for h in homes
                if isinstance(answers.get(h, NoQuorum()), DfsError)
            )
            raise NoQuorum(
                f"volume {volume.hex()}: its journal is at nodes {held} of {list(homes)}: {why}"
            )

    def handlers(self) -> dict[str, Handler]:
        """RPC methods; see `dfs.wire.messages`."""
        return {
            "jrnl": self._on_message,
            "jrnl.genesis": self._on_genesis,
            "jrnl.status": self._on_status,
        }

    def statistics(self) -> dict[str, int]:
        """Numbers of the log and of journals."""
        return {"journals": len(self._journals), "active": len(self.active)} | (
            self.log.statistics() if self._running else {}
        )

    # ------------------------------------------------------------------------------------- run

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover the log under `journals/`, then serve until cancelled.

        Raises `StoreFailed` when the log is damaged or the disk fails: such a node must not vote.
        """
        self.log, states = await JournalLog.open(
            self.env.disk, "journals", segment_bytes=self._segment_bytes
        )
        self.log.later = self.env.rpc.later
        for text in self.log.cut:
            self.report(text)
        self._journals = {v: self.journal_class(self, v, s) for v, s in states.items()}
        self._running = True
        self.active.update(self._journals.values())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drive, self.log.run)
                nursery.start_soon(self._drive, self.log.make_room)
                nursery.start_soon(self._timers)
                nursery.start_soon(self._tidy_up)
                task_status.started()
                await self._broken.wait()
                nursery.cancel_scope.cancel()
            raise self.failed or StoreFailed()
        finally:
            self._running = False
            ended = self.failed or StoreFailed("the journals of this node were stopped")
            for journal in self._journals.values():
                journal.stop(ended)

    async def _drive(self, run: Callable[[], Awaitable[None]]) -> None:
        try:
            await run()
        except StoreFailed as e:
            self._break(e)

    def _break(self, error: StoreFailed) -> None:
        if self.failed is None:
            self.failed = error
            self._running = False
            self._broken.set()

    async def _timers(self) -> None:
        look = 0.0
        while True:
            now = self.now()
            if now >= look:
                look = now + IDLE_LOOK
                self.active.update(j for j, due in self._later.items() if due < look)
            # Sorted, because the order of a set of objects differs from run to run.
            for journal in sorted(self.active, key=lambda j: j.volume):
                due = journal.replica.due()
                self._later.pop(journal, None)
                if due is not None and due <= now:
                    journal.tick(now)
                elif due is None or due > now + IDLE_LOOK:
                    self.active.discard(journal)
                    if due is not None:
                        self._later[journal] = due
            marked = self.log.idle(now)
            if self.active:
                await trio.sleep(TICK)
                continue
            # Who only votes has no timers, and is not looked at for each vote.
            pause = IDLE_LOOK if self._later else float("inf")
            if not marked:
                pause = min(pause, self.log.idle_at(now) - now)
            self._resting = marked
            self._timers_parked = event = trio.Event()
            with trio.move_on_after(pause):
                await event.wait()
            self._timers_parked = None
            self._resting = False

    def look_after(self, journal: Journal) -> None:
        """Something happened in a journal that is not `active`: is there a time to look at?"""
        if journal.replica.due() is not None:
            self.active.add(journal)
        elif not self._resting:
            return
        if self._timers_parked is not None:
            self._timers_parked.set()

    async def _tidy_up(self) -> None:
        while True:
            await self._tidy.wait()
            self._tidy = trio.Event()
            try:
                await self.log.collect()
            except StoreFailed as e:
                self._break(e)

    # ----------------------------------------------------------------------------- for journals

    def check(self, *, writes: bool = True) -> None:
        """Raise what forbids this node to take part now: a failed or, to write, a full disk."""
        if self.failed is not None or not self._running:
            raise StoreFailed(str(self.failed or "the journals of this node are not running"))
        if writes and self.log.full is not None:
            raise DiskFull(str(self.log.full))

    def ticket(self) -> Ticket:
        """A number for a wait."""
        self._tickets += 1
        return self._tickets

    def fetch(self, volume: bytes, seq: int) -> tuple[bytes, bytes]:
        """(prev_hash, payload) of an entry, from the log."""
        try:
            return self.log.read(volume, seq)
        except StoreFailed as e:
            self._break(e)
            raise

    def send(self, to: int, volume: bytes, message: Message) -> None:
        """Cast a message to a node; lost when the map does not know it."""
        address = self.address(to)
        if address:
            self.env.rpc.cast(address, "jrnl", (volume, self.number, message))

    def address(self, node: int) -> str:
        """Where a metadata node listens; "" when the map does not know it."""
        current = self._get_map()
        if current is not self._map:
            self._map = current
            self._addresses = {n.number: n.metadata_addr for n in current.nodes}
        return self._addresses.get(node, "")

    def report(self, text: str) -> None:
        """Keep an error for people; `errors` counts them by text."""
        if text in self.errors or len(self.errors) < MAX_ERRORS:
            self.errors[text] = self.errors.get(text, 0) + 1

    def tidy(self) -> None:
        """Look for segments that can go."""
        self._tidy.set()

    # -------------------------------------------------------------------------------- handlers

    def _on_message(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, sender, message = args
        journal = self._journals.get(volume)
        if journal is None:
            if not self._running or not self._expects(volume):
                return (), b""
            journal = self._blank(volume)
        # A full disk keeps its old promises and makes no new ones: nothing may pile up in memory.
        if self._running and (self.log.full is None or message[0] not in (PREPARE, ACCEPT, FILL)):
            journal.receive(sender, message)
        return (), b""

    def _expects(self, volume: bytes) -> bool:
        """Whether the map makes this node a member of a journal that it holds nothing of."""
        current = self._get_map()
        if volume == MAP_JOURNAL:
            return self.number in current.voters
        return self.number in current.volume_homes(volume)

    def _blank(self, volume: bytes) -> Journal:
        journal = self._journals[volume] = self.journal_class(self, volume, State())
        return journal

    async def _on_genesis(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, entry = args
        self.check()
        journal = self._journals.get(volume) or self._blank(volume)
        if journal.replica.blank:
            journal.genesis_entry(entry)
        elif journal.genesis != entry:
            raise AlreadyExists(f"volume {volume.hex()} has another genesis entry at this node")
        await self.log.sync()
        return (1,), b""

    async def _on_status(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        (volume,) = args
        self.check(writes=False)
        journal = self._journals.get(volume)
        if journal is None:
            raise NotFound(f"volume {volume.hex()} has no journal at node {self.number}")
        status = journal.status()
        await self.log.sync()  # "holds an entry" means durably
        return (status,), b""
