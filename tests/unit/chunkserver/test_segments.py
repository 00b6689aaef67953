"""The segment store: puts, deletion and space, and recovery from every kind of damage."""

import random
from pathlib import Path

import pytest
import trio

from chunkserver import records
from chunkserver.segments import Segments, StoreOptions, room_for
from dfs.chunks import format as chunks
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.errors import Corrupt, DiskFull, NotFound, StoreFailed
from dfs.hashing import crc32
from dfs.testing.chunkcluster import SALT, SimClock
from dfs.testing.disk import SimDisk

DATA = Path(__file__).parents[2] / "data"
SMALL = StoreOptions(segment_size=100_000, reserve=0, hint_every=50_000, inline=4096)
FIRST = "segments/00000001.seg"


def environment(disk=None, seed=1):
    rng = random.Random(seed)
    return Env(SimClock(), disk or SimDisk(rng), None, None, rng)


class Kit:
    """A store and what was put into it."""

    def __init__(self, env, options=SMALL, pages=False):
        self.env = env
        self.pages = pages  # whether chunks are written as pages
        self.options = options
        self.data = {}
        self.rng = random.Random(5)

    async def open(self):
        self.store = await Segments.open(self.env, self.options)
        return self.store

    async def put(self, size=5000, stamp=10):
        data = self.rng.randbytes(size)
        chunk_id, buffers = chunks.encode(data, SALT)
        stored = sum(map(len, buffers))
        pages = None
        if self.pages:
            pages, chunk = room_for(stored)
            chunk[:] = b"".join(buffers)
            buffers = []
        assert await self.store.put(chunk_id, buffers, stored, len(data), stamp, pages=pages)
        self.data[chunk_id] = data
        return chunk_id

    async def fill(self, size):
        while True:
            await self.put(size)

    async def check(self, chunk_id):
        _, buffers = await self.store.read(chunk_id)
        assert chunks.decode(b"".join(buffers), chunk_id) == self.data[chunk_id]

    async def crash(self):
        self.env.disk.crash()
        return await self.open()


@pytest.fixture(params=[False, True], ids=["bytes", "pages"])
def kit(request):
    return Kit(environment(), pages=request.param)


async def test_put_read_and_partial_read(kit):
    await kit.open()
    chunk_id = await kit.put(200_000)
    await kit.check(chunk_id)
    plain, buffers = await kit.store.read(chunk_id, 1, 2)
    got = chunks.decode_range(b"".join(buffers), chunk_id, 65536, 2 * 65536)
    assert plain == 200_000
    assert bytes(got) == kit.data[chunk_id][65536 : 3 * 65536]
    with pytest.raises(NotFound):
        await kit.store.read(bytes(32))


async def test_putting_a_held_chunk_only_renews_its_stamp(kit):
    store = await kit.open()
    chunk_id = await kit.put(stamp=10)
    _, buffers = chunks.encode(kit.data[chunk_id], SALT)
    size = store._active.size
    assert not await store.put(chunk_id, buffers, sum(map(len, buffers)), 5000, 20)
    assert store.index.get(chunk_id).stamp == 20
    assert store._active.size == size + records.RECORD_HEADER
    assert not await store.put(chunk_id, buffers, 1, 5000, 15)  # an older stamp changes nothing
    assert store._active.size == size + records.RECORD_HEADER
    assert await store.touch([chunk_id, bytes(32)], 30) == [True, False]
    await store.close()
    store = await kit.open()
    assert store.index.get(chunk_id).stamp == 30


async def test_a_clean_restart_reads_hints_only(kit):
    store = await kit.open()
    ids = [await kit.put(30_000) for _ in range(10)]
    assert len(store._segments) > 2
    await store.close()
    store = await kit.open()
    assert store.recovery.hashed == 0
    assert (store.recovery.notes, store.recovery.errors) == ([], [])
    assert list(store.index) == sorted(ids)
    for chunk_id in ids:
        await kit.check(chunk_id)


async def test_synced_chunks_survive_power_loss_and_others_are_whole_or_absent():
    lost = torn = 0
    for seed in range(25):
        kit = Kit(environment(seed=seed), pages=bool(seed % 2))
        await kit.open()
        safe = [await kit.put(9000) for _ in range(8)]
        await kit.store.sync()
        loose = [await kit.put(9000) for _ in range(6)]
        await kit.crash()
        for chunk_id in safe:
            await kit.check(chunk_id)
        suspects = {chunk_id for chunk_id, _ in kit.store.recovery.suspects}
        torn += len(suspects) + len(kit.store.recovery.notes)
        for chunk_id in loose:
            if kit.store.held(chunk_id) and chunk_id not in suspects:
                await kit.check(chunk_id)
            else:
                lost += 1
        await kit.put(9000)  # and it can be used
    assert lost
    assert torn


async def test_a_torn_tail_is_cut_and_said(kit):
    store = await kit.open()
    first = await kit.put()
    await kit.store.sync()
    end = store._active.size
    second = await kit.put()
    file = kit.env.disk.open(FIRST)
    file.truncate(end + 3000)
    store = await kit.open()
    assert end - records.ALIGN < store._active.size <= end  # less some padding, if there was any
    assert "torn" in store.recovery.notes[0]
    assert store.held(first)
    assert not store.held(second)


async def test_bad_data_at_the_end_is_cut_and_in_the_middle_is_a_suspect(kit):
    store = await kit.open()
    a, b, c = [await kit.put() for _ in range(3)]
    places = {i: store.index.get(i).offset for i in (a, b, c)}
    kit.env.disk.flip(FIRST, places[a] + 3000)
    kit.env.disk.flip(FIRST, places[c] + 3000)
    store = await kit.open()
    assert [i for i, _ in store.recovery.suspects] == [a]
    assert store.held(b)
    assert not store.held(c)
    assert store._active.size == places[c] - records.RECORD_HEADER


async def test_a_damaged_record_header_is_skipped_and_said(kit):
    store = await kit.open()
    a, b, c = [await kit.put() for _ in range(3)]
    kit.env.disk.flip(FIRST, store.index.get(b).offset - 20)
    store = await kit.open()
    assert [store.held(i) for i in (a, b, c)] == [True, False, True]
    assert "damaged bytes skipped" in store.recovery.errors[0]
    await kit.check(c)


async def test_stored_data_cannot_pose_as_a_record(kit):
    """A tombstone inside user data must not delete, even when the scan passes over the data."""
    store = await kit.open()
    victim = await kit.put()
    forged = records.record_header(crc32(b"guess"), records.TOMBSTONE, victim, 0, 1, 99)
    data = kit.rng.randbytes(1000) + forged * 20 + kit.rng.randbytes(1000)
    chunk_id, buffers = chunks.encode(data, SALT, compress=False)
    await store.put(chunk_id, buffers, sum(map(len, buffers)), len(data), 1)
    kit.env.disk.flip(FIRST, store.index.get(chunk_id).offset - 20)
    store = await kit.open()
    assert store.held(victim)


async def test_a_damaged_hint_costs_a_scan(kit):
    store = await kit.open()
    ids = [await kit.put(30_000) for _ in range(8)]
    await store.close()
    kit.env.disk.flip("segments/00000001.hint", 70)
    store = await kit.open()
    assert "hint" in store.recovery.errors[0]
    assert store.recovery.hashed > 30_000
    for chunk_id in ids:
        await kit.check(chunk_id)


async def test_a_damaged_segment_header_is_read_by_its_hint_or_moved_away(kit):
    store = await kit.open()
    ids = [await kit.put(30_000) for _ in range(8)]
    in_first = {i for i in ids if store.index.get(i).segment == 1}
    await store.close()
    kit.env.disk.flip(FIRST, 3)
    store = await kit.open()
    assert "read by its hint" in store.recovery.errors[0]
    for chunk_id in ids:
        await kit.check(chunk_id)
    await store.close()
    kit.env.disk.unlink("segments/00000001.hint")
    store = await kit.open()
    assert "moved to" in store.recovery.errors[0]
    assert kit.env.disk.listdir("quarantine") == ["00000001.seg"]
    assert {i for i in ids if not store.held(i)} == in_first


async def test_a_vanished_segment_is_told_and_its_chunks_are_suspects(kit):
    store = await kit.open()
    ids = [await kit.put(30_000) for _ in range(8)]
    in_first = sorted(i for i in ids if store.index.get(i).segment == 1)
    await store.close()
    kit.env.disk.unlink(FIRST)
    store = await kit.open()
    assert "is gone" in store.recovery.errors[0]
    assert [i for i, _ in store.recovery.missing] == in_first


async def test_deletion_gives_space_back_and_stays():
    kit = Kit(environment(SimDisk(random.Random(1), capacity=10_000_000)))
    store = await kit.open()
    ids = [await kit.put(30_000) for _ in range(9)]
    now = kit.env.clock.time_ns()
    free = kit.env.disk.usage()[1]
    await store.delete(ids[:4], now)
    assert kit.env.disk.usage()[1] > free + 4 * 20_000  # whole blocks of what was freed
    assert [store.held(i) for i in ids] == [False] * 4 + [True] * 5
    for restart in ("none", "clean", "crash"):
        if restart == "clean":
            await store.close()
            store = await kit.open()
        elif restart == "crash":
            store = await kit.crash()
        assert [store.held(i) for i in ids] == [False] * 4 + [True] * 5
        assert store.condemned(ids[0], now)
        assert not store.condemned(ids[0], now + 1)
        assert not store.recovery.suspects
        for chunk_id in ids[4:]:
            await kit.check(chunk_id)


async def test_segments_are_unlinked_when_nothing_needs_them():
    kit = Kit(environment(), StoreOptions(segment_size=100_000, reserve=0, remember=10**9))
    store = await kit.open()
    ids = [await kit.put(30_000) for _ in range(9)]
    assert len(store._segments) == 3
    await store.drop(ids[:6])
    assert sorted(store._segments) == [3]
    assert kit.env.disk.listdir("segments") == ["00000003.seg"]
    store = await kit.crash()
    assert list(store.index) == sorted(ids[6:])


async def test_a_tombstone_outlives_what_it_kills():
    kit = Kit(environment(), StoreOptions(segment_size=100_000, reserve=0, remember=0))
    store = await kit.open()
    old = [await kit.put(30_000) for _ in range(3)]  # segment 1
    middle = [await kit.put(30_000) for _ in range(2)]  # segment 2
    await store.drop(old[:1])  # its record is in segment 2
    middle.append(await kit.put(30_000))
    rest = [await kit.put(30_000) for _ in range(3)]  # segment 3
    await store.drop(middle)
    assert sorted(store._segments) == [1, 2, 3]  # 2 is empty, but it kills in 1
    store = await kit.crash()
    assert not store.held(old[0])
    await store.drop(old[1:])
    assert sorted(store._segments) == [3]
    assert list(store.index) == sorted(rest)


async def test_a_segment_with_the_newest_stamp_stays():
    kit = Kit(environment(), StoreOptions(segment_size=100_000, reserve=0, remember=0))
    store = await kit.open()
    old = [await kit.put(30_000) for _ in range(3)]
    middle = [await kit.put(30_000) for _ in range(2)]
    await store.touch(old[:1], 77)
    await kit.put(30_000)
    await kit.put(30_000)
    await store.drop(middle)
    assert 2 in store._segments
    store = await kit.crash()
    assert store.index.get(old[0]).stamp == 77


async def test_a_full_disk_refuses_puts_and_allows_deletes():
    rng = random.Random(1)
    kit = Kit(environment(SimDisk(rng, capacity=400_000)))
    store = await kit.open()
    with pytest.raises(DiskFull, match=r"sim:.*bytes free"):
        await kit.fill(30_000)
    ids = list(kit.data)
    assert kit.env.disk.usage()[1] < 60_000
    kit.env.disk.full = True
    with pytest.raises(DiskFull):
        await kit.put(100)
    kit.env.disk.full = False
    await store.delete(ids[:5], 99)
    await kit.put(30_000)
    for chunk_id in ids[5:]:
        await kit.check(chunk_id)


async def test_the_reserve_is_kept_free():
    kit = Kit(
        environment(SimDisk(random.Random(1), capacity=1_000_000)), StoreOptions(reserve=900_000)
    )
    await kit.open()
    with pytest.raises(DiskFull):
        await kit.fill(10_000)
    assert kit.env.disk.usage()[1] >= 900_000 - 1000


async def test_a_failed_sync_stops_writes_and_not_reads(kit):
    store = await kit.open()
    chunk_id = await kit.put()
    kit.env.disk.fail_next("sync", "segments/")
    with pytest.raises(StoreFailed):
        await store.sync()
    for _ in range(2):
        with pytest.raises(StoreFailed):
            await kit.put()
        with pytest.raises(StoreFailed):
            await store.sync()
    await kit.check(chunk_id)


async def test_an_unreadable_copy_is_corrupt_and_can_be_set_aside(kit):
    store = await kit.open()
    chunk_id = await kit.put()
    kit.env.disk.fail_next("read", "segments/", count=2)
    with pytest.raises(Corrupt):
        await store.check(chunk_id)
    assert await store.set_aside(chunk_id, "cannot be read")
    assert not store.held(chunk_id)
    assert kit.env.disk.listdir("quarantine") == [f"{chunk_id.hex()}.bad"]
    store = await kit.crash()
    assert store.quarantine.ids == {chunk_id}
    assert not store.held(chunk_id)


async def test_a_quarantined_copy_keeps_its_bytes_until_healed(kit):
    store = await kit.open()
    chunk_id = await kit.put()
    kit.env.disk.flip(FIRST, store.index.get(chunk_id).offset + 1000)
    with pytest.raises(Corrupt):
        await store.check(chunk_id)
    await store.set_aside(chunk_id, "rotten")
    await store.healed(chunk_id)  # not held: stays listed
    assert kit.env.disk.open(f"quarantine/{chunk_id.hex()}.bad").size() > 5000
    _, buffers = chunks.encode(kit.data[chunk_id], SALT)
    assert await store.put(chunk_id, buffers, sum(map(len, buffers)), 5000, 1)
    await store.healed(chunk_id)
    assert kit.env.disk.listdir("quarantine") == []
    await kit.check(chunk_id)


async def test_concurrent_puts_syncs_and_deletes_agree_with_recovery(kit):
    """The ledger of the running store and that of a restart are the same."""
    store = await kit.open()

    async def writer(n):
        for _ in range(12):
            chunk_id = await kit.put(random.Random(n).randrange(1, 20_000), stamp=n)
            if n % 3 == 0:
                await store.sync()
            if n % 4 == 1:
                await store.delete([chunk_id], 1000)

    async with trio.open_nursery() as nursery:
        for n in range(8):
            nursery.start_soon(writer, n)
    before = dict(store.index.after(b"", 10_000)), dict(store._ledger.dead)
    usage = {n: (u.refs, u.killed) for n, u in store._ledger.segments.items()}
    summary = store.index.summary()
    await store.close()
    store = await kit.open()
    assert (dict(store.index.after(b"", 10_000)), dict(store._ledger.dead)) == before
    assert {n: (u.refs, u.killed) for n, u in store._ledger.segments.items()} == usage
    assert store.index.summary() == summary


@pytest.mark.realtime
async def test_on_a_real_disk(tmp_path):
    disk = RealDisk(tmp_path)
    kit = Kit(
        environment(disk),
        StoreOptions(segment_size=3 << 20, reserve=0, near=100, backfill=100, full=100),
    )
    store = await kit.open()
    ids = [await kit.put(500_000) for _ in range(12)] + [await kit.put(100) for _ in range(5)]
    await store.sync()
    await store.delete(ids[:3], 1 << 62)
    await store.close()
    store = await kit.open()
    for chunk_id in ids[3:]:
        await kit.check(chunk_id)
    used = sum(p.stat().st_blocks * 512 for p in (tmp_path / "segments").iterdir())
    assert used < 9 * 500_000 + 300_000
    await store.close()
    disk.close()


async def test_pages_and_bytes_in_one_segment(kit):
    """Padding is neither a record nor damage, at a start with a hint, without, and after a crash."""
    options = StoreOptions(segment_size=1 << 20, reserve=0, hint_every=1 << 30, inline=4096)
    kit.options = options
    store = await kit.open()
    ids = []
    for n, size in enumerate((5000, 100, 70_000, 3000, 8192, 20_000)):
        kit.pages = n % 2 == 0
        ids.append(await kit.put(size))
        entry = store.index.get(ids[-1])
        if kit.pages:
            assert (entry.offset - records.RECORD_HEADER) % records.ALIGN == 0
            assert store._active.size % records.ALIGN == 0
    await store.sync()
    size = store._active.size
    for stop in (kit.crash, kit.open):
        store = await stop()
        assert (store.recovery.notes, store.recovery.errors) == ([], [])
        assert store._active.size == size
        for chunk_id in ids:
            await kit.check(chunk_id)
    await store.close()
    store = await kit.open()
    assert store.recovery.hashed == 0
    kit.pages = True
    ids.append(await kit.put(30_000))
    await store.sync()
    size = store._active.size
    # Cut within the padding: nothing is missing, and nothing is said.
    kit.env.disk.open(FIRST).truncate(size - 10)
    store = await kit.open()
    assert (store.recovery.notes, store.recovery.errors) == ([], [])
    ids += [await kit.put(100), await kit.put(9000)]
    # Bytes in the padding that are not zeros are damage.
    at = store.index.get(ids[0]).offset + store.index.get(ids[0]).stored + 5
    await store.sync()
    kit.env.disk.flip(FIRST, at)
    kit.env.disk.unlink("segments/00000001.hint")
    store = await kit.open()
    assert any("damaged bytes" in text for text in store.recovery.errors)
    for chunk_id in ids:
        await kit.check(chunk_id)


async def test_a_full_disk_leaves_the_segment_as_it_was(kit):
    env = environment(SimDisk(random.Random(1), capacity=200_000))
    kit.env, kit.options = env, StoreOptions(segment_size=1 << 30, reserve=0, full=100.0)
    store = await kit.open()
    ids = [await kit.put(90_001)]
    env.disk.full = True
    with pytest.raises(DiskFull):
        await kit.put(90_000)
    env.disk.full = False
    ids.append(await kit.put(50_000))
    assert not store.failed
    for chunk_id in ids:
        await kit.check(chunk_id)


def test_golden_segment_with_pages():
    nonce = bytes(range(16))
    seed = crc32(nonce)
    chunk = (DATA / "chunk-v1-zstd.bin").read_bytes()
    parts = [records.segment_header(7, nonce)]
    for n, kind in enumerate((records.PUT, records.TOUCH, records.PUT)):
        put = kind == records.PUT
        if put:
            parts.append(bytes(-sum(map(len, parts)) % records.ALIGN))
        size = len(chunk) if put else 0
        parts.append(records.record_header(seed, kind, bytes([n] * 32), size, 140_000, 5))
        parts += [chunk, bytes(-(len(chunk) + records.RECORD_HEADER) % records.ALIGN)] * put
    segment = b"".join(parts)
    assert segment == (DATA / "segment-v1-pages.bin").read_bytes()
    found = records.scan(
        lambda n, at: segment[at : at + n], records.SEGMENT_HEADER, len(segment), seed
    )
    assert [(r.type, r.offset % records.ALIGN) for r in found.records] == [(1, 0), (3, 0), (1, 0)]
    assert (found.gaps, found.end) == ([], len(segment))


def test_golden_segment_and_hint():
    nonce = bytes(range(16))
    seed = crc32(nonce)
    chunk = (DATA / "chunk-v1-zstd.bin").read_bytes()
    chunk_id = bytes(range(32))
    parts = [records.segment_header(7, nonce)]
    for kind, size, extra in (
        (records.PUT, len(chunk), 140_000),
        (records.TOUCH, 0, 0),
        (records.TOMBSTONE, 0, 7),
        (records.DROP, 0, 3),
    ):
        parts.append(records.record_header(seed, kind, chunk_id, size, extra, 1234567890123456789))
        if size:
            parts.append(chunk)
    segment = b"".join(parts)
    assert segment == (DATA / "segment-v1.bin").read_bytes()
    found = records.scan(
        lambda n, at: segment[at : at + n], records.SEGMENT_HEADER, len(segment), seed
    )
    assert records.parse_segment_header(segment, 7) == nonce
    assert [r.type for r in found.records] == [1, 3, 2, 4]
    assert found.end == len(segment)
    hint = records.encode_hint(
        7, nonce, found.end, b"".join(records.entry(*r) for r in found.records)
    )
    assert hint == (DATA / "segment-hint-v1.bin").read_bytes()
    assert records.decode_hint(hint, 7) == (nonce, found.end, found.records)
    with pytest.raises(Corrupt):
        records.decode_hint(hint, 8)
    with pytest.raises(Corrupt):
        records.parse_segment_header(segment, 8)
