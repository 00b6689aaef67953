"""`Teller`: the side of a member that speaks: what it says of itself, and what it passes on.

Every message carries the sender's own claim and vitals and, as far as there is room, news of
others, each told a bounded number of times (`dfs.cluster.swimrumours`).  While there is news, it
also goes to a few peers every quarter of a second: O(log n) rounds until everybody knows.
"""

from math import ceil, inf, log

from dfs.cluster.swim import (
    ACK,
    ALIVE,
    GOSSIP,
    NOBODY,
    PING,
    TABLE,
    VERSION,
    Claim,
    Vitals,
    encode,
)
from dfs.cluster.swimeffects import Effect, Send
from dfs.cluster.swimrumours import Rumours
from dfs.cluster.swimtable import Chance, Member, Table

GOSSIP_EVERY = 0.25  # seconds between rounds of gossip while there is news
FANOUT = 3  # peers told in a round
CERTAINTY = 9  # a claim is told ln(members) + this often by each: then e^-9 of them miss somebody
VITALS_TOLD = 4  # vitals are told this often by each; 98 % hear of them, the rest the next time
ROOM = 1200  # bytes of updates in a message other than TABLE
TABLE_ROOM = 32 << 10  # bytes of claims in one TABLE message


class Teller:
    """One member, as far as it tells others what it knows."""

    def __init__(self, me: Claim, chance: Chance) -> None:
        """Knows nobody and has no news."""
        self.me = me
        self.my_raw = encode(me)
        self.vitals = Vitals(me.key, me.boot, 0, 0, bytes(32), 0, 0, 0.0)
        self.my_vitals_raw = encode(self.vitals)
        self.table = Table(me, chance)
        self._claims = Rumours()
        self._others = Rumours()  # vitals
        self._burst = 0  # messages still to be sent so that others hear my own news
        self._gossiped = -inf
        self._out: list[Effect] = []

    # ----------------------------------------------------------------------------------- rules

    def rule_limit(self) -> int:
        """How often a claim is told by each member.

        Telling it k times to members chosen by chance leaves a share of e^-k that nobody told it
        (Demers et al., "Epidemic algorithms", 1987); n times that is how many are left over.
        """
        return CERTAINTY + ceil(log(len(self.table.peers) + 2))

    def rule_first(self, member: Member) -> bytes:
        """What a member is told before everything else: what it is accused of."""
        return member.raw if member.claim.status != ALIVE else b""

    # --------------------------------------------------------------------------------- myself

    def _set_me(self, me: Claim) -> None:
        self.me = me
        self.my_raw = encode(me)
        self.table.set_me(me)

    def _tell_about_me(self) -> None:
        self._burst = self.rule_limit()

    # --------------------------------------------------------------------------------- telling

    def _gossip_at(self) -> float:
        return self._gossiped + GOSSIP_EVERY if self._burst > 0 or len(self._claims) else inf

    def _gossip(self, now: float) -> None:
        self._gossiped = now
        limit = self.rule_limit()
        told = False
        for member in self.table.sample(FANOUT):
            claims = self._claims.take(ROOM, limit, member.claim.key)
            if claims or self._burst > 0:
                told = True
                self._burst -= 1
                self._post(member.claim.address, GOSSIP, 0, 0, claims, [])
        if not told:  # the only peer there is needs no news about itself
            self._burst = 0
            self._claims = Rumours()

    def _send_table(self, to: Claim, heard: bytes, wanted: int, *, answer: bool) -> None:
        """All that is known of some buckets, in parts; the last one asks for the same in return."""
        parts: list[tuple[list[bytes], list[bytes]]] = [([], [])]
        held = self.table.members.get(to.key)
        size = 0
        for member in self.table.of_buckets(wanted):
            if size > TABLE_ROOM:
                parts.append(([], []))
                size = 0
            if member is held and member.raw == heard:
                continue  # it knows that of itself
            parts[-1][0].append(member.raw)
            size += len(member.raw)
            if member.vitals is not None and member is not held:
                parts[-1][1].append(member.vitals_raw)
        for i, (claims, others) in enumerate(parts):
            ask = answer and i == len(parts) - 1
            self._post(to.address, TABLE, 0, (wanted, ask), claims, others)

    def _reply(self, kind: int, to: Claim, heard: bytes, serial: int) -> None:
        """Answer, and say so first if what is known of the other is not what it claims."""
        member = self.table.members.get(to.key)
        first = b"" if member is None or member.raw == heard else member.raw
        self._send(to.address, kind, serial, 0, first=first, avoid=to.key)

    def _send(
        self,
        address: str,
        kind: int,
        serial: int,
        subject: object,
        *,
        to: Member | None = None,
        first: bytes = b"",
        avoid: int = NOBODY,
        room: int = ROOM,
    ) -> None:
        """A message with what there is to tell; a member that is accused hears of that first."""
        if to is not None:
            avoid = to.claim.key
            first = self.rule_first(to)
        claims: list[bytes] = []
        if first:
            claims.append(first)
            room -= len(first)
        others: list[bytes] = []
        if room > 0:
            told = self._claims.take(room, self.rule_limit(), avoid)
            claims += told
            if kind in (PING, ACK):
                room -= sum(map(len, told)) + 3 * len(told)
                others = self._others.take(room, VITALS_TOLD, avoid)
        self._post(address, kind, serial, subject, claims, others)

    def _post(
        self,
        address: str,
        kind: int,
        serial: int,
        subject: object,
        claims: list[bytes],
        others: list[bytes],
    ) -> None:
        message = (
            VERSION, kind, self.my_raw, self.my_vitals_raw, serial, subject,
            tuple(claims), tuple(others),
        )  # fmt: skip
        self._out.append(Send(address, message))
