"""Schedules of the delegation: none goes wrong, and each broken rule is found."""

import pytest

from dfs.testing import scenario_delegation

SEEDS = 120
# Where to look first for each mutant; all seeds up to the last are tried.
FIRST = {
    "no_epoch": 428,
    "memory_past": 2390,
    "hasty_revoke": 330,
    "resend_beats": 2108,
}
MUTANT_SEEDS = 200


@pytest.mark.parametrize("block", range(4))
def test_no_schedule_goes_wrong(block):
    size = SEEDS // 4
    seeds = range(block * size, (block + 1) * size)
    assert [v for seed in seeds for v in scenario_delegation.run(seed)] == []


def test_schedules_reach_what_they_are_for():
    worlds = [scenario_delegation.play(seed)[0] for seed in range(40)]
    counts = {name: sum(world.counts[name] for world in worlds) for name in worlds[0].counts}
    assert counts["grants"] > 40
    assert counts["served"] > 1000
    assert counts["returns"] > 30
    assert counts["revoked"] > 10
    assert counts["lost"] > 5
    assert sum(world.ballots for world in worlds) > 80


@pytest.mark.parametrize("mutant", scenario_delegation.MUTANTS)
def test_each_broken_rule_is_found(mutant):
    first = FIRST.get(mutant, 0)
    order = [first, *(s for s in range(MUTANT_SEEDS) if s != first)]
    assert any(scenario_delegation.run(seed, mutant=mutant) for seed in order)


def test_a_seed_is_a_schedule():
    first, second = (scenario_delegation.play(7)[0] for _ in range(2))
    assert first.ledger.log == second.ledger.log
    assert first.counts == second.counts


@pytest.mark.slow
def test_many_schedules():
    assert [v for seed in range(10_000, 20_000) for v in scenario_delegation.run(seed)] == []
