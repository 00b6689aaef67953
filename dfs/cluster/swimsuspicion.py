"""`Suspicion`: how long an accused member has to show that it is alive (Lifeguard, section IV-B).

One accuser may simply be slow itself, so alone it has to wait long; each independent accuser makes
an error less likely and the wait shorter:

    timeout(c) = max(low, high - (high - low) * log(c + 1) / log(k + 1))

for c accusers after the first out of the k that are expected.
"""

from math import log, log10

MULTIPLE = 4.0  # seconds of the shortest suspicion, per decade of members
LONGEST = 6.0  # the longest suspicion, in shortest ones
ACCUSERS = 3  # independent accusers, after the first, that make it shortest


def shortest(members: int) -> float:
    """Seconds that a member has at least: time for its answer to reach everybody."""
    return MULTIPLE * max(1.0, log10(max(1, members)))


class Suspicion:
    """The suspicion of one member at one incarnation."""

    __slots__ = ("accusers", "deadline", "high", "k", "low", "start")

    def __init__(self, now: float, by: int, low: float, members: int) -> None:
        """Suspected `now` by one accuser, in a cluster of `members` that may accuse."""
        self.start = now
        # Neither the suspect nor the first accuser can confirm.
        self.k = max(0, min(ACCUSERS, members - 2))
        self.low = low
        self.high = low * LONGEST if self.k else low
        self.accusers: dict[int, None] = {by: None}  # in order of arrival
        self.deadline = now + self.high

    def confirm(self, by: int) -> bool:
        """Another accusation; True if its accuser is new and still counts."""
        if by in self.accusers or len(self.accusers) > self.k:
            return False
        self.accusers[by] = None
        share = log(len(self.accusers)) / log(self.k + 1)
        self.deadline = self.start + max(self.low, self.high - (self.high - self.low) * share)
        return True

    def postpone(self, seconds: float) -> None:
        """The judge slept: that time does not count."""
        self.start += seconds
        self.deadline += seconds
