"""Measures the RPC layer between two processes: `python tests/bench/rpc.py [--unix]`.

Prints small calls per second one at a time and at several depths, and bulk throughput both ways.
"""

import multiprocessing
import random
import sys
import tempfile
import time

import trio

from dfs.clock import SystemClock
from dfs.env import Priority
from dfs.rpc.endpoint import RpcEndpoint

SECONDS = 1.5
CHUNK = 4 << 20


def make(name):
    return RpcEndpoint(
        cluster_id=b"bench" * 4, name=name, clock=SystemClock(), random=random.Random(1)
    )


def server(address, pipe):
    blob = bytes(CHUNK)

    async def later(context, args, data):
        await trio.lowlevel.checkpoint()
        return args, b""

    handlers = {
        "echo": lambda context, args, data: (args, b""),
        "later": later,
        "sink": lambda context, args, data: ((len(data),), b""),
        "source": lambda context, args, data: ((CHUNK,), blob),
    }

    async def main():
        await make("server").serve(address, handlers, started=pipe.send)

    trio.run(main)


async def measure(rpc, label, depth, unit, method, args=(), data=b"", priority=Priority.NORMAL):
    count = 0
    stop = time.perf_counter() + SECONDS

    async def caller():
        nonlocal count
        while time.perf_counter() < stop:
            await rpc.call(address, method, args, data, timeout=10, priority=priority)
            count += 1

    address = rpc.address
    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(caller)
    rate = count / (time.perf_counter() - start)
    if unit:
        print(f"{label:28} depth {depth:3}: {rate * unit / (1 << 30):8.2f} GiB/s")
    else:
        print(f"{label:28} depth {depth:3}: {rate:8.0f} calls/s {1e6 / rate:6.1f} us")


async def client(address):
    rpc = make("client")
    rpc.address = address
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        key = (b"k" * 32, 7, "name")
        for depth in (1, 8, 64, 256):
            await measure(rpc, "echo", depth, 0, "echo", key)
        await measure(rpc, "echo in a task", 64, 0, "later", key)
        chunk = random.Random(1).randbytes(CHUNK)
        for depth in (1, 4):
            await measure(rpc, "put 4 MiB", depth, CHUNK, "sink", (), chunk, Priority.BULK)
            await measure(rpc, "get 4 MiB", depth, CHUNK, "source", (), b"", Priority.BULK)
        nursery.cancel_scope.cancel()


def main():
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix://{folder}/s" if "--unix" in sys.argv else "tcp://127.0.0.1:0"
        here, there = multiprocessing.Pipe()
        process = multiprocessing.Process(target=server, args=(address, there))
        process.start()
        try:
            trio.run(client, here.recv())
        finally:
            process.terminate()
            process.join()


if __name__ == "__main__":
    main()
