"""Hints: kept within limits, delivered in order and once, never older than they may be."""

import pytest

from dfs.errors import Busy, Corrupt, NotHome, StaleEpoch, Unreachable
from dfs.testing.sync_maps import NOW, make, moved_row, transition
from dfs.testing.sync_nodes import SyncNode, key_row, run
from metadata import hints as hints_module
from metadata.hints import OVERHEAD, TTL, decode, encode

MINUTE = 60_000_000


def register(node, name, value=b"v", now=NOW):
    """A register that `node` minted."""
    row = key_row(name)
    return row, node.put(row, value, now)


def keep(node, target, row, value, written=NOW, now=NOW):
    node.store.apply(node.hints.add(row, value, target, written, now))


def hinted(node):
    return {k: v for k, v in node.store.rows.items() if k[:1] in b"hH" or k[:6] == b"nhints"}


def deliver(nodes, number, target, now=NOW, **options):
    return run(nodes, number, nodes[number].hints.deliver(target, now), now, **options)


def test_format():
    key = b"h\x00\x03" + (7).to_bytes(8, "big") + (1).to_bytes(4, "big")
    value = encode(7, b"row", b"register")
    assert value.hex() == "019307c403726f77c4087265676973746572"
    assert decode(key, value).row == b"row"
    for bad in (b"", b"\x02" + value[1:], value[:-1], b"\x01\xc0"):
        with pytest.raises(Corrupt):
            decode(key, bad)
    nodes, _ = make()
    row, data = register(nodes[1], b"k")
    keep(nodes[1], 3, row, data, 7, 8)
    prefix = b"h\x00\x03" + (7).to_bytes(8, "big")
    (stored,) = [k for k in nodes[1].store.rows if k.startswith(b"h")]
    assert stored.startswith(prefix)
    assert nodes[1].store.rows[b"H" + len(row).to_bytes(2, "big") + row + stored[1:]] == b""


def test_delivered_when_the_target_is_back():
    nodes, _ = make()
    kept = [register(nodes[1], b"%d" % i, now=NOW + i) for i in range(600)]
    for i, (row, data) in enumerate(kept):
        keep(nodes[1], 3, row, data, NOW + i)
    assert nodes[1].hints.waiting() == [3]
    with pytest.raises(Unreachable):
        deliver(nodes, 1, 3, down=[3])
    assert nodes[1].hints.targets[3].count == 600
    # a restart forgets nothing
    nodes[1] = SyncNode(1, nodes[1].get_map, rows=nodes[1].store.rows)
    assert nodes[1].hints.targets[3].count == 600
    calls = []
    assert deliver(nodes, 1, 3, calls=calls) == 600
    assert calls == ["hints.deliver"] * 3
    assert all(nodes[3].values(row) == [b"v"] for row, _ in kept)
    assert hinted(nodes[1]) == {}
    status = nodes[1].hints.status(NOW)
    assert status[0]["delivered"] == 600
    assert status[0]["count"] == status[0]["bytes"] == 0


def test_a_lost_answer_is_harmless():
    nodes, _ = make()
    row, data = register(nodes[1], b"k")
    keep(nodes[1], 3, row, data)
    steps = nodes[1].hints.deliver(3, NOW)
    call = next(steps)
    run(nodes, 3, nodes[3].answer(call.method, 1, call.epoch, call.args, NOW), NOW)
    with pytest.raises(Unreachable):
        steps.throw(Unreachable("the answer was lost"))
    assert nodes[1].hints.targets[3].count == 1
    deliver(nodes, 1, 3)
    assert nodes[3].values(row) == [b"v"]


def test_batches_are_bounded_in_bytes():
    nodes, _ = make()
    for i in range(5):
        row, data = register(nodes[1], b"%d" % i, bytes(500_000))
        keep(nodes[1], 3, row, data)
    calls = []
    deliver(nodes, 1, 3, calls=calls)
    assert len(calls) == 3


def test_the_window_begins_with_the_first_undelivered_hint():
    nodes, _ = make()
    node = nodes[1]
    row, data = register(node, b"k")
    keep(node, 3, row, data, NOW)
    keep(node, 3, row, data, NOW + TTL - 1, NOW + TTL - 1)
    late = NOW + TTL + 1
    nodes[1] = node = SyncNode(1, node.get_map, rows=node.store.rows)  # it is persistent
    with pytest.raises(Busy, match="first one waits"):
        keep(node, 3, row, data, late, late)
    with pytest.raises(Busy, match="anti-entropy will do it"):
        keep(node, 3, row, data, late, late)
    keep(node, 2, row, data, late, late)  # others are not concerned
    assert run(nodes, 1, node.hints.expire(late), late) == 2
    assert node.hints.dirty() == [3]
    assert node.hints.waiting() == [2]
    nodes[1] = node = SyncNode(1, node.get_map, rows=node.store.rows)
    assert node.hints.dirty() == [3]
    node.store.apply(node.hints.cleaned(3, late - 1))  # that exchange began before
    assert node.hints.dirty() == [3]
    node.store.apply(node.hints.cleaned(3, late + 1))
    keep(node, 3, row, data, late, late)


def test_limits_in_bytes(monkeypatch):
    nodes, _ = make()
    node = nodes[1]
    row, data = register(node, b"k", bytes(1000))
    size = len(row) + len(data) + OVERHEAD
    monkeypatch.setattr(hints_module.Hints, "target_bytes", 10 * size)
    for _ in range(10):
        keep(node, 3, row, data)
    with pytest.raises(Busy, match="bytes already"):
        keep(node, 3, row, data)
    assert node.hints.size() == 10 * size
    assert node.hints.targets[3].dropped == 1
    small = SyncNode(1, node.get_map, rows=node.store.rows, budget=12 * size)
    keep(small, 2, row, data)
    keep(small, 2, row, data)
    with pytest.raises(Busy, match="share of the disk"):
        keep(small, 2, row, data)
    assert sorted(small.hints.dirty()) == [2]
    with pytest.raises(Busy, match="s old"):
        keep(node, 2, row, data, NOW - TTL - 1)
    assert node.hints.targets[2].dirty == 0  # that one write only


def test_both_sides_check_the_age():
    nodes, _ = make()
    node = nodes[1]
    row, data = register(node, b"k")
    keep(node, 3, row, data, NOW)
    keep(node, 3, row, data, NOW + MINUTE, NOW + MINUTE)
    late = NOW + TTL + 1
    assert deliver(nodes, 1, 3, late) == 1
    assert node.hints.dirty() == [3]
    assert hinted(node).keys() == {b"nhints\x00\x03"}
    # a message that was on its way for hours
    row, data = register(node, b"other")
    answer = nodes[3].hints.handle(1, nodes[1].get_map().epoch, ((row, data, NOW),), late)
    assert run(nodes, 3, answer, late) == (0, 1)
    assert nodes[3].values(row) == []
    assert nodes[3].hints.refused == 1


def test_hints_of_former_homes_go_to_the_present_ones():
    before, moving, reading, after = transition()
    nodes, holder = make(4, before)
    row = moved_row(moving, after)
    data = nodes[2].put(row, b"v", NOW)
    keep(nodes[2], 1, row, data)
    holder[0] = moving
    items = ((row, data, NOW),)
    with pytest.raises(StaleEpoch):
        run(nodes, 1, nodes[1].hints.handle(2, before.epoch, items, NOW), NOW)
    holder[0] = after
    with pytest.raises(NotHome):
        run(nodes, 1, nodes[1].hints.handle(2, after.epoch, items, NOW), NOW)
    deliver(nodes, 2, 1)
    assert nodes[4].values(row) == nodes[3].values(row) == [b"v"]
    assert nodes[1].values(row) == []
    assert hinted(nodes[2]) == {}
    assert reading.epoch < after.epoch


def test_fallbacks_find_hints_by_row():
    before, moving, _, _ = transition()
    nodes, _ = make(4, before)
    row = moved_row(moving, moving)  # node 4 is no home of it yet
    data = nodes[1].put(row, b"v", NOW)
    assert nodes[4].hints.find(row) == []
    keep(nodes[4], 1, row, data)
    keep(nodes[4], 3, row, data)
    assert nodes[4].hints.find(row) == [data, data]
    assert nodes[4].hints.find(row + b"x") == []
    keep(nodes[2], 1, row, data)
    assert nodes[2].hints.find(row) == []  # a home has it anyway
    run(nodes, 4, nodes[4].hints.drop(1, NOW), NOW)
    assert nodes[4].hints.find(row) == [data]
    assert nodes[4].hints.dirty() == [1]


def test_without_any_hint_nodes_converge_all_the_same():
    nodes, _ = make()
    for i in range(40):
        row, data = register(nodes[1], b"%d" % i, now=NOW - 60 * MINUTE)
        keep(nodes[1], 3, row, data)
    run(nodes, 1, nodes[1].hints.drop(3, NOW), NOW)
    assert [k for k in nodes[1].store.rows if k[:1] in b"hH"] == []
    for a, b in ((1, 2), (1, 3)):
        run(nodes, a, nodes[a].sync.exchange(b, NOW), NOW)
    totals = [[n.digests.total(0, p) for p in range(4096)] for n in nodes.values()]
    assert totals[0] == totals[1] == totals[2]
    assert any(totals[0])
