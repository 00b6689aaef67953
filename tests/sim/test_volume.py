"""Whole clusters with file systems on them, under faults, from seeds."""

import functools
import logging

import pytest

from dfs.testing import scenario_volume

SEEDS = range(1, 9)
# Where to look first for each mutant; then in all of the seeds.
FIRST = {"early_sync": 4, "no_barrier": 18}


@pytest.fixture(autouse=True)
def quiet():
    """A scenario's nodes say a lot about the faults they are given."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


traced = functools.cache(scenario_volume.trace)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_violation(seed):
    assert traced(seed).violations == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_soak(seed):
    assert scenario_volume.run(seed) == []


@pytest.mark.parametrize("mutant", scenario_volume.MUTANTS)
def test_each_mutant_is_found(mutant):
    order = (FIRST.get(mutant, 2), *SEEDS, *range(10, 40, 2))
    assert any(finds(seed, mutant) for seed in order)


def finds(seed, mutant):
    """Whether a run goes wrong; a broken client may also stumble over its own state."""
    try:
        return bool(scenario_volume.run(seed, mutant=mutant))
    except ExceptionGroup as e:
        return e.split(KeyError)[1] is None


def test_seeds_reach_what_they_are_for():
    histories = [traced(seed) for seed in SEEDS if seed % 2 == 0]
    assert sum(history.counts["delegated"] for history in histories) > 400
    assert sum(history.counts["lost"] for history in histories)
    assert sum(op.volatile for history in histories for op in history.arena.history())
    assert sum(len(history.arena.history()) for history in histories) > 300
    assert sum(len(diary.looks) for history in histories for diary in history.diaries) > 100


def test_a_seed_gives_one_run():
    prints = set()
    for _ in range(2):
        history = scenario_volume.trace(2)
        prints.add((history.done, history.failed, tuple(sorted(history.files))))
    assert len(prints) == 1
