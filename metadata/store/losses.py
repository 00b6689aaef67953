"""Key ranges that damage hides, as pure functions: a loss is (start, end, table), end excluded."""

from collections.abc import Iterable, Sequence

Range = tuple[bytes, bytes]  # [start, end) of keys
Loss = tuple[bytes, bytes, str]  # a range, and the name of the damaged table; empty: not known


def in_ranges(key: bytes, losses: Iterable[Loss]) -> bool:
    """Whether a key lies in any of the ranges."""
    return any(start <= key < end for start, end, _ in losses)


def clip(losses: Iterable[Loss], start: bytes, end: bytes | None) -> tuple[Loss, ...]:
    """The parts in [start, end); None is the end of the key space."""
    return tuple(
        (max(a, start), b if end is None else min(b, end), name)
        for a, b, name in losses
        if b > start and (end is None or a < end)
    )


def without(losses: Iterable[Loss], start: bytes, end: bytes | None) -> tuple[Loss, ...]:
    """The parts outside of [start, end); None is the end of the key space."""
    result: list[Loss] = []
    for a, b, name in losses:
        if a < start:
            result.append((a, min(b, start), name))
        if end is not None and b > end:
            result.append((max(a, end), b, name))
    return tuple(result)


def union(losses: Iterable[Loss]) -> tuple[Loss, ...]:
    """Each once, in the order of first appearance."""
    return tuple(dict.fromkeys(losses))


def first_after(losses: Sequence[Loss], at: bytes) -> bytes | None:
    """Where the first loss begins that ends after key `at`."""
    return min((a for a, b, _ in losses if b > at), default=None)
