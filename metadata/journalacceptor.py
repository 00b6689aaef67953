"""The passive half of a journal replica, sans-IO: promising, accepting, learning, catching up.

`metadata.journal` adds the proposer.  An acceptor's whole state
is the chosen prefix plus at most one entry accepted on top of it (`pending`).  It learns that the
pending entry is chosen when a proposer builds on it, announces its hash, or fills it in.

Effects, in the order they have to happen (tuples, first field is the kind):

    (SEND, to, message)       may leave at once
    (PERSIST, record)         append to the log (`metadata.journalstate`)
    (REPLY, to, message)      may leave once every record persisted before it is durable; `to` may
                              be this replica itself: its own vote counts only when durable
    (CHOSEN, seq, payload)    the next entry of the journal, in order, once
    (RESET, seq)              everything up to seq came as a snapshot; CHOSEN goes on after it
    (OUTCOME, ticket, result) a verb ended: seq or None, or the `DfsError` to raise
    (ALARM, text)             the protocol was broken by somebody; people should look

Messages (tuples, first field is the kind):

    PREPARE ballot have               NACK ballot promised            ACCEPT ballot seq prev payload
    PROMISE ballot chosen pending     NEED have                       ACK ballot seq
    FILL base first prev payloads chosen    ANNOUNCE seq hash         LEARNED seq
    CONFIRM ballot number seq hash    CONFIRMED ballot number

Overridable methods named `rule_*` are the points where a rule is decided; the tests break them.
"""

from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from metadata.journalstate import (
    BASE,
    ENTRY,
    NO_BALLOT,
    PROMISED,
    Ballot,
    Base,
    Pending,
    State,
    apply_config,
    chain,
)

PREPARE, PROMISE, NACK, ACCEPT, ACK, NEED, FILL, ANNOUNCE, LEARNED, CONFIRM, CONFIRMED = range(
    1, 12
)
SEND, REPLY, PERSIST, CHOSEN, RESET, OUTCOME, ALARM = range(7)

Message = tuple[Any, ...]
Effect = tuple[Any, ...]

NEED_AGAIN = 0.1  # seconds between two requests for the same missing entries
FILL_BYTES = 256 << 10  # payload of one FILL; a replica that lacks more asks again
TAIL_BYTES = 256 << 10  # payload kept in memory per journal


class Acceptor:
    """Durable state of one replica and what it answers; see `metadata.journal.Replica`.

    `fetch(seq)` returns `(prev_hash, payload)` of a chosen entry that is no longer in memory;
    `tail_bytes` bounds the payload kept in memory.
    """

    def __init__(
        self,
        me: int,
        state: State,
        *,
        fetch: Callable[[int], tuple[bytes, bytes]],
        tail_bytes: int = TAIL_BYTES,
    ) -> None:
        """Go on from durable state."""
        self.me = me
        self.promised = state.promised
        self.seen = state.promised  # highest ballot heard of
        self.base: Base = state.base
        self.chosen = state.chosen  # last seq known to be chosen
        self.head = state.head  # its chain hash
        self.pending: Pending | None = state.pending  # accepted at chosen + 1
        self.configs = state.configs
        self.fetch = fetch
        self.tail: deque[tuple[bytes, bytes]] = deque()  # (prev_hash, payload) up to chosen
        self.tail_size = 0
        self.tail_limit = tail_bytes
        self.behind: tuple[int, int] | None = None  # (whom to ask, seq it has)
        self.need_at = 0.0
        self.need_left = 0
        self.now = 0.0
        self.out: list[Effect] = []
        for prev_hash, payload in state.log:
            self._remember(prev_hash, payload)
        if self.pending is not None:
            # That it is chosen may have been known here before the restart: ask around.
            self.behind = (self.promised[1], self.chosen + 1)
            self.need_left = 6

    @property
    def members(self) -> tuple[int, ...]:
        """Who decides the entry after the last chosen one; empty in a blank replica."""
        return self.configs[-1][2] if self.configs else ()

    @property
    def blank(self) -> bool:
        """Whether this replica holds no entry at all, not even the genesis."""
        return not self.chosen

    @property
    def owner(self) -> int | None:
        """Node of the highest ballot heard of."""
        return self.seen[1] if self.seen[0] else None

    def read(self, seq: int) -> tuple[bytes, bytes]:
        """(prev_hash, payload) of chosen entry `seq`, base.seq < seq <= chosen."""
        position = seq - (self.chosen - len(self.tail) + 1)
        return self.tail[position] if position >= 0 else self.fetch(seq)

    # ----------------------------------------------------------------------------------- rules

    def rule_on_top(self, seq: int, prev_hash: bytes) -> bool:
        """An acceptor takes seq s only on top of the chosen s - 1."""
        return seq == self.chosen + 1 and prev_hash == self.head

    def rule_confirmed(self, ballot: Ballot) -> bool:
        """An acceptor confirms a ballot while it has promised no higher one."""
        return self.promised <= ballot

    # -------------------------------------------------------------------------------- acceptor

    def _on_prepare(self, sender: int, ballot: Ballot, have: int) -> None:
        if ballot < self.promised:
            self.out.append((SEND, sender, (NACK, ballot, self.promised)))
            return
        if self._heed(ballot):
            self.out.append((PERSIST, (PROMISED, ballot)))
        if self.chosen > have:
            self._fill(sender, have)
        pending = self.pending and self.pending[:2]
        self.out.append((REPLY, sender, (PROMISE, ballot, self.chosen, pending)))

    def _on_accept(
        self,
        sender: int,
        ballot: Ballot,
        seq: int,
        prev_hash: bytes,
        payload: bytes,
        *,
        here: bytes | None = None,  # the chain hash, where it is known
    ) -> None:
        if ballot < self.promised:
            self.out.append((SEND, sender, (NACK, ballot, self.promised)))
            return
        raised = self._heed(ballot)
        pending = self.pending
        if pending and seq == self.chosen + 2 and pending.hash == prev_hash:
            self._learn_pending()
            pending = None
        if self.rule_on_top(seq, prev_hash):
            if pending is None or pending.ballot != ballot:
                here = here or chain(prev_hash, seq, payload)
                self.pending = Pending(ballot, payload, here)
                self.out.append((PERSIST, (ENTRY, seq, ballot, prev_hash, payload, False)))
            self.out.append((REPLY, sender, (ACK, ballot, seq)))
            return
        if raised:
            self.out.append((PERSIST, (PROMISED, ballot)))
        if seq > self.chosen + 1:
            self._want(sender, seq - 1)
        elif seq == self.chosen + 1:
            self.out.append((ALARM, f"node {sender} has another history below seq {seq}"))
        elif seq == self.chosen and chain(prev_hash, seq, payload) == self.head:
            self.out.append((REPLY, sender, (ACK, ballot, seq)))
        else:
            self._fill(sender, seq - 1)

    def _heed(self, ballot: Ballot) -> bool:
        """Promise a ballot; whether it is higher than the promise so far."""
        if ballot <= self.promised:
            return False
        self.promised = ballot
        self.seen = max(self.seen, ballot)
        self._higher_ballot(ballot)
        return True

    def _on_confirm(self, sender: int, ballot: Ballot, number: int, seq: int, head: bytes) -> None:
        if self.rule_confirmed(ballot):
            self.out.append((SEND, sender, (CONFIRMED, ballot, number)))
        else:
            self.out.append((SEND, sender, (NACK, ballot, self.promised)))
        self._hear(sender, seq, head)

    # ------------------------------------------------------------------------------- catching up

    def _on_announce(self, sender: int, seq: int, head: bytes) -> None:
        self._hear(sender, seq, head)
        if seq <= self.chosen:
            self.out.append((SEND, sender, (LEARNED, self.chosen)))

    def _hear(self, sender: int, seq: int, head: bytes) -> None:
        """Entry `seq`, with this chain hash, is chosen."""
        if seq == self.chosen + 1 and self.pending and self.pending.hash == head:
            self._learn_pending()
        if seq > self.chosen:
            self._want(sender, seq)

    def _inform(self, members: Collection[int]) -> None:
        for member in members:
            if member != self.me:
                self.out.append((SEND, member, (ANNOUNCE, self.chosen, self.head)))

    def _want(self, sender: int, seq: int) -> None:
        """Ask `sender` for the entries up to `seq`, but not for each message that shows the gap."""
        if self.behind is None or self.now >= self.need_at:
            self.need_at = self.now + NEED_AGAIN
            self.need_left = 20
            self.behind = (sender, seq)
            self.out.append((SEND, sender, (NEED, self.chosen)))

    def _want_again(self) -> None:
        if self.behind is None or self.chosen >= self.behind[1] or not self.need_left:
            self.behind = None
            return
        others = [m for m in self.members if m != self.me] or [self.behind[0]]
        self.need_left -= 1
        self.need_at = self.now + NEED_AGAIN
        self.out.append((SEND, others[self.need_left % len(others)], (NEED, self.chosen)))

    def _on_need(self, sender: int, have: int) -> None:
        if have < self.chosen and not self._fill(sender, have):
            return
        self._resume(sender)

    def _fill(self, to: int, have: int) -> bool:
        """Send chosen entries after `have`; whether that is all of them."""
        base = self.base if have < self.base.seq else None
        first = (base.seq if base else have) + 1
        prev_hash = base.hash if base else b""
        payloads: list[bytes] = []
        size = 0
        seq = first
        while seq <= self.chosen and size < FILL_BYTES:
            before, payload = self.read(seq)
            if seq == first:
                prev_hash = before
            payloads.append(payload)
            size += len(payload)
            seq += 1
        fill = (FILL, base and tuple(base), first, prev_hash, tuple(payloads), self.chosen)
        self.out.append((SEND, to, fill))
        return seq > self.chosen

    def _on_fill(
        self,
        sender: int,
        base: tuple[Any, ...] | None,
        first: int,
        prev_hash: bytes,
        payloads: tuple[bytes, ...],
        chosen: int,
    ) -> None:
        before = self.chosen
        if base is not None and base[0] > self.chosen:
            self._install(Base(*base))
        if first > self.chosen + 1:
            self._want(sender, chosen)
            return
        here = prev_hash
        for seq, payload in enumerate(payloads, first):
            if seq == self.chosen + 1:
                if here != self.head:
                    self.out.append((ALARM, f"node {sender} has another history below seq {seq}"))
                    return
                here = chain(here, seq, payload)
                self._advance(payload, here)
            else:
                here = chain(here, seq, payload)
        if self.chosen >= chosen:
            self.behind = None
        elif self.chosen > before:
            self.behind = None
            self._want(sender, chosen)
        if self.chosen > before:
            self._learned()

    def _install(self, base: Base) -> None:
        self.base = base
        self.chosen, self.head, self.pending = base.seq, base.hash, None
        self.configs = [(base.seq, base.version, base.members)]
        self.tail.clear()
        self.tail_size = 0
        self.out.append((PERSIST, (BASE, *base, self.promised)))
        self.out.append((RESET, base.seq))

    def _learn_pending(self) -> None:
        pending = self.pending
        if pending is not None:
            self._advance(pending.payload, pending.hash)
            self._learned()

    def _advance(self, payload: bytes, here: bytes) -> None:
        """The entry after the last chosen one is chosen."""
        seq = self.chosen + 1
        prev_hash = self.head
        config = apply_config(self.configs, seq, payload)
        # That an entry is chosen need not be remembered: the next one shows it.  A config is an
        # exception, because its old members may be gone by then: see "wiping" in JOURNAL.md.
        if config or self.pending is None or self.pending.hash != here:
            self.out.append((PERSIST, (ENTRY, seq, NO_BALLOT, prev_hash, payload, True)))
        self.pending = None
        self.chosen, self.head = seq, here
        self._remember(prev_hash, payload)
        if seq == 1:
            self.base = self.base._replace(genesis=payload)
        self.out.append((CHOSEN, seq, payload))

    def _remember(self, prev_hash: bytes, payload: bytes) -> None:
        self.tail.append((prev_hash, payload))
        self.tail_size += len(payload)
        while self.tail_size > self.tail_limit and len(self.tail) > 1:
            self.tail_size -= len(self.tail.popleft()[1])

    # ------------------------------------------------------------------------------------ trim

    def trim(self, seq: int, now: float) -> list[Effect]:
        """Drop the entries up to `seq`, all of them chosen."""
        self.now = now
        if self.base.seq < seq <= self.chosen:
            head = self.head if seq == self.chosen else self.read(seq + 1)[0]
            while len(self.configs) > 1 and self.configs[1][0] <= seq:
                del self.configs[0]
            _, version, members = self.configs[0]
            self.base = Base(seq, head, version, members, self.base.genesis)
            while len(self.tail) > self.chosen - seq:
                self.tail_size -= len(self.tail.popleft()[1])
            self.out.append((PERSIST, (BASE, *self.base, self.promised)))
        return self._flush()

    # ------------------------------------------------------------------- what a proposer adds

    def _higher_ballot(self, ballot: Ballot) -> None:
        """A ballot higher than all before was promised."""

    def _learned(self) -> None:
        """Entries were learned from elsewhere."""

    def _resume(self, to: int) -> None:
        """Replica `to` has caught up."""

    def _flush(self) -> list[Effect]:
        out, self.out = self.out, []
        return out
