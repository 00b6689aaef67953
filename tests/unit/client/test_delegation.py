"""The delegation at its holder: local operations, recall, loss, lease; against the fake home."""

import contextlib
import errno

import pytest
import trio

from dfs.client.delegation import LEASE
from dfs.client.session import Session
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.volume import effects as fx
from dfs.volume import entries, items
from dfs.volume.overlay import Overlay
from tests.unit.client.support import VOLUME, filesystem, names, new_home, read_file, write_file


def delegating(**params):
    home = new_home(**params)
    home.delegates = True
    return home


@contextlib.asynccontextmanager
async def holder(home, *, seed=1, **options):
    """A file system that holds the delegation."""
    async with filesystem(home, seed=seed, delegate=True, **options) as fs:
        await hold(fs)
        yield fs


async def hold(fs):
    with trio.fail_after(30):
        i = 0
        while not fs.session.here:
            with contextlib.suppress(FsError):
                await fs.mkdir(ROOT_INO, b"warm%d" % i, 0o755)
            i += 1
            await trio.sleep(0.1)
    await fs.session.settle()


def prefix_states(home):
    """The names in the root directory after every entry of the journal."""
    state, found = {}, []
    prefix = items.group(ROOT_INO, items.ENTRY)
    for data in home.volumes[VOLUME].log:
        overlay = Overlay(state.get)
        fx.apply(overlay, fx.of_entry(entries.decode(data)))
        for ranges in overlay.ranges.values():
            for start, end, _ in ranges:
                state = {k: v for k, v in state.items() if not start <= k < end}
        state.update((k, v) for k, (_, v) in overlay.items.items())
        found.append(
            {
                name
                for key, value in state.items()
                if value is not None and key.startswith(prefix)
                for name, _, _ in items.decode_entries(value)
            }
        )
    return found


async def test_operations_are_local_and_fsync_makes_them_durable():
    home = delegating()
    async with holder(home) as fs:
        before, calls = home.volumes[VOLUME].seq, home.calls["vol.commit"]
        for i in range(50):
            began = trio.current_time()
            await write_file(fs, ROOT_INO, b"f%d" % i, b"content %d" % i)
            assert trio.current_time() == began  # nothing was waited for
        assert home.volumes[VOLUME].seq == before
        attr = await fs.lookup(ROOT_INO, b"f7")
        assert await read_file(fs, attr.ino) == b"content 7"
        with pytest.raises(FsError) as e:
            await fs.mkdir(ROOT_INO, b"f7", 0o755)
        assert e.value.errno == errno.EEXIST
        handle = await fs.open(attr.ino, writable=True)
        await fs.fsync(handle)
        await fs.release(handle)
        assert home.calls["vol.commit"] == calls + 1  # all of it in one request
        assert {b"f%d" % i for i in range(50)} <= prefix_states(home)[-1]


async def test_what_nobody_waits_for_is_sent_soon():
    home = delegating()
    async with holder(home) as fs:
        await fs.mkdir(ROOT_INO, b"d", 0o755)
        await trio.sleep(0.2)
        assert b"d" in prefix_states(home)[-1]
        assert fs.session.statistics()["pending"] == 0


async def test_another_session_sees_all_and_ends_the_delegation():
    home = delegating()
    async with holder(home) as fs:
        ino = await write_file(fs, ROOT_INO, b"early", b"from the holder")
        async with filesystem(home, seed=2) as other:
            assert b"early" in await names(other, ROOT_INO)
            assert await read_file(other, ino) == b"from the holder"
            assert not fs.session.here
            await write_file(other, ROOT_INO, b"theirs", b"x")
            await write_file(fs, ROOT_INO, b"ours", b"y")  # judged by the home again
            await other.session.refresh()
            assert {b"early", b"theirs", b"ours"} <= set(await names(other, ROOT_INO))
            assert fs.session.statistics()["delegation"] == 0


async def test_operations_during_a_recall_wait_and_then_happen():
    home = delegating()
    async with holder(home) as fs, trio.open_nursery() as nursery:
        stop = trio.Event()
        made = []

        async def keep_making():
            while not stop.is_set():
                name = b"n%d" % len(made)
                await write_file(fs, ROOT_INO, name, name)
                made.append(name)
                await trio.sleep(0.001)

        nursery.start_soon(keep_making)
        await trio.sleep(0.1)
        for seed in (2, 3):
            async with filesystem(home, seed=seed) as other:
                seen = set(await names(other, ROOT_INO))
                assert {n for n in made if n in seen} == seen & set(made)
                await write_file(other, ROOT_INO, b"other%d" % seed, b"o")
            await trio.sleep(2)
        stop.set()
    expected = {*made, b"other2", b"other3"}
    assert expected <= prefix_states(home)[-1]


async def test_every_state_in_the_journal_is_a_prefix_of_what_was_done():
    home = delegating()
    order = []
    async with holder(home) as fs:
        for i in range(300):
            await write_file(fs, ROOT_INO, b"p%03d" % i, bytes(3000))
            order.append(b"p%03d" % i)
            if i % 40 == 0:
                await trio.sleep(0.003)
        await fs.session.settle()
    sizes = set()
    for state in prefix_states(home):
        there = [n for n in order if n in state]
        assert there == order[: len(there)]
        sizes.add(len(there))
    assert len(sizes) > 2  # it went out in parts


async def test_who_was_fenced_loses_what_it_did_not_send_and_says_so():
    home = delegating()
    async with holder(home, flush=False) as fs:
        kept, kept_handle = await fs.create(ROOT_INO, b"kept", 0o644)
        await fs.fsync(kept_handle)
        fs.rpc.down = {1, 2, 3}
        await fs.write(kept_handle, 0, b"lost")
        await fs.flush(kept_handle)  # acknowledged here
        await fs.write(kept_handle, 4, b"dirty")
        lost, handle = await fs.create(ROOT_INO, b"lost", 0o644)
        home.revoke(VOLUME)
        fs.rpc.down = set()
        await trio.sleep(3)
        with pytest.raises(FsError) as e:
            await fs.fsync(kept_handle)
        assert e.value.errno == errno.EIO
        await fs.fsync(kept_handle)  # told once
        assert (await fs.getattr(kept.ino)).size == 0
        with pytest.raises(FsError) as e:
            await fs.getattr(lost.ino)
        assert e.value.errno == errno.ESTALE
        assert b"lost" not in await names(fs, ROOT_INO)
        await write_file(fs, ROOT_INO, b"after", b"z")
        await fs.release(handle)


@pytest.mark.parametrize("early", [True, False], ids=["in-a-batch", "not-committed"])
async def test_a_commit_that_waits_does_not_outlive_the_delegation(early):
    home = delegating()
    async with holder(home, flush=False) as fs:
        attr, handle = await fs.create(ROOT_INO, b"both", 0o644)
        await fs.fsync(handle)
        fs.rpc.down = {1, 2, 3}
        if early:
            await fs.write(handle, 0, b"by the holder")
        await trio.sleep(LEASE + 1)  # as if it had been stopped
        if not early:
            await fs.write(handle, 0, b"by the holder")
        errors = []

        async def sync():
            with pytest.raises(FsError) as e:
                await fs.fsync(handle)
            errors.append(e.value.errno)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            await trio.sleep(1)
            home.revoke(VOLUME)
            fs.rpc.down = set()
        assert errors == [errno.EIO]
        await fs.fsync(handle)
        await fs.release(handle)
        assert await read_file(fs, attr.ino) == b""


async def test_the_lease_ends_without_answers():
    home = delegating()
    async with holder(home, deadline=5.0, flush=False) as fs:
        fs.rpc.down = {1, 2, 3}
        await trio.sleep(LEASE - 2)
        await fs.mkdir(ROOT_INO, b"within", 0o755)
        await trio.sleep(3)
        assert not fs.session.here
        for call in (fs.getattr(ROOT_INO), fs.mkdir(ROOT_INO, b"beyond", 0o755)):
            with pytest.raises(FsError) as e:
                await call
            assert e.value.errno == errno.EIO
        fs.rpc.down = set()
        await trio.sleep(1)
        assert fs.session.here  # nobody wanted it meanwhile
        assert b"within" in await names(fs, ROOT_INO)
        await fs.session.settle()
        assert b"within" in prefix_states(home)[-1]


async def test_lost_messages_change_nothing():
    home = delegating()
    async with holder(home, seed=5) as fs:
        fs.rpc.lose_answer = fs.rpc.lose_request = 0.3
        for i in range(40):
            await write_file(fs, ROOT_INO, b"m%d" % i, b"%d" % i)
            if i % 5 == 0:
                await fs.session.settle()
        fs.rpc.lose_answer = fs.rpc.lose_request = 0.0
        await fs.session.settle()
        assert {b"m%d" % i for i in range(40)} <= prefix_states(home)[-1]
        assert fs.session.statistics()["resends"] > 0


async def test_a_grant_that_was_not_heard_of_is_given_back():
    home = new_home()
    async with filesystem(home, seed=1, delegate=True) as fs:
        for i in range(5):
            await fs.mkdir(ROOT_INO, b"d%d" % i, 0o755)
        home.volumes[VOLUME].delegate(fs.session.sid)
        async with filesystem(home, seed=2) as other:
            assert b"d4" in await names(other, ROOT_INO)
        assert fs.session.statistics()["delegation"] == 0


async def test_checkpoints_under_the_delegation():
    home = delegating()
    async with holder(home) as fs:
        for i in range(60):
            await write_file(fs, ROOT_INO, b"c%d" % i, b"x" * 100)
            if i % 10 == 9:
                await fs.session.settle()
                home.checkpoint(VOLUME)
                await trio.sleep(0.6)  # the watch brings it
            if i % 10 == 4:
                await fs.unlink(ROOT_INO, b"c%d" % (i - 3))
        there = set(await names(fs, ROOT_INO))
        assert {b"c%d" % i for i in range(60) if i % 10 != 1} <= there
        assert not {b"c1", b"c51"} & there


async def test_too_much_pending_makes_operations_wait(monkeypatch):
    monkeypatch.setattr("dfs.client.delegation.MAX_PENDING", 50_000)
    home = delegating()
    async with holder(home) as fs:
        most = 0
        for i in range(100):
            await write_file(fs, ROOT_INO, b"b%d" % i, bytes(4000))
            most = max(most, fs.session.statistics()["pending"])
        assert 50_000 < most < 70_000


async def test_readers_and_those_who_did_not_ask_hold_nothing():
    home = delegating()
    async with trio.open_nursery() as nursery:
        session = Session(home.client(seed=4), VOLUME, mode="ro", delegate=True)
        await nursery.start(session.run)
        await trio.sleep(3)
        assert not session.here
        nursery.cancel_scope.cancel()
    assert "vol.delegate" not in home.calls


async def test_who_only_looks_asks_too():
    home = delegating()
    async with filesystem(home, seed=1) as fs:
        ino = await write_file(fs, ROOT_INO, b"f", b"x")
    async with filesystem(home, seed=2, delegate=True) as fs:
        home.volumes[VOLUME].close(min(home.volumes[VOLUME].sessions))
        for _ in range(10):
            assert await read_file(fs, ino) == b"x"
            await trio.sleep(0.3)
        assert fs.session.here
        watches = home.calls["vol.watch"]
        for _ in range(20):
            assert await read_file(fs, ino) == b"x"
        assert home.calls["vol.watch"] == watches
