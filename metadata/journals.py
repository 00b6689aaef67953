"""All journals of a node: `JournalHost` drives their replicas, `Journal` is the handle of one.

This is the only part of the journal that waits, sends and writes.  Per node there are one log, one
task that writes and syncs it, one timer task and one that tidies the log; a message costs no task:
the `jrnl` handler is a plain function that feeds the replica and carries out its effects.  Votes
leave, grouped, when the log's writer has synced what they speak of.

Concurrency: everything runs on the loop and nothing here awaits between reading a replica's state
and carrying out the effects.  `Journal._run` is not re-entered: a subscriber that makes further
effects has them queued behind the ones under way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import outcome
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
from metadata.journal import Replica, Ticket
from metadata.journalacceptor import (
    ACCEPT,
    CHOSEN,
    FILL,
    OUTCOME,
    PERSIST,
    PREPARE,
    REPLY,
    RESET,
    SEND,
    Effect,
    Message,
)
from metadata.journallog import SEGMENT_BYTES, JournalLog
from metadata.journalstate import State

TICK = 0.02  # seconds between looks at the timers of busy journals
IDLE_LOOK = 1.0  # seconds between looks at timers that are far away
READ_BYTES = 1 << 20  # payload that `entries` returns by default
MAX_ERRORS = 100


class Trimmed(DfsError):
    """The journal no longer holds entries that far back; `details[0]` is where it starts."""

    code = 31


class _Waiter:
    __slots__ = ("done", "result", "task")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.done = False
        self.result: Any = None


class Journal:
    """This node's replica of one journal; made by `JournalHost`.

    Every method that waits has a timeout.  `NoQuorum` names who answered and who did not.
    """

    def __init__(self, host: "JournalHost", volume: bytes, state: State) -> None:
        """Use `JournalHost.get`."""
        self.volume = volume
        self._host = host
        self.replica = host.replica_class(
            host.number,
            state,
            fetch=partial(host.fetch, volume),
            jitter=host.env.random.random,
        )
        self._batch = 0  # of the log, that holds our newest record
        self._waiters: dict[Ticket, _Waiter] = {}
        self._subscribers: list[
            tuple[Callable[[int, bytes], None], Callable[[int], None] | None]
        ] = []
        self._busy = False
        self._queue: list[Effect] = []

    # ------------------------------------------------------------------------------- questions

    @property
    def chosen(self) -> int:
        """Seq of the last entry known here to be chosen."""
        return self.replica.chosen

    @property
    def base(self) -> int:
        """Entries up to this seq are trimmed; 0 = the journal is whole."""
        return self.replica.base.seq

    @property
    def genesis(self) -> bytes:
        """The genesis entry; it stays readable when it is trimmed."""
        return self.replica.base.genesis

    @property
    def members(self) -> tuple[int, ...]:
        """Node numbers that decide the next entry."""
        return self.replica.members

    @property
    def config_version(self) -> int:
        """Version of the config in force; a CONFIG entry must name the next one."""
        return self.replica.configs[-1][1] if self.replica.configs else 0

    @property
    def owner(self) -> int | None:
        """Node of the highest ballot heard of here: the best guess who owns the journal."""
        return self.replica.owner

    @property
    def owned(self) -> bool:
        """Whether this node owns the journal as far as it knows; `confirm` proves it."""
        return self.replica.owned

    def entries(self, after: int, limit_bytes: int = READ_BYTES) -> list[tuple[int, bytes]]:
        """Chosen entries after `after` in order, at least one if there is any.

        Stops when `limit_bytes` of payload are reached.  Raises `Trimmed` when after < base.
        """
        replica = self.replica
        if after < replica.base.seq:
            base = replica.base.seq
            raise Trimmed(f"volume {self.volume.hex()}: entries up to {base} are trimmed", base)
        found = []
        size = 0
        for seq in range(after + 1, replica.chosen + 1):
            payload = replica.read(seq)[1]
            found.append((seq, payload))
            size += len(payload)
            if size >= limit_bytes:
                break
        return found

    def subscribe(
        self, fn: Callable[[int, bytes], None], on_reset: Callable[[int], None] | None = None
    ) -> None:
        """Call `fn(seq, payload)` for each newly chosen entry, in order, from the loop.

        `on_reset(base)`: this replica was so far behind that it got a snapshot; entries up to
        `base` are not delivered, the next is base + 1.
        """
        self._subscribers.append((fn, on_reset))

    def unsubscribe(self, fn: Callable[[int, bytes], None]) -> None:
        """Stop calling `fn`."""
        self._subscribers = [s for s in self._subscribers if s[0] != fn]

    # ----------------------------------------------------------------------------------- verbs

    async def acquire(self, timeout: float) -> None:
        """Own the journal; on return every entry chosen so far is known here.

        Raises `NoQuorum`, or `NotHome` when this node is no member (details: who is).
        """
        await self._do(self.replica.acquire, timeout)

    async def propose(self, payload: bytes, timeout: float) -> int:
        """Append an entry; returns its seq once it is chosen.  First come, first served.

        Raises `NotHome` (ownership lost) or `NoQuorum`: the entry may or may not be chosen later.
        Raises `DiskFull` before anything is sent, `InvalidArgument` for a config out of turn.
        """
        replica = self.replica
        seq: int = await self._do(lambda t, d, now: replica.propose(t, payload, d, now), timeout)
        return seq

    async def confirm(self, timeout: float) -> None:
        """Prove that nobody else owned the journal when this was called.

        On return, everything chosen before the call is known here.  Costs one round trip and no
        sync; callers that wait at the same time share a round.  Raises `NotHome` or `NoQuorum`.
        """
        await self._do(self.replica.confirm, timeout)

    async def trim(self, below: int) -> None:
        """Drop the chosen entries with seq < `below` here, when a checkpoint covers them.

        Keep everything after the `covered_seq` of the last CHECKPOINT entry, which holds the entry
        itself: a replica that comes from nothing gets the base and what follows, nothing else.
        """
        self._run(self.replica.trim(below - 1, self._host.now()))
        self._host.tidy()

    async def _do(
        self, verb: Callable[[Ticket, float, float], list[Effect]], timeout: float
    ) -> Any:
        host = self._host
        host.check()
        now = host.now()
        ticket = host.ticket()
        self._waiters[ticket] = waiter = _Waiter()
        self._run(verb(ticket, now + timeout, now))
        if not waiter.done:
            waiter.task = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                del self._waiters[ticket]
                self.replica.abandon(ticket)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if isinstance(waiter.result, DfsError):
            raise waiter.result
        return waiter.result

    # --------------------------------------------------------------------------------- effects

    def receive(self, sender: int, message: Message) -> None:
        """Feed a message to the replica."""
        self._run(self.replica.handle(sender, message, self._host.now()))

    def tick(self, now: float) -> None:
        """Let the replica look at its timers."""
        self._run(self.replica.tick(now))

    def genesis_entry(self, payload: bytes) -> None:
        """Start a blank replica."""
        self._run(self.replica.genesis(payload, self._host.now()))

    def _run(self, effects: list[Effect]) -> None:
        """Carry out effects in order; see the module's docstring for why it does not nest."""
        if self._busy:
            self._queue += effects
            return
        host = self._host
        host.active.add(self)
        if host.timer_parked is not None:
            host.timer_parked.set()
        self._busy = True
        try:
            while effects:
                for effect in effects:
                    kind = effect[0]
                    if kind == SEND:
                        host.send(effect[1], self.volume, effect[2])
                    elif kind == PERSIST:
                        self._batch = host.log.append(self.volume, effect[1])
                    elif kind == REPLY:
                        self._reply(effect[1], effect[2])
                    elif kind == CHOSEN:
                        for fn, _ in self._subscribers:
                            fn(effect[1], effect[2])
                    elif kind == OUTCOME:
                        self._finish(effect[1], effect[2])
                    elif kind == RESET:
                        for _, on_reset in self._subscribers:
                            if on_reset is not None:
                                on_reset(effect[1])
                    else:
                        host.report(f"volume {self.volume.hex()}: {effect[1]}")
                effects, self._queue = self._queue, []
        finally:
            self._busy = False

    def _reply(self, to: int, message: Message) -> None:
        host = self._host
        if self._batch > host.log.durable:
            host.log.when_durable(self._batch, self._answer, to, message)
        else:
            self._answer(to, message)

    def _answer(self, to: int, message: Message) -> None:
        if to == self._host.number:
            self.receive(to, message)
        else:
            self._host.send(to, self.volume, message)

    def _finish(self, ticket: Ticket, result: Any) -> None:
        waiter = self._waiters.pop(ticket, None)
        if waiter is None:
            return  # cancelled
        waiter.done = True
        waiter.result = result
        if waiter.task is not None:
            trio.lowlevel.reschedule(waiter.task, outcome.Value(None))

    def status(self) -> dict[str, Any]:
        """What `jrnl.status` answers."""
        r = self.replica
        return {
            "chosen": r.chosen,
            "hash": r.head,
            "base": r.base.seq,
            "accepted": r.chosen + (r.pending is not None),
            "promised": r.promised,
            "owner": r.owner,
            "owned": r.owned,
            "version": self.config_version,
            "members": r.members,
        }


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
        self.active: set[Journal] = set()  # their timers may be due soon
        self.timer_parked: trio.Event | None = None
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
        """Volumes that have a journal here."""
        return sorted(v for v, j in self._journals.items() if not j.replica.blank)

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
        for text in self.log.cut:
            self.report(text)
        self._journals = {v: self.journal_class(self, v, s) for v, s in states.items()}
        self._running = True
        self.active.update(self._journals.values())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._timers)
                nursery.start_soon(self._tidy_up)
                task_status.started()
                await self._broken.wait()
                assert self.failed is not None  # noqa: S101 - set before the event
                raise self.failed
        finally:
            self._running = False

    async def _write(self) -> None:
        try:
            await self.log.run()
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
            if self.active or not self.log.idle(now):
                await trio.sleep(TICK)
                continue
            self.timer_parked = event = trio.Event()
            with trio.move_on_after(IDLE_LOOK if self._later else float("inf")):
                await event.wait()
            self.timer_parked = None

    async def _tidy_up(self) -> None:
        while True:
            await self._tidy.wait()
            self._tidy = trio.Event()
            try:
                await self.log.collect()
            except StoreFailed as e:
                self._break(e)

    # ----------------------------------------------------------------------------- for journals

    def check(self) -> None:
        """Raise what forbids this node to take part now: a failed or a full disk."""
        if self.failed is not None or not self._running:
            raise StoreFailed(str(self.failed or "the journals of this node are not running"))
        if self.log.full is not None:
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
            if not self._running or self.number not in self._get_map().volume_homes(volume):
                return (), b""
            journal = self._blank(volume)
        # A full disk keeps its old promises and makes no new ones: nothing may pile up in memory.
        if self._running and (self.log.full is None or message[0] not in (PREPARE, ACCEPT, FILL)):
            journal.receive(sender, message)
        return (), b""

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
        self.check()
        journal = self._journals.get(volume)
        if journal is None:
            raise NotFound(f"volume {volume.hex()} has no journal at node {self.number}")
        status = journal.status()
        await self.log.sync()  # "holds an entry" means durably
        return (status,), b""
