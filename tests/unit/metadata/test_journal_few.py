"""An entry goes to a majority first; the other members are asked late, and told in time."""

import pytest

from dfs.testing.journal_cores import operation, run_cores
from dfs.volume import entries
from metadata import journal
from metadata.journal import FEED, HEDGE, PROBES
from metadata.journalacceptor import ACCEPT
from tests.unit.metadata.test_journal_directed import Bench

STEP = 0.01  # seconds between entries under load
ALL = {0, 1, 2}


def asked(b):
    """Who was sent the entry in flight."""
    return sorted(to for to, _, message in b.net if message[0] == ACCEPT)


def settled(quick):
    """Node 0 owns the journal of three; node `quick` was the quicker one for the first entries."""
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go(ALL)
    for k in range(PROBES):
        b.propose(0, operation(k))
        assert asked(b) == [1, 2]
        b.go({0, quick})
        b.go(ALL)
    return b


def tick(b, now):
    b.now = now
    due = b.replicas[0].due()
    if due is not None and due <= now:
        b.run(0, b.replicas[0].tick(now))


@pytest.mark.parametrize("quick", [1, 2])
def test_the_quicker_one_is_asked_alone(quick):
    b = settled(quick)
    for k in range(5):
        ticket = b.propose(0, operation(10 + k))
        assert asked(b) == [quick]
        b.go(ALL)
        assert b.results[ticket] == PROBES + k + 2


def test_all_are_asked_when_it_does_not_answer_and_another_takes_its_place():
    b = settled(2)
    ticket = b.propose(0, operation(10))
    b.net = []
    tick(b, HEDGE - 0.001)
    assert not b.net
    tick(b, HEDGE)
    assert asked(b) == [1, 2]
    b.go({0, 1})
    assert b.results[ticket] == PROBES + 2
    b.net = []
    for k in range(PROBES):
        ticket = b.propose(0, operation(20 + k))
        assert asked(b) == [1, 2]
        b.go({0, 1})
        assert ticket in b.results
        b.net = []
    b.propose(0, operation(30))
    assert asked(b) == [1]


def test_who_is_not_asked_hears_of_everything_under_load():
    b = settled(2)
    lag = 0
    for k in range(100):
        b.propose(0, operation(100 + k))
        b.go(ALL)
        tick(b, b.now + STEP)
        b.go(ALL)
        lag = max(lag, b.replicas[0].chosen - b.replicas[1].chosen)
    assert lag <= FEED / STEP + 1
    b.agree()


def test_who_is_not_asked_hears_of_much_at_once():
    b = settled(2)
    lag = 0
    for k in range(20):
        b.propose(0, entries.encode(entries.DATA, k, ((1, k + 1, (True,), ()),), bytes(20_000)))
        b.go(ALL)
        lag = max(lag, b.replicas[0].chosen - b.replicas[1].chosen)
    assert 1 <= lag <= 4
    b.agree()


def test_a_config_goes_to_all():
    b = settled(2)
    version = b.replicas[0].configs[-1][1] + 1
    b.propose(0, entries.encode(entries.CONFIG, 1, version, (0, 1, 2)))
    assert asked(b) == [1, 2]


def test_who_was_left_out_takes_part_in_what_follows():
    b = settled(2)
    for k in range(3):
        b.propose(0, operation(40 + k))
        b.go(ALL)
    b.own(1)
    b.go({0, 1})
    ticket = b.propose(1, operation(50))
    b.go({0, 1})
    assert b.results[ticket] == PROBES + 5
    b.go(ALL)
    b.agree()


def test_schedules_in_which_few_are_asked_go_right(monkeypatch):
    monkeypatch.setattr(journal, "PROBES", 1)
    for seed in range(40):
        run_cores(seed)


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("HEDGE", 1.0, test_all_are_asked_when_it_does_not_answer_and_another_takes_its_place),
        ("FEED", 1.0, test_who_is_not_asked_hears_of_everything_under_load),
        ("FEED_BYTES", 1 << 40, test_who_is_not_asked_hears_of_much_at_once),
        ("PROBES", 1 << 40, lambda: test_the_quicker_one_is_asked_alone(1)),
        ("PROBES", 1, test_all_are_asked_when_it_does_not_answer_and_another_takes_its_place),
    ],
)
def test_each_broken_bound_is_seen(name, value, check, monkeypatch):
    monkeypatch.setattr(journal, name, value)
    with pytest.raises(AssertionError):
        check()
