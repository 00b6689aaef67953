"""The allocator takes its settings."""

import subprocess
import sys

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
