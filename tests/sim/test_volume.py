"""Whole clusters with file systems on them, under faults, from seeds."""

import logging

import pytest

from dfs.testing import scenario_volume

SEEDS = range(1, 9)


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
    assert any(scenario_volume.run(seed, mutant=mutant) for seed in SEEDS)


def test_a_seed_gives_one_run():
    prints = set()
    for _ in range(2):
        history = scenario_volume.trace(2)
        prints.add((history.done, history.failed, tuple(sorted(history.files))))
    assert len(prints) == 1
