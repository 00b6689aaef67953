"""The handle of one journal: what the rest of a node sees of it, and how effects are carried out.

`Journal._run` is not re-entered: a subscriber that makes further effects has them queued behind the
ones under way.  A waiting verb is one parked task; the replica ends it, at its deadline at the
latest.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import trio

from dfs.errors import DfsError
from metadata.journal import Ticket
from metadata.journalacceptor import (
    CHOSEN,
    OUTCOME,
    PERSIST,
    REPLY,
    RESET,
    SEND,
    Effect,
    Message,
)
from metadata.journalstate import State

if TYPE_CHECKING:
    from metadata.journals import JournalHost

READ_BYTES = 1 << 20  # payload that `entries` returns by default


class Trimmed(DfsError):
    """The journal no longer holds entries that far back; `details[0]` is where it starts."""

    code = 31


class _Waiter:
    __slots__ = ("done", "result", "task", "then")

    def __init__(self, then: "Callable[[Any], None] | None" = None) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.then = then
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

    def launch(self, payload: bytes, timeout: float, then: Callable[[Any], None]) -> None:
        """`propose` without a task that waits: calls `then` with the seq or the error, once.

        Nobody is told when this node stops.
        It may be called before this returns.  It must not raise, and may launch the next entry.
        """
        host = self._host
        try:
            host.check()
        except DfsError as e:
            then(e)
            return
        now = host.now()
        ticket = host.ticket()
        self._waiters[ticket] = _Waiter(then)
        self._run(self.replica.propose(ticket, payload, now + timeout, now))

    async def confirm(self, timeout: float) -> None:
        """Prove that nobody else owned the journal when this was called.

        On return, everything chosen before the call is known here.  Costs one round trip and no
        sync; callers that wait at the same time share a round.  Raises `NotHome` or `NoQuorum`.
        """
        await self._do(self.replica.confirm, timeout, writes=False)

    def hand_over(self) -> None:
        """Tell the members what is known here, if this node is no member any more; repeat it."""
        self._run(self.replica.hand_over(self._host.now()))

    async def trim(self, below: int) -> None:
        """Drop the chosen entries with seq < `below` here, when a checkpoint covers them.

        Keep everything after the `covered_seq` of the last CHECKPOINT entry, which holds the entry
        itself: a replica that comes from nothing gets the base and what follows, nothing else.
        """
        self._run(self.replica.trim(below - 1, self._host.now()))
        self._host.tidy()

    async def _do(
        self,
        verb: Callable[[Ticket, float, float], list[Effect]],
        timeout: float,
        *,
        writes: bool = True,
    ) -> Any:
        host = self._host
        host.check(writes=writes)
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
            if self not in host.active:
                host.look_after(self)

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
        if waiter.then is not None:
            waiter.then(result)
        elif waiter.task is not None:
            trio.lowlevel.reschedule(waiter.task, outcome.Value(None))

    def stop(self, error: DfsError) -> None:
        """End every wait of a task: the node takes no part any more."""
        for ticket, waiter in list(self._waiters.items()):
            if waiter.then is None:
                self._finish(ticket, type(error)(str(error)))

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
