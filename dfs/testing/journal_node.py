"""One replica of a journal on a list of records of which a prefix is durable, and the least home.

A `Node` carries out the effects of the real `metadata.journal.Replica` for the random scheduler of
`dfs.testing.journal_cores`, which is its `world`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfs.codec import pack, unpack
from dfs.errors import Corrupt, DfsError, NotHome
from dfs.volume import entries
from metadata.journalacceptor import ALARM, CHOSEN, OUTCOME, PERSIST, REPLY, RESET, SEND
from metadata.journalstate import ENTRY, NO_BALLOT, Record, config_of, replay

if TYPE_CHECKING:
    from dfs.testing.journal_cores import World


class ViolationError(Exception):
    """A property does not hold; the message says which."""


def genesis(members: Sequence[int]) -> bytes:
    """A genesis entry with these members."""
    return entries.encode(entries.GENESIS, 0, {}, 1, tuple(members))


def operation(number: int) -> bytes:
    """A payload that carries one operation."""
    return pack((number,))


class Crashed(Exception):
    """The node died while it wrote."""


class Node:
    """One replica with its durable records; effects go to `world`."""

    def __init__(self, world: "World", journal: int, me: int, records: list[Record]) -> None:
        """Start on records that are all durable."""
        self.world = world
        self.journal = journal
        self.me = me
        self.records = records
        self.durable = len(records)
        self.start()

    def start(self) -> None:
        """Recover from the durable records (and those that survived beside them)."""
        self.durable = len(self.records)
        self.replies: list[tuple[int, int, Any]] = []
        self.waiting: dict[int, tuple[str, Any]] = {}
        self.todo: list[Any] = []  # operations (ints) and config requests (tuples)
        self.flying: list[Any] = []
        self.tickets = 0
        try:
            state = replay(self.records)
        except Corrupt as e:
            raise ViolationError(f"recovery of node {self.me}: {e}") from e
        if self.world.mutant == "forgetful":
            state.promised = NO_BALLOT
        self.places: dict[int, int] = {}  # operation -> its first seq
        history = self.world.history[self.journal]
        for seq in range(1, state.base.seq + 1):
            self.note(seq, history[seq])
        for seq, (_, payload) in enumerate(state.log, state.base.seq + 1):
            self.world.check(self.journal, seq, payload)
            self.note(seq, payload)
        self.payloads = dict(enumerate(state.log, state.base.seq + 1))
        self.replica = self.world.replica_class(
            self.me, state, fetch=self.fetch, jitter=self.world.random.random, tail_bytes=200
        )

    def fetch(self, seq: int) -> tuple[bytes, bytes]:
        """An entry that left the replica's memory."""
        for record in reversed(self.records):
            if record[0] == ENTRY and record[1] == seq:
                return record[3], record[4]
        raise ViolationError(f"node {self.me} lost entry {seq}")

    def crash(self, keep: int | None = None) -> None:
        """Lose what is not durable, but for a prefix of it."""
        random = self.world.random
        loose = len(self.records) - self.durable
        del self.records[self.durable + (random.randint(0, loose) if keep is None else keep) :]
        self.start()

    def sync(self) -> None:
        """Everything written is durable; votes leave."""
        self.durable = len(self.records)
        replies, self.replies = self.replies, []
        for _, to, message in replies:
            self.post(to, message)

    def post(self, to: int, message: Any) -> None:
        """Send; a message to this replica itself is handled at once."""
        if to == self.me:
            self.run(self.replica.handle(self.me, message, self.world.now))
        else:
            self.world.net.append((self.journal, self.me, to, message))

    def handle(self, sender: int, message: Any) -> None:
        """A message arrives."""
        self.run(self.replica.handle(sender, message, self.world.now))

    def tick(self) -> None:
        """Timers."""
        due = self.replica.due()
        if due is not None and due <= self.world.now:
            self.run(self.replica.tick(self.world.now))

    def run(self, effects: list[Any]) -> None:
        """Carry out effects; may die at any record."""
        try:
            self._run(effects)
        except Crashed:
            self.crash()

    def _run(self, effects: list[Any]) -> None:
        world = self.world
        for effect in effects:
            kind = effect[0]
            if kind == SEND:
                self.post(effect[1], effect[2])
            elif kind == PERSIST:
                self.records.append(effect[1])
                if world.random.random() < world.crash_at_write:
                    raise Crashed
            elif kind == REPLY:
                own = effect[1] == self.me
                early = world.mutant == "hasty" or (own and world.mutant == "ownack")
                if self.durable == len(self.records) or early:
                    self.post(effect[1], effect[2])
                else:
                    self.replies.append((len(self.records), effect[1], effect[2]))
            elif kind == CHOSEN:
                world.check(self.journal, effect[1], effect[2])
                self.note(effect[1], effect[2])
            elif kind == RESET:
                for seq in range(1, effect[1] + 1):
                    self.note(seq, world.history[self.journal][seq])
            elif kind == OUTCOME:
                self.outcome(effect[1], effect[2])
            elif kind == ALARM:
                raise ViolationError(f"node {self.me} raised the alarm: {effect[1]}")

    def note(self, seq: int, payload: bytes) -> None:
        """Apply an entry: an operation counts where it stands first."""
        if payload[0] & 0xF0 == 0x90 and config_of(payload) is None:
            self.places.setdefault(unpack(payload)[0], seq)

    # ---------------------------------------------------------------- a home, as small as it gets

    def ticket(self, what: str, value: Any = None) -> tuple[int, float, float]:
        """Arguments of a verb."""
        self.tickets += 1
        self.waiting[self.tickets] = (what, value)
        now = self.world.now
        return self.tickets, now + self.world.patience, now

    def submit(self, item: Any) -> None:
        """A client or operator asks this node for an operation or a config."""
        world = self.world
        if world.mutant == "genesis" and self.replica.blank:
            self.run(self.replica.genesis(genesis(world.new), world.now))
        if item not in self.todo and item not in self.flying:
            self.todo.append(item)
        if self.replica.owned:
            self.work()
        elif not any(w[0] == "acquire" for w in self.waiting.values()):
            self.run(self.replica.acquire(*self.ticket("acquire")))

    def work(self) -> None:
        """Propose what waits."""
        todo, self.todo = self.todo, []
        for item in todo:
            replica = self.replica
            if isinstance(item, int):
                if item in self.places:
                    self.world.answer(self, item, self.places[item])
                    continue
                payload = operation(item)
            else:
                version, members = item[1:]
                if self.world.mutant == "nocas":
                    if members == replica.members:
                        continue
                    version = replica.configs[-1][1] + 1
                payload = entries.encode(entries.CONFIG, 0, version, tuple(members))
            self.flying.append(item)
            ticket, deadline, now = self.ticket("propose", item)
            self.run(replica.propose(ticket, payload, deadline, now))

    def confirm(self) -> None:
        """Ask whether this node still owns the journal."""
        if self.replica.owned:
            known = max(self.world.answered[self.journal], default=0)
            self.run(self.replica.confirm(*self.ticket("confirm", known)))

    def outcome(self, ticket: int, result: Any) -> None:
        """A verb ended."""
        what, value = self.waiting.pop(ticket)
        failed = isinstance(result, DfsError)
        if what == "acquire":
            if not failed:
                self.work()
            elif isinstance(result, NotHome):
                for item in self.todo:
                    self.world.moved(item, result.details)
                self.todo = []
        elif what == "confirm":
            if not failed and self.replica.chosen < value:
                raise ViolationError(
                    f"node {self.me} confirmed at {self.replica.chosen}, {value} was answered"
                )
        else:
            self.flying.remove(value)
            if not failed and isinstance(value, int):
                self.world.answer(self, value, self.places[value])
