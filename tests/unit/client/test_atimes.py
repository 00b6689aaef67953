"""Access times: when they move, and how they are committed."""

import errno

import pytest

from dfs.client.atimes import DAY, AccessTimes
from dfs.errors import FsError
from tests.unit.client.support import filesystem, new_home, write_file


async def test_they_move_when_older_than_a_change_or_a_day():
    async with filesystem(new_home()) as fs:
        times = AccessTimes(fs.session)
        ino = await write_file(fs, 1, b"f", b"x")
        now = fs.session.cluster.clock.time_ns()

        async def moves(atime, mtime, ctime):
            attr = await fs.setattr(ino, atime=atime, mtime=mtime, ctime=ctime)
            times.set(ino)
            times.accessed(attr)
            return len(times) == 1

        assert await moves(now - 10, now - 10, now - 20)  # not newer than mtime
        assert await moves(now - 10, now - 20, now - 10)  # nor than ctime
        assert not await moves(now - 10, now - 20, now - 20)
        assert await moves(now - DAY, now - 2 * DAY, now - 2 * DAY)
        assert not await moves(now - DAY + 10**9, now - 2 * DAY, now - 2 * DAY)


async def test_they_are_shown_at_once_and_committed_later():
    async with filesystem(new_home()) as fs:
        times = AccessTimes(fs.session)
        ino = await write_file(fs, 1, b"f", b"x")
        gone = await write_file(fs, 1, b"g", b"x")
        for i in (ino, gone):
            times.accessed(await fs.getattr(i))
        committed = (await fs.getattr(ino)).atime
        shown = times.overlay(await fs.getattr(ino)).atime
        assert shown >= committed
        times.accessed(times.overlay(await fs.getattr(ino)))
        assert len(times) == 2
        await fs.unlink(1, b"g")
        before = (await fs.getattr(ino)).ctime
        await times.commit()
        assert len(times) == 0
        attr = await fs.getattr(ino)
        assert attr.atime == shown
        assert attr.ctime == before
        with pytest.raises(FsError) as caught:
            await fs.getattr(gone)
        assert caught.value.errno == errno.ESTALE


async def test_one_that_was_set_meanwhile_stays():
    async with filesystem(new_home()) as fs:
        times = AccessTimes(fs.session)
        ino = await write_file(fs, 1, b"f", b"x")
        times.accessed(await fs.getattr(ino))
        times.set(ino)
        await fs.setattr(ino, atime=5)
        await times.commit()
        assert (await fs.getattr(ino)).atime == 5
