"""When values expire: wall-clock seconds, and how far they are trusted.

A value with an expiry reads as absent from that second on, by the clock of the node that reads.  A
merge may destroy it only `StoreOptions.expiry_grace` seconds later: a clock that is fast by less
than that hides values too early, but when it is set right they are there again.
"""

from math import ceil

from dfs.clock import Clock
from dfs.errors import InvalidArgument

MAX_EXPIRY = (1 << 63) - 1  # seconds since the epoch


def seconds(clock: Clock) -> int:
    """Whole seconds since the epoch."""
    return clock.time_ns() // 1_000_000_000


def after(clock: Clock, ttl: float) -> int:
    """The second at which something has lived for at least `ttl` seconds; `InvalidArgument`."""
    if not 0 < ttl < 1 << 40:
        raise InvalidArgument(f"a time to live of {ttl!r} seconds; give a positive number")
    return ceil(clock.time_ns() / 1e9 + ttl)


def check(expires: object, key: bytes) -> None:
    """Raise `InvalidArgument` unless this is an expiry."""
    if type(expires) is not int or not 0 < expires <= MAX_EXPIRY:
        raise InvalidArgument(
            f"expiry of {key[:40]!r}: {expires!r:.40} is no number of seconds since the epoch"
        )
