"""Whole metadata nodes under faults: no run goes wrong, and each broken rule is found."""

import pytest

from dfs.testing import scenario_homes

# Where to look first for each mutant; all seeds up to the last are tried.
FIRST = {"unconfirmed": 8, "empty_rebuild": 8, "lost_is_conflict": 3, "hasty_checkpoint": 2}
MUTANT_SEEDS = 20


@pytest.mark.parametrize("seed", range(4))
def test_no_run_goes_wrong(seed):
    world, found = scenario_homes.play(seed)
    assert found == []
    assert world.ledger.answers > 20
    assert len(world.ledger.log) > 10


@pytest.mark.parametrize("mutant", scenario_homes.MUTANTS)
def test_each_broken_rule_is_found(mutant):
    first = FIRST.get(mutant, 0)
    order = [first, *(s for s in range(MUTANT_SEEDS) if s != first)]
    assert any(scenario_homes.run(seed, mutant=mutant) for seed in order)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_more_runs(seed):
    assert scenario_homes.run(seed) == []
