"""The membership core, event by event; and the bytes it exchanges."""

import random
from pathlib import Path

import pytest

from dfs import codec
from dfs.cluster import membership as m
from dfs.cluster.membership import Membership
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
    VERSION,
    Claim,
    Vitals,
    check_message,
    decode_claim,
    decode_vitals,
    encode,
    key_number,
    key_role,
    member_key,
)
from dfs.cluster.swimeffects import Changed, Info, OtherMap, Send, Usurped
from dfs.cluster.swimrumours import Rumours
from dfs.cluster.swimsuspicion import Suspicion, shortest
from dfs.cluster.swimteller import FANOUT, ROOM
from dfs.errors import RemoteProtocolError
from dfs.testing.gossip_mutants import core_class

GOLDEN = Path(__file__).parents[2] / "data" / "gossip-v1.txt"


def node(i):
    return i * 2, bytes([i]) * 16, f"tcp://10.0.0.{i}:1"


def a_core(size=5, mutant=None, boot=3, me=0):
    core = core_class(mutant)(
        me, "metadata", bytes([me]) * 16, f"tcp://10.0.0.{me}:1", boot, random.Random(1)
    )
    core.start(0.0)
    core.configure([node(i) for i in range(size)], (), 0.0)
    return core


def claim(i, status=ALIVE, incarnation=0, boot=1, by=NOBODY, **more):
    key, node_id, address = node(i)
    return Claim(key, node_id, address, boot, incarnation, status, by)._replace(**more)


def vitals(i, heartbeat=1, epoch=1, digest=bytes(32), boot=1):
    return Vitals(i * 2, boot, heartbeat, epoch, digest, 100, 50, 0.5)


def message(kind, sender, serial=0, subject=0, claims=(), others=(), **more):
    return (VERSION, kind, encode(claim(sender, **more)), encode(vitals(sender)), serial, subject,
            tuple(encode(c) for c in claims), tuple(encode(v) for v in others))  # fmt: skip


def tell(core, *claims, now=1.0, sender=4):
    return core.handle(message(GOSSIP, sender, claims=claims), now)


def sends(effects, kind=None):
    return [e for e in effects if isinstance(e, Send) and kind in (None, e.message[1])]


def changes(effects):
    return [(e.member.number, e.old, e.new) for e in effects if isinstance(e, Changed)]


def first_ping(core, until=3.0):
    now = 0.0
    while now < until:
        now = max(now + 1e-9, core.next_deadline())
        pings = sends(core.tick(now), PING)
        if pings:
            return pings[0], now
    raise AssertionError("no ping")


# ------------------------------------------------------------------------------------- the order


def test_a_key_is_number_and_role():
    assert [member_key(7, "metadata"), member_key(7, "chunk")] == [14, 15]
    assert (key_number(15), key_role(15), key_role(14)) == (7, "chunk", "metadata")


def test_claims_win_by_boot_then_incarnation_then_status():
    order = [
        claim(1, ALIVE, 0, 1), claim(1, SUSPECT, 0, 1), claim(1, DEAD, 0, 1), claim(1, LEFT, 0, 1),
        claim(1, ALIVE, 1, 1), claim(1, DEAD, 1, 1), claim(1, ALIVE, 0, 2), claim(1, SUSPECT, 0, 2),
    ]  # fmt: skip
    for i, held in enumerate(order):
        if held.status >= DEAD:
            continue  # nobody takes over what it never knew
        for j, new in enumerate(order):
            core = a_core()
            tell(core, held)
            tell(core, new)
            got = core.table.members[2].claim
            assert got == order[max(i, j)], (held, new)


def test_a_dead_stranger_is_no_news():
    core = a_core(3)
    assert changes(tell(core, claim(9, DEAD), sender=1)) == [(1, "unknown", "alive")]
    assert core.snapshot(18) is None
    assert changes(tell(core, claim(9), sender=1)) == [(9, "unknown", "alive")]


def test_a_banned_node_is_forgotten_and_refused():
    core = a_core()
    tell(core, claim(2))
    core.configure([node(i) for i in (0, 1, 3, 4)], [(2, bytes([2]) * 16)], 1.0)
    assert core.snapshot(4) is None
    assert tell(core, claim(2)) == []
    assert core.handle(message(PING, 2, 1, 0), 1.0) == []
    assert core.counts["refused"] == 2


def test_a_number_with_another_node_id_is_refused():
    core = a_core()
    tell(core, claim(2))
    tell(core, claim(2, boot=9, node_id=b"x" * 16))
    assert core.snapshot(4).node_id == bytes([2]) * 16
    assert core.counts["refused"] == 1


# -------------------------------------------------------------------------------------- probing


def test_a_silent_peer_is_asked_through_others_then_suspected_then_dead():
    core = a_core()
    for i in (1, 2, 3, 4):
        tell(core, now=0.0, sender=i)
    ping, now = first_ping(core)
    target = ping.message[5]
    asked = []
    while core.status(target) == "alive":
        now = max(now + 1e-9, core.next_deadline())
        effects = core.tick(now)
        asked += sends(effects, PING_REQ)
        for other in sends(effects, PING):
            if other.message[5] != target:
                core.handle(message(ACK, other.message[5] // 2, other.message[4]), now)
    assert len(asked) == m.RELAYS
    assert {e.message[5] for e in asked} == {(target, ping.address)}
    assert ping.address not in {e.address for e in asked}
    assert core.status(target) == "suspect"
    assert not core.is_up(target)
    # independent accusers make the suspicion short
    suspicion = core._suspicions[target]
    assert suspicion.deadline - now == pytest.approx(24.0)
    for i in [i for i in (1, 2, 3, 4) if i * 2 != target]:
        tell(core, claim(target // 2, SUSPECT, by=i * 2), now=now)
    assert suspicion.deadline - now == pytest.approx(4.0)
    effects = []
    while core.status(target) == "suspect":
        now = max(now + 1e-9, core.next_deadline())
        effects = core.tick(now)
        for other in sends(effects, PING):
            core.handle(message(ACK, other.message[5] // 2, other.message[4]), now)
    assert now == pytest.approx(suspicion.start + 4.0, abs=0.3)
    assert (target // 2, "suspect", "dead") in changes(effects)


def test_an_answer_ends_the_probe_even_through_a_relay():
    core = a_core()
    ping, now = first_ping(core)
    core.tick(now + 0.5)
    core.handle(message(ACK, 4 if ping.message[5] != 8 else 3, ping.message[4]), now + 0.6)
    core.tick(now + 1.0)
    assert core.counts["suspected"] == 0


def test_a_relay_asks_and_passes_the_answer_on():
    core = a_core()
    (ping,) = sends(core.handle(message(PING_REQ, 1, 77, (4, "tcp://10.0.0.2:1")), 1.0))
    assert (ping.address, ping.message[1], ping.message[5]) == ("tcp://10.0.0.2:1", PING, 4)
    (ack,) = sends(core.handle(message(ACK, 2, ping.message[4]), 1.1))
    assert (ack.address, ack.message[1], ack.message[4]) == ("tcp://10.0.0.1:1", ACK, 77)
    assert ack.message[6][0] == encode(claim(2)), (
        "the news about the one who was silent comes first"
    )


def test_a_relay_says_that_there_is_no_answer():
    core = a_core()
    core.tick(0.9)
    core.handle(message(PING_REQ, 1, 77, (4, "tcp://10.0.0.2:1")), 1.0)
    assert core.next_deadline() <= 1.0 + m.NACK_AFTER
    (nack,) = sends(core.tick(1.0 + m.NACK_AFTER), NACK)
    assert (nack.address, nack.message[4]) == ("tcp://10.0.0.1:1", 77)


def test_a_ping_for_another_is_not_answered():
    core = a_core()
    assert not sends(core.handle(message(PING, 1, 5, 8), 1.0))
    (ack,) = sends(core.handle(message(PING, 1, 5, 0), 1.0))
    assert (ack.message[1], ack.message[4], ack.address) == (ACK, 5, "tcp://10.0.0.1:1")


@pytest.mark.parametrize(("nacks", "awareness"), [(0, 3), (1, 2), (3, 0)])
def test_missing_nacks_make_the_prober_doubt_itself(nacks, awareness):
    core = a_core()
    ping, now = first_ping(core)
    core.tick(now + 0.5)
    for _ in range(nacks):
        core.handle(message(NACK, 4 if ping.message[5] != 8 else 3, ping.message[4]), now + 0.9)
    core.tick(now + 1.0)
    assert core.awareness == awareness
    probe = core._probe
    assert probe.ask_at == pytest.approx(now + 1.0 + m.TIMEOUT * (1 + awareness))
    assert core._probe_at == pytest.approx(now + 1.0 + m.PROBE * (1 + awareness))


def test_every_peer_is_probed_once_per_round():
    core = a_core(9)
    for _ in range(3):
        assert len({core.table.next_peer().claim.key for _ in range(8)}) == 8


# ----------------------------------------------------------------------------- about this member


def test_an_accusation_is_refuted():
    core = a_core(boot=3)
    effects = core.handle(message(PING, 1, 5, 0, [claim(0, SUSPECT, 4, boot=3, by=2)]), 1.0)
    (ack,) = sends(effects, ACK)
    mine = decode_claim(ack.message[2])
    assert (mine.incarnation, mine.status) == (5, ALIVE)
    assert core.awareness == 1
    told = [core.tick(1.0 + i / 4) for i in range(1, 20)]
    assert len([e for x in told for e in sends(x, GOSSIP)]) >= core.rule_limit() - FANOUT


def test_an_accusation_of_an_earlier_boot_is_nothing():
    core = a_core(boot=3)
    tell(core, claim(0, DEAD, 4, boot=2))
    assert core.me.incarnation == 0


def test_the_accused_is_told_first():
    accused = claim(2, SUSPECT, by=6)
    for mutant, first in ((None, True), ("nobuddy", False)):
        core = a_core(mutant=mutant)
        tell(core, accused)
        core._claims = Rumours()
        for i in range(30):
            pings = [e for e in sends(core.tick(1.0 + i), PING) if e.message[5] == 4]
            if pings:
                break
        assert (encode(accused) in pings[0].message[6]) is first, mutant


def test_a_sender_with_an_outdated_claim_hears_what_is_known():
    core = a_core()
    tell(core, claim(2, DEAD))
    (ack,) = sends(core.handle(message(PING, 2, 5, 0), 1.0))
    assert ack.message[6][0] == encode(claim(2, DEAD)) or not ack.message[6]
    tell(core, claim(3))
    tell(core, claim(3, DEAD))
    (ack,) = sends(core.handle(message(PING, 3, 5, 0), 1.0))
    assert ack.message[6][0] == encode(claim(3, DEAD))


@pytest.mark.parametrize("other", [claim(0, boot=4), claim(0, boot=3, address="tcp://10.9.9.9:1")])
def test_a_second_process_with_this_identity_ends_this_one(other):
    core = a_core(boot=3)
    (effect,) = [e for e in tell(core, other) if isinstance(e, Usurped)]
    assert "another process runs as metadata 0" in effect.reason
    assert core.stopped
    assert core.next_deadline() == float("inf")
    assert core.tick(99.0) == core.handle(message(PING, 1, 5, 0), 99.0) == core.leave() == []


def test_leaving_is_told_and_ends_it():
    core = a_core()
    effects = core.leave()
    assert {e.address for e in sends(effects, GOSSIP)} == {
        f"tcp://10.0.0.{i}:1" for i in range(1, 5)
    }
    assert {decode_claim(e.message[2]).status for e in sends(effects)} == {LEFT}
    other = a_core(me=1)
    assert changes(other.handle(message(GOSSIP, 0, status=LEFT), 1.0)) == [(0, "unknown", "left")]
    assert other.status(0) == "dead"
    assert other.snapshot(0).status == "left"
    assert not other.is_up(0)


def test_who_slept_blames_nobody():
    for mutant, suspected in ((None, 0), ("sleeper", 1)):
        core = a_core(mutant=mutant)
        _, now = first_ping(core)
        core.tick(now + 30.0)
        assert core.counts["suspected"] == suspected, mutant


def test_a_suspect_is_given_the_time_that_its_judge_slept():
    core = a_core()
    tell(core, claim(2, SUSPECT, by=6), now=0.5)
    core.tick(0.6)
    deadline = core._suspicions[4].deadline
    core.tick(100.0)
    assert core.status(4) == "suspect"
    assert core._suspicions[4].deadline > deadline + 90.0


# ------------------------------------------------------------------------------ tables and maps


def test_tables_that_differ_are_exchanged():
    one, other = a_core(40, me=0), a_core(40, me=1)
    one.handle(message(GOSSIP, 7, claims=[claim(i) for i in range(20, 30)]), 0.5)
    sync = (VERSION, SYNC, other.my_raw, other.my_vitals_raw, 0, other.table.sums(), (), ())
    tables = sends(one.handle(sync, 1.0), TABLE)
    assert tables[-1].message[5][1] is True
    for table in tables:
        back = sends(other.handle(table.message, 1.0), TABLE)
    assert back[-1].message[5][1] is False
    for answer in back:
        one.handle(answer.message, 1.0)
    assert [other.status(i * 2) for i in (7, 20, 29)] == ["alive"] * 3
    assert one.table.sums() == other.table.sums()
    again = (VERSION, SYNC, other.my_raw, other.my_vitals_raw, 0, other.table.sums(), (), ())
    assert not sends(one.handle(again, 2.0), TABLE), "equal tables are not sent"


def test_messages_other_than_tables_are_small():
    core = a_core(5)
    for i in range(5, 200):
        tell(core, claim(i), now=0.1)
        core.handle(message(GOSSIP, 4, others=[vitals(i)]), 0.1)
    for effect in sends(core.tick(1.5)) + sends(core.handle(message(PING, 1, 5, 0), 1.6)):
        size = len(codec.pack(effect.message))
        assert size < ROOM + 400
        if effect.message[1] in (PING, ACK, GOSSIP):
            assert size > ROOM - 200, "there is much to tell"


def test_the_dead_of_the_map_are_kept_and_others_forgotten_in_the_end():
    core = a_core()
    for i in (2, 9):
        tell(core, claim(i))
        tell(core, claim(i, DEAD))
    now = 1.0
    while now < m.DEAD_KEEP + 100:
        now = max(now + 0.25, core.next_deadline())
        for ping in sends(core.tick(now), PING):
            core.handle(message(ACK, ping.message[5] // 2, ping.message[4]), now)
        if now < m.DEAD_KEEP - 100:
            assert core.status(18) == "dead"
    assert core.snapshot(18) is None
    assert core.status(4) == "dead"


def test_another_map_is_reported_and_not_too_often():
    core = a_core()
    core.refresh(Info(5, b"m" * 32, 1, 1, 0.0), 0.0)

    def hear(epoch, digest, now):
        raw = encode(vitals(1, heartbeat=int(now * 100), epoch=epoch, digest=digest))
        sent = (VERSION, GOSSIP, encode(claim(1)), raw, 0, 0, (), ())
        return [e[1:] for e in core.handle(sent, now) if isinstance(e, OtherMap)]

    assert hear(5, b"m" * 32, 1.0) == []
    assert hear(4, b"x" * 32, 2.0) == []
    assert hear(5, b"x" * 32, 3.0) == [(5, b"x" * 32)]
    assert hear(6, b"y" * 32, 3.1) == [(6, b"y" * 32)]
    assert hear(6, b"y" * 32, 3.2) == []
    assert hear(6, b"y" * 32, 4.2) == [(6, b"y" * 32)]


# ---------------------------------------------------------------------------------- small parts


def test_rumours_tell_the_least_told_first_then_the_newest():
    rumours = Rumours()
    for key, raw in ((1, b"a" * 10), (2, b"b" * 10), (3, b"c" * 10)):
        rumours.add(key, raw)
    assert rumours.take(26, 3) == [b"c" * 10, b"b" * 10]
    assert rumours.take(13, 3) == [b"a" * 10]
    rumours.add(2, b"d" * 10)
    assert rumours.take(100, 3, avoid=1) == [b"d" * 10, b"c" * 10]
    seen = [rumours.take(1000, 3) for _ in range(4)]
    assert [len(x) for x in seen] == [3, 2, 0, 0]
    assert len(rumours) == 0


def test_a_suspicion_is_shorter_for_every_new_accuser():
    suspicion = Suspicion(10.0, 1, 4.0, 50)
    seen = [suspicion.deadline]
    for by in (1, 2, 2, 3, 4, 5):
        suspicion.confirm(by)
        seen.append(suspicion.deadline)
    assert seen[0] == seen[1] == 34.0
    assert seen[2] == seen[3] == pytest.approx(24.0)
    assert seen[4] < seen[3]
    assert seen[5] == seen[6] == 14.0
    assert Suspicion(0.0, 1, 4.0, 2).deadline == 4.0, "nobody is there to confirm"
    assert [shortest(n) for n in (2, 10, 100, 1000)] == [4.0, 4.0, 8.0, pytest.approx(12.0)]


BAD = [
    (),
    (2, 1),
    message(PING, 1, 5, 0)[:-1],
    message(9, 1),
    message(PING, 1, -1, 0),
    message(PING, 1, 5, (1, 2)),
    message(PING, 1, 5, 1 << 20),
    message(PING_REQ, 1, 5, (4, "nowhere")),
    message(SYNC, 1, 0, b"short"),
    message(TABLE, 1, 0, (1, 2)),
    (*message(GOSSIP, 1)[:6], ("text",), ()),
    (*message(GOSSIP, 1)[:2], b"\xc1", *message(GOSSIP, 1)[3:]),
    (*message(GOSSIP, 1)[:3], encode(vitals(2)), *message(GOSSIP, 1)[4:]),
    message(GOSSIP, 1, claims=[claim(2, status=7)]),
    message(GOSSIP, 1, claims=[claim(2, node_id=b"short")]),
    message(GOSSIP, 1, claims=[claim(2, address="x")]),
    message(GOSSIP, 1, claims=[claim(2, key=1 << 20)]),
    message(GOSSIP, 1, claims=[claim(2, incarnation=True)]),
    message(GOSSIP, 1, others=[vitals(2, digest=b"")]),
]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_malformed_is_refused(bad):
    core = a_core()
    with pytest.raises(RemoteProtocolError):
        core.handle(bad, 1.0)


def golden():
    """(name, value) of everything that travels, in its first version."""
    buckets = bytes(range(256)) * 2
    accused = Claim(9, bytes(range(16)), "unix:///run/dfs/c4", 1 << 40, 3, SUSPECT, 14)
    told = [claim(1), accused, claim(2, LEFT, 2, 7)]
    return [
        ("claim", claim(1)),
        ("accusation", accused),
        ("vitals", Vitals(9, 3, 70000, 12, bytes(range(32)), 1 << 42, 1 << 41, 0.25)),
        ("ping", message(PING, 1, 300, 9, told, [vitals(2)])),
        ("ack", message(ACK, 1, 300, 0, told)),
        ("nack", message(NACK, 1, 300)),
        ("ping_req", message(PING_REQ, 1, 301, (9, "unix:///run/dfs/c4"))),
        ("gossip", message(GOSSIP, 1, claims=told)),
        ("sync", message(SYNC, 1, 0, buckets)),
        ("table", message(TABLE, 1, 0, ((1 << 63) | 5, True), told, [vitals(2)])),
    ]


def test_the_bytes_of_version_1_stay_as_they_are():
    lines = [x for x in GOLDEN.read_text().splitlines() if x and not x.startswith("#")]
    kept = dict(line.split(" ", 1) for line in lines)
    assert kept == {name: codec.pack(value).hex() for name, value in golden()}
    for name, text in kept.items():
        value = codec.unpack(bytes.fromhex(text))
        if name in ("claim", "accusation"):
            assert encode(decode_claim(bytes.fromhex(text))).hex() == text
        elif name == "vitals":
            assert encode(decode_vitals(bytes.fromhex(text))).hex() == text
        else:
            check_message(value)


def test_boot_must_be_counted():
    with pytest.raises(ValueError, match="boot"):
        Membership(0, "metadata", bytes(16), "tcp://h:1", 0, random.Random(1))
