"""The store beside RocksDB and LMDB, same data and same promises, in one run.

    python tests/bench/store.py [--directory D] [--only dfs,rocksdb,lmdb] [--scale 0.1]

Every engine loads the same batches in the same order and syncs after each, then answers the same
reads; each runs in a process of its own, so that the memory shown is its own.  Caches of blocks
have 64 MiB in all of them, except that LMDB has none but the page cache.  RocksDB has a Bloom
filter of 12 bits per key, a write buffer of 64 MiB and zstd, as the store has; LMDB maps the file
and keeps everything plain.  RocksDB and LMDB are not needed to use dfs: `pip install -e .[bench]`.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))

import trio

from dfs.clock import SystemClock
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.rpc.processes import WorkerProcesses
from metadata.store.engine import Store
from metadata.store.options import StoreOptions

CACHE = 64 << 20
# name, keys, bytes of a value, keys per batch
DATA = {"1 M x 100 B": (1_000_000, 100, 100), "100 k x 4 KiB": (100_000, 4096, 25)}
ENGINES = ("dfs", "rocksdb", "lmdb")
ROWS = (
    ("load", "puts/s, batches of {batch}, each synced"),
    ("cached", "gets/s, a thousand neighbouring keys"),
    ("zipf", "gets/s, zipfian over all keys"),
    ("uniform", "gets/s, uniform over all keys"),
    ("absent", "gets/s of absent keys"),
    ("scan", "items/s, all in key order"),
    ("pages", "items/s, ranges of 100"),
    ("disk", "MiB on disk"),
    ("rss", "MiB of memory, peak"),
    ("cpu", "s of processor time for the load"),
)


class Plan:
    """Keys, values and reads, the same for every engine."""

    def __init__(self, name, scale):
        count, self.size, self.batch = DATA[name]
        self.count = int(count * scale)
        random = Random(name)
        self.sorted = [b"user%012d" % (i * 37) for i in range(self.count)]
        self.keys = random.sample(self.sorted, self.count)
        # hexadecimal digits: about as compressible as records are
        self.values = [random.randbytes(self.size // 2).hex().encode() for _ in range(5000)]
        weights, total = [], 0.0
        for rank in range(1, self.count + 1):
            total += 1 / rank**0.99
            weights.append(total)
        reads = int(200_000 * scale) if self.size < 1000 else int(100_000 * scale)
        self.zipf = random.choices(self.keys, cum_weights=weights, k=reads)
        self.uniform = random.choices(self.keys, k=reads // 2)
        self.absent = [k + b"x" for k in random.choices(self.keys, k=reads // 2)]
        middle = self.count // 2
        self.cached = random.choices(self.sorted[middle : middle + 1000], k=reads)
        self.starts = random.choices(self.sorted[:-100], k=1000)

    def batches(self):
        values = self.values
        for i in range(0, self.count, self.batch):
            keys = self.keys[i : i + self.batch]
            yield [(k, values[(i + j) % len(values)]) for j, k in enumerate(keys)]


class Measure:
    def __init__(self):
        self.numbers = {}

    def rate(self, name, function, count):
        start = time.perf_counter()
        got = function()
        self.numbers[name] = count / (time.perf_counter() - start)
        return got


def reads(plan, measure, get, scan, page):
    """The reads, after the load; `get` may return anything that is None for an absent key."""
    found = sum(get(k) is not None for k in plan.cached)
    assert found == len(plan.cached)

    def point(keys):
        n = 0
        for key in keys:
            if get(key) is not None:
                n += 1
        return n

    assert measure.rate("cached", lambda: point(plan.cached), found) == found
    for name, keys in (("uniform", plan.uniform), ("zipf", plan.zipf)):
        assert measure.rate(name, partial(point, keys), len(keys)) == len(keys)
    assert measure.rate("absent", lambda: point(plan.absent), len(plan.absent)) == 0
    assert measure.rate("scan", lambda: sum(1 for _ in scan()), plan.count) == plan.count
    pages = lambda: sum(len(page(start)) for start in plan.starts)
    assert measure.rate("pages", pages, 100 * len(plan.starts)) == 100 * len(plan.starts)


async def run_dfs(directory, plan, measure):
    options = StoreOptions(cache_bytes=CACHE)
    async with WorkerProcesses() as processes:
        disk = RealDisk(Path(directory))
        env = Env(SystemClock(), disk, None, processes, Random(1))
        store = await Store.open(env, options=options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            batches = list(plan.batches())
            start = time.perf_counter()
            for batch in batches:
                await store.batch(batch)
            measure.numbers["load"] = plan.count / (time.perf_counter() - start)
            measure.numbers["cpu"] = cpu()
            del batches
            await store.flush()
            for _ in range(1200):  # let the merges of the load end, at most a minute
                if not store.lsm()["pending_merge"]:
                    break
                await trio.sleep(0.05)
            reads(
                plan,
                measure,
                store.get,
                store.iterate,
                lambda start: store.scan(b"", after=start[:-1], limit=100),
            )
            print(json.dumps(store.lsm()), file=sys.stderr)
            nursery.cancel_scope.cancel()
        disk.close()


def run_rocksdb(directory, plan, measure):
    from rocksdict import (
        BlockBasedOptions,
        Cache,
        DBCompressionType,
        Options,
        Rdict,
        WriteBatch,
        WriteOptions,
    )

    options = Options(raw_mode=True)
    options.set_write_buffer_size(64 << 20)
    options.set_compression_type(DBCompressionType.zstd())
    table = BlockBasedOptions()
    table.set_bloom_filter(12, False)
    table.set_block_cache(Cache(CACHE))
    options.set_block_based_table_factory(table)
    db = Rdict(directory, options)
    synced = WriteOptions()
    synced.sync = True
    batches = list(plan.batches())
    start = time.perf_counter()
    for batch in batches:
        writes = WriteBatch(raw_mode=True)
        for key, value in batch:
            writes.put(key, value)
        db.write(writes, synced)
    measure.numbers["load"] = plan.count / (time.perf_counter() - start)
    measure.numbers["cpu"] = cpu()
    del batches
    db.flush()

    def page(start):
        found = []
        for item in db.items(from_key=start):
            found.append(item)
            if len(found) == 100:
                break
        return found

    reads(plan, measure, db.get, db.items, page)
    db.close()


def run_lmdb(directory, plan, measure):
    import lmdb

    db = lmdb.open(directory, map_size=8 << 30)
    batches = list(plan.batches())
    start = time.perf_counter()
    for batch in batches:
        with db.begin(write=True) as writes:
            for key, value in batch:
                writes.put(key, value)
    measure.numbers["load"] = plan.count / (time.perf_counter() - start)
    measure.numbers["cpu"] = cpu()
    del batches
    with db.begin() as snapshot:

        def page(start):
            with snapshot.cursor() as cursor:
                cursor.set_range(start)
                found = []
                for item in cursor:
                    found.append(item)
                    if len(found) == 100:
                        break
                return found

        reads(plan, measure, snapshot.get, snapshot.cursor, page)
    db.close()


def cpu():
    """Seconds of processor time of this process and of workers that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used) - cpu.before


cpu.before = 0.0


def child(engine, name, scale, directory):
    plan, measure = Plan(name, scale), Measure()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu.before = cpu()
    if engine == "dfs":
        trio.run(run_dfs, directory, plan, measure)
    else:
        {"rocksdb": run_rocksdb, "lmdb": run_lmdb}[engine](directory, plan, measure)
    measure.numbers["rss"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    measure.numbers["disk"] = sum(
        os.stat(p).st_blocks * 512 for p in Path(directory).rglob("*") if p.is_file()
    ) / (1 << 20)
    print(json.dumps(measure.numbers))


def table(name, results):
    print(f"\n### {name}\n")
    print("| |" + "".join(f" {e} |" for e in results) + "".join(
        f" dfs / {e} |" for e in results if e != "dfs"))  # fmt: skip
    print("|---|" + "---|" * (2 * len(results) - ("dfs" in results)))
    for row, text in ROWS:
        numbers = [results[e][row] for e in results]
        line = "".join(f" {n:,.0f} |" if n >= 10 else f" {n:,.1f} |" for n in numbers)
        if "dfs" in results:
            mine = results["dfs"][row]
            line += "".join(f" {mine / results[e][row]:.2f} |" for e in results if e != "dfs")
        print(f"| {text.format(batch=DATA[name][2])} |{line}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", default=".", help="where the data goes, on a real disk")
    parser.add_argument("--only", default=",".join(ENGINES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of keys and reads")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.scale, args.directory)
        return
    engines = []
    for engine in args.only.split(","):
        module = {"rocksdb": "rocksdict", "lmdb": "lmdb"}.get(engine)
        if module and subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode:  # fmt: skip
            print(f"{engine} is left out: {module} is not installed (pip install -e '.[bench]')")
        else:
            engines.append(engine)
    for name in DATA:
        results = {}
        for engine in engines:
            where = tempfile.mkdtemp(prefix=".bench-store-", dir=args.directory)
            command = [sys.executable, __file__, "--child", engine, name]
            command += ["--scale", str(args.scale), "--directory", where]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            finally:
                shutil.rmtree(where)
            results[engine] = json.loads(done.stdout)
        table(name, results)


if __name__ == "__main__":
    main()
