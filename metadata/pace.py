"""The pace of commits while checkpoints lag behind, and of checkpoints that fail; sans-IO.

What is in no checkpoint yet is kept in memory, at the home and in every session, so commits must
not outrun folds for ever.  A limit alone would let them run at full speed and then stand still
until a fold ends, over and over.  Here each waits a little longer the more there is, from
`EASY` folds' worth on, such that at half the way to `BEHIND` they come as fast as they are folded;
only beyond `BEHIND` they stand.  (LSM engines slow their writers in the same way while compaction
lags: the "delayed write rate" of RocksDB.)
"""

EASY = 2.0  # folds' worth of journal since the last checkpoint from which on commits are slowed
BEHIND = 3.0  # from which on they wait for a fold
RETRY = (1.0, 30.0)  # seconds after a fold that failed: first and longest


class Pace:
    """Of one volume; knows how fast the last folds were."""

    __slots__ = ("_failures", "rate", "retry_at")

    def __init__(self) -> None:
        """Nothing was folded yet: nothing is slowed before `BEHIND`."""
        self.rate = 0.0  # bytes of journal folded in a second, lately
        self.retry_at = 0.0  # no fold before; monotonic seconds
        self._failures = 0

    def folded(self, size: int, seconds: float) -> None:
        """A fold of `size` bytes of journal took `seconds`."""
        self._failures = 0
        if size > 0 and seconds > 0:
            now = size / seconds
            self.rate = (self.rate + now) / 2 if self.rate else now

    def failed(self, now: float) -> float:
        """A fold failed; returns the seconds until the next may begin."""
        pause = min(RETRY[1], RETRY[0] * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self.retry_at = now + pause
        return pause

    def easy(self, loose: int, fold: int) -> bool:
        """Whether nothing has to wait; `loose`: bytes in no checkpoint, `fold`: bytes of one."""
        return loose <= EASY * fold

    def behind(self, loose: int, fold: int) -> bool:
        """Whether commits have to wait for a fold."""
        return loose > BEHIND * fold

    def delay(self, size: int, loose: int, fold: int) -> float:
        """Seconds that a commit of `size` bytes waits while not `behind`."""
        if not self.rate:
            return 0.0
        over = (loose / fold - EASY) / (BEHIND - EASY)
        return max(0.0, 2.0 * over) * size / self.rate
