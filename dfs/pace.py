"""How fast background work goes and may go: a meter, and two brakes that open as work piles up.

Pure arithmetic on times that are given.  Background work shares disk and network with people who
wait, so it rests; but work that piles up faster than it is done never ends, so both brakes loosen
with the backlog.
"""

from collections import deque

BUCKET = 10.0  # seconds a meter adds up before it starts another sum
WINDOW = 120.0  # seconds a meter looks back
LONGEST_STEP = 1.0  # seconds; a longer step counts as this long: it waited for something
LONGEST_REST = 2.0  # seconds
MOST = 8.0  # a backlog multiplies a bandwidth at most by this


class Meter:
    """Items and bytes per second over the last two minutes."""

    __slots__ = ("_buckets", "_since", "bytes", "items")

    def __init__(self) -> None:
        """Nothing measured."""
        self.items = 0  # in all
        self.bytes = 0
        self._since: float | None = None
        self._buckets: deque[list[float]] = deque()  # [start, items, bytes]

    def add(self, now: float, items: int, size: int = 0) -> None:
        """Count work that was done; `now` in monotonic seconds."""
        self.items += items
        self.bytes += size
        if self._since is None:
            self._since = now
        buckets = self._buckets
        if not buckets or now - buckets[-1][0] >= BUCKET:
            buckets.append([now, 0, 0])
            while buckets[0][0] <= now - WINDOW:
                buckets.popleft()
        buckets[-1][1] += items
        buckets[-1][2] += size

    def rates(self, now: float) -> tuple[float, float]:
        """(items, bytes) per second over the window, or since the first of them if that is less."""
        if self._since is None:
            return 0.0, 0.0
        recent = [b for b in self._buckets if b[0] > now - WINDOW]
        span = max(1.0, min(WINDOW, now - self._since))
        return sum(b[1] for b in recent) / span, sum(b[2] for b in recent) / span


class Tranquility:
    """Rests `level` times as long as a step takes on average, less as the queue grows.

    A loop that rests twice its step uses a third of whatever its steps use up, disk or CPU, on any
    machine, with no unit to tune (Garage's "tranquility").  From `deep` queued items on it does not
    rest at all.
    """

    __slots__ = ("_average", "deep", "level")

    def __init__(self, level: float = 2.0, deep: int = 10_000) -> None:
        """`level` >= 0; `deep` > 0 items."""
        self.level = level
        self.deep = deep
        self._average = 0.0

    def rest(self, took: float, queue: int = 0) -> float:
        """Seconds to rest after a step of `took` seconds with `queue` items to do."""
        took = min(max(took, 0.0), LONGEST_STEP)
        self._average = took if not self._average else 0.8 * self._average + 0.2 * took
        hurry = max(0.0, 1.0 - queue / self.deep)
        return min(LONGEST_REST, self.level * self._average * hurry)


class Bandwidth:
    """At most `rate` bytes a second on average, up to eight times that as the backlog grows.

    The rate is `rate * (1 + backlog / deep)`: a backlog of `deep` bytes doubles it.  After a pause
    one second's worth may go out at once.
    """

    __slots__ = ("_next", "deep", "rate")

    def __init__(self, rate: float, deep: float = 64 << 30) -> None:
        """`rate` > 0 bytes a second; `deep` > 0 bytes."""
        self.rate = rate
        self.deep = deep
        self._next = float("-inf")

    def current(self, backlog: float = 0) -> float:
        """Bytes a second with `backlog` bytes to move."""
        return self.rate * min(MOST, 1.0 + max(0.0, backlog) / self.deep)

    def delay(self, now: float, size: int, backlog: float = 0) -> float:
        """Count `size` bytes; seconds to wait before the next ones."""
        start = max(self._next, now - 1.0)
        self._next = start + size / self.current(backlog)
        return max(0.0, self._next - now)
