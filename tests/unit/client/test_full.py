"""Homes on whose disks not a byte is left: who waits is told ENOSPC within a second or so.

Nothing that was acknowledged is lost, what may have been accepted takes effect once, and the session
goes on when there is room.
"""

import errno
from dataclasses import dataclass

import pytest
import trio

from dfs.client import committer
from dfs.client.capacity import stalled_by_disks
from dfs.client.session import Session
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from tests.unit.client.support import VOLUME, filesystem, names, new_home, read_file, write_file
from tests.unit.client.test_delegation import delegating, holder

SOON = 1.5  # seconds


@dataclass
class Outcome:
    code: int
    seconds: float


async def outcome(call, *args, **kw):
    """The errno of a call, 0 if it succeeds, and how long it took."""
    began = trio.current_time()
    code = 0
    try:
        await call(*args, **kw)
    except FsError as e:
        code = e.errno
    return Outcome(code, trio.current_time() - began)


async def dirty(fs, name, data):
    attr, fh = await fs.create(ROOT_INO, name, 0o644)
    await fs.write(fh, 0, data)
    return attr.ino, fh


@pytest.mark.parametrize("size", [100, 100_000])
async def test_fsync_under_the_delegation_says_so_and_the_next_one_succeeds(size):
    home = delegating()
    async with holder(home) as fs:
        sid = fs.session.sid
        ino, fh = await dirty(fs, b"f", b"x" * size)
        home.full = {1, 2, 3}
        for _ in range(2):
            told = await outcome(fs.fsync, fh)
            assert told.code == errno.ENOSPC
            assert told.seconds < SOON
        assert "nothing, their disks have no room: node1 /disk1" in fs.session.full
        handle = await fs.opendir(ROOT_INO)
        assert (await outcome(fs.fsyncdir, handle)).code == errno.ENOSPC
        await fs.rename(ROOT_INO, b"f", ROOT_INO, b"g")  # acknowledged: it must not be lost
        assert await read_file(fs, ino) == b"x" * size

        home.full = set()
        assert await outcome(fs.fsync, fh) == Outcome(0, pytest.approx(0.5, abs=0.5))
        assert fs.session.full == ""
        assert fs.session.sid == sid
        await fs.release(fh)
        async with filesystem(home, seed=2) as other:
            assert b"g" in await names(other, ROOT_INO)
            assert await read_file(other, ino) == b"x" * size


@pytest.mark.parametrize("size", [100, 100_000])
async def test_fsync_without_the_delegation_says_so_and_the_next_one_succeeds(size):
    home = new_home()
    async with filesystem(home) as fs:
        sid = fs.session.sid
        ino, fh = await dirty(fs, b"f", b"x" * size)
        home.full = {1, 3}
        for _ in range(2):
            told = await outcome(fs.fsync, fh)
            assert told.code == errno.ENOSPC
            assert told.seconds < SOON
        assert await read_file(fs, ino) == b"x" * size
        home.full = set()
        await trio.sleep(0.6)
        assert (await outcome(fs.fsync, fh)).code == 0
        assert fs.session.sid == sid
        await fs.release(fh)
    async with filesystem(home, seed=2) as other:
        assert await read_file(other, ino) == b"x" * size


async def test_what_was_accepted_before_the_disks_filled_takes_effect_once():
    """The request's outcome is unknown: its answer was lost."""
    home = new_home()
    async with filesystem(home, deadline=20.0) as fs:
        ino, fh = await dirty(fs, b"f", b"old" * 10)
        fs.rpc.lose_answer = 1.0
        with trio.move_on_after(0.1):
            await fs.fsync(fh)
        fs.rpc.lose_answer = 0.0
        home.full = {1, 2, 3}
        await fs.write(fh, 0, b"new" * 10)
        assert (await outcome(fs.fsync, fh)).code == errno.ENOSPC
        home.full = set()
        await trio.sleep(1)
        await fs.fsync(fh)
        await fs.release(fh)
    async with filesystem(home, seed=2) as other:
        assert await read_file(other, ino) == b"new" * 10


async def test_an_operation_that_never_left_is_refused_for_certain():
    """The one on its way is not: it waits, its session lives, and it has one outcome."""
    home = new_home()
    async with filesystem(home, deadline=10.0) as fs:
        sid = fs.session.sid
        home.full = {1, 2}
        told = {}

        async def run(name):
            told[name] = await outcome(fs.mkdir, ROOT_INO, name, 0o755)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, b"sent")
            await trio.sleep(0.1)
            nursery.start_soon(run, b"queued")
            await trio.sleep(SOON)
            assert told.keys() == {b"queued"}
            assert told[b"queued"].code == errno.ENOSPC
        assert told[b"sent"].code == errno.EIO
        assert 10 <= told[b"sent"].seconds < 12
        assert fs.session.sid == sid
        assert await names(fs, ROOT_INO) == []  # no disk is needed to look
        home.full = set()
        await trio.sleep(1)
        assert await names(fs, ROOT_INO) == [b"sent"]
        await fs.mkdir(ROOT_INO, b"later", 0o755)
        assert fs.session.sid == sid


async def test_too_much_that_is_pending_is_refused_and_not_waited_for():
    home = delegating()
    async with holder(home) as fs:
        home.full = {1, 2, 3}
        told = Outcome(0, 0.0)
        count = 0
        while not told.code:
            told = await outcome(fs.mkdir, ROOT_INO, b"%d" % count + b"y" * 200, 0o755)
            count += 1
            if count % 100 == 0:
                await trio.lowlevel.checkpoint()
        assert told.code == errno.ENOSPC
        assert told.seconds < SOON
        home.full = set()
        await fs.session.settle()
        assert len([n for n in await names(fs, ROOT_INO) if b"y" in n]) == count - 1


@pytest.mark.parametrize("delegate", [True, False])
async def test_an_unmount_waits_for_room(delegate):
    home = delegating() if delegate else new_home()
    opened = holder(home) if delegate else filesystem(home)
    async with opened as fs:
        await write_file(fs, ROOT_INO, b"before", b"1")
        ino, fh = await dirty(fs, b"f", b"2")
        home.full = {1, 2, 3}

        async def make_room():
            await trio.sleep(5)
            home.full = set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_room)
            began = trio.current_time()
            await fs.shut_down()
            assert 5 <= trio.current_time() - began < 7
        await fs.release(fh)
        async with filesystem(home, seed=2) as other:
            assert await read_file(other, ino) == b"2"


async def test_an_unmount_gives_up_when_no_room_comes():
    home = delegating()
    async with holder(home, deadline=8.0, flush=False) as fs:
        await dirty(fs, b"f", b"2")
        home.full = {1, 2, 3}
        told = await outcome(fs.shut_down)
        assert told.code == errno.ENOSPC
        assert 8 <= told.seconds < 10


async def test_one_full_disk_is_not_the_reason_and_neither_is_silence():
    home = new_home()
    async with filesystem(home, deadline=5.0, flush=False) as fs:
        home.full = {2}
        assert await stalled_by_disks(fs.session.cluster, VOLUME) == ""
        assert (await outcome(fs.mkdir, ROOT_INO, b"d", 0o755)).code == 0
        home.full = {1, 2, 3}
        fs.rpc.down = {1, 2, 3}
        assert await stalled_by_disks(fs.session.cluster, VOLUME) == ""
        _, fh = await dirty_without_create(fs)
        told = await outcome(fs.fsync, fh)
        assert told.code == errno.EIO
        assert 5 <= told.seconds < 7


async def dirty_without_create(fs):
    fs.rpc.down, full, fs.rpc.home.full = set(), fs.rpc.home.full, set()
    made = await dirty(fs, b"f", b"x")
    fs.rpc.down, fs.rpc.home.full = {1, 2, 3}, full
    return made


async def test_nobody_looks_for_a_reason_while_commits_are_answered():
    home = delegating()
    async with holder(home) as fs:
        before = home.calls.get("node.status", 0)
        for i in range(20):
            await write_file(fs, ROOT_INO, b"f%d" % i, b"x")
            await fs.session.settle()
            await trio.sleep(committer.STALLED / 3)
        await trio.sleep(60)
        assert home.calls.get("node.status", 0) == before


@pytest.mark.parametrize("mode", ["rw", "ro", "rwx"])
async def test_a_session_is_not_opened_and_not_waited_for(mode):
    home = new_home()
    home.full = {1, 2}
    session = Session(home.client(), VOLUME, mode=mode)
    told = await outcome(session.run)
    assert told.code == errno.ENOSPC
    assert told.seconds < SOON


async def test_a_lost_session_is_opened_again_when_there_is_room():
    home = new_home()
    async with filesystem(home) as fs:
        await write_file(fs, ROOT_INO, b"f", b"x")
        home.full = {1, 2, 3}
        home.fence(VOLUME, fs.session.sid)
        await trio.sleep(10)
        assert fs.session.over
        home.full = set()
        await trio.sleep(5)
        assert await names(fs, ROOT_INO) == [b"f"]


# ------------------------------------------------------------------------------------ mutants


def late(monkeypatch):
    monkeypatch.setattr(committer, "STALLED", 5.0)
    return test_fsync_under_the_delegation_says_so_and_the_next_one_succeeds(100)


def any_reason(monkeypatch):
    async def always(*_):
        return "silence is taken for full disks"

    monkeypatch.setattr(committer, "stalled_by_disks", always)
    return test_one_full_disk_is_not_the_reason_and_neither_is_silence()


def gives_up(monkeypatch):
    real = committer.Committer._note_full

    def note_full(self, full):
        real(self, full)
        if full:
            self._session.lose("the disks are full")

    monkeypatch.setattr(committer.Committer, "_note_full", note_full)
    return test_fsync_under_the_delegation_says_so_and_the_next_one_succeeds(100)


def for_certain(monkeypatch):
    """Also who waits for the request on its way is told that nothing was done."""
    real = committer.Submission.__init__
    monkeypatch.setattr(
        committer.Submission, "__init__", lambda self, *a, **_: real(self, *a, kept=True)
    )
    return test_an_operation_that_never_left_is_refused_for_certain()


@pytest.mark.parametrize("mutant", [late, any_reason, gives_up, for_certain])
async def test_a_broken_one_is_found(mutant, monkeypatch):
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group of any
        await mutant(monkeypatch)
    assert caught.group_contains(AssertionError, depth=None) or caught.type is AssertionError
