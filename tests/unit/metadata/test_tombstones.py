"""Purging: only what every home has, only in one stable epoch, and only after a long wait."""

import pytest

from dfs.errors import InvalidArgument, NotHome, StaleEpoch, Unreachable
from dfs.testing.sync_maps import NOW, OLD, make, transition
from dfs.testing.sync_nodes import key_row, run
from metadata.merkle import REGISTERS, partition_of_row, value_digest
from metadata.tombstones import GRACE, SETTLE


def led_by(nodes, number, count=1):
    """Rows of one partition whose first home is `number`."""
    cluster = nodes[number].get_map()
    by_partition = {}
    for i in range(100_000):
        row = key_row(b"%d" % i)
        p = partition_of_row(REGISTERS, row)
        if cluster.homes("metadata", p)[0] == number:
            by_partition.setdefault(p, []).append(row)
            if len(by_partition[p]) == count:
                return p, by_partition[p]
    raise AssertionError


def delete(nodes, row, now=OLD, at=(1, 2, 3)):
    """Put and delete a register; the tombstone reaches the nodes `at`."""
    first = at[0]
    nodes[first].put(row, b"v", now - 10)
    data = nodes[first].put(row, None, now, nodes[first].context(row))
    for n in at[1:]:
        nodes[n].write([("m", row, data)], now)


def prepare(nodes, number, partition, now=NOW, **options):
    steps = nodes[number].tombstones.prepare(partition, now)
    return run(nodes, number, steps, now, **options)


def purge(nodes, number, now=NOW + SETTLE, **options):
    return run(nodes, number, nodes[number].tombstones.purge(now), now, **options)


def test_old_tombstones_go_everywhere():
    nodes, _ = make()
    p, rows = led_by(nodes, 1, 4)
    delete(nodes, rows[0])
    delete(nodes, rows[1], at=(1,))  # the others have not heard of it
    delete(nodes, rows[2], now=NOW - GRACE + 1)  # too young
    nodes[1].put(rows[3], b"alive", OLD)
    assert prepare(nodes, 1, p) == 2
    assert prepare(nodes, 1, p) == 0  # they wait
    assert nodes[3].store.get(rows[1]) is not None
    assert purge(nodes, 1, NOW + SETTLE - 1) == 0
    assert purge(nodes, 1) == 2
    for node in nodes.values():
        assert node.store.get(rows[0]) is node.store.get(rows[1]) is None
        assert node.total(p) == sum(node.digests.buckets(REGISTERS, p)) % 2**256
    assert nodes[1].store.get(rows[2]) is not None
    assert nodes[1].values(rows[3]) == [b"alive"]
    assert nodes[1].tombstones.purged == 2


def test_a_register_that_differs_anywhere_stays():
    nodes, _ = make()
    p, rows = led_by(nodes, 1, 2)
    for row in rows:
        delete(nodes, row)
    _, first, last = nodes[1].get_map().homes("metadata", p)
    nodes[first].put(rows[0], b"new", NOW)
    assert prepare(nodes, 1, p) == 1
    nodes[last].put(rows[1], b"newer", NOW)
    assert purge(nodes, 1) == 0
    assert nodes[1].tombstones.kept == 1
    assert nodes[first].store.get(rows[1]) is None  # harmless: anti-entropy brings it back
    for a, b in ((1, 2), (1, 3), (1, 2)):
        run(nodes, a, nodes[a].sync.exchange(b, NOW + SETTLE, forced=True), NOW + SETTLE)
    assert nodes[1].values(rows[1]) == nodes[2].values(rows[1]) == [b"newer"]
    assert nodes[1].values(rows[0]) == nodes[2].values(rows[0]) == [b"new"]


def test_not_while_a_home_is_down_or_waits():
    nodes, _ = make()
    p, rows = led_by(nodes, 1)
    delete(nodes, rows[0])
    with pytest.raises(Unreachable):
        prepare(nodes, 1, p, down=[3])
    nodes[1].tombstones._alive = lambda n: n != 3
    assert prepare(nodes, 1, p) == 0
    nodes[1].tombstones._alive = lambda n: True
    nodes[2].store.apply(nodes[2].pull_first.begin([p]))
    with pytest.raises(NotHome, match="pulling"):
        prepare(nodes, 1, p)
    nodes[2].store.apply(nodes[2].pull_first.finish([p]))
    nodes[1].store.apply(nodes[1].pull_first.begin([p]))
    assert prepare(nodes, 1, p) == 0
    nodes[1].store.apply(nodes[1].pull_first.finish([p]))
    assert prepare(nodes, 1, p) == 1
    with pytest.raises(Unreachable):
        purge(nodes, 1, down=[3])
    assert nodes[1].store.get(rows[0]) is not None
    assert prepare(nodes, 1, p) == 1  # from the start: one of them has purged it
    assert purge(nodes, 1, NOW + SETTLE) == 1
    assert all(node.store.get(rows[0]) is None for node in nodes.values())


def test_only_the_first_home_leads():
    nodes, _ = make()
    p, rows = led_by(nodes, 2)
    delete(nodes, rows[0])
    assert prepare(nodes, 1, p) == 0
    value = nodes[1].store.get(rows[0])
    epoch = nodes[1].get_map().epoch
    for method, items in [
        ("tomb.prepare", ((rows[0], value),)),
        ("tomb.purge", ((rows[0], value_digest(REGISTERS, rows[0], value)),)),
    ]:
        with pytest.raises(NotHome, match="does not purge"):
            run(nodes, 3, nodes[3].answer(method, 1, epoch, (p, items), NOW), NOW)
        wrong = (p ^ 1, items)
        if nodes[1].get_map().homes("metadata", p ^ 1)[0] == 2:
            with pytest.raises(InvalidArgument, match="not in partition"):
                run(nodes, 3, nodes[3].answer(method, 2, epoch, wrong, NOW), NOW)
    assert nodes[3].store.get(rows[0]) == value


def test_another_epoch_or_a_transition_refuses():
    before, moving, reading, after = transition()
    nodes, holder = make(4, before)
    p, rows = led_by(nodes, 1)
    delete(nodes, rows[0])
    assert prepare(nodes, 1, p) == 1
    value = nodes[1].store.get(rows[0])
    digest = value_digest(REGISTERS, rows[0], value)
    for cluster in (moving, reading, after):
        holder[0] = cluster
        assert purge(nodes, 1) == 0
        for epoch in (before.epoch, cluster.epoch if cluster is not after else after.epoch + 1):
            for method, items in [
                ("tomb.prepare", ((rows[0], value),)),
                ("tomb.purge", ((rows[0], digest),)),
            ]:
                with pytest.raises(StaleEpoch, match="one stable epoch"):
                    run(nodes, 2, nodes[2].answer(method, 1, epoch, (p, items), NOW), NOW)
        holder[0] = before
        nodes[1].tombstones.batches.clear()
        assert prepare(nodes, 1, p) == 1
    assert nodes[2].store.get(rows[0]) == value


def test_a_live_register_is_never_purged():
    nodes, _ = make()
    p, rows = led_by(nodes, 1)
    nodes[1].put(rows[0], b"alive", OLD)
    value = nodes[1].store.get(rows[0])
    items = ((rows[0], value_digest(REGISTERS, rows[0], value)),)
    epoch = nodes[1].get_map().epoch
    nodes[3].write([("m", rows[0], value)], NOW)
    with pytest.raises(InvalidArgument, match="has a value"):
        run(nodes, 3, nodes[3].answer("tomb.purge", 1, epoch, (p, items), NOW), NOW)
    assert nodes[3].values(rows[0]) == [b"alive"]
