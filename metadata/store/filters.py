"""How many bits per key the filter of a new table gets: Monkey (Dayan, Athanassoulis, Idreos 2017).

An absent key asks every run, so the cost of a lookup is the sum of the false-positive rates.  For a
given memory that sum is smallest when each rate is proportional to the run's size: small young runs
get more bits per key, the largest one fewer.  With r = exp(-b ln²2) for b bits per key:

    b_i = (ln C - ln n_i) / ln²2,    where C is such that the filters together have the memory
"""

from collections.abc import Sequence
from math import log

from metadata.store.bloom import BITS_PER_KEY

MIN_BITS, MAX_BITS = 4.0, 20.0  # fewer is worth nothing with eight bits set per key, nor is more
LN2_SQUARED = log(2) ** 2


def allocate(entries: Sequence[int], memory_bits: float) -> list[float]:
    """Bits per key of runs with so many entries, together about `memory_bits`."""
    sizes = [max(1, n) for n in entries]
    wanted = min(memory_bits, BITS_PER_KEY * sum(sizes))
    low, high = 0.0, MAX_BITS * LN2_SQUARED + log(max(sizes, default=1))

    def bits(c: float) -> list[float]:
        return [min(MAX_BITS, max(MIN_BITS, (c - log(n)) / LN2_SQUARED)) for n in sizes]

    for _ in range(40):  # bisection: memory grows with C
        middle = (low + high) / 2
        if sum(n * b for n, b in zip(sizes, bits(middle), strict=True)) > wanted:
            high = middle
        else:
            low = middle
    return [round(b, 1) for b in bits(low)]
