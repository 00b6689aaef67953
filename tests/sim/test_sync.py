"""Nothing that was deleted comes back, whatever is late, down or moving; and that the tests see it."""

from contextlib import suppress

import pytest

from dfs.errors import DfsError
from dfs.testing.scenario_sync import HOUR, MUTANTS, ViolationError, find, node_class, play
from dfs.testing.sync_maps import NOW, first_map
from dfs.testing.sync_nodes import key_row, run
from metadata.merkle import partition_of_row

RANDOM = {"notall": 80, "moving": 20, "former": 40, "nodigest": 5}  # mutant -> seeds that find it


def led_by_one():
    cluster = first_map(3)
    rows = (key_row(b"%d" % i) for i in range(1000))
    return next(r for r in rows if cluster.homes("metadata", partition_of_row(0, r))[0] == 1)


def late_message(mutant, kind):
    """A live register is under way to node 3 while it is deleted, and purged as soon as possible."""
    nodes = {n: node_class(mutant)(n, lambda: first_map(3)) for n in (1, 2, 3)}
    row, now = led_by_one(), NOW
    partition = partition_of_row(0, row)
    register = nodes[1].put(row, b"value", now)
    nodes[2].write([("m", row, register)], now)
    if kind == "hint":
        nodes[2].store.apply(nodes[2].hints.add(row, register, 3, now, now))
        call = next(nodes[2].hints.deliver(3, now))
        later = (26 * HOUR, 5 * HOUR, HOUR)
    else:
        steps = nodes[2].sync.exchange(3, now, forced=True, partitions=(partition,))
        call, send = next(steps), None
        while call.method != "sync.push":
            send = run(nodes, 3, nodes[3].answer(call.method, 2, call.epoch, call.args, now), now)
            call = steps.send(send)
        later = (HOUR // 120, 0, HOUR // 120)
    tombstone = nodes[1].put(row, None, now + 1, nodes[1].context(row))
    for n in (2, 3):
        nodes[n].write([("m", row, tombstone)], now + 1)
    now += later[0]
    run(nodes, 1, nodes[1].tombstones.prepare(partition, now), now)
    now += later[1]
    run(nodes, 1, nodes[1].tombstones.purge(now), now)
    now += later[2]
    with suppress(DfsError):
        run(nodes, 3, nodes[3].answer(call.method, 2, call.epoch, call.args, now), now)
    return [v for n in nodes.values() for v in n.values(row)], nodes[1].store.get(row)


@pytest.mark.parametrize("first", range(0, 60, 30))
def test_nothing_comes_back(first):
    for seed in range(first, first + 30):
        try:
            play(seed)
        except ViolationError as e:
            raise AssertionError(f"seed {seed}: {e}") from e


@pytest.mark.parametrize("mutant", sorted(RANDOM))
def test_mutants_are_found(mutant):
    assert find(mutant, range(RANDOM[mutant])) is not None


def test_a_late_hint():
    assert late_message("", "hint") == ([], None)  # purged, and it stays so
    assert late_message("oldhint", "hint")[0] == [b"value"]


def test_a_message_under_way():
    values, kept = late_message("", "push")
    assert values == []
    assert kept is not None  # it is too early to purge
    assert late_message("nograce", "push")[0] == [b"value"]


def test_every_mutant_has_a_test():
    assert set(MUTANTS) == {*RANDOM, "oldhint", "nograce"}
