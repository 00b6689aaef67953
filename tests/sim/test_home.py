"""Schedules of the home's state machine: none goes wrong, and each broken rule is found."""

import pytest

from dfs.testing import scenario_home

SEEDS = 300
MUTANT_SEEDS = 2000


@pytest.mark.parametrize("block", range(4))
def test_no_schedule_goes_wrong(block):
    size = SEEDS // 4
    found = [v for seed in range(block * size, (block + 1) * size) for v in scenario_home.run(seed)]
    assert found == []


def test_schedules_reach_what_they_are_for():
    worlds = [scenario_home.play(seed)[0] for seed in range(40)]
    ledgers = [world.ledger for world in worlds]
    assert sum(ledger.answers for ledger in ledgers) > 400
    assert sum(ledger.checkpoints[-1][0] > 1 for ledger in ledgers) > 20
    assert sum(world.ballots for world in worlds) > 80
    verdicts = [v for ledger in ledgers for found in ledger.verdicts.values() for v in found]
    assert verdicts.count(False) > 40
    assert verdicts.count(True) > 400


@pytest.mark.parametrize("mutant", scenario_home.MUTANTS)
def test_each_broken_rule_is_found(mutant):
    assert any(scenario_home.run(seed, mutant=mutant) for seed in range(MUTANT_SEEDS))


def test_a_seed_is_a_schedule():
    first, second = (scenario_home.play(7)[0] for _ in range(2))
    assert first.ledger.log == second.ledger.log
    assert first.time == second.time


@pytest.mark.slow
def test_many_schedules():
    assert [v for seed in range(10_000, 40_000) for v in scenario_home.run(seed)] == []
