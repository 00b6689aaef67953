"""One replica of one journal: leaderless Multi-Paxos with depth 1 and a hash chain, sans-IO.

`handle(sender, message, now)`, `tick(now)` and the verbs (`acquire`, `propose`, `confirm`, `trim`,
`genesis`) take events and return effects; JOURNAL.md holds the protocol, its rules and the failure
cases.  In short: seq s is decided by a majority of the last config below s; an acceptor takes s
only on top of s - 1; a ballot is `(round, node)`; the owner of a ballot keeps it (one round trip
per entry) until it promises a higher one or learns from elsewhere what was chosen at its seq.

Effects and messages are listed in `metadata.journalacceptor`.

Overridable methods named `rule_*` are the points where a rule is decided; the tests break them.
All transitions of a proposer are in this one file, which makes it longer than most.
"""

from collections import deque
from collections.abc import Callable, Collection

from dfs.errors import DfsError, InvalidArgument, NoQuorum, NotHome
from dfs.volume.entries import CONFIG
from metadata.journalacceptor import (
    ACCEPT,
    ACK,
    ANNOUNCE,
    CONFIRM,
    CONFIRMED,
    FILL,
    LEARNED,
    NACK,
    NEED,
    OUTCOME,
    PREPARE,
    PROMISE,
    REPLY,
    SEND,
    TAIL_BYTES,
    Acceptor,
    Effect,
    Message,
)
from metadata.journalstate import NO_BALLOT, Ballot, State, chain, config_of

Ticket = int

IDLE, PREPARING, OWNING = range(3)

RESEND = 0.1  # seconds before an unanswered request is sent again; doubles up to RESEND_MAX
RESEND_MAX = 1.0
PROBES = 4  # entries that are sent to all members, to see who is quick, before few are asked
HEDGE = 0.02  # seconds that the few have to accept before all are asked
FEED = 0.05  # seconds after which those that were not asked hear what was chosen, under load
FEED_BYTES = 64 << 10  # of entries after which they hear it at once; much less than `TAIL_BYTES`
BACKOFF = 0.05  # seconds before preparing again after a higher ballot was met; doubles, with jitter
BACKOFF_MAX = 1.0
ANNOUNCE_AFTER = 0.2  # seconds of idleness before the last chosen entry is announced; doubles
ANNOUNCE_MAX = 30.0


class Replica(Acceptor):
    """State machine of one replica.

    `fetch(seq)` returns `(prev_hash, payload)` of a chosen entry that is no longer in memory;
    `jitter()` returns a random float in [0, 1).  `tail_bytes` bounds the payload kept in memory.
    """

    def __init__(
        self,
        me: int,
        state: State,
        *,
        fetch: Callable[[int], tuple[bytes, bytes]],
        jitter: Callable[[], float],
        tail_bytes: int = TAIL_BYTES,
    ) -> None:
        """Go on from durable state; volatile state starts empty."""
        super().__init__(me, state, fetch=fetch, tail_bytes=tail_bytes)
        self.jitter = jitter
        self.role = IDLE
        self.owned = False
        self.ballot: Ballot = NO_BALLOT
        self.asked: tuple[int, ...] = ()  # members this ballot was prepared at
        self.promises: dict[int, tuple[int, tuple[Ballot, bytes] | None]] = {}
        self.current: tuple[int, bytes, bytes, Ticket | None] | None = None  # seq payload hash who
        self.acks: set[int] = set()
        self.quick: list[int] = []  # other members in the order of their acks
        self.partners: tuple[int, ...] = ()  # those that were quickest, a majority with us
        self.probes = 0  # entries that go to all members before the partners alone are asked
        self.left_out: tuple[int, ...] = ()  # members that were not asked lately
        self.feed_at = 0.0
        self.unfed = 0  # bytes they have not heard of
        self.queue: deque[tuple[Ticket, bytes]] = deque()
        self.acquiring: list[Ticket] = []
        self.deadlines: dict[Ticket, float] = {}
        self.send_at = 0.0  # when to send the open request again, or to prepare again
        self.send_pause = RESEND
        self.backoff = BACKOFF
        self.confirm_number = 0
        self.confirming: list[Ticket] = []  # waiters of the round under way
        self.confirm_next: list[Ticket] = []  # came later: the next round is theirs
        self.confirmed: set[int] = set()
        self.confirm_at = 0.0
        # catching up
        self.uninformed: set[int] = set()  # members that may not know the last chosen entry
        self.handed = 0  # the seq that `uninformed` is about in a replica that is no member
        self.announce_at = 0.0
        self.announce_pause = ANNOUNCE_AFTER

    def due(self) -> float | None:
        """When `tick` has something to do; None: an idle replica needs no timer."""
        times = list(self.deadlines.values())
        if self.role == PREPARING or self.current or (self.role == IDLE and self.acquiring):
            times.append(self.send_at)
        if self.confirming:
            times.append(self.confirm_at)
        if self.uninformed and self.role == OWNING:
            times.append(self.announce_at)
        if self.unfed and self.role == OWNING:
            times.append(self.feed_at)
        if self.behind:
            times.append(self.need_at)
        return min(times, default=None)

    # ----------------------------------------------------------------------------------- rules

    def rule_majority(self, who: Collection[int], members: tuple[int, ...]) -> bool:
        """Only answers of members count, and it takes more than half of them."""
        count = 0
        for member in members:
            if member in who:
                count += 1
        return count > len(members) // 2

    def rule_deciders(self) -> tuple[int, ...]:
        """A config decides from the seq after its own (chosen) one on."""
        return self.members

    def rule_voters(self, payload: bytes) -> tuple[int, ...]:
        """An entry, config or not, is counted at the members the ballot was prepared at."""
        return self.asked

    def rule_few(self, payload: bytes) -> tuple[int, ...]:
        """Whom to ask first for an entry: everybody, or who were quick and make a majority with us.

        A majority is all that an entry needs, and the rest of the work is saved (Moraru et al.,
        "There Is More Consensus in Egalitarian Parliaments", SOSP 2013, call it thrifty).  The
        others are asked when these do not answer soon, and told what was chosen many entries at a
        time.  A config is everybody's business.
        """
        voters, few = self.rule_voters(payload), self.partners
        if (
            self.probes <= 0
            and self.owned
            and len(few) < len(voters) - (self.me in voters)
            and config_of(payload) is None
            and self.rule_majority((self.me, *few), voters)
        ):
            return few
        return tuple(m for m in voters if m != self.me)

    def rule_config_is_next(self, version: int) -> bool:
        """A config is proposed only as the next version."""
        return bool(self.configs) and version == self.configs[-1][1] + 1

    def rule_higher_ballot(self) -> None:
        """A proposer that promised a higher ballot is a proposer no more."""
        self._step_down("a higher ballot was promised")

    def rule_learned(self) -> None:
        """A proposer that learns from elsewhere what was chosen is a proposer no more."""
        self._step_down("an entry of another proposer was chosen")

    def rule_promised_elsewhere(self) -> bool:
        """A preparing proposer whose members changed has to prepare again at the new ones."""
        return self.rule_deciders() != self.asked

    def rule_members_changed(self) -> None:
        """A proposer that chose a config drops its promises and prepares at the new members."""
        self._inform(self.members)
        self._start()

    def rule_moved(self) -> None:
        """A replica that is no member tells the members what it knows before it says so."""
        self.uninformed = set(self.members)
        self._inform(self.members)

    def rule_disturbed(self) -> bool:
        """While an owner prepares at new members, another's entry ends what its queue relied on."""
        return self.owned

    def rule_recover(self, found: list[tuple[Ballot, bytes]]) -> bytes | None:
        """The entry accepted at the highest ballot may be chosen: it must be proposed again."""
        return max(found)[1] if found else None

    def rule_confirm_waits(self, ticket: Ticket) -> None:
        """A round of confirms that started before a waiter came proves nothing to it."""
        self.confirm_next.append(ticket)

    # ----------------------------------------------------------------------------------- verbs

    def genesis(self, payload: bytes, now: float) -> list[Effect]:
        """Start a blank replica; the caller knows that the volume is being created."""
        self.now = now
        found = config_of(payload)
        if not self.blank or found is None or found[0] == CONFIG:
            raise InvalidArgument("genesis of a journal that exists, or not a genesis entry")
        self._advance(payload, chain(self.head, 1, payload))
        return self._flush()

    def acquire(self, ticket: Ticket, deadline: float, now: float) -> list[Effect]:
        """Own the journal: the outcome is None, or `NotHome`, or `NoQuorum` at the deadline."""
        self.now = now
        if self.owned and self.role == OWNING:
            self._outcome(ticket, None)
        else:
            self.acquiring.append(ticket)
            self.deadlines[ticket] = deadline
            if self.role == IDLE and (len(self.acquiring) == 1 or now >= self.send_at):
                self._start()
        return self._flush()

    def propose(self, ticket: Ticket, payload: bytes, deadline: float, now: float) -> list[Effect]:
        """Append an entry; proposals wait in line.  The outcome is its seq.

        `NotHome`: ownership is lost; an entry that was sent may still be chosen by the next owner.
        `NoQuorum`: the deadline passed first; same doubt.
        """
        self.now = now
        if not self.owned:
            self._outcome(ticket, self._not_home("it does not own the journal"))
        else:
            self.queue.append((ticket, payload))
            self.deadlines[ticket] = deadline
            if self.role == OWNING and not self.current:
                self._next()
        return self._flush()

    def confirm(self, ticket: Ticket, deadline: float, now: float) -> list[Effect]:
        """Prove that the journal is still owned, after this call: the outcome is None."""
        self.now = now
        if not self.owned:
            self._outcome(ticket, self._not_home("it does not own the journal"))
        else:
            self.deadlines[ticket] = deadline
            if self.confirming:
                self.rule_confirm_waits(ticket)
            else:
                self.confirm_next.append(ticket)
                if self.role == OWNING:
                    self._confirm_round()
        return self._flush()

    def hand_over(self, now: float) -> list[Effect]:
        """A replica that is no member any more: tell the members that have not heard of it.

        To be repeated; nothing is sent once all of them confirmed to know as much.
        """
        self.now = now
        if self.me in self.members or self.blank:
            return []
        if self.handed != self.chosen:
            self.handed = self.chosen
            self.uninformed = set(self.members)
        self._inform(sorted(self.uninformed))
        return self._flush()

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for the ticket any more; an entry that was sent goes on regardless."""
        self.deadlines.pop(ticket, None)
        for waiting in (self.acquiring, self.confirming, self.confirm_next):
            if ticket in waiting:
                waiting.remove(ticket)
        self.queue = deque(item for item in self.queue if item[0] != ticket)
        if self.current and self.current[3] == ticket:
            self.current = (*self.current[:3], None)

    def handle(self, sender: int, message: Message, now: float) -> list[Effect]:
        """React to a message of a replica, itself included."""
        self.now = now
        _HANDLERS[message[0]](self, sender, *message[1:])
        return self._flush()

    # -------------------------------------------------------------------- told by the acceptor

    def _higher_ballot(self, ballot: Ballot) -> None:
        if self.role != IDLE and ballot > self.ballot:
            self.rule_higher_ballot()

    def _resume(self, to: int) -> None:
        if self.current and self.role == OWNING:
            self.out.append((SEND, to, self._accept_message()))

    def _learned(self) -> None:
        current = self.current
        if current and self.chosen >= current[0]:
            mine = self.head if self.chosen == current[0] else None
            if mine is None and current[0] >= self.base.seq:
                mine = self.read(current[0] + 1)[0]
            if mine == current[2] and current[3] is not None:
                self._outcome(current[3], current[0])
                self.current = (*current[:3], None)
        if self.role == OWNING:
            self.rule_learned()
        elif self.role == PREPARING:
            if self.rule_disturbed():
                self.rule_learned()
            else:
                self._try_to_own()

    # -------------------------------------------------------------------------------- proposer

    def _start(self) -> None:
        """Prepare a ballot of our own at the members."""
        members = self.rule_deciders()
        self.promises = {}
        self.current = None
        self.confirm_next = self.confirming + self.confirm_next
        self.confirming = []
        self.asked = members
        if self.me not in members:
            self.rule_moved()
            self._step_down("it is no member")
            for ticket in self.acquiring:
                self._outcome(ticket, self._not_home("it is no member"))
            self.acquiring.clear()
            return
        self.role = PREPARING
        self.ballot = (max(self.promised, self.seen)[0] + 1, self.me)
        self.send_pause = RESEND
        self.send_at = self.now + RESEND
        self._on_prepare(self.me, self.ballot, self.chosen)
        message = (PREPARE, self.ballot, self.chosen)
        self.out.extend((REPLY, m, message) for m in members if m != self.me)

    def _on_promise(
        self, sender: int, ballot: Ballot, chosen: int, pending: tuple[Ballot, bytes] | None
    ) -> None:
        if self.role == PREPARING and ballot == self.ballot:
            self.promises[sender] = (chosen, pending)
            if chosen > self.chosen:
                self._want(sender, chosen)  # its FILL may be lost, or too small
            self._try_to_own()

    def _try_to_own(self) -> None:
        if self.rule_promised_elsewhere():
            self._start()
            return
        # A promise counts once everything its acceptor knew to be chosen is known here.
        ready = {m: p for m, p in self.promises.items() if p[0] <= self.chosen}
        if not self.rule_majority(ready, self.asked):
            return
        found = [p[1] for p in ready.values() if p[0] == self.chosen and p[1] is not None]
        payload = self.rule_recover(found)
        if payload is not None and self.rule_disturbed():
            self._disown("another proposer's entry came first")
        self.role = OWNING
        self.backoff = BACKOFF
        if payload is None:
            self._owned()
        else:
            self._accept(payload, None)

    def _owned(self) -> None:
        self.owned = True
        self.probes = max(self.probes, PROBES)
        for ticket in self.acquiring:
            self._outcome(ticket, None)
        self.acquiring.clear()
        self.uninformed = {m for m in self.asked if m != self.me}
        self._rest()
        if self.confirm_next and not self.confirming:
            self._confirm_round()
        self._next()

    def _next(self) -> None:
        """Send the first proposal in line."""
        while self.queue and not self.current:
            ticket, payload = self.queue.popleft()
            found = config_of(payload)
            if found is not None and not (
                found[0] == CONFIG and self.rule_config_is_next(found[1])
            ):
                known = self.configs[-1][1]
                error = InvalidArgument(f"config {found[1]} does not follow config {known}")
                self._outcome(ticket, error)
            else:
                self._accept(payload, ticket)

    def _accept(self, payload: bytes, ticket: Ticket | None) -> None:
        seq = self.chosen + 1
        here = chain(self.head, seq, payload)
        self.current = (seq, payload, here, ticket)
        self.acks = set()
        self.quick = []
        message = (ACCEPT, self.ballot, seq, self.head, payload)
        me, out = self.me, self.out
        few = self.rule_few(payload)
        for member in few:
            out.append((SEND, member, message))
        self.left_out = tuple(m for m in self.rule_voters(payload) if m != me and m not in few)
        self.probes -= not self.left_out
        self.send_pause = RESEND / 2 if self.left_out else RESEND
        self.send_at = self.now + (HEDGE if self.left_out else RESEND)
        self._on_accept(me, self.ballot, seq, self.head, payload, here=here)

    def _accept_message(self) -> Message:
        assert self.current is not None  # noqa: S101 - callers checked
        return (ACCEPT, self.ballot, self.current[0], self.head, self.current[1])

    def _on_ack(self, sender: int, ballot: Ballot, seq: int) -> None:
        current = self.current
        if self.role != OWNING or current is None or ballot != self.ballot or seq != current[0]:
            return
        self.acks.add(sender)
        if sender != self.me and sender not in self.quick:
            self.quick.append(sender)
        if not self.rule_majority(self.acks, self.rule_voters(current[1])):
            return
        _, payload, here, ticket = current
        self.current = None
        self._advance(payload, here)
        if ticket is not None:
            self._outcome(ticket, seq)
        self.uninformed = {m for m in self.asked if m != self.me}
        self._rest()
        self.partners = tuple(self.quick[: len(self.asked) // 2])
        if self.left_out:
            self._count_unfed(len(payload))
        if self.rule_deciders() != self.asked:
            self.rule_members_changed()
        elif not self.owned or self.acquiring:
            self._owned()
        else:
            self._next()

    def _count_unfed(self, size: int) -> None:
        """An entry was chosen without those that were left out: tell them, with others."""
        if not self.unfed:
            self.feed_at = self.now + FEED
        self.unfed += size
        if self.unfed >= FEED_BYTES:
            self._feed()

    def _feed(self) -> None:
        """Announce the last chosen entry to those left out; they ask for what they lack."""
        self.unfed = 0
        self._inform(self.left_out)

    def _on_learned(self, sender: int, seq: int) -> None:
        if seq >= self.chosen:
            self.uninformed.discard(sender)

    def _rest(self) -> None:
        self.announce_pause = ANNOUNCE_AFTER
        self.announce_at = self.now + ANNOUNCE_AFTER

    def _on_nack(self, sender: int, ballot: Ballot, promised: Ballot) -> None:
        self.seen = max(self.seen, promised)
        if self.role != IDLE and ballot == self.ballot and promised > ballot:
            self._step_down(f"node {promised[1]} prepared a higher ballot")

    def _step_down(self, reason: str) -> None:
        """Stop proposing; what waits for entries is told, what wants ownership tries again."""
        self.role = IDLE
        if self.current is not None and self.current[3] is not None:
            self._outcome(self.current[3], self._not_home(reason))
        self.current = None
        self._disown(reason)
        self.send_at = self.now + self.backoff * (0.5 + self.jitter())
        self.backoff = min(self.backoff * 2, BACKOFF_MAX)

    def _disown(self, reason: str) -> None:
        """End everything that waits because this replica owned the journal."""
        self.owned = False
        for ticket, _ in self.queue:
            self._outcome(ticket, self._not_home(reason))
        self.queue.clear()
        for ticket in (*self.confirming, *self.confirm_next):
            self._outcome(ticket, self._not_home(reason))
        self.confirming, self.confirm_next = [], []

    def _confirm_round(self) -> None:
        self.confirming, self.confirm_next = self.confirm_next, []
        self.confirm_number += 1
        self.confirmed = {self.me}
        self.confirm_at = self.now + RESEND
        self._send_confirm()
        self._check_confirmed()

    def _send_confirm(self) -> None:
        message = (CONFIRM, self.ballot, self.confirm_number, self.chosen, self.head)
        for member in self.asked:
            if member not in self.confirmed:
                self.out.append((SEND, member, message))

    def _on_confirmed(self, sender: int, ballot: Ballot, number: int) -> None:
        if ballot == self.ballot and number == self.confirm_number and self.confirming:
            self.confirmed.add(sender)
            self._check_confirmed()

    def _check_confirmed(self) -> None:
        if self.role == OWNING and self.rule_majority(self.confirmed, self.asked):
            for ticket in self.confirming:
                self._outcome(ticket, None)
            self.confirming = []
            if self.confirm_next:
                self._confirm_round()

    # ------------------------------------------------------------------------------------ time

    def tick(self, now: float) -> list[Effect]:
        """Send again what was not answered, and end what waited too long."""
        self.now = now
        late = [ticket for ticket, deadline in self.deadlines.items() if now >= deadline]
        for ticket in late:
            error = self._no_quorum(ticket)
            self.abandon(ticket)
            self._outcome(ticket, error)
        if late and not self.acquiring and not self.owned:
            self.role, self.current = IDLE, None  # nobody waits for ownership any more
        if now >= self.send_at:
            self._again()
        if self.confirming and now >= self.confirm_at:
            self.confirm_at = now + RESEND
            self._send_confirm()
        if self.role == OWNING and self.uninformed and now >= self.announce_at:
            self.announce_pause = min(self.announce_pause * 2, ANNOUNCE_MAX)
            self.announce_at = now + self.announce_pause
            if self.current is None:
                self._inform(sorted(self.uninformed))
        if self.role == OWNING and self.unfed and now >= self.feed_at:
            self._feed()
        if self.behind and now >= self.need_at:
            self._want_again()
        return self._flush()

    def _again(self) -> None:
        self.send_pause = min(self.send_pause * 2, RESEND_MAX)
        if self.role == PREPARING:
            self.send_at = self.now + self.send_pause
            message = (PREPARE, self.ballot, self.chosen)
            missing = [m for m in self.asked if m not in self.promises]
            self.out.extend((REPLY, m, message) for m in missing)
        elif self.role == OWNING and self.current:
            self.send_at = self.now + self.send_pause
            message = self._accept_message()
            missing = [m for m in self.rule_voters(self.current[1]) if m not in self.acks]
            self.probes, self.left_out = PROBES, ()
            self.out.extend((SEND, m, message) for m in missing if m != self.me)
        elif self.role == IDLE and self.acquiring:
            self._start()

    # --------------------------------------------------------------------------------- outcomes

    def _outcome(self, ticket: Ticket, result: int | DfsError | None) -> None:
        self.deadlines.pop(ticket, None)
        self.out.append((OUTCOME, ticket, result))

    def _not_home(self, reason: str) -> NotHome:
        text = f"node {self.me} cannot write the journal: {reason}; members are {self.members}"
        return NotHome(text, *self.members)

    def _no_quorum(self, ticket: Ticket) -> NoQuorum:
        if self.current and self.current[3] == ticket:
            what, answered = f"accept entry {self.current[0]}", self.acks
        elif ticket in self.confirming:
            what, answered = f"confirm ballot {self.ballot}", self.confirmed
        elif self.role == PREPARING:
            what, answered = f"promise ballot {self.ballot}", set(self.promises)
        elif self.current:
            what, answered = f"accept entry {self.current[0]}", self.acks
        else:
            what, answered = "answer", set()
        asked = self.asked or self.members
        yes = sorted(m for m in asked if m in answered)
        no = sorted(m for m in asked if m not in answered)
        return NoQuorum(f"no majority to {what} in time: nodes {yes} did, nodes {no} did not")


_HANDLERS: dict[int, Callable[..., None]] = {
    PREPARE: Replica._on_prepare,
    PROMISE: Replica._on_promise,
    NACK: Replica._on_nack,
    ACCEPT: Replica._on_accept,
    ACK: Replica._on_ack,
    NEED: Replica._on_need,
    FILL: Replica._on_fill,
    ANNOUNCE: Replica._on_announce,
    LEARNED: Replica._on_learned,
    CONFIRM: Replica._on_confirm,
    CONFIRMED: Replica._on_confirmed,
}
