"""The journals' log: format, recovery after power loss, damage, collection."""

import contextlib
import random
from pathlib import Path

import pytest
import trio

from dfs.errors import Corrupt, StoreFailed
from dfs.rpc.turn import Turn
from dfs.testing.disk import SimDisk
from dfs.testing.journal_cores import genesis, operation
from metadata import journalformat
from metadata.journalformat import MARK_SIZE, encode, header, mark, parse
from metadata.journallog import JournalLog
from metadata.journalstate import BASE, ENTRY, NO_HASH, PROMISED, chain, replay

GOLDEN = Path(__file__).parents[2] / "data" / "journal-log-1.bin"
V, W = b"v" * 16, b"w" * 16
FIRST = genesis((0, 1, 2))


def history(count, start=1):
    """ENTRY records 1..count, the first a genesis, each on top of the one before."""
    head, records = NO_HASH, []
    for seq in range(1, count + 1):
        payload = FIRST if seq == 1 else operation(seq) + b"x" * 20
        records.append((ENTRY, seq, (seq, 1), head, payload, False))
        head = chain(head, seq, payload)
    return records[start - 1 :]


async def running(disk, **options):
    log, states = await JournalLog.open(disk, "journals", **options)
    return log, states


async def written(disk, records, volume=V, **options):
    """A log whose records, one batch each, are durable; it is idle, but not marked so."""
    async with trio.open_nursery() as nursery:
        log, _ = await running(disk, **options)
        nursery.start_soon(log.run)
        for record in records:
            log.append(volume, record)
            await log.sync()
        nursery.cancel_scope.cancel()
    return log


def golden_segment():
    records = [
        (V, (PROMISED, (1, 2))),
        *((V, r) for r in history(3)),
        (W, (ENTRY, 1, (0, 0), NO_HASH, FIRST, True)),
        (V, (BASE, 2, history(3)[2][3], 1, (0, 1, 2), FIRST, (3, 1))),
    ]
    data = header(7) + mark(7, len(header(7)), 0)
    for volume, record in records:
        data += b"".join(encode(volume, record))
    return data + mark(7, len(data), len(data)), records


def test_the_format_is_the_one_on_disk():
    data, records = golden_segment()
    assert GOLDEN.read_bytes() == data, "the format changed: give it a new number"
    found, end = parse(GOLDEN.read_bytes(), 7, last=True)
    assert [f[:2] for f in found] == records
    assert end == len(data)
    assert b"".join(data[start:stop] for _, _, start, stop in found) in data.replace(
        mark(7, len(header(7)), 0), b""
    )


async def test_what_was_synced_is_recovered():
    disk = SimDisk(random.Random(1))
    records = [*history(5), (PROMISED, (9, 2))]
    await written(disk, records)
    disk.crash()
    log, states = await running(disk)
    state = states[V]
    assert state.promised == (9, 2)
    assert state.chosen == 4
    assert state.pending.payload == records[4][4]
    assert log.read(V, 3) == (records[2][3], records[2][4])
    assert not log.cut


@pytest.mark.parametrize("room", [False, True])
async def test_a_torn_tail_is_cut_whatever_a_power_loss_leaves(room):
    """Batches are lost, torn or swapped by the crash; all that was acknowledged is there."""
    cuts = 0
    for seed in range(150):
        rnd = random.Random(seed)
        disk = SimDisk(rnd, sync_delay=0.01)
        records = history(40)
        durable = []

        async def writer(log, records=records, durable=durable):
            for record in records:
                batch = log.append(V, record)
                log.when_durable(batch, durable.append, record)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            log, _ = await running(disk, segment_bytes=1500)
            nursery.start_soon(log.run)
            if room:
                nursery.start_soon(log.make_room)
            nursery.start_soon(writer, log)
            await trio.sleep(rnd.random() * 0.06)
            disk.crash()
            nursery.cancel_scope.cancel()
        log, states = await running(disk)
        cuts += bool(log.cut)
        reached = states[V].chosen + 1 if states else 0
        assert reached >= len(durable), f"seed {seed}: an acknowledged record is lost"
        if states:
            assert states[V].promised == (reached, 1)
        # And it goes on from there.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.run)
            for record in records[reached:]:
                log.append(V, record)
            await log.sync()
            nursery.cancel_scope.cancel()
        _, states = await running(disk)
        assert states[V].chosen == 39
    assert cuts > 4


def segment_name(disk):
    return f"journals/{disk.listdir('journals')[-1]}"


@pytest.mark.parametrize("idle", [False, True])
async def test_damage_that_is_no_torn_tail_stops_the_node(idle):
    """Any flipped bit of what a later mark calls synced; the last record is the torn-tail case."""
    records = history(6)
    for byte in range(0, 700, 7):
        disk = SimDisk(random.Random(byte))
        log = await written(disk, records)
        name = segment_name(disk)
        end = disk.open(name).size()
        start_of_last = log._index[V].starts[5] - MARK_SIZE
        if idle:
            log._parked = trio.lowlevel.current_task()
            assert log.idle(trio.current_time() + 1)
        if byte >= disk.open(name).size():
            break
        disk.flip(name, byte)
        protected = end if idle else start_of_last
        if byte < protected:
            with pytest.raises(StoreFailed, match="offset"):
                await running(disk)
        else:
            log, _ = await running(disk)
            assert log.cut or idle


async def test_damage_in_a_sealed_segment_or_a_missing_one_stops_the_node():
    for kind in ("flip", "shorten", "missing"):
        disk = SimDisk(random.Random(1))
        await written(disk, history(40), segment_bytes=800)
        names = disk.listdir("journals")
        assert len(names) > 3
        middle = f"journals/{names[1]}"
        if kind == "flip":
            disk.flip(middle, disk.open(middle).size() - 3)
        elif kind == "shorten":
            disk.open(middle).truncate(disk.open(middle).size() - 5)
        else:
            disk.unlink(middle)
        with pytest.raises(StoreFailed, match=r"must not vote|gaps"):
            await running(disk)


async def test_a_log_that_vanished_is_not_begun_anew():
    disk = SimDisk(random.Random(1))
    await written(disk, history(3))
    for name in disk.listdir("journals"):
        disk.unlink(f"journals/{name}")
    with pytest.raises(StoreFailed, match="is empty, but it was not"):
        await running(disk)


async def test_a_missing_first_segment_is_noticed_by_the_chain():
    disk = SimDisk(random.Random(1))
    await written(disk, history(40), segment_bytes=800)
    disk.unlink(f"journals/{disk.listdir('journals')[0]}")
    with pytest.raises(StoreFailed, match="missing"):
        await running(disk)


def test_a_copy_of_a_mark_elsewhere_claims_nothing():
    """A payload may hold bytes of a log; they are not taken for marks of this one."""
    data = header(1)
    foreign = mark(1, 5000, 5000) + mark(2, len(data), 9000)
    data += b"".join(encode(V, (ENTRY, 1, (1, 1), NO_HASH, FIRST, False)))
    cut_at = len(data)
    data += b"garbage" + foreign
    assert parse(data, 1, last=True)[1] == cut_at
    with pytest.raises(Corrupt):
        parse(data, 1, last=False)
    synced = data + mark(1, len(data), cut_at + 3)
    with pytest.raises(Corrupt, match=f"offset {cut_at}"):
        parse(synced, 1, last=True)


async def test_recovery_without_the_marks_would_forget_promises():
    """The mutant: cut at the first bad record, always."""
    disk = SimDisk(random.Random(1))
    await written(disk, history(6))
    name = segment_name(disk)
    disk.flip(name, 200)
    data = disk.open(name).pread(1 << 20, 0)
    claimed, journalformat._claimed = journalformat._claimed, lambda *_: 0
    try:
        found, _ = parse(data, 1, last=True)
    finally:
        journalformat._claimed = claimed
    assert len(found) < 6, "the mutant would have gone on with fewer records than acknowledged"
    with pytest.raises(Corrupt):
        parse(data, 1, last=True)


async def test_segments_go_when_nothing_in_them_is_needed():
    rnd = random.Random(3)
    disk = SimDisk(rnd)
    async with trio.open_nursery() as nursery:
        log, _ = await running(disk, segment_bytes=3000)
        nursery.start_soon(log.run)
        log.append(W, (ENTRY, 1, (1, 0), NO_HASH, FIRST, False))  # an idle journal, for ever here
        records = history(400)
        for record in records:
            log.append(V, record)
            await log.sync()
        before = len(disk.listdir("journals"))
        assert await log.collect() == 0
        base = (BASE, 390, records[390][3], 1, (0, 1, 2), FIRST, (390, 1))
        log.append(V, base)
        removed = await log.collect()
        assert removed >= before - 3
        assert log.read(V, 395) == (records[394][3], records[394][4])
        nursery.cancel_scope.cancel()
    disk.crash()
    log, states = await running(disk)
    assert states[V].base.seq == 390
    assert states[V].chosen == 399
    assert states[V].promised == (400, 1)
    assert states[W].promised == (1, 0)
    assert states[W].pending.payload == FIRST


async def test_collection_does_not_undo_an_acceptance_on_its_way():
    disk = SimDisk(random.Random(3))
    async with trio.open_nursery() as nursery:
        log, _ = await running(disk, segment_bytes=300)
        nursery.start_soon(log.run)
        records = history(2)
        for record in records:
            log.append(W, record)
            await log.sync()
        for k in range(12):  # W's records stay alone in the first segments
            log.append(V, (PROMISED, (k, 1)))
            await log.sync()
        newer = (ENTRY, 2, (9, 2), records[1][3], operation(77), False)
        log.append(W, newer)
        log._segments[1].live = 0  # collect it whatever it holds
        await log.collect()
        nursery.cancel_scope.cancel()
    _, states = await running(disk)
    assert states[W].pending.payload == operation(77)
    assert states[W].promised == (9, 2)


async def test_a_full_disk_delays_and_loses_nothing():
    disk = SimDisk(random.Random(3))
    async with trio.open_nursery() as nursery:
        log, _ = await running(disk, segment_bytes=2000)
        nursery.start_soon(log.run)
        records = history(60)
        done = []
        for record in records[:20]:
            log.append(V, record)
            await log.sync()
        disk.full = True
        for record in records[20:]:
            log.when_durable(log.append(V, record), done.append, record[1])
        await trio.sleep(5)
        assert log.full is not None
        assert not done
        assert log.read(V, 30)[1] == records[29][4], "readable before it is written"
        disk.full = False
        await log.sync()
        assert log.full is None
        assert len(done) == 40
        nursery.cancel_scope.cancel()
    _, states = await running(disk)
    assert states[V].chosen == 59


async def test_a_failed_sync_ends_the_log():
    disk = SimDisk(random.Random(3))
    log, _ = await running(disk)
    disk.fail_next("sync", "journals")
    done = []
    log.when_durable(log.append(V, history(1)[0]), done.append, 1)
    with pytest.raises(StoreFailed):
        await log.run()
    assert not done


async def in_turns(disk, nursery, **options):
    """A log whose task waits, on a quick disk, and the turn in which its records arrive."""
    disk.quick = True
    log, _ = await running(disk, **options)
    turn = Turn()
    log.later = turn.later
    nursery.start_soon(log.run)
    await trio.testing.wait_all_tasks_blocked()
    return log, turn


async def test_records_of_a_turn_are_durable_when_it_ends():
    disk = SimDisk(random.Random(3))
    async with trio.open_nursery() as nursery:
        log, turn = await in_turns(disk, nursery)
        records, done = history(9), []
        for some in (records[:2], records[2:3], records[3:8]):
            batches = log.statistics()["batches"]
            turn.begin()
            for record in some:
                log.when_durable(log.append(V, record), done.append, record[1])
            assert log.statistics()["batches"] == batches
            turn.end()  # and nobody else had a turn
            assert done == [record[1] for record in records[: some[-1][1]]]
            assert log.statistics()["batches"] == batches + 1
        # What arrives otherwise is for the task, and what comes in between waits for it.
        log.append(V, records[8])
        turn.begin()
        log.when_durable(log.append(W, records[0]), done.append, "W")
        turn.end()
        assert done[-1] == 8
        await log.sync()
        assert done[-1] == "W"
        nursery.cancel_scope.cancel()
    _, states = await running(disk)
    assert states[V].chosen == 8
    assert states[W].pending is not None


async def test_a_turn_leaves_to_the_task_what_takes_long():
    disk = SimDisk(random.Random(3))
    async with trio.open_nursery() as nursery:
        log, turn = await in_turns(disk, nursery, segment_bytes=2000)
        done = []
        for record in history(60):
            disk.full = record[1] > 30
            turn.begin()
            log.when_durable(log.append(V, record), done.append, record[1])
            turn.end()
            if not disk.full:
                await log.sync()  # a new segment is for the task
        await trio.sleep(1)
        assert log.full is not None
        assert 30 <= len(done) < 60
        disk.full = False
        await log.sync()
        assert len(done) == 60
        assert log.statistics()["segments"] == 3
        nursery.cancel_scope.cancel()
    _, states = await running(disk)
    assert states[V].chosen == 59


async def test_a_sync_that_fails_at_the_end_of_a_turn_ends_the_log():
    disk = SimDisk(random.Random(3))
    done = []

    async def fail():
        async with trio.open_nursery() as nursery:
            log, turn = await in_turns(disk, nursery)
            disk.fail_next("sync", "journals")
            turn.begin()
            log.when_durable(log.append(V, history(1)[0]), done.append, 1)
            turn.end()

    with pytest.raises(BaseExceptionGroup) as caught:
        await fail()
    assert caught.group_contains(StoreFailed)
    assert not done


async def test_a_segment_made_just_before_a_crash_is_made_again():
    disk = SimDisk(random.Random(3))
    await written(disk, history(3))
    for content in (b"", header(2)[:10], bytes(len(header(2)))):
        disk.open("journals/000000000002.log", create=True, truncate=True).append([content])
        _, states = await running(disk)
        assert states[V].chosen == 2
        assert disk.listdir("journals") == ["000000000001.log"]


async def test_reading_a_damaged_entry_says_where():
    disk = SimDisk(random.Random(3))
    log = await written(disk, history(3))
    disk.flip(segment_name(disk), log._index[V].starts[1] + 90)
    with pytest.raises(StoreFailed, match="entry 2 is damaged"):
        log.read(V, 2)


def test_replay_refuses_gaps_and_broken_chains():
    records = history(6)
    assert replay(records).chosen == 5
    with pytest.raises(Corrupt, match="entries 3 to 3"):
        replay(records[:2] + records[3:])
    bad = list(records[3])
    bad[3] = b"?" * 32
    with pytest.raises(Corrupt, match="chain"):
        replay([*records[:3], tuple(bad), *records[4:]])


# ------------------------------------------------------------------------------ room made ahead


class GrownBy(SimDisk):
    """Notes who made a file longer: appends of records, or the task that makes room."""

    def __init__(self, rnd, **options):
        super().__init__(rnd, **options)
        self.grown = []
        self.making = False

    def take(self, growth, name):
        super().take(growth, name)
        if growth and name.endswith(".log"):
            self.grown.append("room" if self.making else "batch")


class Watched(JournalLog):
    """Tells its disk when it makes room, and checks the rule that nobody else grows it then."""

    def _extend(self, segment, size):
        self._disk.making = True
        try:
            super()._extend(segment, size)
        finally:
            self._disk.making = False

    def _create(self, number):
        self._disk.making = True
        try:
            super()._create(number)
        finally:
            self._disk.making = False


class Impatient(Watched):
    """The mutant: writes beyond the room while that is being made longer."""

    def _fits(self):
        return True


class Deaf(Watched):
    """The mutant: does not hear that a sync failed on the thread that makes room."""

    @property
    def _failure(self):
        return None

    @_failure.setter
    def _failure(self, error):
        pass


async def with_room(nursery, disk, kind=Watched, **options):
    log, _ = await kind.open(disk, "journals", **options)
    nursery.start_soon(log.run)
    nursery.start_soon(log.make_room)
    return log


async def test_room_is_made_ahead_of_the_records():
    disk = GrownBy(random.Random(1), sync_delay=0.001)
    records = history(800)
    async with trio.open_nursery() as nursery:
        log = await with_room(nursery, disk, segment_bytes=40_000)
        for record in records:
            log.append(V, record)
            await log.sync()
            # A step is begun as soon as one was used, and takes less than the other three last.
            assert log._active.size - log._active.end > 2 * len(log._step)
        assert log.statistics()["segments"] > 2
        nursery.cancel_scope.cancel()
    assert set(disk.grown) == {"room"}
    disk.crash()
    _, states = await running(disk)
    assert states[V].chosen == 799
    # It goes on after a restart, which cuts the room off.
    async with trio.open_nursery() as nursery:
        log = await with_room(nursery, disk, segment_bytes=40_000)
        await trio.sleep(1)
        assert log._active.size >= log._active.end + 3 * len(log._step)
        nursery.cancel_scope.cancel()


async def slow_room(kind):
    """More is written than fits, while room is made; what is there after a restart."""
    disk = GrownBy(random.Random(2), sync_delay=0.05)
    records = history(120)
    done = []
    async with trio.open_nursery() as nursery:
        log = await with_room(nursery, disk, kind, segment_bytes=8000)
        for record in records:
            log.when_durable(log.append(V, record), done.append, record[1])
            await trio.sleep(0.002)
        await log.sync()
        nursery.cancel_scope.cancel()
    assert len(done) == 120
    assert "batch" in disk.grown, "batches that are larger than the room bring their own"
    _, states = await running(disk)
    return states[V].chosen if V in states else 0


async def test_what_does_not_fit_waits_until_the_room_is_made():
    assert await slow_room(Watched) == 119


async def test_a_batch_that_does_not_wait_for_the_room_is_lost():
    with contextlib.suppress(StoreFailed):  # the log may be found to be damaged
        assert await slow_room(Impatient) != 119


async def test_a_full_disk_is_the_batch_s_error_that_needs_room():
    disk = SimDisk(random.Random(1), sync_delay=0.001)
    records = history(60)
    async with trio.open_nursery() as nursery:
        log = await with_room(nursery, disk, segment_bytes=16_000)
        log.append(V, records[0])
        await log.sync()
        await trio.sleep(1)
        disk.full = True
        fitted = 0
        for record in records[1:]:
            if log._active.end + 300 > log._active.size:
                break
            log.append(V, record)
            await log.sync()
            assert log.full is None
            fitted += 1
        assert fitted > 10
        for record in records[fitted + 1 :]:
            log.append(V, record)
        await trio.sleep(2)
        assert log.full is not None
        disk.full = False
        await log.sync()
        await trio.sleep(1)
        assert log.full is None
        assert log._active.size >= log._active.end + 3 * len(log._step), "room is made again"
        nursery.cancel_scope.cancel()
    _, states = await running(disk)
    assert states[V].chosen == 59


async def failed_room(kind, seed):
    """The sync of a step of room fails; (what was acknowledged, what a restart then finds)."""
    disk = GrownBy(random.Random(seed), sync_delay=0.02)
    done = []

    class Failing(kind):
        def _extend(self, segment, size):
            disk.fail_next("sync", "journals")  # drops what is written and not synced, of anybody
            super()._extend(segment, size)

    async def until_it_fails():
        async with trio.open_nursery() as nursery:
            log = await with_room(nursery, disk, Failing, segment_bytes=16_000)
            for record in history(60):
                log.when_durable(log.append(V, record), done.append, record[1])
                await trio.sleep(0.004)
            await trio.sleep(5)
            raise AssertionError("nobody noticed")

    with pytest.raises(BaseExceptionGroup) as caught:
        await until_it_fails()
    assert caught.group_contains(StoreFailed)
    disk.crash()
    _, states = await running(disk)
    return len(done), states[V].chosen + 1 if V in states else 0


async def test_a_failed_sync_of_the_room_ends_the_log_before_it_acknowledges():
    for seed in range(40):
        acknowledged, found = await failed_room(Watched, seed)
        assert 0 < acknowledged <= found, f"seed {seed}"


async def test_who_does_not_hear_of_a_failed_sync_loses_what_it_acknowledged():
    lost = 0
    for seed in range(40):
        try:
            acknowledged, found = await failed_room(Deaf, seed)
            lost += acknowledged > found
        except StoreFailed:
            lost += 1
    assert lost
