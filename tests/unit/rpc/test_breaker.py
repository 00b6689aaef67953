"""The circuit breaker: when it opens, who passes, what closes it."""

import random

import pytest

from dfs.rpc.breaker import CLOSED, ERRORS, HALF_OPEN, OPEN, PAUSE, WINDOW, Breaker


def breaker(cls=Breaker):
    return cls(random.Random(1))


def opened(cls=Breaker, at=0.0):
    b = breaker(cls)
    for _ in range(ERRORS):
        b.failed(at)
    return b


def check_opens(cls):
    b = breaker(cls)
    for i in range(ERRORS - 1):
        b.failed(i * WINDOW / ERRORS)
    assert b.state == CLOSED
    b.failed(WINDOW - 1)
    assert b.state == OPEN
    # the same errors, but slower
    b = breaker(cls)
    for i in range(3 * ERRORS):
        b.failed(i * (WINDOW / (ERRORS - 1) + 0.5))
    assert b.state == CLOSED
    # the same errors among many answers: a peer that is slow with some requests
    b = breaker(cls)
    for i in range(3 * ERRORS):
        b.answers += 3
        b.failed(i * 0.1)
    assert b.state == CLOSED


def check_probes(cls):
    b = opened(cls)
    assert b.refuse(0.1)
    assert "circuit breaker is open" in b.refuse(0.1)
    late = 1.5 * PAUSE[0] + 0.1
    assert not b.refuse(late)  # the probe
    assert b.state == HALF_OPEN
    assert b.refuse(late + 0.1)  # everybody else waits for its outcome
    assert not b.refuse(late + 1.1)  # unless it takes long
    b.failed(late + 1.2)
    assert b.state == OPEN
    assert b.refuse(late + 1.2 + PAUSE[0] * 0.9)  # the pause grows
    much_later = late + 1000
    assert not b.refuse(much_later)
    b.answered(much_later, urgent=False)
    assert b.state == CLOSED
    assert not b.refuse(much_later)
    b.failed(much_later)
    assert b.state == CLOSED  # it starts from nothing


def check_urgent(cls):
    b = opened(cls)
    b.answered(0.1, urgent=True)
    assert b.state != CLOSED  # a ping says nothing about the disk
    assert not b.refuse(0.1)  # but it is worth a try at once
    assert b.refuse(0.2)


def check_pauses(cls):
    ends = set()
    for seed in range(20):
        b = cls(random.Random(seed))
        for _ in range(ERRORS):
            b.failed(0.0)
        end = next(t / 100 for t in range(1000) if not b.refuse(t / 100))
        assert 0.5 * PAUSE[0] <= end <= 1.5 * PAUSE[0] + 0.01
        ends.add(end)
    assert len(ends) > 10


CHECKS = [check_opens, check_probes, check_urgent, check_pauses]


@pytest.mark.parametrize("check", CHECKS)
def test_breaker(check):
    check(Breaker)


class Never(Breaker):
    def _open(self, now, since):
        pass


class DeafToAnswers(Breaker):
    def failed(self, now):
        self.answers = 0
        super().failed(now)


class NoWindow(Breaker):
    def failed(self, now):
        super().failed(0.0)


class Eager(Breaker):
    def failed(self, now):
        super().failed(now)
        super().failed(now)


class AllProbe(Breaker):
    def refuse(self, now):
        self._probe_at = float("-inf")
        return super().refuse(now)


class TrustsPings(Breaker):
    def answered(self, now, *, urgent):
        super().answered(now, urgent=False)


class DeafToPings(Breaker):
    def answered(self, now, *, urgent):
        if not urgent:
            super().answered(now, urgent=urgent)


class NoJitter(Breaker):
    def _open(self, now, since):
        super()._open(now, since)
        self._until = now + 1.0


@pytest.mark.parametrize(
    "mutant",
    [Never, DeafToAnswers, NoWindow, Eager, AllProbe, TrustsPings, DeafToPings, NoJitter],
)
def test_the_checks_find_mutants(mutant):
    red = 0
    for check in CHECKS:
        try:
            check(mutant)
        except (AssertionError, StopIteration):
            red += 1
    assert red


def test_statistics():
    b = opened()
    b.refuse(0.1)
    assert b.statistics() == {"state": "open", "errors": ERRORS, "opened": 1, "refused": 1}
