"""`Table`: all members as one of them knows them; which of two claims wins; whom to speak to next.

Members that are alive or suspect are *peers*: they are probed in turn, each round in a new random
order, so that every peer is probed once per round (SWIM, section 4.3).  Dead ones are kept, or old
gossip would bring them back.

For comparison with another table every member that is not gone adds a hash of its claim to one of
`BUCKETS` sums: two tables that differ in a few members differ in a few buckets.
"""

from collections.abc import Iterable
from struct import Struct
from typing import Protocol

from dfs.cluster.swim import (
    ALIVE,
    BUCKETS,
    DEAD,
    NOBODY,
    SUSPECT,
    Claim,
    Vitals,
    decode_claim,
    encode,
)
from dfs.codec import pack
from dfs.hashing import hash64

_SUMS = Struct(f">{BUCKETS}Q")
_MASK = (1 << 64) - 1
_NOT_HERE = -1


class Chance(Protocol):
    """As much of `random.Random` as is needed."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


class Member:
    """One other member as it is known here."""

    __slots__ = ("at", "claim", "mapped", "mark", "raw", "since", "vitals", "vitals_raw")

    def __init__(self, claim: Claim, raw: bytes, now: float) -> None:
        """Known by a claim; without vitals."""
        self.claim = claim
        self.raw = raw
        self.since = now  # of the last change of status or boot
        self.vitals: Vitals | None = None
        self.vitals_raw = b""
        self.mapped = False  # the cluster map names it
        self.mark = 0  # what it adds to its bucket
        self.at = _NOT_HERE  # index in the list of peers, or of the dead


def outranks(new: Claim, old: Claim) -> bool:
    """Whether a claim wins over an older one about the same member."""
    if new.boot != old.boot:
        return new.boot > old.boot
    if new.incarnation != old.incarnation:
        return new.incarnation > old.incarnation
    return new.status > old.status


class Table:
    """See the module's docstring; `me` is not among the members."""

    def __init__(self, me: Claim, chance: Chance) -> None:
        """Alone."""
        self.members: dict[int, Member] = {}
        self.peers: list[Member] = []
        self.dead: list[Member] = []
        self._chance = chance
        self._order: list[Member] = []  # of probing; may name members that are gone
        self._next = 0
        self._sums = [0] * BUCKETS
        self._me = me
        self._my_mark = 0
        self.set_me(me)

    # ------------------------------------------------------------------------------- changing

    def set_me(self, me: Claim) -> None:
        """My own claim, for comparison with other tables."""
        bucket = me.key % BUCKETS
        mark = _mark(me)
        self._sums[bucket] = (self._sums[bucket] - self._my_mark + mark) & _MASK
        self._me = me
        self._my_mark = mark

    def set(self, claim: Claim, raw: bytes, now: float) -> Member:
        """Adopt a claim without asking whether it wins; keeps the lists and sums in step."""
        member = self.members.get(claim.key)
        if member is None:
            member = self.members[claim.key] = Member(claim, raw, now)
            was = None
        else:
            was = member.claim.status
            if was != claim.status or member.claim.boot != claim.boot:
                member.since = now
            member.claim = claim
            member.raw = raw
        bucket = claim.key % BUCKETS
        mark = _mark(claim)
        self._sums[bucket] = (self._sums[bucket] - member.mark + mark) & _MASK
        member.mark = mark
        if was != claim.status:
            self._move(member, was)
        return member

    def _move(self, member: Member, was: int | None) -> None:
        status = member.claim.status
        before = self._list(was)
        after = self._list(status)
        if before is after:
            return
        if before is not None:
            _take_out(before, member)
        if after is not None:
            member.at = len(after)
            after.append(member)
        if after is self.peers:
            # a new peer is probed some time in this round, not at a foreseeable moment
            left = len(self._order) - self._next
            self._order.insert(self._next + int(self._chance.random() * (left + 1)), member)

    def _list(self, status: int | None) -> list[Member] | None:
        if status is None:
            return None
        if status <= SUSPECT:
            return self.peers
        return self.dead if status == DEAD else None

    def forget(self, key: int) -> None:
        """Know nothing about a member any more."""
        member = self.members.pop(key, None)
        if member is None:
            return
        bucket = key % BUCKETS
        self._sums[bucket] = (self._sums[bucket] - member.mark) & _MASK
        before = self._list(member.claim.status)
        if before is not None:
            _take_out(before, member)

    def assume(self, key: int, node_id: bytes, address: str, now: float) -> Member:
        """The map names this member: until somebody speaks of it, it is assumed to be alive."""
        claim = Claim(key, node_id, address, 0, 0, ALIVE, NOBODY)
        raw = encode(claim)
        return self.set(decode_claim(raw), raw, now)

    # ------------------------------------------------------------------------------- choosing

    def next_peer(self) -> Member | None:
        """Whom to probe now: each peer once per round."""
        order = self._order
        for _ in range(2):
            while self._next < len(order):
                member = order[self._next]
                self._next += 1
                if 0 <= member.at < len(self.peers) and self.peers[member.at] is member:
                    return member
            self._next = 0
            self._order = order = self.peers.copy()
            self._shuffle(order)
        return None

    def _shuffle(self, items: list[Member]) -> None:
        chance = self._chance.random
        for i in range(len(items) - 1, 0, -1):
            j = int(chance() * (i + 1))
            items[i], items[j] = items[j], items[i]

    def sample(self, count: int, avoid: int = -1) -> list[Member]:
        """Up to `count` different peers, not the one with key `avoid`."""
        peers = self.peers
        total = len(peers)
        chance = self._chance.random
        if total <= 2 * count:
            few = [x for x in peers if x.claim.key != avoid]
            self._shuffle(few)
            return few[:count]
        found: list[Member] = []
        while len(found) < count:
            member = peers[int(chance() * total)]
            if member.claim.key != avoid and member not in found:
                found.append(member)
        return found

    def some_dead(self) -> Member | None:
        """One of the dead, by chance."""
        return self.dead[int(self._chance.random() * len(self.dead))] if self.dead else None

    # ------------------------------------------------------------------------------ comparing

    def sums(self) -> bytes:
        """The digest of every bucket."""
        return _SUMS.pack(*self._sums)

    def differing(self, theirs: bytes) -> int:
        """One bit per bucket that is not the same in another table."""
        found = 0
        for bucket, (a, b) in enumerate(zip(self._sums, _SUMS.unpack(theirs), strict=True)):
            if a != b:
                found |= 1 << bucket
        return found

    def of_buckets(self, wanted: int) -> Iterable[Member]:
        """The members in the buckets whose bits are set."""
        return (m for key, m in self.members.items() if wanted >> key % BUCKETS & 1)


def _take_out(items: list[Member], member: Member) -> None:
    last = items.pop()
    if last is not member:
        items[member.at] = last
        last.at = member.at
    member.at = _NOT_HERE


def _mark(claim: Claim) -> int:
    # Tables agree although one keeps the dead longer than the other.  Who accuses plays no part.
    if claim.status >= DEAD:
        return 0
    return hash64(b"swim", pack((claim.key, claim.boot, claim.incarnation, claim.status)))
