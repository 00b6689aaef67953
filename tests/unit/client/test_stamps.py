"""Commits tell how long ago the chunks they name were put: else they could be collected before."""

import contextlib
import random
from functools import partial

import pytest
import trio

from dfs.cli.client import DedupChunks
from dfs.client import chunkio, files
from dfs.client.chunkio import ChunkClient
from dfs.client.filesystem import FileSystem
from dfs.client.registry import make_root
from dfs.client.session import Session
from dfs.errors import FsError, NoQuorum
from dfs.testing.chunkcluster import ChunkCluster, SimClock
from dfs.testing.fakevolume import chunks_named
from dfs.testing.network import SimNetwork
from tests.unit.client.support import VOLUME, filesystem, new_home

WINDOW = 4 << 20


class SkewedClock(SimClock):
    """A wall clock that is `ahead` seconds ahead of the cluster's."""

    def __init__(self, ahead):
        self.ahead = ahead

    def time_ns(self):
        return super().time_ns() + int(self.ahead * 1e9)


class Stand:
    """A file system on simulated chunkservers, and what its commits said."""

    def __init__(self, fs, servers, chunks):
        self.fs, self.servers, self.chunks = fs, servers, chunks
        self.commits = []  # (age in seconds, ids of the chunks it names)

    async def watched(self, handle, method, args):
        if method == "vol.commit":
            named = set().union(*(chunks_named(effects) for _, _, effects in args[5]))
            if named:
                self.commits.append((self.check(-args[6], named), named))
        return await handle(method, args)

    def check(self, age, named):
        """No commit may say that its chunks are younger than W servers know them to be; seconds."""
        assert age > 0
        for chunk_id in named:
            entries = [node.store.index.get(chunk_id) for node in self.servers.nodes.values()]
            stamps = sorted((e.stamp for e in entries if e is not None), reverse=True)
            # A request is a moment old when it arrives.
            assert self.servers.clock.time_ns() - stamps[1] <= age + 10**9
        return age / 1e9

    def crash(self):
        """Two servers of three: nothing can be put."""
        self.servers.crash(1)
        self.servers.crash(2)

    async def restart(self):
        await self.servers.start(1)
        await self.servers.start(2)


@contextlib.asynccontextmanager
async def on_chunkservers(*, client_class=ChunkClient, skew=0.0):
    """A `Stand`; wall clocks follow the virtual one, the client's is `skew` seconds ahead."""
    rng, clock, home = random.Random(1), SimClock(), new_home()
    wrong = SkewedClock(skew)
    cluster = home.client(clock=wrong)
    async with SimNetwork(rng, clock) as network, trio.open_nursery() as nursery:
        servers = ChunkCluster(rng, network, clock, nursery, 3)
        await servers.start_all()
        chunks = servers.client(client_class=client_class)
        chunks.clock = wrong
        session = Session(cluster, VOLUME, mode="rw", name="test", delegate=False)
        await nursery.start(session.run)
        await session.transact(lambda txn: make_root(txn, 1))
        fs = FileSystem(session, chunks)
        await nursery.start(fs.run)
        stand = Stand(fs, servers, chunks)
        home.handle = partial(stand.watched, home.handle)
        yield stand
        nursery.cancel_scope.cancel()


async def make(fs, name):
    _, fh = await fs.create(1, name, 0o644)
    return fh


async def fsynced(fs, fh):
    """Sync a file whose write-back may have failed before."""
    with contextlib.suppress(FsError):
        await fs.fsync(fh)
    await fs.fsync(fh)


@pytest.mark.parametrize("delay", [1.0, 240.0])
async def test_a_commit_carries_the_stamp_of_its_oldest_chunk_however_late_it_comes(delay):
    async with on_chunkservers() as stand:
        fs, servers = stand.fs, stand.servers
        fh = await make(fs, b"late")
        await fs.write(fh, 0, servers.random.randbytes(WINDOW))
        await trio.sleep(0.3)
        await stand.chunks.sync()  # as barriers in the background do
        stand.crash()
        await fs.write(fh, WINDOW, servers.random.randbytes(50_000))
        await trio.sleep(delay)
        assert not stand.commits
        await stand.restart()
        await fsynced(fs, fh)
        [(age, named)] = stand.commits
        assert len(named) == 2
        assert delay < age < delay + 60
        await fs.release(fh)


@pytest.mark.parametrize("hours", [-500_000, -13, -1, 1, 13])
async def test_a_client_whose_clock_is_wrong_commits_and_what_it_put_is_not_old(hours):
    async with on_chunkservers(skew=hours * 3600.0) as stand:
        fs, servers = stand.fs, stand.servers
        fh = await make(fs, b"skewed")
        began = servers.clock.time_ns()
        await fs.write(fh, 0, servers.random.randbytes(WINDOW))
        await fs.fsync(fh)
        [(age, named)] = stand.commits
        assert age < 10
        for chunk_id in named:  # else a collector would take it for forgotten, or keep it for ever
            for node in servers.nodes.values():
                entry = node.store.index.get(chunk_id)
                assert entry is None or began <= entry.stamp <= servers.clock.time_ns()
        await stand.chunks.touch(named)
        assert (
            max(n.store.index.get(c).stamp for n in servers.nodes.values() for c in named) > began
        )
        await fs.release(fh)


@pytest.mark.parametrize("step", [-13 * 3600.0, 13 * 3600.0])
async def test_a_clock_that_is_set_while_a_chunk_waits_changes_nothing(step):
    async with on_chunkservers() as stand:
        fs, servers = stand.fs, stand.servers
        fh = await make(fs, b"late")
        await fs.write(fh, 0, servers.random.randbytes(WINDOW))
        await trio.sleep(0.3)
        await stand.chunks.sync()
        stand.crash()
        await fs.write(fh, WINDOW, servers.random.randbytes(50_000))
        stand.chunks.clock.ahead = step
        await trio.sleep(100)
        await stand.restart()
        await fsynced(fs, fh)
        [(age, _)] = stand.commits
        assert 100 < age < 160
        await fs.release(fh)


async def test_chunks_that_waited_too_long_for_their_commit_are_put_again():
    async with on_chunkservers() as stand:
        fs, servers = stand.fs, stand.servers
        fh = await make(fs, b"late")
        await fs.write(fh, 0, servers.random.randbytes(WINDOW))
        await trio.sleep(0.3)
        await stand.chunks.sync()
        [file] = fs.files._files.values()
        [upload] = {segment.source for segment in file.buffer}
        stand.crash()
        await fs.write(fh, WINDOW, servers.random.randbytes(50_000))
        await trio.sleep(60)
        upload.stamp -= int(files.RENEW * 1e9)  # stands for a day of trying
        await stand.restart()
        await fsynced(fs, fh)
        [(age, named)] = stand.commits
        assert len(named) == 2
        assert age < 60
        await fs.release(fh)


async def test_a_server_that_restarted_before_the_barrier_has_the_chunk_again_and_not_older():
    async with on_chunkservers() as stand:
        fs, servers = stand.fs, stand.servers
        fh = await make(fs, b"lost")
        await fs.write(fh, 0, servers.random.randbytes(WINDOW))
        await trio.sleep(0.3)
        stand.crash()  # what was not synced is gone
        await stand.restart()
        await fsynced(fs, fh)
        assert stand.chunks.statistics()["reputs"] == 1
        [(_, named)] = stand.commits
        assert len(named) == 1
        await fs.release(fh)


async def test_equal_data_of_two_files_each_with_its_own_stamp():
    async with on_chunkservers() as stand:
        fs, servers = stand.fs, stand.servers
        data = servers.random.randbytes(WINDOW)
        first, second = await make(fs, b"first"), await make(fs, b"second")
        await fs.write(first, 0, data)
        await trio.sleep(0.3)
        await stand.chunks.sync()
        stand.crash()
        await fs.write(first, WINDOW, servers.random.randbytes(50_000))
        await trio.sleep(200)
        await stand.restart()
        await fs.write(second, 0, data)
        await fs.fsync(second)
        await fsynced(fs, first)
        ages = [age for age, _ in stand.commits]
        assert min(ages) < 60
        assert max(ages) > 200
        assert len(set().union(*(named for _, named in stand.commits))) == 2
        for fh in (first, second):
            await fs.release(fh)


async def test_a_chunk_that_was_touched_and_not_put_counts_from_the_touch():
    async with on_chunkservers(client_class=DedupChunks) as stand:
        fs, servers = stand.fs, stand.servers
        data = servers.random.randbytes(WINDOW)
        for name in (b"first", b"second"):
            fh = await make(fs, name)
            await fs.write(fh, 0, data)
            await fs.fsync(fh)
            await fs.release(fh)
            await trio.sleep(100)
        assert stand.chunks.known_bytes == WINDOW
        assert [age < 1 for age, _ in stand.commits] == [True, True]


@pytest.mark.parametrize("lie", [0, 3600 * 10**9])
async def test_the_fake_home_finds_a_commit_that_says_its_chunks_are_younger(lie, monkeypatch):
    store = files.Files._store

    async def lying(self, buffer):
        segments, oldest = await store(self, buffer)
        await trio.sleep(1800)
        return segments, oldest + lie if lie else 0

    monkeypatch.setattr(files.Files, "_store", lying)
    found = pytest.RaisesExc(AssertionError, match="its commit says")
    with pytest.RaisesGroup(found, flatten_subgroups=True):
        async with filesystem(new_home()) as fs:
            fh = await make(fs, b"a")
            await fs.write(fh, 0, bytes(100_000))
            await fs.fsync(fh)


async def test_what_restarted_servers_lost_is_put_again_a_few_at_a_time():
    async with on_chunkservers() as stand:
        client, servers = stand.chunks, stand.servers
        ids = [await client.put(servers.random.randbytes(3000)) for _ in range(30)]
        stand.crash()
        await stand.restart()
        under_way, most = 0, 0
        send = client._send

        async def counted(put):
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            try:
                await send(put)
            finally:
                under_way -= 1

        client._send = counted
        await client.sync()
        assert client.statistics()["reputs"] == len(ids)
        assert client.statistics()["unsynced"] == client.statistics()["unsynced_bytes"] == 0
        assert most == chunkio.AGAIN
        stand.crash()
        await stand.restart()  # what the barrier proved survives that
        for chunk_id in ids:
            assert len(await client.read(chunk_id, 0, 3000)) == 3000


async def test_a_barrier_that_fails_keeps_what_is_not_proven_and_tries_it_all_again():
    async with on_chunkservers() as stand:
        client, servers = stand.chunks, stand.servers
        ids = [await client.put(servers.random.randbytes(3000)) for _ in range(30)]
        stand.crash()
        with pytest.raises(NoQuorum):
            await client.sync()
        assert client.statistics()["unsynced"] == len(ids)
        await stand.restart()
        await client.sync()
        assert client.statistics()["unsynced"] == client.statistics()["unsynced_bytes"] == 0
