"""Which writes are expected to be followed by a sync, and what is begun then."""

import trio

from dfs.client.foresight import FIRST, Foresight
from dfs.client.openfile import File
from dfs.ids import ROOT_INO
from tests.unit.client.test_delegation import delegating, holder


def interval(foresight, file, writes):
    """Some writes and a sync: at which of the writes it was expected."""
    expected = []
    for number in range(1, writes + 1):
        foresight.wrote(file)
        if foresight.due:
            expected.append(number)
            foresight.due.clear()
    foresight.synced(file)
    return expected


def test_what_was_done_twice_is_expected():
    foresight, file = Foresight(), File(1)
    foresight.made(file)
    assert [interval(foresight, file, n) for n in (2, 2, 2, 2)] == [[], [], [2], [2]]
    assert interval(foresight, file, 3) == [2]  # wrongly, once
    assert [interval(foresight, file, n) for n in (2, 3, 2)] == [[], [], []]
    foresight.synced(file)  # nothing was written: that says nothing
    assert file.before == 2


def test_new_files_are_expected_to_be_like_the_last():
    foresight = Foresight()
    for number in range(FIRST):
        file = File(number)
        foresight.made(file)
        assert interval(foresight, file, 1) == []
        foresight.closed(file)
    file = File(100)
    foresight.made(file)
    assert interval(foresight, file, 1) == [1]
    assert interval(foresight, file, 1) == [1]
    unsynced = File(101)
    foresight.made(unsynced)
    foresight.wrote(unsynced)
    foresight.closed(unsynced)
    foresight.due.clear()
    file = File(102)
    foresight.made(file)
    assert interval(foresight, file, 1) == []


def test_new_files_may_have_two_intervals_in_common():
    foresight = Foresight()
    seen = []
    for number in range(FIRST + 2):
        file = File(number)
        foresight.made(file)
        seen.append((interval(foresight, file, 8), interval(foresight, file, 1)))
        foresight.closed(file)
    assert seen == [([], [])] * FIRST + [([8], [1])] * 2
    file = File(100)
    foresight.made(file)
    interval(foresight, file, 8)
    foresight.wrote(file)
    foresight.closed(file)  # this one did not sync again
    foresight.due.clear()
    file = File(101)
    foresight.made(file)
    assert (interval(foresight, file, 8), interval(foresight, file, 1)) == ([8], [])


async def test_the_commit_is_on_its_way_before_the_sync():
    home = delegating()
    async with holder(home) as fs:
        _, fh = await fs.create(ROOT_INO, b"log", 0o644)
        await fs.session.settle()
        home.latency = 0.1
        times = []
        for at in range(5):
            await fs.write(fh, at, b"x")
            fs.files.begin_expected()
            await trio.sleep(0.05)  # the program is on its way to call fsync
            began = trio.current_time()
            await fs.fsync(fh)
            times.append(round(trio.current_time() - began, 3))
        assert times == [0.1, 0.1, 0.05, 0.05, 0.05]
        commits = fs.session.statistics()["commits"]
        await fs.write(fh, 5, b"x")
        fs.files.begin_expected()
        await trio.sleep(1)  # this one is not synced: it was committed all the same, and once
        assert fs.session.statistics()["commits"] == commits + 1
        assert fs.session.statistics()["pending"] == 0
        await fs.release(fh)


async def test_a_sync_that_comes_early_waits_for_the_same_commit():
    home = delegating()
    async with holder(home) as fs:
        _, fh = await fs.create(ROOT_INO, b"log", 0o644)
        for at in range(2):
            await fs.write(fh, at, b"x")
            await fs.fsync(fh)
        home.latency = 0.1
        commits = fs.session.statistics()["commits"]
        await fs.write(fh, 2, b"x")
        fs.files.begin_expected()
        await fs.fsync(fh)
        assert fs.session.statistics()["commits"] == commits + 1
        await fs.release(fh)
