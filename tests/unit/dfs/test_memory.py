"""The allocator takes its settings, and gives back what lies free between what is in use."""

import gc
import subprocess
import sys
import weakref

import trio

from dfs.memory import GIVE_BACK, give_back_often

PROGRAM = """
from dfs.memory import tune_allocator
import resource
assert tune_allocator()
def faults():
    for _ in range(20):
        bytes(4 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(b"x") * (4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""


def test_large_buffers_are_kept_for_reuse():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20 * 100  # a thousand each when they come from the kernel


HOLES = """
from pathlib import Path
from dfs.memory import give_back, tune_allocator
assert tune_allocator()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
made = [bytes(4000 + n % 100) for n in range(40_000)]
full = resident()
made = made[::40]
kept = resident()
given = give_back()
print(given, full >> 20, kept >> 20, resident() >> 20)
"""


def test_free_memory_between_used_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    given, full, kept, after = done.stdout.split()
    assert given == "True"
    assert int(kept) > int(full) - 20  # what this is about
    assert int(after) < int(full) - 80


class Cycle:
    """What refers to itself, as the traceback of a task does."""

    def __init__(self):
        self.me = self


async def test_cycles_are_freed_every_minute():
    thresholds = gc.get_threshold()
    gc.set_threshold(10**9, 10**9, 10**9)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_back_often)
            ended = weakref.ref(Cycle())
            await trio.sleep(GIVE_BACK / 2)
            assert ended() is not None
            await trio.sleep(GIVE_BACK)
            assert ended() is None
            nursery.cancel_scope.cancel()
    finally:
        gc.set_threshold(*thresholds)
