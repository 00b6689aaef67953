"""Schedules of exclusive sessions: none goes wrong, and each broken rule is found."""

import pytest

from dfs.testing import scenario_exclusion

SEEDS = 120
FIRST = {"told_to_the_end": 46}  # where to look first for each mutant
MUTANT_SEEDS = 100


def test_no_schedule_goes_wrong():
    assert [v for seed in range(SEEDS) for v in scenario_exclusion.run(seed)] == []


def test_schedules_reach_what_they_are_for():
    worlds = [scenario_exclusion.play(seed)[0] for seed in range(40)]
    counts = {name: sum(world.counts[name] for world in worlds) for name in worlds[0].counts}
    assert counts["exclusive"] > 20
    assert counts["refused"] > 500
    assert counts["way"] > 15
    assert counts["grants"] > 40
    assert counts["served"] > 1000


@pytest.mark.parametrize("mutant", scenario_exclusion.MUTANTS)
def test_each_broken_rule_is_found(mutant):
    first = FIRST.get(mutant, 0)
    order = [first, *(s for s in range(MUTANT_SEEDS) if s != first)]
    assert any(scenario_exclusion.run(seed, mutant=mutant) for seed in order)


@pytest.mark.slow
def test_many_schedules():
    assert [v for seed in range(10_000, 20_000) for v in scenario_exclusion.run(seed)] == []
