"""Measures registers on a real cluster of three metadata daemons: `python tests/bench/kv.py`.

N = 3, R = W = 2, values of 100 bytes, one client process that drives any number of operations at
once.  Everything, the client included, shares the machine; `CPU us` is the processor time of all
four processes for one operation, in brackets the client's part.  `put` writes new keys blindly,
`put, read first` replaces keys as `dfs kv put` does without a context.  The rows with a kill run
gets and puts together while one of the daemons is killed and started again.  Prints Markdown, and
before and after it what the machine was like.
"""

import argparse
import contextlib
import gc
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import trio

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from localcluster import LocalCluster

from dfs.client.connect import ClusterRef, connect
from dfs.client.kv import BLIND, KV
from dfs.errors import DfsError

KEYS = 20_000
VALUE = random.Random(1).randbytes(100)


def key(rng):
    return b"bench/%d" % rng.randrange(KEYS)


class Run:
    """One row of the table."""

    def __init__(self, label, depth):
        self.label = label
        self.depth = depth
        self.times = []
        self.errors = []
        self.elapsed = self.processor = self.client = 0.0

    def line(self):
        times = sorted(self.times)
        points = [
            times[min(len(times) - 1, math.ceil(len(times) * q) - 1)] * 1e3
            for q in (0.5, 0.99, 0.999)
        ]
        rate = len(times) / self.elapsed
        cells = [
            self.label,
            str(self.depth),
            f"{rate:,.0f}",
            *(f"{p:.2f}" for p in points),
            f"{times[-1] * 1e3:.0f}",
            str(len(self.errors)),
            f"{self.processor / len(times) * 1e6:.0f} ({self.client / len(times) * 1e6:.0f})"
            if self.processor
            else "",
        ]
        return "| " + " | ".join(cells) + " |"


def processor_time(pids):
    """Seconds of processor time used so far by this process and the daemons."""
    total = time.process_time()
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def conditions(folder):
    """Says what the numbers were measured on: they mean nothing without it."""
    times = []
    with open(os.path.join(folder, "probe"), "wb", buffering=0) as file:
        for _ in range(200):
            file.write(VALUE)
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    times.sort()
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores, load {load:.1f}, fdatasync p50 {times[100] * 1e3:.2f} ms, "
        f"p99 {times[197] * 1e3:.2f} ms"
    )


async def drive(run, operation, seconds, pids=()):
    stop = time.perf_counter() + seconds
    times = run.times

    async def caller(seed):
        rng = random.Random(seed)
        while (start := time.perf_counter()) < stop:
            try:
                await operation(rng)
            except DfsError as e:
                run.errors.append(e)
            times.append(time.perf_counter() - start)

    gc.collect()
    gc.freeze()
    begun = time.perf_counter()
    used, own = processor_time(pids), time.process_time()
    async with trio.open_nursery() as nursery:
        for i in range(run.depth):
            nursery.start_soon(caller, i)
    run.elapsed = time.perf_counter() - begun
    run.processor = processor_time(pids) - used if pids else 0.0
    run.client = time.process_time() - own
    print(run.line(), flush=True)
    for error in dict.fromkeys(map(str, run.errors[:5])):
        print(f"    {error}", file=sys.stderr, flush=True)


async def counters(live):
    """Sums over the daemons of what their registers count."""
    total = {}
    for node in live.get_map().nodes:
        (status,), _ = await live.rpc.call(node.metadata_addr, "node.status", (), timeout=5)
        for name, value in {**status["kv"], "syncs": status["store"]["syncs"]}.items():
            total[name] = total.get(name, 0) + value
    return total


async def measure(cluster, args):
    async with connect(ClusterRef.load(cluster.dir / "cluster.json")) as live:
        kv = KV(live)

        async def put_after_read(rng):
            await kv.put(key(rng), VALUE)

        async def get(rng):
            await kv.get(key(rng))

        async def put_or_get(rng):
            await (get(rng) if rng.random() < 0.5 else put_after_read(rng))

        fresh = iter(range(1 << 60))

        async def put_new(rng):
            await kv.put(b"new/%d" % next(fresh), VALUE, context=BLIND)

        async with trio.open_nursery() as nursery:  # every key has one value

            async def fill(first):
                for i in range(first, KEYS, 64):
                    await kv.put(b"bench/%d" % i, VALUE, context=BLIND)

            for i in range(64):
                nursery.start_soon(fill, i)
        print(
            "| operation | depth | ops/s | p50 ms | p99 ms | p99.9 ms | max ms | errors | CPU us |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for label, operation in (
            ("put", put_new),
            ("put, read first", put_after_read),
            ("get", get),
        ):
            for depth in args.depths:
                if args.only and label not in args.only:
                    continue
                pids = [cluster.pid(n, "metadata") for n in cluster.nodes]
                before = await counters(live) if args.counters else {}
                run = Run(label, depth)
                await drive(run, operation, args.seconds, pids)
                if args.counters:
                    after = await counters(live)
                    print(
                        {k: round((after[k] - before[k]) / len(run.times), 3) for k in after},
                        file=sys.stderr,
                    )
        if args.no_kill:
            return
        for depth in args.depths:
            run = Run("get or put, kill -9 and restart", depth)
            async with trio.open_nursery() as nursery:

                async def nemesis():
                    await trio.sleep(args.kill_seconds / 4)
                    cluster.kill("node2", ["metadata"], signal.SIGKILL)
                    await trio.sleep(args.kill_seconds / 4)
                    process = await trio.run_process(
                        [sys.executable, "-m", "dfs.cli.main", "cluster", "up", "--dir", str(cluster.dir), "node2"],
                        env=cluster.env, check=False, capture_stdout=True, capture_stderr=True,
                    )  # fmt: skip
                    if process.returncode:
                        print(process.stderr.decode(), file=sys.stderr)

                nursery.start_soon(nemesis)
                await drive(run, put_or_get, args.kill_seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row")
    parser.add_argument("--kill-seconds", type=float, default=12.0, help="of each row with a kill")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--only", nargs="*", help="labels of rows")
    parser.add_argument(
        "--counters", action="store_true", help="print what the daemons count per operation"
    )
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--profile", help="record a daemon with py-spy into this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cluster = LocalCluster(folder)
        try:
            cluster.init().up()
            for name in cluster.nodes:
                cluster.kill(name, ["chunkserver"])
            spy = None
            if args.profile:
                spy = subprocess.Popen(
                    [
                        os.path.join(os.path.dirname(sys.executable), "py-spy"),
                        "record",
                        "-d",
                        "12",
                        "-f",
                        "raw",
                        "-o",
                        args.profile,
                        "-p",
                        str(cluster.pid("node1", "metadata")),
                    ]
                )
            print(f"before: {conditions(folder)}", flush=True)
            trio.run(measure, cluster, args)
            print(f"after: {conditions(folder)}", flush=True)
            if spy:
                spy.wait()
        except BaseException:
            print(cluster.logs(30), file=sys.stderr)
            raise
        finally:
            cluster.destroy()


if __name__ == "__main__":
    main()
