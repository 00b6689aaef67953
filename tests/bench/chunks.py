"""Throughput and processor time of chunk puts and reads: three chunkservers, one client, loopback.

Usage: python tests/bench/chunks.py [--mib N] [--only WORD] [--dir DIRECTORY] [--pids]

One line per measurement: MiB/s, operations a second, and the CPU milliseconds per MiB (us per
operation for small ones) of the client and of the servers together.  On a machine that others use
too only the latter can be compared between two runs.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chunkserver.service import ChunkNode
from dfs.client.chunkio import ChunkClient
from dfs.clock import SystemClock
from dfs.cluster.map import ClusterMap, Node, Params
from dfs.disk import RealDisk
from dfs.env import Env
from dfs.memory import tune_allocator
from dfs.rpc.endpoint import RpcEndpoint

PORT = 17450
CLUSTER = b"benchmark chunks"
TICKS = os.sysconf("SC_CLK_TCK")


def cluster_map() -> ClusterMap:
    nodes = tuple(
        Node(
            number=i,
            node_id=bytes([i]) * 16,
            name=f"n{i}",
            zone=f"z{i}",
            rack="r",
            host="h",
            metadata_addr=f"tcp://127.0.0.1:{PORT + 10 + i}",
            chunk_addr=f"tcp://127.0.0.1:{PORT + i}",
            metadata_weight=1.0,
            chunk_weight=1.0,
        )
        for i in (1, 2, 3)
    )
    return ClusterMap.create(CLUSTER, nodes, params=Params(n=3, w=2, r=2, pw=2))


async def serve(number: int, directory: str) -> None:
    clock, rng = SystemClock(), random.Random(number)
    cluster = cluster_map()
    rpc = RpcEndpoint(cluster_id=CLUSTER, name=f"n{number}", clock=clock, random=rng)
    env = Env(clock, RealDisk(Path(directory)), rpc, None, rng)
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        node = ChunkNode(env, number, lambda: cluster)
        await nursery.start(node.run, cluster.node(number).chunk_addr)
        print("ready", flush=True)
        await trio.sleep_forever()


def cpu(pid: int) -> float:
    """Seconds of processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Span:
    """Wall and processor time of a block."""

    def __init__(self, label: str, servers: list[int]) -> None:
        self.label = label
        self.servers = servers

    def _now(self) -> tuple[float, float, float]:
        return trio.current_time(), cpu(os.getpid()), sum(map(cpu, self.servers))

    def __enter__(self) -> "Span":
        self.before = self._now()
        return self

    def end(self, count: int, size: int) -> None:
        wall, ours, theirs = (b - a for a, b in zip(self.before, self._now(), strict=True))
        mib = count * size / 2**20
        unit, per = ("us/op", count / 1e6) if size < 1 << 20 else ("ms/MiB", mib / 1e3)
        print(
            f"{self.label:28} {mib / wall:7.0f} MiB/s {count / wall:8.0f} ops/s   CPU {unit}"
            f"  client {ours / per:7.2f}  servers {theirs / per:7.2f}",
            flush=True,
        )

    def __exit__(self, *_: object) -> None:
        pass


async def parallel(depth: int, count: int, work) -> None:
    async def some(start: int) -> None:
        for i in range(start, count, depth):
            await work(i)

    async with trio.open_nursery() as nursery:
        for k in range(depth):
            nursery.start_soon(some, k)


async def measure(mib: int, only: str, servers: list[int]) -> None:
    clock, rng = SystemClock(), random.Random(0)
    cluster = cluster_map()
    rpc = RpcEndpoint(cluster_id=CLUSTER, name="client", clock=clock, random=rng)
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        client = ChunkClient(rpc, lambda: cluster, clock, salt=b"s" * 16, random=rng)
        await nursery.start(client.run)
        for label, size, depth, total in (
            ("4 MiB random", 4 << 20, 4, mib << 20),
            ("4 MiB text", 4 << 20, 4, mib << 20),
            ("64 KiB random", 64 << 10, 16, 32 << 20),
            ("4 KiB random", 4 << 10, 32, 8 << 20),
        ):
            if only not in label:
                continue
            count = total // size
            ids: list[bytes] = [b""] * count
            step = 1 << 20  # as a mount gets its data
            if "random" in label:
                seeds = [os.urandom(min(size, step)) for _ in range(4)]
            else:
                seeds = [os.urandom(1000) + b"lorem ipsum" * (step // 11)]

            def pieces(i: int, seeds=seeds, size=size, step=step) -> list[bytes]:
                found = [i.to_bytes(8, "big") + seeds[i % len(seeds)][8 : min(size, step)]]
                while (left := size - sum(map(len, found))) > 0:
                    found.append(bytes(seeds[len(found) % len(seeds)][:left]))
                return found

            async def put(i: int, ids=ids, pieces=pieces) -> None:
                ids[i] = await client.put(pieces(i))

            with Span(f"put {label} x{depth}", servers) as span:
                await parallel(depth, count, put)
                await client.sync()
                while client.statistics()["in_flight"]:  # noqa: ASYNC110 - a benchmark
                    await trio.sleep(0.01)
                span.end(count, size)
            part = min(size, 1 << 20)

            async def get(i: int, ids=ids, part=part, per=size // part) -> None:
                data = await client.read(ids[i // per], i % per * part, part)
                assert len(data) == part

            reads = count * (size // part)
            for again in ("", " again"):
                with Span(f"get {label}{again} x{depth}", servers) as span:
                    await parallel(depth, reads, get)
                    span.end(reads, part)
            if size < 4 << 20:
                continue

            async def block(_: int, ids=ids, size=size) -> None:
                offset = rng.randrange(size // 65536) * 65536
                chunk_id = rng.choice(ids)
                data = client.read_nowait(chunk_id, offset, 65536)
                if data is None:
                    data = await client.read(chunk_id, offset, 65536)
                assert len(data) == 65536

            for deep in (1, 16):
                with Span(f"one 64 KiB block of it x{deep}", servers) as span:
                    await parallel(deep, 6000, block)
                    span.end(6000, 65536)
        if only in "durable 4 KiB":
            with Span("durable put 4 KiB x1", servers) as span:
                for _ in range(200):
                    await client.put(os.urandom(4096), durable=True)
                span.end(200, 4096)
        nursery.cancel_scope.cancel()


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "serve":
        tune_allocator()
        trio.run(serve, int(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description="chunk benchmark")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--only", default="")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--pids", action="store_true", help="wait for Enter, for a profiler")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="chunks", dir=arguments.dir))
    tune_allocator()
    servers = []
    try:
        for i in (1, 2, 3):
            command = [sys.executable, __file__, "serve", str(i), str(root / f"n{i}")]
            servers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
        pids = [server.pid for server in servers]
        if arguments.pids:
            input(f"client {os.getpid()}, servers {pids}; Enter starts ")
        trio.run(measure, arguments.mib, arguments.only, pids)
    finally:
        for server in servers:
            server.terminate()
            server.wait()
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
