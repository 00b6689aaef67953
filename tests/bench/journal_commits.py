"""Commits per second of one volume: three metadata processes on loopback TCP with real fsyncs.

    python tests/bench/journal_commits.py [SECONDS] [PAYLOAD BYTES] [VOLUMES]

Prints commits/s and latency of proposals made one after the other per volume, and of confirms.
Data goes to $BENCH_DIR; /dev/shm there shows what is left when a sync costs nothing.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import trio

from dfs.clock import SystemClock
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.rpc.endpoint import RpcEndpoint
from dfs.volume import entries
from metadata.journals import JournalHost

HOMES = (0, 1, 2)


class Map:
    """As much of a cluster map as journals need."""

    epoch = 1

    def __init__(self, ports):
        self.nodes = [
            SimpleNamespace(number=i, metadata_addr=f"tcp://127.0.0.1:{p}")
            for i, p in enumerate(ports)
        ]

    def volume_homes(self, volume):
        return HOMES


async def node(me, ports, root, seconds, size, volumes):
    clock, rnd = SystemClock(), random.Random(me)
    cluster = Map(ports)
    rpc = RpcEndpoint(cluster_id=bytes(16), name=f"n{me}", clock=clock, random=rnd)
    disk = RealDisk(Path(root) / str(me))
    host = JournalHost(Env(clock, disk, rpc, None, rnd), me, lambda: cluster)
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        await nursery.start(host.run)
        up = trio.Event()
        nursery.start_soon(
            lambda: rpc.serve(
                cluster.nodes[me].metadata_addr, host.handlers(), started=lambda _: up.set()
            )
        )
        await up.wait()
        if me == 0:
            await measure(host, seconds, size, volumes)
            cpu = time.process_time()
            print(f"CPU of the owner {cpu:.1f} s, {host.statistics()}, errors {host.errors}")
            nursery.cancel_scope.cancel()
        else:
            await trio.to_thread.run_sync(sys.stdin.read)
            print(f"CPU of a follower {time.process_time():.1f} s")
            nursery.cancel_scope.cancel()


async def measure(host, seconds, size, volumes):
    await trio.sleep(0.5)
    names = [bytes([v]) * 16 for v in range(volumes)]
    for name in names:
        entry = entries.encode(entries.GENESIS, 0, {}, 1, HOMES)
        await host.create(name, entry, timeout=10)
        await host.get(name).acquire(10)
    payload = os.urandom(size)
    times = []

    async def drive(journal, verb):
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            await verb(journal)
            times.append(time.perf_counter() - start)

    for what, verb in (
        ("propose", lambda j: j.propose(payload, 10)),
        ("confirm", lambda j: j.confirm(10)),
    ):
        times.clear()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(drive, host.get(name), verb)
        times.sort()
        print(
            f"{what}: {len(times) / seconds:.0f}/s over {volumes} volume(s), "
            f"p50 {times[len(times) // 2] * 1e3:.2f} ms, p99 {times[len(times) * 99 // 100] * 1e3:.2f} ms"
        )


def main():
    if sys.argv[1] == "node":
        me, seconds, size, volumes = int(sys.argv[2]), *map(int, sys.argv[5:8])
        ports = [int(p) for p in sys.argv[3].split(",")]
        trio.run(node, me, ports, sys.argv[4], seconds, size, volumes)
        return
    seconds, size, volumes = (*sys.argv[1:], *("5", "200", "1")[len(sys.argv) - 1 :])
    base = 20000 + os.getpid() % 20000
    ports = ",".join(str(base + i) for i in HOMES)
    with tempfile.TemporaryDirectory(
        dir=os.environ.get("BENCH_DIR", Path(__file__).parent)
    ) as root:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "node", str(i), ports, root, seconds, size, volumes],
                stdin=subprocess.PIPE,
            )
            for i in reversed(HOMES)
        ]
        processes[-1].wait()
        for process in processes:
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
