"""Whole clusters with file systems on them, under faults, from seeds."""

import logging

import pytest

from dfs.testing import scenario_volume

SEEDS = range(1, 9)
# Where to look first for each mutant; then in all of the seeds.
FIRST = {"late_values": 12}


@pytest.fixture(autouse=True)
def quiet():
    """A scenario's nodes say a lot about the faults they are given."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_violation(seed):
    assert scenario_volume.run(seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_soak(seed):
    assert scenario_volume.run(seed) == []


@pytest.mark.parametrize("mutant", scenario_volume.MUTANTS)
def test_each_mutant_is_found(mutant):
    order = (FIRST.get(mutant, 2), *SEEDS)
    assert any(scenario_volume.run(seed, mutant=mutant) for seed in order)


def test_seeds_reach_what_they_are_for():
    histories = [scenario_volume.trace(seed) for seed in (2, 6)]
    assert all(history.counts["delegated"] > 50 for history in histories)
    assert sum(history.counts["lost"] for history in histories)
    assert sum(op.volatile for h in histories for op in h.arena.history())
    assert all(len(history.arena.history()) > 50 for history in histories)
    assert all(sum(len(diary.looks) for diary in h.diaries) > 20 for h in histories)


def test_a_seed_gives_one_run():
    prints = set()
    for _ in range(2):
        history = scenario_volume.trace(2)
        prints.add((history.done, history.failed, tuple(sorted(history.files))))
    assert len(prints) == 1
