"""Reads from the disks of our own host: real files, real sockets, and everything that can go wrong."""

import os
import random
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from chunkserver.segments import StoreOptions
from chunkserver.service import ChunkNode
from dfs.buffers import PAGE, allocate, allocate_aligned
from dfs.client import shortcut
from dfs.client.chunkio import ChunkClient
from dfs.clock import SystemClock
from dfs.cluster.map import CHUNK, ClusterMap, Node, Params
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.errors import InvalidArgument, NotFound
from dfs.hashing import partition_of
from dfs.rpc.descriptors import DescriptorServer, machine
from dfs.rpc.endpoint import RpcEndpoint

pytestmark = pytest.mark.realtime
ID = b"shortcut tests.."
SIZE = 1_000_003


class World:
    """Three chunkservers of one process on real disks, and a client."""

    def __init__(self, path, nursery, count):
        self.path = path
        self.nursery = nursery
        self.count = count
        self.random = random.Random(1)
        self.clock = SystemClock()
        nodes = tuple(
            Node(
                number=i, node_id=bytes([i]) * 16, name=f"n{i}", zone=f"z{i}", rack="r", host="h",
                metadata_addr=f"unix://{path}/m{i}", chunk_addr=f"unix://{path}/c{i}",
                metadata_weight=1.0, chunk_weight=1.0,
            )
            for i in range(1, count + 1)
        )  # fmt: skip
        self.map = ClusterMap.create(ID, nodes, params=Params(n=count, w=1, r=count, pw=1))
        self.nodes = {}
        self.scopes = {}
        self.client = None

    def endpoint(self, name):
        return RpcEndpoint(cluster_id=ID, name=name, clock=self.clock, random=self.random)

    async def start(self, number):
        rpc = self.endpoint(f"n{number}")
        disk = RealDisk(self.path / f"n{number}")
        env = Env(self.clock, disk, rpc, None, self.random)
        options = StoreOptions(
            segment_size=4 << 20, reserve=0, remember=0, full=99.9, backfill=99.8
        )
        node = self.nodes[number] = ChunkNode(env, number, lambda: self.map, options=options)

        async def run(*, task_status):
            with trio.CancelScope() as scope:
                self.scopes[number] = scope
                async with trio.open_nursery() as nursery:
                    await nursery.start(rpc.run)
                    await nursery.start(node.run, self.map.address(CHUNK, number))
                    task_status.started()

        await self.nursery.start(run)

    async def stop(self, number):
        self.scopes.pop(number).cancel()
        await settle(lambda: not (self.path / f"c{number}").exists())

    async def connect(self, **options):
        rpc = self.endpoint("client")
        await self.nursery.start(rpc.run)
        client = ChunkClient(
            rpc, lambda: self.map, self.clock, salt=b"s" * 16, random=self.random, **options
        )
        await self.nursery.start(client.run)
        return client

    async def put(self, data):
        chunk_id = await self.client.put(data)
        await self.client.sync()
        await settle(lambda: not self.client.statistics()["in_flight"])
        return chunk_id

    async def opened(self, chunk_id):
        """Read until it is read directly."""
        with trio.fail_after(5):
            while not self.client.statistics()["local_reads"]:
                await self.client.read(chunk_id, 0, 70_000)
                await trio.sleep(0.01)
        return self.client.statistics()["local_reads"]

    def held(self):
        """Segments that are open for reading only, which is what a client does."""
        found = 0
        for fd in Path("/proc/self/fd").iterdir():
            try:
                link = str(fd.readlink())
                info = Path(f"/proc/self/fdinfo/{fd.name}").read_text()
            except FileNotFoundError:
                continue
            flags = int(info.split("flags:")[1].split()[0], 8)
            found += str(self.path) in link and ".seg" in link and flags & 3 == os.O_RDONLY
        return found

    def segment_of(self, number, chunk_id):
        """Path of the segment, and the chunk's offset in it."""
        entry = self.nodes[number].store.index.get(chunk_id)
        return self.path / f"n{number}" / "segments" / f"{entry.segment:08}.seg", entry


async def settle(condition):
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - waits for the kernel or another process
            await trio.sleep(0.005)


@asynccontextmanager
async def world(path, count=1, **options):
    async with trio.open_nursery() as nursery:
        made = World(path, nursery, count)
        for number in range(1, count + 1):
            await made.start(number)
        made.client = await made.connect(**options)
        yield made
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["random", "text", "mixed"])
async def test_every_range_is_what_was_written(tmp_path, kind):
    async with world(tmp_path) as w:
        rng = random.Random(2)
        text = b"the same again and again " * (SIZE // 25 + 1)
        noise = rng.randbytes(SIZE)
        data = {"random": noise, "text": text[:SIZE], "mixed": (text[:200_000] + noise)[:SIZE]}[
            kind
        ]
        chunk_id = await w.put(data)
        before = await w.opened(chunk_id)
        gets = w.client.statistics()["reads"]
        ranges = [
            (0, SIZE),
            (1, SIZE - 1),
            (65_536, 65_536),
            (SIZE - 1, 1),
            (0, 65_537),
            (400_000, 0),
        ]
        for _ in range(40):
            offset = rng.randrange(SIZE)
            ranges.append((offset, rng.randrange(1, SIZE - offset + 1)))
        wanted = 0
        for offset, length in ranges:
            assert bytes(await w.client.read(chunk_id, offset, length)) == data[offset:][:length]
            wanted += offset + length > 65_536 and length > 0
            at_once = w.client.read_nowait(chunk_id, offset, min(length, 65_536))
            assert at_once is None or bytes(at_once) == data[offset:][: min(length, 65_536)]
        statistics = w.client.statistics()
        assert statistics["local_reads"] >= before + wanted
        assert statistics["reads"] - gets <= len(ranges) - wanted
        for offset, length in ((SIZE, 1), (SIZE - 5, 6), (-1, 5)):
            with pytest.raises(InvalidArgument):
                await w.client.read(chunk_id, offset, length)


async def test_small_reads_need_no_thread_when_the_kernel_has_the_bytes(tmp_path):
    async with world(tmp_path) as w:
        data = random.Random(2).randbytes(SIZE)
        chunk_id = await w.put(data)
        assert w.client.read_nowait(chunk_id, 0, 10) is None  # its place is not known yet
        await w.opened(chunk_id)
        await w.client.read(chunk_id, 131_072, 65_536)
        assert bytes(w.client.read_nowait(chunk_id, 131_072, 65_536)) == data[131_072:196_608]
        assert w.client.read_nowait(bytes(32), 0, 10) is None
        assert w.client.read_nowait(chunk_id, SIZE, 10) is None


async def test_without_o_direct(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "no O_DIRECT here")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    async with world(tmp_path) as w:
        data = random.Random(2).randbytes(SIZE)
        chunk_id = await w.put(data)
        await w.opened(chunk_id)
        assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
        assert w.held() == 1


async def test_another_machine_reads_over_the_network(tmp_path):
    for options in ({"machine": b"another"}, {"machine": b""}):
        async with world(tmp_path, **options) as w:
            data = random.Random(2).randbytes(SIZE)
            chunk_id = await w.put(data)
            for _ in range(3):
                assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
                await trio.sleep(0.02)
            assert w.client.statistics()["local_reads"] == 0
            assert w.held() == 0


async def test_a_server_that_ends_takes_its_descriptors_along(tmp_path):
    async with world(tmp_path, 2) as w:
        data = random.Random(2).randbytes(SIZE)
        chunk_id = await w.put(data)
        await w.opened(chunk_id)
        assert w.held() == 2
        (place,) = w.client._reader.shortcut._places.values()
        other = 3 - place.node
        await w.stop(place.node)
        await settle(lambda: w.held() == 0)
        assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data  # from the other one
        await w.stop(other)
        await settle(lambda: w.held() == 0)
        await w.start(place.node)
        with trio.fail_after(10):
            while not w.held():  # it is back: its door is found again by itself
                assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
                await trio.sleep(0.1)


async def test_a_server_that_stands_still_does_not_stop_readers(tmp_path):
    async with world(tmp_path) as w:
        data = random.Random(2).randbytes(SIZE)
        chunk_id = await w.put(data)
        await w.opened(chunk_id)

        async def silent(*_args, **_options):
            await trio.sleep_forever()

        w.client._reader.shortcut._rpc.call = silent
        w.client._reader._rpc.request = None  # would raise
        with trio.fail_after(3):
            assert bytes(await w.client.read(chunk_id, 5, SIZE - 5)) == data[5:]


async def test_a_deleted_chunk_is_not_found_and_its_segment_given_back(tmp_path):
    async with world(tmp_path) as w:
        rng = random.Random(2)
        datas = [rng.randbytes(SIZE) for _ in range(9)]  # more than two segments
        ids = [await w.put(d) for d in datas]
        await w.opened(ids[0])
        for chunk_id, data in zip(ids, datas, strict=True):
            assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
        assert w.held() == 6
        store = w.nodes[1].store
        await store.delete([ids[0]], w.clock.time_ns())
        with pytest.raises(NotFound):  # punched: the descriptor shows zeros, which nobody gets
            await w.client.read(ids[0], 100_000, 200_000)
        assert w.client.read_nowait(ids[0], 0, 65_536) is None
        assert w.client.statistics()["local_corrupt"] == 0  # gone is not bad
        await store.delete(ids[1:4], w.clock.time_ns())
        await trio.sleep(0.01)
        await store.delete([ids[4]], w.clock.time_ns())  # reaps what is empty and old
        await settle(lambda: w.held() < 6)
        for chunk_id, data in zip(ids[5:], datas[5:], strict=True):
            assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
        # The same chunk at another place: what is remembered of the old one does no harm.
        assert await w.put(datas[0]) == ids[0]
        assert bytes(await w.client.read(ids[0], 0, SIZE)) == datas[0]


async def test_a_bad_copy_is_reported_and_repaired_and_never_returned(tmp_path):
    async with world(tmp_path, 2) as w:
        data = random.Random(2).randbytes(SIZE)
        chunk_id = await w.put(data)
        await w.opened(chunk_id)
        (place,) = w.client._reader.shortcut._places.values()
        path, entry = w.segment_of(place.node, chunk_id)
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"rotten", entry.offset + 500_000)
        os.fsync(fd)
        os.close(fd)
        assert w.client.read_nowait(chunk_id, 458_752, 65_536) is None
        assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
        assert w.client.statistics()["local_corrupt"] == 1
        await settle(
            lambda: w.nodes[place.node].repair.queue or w.nodes[place.node].store.held(chunk_id)
        )
        w.nodes[place.node].repair.wake()
        await settle(
            lambda: (
                w.nodes[place.node].store.held(chunk_id)
                and not w.nodes[place.node].store.quarantine.ids
            )
        )
        for _ in range(5):
            assert bytes(await w.client.read(chunk_id, 400_000, 300_000)) == data[400_000:700_000]


async def test_a_bad_header_is_reported_too(tmp_path):
    async with world(tmp_path, 2) as w:
        data = random.Random(2).randbytes(SIZE)
        await w.opened(await w.put(b"warm" + data[4:]))
        chunk_id = await w.put(data)
        for number in (1, 2):  # whichever is asked
            if number not in w.map.homes(CHUNK, partition_of(chunk_id))[:1]:
                continue
            path, entry = w.segment_of(number, chunk_id)
            fd = os.open(path, os.O_WRONLY)
            os.pwrite(fd, b"x", entry.offset + 300)
            os.close(fd)
        for _ in range(20):
            assert bytes(await w.client.read(chunk_id, 0, SIZE)) == data
            await trio.sleep(0.02)
        statistics = w.client.statistics()
        assert statistics["local_corrupt"] + statistics["corrupt"] <= 4


async def test_places_are_forgotten_in_order_of_use(tmp_path, monkeypatch):
    monkeypatch.setattr(shortcut, "PLACES", 2)
    async with world(tmp_path) as w:
        rng = random.Random(3)
        datas = [rng.randbytes(70_000) for _ in range(4)]
        ids = [await w.put(d) for d in datas]
        await w.opened(ids[0])
        for chunk_id, data in zip(ids * 2, datas * 2, strict=True):
            assert bytes(await w.client.read(chunk_id, 0, 70_000)) == data
        assert w.client.statistics()["local_places"] == 2


async def test_readers_of_one_chunk_look_for_it_once(tmp_path):
    async with world(tmp_path) as w:
        data = random.Random(2).randbytes(SIZE)
        await w.opened(await w.put(b"other" + data[5:]))
        chunk_id = await w.put(data)
        before = w.client.statistics()["local_locates"]

        async def read(offset):
            assert bytes(await w.client.read(chunk_id, offset, 100_000)) == data[offset:][:100_000]

        async with trio.open_nursery() as nursery:
            for k in range(9):
                nursery.start_soon(read, k * 100_000)
        assert w.client.statistics()["local_locates"] == before + 1


def test_buffers_have_their_size_and_place():
    for size in (0, 1, 100_000):
        assert len(allocate(size)) == size
        view = allocate_aligned(size)
        assert len(view) == size
        view[:] = bytes(size)
    assert os.sysconf("SC_PAGE_SIZE") == PAGE


def test_this_machine_is_known():
    assert machine()


def test_short_reads_stay_in_the_loop_while_the_medium_is_quick(monkeypatch):
    now, took = 0.0, 0.0001

    def clock():
        return now

    def pull(*args):
        nonlocal now
        now += took
        return args

    monkeypatch.setattr(shortcut, "perf_counter", clock)
    quick = shortcut._Quick()
    for _ in range(shortcut.READS):
        assert not quick.inline(4096)
        assert quick.timed(pull, 1, 2) == (1, 2)
    assert quick.inline(4096)
    assert quick.inline(shortcut.SHORT)
    assert not quick.inline(shortcut.SHORT + 1)
    took = 1.0  # one stall, and it has to prove itself again
    quick.timed(pull)
    took = 0.0001
    for _ in range(shortcut.READS - 1):
        assert not quick.inline(4096)
        quick.timed(pull)
    quick.timed(pull)
    assert quick.inline(4096)
    took = 0.005  # slow, but no stall: when most of the last ones were
    for n in range(shortcut.READS):
        assert quick.inline(4096) == (n < shortcut.READS // 2)
        quick.timed(pull)


async def test_cold_short_reads_of_a_quick_medium_need_no_thread(tmp_path):
    async with world(tmp_path) as w:
        data = random.Random(2).randbytes(SIZE)
        chunk_id = await w.put(data)
        await w.opened(chunk_id)
        local = w.client._reader.shortcut
        assert not local._quick.inline(4096)
        for k in range(shortcut.READS + 1):  # the slow way, on threads
            assert bytes(await w.client.read(chunk_id, 65_536 + k, 100)) == data[65_536 + k :][:100]
        local._quick._quick = True  # whatever this machine's disk is like
        (place,) = local._places.values()
        os.posix_fadvise(place.file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for k in range(0, SIZE - 65_536, 65_536):
            assert bytes(w.client.read_nowait(chunk_id, k, 65_536)) == data[k : k + 65_536]


def _unverified(place, offset, length, _flags):
    """What is read is what is returned."""
    return os.pread(place.file.fd, length, place.base + offset)


@pytest.mark.parametrize("mutant", ["", "unverified", "never revoked", "never reported"])
async def test_what_keeps_readers_and_space_safe_is_missed_when_it_is_gone(
    tmp_path, monkeypatch, mutant
):
    if mutant == "unverified":
        monkeypatch.setattr(shortcut, "_pull", _unverified)
    if mutant == "never revoked":
        monkeypatch.setattr(DescriptorServer, "revoke", lambda _self, _number: None)
    if mutant == "never reported":

        async def good(*_args):
            return False

        monkeypatch.setattr(shortcut.Shortcut, "_is_bad", good)
    wrong = []
    async with world(tmp_path, 2) as w:
        rng = random.Random(2)
        datas = [rng.randbytes(SIZE) for _ in range(6)]
        ids = [await w.put(d) for d in datas]
        await w.opened(ids[0])
        for chunk_id in ids:
            await w.client.read(chunk_id, 0, SIZE)
        node = w.client._reader.shortcut._places[ids[0]].node
        path, entry = w.segment_of(node, ids[0])
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"rotten", entry.offset + 500_000)
        os.close(fd)
        if bytes(await w.client.read(ids[0], 400_000, 300_000)) != datas[0][400_000:700_000]:
            wrong.append("unverified")
        elif not w.client.statistics()["local_corrupt"]:
            wrong.append("never reported")
        held = w.held()
        for server in w.nodes.values():
            await server.store.delete(ids, w.clock.time_ns())
            await trio.sleep(0.01)
            await server.store.delete([bytes(32)], w.clock.time_ns())  # reaps
        with trio.move_on_after(1):
            while w.held() >= held:  # noqa: ASYNC110 - waits for the kernel
                await trio.sleep(0.01)
        if w.held() >= held:
            wrong.append("never revoked")
    assert wrong == ([mutant] if mutant else [])
