"""`Membership`: who is in the cluster and who answers, by SWIM with Lifeguard.  Sans-IO.

The core of one member.  Events go in (`tick`, `handle`, `refresh`, `configure`, `leave`), effects
come out; `now` is monotonic seconds, chance is injected.  Nothing here waits or sends.

- Every second one peer is asked (PING); if it is silent for half a second, three others are asked
  to ask it; if that fails too it is *suspect*, and *dead* if it does not refute that in time.
- What changed is told with every message, and to three more peers every quarter of a second
  while there is news.
- Every 30 s two members compare digests of their tables and exchange what differs.
- Now and then one of the dead is spoken to, so that the halves of a split cluster meet again.
- Lifeguard: who notices that it is slow itself waits longer before it accuses (`awareness`); the
  suspect is told first; independent accusers shorten the wait (`dfs.cluster.swimsuspicion`).
- Who slept (SIGSTOP, a stalled host) does not hold its own absence against others.

Methods called `rule_*` are the decisions that `dfs.testing.gossip_mutants` breaks one at a time.
It is longer than most modules because all transitions of a member are in this one place; what it
says, and when, is in `dfs.cluster.swimteller`, what comes out in `dfs.cluster.swimeffects`.
"""

from collections.abc import Iterable
from math import inf

from dfs.cluster.swim import (
    ACK,
    ALIVE,
    DEAD,
    GOSSIP,
    LEFT,
    NACK,
    NOBODY,
    PING,
    PING_REQ,
    SUSPECT,
    SYNC,
    TABLE,
    Claim,
    Message,
    Vitals,
    check_message,
    decode_claim,
    decode_vitals,
    encode,
    key_role,
    show,
)
from dfs.cluster.swimeffects import (
    Changed,
    Effect,
    Info,
    OtherMap,
    Snapshot,
    Usurped,
    snapshot_of,
    status_of,
)
from dfs.cluster.swimsuspicion import Suspicion, shortest
from dfs.cluster.swimtable import Chance, Member, outranks
from dfs.cluster.swimteller import FANOUT, ROOM, Teller
from dfs.errors import RemoteProtocolError

PROBE = 1.0  # seconds between probes, for a member that is not slow itself
TIMEOUT = 0.5  # seconds to answer a PING before others are asked
NACK_AFTER = 0.4  # seconds after which whoever asks for another says that there is no answer
RELAYS = 3  # members asked to ask
SYNC_EVERY = 30.0  # seconds between comparisons of tables
JOIN_EVERY = 1.0  # seconds between attempts while nobody has answered
SELDOM = 10.0  # seconds between attempts to reach somebody dead
DEAD_KEEP = 3600.0  # seconds a dead member is remembered that the map does not name
VITALS_EVERY = 10.0  # seconds between vitals, in clusters of up to 50
VITALS_RATE = 5.0  # vitals per second in the whole of a larger cluster
AWARE_MAX = 8
PAUSE = 0.5  # seconds late from which a tick means that this process was not running
EPOCH_AGAIN = 1.0  # seconds after which the same foreign map is reported again
FORWARDS_MAX = 1024  # PING_REQs under way for others


class _Probe:
    """The probe of one peer: asked, then asked through others, then judged."""

    __slots__ = ("acked", "ask_at", "expected", "key", "nacks", "serial")

    def __init__(self, key: int, serial: int, ask_at: float) -> None:
        self.key = key
        self.serial = serial
        self.ask_at = ask_at  # when others are asked; inf once they are, or once it answered
        self.acked = False
        self.expected = 0
        self.nacks = 0


class Membership(Teller):
    """One member's view of all."""

    def __init__(
        self, number: int, role: str, node_id: bytes, address: str, boot: int, chance: Chance
    ) -> None:
        """Alone until `configure` names others; `boot` >= 1 must be higher at every start."""
        if boot < 1:
            raise ValueError(f"boot must be at least 1, not {boot}")
        key = number * 2 + (role != key_role(0))
        super().__init__(Claim(key, node_id, address, boot, 0, ALIVE, NOBODY), chance)
        self.awareness = 0  # 0: healthy; each step makes one probe period longer
        self.joined = False  # somebody has spoken to us
        self.stopped = ""  # why we are silent; "" while we are not
        self.refresh_at = 0.0  # when `refresh` is wanted
        self.counts = dict.fromkeys(
            ("probes", "indirect", "failed", "suspected", "declared", "refuted", "refused",
             "misdirected", "pauses", "syncs", "tables"), 0,
        )  # fmt: skip
        self._chance = chance
        self._usurped = False
        self._banned: dict[bytes, int] = {}
        self._suspicions: dict[int, Suspicion] = {}
        self._forwards: dict[int, tuple[float, str, int, int]] = {}
        self._probe: _Probe | None = None
        self._serial = 0
        self._told_map = (0, b"", -inf)
        self._probe_at = self._sync_at = self._seldom_at = self._beat_at = inf

    # ---------------------------------------------------------------------------------- events

    def start(self, now: float) -> None:
        """Begin; the first effects come from `tick(now)`."""
        self._probe_at = now + PROBE * self._chance.random()
        self._sync_at = now
        self._seldom_at = now + SELDOM * self._chance.random()
        self.refresh_at = now
        self._tell_about_me()

    def configure(
        self,
        seeds: Iterable[tuple[int, bytes, str]],
        banned: Iterable[tuple[int, bytes]],
        now: float,
    ) -> list[Effect]:
        """Take the members of the cluster map: (key, node id, address), and (number, id) removed.

        Those nobody has spoken of are assumed to be alive, hence probed, hence found dead if they
        are.  Removed nodes are forgotten and refused.
        """
        out: list[Effect] = []
        self._out = out
        self._banned = {node_id: number for number, node_id in banned}
        for key, member in list(self.table.members.items()):
            member.mapped = False
            if member.claim.node_id in self._banned:
                self._forget(key)
        for key, node_id, address in seeds:
            if key == self.me.key:
                continue
            known = self.table.members.get(key)
            if known is not None and known.claim.node_id != node_id:
                self._forget(key)
                known = None
            if known is None:
                known = self.table.assume(key, node_id, address, now)
            known.mapped = True
        return out

    def refresh(self, info: Info, now: float) -> None:
        """Say how this member is; wanted whenever the map changes and at `refresh_at`."""
        old = self.vitals
        self.vitals = Vitals(old.key, old.boot, old.heartbeat + 1, *info)
        self.my_vitals_raw = encode(self.vitals)
        self.refresh_at = now + max(VITALS_EVERY, len(self.table.peers) / VITALS_RATE)
        if (info.epoch, info.digest) != (old.epoch, old.digest):
            self._tell_about_me()

    def handle(self, message: Message, now: float) -> list[Effect]:
        """A message came; raises `RemoteProtocolError` if it is not one of ours."""
        out: list[Effect] = []
        self._out = out
        if self.stopped:
            return out
        check_message(message)
        _, kind, raw, vitals_raw, _, _, claims, others = message
        claim = decode_claim(raw)
        key = claim.key
        if key == self.me.key:
            self._about_me(claim)
            return out
        if claim.node_id in self._banned:
            self.counts["refused"] += 1
            return out
        vitals = decode_vitals(vitals_raw)
        if vitals.key != key:
            raise RemoteProtocolError(f"{show(key)} sent the vitals of {show(vitals.key)}")
        self.joined = True
        relay = kind != TABLE
        self._learn(raw, now, relay=True)
        self._learn_vitals(vitals_raw, relay=True)
        self._compare_map(vitals, claim.address, now)
        for item in claims:
            self._learn(item, now, relay=relay)
        for item in others:
            self._learn_vitals(item, relay=relay)
        if not self._usurped:
            self._serve(claim, message, now)
        return out

    def _serve(self, claim: Claim, message: Message, now: float) -> None:
        """Do what the message asks for."""
        _, kind, raw, _, serial, subject, _, _ = message
        if kind == PING:
            if subject == self.me.key:
                self._reply(ACK, claim, raw, serial)
            else:
                self.counts["misdirected"] += 1
        elif kind == ACK:
            self._acked(claim.key, serial)
        elif kind == NACK:
            probe = self._probe
            if probe is not None and probe.serial == serial:
                probe.nacks += 1
        elif kind == PING_REQ:
            self._forward(claim, serial, subject, now)
        elif kind == SYNC:
            differing = self.table.differing(subject)
            if differing:
                self._send_table(claim, raw, differing, answer=True)
        elif kind == TABLE:
            self.counts["tables"] += 1
            if subject[1]:
                self._send_table(claim, raw, subject[0], answer=False)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed; do what is due."""
        out: list[Effect] = []
        self._out = out
        if self.stopped:
            return out
        late = now - self._watch_at()
        if late > PAUSE:
            self._slept(late)
        self._beat_at = now + PROBE
        probe = self._probe
        if now >= self._probe_at:
            self._judge(now)
            self._start_probe(now)
        elif probe is not None and now >= probe.ask_at:
            self._ask_others(probe)
        for serial, (deadline, address, theirs, _) in list(self._forwards.items()):
            if now >= deadline:
                del self._forwards[serial]
                self._send(address, NACK, theirs, 0, room=0)
        for key, suspicion in list(self._suspicions.items()):
            if now >= suspicion.deadline:
                self._condemn(key, now)
        if now >= self._gossip_at():
            self._gossip(now)
        if now >= self._sync_at:
            self._sync(now)
        if now >= self._seldom_at:
            self._seldom(now)
        return out

    def next_deadline(self) -> float:
        """When `tick` is due, in monotonic seconds; an event may bring it forward."""
        if self.stopped:
            return inf
        found = min(self._watch_at(), self._sync_at, self._seldom_at, self._gossip_at())
        if self._forwards:
            found = min(found, next(iter(self._forwards.values()))[0])
        return found

    def _watch_at(self) -> float:
        """The next moment at which this process judges others; late then means that it slept."""
        found = min(self._beat_at, self._probe_at)
        if self._probe is not None:
            found = min(found, self._probe.ask_at)
        if self._suspicions:
            found = min(found, min(s.deadline for s in self._suspicions.values()))
        return found

    def leave(self) -> list[Effect]:
        """Say good-bye to some peers, who tell the others; be silent from then on."""
        out: list[Effect] = []
        self._out = out
        if not self.stopped:
            self._set_me(self.me._replace(status=LEFT))
            for member in self.table.sample(max(FANOUT, self.rule_limit())):
                self._send(member.claim.address, GOSSIP, 0, 0, to=member)
            self.stopped = "left"
        return out

    # ----------------------------------------------------------------------------------- views

    def status(self, key: int) -> str:
        """Of a member: "alive", "suspect", "dead" (or left), "unknown" (never heard of)."""
        if key == self.me.key:
            return "alive"
        member = self.table.members.get(key)
        text = "unknown" if member is None else status_of(member)
        return "dead" if text == "left" else text

    def is_up(self, key: int) -> bool:
        """Whether nothing speaks against a member: it is alive, or was not even heard of yet.

        A suspect is not up: it did not answer this moment, and whoever asks wants an answer soon.
        """
        member = self.table.members.get(key)
        return key == self.me.key or (member is not None and member.claim.status == ALIVE)

    def snapshot(self, key: int) -> Snapshot | None:
        """One member other than this one; None if it is not known."""
        member = self.table.members.get(key)
        return None if member is None else snapshot_of(member)

    def members(self) -> tuple[Snapshot, ...]:
        """All members other than this one, by key."""
        members = self.table.members
        return tuple(snapshot_of(members[key]) for key in sorted(members))

    def statistics(self) -> dict[str, int]:
        """Counters, and how many members are how."""
        return {
            **self.counts,
            "members": len(self.table.members),
            "up": len(self.table.peers) - len(self._suspicions),
            "suspect": len(self._suspicions),
            "dead": len(self.table.dead),
            "rumours": len(self._claims),
            "awareness": self.awareness,
            "incarnation": self.me.incarnation,
        }

    # ----------------------------------------------------------------------------------- rules

    def rule_relays(self) -> int:
        """How many members are asked to ask a silent one."""
        return RELAYS

    def rule_suspicion(self) -> float:
        """Seconds of the shortest suspicion."""
        return shortest(len(self.table.peers) + 1)

    def rule_refuted(self, claim: Claim) -> int:
        """The incarnation with which a claim about me is refuted."""
        return max(self.me.incarnation, claim.incarnation) + 1

    def rule_outranks(self, new: Claim, old: Claim) -> bool:
        """Whether a claim replaces one about the same member."""
        return outranks(new, old)

    def rule_usurps(self, claim: Claim) -> bool:
        """Whether a claim about me was made by another process with my identity."""
        return claim.boot > self.me.boot or (
            claim.boot == self.me.boot and claim.address != self.me.address
        )

    def rule_keeps(self, member: Member, now: float) -> bool:
        """Whether a member that is gone is still remembered."""
        return member.mapped or now - member.since < DEAD_KEEP

    def rule_slow(self, change: int) -> None:
        """I was late (positive) or in time (negative): wait longer, or less, from now on."""
        self.awareness = min(AWARE_MAX, max(0, self.awareness + change))

    # -------------------------------------------------------------------------------- learning

    def _learn(self, raw: bytes, now: float, *, relay: bool) -> None:
        claim = decode_claim(raw)
        key = claim.key
        member = self.table.members.get(key)
        if member is None:
            if key == self.me.key:
                self._about_me(claim)
            elif claim.node_id in self._banned:
                self.counts["refused"] += 1
            elif claim.status < DEAD:
                self._adopt(claim, raw, now, relay=relay)
            return
        if raw == member.raw:
            return
        old = member.claim
        if claim.node_id != old.node_id:
            self.counts["refused"] += 1
        elif self.rule_outranks(claim, old):
            # What a table tells of a member I knew nothing about is news to nobody but me.
            self._adopt(claim, raw, now, relay=relay or old.boot > 0)
        elif (
            claim.status == SUSPECT == old.status
            and claim.incarnation == old.incarnation
            and claim.boot == old.boot
            and self._suspicions[key].confirm(claim.by)
        ):
            self._claims.add(key, raw)

    def _adopt(self, claim: Claim, raw: bytes, now: float, *, relay: bool) -> None:
        key = claim.key
        member = self.table.members.get(key)
        old = "unknown" if member is None else status_of(member)
        boot = 0 if member is None else member.claim.boot
        member = self.table.set(claim, raw, now)
        if claim.status == SUSPECT:
            self._suspicions[key] = Suspicion(
                now, claim.by, self.rule_suspicion(), len(self.table.peers) + 1
            )
        else:
            self._suspicions.pop(key, None)
        if claim.status >= DEAD:
            self._others.discard(key)
        if relay:
            self._claims.add(key, raw)
        new = status_of(member)
        if old != new or boot != claim.boot:
            self._out.append(Changed(snapshot_of(member), old, new))

    def _about_me(self, claim: Claim) -> None:
        me = self.me
        if claim.node_id != me.node_id:
            self.counts["refused"] += 1
        elif self.rule_usurps(claim):
            self.stopped = (
                f"another process runs as {show(me.key)}: at {claim.address}, boot {claim.boot}; "
                f"this one is at {me.address}, boot {me.boot}. Stop one of them; if there is only "
                "one, its data directory was replaced by an older copy"
            )
            self._usurped = True
            self._out.append(Usurped(self.stopped))
        elif claim.boot == me.boot and (claim.incarnation, claim.status) > (
            me.incarnation,
            me.status,
        ):
            self.counts["refuted"] += 1
            self.rule_slow(+1)
            self._set_me(me._replace(incarnation=self.rule_refuted(claim)))
            self._tell_about_me()

    def _learn_vitals(self, raw: bytes, *, relay: bool) -> None:
        vitals = decode_vitals(raw)
        member = self.table.members.get(vitals.key)
        if member is None or raw == member.vitals_raw:
            return
        old = member.vitals
        if old is not None and (vitals.boot, vitals.heartbeat) <= (old.boot, old.heartbeat):
            return
        member.vitals = vitals
        member.vitals_raw = raw
        if relay:
            self._others.add(vitals.key, raw)

    def _compare_map(self, theirs: Vitals, address: str, now: float) -> None:
        mine = self.vitals
        if theirs.epoch < mine.epoch or not mine.epoch:
            return
        if theirs.epoch == mine.epoch and theirs.digest == mine.digest:
            return
        epoch, digest, when = self._told_map
        if (epoch, digest) == (theirs.epoch, theirs.digest) and now - when < EPOCH_AGAIN:
            return
        self._told_map = (theirs.epoch, theirs.digest, now)
        self._out.append(OtherMap(address, theirs.epoch, theirs.digest))

    def _forget(self, key: int) -> None:
        self.table.forget(key)
        self._suspicions.pop(key, None)
        self._claims.discard(key)
        self._others.discard(key)

    # --------------------------------------------------------------------------------- probing

    def _start_probe(self, now: float) -> None:
        slow = 1 + self.awareness
        self._probe_at = now + PROBE * slow
        member = self.table.next_peer()
        if member is None:
            self._probe = None
            return
        key = member.claim.key
        self.counts["probes"] += 1
        self._serial = serial = self._serial + 1
        self._probe = _Probe(key, serial, now + TIMEOUT * slow)
        self._send(member.claim.address, PING, serial, key, to=member)

    def _ask_others(self, probe: _Probe) -> None:
        probe.ask_at = inf
        target = self.table.members.get(probe.key)
        if target is None:
            return
        relays = self.table.sample(self.rule_relays(), avoid=probe.key)
        probe.expected = len(relays)
        self.counts["indirect"] += 1
        subject = (probe.key, target.claim.address)
        for member in relays:
            self._send(member.claim.address, PING_REQ, probe.serial, subject, to=member)

    def _judge(self, now: float) -> None:
        """The time of the probe is over."""
        probe, self._probe = self._probe, None
        if probe is None or probe.acked:
            return
        self.counts["failed"] += 1
        # Relays that did not even say "no answer" speak for a fault on this side.
        self.rule_slow(max(0, probe.expected - probe.nacks) if probe.expected else 1)
        member = self.table.members.get(probe.key)
        if member is None or member.claim.status > SUSPECT:
            return
        self.counts["suspected"] += 1
        claim = member.claim._replace(status=SUSPECT, by=self.me.key)
        self._learn(encode(claim), now, relay=True)

    def _acked(self, key: int, serial: int) -> None:
        probe = self._probe
        if probe is not None and probe.serial == serial:
            if not probe.acked:
                probe.acked = True
                probe.ask_at = inf
                self.rule_slow(-1)
            return
        forward = self._forwards.get(serial)
        if forward is not None and forward[3] == key:
            del self._forwards[serial]
            member = self.table.members.get(key)
            first = b"" if member is None else member.raw
            self._send(forward[1], ACK, forward[2], 0, first=first)

    def _forward(self, origin: Claim, serial: int, subject: tuple[int, str], now: float) -> None:
        key, address = subject
        if len(self._forwards) >= FORWARDS_MAX:
            return
        self._serial = mine = self._serial + 1
        self._forwards[mine] = (now + NACK_AFTER, origin.address, serial, key)
        self._send(address, PING, mine, key, to=self.table.members.get(key))

    def _condemn(self, key: int, now: float) -> None:
        """A suspect did not refute in time."""
        member = self.table.members[key]
        self.counts["declared"] += 1
        claim = member.claim._replace(status=DEAD, by=self.me.key)
        self._adopt(claim, encode(claim), now, relay=True)

    def _slept(self, late: float) -> None:
        """Nothing that did not arrive meanwhile is anybody's fault."""
        self.counts["pauses"] += 1
        self.rule_slow(+1)
        if self._probe is not None:
            self._probe.acked = True
            self._probe.ask_at = inf
        for suspicion in self._suspicions.values():
            suspicion.postpone(late)

    # ------------------------------------------------------------------------------- comparing

    def _sync(self, now: float) -> None:
        count = 1 if self.joined else FANOUT
        pause = SYNC_EVERY if self.joined else JOIN_EVERY
        self._sync_at = now + pause * (0.8 + 0.4 * self._chance.random())
        for member in self.table.sample(count):
            self._send_sync(member)
        for key, member in list(self.table.members.items()):
            if member.claim.status >= DEAD and not self.rule_keeps(member, now):
                self._forget(key)

    def _send_sync(self, member: Member) -> None:
        self.counts["syncs"] += 1
        sums = self.table.sums()
        self._send(member.claim.address, SYNC, 0, sums, to=member, room=ROOM - len(sums))

    def _seldom(self, now: float) -> None:
        """Perhaps speak to one of the dead: all of us to each of them about once per second."""
        self._seldom_at = now + SELDOM * (0.8 + 0.4 * self._chance.random())
        some = self.table.some_dead()
        share = SELDOM * len(self.table.dead) / (len(self.table.peers) + 1)
        if some is not None and self._chance.random() < share:
            self._send_sync(some)
