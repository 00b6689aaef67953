"""Exchanges between homes: equal afterwards, little is sent, and only homes give registers away."""

import pytest

from dfs.cluster.map import ClusterMap
from dfs.errors import Busy, InvalidArgument, NotHome, StaleEpoch
from dfs.hashing import digest
from dfs.testing.sync_maps import DAY, NOW, OLD, make, moved_row, transition
from dfs.testing.sync_nodes import SyncNode, key_row, row_in, run
from metadata.antientropy import FRESH, OLDEST
from metadata.merkle import BLOBS, REGISTERS, partition_of_row
from metadata.pull import pull_partition
from metadata.registers import MERGE
from metadata.repair import affected, rebuild, repair_lost
from metadata.steps import Call, Write


def put(node, *names, value=b"v", now=OLD):
    for name in names:
        node.put(key_row(name), value, now)


def rows(node, prefix=b"r"):
    return {k: v for k, v in node.store.rows.items() if k.startswith(prefix)}


def sync(nodes, a, b, **options):
    return run(nodes, a, nodes[a].sync.exchange(b, NOW, **options), NOW)


def names(first, count):
    return [b"%d" % i for i in range(first, first + count)]


def totals(node):
    return [node.digests.totals(t, range(4096)) for t in (REGISTERS, BLOBS)]


def blob_row(data):
    return b"b" + digest(data)


def test_equal_nodes_need_one_call_a_table():
    nodes, _ = make()
    calls = []
    put(nodes[1], *names(0, 50))
    sync(nodes, 1, 2)
    run(nodes, 1, nodes[1].sync.exchange(2, NOW), NOW, calls=calls)
    assert calls == ["sync.totals", "sync.totals"]


def test_both_sides_get_what_they_lack():
    nodes, _ = make()
    put(nodes[1], *names(0, 60))
    put(nodes[2], *names(40, 60), value=b"other")
    put(nodes[1], b"both", value=b"one")
    blob = blob_row(b"blob")
    nodes[2]._put_blobs([(blob, b"blob")])
    outcome = sync(nodes, 1, 2)
    assert rows(nodes[1]) == rows(nodes[2])
    assert len(rows(nodes[1])) == 101
    assert sorted(nodes[1].values(key_row(b"50"))) == [b"other", b"v"]
    assert nodes[1].store.get(blob) == b"blob"
    assert totals(nodes[1]) == totals(nodes[2])
    assert outcome.pulled == 61
    assert outcome.pushed == 61
    again = sync(nodes, 2, 1)
    assert again.pulled == again.pushed == again.partitions == 0


def test_large_partitions_go_page_by_page():
    nodes, _ = make(3)
    one, two = nodes[1], nodes[2]
    for i in range(5000):
        node = one if i % 7 else two
        node.put(row_in(9, b"%05d" % i), b"%d" % i, OLD)
        if i % 3 == 0:
            (two if node is one else one).put(row_in(9, b"%05d" % i), b"else", OLD)
    big = bytes(900_000)
    for i in range(12):
        two.put(row_in(9, b"big%d" % i), big, OLD)
    sync(nodes, 1, 2)
    assert rows(one) == rows(two)
    assert len(rows(one)) == 5012
    assert one.total(9) == two.total(9)


def test_a_missing_side_of_any_shape():
    for a, b in [(0, 3000), (3000, 0), (1, 1), (0, 0)]:
        nodes, _ = make()
        for node, count in ((nodes[1], a), (nodes[2], b)):
            for i in range(count):
                node.put(row_in(4095, b"%d" % i), b"x", OLD)
        sync(nodes, 1, 2)
        assert rows(nodes[1]) == rows(nodes[2])


def test_fresh_registers_are_left_alone_unless_forced():
    nodes, _ = make()
    put(nodes[1], b"fresh", now=NOW - FRESH // 2)
    put(nodes[2], b"too", now=NOW - FRESH // 2)
    put(nodes[2], b"future", now=NOW + 2 * 3600_000_000)
    outcome = sync(nodes, 1, 2)
    assert outcome.fresh == 2
    assert nodes[1].values(key_row(b"future")) == [b"v"]
    assert nodes[2].values(key_row(b"fresh")) == []
    assert nodes[1].values(key_row(b"too")) == []
    sync(nodes, 1, 2, forced=True)
    assert rows(nodes[1]) == rows(nodes[2])


def test_directions():
    nodes, _ = make()
    put(nodes[1], b"one")
    put(nodes[2], b"two")
    sync(nodes, 1, 2, push=False)
    assert len(rows(nodes[1])) == 2
    assert len(rows(nodes[2])) == 1
    put(nodes[2], b"three")
    sync(nodes, 1, 2, pull=False)
    assert len(rows(nodes[2])) == 2 + 1
    assert len(rows(nodes[1])) == 2


# -- who may


def test_new_homes_get_everything_of_a_partition():
    before, moving, reading, after = transition()
    nodes, holder = make(4, before)
    row = moved_row(moving, after)
    p = partition_of_row(REGISTERS, row)
    nodes[1].put(row, b"v", NOW - 1)  # fresh
    blob = next(b for i in range(10**6) if partition_of_row(BLOBS, blob_row(b := b"%d" % i)) == p)
    nodes[1]._put_blobs([(blob_row(blob), blob)])
    holder[0] = moving
    outcome = run(nodes, 1, nodes[1].sync.push_partition(p, 4, NOW), NOW)
    assert outcome.pushed == 2
    assert outcome.errors == []
    assert nodes[4].values(row) == [b"v"]
    assert nodes[4].store.get(blob_row(blob)) == blob
    calls = []
    outcome = run(nodes, 1, nodes[1].sync.push_partition(p, 4, NOW), NOW, calls=calls)
    assert outcome.pushed == 0
    assert calls == ["sync.totals"] * 2 + ["sync.push"] * 2  # the pushes are barriers
    assert reading.epoch < after.epoch


def test_former_homes_give_blobs_away_but_no_registers():
    before, moving, _, after = transition()
    nodes, holder = make(4, before)
    row = moved_row(moving, after)
    p = partition_of_row(REGISTERS, row)
    nodes[1].put(row, b"v", OLD)
    blob = next(b for i in range(10**6) if partition_of_row(BLOBS, blob_row(b := b"%d" % i)) == p)
    nodes[1]._put_blobs([(blob_row(blob), blob)])
    holder[0] = after
    assert p not in nodes[1].sync.shared(after, 4)
    outcome = run(nodes, 1, nodes[1].sync.push_partition(p, 4, NOW, tables=(BLOBS,)), NOW)
    assert outcome.pushed == 1
    assert nodes[4].store.get(blob_row(blob)) == blob
    with pytest.raises(NotHome, match="not both homes"):
        run(nodes, 1, nodes[1].sync.push_partition(p, 4, NOW), NOW)
    value = nodes[1].store.get(row)
    for sender, receiver, method, args in [
        (1, 4, "sync.push", (REGISTERS, ((row, value),), NOW)),
        (4, 1, "sync.items", (REGISTERS, (row,))),
        (4, 1, "sync.keys", (REGISTERS, ((p, b"\xff" * 32),), b"", b"", True)),
        (4, 1, "sync.buckets", (REGISTERS, (p,))),
    ]:
        with pytest.raises(NotHome):
            run(
                nodes, receiver, nodes[receiver].answer(method, sender, after.epoch, args, NOW), NOW
            )
    # who still acts on the old map is told
    args = (REGISTERS, ((row, value),), NOW)
    with pytest.raises(StaleEpoch) as error:
        run(nodes, 4, nodes[4].answer("sync.push", 1, before.epoch, args, NOW), NOW)
    assert ClusterMap.decode(error.value.details[0]).epoch == after.epoch
    assert nodes[4].values(row) == []
    # and nobody pushes blobs to a node that is no home of them
    args = (BLOBS, ((blob_row(blob), blob),), NOW)
    with pytest.raises(NotHome, match="no home"):
        run(nodes, 1, nodes[1].answer("sync.push", 4, after.epoch, args, NOW), NOW)


def test_late_pushes_and_nonsense_are_refused():
    nodes, holder = make()
    put(nodes[1], b"a")
    ((row, value),) = rows(nodes[1]).items()
    args = (REGISTERS, ((row, value),), NOW - OLDEST - 1)
    with pytest.raises(StaleEpoch, match="s ago"):
        run(nodes, 2, nodes[2].answer("sync.push", 1, holder[0].epoch, args, NOW), NOW)
    for method, args in [
        ("sync.push", (REGISTERS, ((b"nrow", b"x"),), NOW)),
        ("sync.push", (BLOBS, ((row, value),), NOW)),
        ("sync.items", (REGISTERS, (7,))),
        ("sync.buckets", (REGISTERS, (4096,))),
        ("sync.totals", (2, b"", None)),
    ]:
        with pytest.raises(InvalidArgument):
            run(nodes, 2, nodes[2].answer(method, 1, holder[0].epoch, args, NOW), NOW)


# -- rejoining


def rejoin(nodes, number, *, down=()):
    node = nodes[number]
    complete = []
    for partition in node.pull_first.partitions():
        if run(nodes, number, pull_partition(node.sync, partition, NOW), NOW, down=down):
            node.store.apply(node.pull_first.finish([partition]))
            complete.append(partition)
    return complete


def test_a_waiting_node_pulls_and_gives_nothing_old_away():
    nodes, _ = make()
    ghost, kept, young = key_row(b"ghost"), key_row(b"kept"), key_row(b"young")
    partitions = sorted({partition_of_row(REGISTERS, r) for r in (ghost, kept, young)})
    nodes[1].put(ghost, b"g", OLD)
    nodes[1].put(young, b"y", NOW - DAY // 2)
    for n in (2, 3):
        nodes[n].put(kept, b"k", OLD)
    nodes[1].store.apply(nodes[1].pull_first.begin(partitions))
    assert all(nodes[1].pull_first.waiting(p) for p in partitions)
    sync(nodes, 2, 1)
    with pytest.raises(Busy, match="cannot tell yet"):  # another value of an old row, by now
        sync(nodes, 3, 1)
    sync(nodes, 1, 2)
    assert nodes[2].values(ghost) == []  # it may have been deleted and purged there
    assert nodes[2].values(young) == [b"y"]  # it cannot
    again = SyncNode(1, nodes[1].get_map, rows=nodes[1].store.rows)  # the mark is persistent
    nodes[1] = again
    assert again.pull_first.partitions() == partitions
    assert rejoin(nodes, 1, down=[3]) == []  # N - W + 1 others must answer
    assert rejoin(nodes, 1) == partitions
    assert again.pull_first.partitions() == []
    assert again.values(ghost) == []
    assert again.values(young) == [b"y"]
    assert set(again.values(kept)) == {b"k"}
    sync(nodes, 1, 2)
    sync(nodes, 1, 3)
    assert totals(nodes[1]) == totals(nodes[2]) == totals(nodes[3])


def ghost_that_met_a_new_value():
    """Node 1 holds what was purged elsewhere, and waits; the others have a new value."""
    nodes, _ = make()
    row = key_row(b"again")
    ghost = nodes[1].put(row, b"ghost", OLD)
    new = nodes[2].put(row, b"new", NOW - DAY // 2)
    nodes[3].write([(MERGE, row, new)], NOW)
    p = partition_of_row(REGISTERS, row)
    nodes[1].store.apply(nodes[1].pull_first.begin([p]))
    return nodes, row, p, ghost


def test_a_ghost_is_told_from_a_new_value_beside_it():
    nodes, row, p, ghost = ghost_that_met_a_new_value()
    (reply,) = nodes[1].write([(MERGE, row, nodes[2].store.get(row))], NOW)
    assert isinstance(reply, Busy)
    assert nodes[1].write([(MERGE, row, ghost)], NOW) == [None]  # nothing new in it
    assert rejoin(nodes, 1, down=[3]) == []
    assert nodes[1].values(row) == [b"ghost"]  # it may yet be kept
    assert rejoin(nodes, 1) == [p]
    assert nodes[1].values(row) == [b"new"]
    for n in (2, 3):
        sync(nodes, 1, n)
    assert totals(nodes[1]) == totals(nodes[3])


def test_nobody_is_a_ghost_while_another_home_waits():
    nodes, row, p, _ = ghost_that_met_a_new_value()
    nodes[3].store.apply(nodes[3].pull_first.begin([p]))
    assert rejoin(nodes, 1) == [p]
    assert sorted(nodes[1].values(row)) == [b"ghost", b"new"]


def test_an_old_value_that_one_other_home_knows_is_kept():
    nodes, row, p, ghost = ghost_that_met_a_new_value()
    nodes[3].write([(MERGE, row, ghost)], NOW)
    assert rejoin(nodes, 1) == [p]
    assert sorted(nodes[1].values(row)) == [b"ghost", b"new"]


def test_what_only_a_waiting_home_saw_deleted_stays_deleted():
    nodes, _ = make()
    row = key_row(b"deleted")
    p = partition_of_row(REGISTERS, row)
    old = nodes[2].put(row, b"v", OLD)
    for n in (1, 3):
        nodes[n].write([(MERGE, row, old)], NOW)
    nodes[1].put(row, None, OLD + 1, nodes[1].context(row))
    nodes[1].store.apply(nodes[1].pull_first.begin([p]))
    assert rejoin(nodes, 1) == [p]
    assert nodes[1].values(row) == []
    assert nodes[1].store.get(row)


def test_when_all_were_restored_nothing_is_dropped():
    nodes, _ = make()
    row = key_row(b"only")
    p = partition_of_row(REGISTERS, row)
    nodes[1].put(row, b"v", OLD)
    for node in nodes.values():
        node.store.apply(node.pull_first.begin([p]))
    for number in nodes:
        assert rejoin(nodes, number) == [p]
    sync(nodes, 1, 2)
    sync(nodes, 1, 3)
    assert nodes[2].values(row) == nodes[3].values(row) == [b"v"]


# -- damage


def test_lost_rows_are_pulled_under_a_new_name():
    nodes, _ = make()
    put(nodes[1], *names(0, 400))
    for data in names(0, 200):
        nodes[1]._put_blobs([(blob_row(data), data)])
    for n in (2, 3):
        sync(nodes, 1, n)
    node, before = nodes[1], dict(nodes[1].store.rows)
    node.store.lose(b"b\x40", b"m\x00\x02")
    node.store.lose(b"r\x03", b"r\x05")
    node.store.lose(b"nboot", b"nbooz")
    renamed = []

    def rename():
        renamed.append(set(node.pull_first.partitions()))
        yield Write(())

    losses = list(node.store.lost)
    steps = repair_lost(node.sync, node.pull_first, losses, lost_registers=rename)
    assert run(nodes, 1, steps, NOW) is True
    assert renamed == [set()]  # before anything waits or reads as absent
    assert node.store.lost == []
    waiting = node.pull_first.partitions()
    assert set(range(0x300, 0x500)) <= set(waiting)
    for table in (REGISTERS, BLOBS):
        for p in affected(losses, table):
            run(nodes, 1, rebuild(lambda _: node.store, table, p, damaged=True), NOW)
    assert rejoin(nodes, 1) == waiting
    sync(nodes, 1, 2)
    data = (b"r", b"b", b"m")
    assert {k: v for k, v in node.store.rows.items() if k[:1] in data} == {
        k: v for k, v in before.items() if k[:1] in data
    }
    assert node.digests.drift == 0


def test_damage_is_not_absence():
    nodes, _ = make()
    put(nodes[1], *names(0, 300))
    sync(nodes, 1, 2)
    put(nodes[1], *names(300, 100))
    put(nodes[2], *names(400, 100))
    nodes[2].store.lose(b"r\x03", b"r\x05")
    outcome = sync(nodes, 1, 2)
    assert outcome.errors
    assert all(e.startswith("partition ") for e in outcome.errors)
    intact = {k: v for k, v in rows(nodes[1]).items() if not b"r\x03" <= k < b"r\x05"}
    assert {k: v for k, v in rows(nodes[2]).items() if not b"r\x03" <= k < b"r\x05"} == intact
    assert len(intact) > 300


def waiting_pusher():
    before, moving, _, after = transition()
    nodes, holder = make(4, before)
    row = moved_row(moving, after)
    p = partition_of_row(REGISTERS, row)
    nodes[1].put(row, b"v", OLD)
    holder[0] = moving
    return nodes, row, p


def test_who_waits_for_a_partition_does_not_vouch_for_it():
    nodes, row, p = waiting_pusher()
    sync = nodes[1].sync
    other = p + 1 if p < 4095 else p - 1
    sync.pull_first.begin([p])
    calls = []
    outcome = run(nodes, 1, sync.push_partitions((p,), 4, NOW), NOW, calls=calls)
    assert (outcome.failed, outcome.pushed, calls) == ([p], 0, [])
    assert "waits" in outcome.errors[0]
    outcome = run(nodes, 1, sync.push_partitions((other, p), 4, NOW, tables=(BLOBS,)), NOW)
    assert outcome.failed == []  # blobs never wait
    sync.pull_first.finish([p])
    outcome = run(nodes, 1, sync.push_partitions((p,), 4, NOW), NOW)
    assert (outcome.failed, outcome.errors, outcome.pushed) == ([], [], 1)
    assert nodes[4].values(row) == [b"v"]


def test_who_began_to_wait_during_a_push_does_not_vouch_for_it():
    nodes, _, p = waiting_pusher()
    sync = nodes[1].sync

    def push():
        inner = sync.push_partitions((p,), 4, NOW)
        effect = next(inner)
        sync.pull_first.begin([p])
        sync.pull_first.finish([p])  # and was done with it before the end
        while True:
            try:
                effect = inner.send((yield effect))
            except StopIteration as e:
                return e.value

    outcome = run(nodes, 1, push(), NOW)
    assert outcome.failed == [p]
    assert "waits" in outcome.errors[0]


def test_push_partition_needs_complete_digests():
    nodes, _ = make()
    nodes[1].digests._built.discard(BLOBS)
    steps = nodes[1].sync.push_partition(5, 2, NOW)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value.errors
    effects = nodes[1].sync.exchange(2, NOW)
    first = next(effects)
    assert isinstance(first, Call)
    assert first.args[0] == REGISTERS
