"""Settings of the C library's allocator for processes that move megabytes all the time.

By default glibc takes every buffer of more than 128 KiB from the kernel and gives it back at once:
each chunk of 4 MiB then costs a thousand page faults.  Kept for reuse, writing a file with three
copies takes about a fifth less processor time of all processes together.  What was kept and is
free at the moment goes back to the kernel once a minute, also from between what is in use: else a
process that was busy once would be large for ever.

The garbage collector is due after so many new objects in our processes (hours, in a quiet one) that
the cycles which each ended connection leaves, of tracebacks and tasks, are looked for then, too.
"""

import ctypes
import gc

import trio

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # <malloc.h>
LARGEST_KEPT = 32 << 20  # bytes of one buffer, the most that glibc accepts
TRIM_ABOVE = 256 << 20  # bytes free at the top of the heap before the kernel gets some back
TOP_PAD = 16 << 20  # bytes asked for at a time
ARENAS = 2
GIVE_BACK = 60.0  # seconds between times that free memory is given back


def tune_allocator() -> bool:
    """Keep large buffers for reuse; False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = (
        (_M_ARENA_MAX, ARENAS),
        (_M_MMAP_THRESHOLD, LARGEST_KEPT),
        (_M_TRIM_THRESHOLD, TRIM_ABOVE),
        (_M_TOP_PAD, TOP_PAD),
    )
    taken = [mallopt(option, value) == 1 for option, value in wanted]
    return all(taken)


def give_back() -> bool:
    """Give the kernel what is free now; whether there was any (never where it is not glibc).

    Takes some 20 ms for each 100 MiB that is in use, and 50 ms for each that is given back.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1


async def give_back_often() -> None:
    """Do so every minute, until cancelled; first free the cycles of what is not old.

    That looks at what was made since the last time and is still there, 15 ms for 100,000 objects.
    What is older is left to the collector's own rule: a full collection takes too long.
    """
    while True:
        await trio.sleep(GIVE_BACK)
        gc.collect(1)
        give_back()
