"""The child of `dfs.rpc.processes`: runs one job after the other until its standard input ends.

Both directions carry frames: length u32 (little endian) | MessagePack.  A job is (function, args),
an answer (True, result) or (False, (code, message, details)).  Anything that a job prints goes to
standard error, so that it cannot break the frames.
"""

import contextlib
import ctypes
import importlib
import inspect
import os
import signal
import struct
import sys
import traceback
from typing import Any, BinaryIO

import trio

from dfs.codec import pack, unpack
from dfs.errors import DfsError, leaves, to_wire
from dfs.memory import give_back

LENGTH = struct.Struct("<I")
PR_SET_PDEATHSIG = 1
NICE = 10


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Answer jobs until the input ends."""
    while True:
        head = jobs.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        (length,) = LENGTH.unpack(head)
        data = jobs.read(length)
        if len(data) < length:
            return
        job = [data]
        del data
        answer = pack(_answer(job))
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()
        del answer
        give_back()  # until the next job, which may be far away


def _answer(job: list[bytes]) -> tuple[bool, Any]:
    """Do the job that is in the list, and taken out of it so that its bytes are held once only."""
    try:
        function, args = unpack(job.pop())
        result = _call(function, args)
        pack(result)  # a result that cannot be sent is the job's error
    except Exception as e:
        if not all(isinstance(leaf, DfsError) for leaf in leaves(e)):
            traceback.print_exc()  # of an error that nobody foresaw the answer tells too little
        return False, to_wire(e)
    return True, result


def _call(function: str, args: tuple[Any, ...]) -> Any:
    module, _, name = function.partition(":")
    target = getattr(importlib.import_module(module), name)
    if inspect.iscoroutinefunction(target):
        return trio.run(target, *args)
    return target(*args)


def main() -> None:
    """Set up the process and serve on standard input and output."""
    parent = int(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the parent, which then ends us
    with contextlib.suppress(OSError):
        os.nice(NICE)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
