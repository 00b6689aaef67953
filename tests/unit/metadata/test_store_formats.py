"""The files of the store: golden bytes, round trips, and what damage does to each."""

import shutil
from pathlib import Path
from random import Random

import pytest

from dfs.clock import SystemClock
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.errors import Corrupt
from dfs.testing.disk import SimDisk
from dfs.testing.processes import SimProcesses
from metadata.store import bloom, manifest, wal
from metadata.store.cache import BlockCache
from metadata.store.engine import Store
from metadata.store.manifest import Manifest, RunMeta
from metadata.store.memtable import Memtable
from metadata.store.table import FOOTER_SIZE, MISSING, Meta, Table
from metadata.store.tablewriter import write_table

DATA = Path(__file__).parents[2] / "data"
ITEMS = [(b"key%03d" % i, None if i % 7 == 3 else b"value %d " % i * 5) for i in range(40)]


def golden(name, data):
    """Compare with the file; write it when it is not there yet."""
    path = DATA / name
    if not path.exists():
        path.write_bytes(data)
        pytest.fail(f"{path} was missing and has been written: look at it and commit it")
    return path.read_bytes()


def make_table(items=ITEMS, compression=0, block_bytes=300):
    disk = SimDisk(Random(1))
    disk.mkdir("d")
    meta, rest = write_table(
        disk, "d/t.sst", iter(items), block_bytes=block_bytes, compression=compression
    )
    assert rest is None
    return disk, meta


def content(disk, name="d/t.sst"):
    file = disk.open(name)
    return file.pread(file.size(), 0)


def read_all(disk, meta):
    return [
        pair
        for keys, values in Table(disk, "d", meta, 1).scan(b"")
        for pair in zip(keys, values, strict=True)
    ]


# ----------------------------------------------------------------------------------- golden


def test_golden_table():
    disk, meta = make_table()
    assert content(disk) == golden("store-table-1.sst", content(disk))
    plain = sum(len(k) + len(v or b"") for k, v in ITEMS)
    assert meta == Meta("t.sst", len(content(disk)), 40, 6, plain, b"key000", b"key039")


def test_golden_table_of_values_that_expire():
    items = [(k, (v, 1_900_000_000 + i) if v and i % 3 else v) for i, (k, v) in enumerate(ITEMS)]
    disk, meta = make_table(items)
    assert content(disk) == golden("store-table-2.sst", content(disk))
    assert meta.expiring == sum(isinstance(v, tuple) for _, v in items) > 20
    assert meta.expires == max(v[1] for _, v in items if isinstance(v, tuple))
    assert read_all(disk, meta) == items


def test_golden_compressed_table_reads():
    disk, meta = make_table(compression=1)
    data = golden("store-table-1-zstd.sst", content(disk))
    disk.open("d/t.sst", truncate=True).append([data])
    assert read_all(disk, meta._replace(size=len(data))) == ITEMS


BATCHES = [((b"a", b"1"), (b"b", None)), ((b"c", b"x" * 300),), ((b"a", None),)]
EXPIRING = [*BATCHES, ((b"d", (b"short-lived", 1_900_000_000)), (b"e", b""))]


def segment_bytes(batches):
    data = wal.encode_segment_header(7, 1000)
    for i, payload in enumerate(map(wal.pack_batch, batches)):
        data += wal.encode_record(7, 1000 + i, payload) + payload
    return data


@pytest.mark.parametrize(("version", "batches"), [(1, BATCHES), (2, EXPIRING)])
def test_golden_segment(version, batches):
    """Version 2 is written; both are read."""
    data = golden(f"store-segment-{version}.wal", segment_bytes(batches))
    if version == 2:
        assert data == segment_bytes(batches)
    found = wal.read_segment(data, 7, 1000)
    assert found.batches == batches
    assert found.bad == ""
    assert found.end == 1000 + len(data) - len(wal.encode_segment_header(7, 1000))


def test_golden_manifest():
    meta = Meta("00000001-0badcafe.sst", 1234, 10, 2, 999, b"a", b"z\xff", 3, 1_900_000_000)
    lost = ((b"k", b"l", "00000000-1.sst"),)
    value = Manifest(
        12, 5, 77, (RunMeta(0, (meta,), ()), RunMeta(2, (), lost)), ("00000000-1.sst",)
    )
    data = manifest.encode(value)
    assert data == golden("store-manifest-2", data)
    assert manifest.decode(data, "M") == value


def test_manifest_of_version_1_is_read():
    """Its tables have seven fields, its losses no table."""
    meta = Meta("00000001-0badcafe.sst", 1234, 10, 2, 999, b"a", b"z\xff")
    runs = RunMeta(0, (meta,), ()), RunMeta(2, (), ((b"k", b"l", ""),))
    data = (DATA / "store-manifest-1").read_bytes()
    assert manifest.decode(data, "M") == Manifest(12, 5, 77, runs, ("00000000-1.sst",))


def test_golden_filter():
    data = bloom.build(b"".join(bloom.digest(b"key%d" % i) for i in range(100)))
    assert data == golden("store-filter-1", data)


@pytest.mark.realtime
async def test_a_whole_store_of_version_1_opens(tmp_path):
    """Manifest, tables and log as version 1 left them; then everything is written anew."""
    shutil.copytree(DATA / "store-directory-1", tmp_path / "lsm")
    disk = RealDisk(tmp_path)
    random = Random(1)
    env = Env(SystemClock(), disk, None, SimProcesses(random), random)
    expected = {b"key%03d" % i: b"old %d" % i for i in range(60)}
    for i in range(0, 60, 2):
        expected[b"key%03d" % i] = None if i % 3 else b"new %d" % i
    expected |= {b"key001": b"logged", b"key003": None, b"zebra": b"x" * 50}
    live = {k: v for k, v in expected.items() if v is not None}
    for _ in range(2):
        store = await Store.open(env)
        assert dict(store.iterate()) == live
        for key, value in expected.items():
            assert store.get(key) == value
        await store.compact()
        assert dict(store.iterate()) == live
        store.close()
    disk.close()


# ----------------------------------------------------------------------------------- filter


def test_filter_has_no_false_negatives_and_few_false_positives():
    random = Random(1)
    keys = [random.randbytes(33) for _ in range(5000)]
    blocks = bloom.load(bloom.build(b"".join(map(bloom.digest, keys))))

    def test(key):
        n, mask = bloom.key_hash(key)
        return blocks[n % len(blocks)] & mask == mask

    assert all(map(test, keys))
    assert sum(test(random.randbytes(33)) for _ in range(20000)) < 400  # 2 %


# ------------------------------------------------------------------------------------ table


@pytest.mark.parametrize("compression", [0, 1, 3])
@pytest.mark.parametrize("block_bytes", [1, 100, 16384])
def test_table_round_trip(compression, block_bytes):
    random = Random(2)
    keys = sorted({random.randbytes(random.randrange(1, 40)) for _ in range(500)})
    items = [
        (
            k,
            None
            if random.random() < 0.2
            else random.choice([b"", b"x" * 90, random.randbytes(90)]),
        )
        for k in keys
    ]
    items[250] = (keys[250], random.randbytes(1 << 20))
    disk, meta = make_table(items, compression, block_bytes)
    assert read_all(disk, meta) == items
    table, cache = Table(disk, "d", meta, 1), BlockCache(1 << 16)
    for key, value in items:
        assert table.find(key, [], cache) == value
        absent = key + b"\0"
        if absent not in dict(items):
            assert table.find(absent, [], cache) is MISSING
    for start in [b"", *random.choices(keys, k=50), b"\xff" * 50]:
        found = [p for part in table.scan(start) for p in zip(*part, strict=True)]
        assert found == [(k, v) for k, v in items if k >= start]
    cut = table.cut(keys[250])
    assert cut.meta.first == keys[250]
    assert [p for part in cut.scan(b"") for p in zip(*part, strict=True)] == items[250:]


def test_table_stops_when_full():
    disk = SimDisk(Random(1))
    meta, rest = write_table(
        disk, "t", iter(ITEMS), block_bytes=100, compression=0, table_bytes=1000
    )
    assert rest == ITEMS[meta.entries][0]
    assert meta.tombstones == sum(v is None for _, v in ITEMS[: meta.entries])
    assert 1000 <= meta.size < 3000


def test_empty_table_is_no_table():
    disk = SimDisk(Random(1))
    assert write_table(disk, "t", iter([]), block_bytes=100, compression=0) == (None, None)
    assert disk.listdir() == []


@pytest.mark.parametrize("compression", [0, 1])
def test_every_flipped_bit_of_a_table_is_noticed_or_harmless(compression):
    disk, meta = make_table(compression=compression)
    expected = dict(ITEMS)
    noticed = 0
    size = meta.size
    for offset in range(0, size, 3):
        disk.flip("d/t.sst", offset, offset % 8)
        table, cache = Table(disk, "d", meta, 1), BlockCache(1 << 20)
        for key in (*expected, b"key0005", b"z"):
            try:
                value = table.find(key, [], cache)
            except Corrupt:
                noticed += 1
            else:
                assert value == expected.get(key, MISSING)
        disk.flip("d/t.sst", offset, offset % 8)
    assert noticed > size // 3


def test_a_block_elsewhere_is_damage():
    disk, meta = make_table()
    table = Table(disk, "d", meta, 1)
    offsets = table.load().offsets
    file = disk.open("d/t.sst")
    for i in range(1, len(offsets) - 1):
        if offsets[i + 1] - offsets[i] == offsets[1] - offsets[0]:
            break
    file.pwrite(file.pread(offsets[1] - offsets[0], offsets[0]), offsets[i])
    with pytest.raises(Corrupt) as caught:
        table.block(i)
    assert caught.value.details == (i,)


def test_another_version_is_refused():
    disk, meta = make_table()
    data = bytearray(content(disk))
    footer = bytearray(data[-FOOTER_SIZE:-4])
    assert footer[:8] == b"dfs-sst\0"
    footer[8] = 3
    data[-FOOTER_SIZE:] = footer + wal.crc32(footer).to_bytes(4, "little")
    disk.open("d/t.sst", truncate=True).append([data])
    with pytest.raises(Corrupt, match="version 3"):
        Table(disk, "d", meta, 1).load()


# --------------------------------------------------------------------------------- manifest


def test_damaged_manifest_is_refused():
    data = manifest.encode(Manifest(1, 1, 0, (), ()))
    for i in range(len(data)):
        bad = bytearray(data)
        bad[i] ^= 4
        with pytest.raises(Corrupt, match="MAN"):
            manifest.decode(bytes(bad), "MAN")
        with pytest.raises(Corrupt, match="MAN"):
            manifest.decode(data[:i], "MAN")


# -------------------------------------------------------------------------------- memtable


def test_memtable_counts_and_sorts():
    memtable = Memtable([])
    model = {}
    random = Random(4)
    for _ in range(500):
        key = b"%d" % random.randrange(100)
        value = random.choice([None, b"", b"x" * random.randrange(50)])
        memtable.apply([(key, value)])
        model[key] = value
        if random.random() < 0.1:
            assert memtable.sorted_keys() == sorted(model)
    fresh = Memtable([])
    fresh.apply(model.items())
    assert memtable.bytes == fresh.bytes
    copy = memtable.copy()
    memtable.apply([(b"new", b"1")])
    assert b"new" not in copy.sorted_keys()
    assert b"new" not in copy.data


# ----------------------------------------------------------------------------------- cache


def test_cache_keeps_what_is_used_within_its_budget():
    cache = BlockCache(1000)
    cache.put(0, 10, "hot")
    for i in range(1, 1000):
        if cache.get(i % 100 + 1) is None:
            cache.put(i % 100 + 1, 10, i)
        assert cache.get(0) == "hot"
        assert cache.statistics()["bytes"] <= 1000
    cache.put(5000, 501, "too big")
    assert cache.get(5000) is None
    s = cache.statistics()
    assert s["hits"] >= 999
    assert s["misses"] > 500
    assert s["bytes"] == 10 * s["blocks"]
