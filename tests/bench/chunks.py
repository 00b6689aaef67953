"""Throughput of chunk puts and reads: three chunkservers as processes, one client, loopback TCP.

Usage: python tests/bench/chunks.py [MIB] [DIRECTORY]     (prints one line per measurement)
"""

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
from dfs.rpc.endpoint import RpcEndpoint

PORT = 17450
CLUSTER = b"benchmark chunks"


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


async def measure(mib: int) -> None:
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
            ("1 MiB random", 1 << 20, 8, mib << 20),
            ("64 KiB random", 64 << 10, 16, 64 << 20),
            ("4 KiB random", 4 << 10, 32, 8 << 20),
        ):
            count = total // size
            seed = os.urandom(size) if "random" in label else os.urandom(1000) + b"lorem " * size
            ids: list[bytes] = [b""] * count

            async def put(start, step, data, ids=ids, count=count):
                for i in range(start, count, step):
                    ids[i] = await client.put([i.to_bytes(8, "big"), data])

            async def get(start, step, size=size, ids=ids, count=count):
                for i in range(start, count, step):
                    data = await client.read(ids[i], 0, size)
                    assert len(data) == size

            data = memoryview(seed)[: size - 8]
            began = trio.current_time()
            async with trio.open_nursery() as n:
                for k in range(depth):
                    n.start_soon(put, k, depth, data)
            acked = trio.current_time() - began
            await client.sync()
            synced = trio.current_time() - began
            while client.statistics()["in_flight"]:  # noqa: ASYNC110 - a benchmark
                await trio.sleep(0.01)
            began = trio.current_time()
            async with trio.open_nursery() as n:
                for k in range(depth):
                    n.start_soon(get, k, depth)
            read = trio.current_time() - began
            m = total / 2**20
            print(
                f"{label:14} x{depth:<2}  put {m / acked:6.0f} MiB/s  with sync {m / synced:6.0f}"
                f"  read {m / read:6.0f} MiB/s  ({count / acked:.0f} puts/s, {count / read:.0f} reads/s)"
            )
        began = trio.current_time()
        for i in range(100):
            await client.put(os.urandom(4096), durable=True)
        print(f"durable 4 KiB put, one at a time: {(trio.current_time() - began) * 10:.2f} ms")
        began = trio.current_time()
        for i in range(200):
            await client.read(ids[i], 0, 4096)
        print(f"4 KiB read, one at a time: {(trio.current_time() - began) * 5:.2f} ms")
        nursery.cancel_scope.cancel()


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "serve":
        trio.run(serve, int(sys.argv[2]), sys.argv[3])
        return
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    root = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="chunks"))
    servers = []
    try:
        for i in (1, 2, 3):
            command = [sys.executable, __file__, "serve", str(i), str(root / f"n{i}")]
            servers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
        trio.run(measure, mib)
    finally:
        for server in servers:
            server.terminate()
            server.wait()
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
