"""Meters, tranquility and bandwidth."""

import pytest

from dfs.pace import LONGEST_REST, MOST, WINDOW, Bandwidth, Meter, Tranquility


def test_a_meter_tells_rates_over_its_window_only():
    meter = Meter()
    assert meter.rates(5.0) == (0.0, 0.0)
    for second in range(60):
        meter.add(float(second), 2, 100)
    assert meter.rates(60.0) == (pytest.approx(2.0), pytest.approx(100.0))
    assert meter.rates(60.0 + WINDOW + 10) == (0.0, 0.0)
    meter.add(1000.0, 1)
    items, size = meter.rates(1000.0)
    assert items == pytest.approx(1 / WINDOW)
    assert size == 0
    assert (meter.items, meter.bytes) == (121, 6000)


def test_a_meter_does_not_grow():
    meter = Meter()
    for second in range(100_000):
        meter.add(float(second), 1)
    assert len(meter._buckets) <= WINDOW / 10 + 1


def check_tranquility(cls):
    calm = cls(level=2.0, deep=100)
    for _ in range(50):
        rest = calm.rest(0.01)
    assert rest == pytest.approx(0.02)
    assert calm.rest(0.01, 50) == pytest.approx(0.01)  # half the queue, half the rest
    assert calm.rest(0.01, 100) == 0
    assert calm.rest(0.01, 1000) == 0
    for _ in range(100):
        rest = calm.rest(3600.0)  # a step that hung does not make it rest for hours
    assert rest <= LONGEST_REST


def check_bandwidth(cls):
    brake = cls(1000.0, deep=1e6)
    now = 100.0
    sent = 0
    while now < 110.0:
        now += brake.delay(now, 500)
        sent += 500
    assert 10_000 <= sent <= 12_000  # ten seconds, and one second's worth at the start
    assert brake.current(1e6) == 2000.0
    assert brake.current(1e12) == 1000.0 * MOST
    now, sent = 1000.0, 0
    while now < 1010.0:
        now += brake.delay(now, 500, 1e6)
        sent += 500
    assert 20_000 <= sent <= 24_000


def test_tranquility():
    check_tranquility(Tranquility)


def test_bandwidth():
    check_bandwidth(Bandwidth)


class DeafToTheQueue(Tranquility):
    def rest(self, took, queue=0):
        return super().rest(took, 0)


class Unbounded(Tranquility):
    def rest(self, took, queue=0):
        return self.level * took * max(0.0, 1 - queue / self.deep)


class DeafToTheBacklog(Bandwidth):
    def current(self, backlog=0):
        return self.rate


class Hoarder(Bandwidth):
    """Saves up what it did not use for ever."""

    def delay(self, now, size, backlog=0):
        start = max(self._next, now - 1e9)
        self._next = start + size / self.current(backlog)
        return max(0.01, self._next - now)


@pytest.mark.parametrize(
    ("check", "mutant"),
    [
        (check_tranquility, DeafToTheQueue),
        (check_tranquility, Unbounded),
        (check_bandwidth, DeafToTheBacklog),
        (check_bandwidth, Hoarder),
    ],
)
def test_the_checks_find_mutants(check, mutant):
    with pytest.raises(AssertionError):
        check(mutant)
