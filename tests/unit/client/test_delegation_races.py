"""What overtakes what, at a session that has or had the delegation; against the fake home."""

import errno

import pytest
import trio

from dfs.client.delegation import LEASE
from dfs.client.orphans import Orphans
from dfs.errors import FsError, Unreachable
from dfs.ids import ROOT_INO
from dfs.testing.holder_mutants import broken
from tests.unit.client.support import VOLUME, filesystem, names, new_home, read_file, write_file


async def hold(fs):
    """Work until the file system has the delegation."""
    with trio.fail_after(30):
        i = 0
        while not fs.session.here:
            await write_file(fs, ROOT_INO, b"warm%d" % i, b"")
            i += 1
            await trio.sleep(0.1)
    await fs.session.settle()


def delegating():
    home = new_home()
    home.delegates = True
    return home


def delay(fs, method, seconds):
    """Answers to one method arrive late; returns an event: the first such answer is under way."""
    call, done = fs.rpc.call, trio.Event()

    async def late(to, name, *args, **options):
        try:
            return await call(to, name, *args, **options)
        finally:
            if name == method:
                done.set()
                with trio.CancelScope(shield=True):
                    await trio.sleep(seconds)

    fs.rpc.call = late
    return done


async def test_what_others_did_is_seen_before_the_answer_to_the_return():
    home = delegating()
    async with filesystem(home, seed=1, delegate=True) as fs:
        await hold(fs)
        returned = delay(fs, "vol.return", 1.0)
        async with filesystem(home, seed=2) as other:
            await returned.wait()
            await write_file(other, ROOT_INO, b"new", b"content")
            ino = (await other.lookup(ROOT_INO, b"warm0")).ino
            await write_back(other, ino, b"changed")
            assert fs.session._delegation.held  # it does not know yet
            assert await read_file(fs, ino) == b"changed"
            await fs.lookup(ROOT_INO, b"new")


async def write_back(fs, ino, data):
    handle = await fs.open(ino, writable=True)
    await fs.write(handle, 0, data)
    await fs.flush(handle)
    await fs.release(handle)


async def test_a_late_fence_does_not_end_the_next_session():
    home = delegating()
    async with filesystem(home, seed=1, delegate=True) as fs:
        await hold(fs)
        answered = delay(fs, "vol.commit", 2.0)
        await fs.mkdir(ROOT_INO, b"lost", 0o755)
        volume = home.volumes[VOLUME]
        volume.epoch += 1  # to the home, the commit comes after the revocation
        await answered.wait()
        volume.epoch -= 1
        home.revoke(VOLUME)
        await trio.sleep(1)
        assert not fs.session.over
        generation = fs.session.generation
        await trio.sleep(5)
        assert fs.session.generation == generation == 2


async def test_a_look_that_is_fenced_late_does_not_end_the_next_session():
    home = delegating()
    async with filesystem(home, seed=1, delegate=True) as fs:
        await hold(fs)
        await trio.sleep(20)
        call, session = fs.rpc.call, fs.session

        async def slow(to, method, args=(), *more, **options):
            if method == "vol.watch" and not args[3]:  # a look, which does not wait
                await trio.sleep(1)
            return await call(to, method, args, *more, **options)

        fs.rpc.call = slow
        session._freshness.lose()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.refresh)
            await trio.sleep(0.1)
            home.revoke(VOLUME)
            await trio.sleep(0.5)
            assert not session.over
            assert session.generation == 2
        await trio.sleep(5)
        assert session.generation == 2


async def test_fsync_tells_once_that_closed_files_and_names_were_lost():
    home = delegating()
    async with filesystem(home, seed=1, delegate=True) as fs:
        await hold(fs)
        attr = await fs.mkdir(ROOT_INO, b"d", 0o755)
        await fs.session.settle()
        ino = await write_file(fs, attr.ino, b"kept", b"old")
        await fs.session.settle()
        home.revoke(VOLUME)
        await write_back(fs, ino, b"new")  # acknowledged, closed, and lost
        await write_file(fs, attr.ino, b"lost", b"")
        await trio.sleep(3)
        assert await names(fs, attr.ino) == [b"kept"]
        handle = await fs.opendir(attr.ino)
        with pytest.raises(FsError) as e:
            await fs.fsyncdir(handle)
        assert e.value.errno == errno.EIO
        await fs.fsyncdir(handle)
        handle = await fs.open(ino)
        with pytest.raises(FsError) as e:
            await fs.fsync(handle)
        assert e.value.errno == errno.EIO
        await fs.fsync(handle)
        await fs.release(handle)
        assert await read_file(fs, ino) == b"old"


async def test_what_a_silent_session_may_have_open_is_not_purged():
    home = new_home()
    async with filesystem(home, seed=1) as fs, filesystem(home, seed=2) as silent:
        ino = await write_file(silent, ROOT_INO, b"f", b"content")
        handle = await silent.open(ino)
        await silent.unlink(ROOT_INO, b"f")
        await fs.session.refresh()
        orphans = Orphans(fs.session, fs.namespace, fs.files)
        fs.session._delegation.epoch = 1  # granted, because the other one is silent
        assert fs.session.alone
        assert await orphans.purge() == 0
        fs.session._delegation.epoch = 0
        assert bytes(await silent.read(handle, 0, 100)) == b"content"
        await silent.release(handle)


@pytest.mark.parametrize("sent", [False, True])
async def test_a_holder_that_fell_behind_keeps_what_it_did(sent):
    home = delegating()
    async with filesystem(home, seed=1, delegate=True) as fs:
        await hold(fs)
        answered = delay(fs, "vol.commit", 1.0)
        if not sent:
            fs.rpc.lose_request = 1.0
        await write_file(fs, ROOT_INO, b"f", b"x" * 5000)
        if sent:
            await answered.wait()  # in the journal, and its holder does not know
        await write_file(fs, ROOT_INO, b"g", b"y" * 5000)
        await fs.unlink(ROOT_INO, b"f")
        home.checkpoint(VOLUME)
        home.checkpoint(VOLUME)  # the entries before are gone for the holder
        fs.rpc.lose_request = 0.0
        await trio.sleep(3)
        assert fs.session.generation == 1
        await fs.session.settle()
        assert not fs.session.statistics()["pending"]
        await write_file(fs, ROOT_INO, b"h", b"")
        want = sorted({*await names(fs, ROOT_INO)})
        assert {b"g", b"h"} < set(want)
        assert b"f" not in want
        async with filesystem(home, seed=2, mode="ro") as other:
            assert await names(other, ROOT_INO) == want
            attr = await other.lookup(ROOT_INO, b"g")
            assert await read_file(other, attr.ino) == b"y" * 5000


async def served(home):
    """Seconds that a holder serves after the last question that was answered, with slow answers."""
    async with filesystem(home, seed=1, delegate=True, flush=False) as fs:
        await hold(fs)
        call, cut, asked = fs.rpc.call, False, []

        async def slow(*args, **options):
            at = trio.current_time()
            if not cut:
                result = await call(*args, **options)
                await trio.sleep(1)
            if cut:
                raise Unreachable("the holder is cut off")
            asked.append(at)
            return result

        fs.rpc.call = slow
        await trio.sleep(10)
        cut = True
        for _ in range(1200):
            if not fs.session.here:
                break
            await trio.sleep(0.05)
        return trio.current_time() - asked[-1]


async def test_a_lease_counts_from_the_question():
    assert LEASE - 0.1 < await served(delegating()) < LEASE + 0.1


@pytest.mark.parametrize("mutant", ["old_lease", "past_lease"])
async def test_a_lease_that_is_too_long_is_found(mutant):
    with broken(mutant):
        assert await served(delegating()) > LEASE + 0.5
