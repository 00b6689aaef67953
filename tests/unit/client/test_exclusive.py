"""Exclusive sessions at the client: being kept out, waiting for the dead, the end; on the fake home."""

import errno

import pytest
import trio

from dfs.client.session import ALIVE, DEADLINE, Session
from dfs.errors import FsError, InUse, leaves
from dfs.ids import COUNTER_BITS, ROOT_INO
from tests.unit.client.support import VOLUME, filesystem, names, new_home


async def refusal(home, mode):
    """What a session of that mode is told instead of being opened."""
    with pytest.raises(BaseExceptionGroup) as e:
        async with filesystem(home, seed=2, mode=mode):
            pytest.fail("two writers")
    (cause,) = leaves(e.value)
    assert isinstance(cause, InUse)
    return str(cause)


async def test_an_exclusive_session_writes_and_holds_the_delegation():
    home = new_home()
    home.delegates = True
    async with filesystem(home, seed=1, delegate=True, mode="rwx") as fs:
        with trio.fail_after(30):
            for i in range(1000):
                await fs.mkdir(ROOT_INO, b"d%d" % i, 0o755)
                if fs.session.here:
                    break
                await trio.sleep(0.1)
        assert fs.session.here
        assert not fs.read_only
        assert fs.session.statistics()["delegation"]


@pytest.mark.parametrize(("there", "asked"), [("rwx", "rw"), ("rwx", "rwx"), ("rw", "rwx")])
async def test_who_is_kept_out_by_a_session_that_lives_is_told_soon(there, asked):
    home = new_home()
    async with filesystem(home, seed=1, mode=there):
        start = trio.current_time()
        assert "has the volume" in await refusal(home, asked)
        assert ALIVE < trio.current_time() - start < ALIVE + 1


async def test_readers_are_let_in():
    home = new_home()
    async with filesystem(home, seed=1, mode="rwx") as fs:
        await fs.mkdir(ROOT_INO, b"d", 0o755)
        async with filesystem(home, seed=2, mode="ro") as reader:
            assert await names(reader, ROOT_INO) == [b"d"]


@pytest.mark.parametrize("ago", [None, 3.0])
async def test_a_session_that_may_be_dead_is_waited_for(ago):
    home = new_home()
    dead = Session(home.client(seed=1), VOLUME, mode="rwx")
    async with trio.open_nursery() as nursery:
        await nursery.start(dead.run)
        nursery.cancel_scope.cancel()
    start = trio.current_time()

    async def age():  # the home tells how long it was silent, and closes it in the end
        while trio.current_time() < start + 10:
            home.heard_ago = None if ago is None else ago + trio.current_time() - start
            await trio.sleep(0.01)
        home.fence(VOLUME, dead.sid)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(age)
        async with filesystem(home, seed=2, mode="rwx"):
            assert 10 <= trio.current_time() - start < 11


async def test_waiting_for_the_dead_has_an_end():
    home = new_home()
    home.heard_ago = None
    async with filesystem(home, seed=1, mode="rwx"):
        start = trio.current_time()
        await refusal(home, "rw")
        assert DEADLINE < trio.current_time() - start < DEADLINE + 2


async def test_a_lost_exclusive_session_is_not_replaced():
    home = new_home()
    async with filesystem(home, seed=1, mode="rwx") as fs:
        await fs.mkdir(ROOT_INO, b"d", 0o755)
        told = []
        fs.session.on_fenced(lambda held, lost: told.append((held, lost)))
        home.fence(VOLUME, fs.session.sid)
        await trio.sleep(1)
        assert told == [(False, set())]
        for operation in (fs.getattr(ROOT_INO), fs.mkdir(ROOT_INO, b"e", 0o755)):
            with trio.fail_after(0.1), pytest.raises(FsError, match="mount again") as e:
                await operation
            assert e.value.errno == errno.EIO
        await trio.sleep(5)
        assert home.calls["vol.open"] == 1
        assert home.volumes[VOLUME].sessions == {}


async def test_a_session_that_has_used_its_inode_numbers_keeps_what_it_has():
    home = new_home()
    async with filesystem(home, seed=1, mode="rwx") as fs:
        fs.session._minted = (1 << COUNTER_BITS) - 1
        with pytest.raises(FsError) as e:
            await fs.mkdir(ROOT_INO, b"d", 0o755)
        assert e.value.errno == errno.ENOSPC
        assert not fs.session.over
