"""A circuit breaker per peer: one that keeps failing is left alone, and callers hear it at once.

A peer that hangs costs every request its whole timeout.  After ten errors within a minute, if fewer
answers than errors came meanwhile, the breaker *opens*: requests fail at once, with the breaker
named.  After a pause, drawn at random so that not everybody returns in the same moment, and longer
each time, it is *half open*: one request a second may try, its answer closes the breaker, its
failure opens it again.

An error is a timeout, of a request or of connecting, or a connection that broke.  A refusal by the
peer's handler is an answer; a refused connection costs nobody time and is no error here.  Priority
`HIGH` is never refused, since gossip and heartbeats are how anybody finds out that a peer is back:
an answer to one of those ends the pause, but only an answer to ordinary work closes the breaker.

A pure state machine; see M. Nygard, "Release It!", 2007.
"""

from collections import deque
from random import Random
from typing import Any

ERRORS = 10
WINDOW = 60.0  # seconds
PAUSE = (1.0, 5.0)  # seconds: first and longest
PROBE = 1.0  # seconds between requests let through while half open
BRIEF = 0.25  # seconds; a request with less patience proves nothing by its timeout

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half open"


class Breaker:
    """The state of one peer; `now` is monotonic seconds."""

    __slots__ = (
        "_failures", "_pause", "_probe_at", "_random", "_since", "_until", "answers", "errors",
        "opened", "refused", "state",
    )  # fmt: skip

    def __init__(self, random: Random) -> None:
        """Closed."""
        self._random = random
        self._failures: deque[tuple[float, int]] = deque(maxlen=ERRORS)  # (when, answers by then)
        self._pause = PAUSE[0]
        self._since = 0.0
        self._until = 0.0
        self._probe_at = float("-inf")
        self.state = CLOSED
        self.answers = 0  # incremented by the link itself: it is on the hot path
        self.errors = 0
        self.opened = 0
        self.refused = 0

    def refuse(self, now: float) -> str:
        """Why a request may not be sent now; "" if it may.  Asked only unless closed."""
        if self.state == OPEN and now >= self._until:
            self.state = HALF_OPEN
            self._probe_at = float("-inf")
        if self.state == CLOSED:
            return ""
        if self.state == HALF_OPEN and now - self._probe_at >= PROBE:
            self._probe_at = now
            return ""
        self.refused += 1
        left = max(0.0, self._until - now)
        return (
            f"its circuit breaker is {self.state}: it kept failing for the last "
            f"{now - self._since:.0f} s, the next try is in {left:.1f} s"
        )

    def answered(self, now: float, *, urgent: bool) -> None:
        """Something was answered; `urgent`: only a request of priority `HIGH` was.

        Called only unless closed.
        """
        if urgent:
            self._until = min(self._until, now)
        else:
            self.state = CLOSED
            self._pause = PAUSE[0]
            self._failures.clear()

    def failed(self, now: float) -> None:
        """Connecting took too long, the connection broke, or a request got no answer."""
        self.errors += 1
        if self.state == CLOSED:
            failures = self._failures
            failures.append((now, self.answers))
            first, answers = failures[0]
            if (
                len(failures) == ERRORS
                and now - first <= WINDOW
                and self.answers - answers < ERRORS
            ):
                self._open(now, first)
        elif self.state == HALF_OPEN:
            self._open(now, self._since)

    def _open(self, now: float, since: float) -> None:
        self.state = OPEN
        self.opened += 1
        self._since = since
        self._until = now + self._pause * self._random.uniform(0.5, 1.5)
        self._pause = min(PAUSE[1], self._pause * 2)
        self._failures.clear()

    def statistics(self) -> dict[str, Any]:
        """State and counts, for status pages."""
        return {
            "state": self.state,
            "errors": self.errors,
            "opened": self.opened,
            "refused": self.refused,
        }
