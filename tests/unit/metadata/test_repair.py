"""Repair after damage: at once, over restarts, around errors and mute nodes; with mutants."""

from random import Random

import pytest
import trio
from synccluster import Cluster

from dfs import codec
from dfs.errors import Corrupt, DiskFull
from dfs.testing.sync_maps import NOW, make
from dfs.testing.sync_nodes import Rows, key_row, run
from metadata import syncworkers
from metadata.merkle import REGISTERS, Digests, partition_of_row
from metadata.pull import pull_partition
from metadata.registers import RAW
from metadata.repair import ROW, recall, remember, repair_lost
from metadata.store.options import StoreOptions
from metadata.syncworkers import AFTER_ERROR, PULL_AGAIN, StorageRepair


async def damaged(cluster):
    """The first node with a bad block of registers that nobody has met; and its rows before."""
    one, *_ = await cluster.start()
    for i in range(300):
        await one.put(b"%d" % i, Random(i).randbytes(300))
    await trio.sleep(60)
    await one.antientropy.run_once()
    await one.store.flush()
    before = one.rows()
    one.crash()  # its caches must not hide the damage
    (name,) = [n for n in one.disk.listdir("lsm") if n.endswith(".sst")]
    one.disk.flip(f"lsm/{name}", one.disk.open(f"lsm/{name}").size() // 2)
    await cluster.nursery.start(one.start)
    return one, before


def meet(node, rows):
    """Read every row; returns those that damage hides."""
    hidden = []
    for row in rows:
        try:
            node.store.get(row)
        except Corrupt:
            hidden.append(row)
    return hidden


class Sleepy(StorageRepair):
    """A mutant: damage waits for the next round."""

    def _damage(self, *_):
        pass


class Trusting(StorageRepair):
    """A mutant: compares by digests that count rows which are lost."""

    def _ready(self):
        return self.sync.pull_first.partitions()


@pytest.mark.parametrize("mutant", [None, Sleepy])
async def test_damage_is_repaired_as_soon_as_a_read_meets_it(mutant):
    async with trio.open_nursery() as nursery:
        one, before = await damaged(Cluster(nursery))
        if mutant:
            del one.store._state.listeners[:]
            one.repair = mutant(one.env, one.sync, one.repair._lost_registers)
        nursery.start_soon(one.repair.run)
        await trio.sleep(5)  # its first round is over, the next one is a minute away
        assert meet(one, before)
        await trio.sleep(10)
        whole = not meet(one, before) and one.rows() == before
        assert whole == (not mutant)
        if whole:
            assert one.sync.pull_first.partitions() == []
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("forgetful", [False, True])
async def test_a_crash_between_acceptance_and_rebuilt_digests_loses_nothing(forgetful, monkeypatch):
    """The sums still count what is lost: by them the node is equal to those that have it."""
    if forgetful:
        monkeypatch.setattr("metadata.repair.remember", lambda _: [])
    async with trio.open_nursery() as nursery:
        one, before = await damaged(Cluster(nursery))
        hidden = meet(one, before)
        assert hidden
        await one.repair._accept()
        assert one.store.lost() == []
        assert one.store.get(hidden[0]) is None
        one.crash()
        await nursery.start(one.start)
        for _ in range(2):
            await one.repair.run_once()
        assert one.sync.pull_first.partitions() == []
        assert (one.rows() == before) == (not forgetful)
        if not forgetful:
            assert one.store.get(ROW) is None
            assert one.sync.digests.drift == 0
            assert one.totals() == one.cluster.nodes[2].totals()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("mutant", [None, Trusting])
async def test_digests_that_cannot_be_rebuilt_keep_their_partition_only(mutant, monkeypatch):
    async with trio.open_nursery() as nursery:
        one, before = await damaged(Cluster(nursery))
        if mutant:
            one.repair = mutant(one.env, one.sync, one.repair._lost_registers)
        stuck = partition_of_row(REGISTERS, meet(one, before)[0])
        real = syncworkers.rebuild

        def refused(snapshots, table, partition, **options):
            yield from real(snapshots, table, partition, **options)
            if partition == stuck:
                raise DiskFull("no room")

        def begun(snapshots, table, partition, **options):
            if partition == stuck:
                raise DiskFull("no room")
            return (yield from real(snapshots, table, partition, **options))

        for fails in (begun, refused):
            with monkeypatch.context() as patched:
                patched.setattr(syncworkers, "rebuild", fails)
                await one.repair.run_once()
            assert "no room" in one.repair.last_error
            if mutant:  # it took lost rows for equal ones
                assert one.sync.pull_first.partitions() == []
                assert one.rows() != before
                break
            assert one.sync.pull_first.partitions() == [stuck]
            assert (REGISTERS, stuck) in one.sync.digests.damaged
            assert one.repair._interval == PULL_AGAIN
        if not mutant:
            await one.repair.run_once()
            assert one.sync.pull_first.partitions() == []
            assert one.rows() == before
            assert one.repair._interval == 60.0
        nursery.cancel_scope.cancel()


class OnlyRows(StorageRepair):
    """A mutant: lets go only of ranges of kinds that have rows which others can give."""

    async def _accept(self):
        real = self.sync.store.lost
        rows = tuple((bytes([c]), bytes([c + 1])) for c in b"Hbhmr")
        found = [x for start, end in rows for x in real(start, end)]
        self.sync.store.lost = lambda: found
        try:
            await super()._accept()
        finally:
            del self.sync.store.lost


async def all_kinds(cluster):
    """The first node with rows of every kind in one table, every larger one in a block of its own.

    Also the name of the table and, for each block, its place in the file and its keys.
    """
    one, *_ = await cluster.start()
    for i in range(30):
        await one.put(b"%d" % i, Random(i).randbytes(9000))
        row, register = await one.put(b"hinted %d" % i, Random(i).randbytes(9000))
        await one.writer.write([(RAW, one.sync.hints.add(row, register, 2, NOW, NOW))])
    await one.sync.blobs.put([Random(i).randbytes(9000) for i in range(30)])
    await one.store.batch([(b"nboot/%d" % i, Random(i).randbytes(9000)) for i in range(3)])
    await one.store.batch([(b"s/sid", b"7")])
    await trio.sleep(60)
    await one.antientropy.run_once()
    await one.store.flush()
    (name,) = [n for n in one.disk.listdir("lsm") if n.endswith(".sst")]
    ((table,),) = [run.tables for run in one.store._state.runs]
    offsets = table.load().offsets
    blocks = [(offsets[i], table.block(i)[0]) for i in range(len(offsets) - 1)]
    return one, name, blocks


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [*((bytes([c]), None) for c in b"Hbhmnr"), (b"h", OnlyRows)],
)
async def test_a_block_at_the_border_of_two_kinds_of_rows_is_repaired_as_any(kind, mutant):
    """It hides all keys up to the next block's, also those of kinds that there are none of."""
    async with trio.open_nursery() as nursery:
        one, name, blocks = await all_kinds(Cluster(nursery))
        before, own = one.rows(), one.own()
        at, keys = [block for block in blocks if block[1][0][:1] == kind][-1]
        one.crash()
        one.disk.flip(f"lsm/{name}", at + 20)
        await nursery.start(one.start)
        if mutant:
            one.repair = mutant(one.env, one.sync, one.repair._lost_registers)
        nursery.start_soon(one.repair.run)
        await one.store.verify()
        ((first, last, _),) = one.store.lost()
        assert first == keys[0]
        assert last[:1] != kind
        assert own.items() <= one.own().items()
        await trio.sleep(300)
        assert bool(one.store.lost()) == bool(mutant)
        if not mutant:
            await one.antientropy.run_once()
            assert one.sync.pull_first.partitions() == []
            assert one.rows() == before
            assert one.sync.digests.drift == 0
            one.crash()
            await nursery.start(one.start)
            assert own.keys() <= one.own().keys()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("passes", [syncworkers.ACCEPTANCES, 1])
async def test_one_round_repairs_all_bad_blocks_of_a_table_of_which_one_was_met(
    passes, monkeypatch
):
    """The salvage finds the others: partitions that have rows in those can not be rebuilt before."""
    monkeypatch.setattr(syncworkers, "ACCEPTANCES", passes)
    async with trio.open_nursery() as nursery:
        one, name, blocks = await all_kinds(Cluster(nursery))
        before = one.rows()
        registers = [block for block in blocks if block[1][0][:1] == b"r"]
        one.crash()
        for at, _ in registers[5:25:5]:
            one.disk.flip(f"lsm/{name}", at + 20)
        await nursery.start(one.start)
        with pytest.raises(Corrupt):
            one.store.get(registers[5][1][0])
        await one.repair.run_once()
        whole = passes > 1
        assert (one.store.lost() == []) == whole
        if whole:
            assert one.rows() == before
            assert one.sync.pull_first.partitions() == []
        nursery.cancel_scope.cancel()


async def test_without_rows_of_its_own_kept_apart_a_node_is_stopped_by_such_a_block():
    """A mutant: a store that keeps them where all others are."""
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        cluster.options = StoreOptions()
        one, name, blocks = await all_kinds(cluster)
        at, _ = next(block for block in blocks if b"nactors" in block[1])
        one.crash()
        one.disk.flip(f"lsm/{name}", at + 20)
        with pytest.raises(Corrupt), trio.fail_after(60):
            await one.start()
        nursery.cancel_scope.cancel()


async def test_a_round_that_fails_is_tried_again_soon(monkeypatch):
    async with trio.open_nursery() as nursery:
        one, before = await damaged(Cluster(nursery))
        hidden = meet(one, before)

        async def refuse(first, last):
            raise DiskFull("no room to salvage")

        with monkeypatch.context() as patched:
            patched.setattr(one.store, "accept_losses", refuse)
            nursery.start_soon(one.repair.run)
            await trio.sleep(5)
            assert one.repair.state == "failed"
            assert meet(one, before) == hidden
        await trio.sleep(2 * AFTER_ERROR)
        assert one.rows() == before
        nursery.cancel_scope.cancel()


async def test_one_partition_that_cannot_be_pulled_keeps_no_other(monkeypatch):
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, two, _ = await cluster.start()
        rows = sorted([(await two.put(b"%d" % i))[0] for i in range(3)])
        partitions = [partition_of_row(REGISTERS, row) for row in rows]
        await one.writer.write([(RAW, one.sync.pull_first.begin(partitions))])
        real = syncworkers.pull_partition

        def pull(node, partition, *args):
            if partition == partitions[0]:
                raise Corrupt("a bad row")
            return real(node, partition, *args)

        monkeypatch.setattr(syncworkers, "pull_partition", pull)
        assert await one.repair.run_once() == 2
        assert one.sync.pull_first.partitions() == partitions[:1]
        assert "a bad row" in one.repair.last_error
        nursery.cancel_scope.cancel()


async def test_nobody_asks_who_is_down():
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        one, two, three = await cluster.start()
        row, _ = await two.put(b"k")
        partition = partition_of_row(REGISTERS, row)
        await one.writer.write([(RAW, one.sync.pull_first.begin([partition]))])
        asked = []
        real = one.sync._execute

        async def execute(effect, attempts):
            asked.append(getattr(effect, "node", None))
            return await real(effect, attempts)

        one.sync._execute = execute
        cluster.down.add(3)
        assert await one.repair.run_once() == 0
        assert 2 in asked
        assert 3 not in asked
        assert f"partition {partition}: node 3 is away" in one.repair.last_error
        cluster.down.clear()
        assert await one.repair.run_once() == 1
        assert three.number in asked
        nursery.cancel_scope.cancel()


def test_a_mute_node_is_asked_once_for_all_partitions():
    nodes, _ = make()
    rows = [key_row(b"%d" % i) for i in range(5)]
    for row in rows:
        nodes[2].put(row, b"v", NOW)
    partitions = sorted({partition_of_row(REGISTERS, row) for row in rows})
    nodes[1].store.apply(nodes[1].pull_first.begin(partitions))
    told, away = [], set()
    for partition in partitions:
        steps = pull_partition(nodes[1].sync, partition, NOW, told, away)
        assert not run(nodes, 1, steps, NOW, down=[2])
    assert away == {2}
    assert sum("is down" in text for text in told) == 1
    assert sum("is away" in text for text in told) == len(partitions) - 1


@pytest.mark.parametrize("changes", [False, True])
def test_a_map_that_changes_at_the_last_step_leaves_the_partition_waiting(changes, monkeypatch):
    nodes, _ = make()
    node = nodes[1]
    (partition,) = [partition_of_row(REGISTERS, key_row(b"k"))]
    nodes[2].put(key_row(b"k"), b"v", NOW)
    node.store.apply(node.pull_first.begin([partition]))
    current = node.get_map()

    class Newer:
        """A map in which the homes have just changed."""

        def last_change(self, *args):
            return current.last_change(*args) + 1

    def judge(*_):
        if changes:
            node.sync.get_map = Newer
        yield from ()
        return {}

    monkeypatch.setattr("metadata.pull._judge", judge)
    steps = pull_partition(node.sync, partition, NOW)
    assert run(nodes, 1, steps, NOW) == (not changes)


def test_the_list_of_digests_to_rebuild_is_durable_and_versioned():
    rows, digests = Rows(), Digests(Rows())
    assert remember(digests) == [(ROW, None)]
    digests.damaged |= dict.fromkeys([(1, 7), (0, 4095)])
    rows.apply(remember(digests))
    assert rows.get(ROW).hex() == "9201929200cd0fff920107"
    again = Digests(Rows())
    recall(rows, again)
    assert list(again.damaged) == [(0, 4095), (1, 7)]
    rows.apply([(ROW, codec.pack((2, ())))])
    with pytest.raises(Corrupt, match="upgrade dfs"):
        recall(rows, again)


def test_marks_are_written_before_the_loss_is_accepted():
    nodes, _ = make()
    node = nodes[1]
    losses = [(b"r\x03", b"r\x04", "1.sst")]

    def rename():
        yield from ()

    effects = []
    steps = repair_lost(node.sync, node.pull_first, losses, lost_registers=rename)
    for effect in steps:
        effects.append(type(effect).__name__)
        if effects[-1] == "Write":
            node.store.apply(effect.ops)
    assert effects == ["Write", "Accept"]
    again = Digests(Rows())
    recall(node.store, again)
    assert sorted(again.damaged) == [(REGISTERS, p) for p in range(0x300, 0x400)]
