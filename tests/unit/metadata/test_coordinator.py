"""The coordinator and the replicas of a small cluster, driven by hand: every way an operation fails."""

import pytest
from smallkv import Dict, KeepsHints, make_map, member

from dfs.cluster.map import METADATA, ClusterMap
from dfs.cluster.node import Params
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    NotHome,
    TooManySiblings,
    Unreachable,
)
from metadata import versions
from metadata.coordinator import DONE, OFFER, SEND, Coordinator
from metadata.merkle import Digests
from metadata.quorum import DEFAULTS, Options
from metadata.registers import HINT, MERGE, MINT, Registers, partition_of_row, row_of


class Replica:
    def __init__(self, number, cluster_map):
        self.table = Dict()
        self.hints = KeepsHints()
        self.registers = Registers(
            self.table, number, cluster_map, digests=Digests(self.table), hints=self.hints
        )
        self.fault = None  # a DfsError to answer everything with, or "silent"
        self.seen = []

    def serve(self, now_us, epoch, request):
        self.seen.append(request)
        if self.fault is not None:
            return self.fault
        ops, (reply,) = self.registers.apply(now_us, [(epoch, request)])
        for key, value in ops:
            if value is None:
                self.table.pop(key, None)
            else:
                self.table[key] = value
        self.registers.settle()
        return reply


class Bench:
    """A cluster whose messages are delivered at once, unless a fault or a hook says otherwise."""

    def __init__(self, cluster_map, key=b"key", coordinator=None):
        self.now = 100.0
        self.maps = {node.number: cluster_map for node in cluster_map.nodes}
        self.row = row_of(0, key)
        self.partition = partition_of_row(self.row)
        self.homes = cluster_map.read_homes(METADATA, self.partition)
        self.replicas = {
            node.number: Replica(node.number, cluster_map) for node in cluster_map.nodes
        }
        self.down = set()
        self.me = self.homes[0] if coordinator is None else coordinator
        self.core = self.restart(self.me, cluster_map)
        self.results = {}
        self.sent = []
        self.silent = []  # tickets without an answer
        self.before = None  # called with (node, request) before each delivery
        self.token = 0

    def restart(self, number, cluster_map):
        self.me = number
        self.core = Coordinator(number, cluster_map, is_up=lambda n: n not in self.down)
        return self.core

    def run(self, effects):
        queue = list(effects)
        while queue:
            effect = queue.pop(0)
            if effect[0] == DONE:
                assert effect[1] not in self.results, "answered twice"
                self.results[effect[1]] = effect[2]
            elif effect[0] == OFFER:
                queue += self.core.on_map(self.now, ClusterMap.decode(effect[1]))
                self.replicas[self.me].registers.follow(self.core.map)
            else:
                assert effect[0] == SEND
                _, node, epoch, request, ticket = effect
                self.sent.append((node, request))
                if self.before is not None:
                    self.before(node, request)
                if self.replicas[node].fault == "silent":
                    self.silent.append((ticket, epoch, node, request))
                    continue
                reply = self.replicas[node].serve(int(self.now * 1e6), epoch, request)
                queue += self.core.on_reply(self.now, ticket, reply)

    def advance(self, seconds):
        end = self.now + seconds
        while (due := self.core.next_tick()) <= end:
            self.now = max(self.now, due)
            self.run(self.core.tick(self.now))
        self.now = end

    def options(self, given):
        return Options(given) if given else DEFAULTS

    def put(self, value, context=b"", **options):
        self.token += 1
        self.run(
            self.core.start_put(
                self.now, self.token, self.row, context, value, self.options(options), self.now + 5
            )
        )
        return self.token

    def get(self, **options):
        self.token += 1
        self.run(
            self.core.start_get(self.now, self.token, self.row, self.options(options), self.now + 5)
        )
        return self.token

    def result(self, token):
        found = self.results[token]
        if isinstance(found, Exception):
            raise found
        return found

    def held(self, node):
        data = self.replicas[node].table.get(self.row)
        return tuple(x[2] for x in versions.decode(data)[1]) if data else ()


def test_a_put_is_on_all_homes_and_a_get_returns_it():
    b = Bench(make_map(5))
    context, siblings, info = b.result(b.put(b"v"))
    assert siblings == 1
    assert set(info["acked"]) <= set(b.homes)
    assert [b.held(n) for n in b.homes] == [(b"v",)] * 3
    values, seen, info = b.result(b.get())
    assert (values, seen) == ((b"v",), context)
    assert len(info["acked"]) == 2
    assert b.core.statistics()["under_way"] == 0


def test_a_key_never_written_has_no_values_and_is_not_written_by_reading():
    b = Bench(make_map(3))
    assert b.result(b.get())[:2] == ((), b"")
    assert [b.replicas[n].table.get(b.row) for n in b.homes] == [None] * 3


def test_nothing_is_sent_before_the_own_copy_is_durable():
    b = Bench(make_map(3))

    def look(node, request):
        if request[0] != MINT:
            assert b.held(b.me) == (b"v",)

    b.before = look
    b.result(b.put(b"v"))
    assert b.sent[0][0] == b.me
    assert b.sent[0][1][0] == MINT


def test_a_full_own_disk_refuses_the_put_before_anything_is_sent():
    b = Bench(make_map(3))
    b.replicas[b.me].fault = DiskFull("no room")
    with pytest.raises(DiskFull, match="no room"):
        b.result(b.put(b"v"))
    assert len(b.sent) == 1


def test_contexts_supersede_and_blind_puts_make_siblings():
    b = Bench(make_map(3))
    context = b.result(b.put(b"1"))[0]
    assert b.result(b.put(b"2"))[1] == 2
    assert b.result(b.put(b"3", context))[1] == 2  # 1 is gone, 2 was not seen
    values, context, _ = b.result(b.get())
    assert values == (b"3", b"2")
    assert b.result(b.put(None, context))[1] == 0
    values, context, _ = b.result(b.get())
    assert values == ()
    assert context != b""  # a tombstone


def test_a_put_without_a_context_supersedes_what_a_read_quorum_shows():
    b = Bench(make_map(5))
    other = b.homes[1]
    b.replicas[b.me].fault = Unreachable("cut off")
    b.restart(other, b.core.map)
    b.result(b.put(b"old"))
    b.replicas[b.homes[0]].fault = None
    b.restart(b.homes[0], b.core.map)
    assert b.held(b.me) == ()  # the coordinator itself has not seen it
    assert b.result(b.put(b"new", None))[1] == 1
    assert b.result(b.get())[0] == (b"new",)


def test_only_a_home_coordinates():
    b = Bench(make_map(5))
    stranger = next(n for n in b.replicas if n not in b.homes)
    b.restart(stranger, b.core.map)
    with pytest.raises(NotHome) as e:
        b.get()
    assert e.value.details == b.homes


def test_one_home_down_of_three():
    b = Bench(make_map(3))
    b.replicas[b.homes[2]].fault = Unreachable("refused")
    _, _, info = b.result(b.put(b"v"))
    assert sorted(info["acked"]) == sorted(b.homes[:2])
    b.restart(b.homes[1], b.core.map)
    assert b.result(b.get())[0] == (b"v",)


def test_a_hint_takes_the_place_of_a_failed_home_for_w_but_not_for_pw():
    b = Bench(make_map(6))
    for node in b.homes[1:]:
        b.replicas[node].fault = Unreachable("refused")
    strict = b.put(b"v", pw=2, w=2)
    loose = b.put(b"w", pw=1, w=2)
    b.advance(1)
    with pytest.raises(NoQuorum, match=r"2 of 3 needed.*unreachable") as e:
        b.result(strict)
    wanted, told = e.value.details
    assert wanted == "2 of 3"
    assert told[b.me] == "ok"
    assert "keeps its copy" in told[b.homes[1]]
    info = b.result(loose)[2]
    assert info["acked"] == (b.me,)
    assert info["hinted"]
    preference = b.core.map.preference(METADATA, b.partition)
    keepers = [n for n in preference if b.replicas[n].hints.kept]
    assert keepers == list(preference[3:5])
    assert {t for n in keepers for _, _, t in b.replicas[n].hints.kept} == set(b.homes[1:])


def test_a_home_known_to_be_down_is_hinted_at_once():
    b = Bench(make_map(6))
    b.down = {b.homes[2]}
    b.replicas[b.homes[2]].fault = "silent"
    b.result(b.put(b"v"))
    assert any(request[0] == HINT for _, request in b.sent)
    assert b.core.statistics()["under_way"] == 1  # the copy for the silent one is awaited


def test_without_fallbacks_the_coordinator_keeps_the_hint_and_it_does_not_count():
    b = Bench(make_map(3))
    for node in b.homes[1:]:
        b.replicas[node].fault = Unreachable("refused")
    token = b.put(b"v", pw=0, w=2)
    b.advance(1)
    assert {t for _, _, t in b.replicas[b.me].hints.kept} == set(b.homes[1:])
    with pytest.raises(NoQuorum):
        b.result(token)


def test_a_silent_home_is_replaced_when_it_is_slow():
    b = Bench(make_map(6))
    for node in b.homes[1:]:
        b.replicas[node].fault = "silent"
    token = b.put(b"v", pw=1)
    assert token not in b.results
    b.advance(0.6)
    assert b.result(token)[2]["hinted"]


def test_the_deadline_ends_an_operation_and_names_who_was_silent():
    b = Bench(make_map(3))
    for node in b.homes[1:]:
        b.replicas[node].fault = "silent"
    put, get = b.put(b"v"), b.get()
    b.advance(5.1)
    with pytest.raises(NoQuorum, match="no answer in time"):
        b.result(put)
    with pytest.raises(NoQuorum, match="2 of 3 needed for a read"):
        b.result(get)
    assert b.core.statistics()["under_way"] == 0


def test_a_late_copy_finishes_behind_the_callers_back_or_is_hinted():
    b = Bench(make_map(6))
    b.replicas[b.homes[2]].fault = "silent"
    b.result(b.put(b"v"))
    ((ticket, _, _, request),) = b.silent
    assert request[0] == MERGE
    b.run(b.core.on_reply(b.now, ticket, DeadlineExceeded("no answer")))
    assert [n for n, r in b.sent if r[0] == HINT]
    assert b.core.statistics()["under_way"] == 0


def test_a_lost_request_is_sent_again_with_the_same_register():
    b = Bench(make_map(3))
    victim = b.homes[1]
    b.replicas[b.homes[2]].fault = Unreachable("refused")
    b.replicas[victim].fault = Busy("later")
    token = b.put(b"v")
    b.replicas[victim].fault = None
    b.advance(0.2)
    b.result(token)
    registers = {r[2] for n, r in b.sent if r[0] == MERGE}
    assert len(registers) == 1


def test_a_read_asks_another_home_when_one_is_slow():
    b = Bench(make_map(3))
    b.result(b.put(b"v"))
    first = b.core.order(b.homes)[1]
    b.replicas[first].fault = "silent"
    token = b.get()
    assert token not in b.results
    b.advance(0.6)
    assert b.result(token)[0] == (b"v",)
    assert b.core.statistics()["hedges"] == 1


def test_the_patience_follows_the_usual_latency():
    b = Bench(make_map(3))
    for _ in range(300):
        b.core.observe(b.homes[1], 0.05)
    assert 0.08 < b.core.patience([b.homes[0], b.homes[1]]) < 0.13
    for _ in range(300):
        b.core.observe(b.homes[1], 0.001)
    assert b.core.patience([b.homes[1]]) == 0.01


def test_different_answers_are_written_back_to_w_before_the_answer():
    b = Bench(make_map(3))
    b.replicas[b.homes[1]].fault = b.replicas[b.homes[2]].fault = Unreachable("refused")
    b.put(b"v")  # reaches the coordinator's own disk only
    b.advance(1)
    b.replicas[b.homes[1]].fault = b.replicas[b.homes[2]].fault = None

    copies = []
    finish = b.core.finish

    def count(operation, result):
        copies.append(sum(b.held(n) == (b"v",) for n in b.homes))
        finish(operation, result)

    b.core.finish = count
    values, _, info = b.result(b.get())
    assert values == (b"v",)
    assert copies[0] >= 2
    assert info["repaired"]
    assert [b.held(n) for n in b.homes] == [(b"v",)] * 3


def test_a_read_that_cannot_repair_fails_unless_it_is_eventual():
    b = Bench(make_map(3))
    b.replicas[b.homes[1]].fault = b.replicas[b.homes[2]].fault = Unreachable("refused")
    b.put(b"v")
    b.advance(1)
    b.replicas[b.homes[1]].fault = b.replicas[b.homes[2]].fault = None

    def break_on_merge(node, request):
        b.replicas[node].fault = DiskFull("full") if request[0] == MERGE else None

    b.before = break_on_merge
    token = b.get()
    b.advance(1)
    with pytest.raises(DiskFull, match="repairing what was read"):
        b.result(token)
    assert b.result(b.get(eventual=True))[0] == (b"v",)


def test_fallbacks_answer_reads_when_no_home_has_to():
    b = Bench(make_map(6))
    for node in b.homes[1:]:
        b.replicas[node].fault = Unreachable("refused")
    b.result(b.put(b"v", pw=0))
    values, _, info = b.result(b.get(pr=0))
    assert values == (b"v",)
    assert len(info["acked"]) == 2
    token = b.get()
    b.advance(1)
    with pytest.raises(NoQuorum):
        b.result(token)


def test_a_resend_is_the_same_write():
    b = Bench(make_map(3))
    request = b"r" * 16
    first = b.result(b.put(b"v", request=request))
    again = b.result(b.put(b"v", request=request))
    assert first == again
    assert sum(r[0] == MINT for _, r in b.sent) == 1
    assert b.held(b.me) == (b"v",)


def test_a_resend_joins_the_write_under_way():
    b = Bench(make_map(3))
    for node in b.homes[1:]:
        b.replicas[node].fault = "silent"
    first = b.put(b"v", request=b"r" * 16)
    second = b.put(b"v", request=b"r" * 16)
    for ticket, epoch, node, request in b.silent:
        b.replicas[node].fault = None
        b.run(b.core.on_reply(b.now, ticket, b.replicas[node].serve(0, epoch, request)))
    assert b.result(first) == b.result(second)


def test_after_no_quorum_a_resend_sends_the_identical_register():
    b = Bench(make_map(3))
    for node in b.homes[1:]:
        b.replicas[node].fault = Unreachable("refused")
    first = b.put(b"v", request=b"r" * 16)
    b.advance(1)
    with pytest.raises(NoQuorum):
        b.result(first)
    for node in b.homes[1:]:
        b.replicas[node].fault = None
    assert b.result(b.put(b"v", request=b"r" * 16))[1] == 1
    assert sum(r[0] == MINT for _, r in b.sent) == 1
    assert b.result(b.get())[0] == (b"v",)


def test_a_request_id_is_not_taken_for_two_keys_and_is_forgotten_in_time():
    b = Bench(make_map(3))
    b.result(b.put(b"v", request=b"r" * 16))
    own = b.row
    b.row = row_of(0, b"other")
    b.homes = b.core.map.read_homes(METADATA, partition_of_row(b.row))
    with pytest.raises(InvalidArgument, match="another key"):
        b.put(b"v", request=b"r" * 16)
    b.row = own
    b.now += 601
    b.run(b.core.tick(b.now))
    assert b.core.statistics()["remembered"] == 0


def test_sibling_limits():
    b = Bench(make_map(3))
    for i in range(32):
        b.result(b.put(b"%d" % i))
    with pytest.raises(TooManySiblings, match="get it, then put"):
        b.result(b.put(b"one more"))
    context = b.result(b.get())[1]
    assert b.result(b.put(b"all", context))[1] == 1
    big = bytes(700_000)
    b.result(b.put(big))
    with pytest.raises(TooManySiblings, match="bytes"):
        b.result(b.put(big))


# ------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("level", "down", "reads", "writes"),
    [
        ("one", 2, True, True),
        ("quorum", 1, True, True),
        ("quorum", 2, False, False),
        ("all", 0, True, True),
        ("all", 1, False, False),
    ],
)
def test_levels(level, down, reads, writes):
    b = Bench(make_map(3))
    for node in b.homes[3 - down :]:
        b.replicas[node].fault = Unreachable("refused")
    put, get = b.put(b"v", level=level), b.get(level=level)
    b.advance(1)
    for token, good in ((put, writes), (get, reads)):
        if good:
            b.result(token)
        else:
            with pytest.raises(NoQuorum):
                b.result(token)


def test_local_quorum_and_each_zone():
    zones = ["east", "east", "east", "west", "west", "west"]
    params = Params(5, 3, 3, 3)
    b = Bench(make_map(6, zones=zones, params=params))
    of_zone = {z: [n for n in b.homes if zones[n] == z] for z in ("east", "west")}
    mine = zones[b.me]
    other = "west" if mine == "east" else "east"
    for node in of_zone[other]:
        b.replicas[node].fault = Unreachable("refused")
    b.result(b.put(b"v", level="local-quorum"))
    assert b.result(b.get(level="local-quorum"))[0] == (b"v",)
    put, get = b.put(b"v", level="each-zone"), b.get(level="each-zone")
    b.advance(1)
    for token in (put, get):
        with pytest.raises(NoQuorum, match="and"):
            b.result(token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "most"}, "no level"),
        ({"r": 1, "w": 1}, "can miss the latest write"),
        ({"n": 4}, "n is 1 to 3"),
        ({"w": 4, "r": 3}, "w is 1 to"),
        ({"pw": 3, "w": 2}, "pw is 0 to"),
        ({"r": "2"}, "number of copies"),
        ({"request": b"short"}, "16 bytes"),
        ({"quorum": 2}, "no option"),
    ],
)
def test_impossible_options_are_refused(options, message):
    b = Bench(make_map(3))
    with pytest.raises(InvalidArgument, match=message):
        b.get(**options)


def test_eventual_allows_sets_that_do_not_overlap():
    b = Bench(make_map(3))
    b.result(b.put(b"v", r=1, w=1, eventual=True))


# ---------------------------------------------------------------------------------- map changes


def moved(b, start):
    """The next map in which the row's homes are in transition, by adding nodes."""
    nodes = list(start.nodes)
    for number in range(10, 60):
        nodes.append(member(number))
        if (new := start.begin(nodes)).old_homes(METADATA, b.partition):
            return new
    raise AssertionError("the row never moves")


def joined(b, new):
    """Nodes of the new map that are not there yet."""
    for node in new.nodes:
        if node.number not in b.replicas:
            b.replicas[node.number] = Replica(node.number, new)


def test_a_stale_coordinator_learns_the_map_and_goes_on_with_the_same_register():
    b = Bench(make_map(5))
    new = moved(b, b.core.map)
    joined(b, new)
    for number, replica in b.replicas.items():
        if number != b.me:
            replica.registers.follow(new)
    info = b.result(b.put(b"v"))[2]
    assert b.core.map.epoch == new.epoch
    for row in new.write_sets(METADATA, b.partition):
        assert sum(b.held(n) == (b"v",) for n in row) >= 2
    assert sum(r[0] == MINT for _, r in b.sent) == 1
    assert len({r[2] for _, r in b.sent if r[0] == MERGE}) == 1
    assert len(info["acked"]) >= 2
    assert sum(r.registers.stale for r in b.replicas.values()) >= 1


def test_a_coordinator_whose_own_replica_is_ahead_mints_once():
    b = Bench(make_map(5))
    new = moved(b, b.core.map)
    joined(b, new)
    for replica in b.replicas.values():
        replica.registers.follow(new)
    if b.me not in new.read_homes(METADATA, b.partition):
        pytest.skip("the coordinator is no home any more")
    b.result(b.put(b"v"))
    assert b.held(b.me) == (b"v",)


def test_in_joint_epochs_w_is_needed_in_both_sets():
    b = Bench(make_map(5))
    new = moved(b, b.core.map)
    joined(b, new)
    for replica in b.replicas.values():
        replica.registers.follow(new)
    old_row, new_row = new.write_sets(METADATA, b.partition)
    assert old_row == b.homes
    b.restart(next(n for n in old_row if n in new_row), new)
    only_new = [n for n in new_row if n not in old_row]
    shared = [n for n in new_row if n in old_row and n != b.me]
    for node in (*only_new, *shared):
        b.replicas[node].fault = Unreachable("refused")
    token = b.put(b"v")  # two of the old set may have it, only one of the new one
    b.advance(1)
    with pytest.raises(NoQuorum, match="2 of 3 and 2 of 3"):
        b.result(token)
    for replica in b.replicas.values():
        replica.fault = None
    b.result(b.put(b"w"))
    assert all(sum(b"w" in b.held(n) for n in row) >= 2 for row in (old_row, new_row))


def test_members_of_the_new_set_do_not_mint_in_phase_one():
    b = Bench(make_map(5))
    new = moved(b, b.core.map)
    joined(b, new)
    old_row, new_row = new.write_sets(METADATA, b.partition)
    fresh = next(n for n in new_row if n not in old_row)
    b.restart(fresh, new)
    with pytest.raises(NotHome):
        b.put(b"v")
    reply = b.replicas[fresh].serve(0, new.epoch, (MINT, b.row, b"", b"v"))
    assert isinstance(reply, NotHome)
    later = new.advance()
    b.replicas[fresh].registers.follow(later)
    assert not isinstance(
        b.replicas[fresh].serve(0, later.epoch, (MINT, b.row, b"", b"v")), Exception
    )


def test_equal_answers_are_written_to_the_new_set_before_they_are_returned():
    b = Bench(make_map(5))
    new = moved(b, b.core.map)
    joined(b, new)
    old_row, new_row = new.write_sets(METADATA, b.partition)
    data = b.replicas[b.me].serve(0, b.core.map.epoch, (MINT, b.row, b"", b"v"))[0]
    for node in old_row:
        b.replicas[node].serve(0, b.core.map.epoch, (MERGE, b.row, data))
    for replica in b.replicas.values():
        replica.registers.follow(new)
    b.restart(b.me, new)
    assert b.result(b.get())[0] == (b"v",)
    assert sum(b.held(n) == (b"v",) for n in new_row) >= 2


def test_a_map_in_the_middle_of_a_write_starts_its_quorums_again():
    b = Bench(make_map(5))
    new = moved(b, b.core.map)
    joined(b, new)
    for node in b.homes[1:]:
        b.replicas[node].fault = "silent"
    token = b.put(b"v")
    late = list(b.silent)
    for replica in b.replicas.values():
        replica.registers.follow(new)
    for node in b.homes[1:]:
        b.replicas[node].fault = None
    b.run(b.core.on_map(b.now, new))
    b.result(token)
    for ticket, _, _, _ in late:  # answers by the old map count for nothing
        b.run(b.core.on_reply(b.now, ticket, None))
    for row in new.write_sets(METADATA, b.partition):
        assert sum(b.held(n) == (b"v",) for n in row) >= 2


def test_what_a_read_wanted_to_ask_again_is_not_sent_the_mint():
    core, effects = superseding_put()
    by_node = {e[1]: e for e in effects if e[0] == SEND}
    others = [n for n in by_node if n != 0]
    effects = core.on_reply(0.0, by_node[others[0]][4], Busy("full up"))
    more = [e for e in effects if e[0] == SEND]
    effects = core.on_reply(0.0, by_node[0][4], b"")
    for effect in more:
        effects += core.on_reply(0.0, effect[4], b"")
    assert [(e[1], e[3][0]) for e in effects if e[0] == SEND] == [(0, MINT)]
    for now in (0.1, 0.2, 0.5):
        assert not [e for e in core.tick(now) if e[0] == SEND]


def test_a_put_that_ran_out_of_time_while_it_was_minted_is_not_minted_again():
    cluster = make_map(3)
    core = Coordinator(0, cluster)
    row, options = row_of(0, b"key"), Options({"request": b"r" * 16})
    ((_, _, _, _, ticket),) = core.start_put(0.0, 1, row, b"", b"v", options, 1.0)
    assert [e[0] for e in core.tick(1.1)] == [DONE]
    core.tick(1.2)
    with pytest.raises(Busy):
        core.start_put(1.2, 2, row, b"", b"v", options, 3.0)
    register = versions.put(versions.EMPTY, (), b"actor 12", 5, b"v")
    context = versions.encode_context(register[0])
    assert core.on_reply(1.3, ticket, (versions.encode(register), context, 1)) == []
    effects = core.start_put(1.4, 3, row, b"", b"v", options, 3.0)
    assert {e[3][0] for e in effects} == {MERGE}
    assert {e[3][2] for e in effects} == {versions.encode(register)}


def test_a_put_whose_late_mint_failed_is_tried_anew():
    core = Coordinator(0, make_map(3))
    row, options = row_of(0, b"key"), Options({"request": b"r" * 16})
    ((_, _, _, _, ticket),) = core.start_put(0.0, 1, row, b"", b"v", options, 1.0)
    core.tick(1.1)
    assert core.on_reply(1.3, ticket, DiskFull("no room")) == []
    (effect,) = core.start_put(1.4, 3, row, b"", b"v", options, 3.0)
    assert effect[3][0] == MINT


def superseding_put():
    core = Coordinator(0, make_map(3))
    return core, core.start_put(0.0, 1, row_of(0, b"key"), None, b"v", DEFAULTS, 5.0)
