"""Numbers of the store on a real disk: `python tests/bench/store.py [DIRECTORY]`."""

import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))

import trio

from dfs.clock import SystemClock
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.rpc.processes import WorkerProcesses
from metadata.blobs import Blobs
from metadata.store.engine import Store

COUNT = 200_000
VALUE = 160


class Timer:
    def __init__(self, what, count):
        self.what, self.count = what, count

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *exc):
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        rate = self.count / wall
        print(f"{self.what:46} {rate:12,.0f} /s   {1e6 * cpu / self.count:8.2f} us CPU each")


async def run(directory, processes):
    random = Random(1)
    disk = RealDisk(directory)
    store = await Store.open(Env(SystemClock(), disk, None, processes, random))
    keys = [b"k" + random.randbytes(32) for _ in range(COUNT)]
    value = random.randbytes(VALUE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        with Timer("put, batches of 100, one writer", COUNT):
            for i in range(0, COUNT, 100):
                await store.batch([(k, value) for k in keys[i : i + 100]])

        async def writer(mine):
            for key in mine:
                await store.batch([(key, value)])

        with Timer("put, batches of 1, 64 writers", 64 * 200):
            async with trio.open_nursery() as writers:
                for i in range(64):
                    writers.start_soon(writer, keys[i * 200 : i * 200 + 200])
        with Timer("put, batches of 1, one writer", 2000):
            await writer(keys[:2000])
        with Timer("get, memtable", 2000):
            for key in keys[:2000]:
                store.get(key)
        await store.flush()
        await trio.sleep(3)
        runs = store.statistics()["runs"]
        hot = random.sample(sorted(keys)[50_000:60_000], 5000)
        store.get_many(hot)
        with Timer(f"get, cached blocks, {runs} runs", len(hot) * 10):
            for _ in range(10):
                for key in hot:
                    store.get(key)
        with Timer(f"get, random, {runs} runs", 20_000):
            for key in random.sample(keys, 20_000):
                store.get(key)
        with Timer(f"get, absent, {runs} runs", 20_000):
            for key in keys[:20_000]:
                store.get(key + b"x")
        with Timer("scan, pages of 1000", COUNT):
            after = b""
            while page := store.scan(b"", after=after, limit=1000):
                after = page[-1][0]
        with Timer("compact to one run", COUNT):
            await store.compact()
        blobs = Blobs(store)
        nodes = [random.randbytes(8192) for _ in range(2000)]
        with Timer("blob put, 8 KiB, 16 at a time", len(nodes)):
            for i in range(0, len(nodes), 16):
                hashes = await blobs.put(nodes[i : i + 16])
        with Timer("blob get, 8 KiB, verified", 16 * 200):
            for _ in range(200):
                for h in hashes:
                    blobs.get(h)
        nursery.cancel_scope.cancel()
    with Timer("open again (replay), stores", 1):
        store = await Store.open(Env(SystemClock(), disk, None, processes, random))
    print({k: v for k, v in store.statistics().items() if v})
    disk.close()


async def main():
    async with WorkerProcesses() as processes:
        where = sys.argv[1] if len(sys.argv) > 1 else "."
        with tempfile.TemporaryDirectory(prefix=".bench-store-", dir=where) as directory:
            await run(Path(directory), processes)


if __name__ == "__main__":
    trio.run(main)
