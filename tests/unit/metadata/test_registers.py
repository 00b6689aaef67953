"""The replica: batches with an overlay, the fence, actors and times that never repeat (K2)."""

from functools import cache

import pytest
from smallkv import Dict, KeepsHints, make_map, member

from dfs.cluster.map import METADATA
from dfs.errors import Busy, Corrupt, InvalidArgument, StaleEpoch
from dfs.hashing import digest
from metadata import versions
from metadata.actors import ACTORS_ROW, CEILING_ROW, MAX_AHEAD
from metadata.merkle import REGISTERS, Digests, recompute
from metadata.registers import (
    GET,
    HINT,
    MERGE,
    MINT,
    PURGE,
    RAW,
    Registers,
    partition_of_row,
    row_of,
)

HOUR = 3600 * 1_000_000
ROW = row_of(0, b"key")
PARTITION = partition_of_row(ROW)


class Node:
    """Registers over a dict; `run` applies a batch and makes it durable."""

    def __init__(self, cluster_map=None, number=None, table=None):
        self.map = cluster_map or make_map(3)
        self.number = self.map.read_homes(METADATA, PARTITION)[0] if number is None else number
        self.table = Dict() if table is None else table
        self.now = 1_700_000_000_000_000
        self.start()

    def start(self):
        self.digests = Digests(self.table)
        self.digests.load()
        self.hints = KeepsHints()
        self.registers = Registers(
            self.table, self.number, self.map, digests=self.digests, hints=self.hints
        )

    def run(self, *requests, epoch=None):
        epoch = self.registers.map.epoch if epoch is None else epoch
        ops, replies = self.registers.apply(self.now, [(epoch, r) for r in requests])
        for key, value in ops:
            if value is None:
                self.table.pop(key, None)
            else:
                self.table[key] = value
        self.registers.settle()
        return replies

    def mint(self, value=b"v", context=b"", row=ROW):
        (reply,) = self.run((MINT, row, context, value))
        if isinstance(reply, Exception):
            raise reply
        return reply

    def check_digests(self):
        """A2: what is kept is what a recomputation finds."""
        for partition in {partition_of_row(k) for k in self.table if k[:1] == b"r"}:
            assert finish(recompute(self.table, REGISTERS, partition)) == {}


def finish(steps):
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as e:
            return e.value


def dot(register):
    return versions.decode(register)[1][0][:2]


def test_a_batch_sees_itself_and_is_one_write_of_a_row():
    n = Node()
    replies = n.run(
        (GET, ROW), (MINT, ROW, b"", b"1"), (GET, ROW), (MINT, ROW, b"", b"2"), (GET, ROW)
    )
    assert replies[0] == b""
    assert replies[1][0] == replies[2]
    assert replies[3][0] == replies[4] == n.table[ROW]
    assert replies[3][2] == 2
    n.check_digests()


def test_what_is_not_settled_is_not_read():
    n = Node()
    ops, _ = n.registers.apply(n.now, [(1, (MINT, ROW, b"", b"v"))])
    assert n.registers.unsettled
    assert n.registers.read(1, ROW) is None
    with pytest.raises(AssertionError, match="not settled"):
        n.registers.apply(n.now, [])
    n.table.update(ops)
    n.registers.settle()
    assert n.registers.read(1, ROW) == n.table[ROW]


def test_a_batch_that_the_store_refused_did_not_happen():
    n = Node()
    first = n.mint(b"1")[0]
    totals = n.digests.total(REGISTERS, PARTITION)
    ops, _ = n.registers.apply(n.now, [(1, (MINT, ROW, b"", b"2"))])
    n.registers.abandon(ops)
    assert n.registers.read(1, ROW) == first
    assert n.digests.total(REGISTERS, PARTITION) == totals
    n.now = 0
    n.mint(b"3")
    n.check_digests()
    assert n.table[CEILING_ROW]
    assert dot(n.table[ROW])[1] > dot(first)[1] + 1


def test_one_bad_request_leaves_the_others_alone():
    n = Node()
    other = Node(number=n.map.read_homes(METADATA, PARTITION)[1]).mint()[0]
    replies = n.run(
        (MERGE, b"x" + ROW, other), (MERGE, ROW, b"junk"), ("?", ROW), (MERGE, ROW), (MERGE, ROW, other),
        (MERGE, ROW[:4], other), (MERGE, b"r\xff\xff\x00k", other),
    )  # fmt: skip
    kinds = [type(r) for r in replies]
    assert kinds == [
        InvalidArgument,
        Corrupt,
        InvalidArgument,
        InvalidArgument,
        type(None),
        InvalidArgument,
        InvalidArgument,
    ]
    assert n.table[ROW] == other


def test_merging_what_is_there_changes_nothing():
    n = Node()
    register = n.mint()[0]
    ops, replies = n.registers.apply(n.now, [(1, (MERGE, ROW, register))])
    assert (ops, replies) == ([], [None])


# ------------------------------------------------------------------------------ times and actors


def test_times_grow_whatever_the_clock_does():
    n = Node()
    seen = []
    for step in (0, HOUR, -2 * HOUR, 0, 1, -50 * HOUR, 3 * HOUR):
        n.now += step
        seen.append(dot(n.mint()[0])[1])
        if step == 1:
            n.start()  # a restart with the clock set back
        n.table.pop(ROW)  # purged: nothing but the node's own state remembers the time
    assert seen == sorted(set(seen))


def test_a_write_is_later_than_what_it_saw_of_a_clock_that_is_ahead():
    ahead, n = Node(number=make_map(3).read_homes(METADATA, PARTITION)[1]), Node()
    ahead.now = n.now + HOUR
    n.run((MERGE, ROW, ahead.mint(b"ahead")[0]))
    assert [x[2] for x in versions.decode(n.mint(b"mine")[0])[1]] == [b"mine", b"ahead"]


def test_a_clock_days_ahead_is_merged_but_not_followed():
    ahead, n = Node(number=make_map(3).read_homes(METADATA, PARTITION)[1]), Node()
    ahead.now = n.now + MAX_AHEAD + HOUR
    assert n.run((MERGE, ROW, ahead.mint(b"ahead")[0])) == [None]
    mine = dot(n.mint(b"mine", row=row_of(0, b"other"))[0])[1]
    assert mine < n.now + HOUR
    values = [x[2] for x in versions.decode(n.mint(b"mine")[0])[1]]
    assert values == [b"ahead", b"mine"]


def test_a_forged_context_from_the_end_of_time_is_refused():
    n = Node()
    actor = dot(n.mint()[0])[0]
    forged = versions.encode_context(((actor, versions.MAX_HLC),))
    n.mint(b"v", forged)  # a dot of this node that it does not know: a new actor
    actor = n.registers.actors.actor(PARTITION)
    n.registers.actors.last = versions.MAX_HLC
    with pytest.raises(InvalidArgument, match="end of time"):
        n.mint(b"v", versions.encode_context(((actor, versions.MAX_HLC),)))


def test_a_dot_of_ones_own_that_is_not_known_makes_a_new_actor():
    n = Node()
    old = dict(n.table)
    n.mint(b"0")
    backup = Dict(n.table)
    newest = n.mint(b"1", n.mint(b"0b")[1])[0]
    lost = Node(table=backup)  # restored from a backup
    before = lost.registers.actors.actor(PARTITION)
    lost.run((MERGE, ROW, newest))
    assert lost.registers.actors.forgotten == 1
    assert lost.registers.actors.actor(PARTITION) != before
    restarted = Node(table=lost.table)
    assert restarted.registers.actors.actor(PARTITION) == lost.registers.actors.actor(PARTITION)
    assert old == {}


def test_knowing_ones_own_dots_makes_no_new_actor():
    n = Node()
    for i in range(5):
        register, context, _ = n.mint(b"%d" % i)
        n.run((MERGE, ROW, register))
        n.mint(b"x", context)
    assert n.registers.actors.forgotten == 0


@cache
def drained(start, number):
    """The maps of a node's way out of the cluster's homes and back, phase by phase."""
    nodes = list(start.nodes)
    without = [member(x.number, weight=float(x.number != number)) for x in nodes]
    maps = [start.begin(without)]
    maps += [maps[-1].advance(), maps[-1].advance().advance()]
    maps.append(maps[-1].begin(nodes))
    maps += [maps[-1].advance(), maps[-1].advance().advance()]
    return maps


def moving(n):
    """Maps over which the node loses the row's partition and gets it back."""
    return drained(n.map, n.number)


def test_who_lost_a_partition_and_came_back_is_another_actor():
    n = Node(make_map(4))
    first = n.registers.actors.actor(PARTITION)
    maps = moving(n)
    for new in maps:
        n.registers.follow(new)
        home = n.number in new.read_homes(METADATA, PARTITION)
        assert (n.registers.actors.actor(PARTITION) is not None) == home
    assert n.registers.actors.actor(PARTITION) != first
    n.run()
    again = Node(maps[-1], n.number, n.table)
    assert again.registers.actors.actor(PARTITION) == n.registers.actors.actor(PARTITION)


def test_who_slept_through_changes_is_another_actor():
    n = Node(make_map(4))
    first = n.registers.actors.actor(PARTITION)
    n.run()
    late = Node(moving(n)[-1], n.number, n.table)
    assert late.registers.actors.actor(PARTITION) != first


def test_who_stays_a_home_stays_the_same_actor():
    n = Node(make_map(4))
    other = next(x for x in n.map.read_homes(METADATA, PARTITION) if x != n.number)
    before = n.registers.actors.actor(PARTITION)
    for new in drained(n.map, other):
        assert n.number in new.read_homes(METADATA, PARTITION)
        n.registers.follow(new)
        assert n.registers.actors.actor(PARTITION) == before


def test_state_of_another_version_is_refused():
    n = Node()
    n.mint()
    from dfs import codec

    n.table[ACTORS_ROW] = codec.pack((2, 1, 1, b""))
    with pytest.raises(Corrupt, match="version 2"):
        n.start()


# ----------------------------------------------------------------------------- fence, hints, purge


def test_requests_older_than_the_last_change_are_refused_with_the_map():
    n = Node(make_map(4))
    register = n.mint()[0]
    new = moving(n)[0]
    assert new.last_change(METADATA, PARTITION) == new.epoch
    n.registers.follow(new)
    for request in (
        (GET, ROW),
        (MERGE, ROW, register),
        (MINT, ROW, b"", b"v"),
        (HINT, ROW, register, 1, 0),
    ):
        (error,) = n.run(request, epoch=1)
        assert isinstance(error, StaleEpoch)
        assert error.details == (new.encode(),)
    with pytest.raises(StaleEpoch):
        n.registers.read(1, ROW)
    with pytest.raises(StaleEpoch):
        n.registers.scan(1, PARTITION, ROW[:4], b"", 10)
    assert n.run((GET, ROW)) == [register]
    calm = next(p for p in range(4096) if new.last_change(METADATA, p) == 1)
    other = next(r for i in range(100_000) if partition_of_row(r := row_of(0, b"%d" % i)) == calm)
    assert n.run((GET, other), epoch=1) == [b""]
    (error,) = n.run((GET, ROW), epoch=new.epoch + 1)
    assert isinstance(error, Busy)


def test_hints_are_read_as_part_of_the_register():
    n = Node()
    mine = n.mint(b"mine")[0]
    other = Node(number=n.map.read_homes(METADATA, PARTITION)[1]).mint(b"other")[0]
    assert n.run((HINT, ROW, other, 2, 0)) == [None]
    (both,) = n.run((GET, ROW))
    assert both == versions.encode(versions.merge(versions.decode(mine), versions.decode(other)))
    assert n.registers.read(1, ROW) == both


def test_only_the_very_tombstone_is_purged():
    n = Node()
    first, context, _ = n.mint(b"v")
    (error,) = n.run((PURGE, ROW, digest(first)))
    assert isinstance(error, InvalidArgument)
    tombstone = n.mint(None, context)[0]
    assert n.run((PURGE, ROW, digest(b"something else"))) == [False]
    assert n.run((PURGE, ROW, digest(tombstone))) == [True]
    assert ROW not in n.table
    assert n.digests.total(REGISTERS, PARTITION) == 0
    assert n.registers.actors.forgotten == 0
    n.run((MERGE, ROW, tombstone))  # somebody still had it
    assert n.registers.actors.forgotten == 0


def test_raw_operations_are_made_at_their_turn():
    n = Node()
    seen = []

    def make():
        seen.append(n.registers.unsettled)
        return [(b"x", b"1")]

    assert n.run((MINT, ROW, b"", b"v"), (RAW, make), (RAW, ((b"y", b"2"),)))[1:] == [None, None]
    assert (n.table[b"x"], n.table[b"y"], seen) == (b"1", b"2", [True])


@pytest.mark.parametrize("key", [b"", b"x" * 1025, "text"])
def test_impossible_keys(key):
    with pytest.raises(InvalidArgument, match="a key is"):
        row_of(0, key)
