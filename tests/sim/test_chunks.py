"""Whole chunk clusters under faults, from seeds; and mutants that must be caught."""

import pytest

from dfs.testing import scenario_chunks as scenario

pytestmark = pytest.mark.filterwarnings("ignore")

# For each mutant a seed that catches it today; others are tried when the traces have changed.
LIKELY = {
    "ack-before-sync": 0,
    "sync-ignores-boot": 1,
    "read-without-verify": 0,
    "ingest-without-verify": 1,
    "fewer-acks": 3,
    "no-catch-up": 0,
    "resurrect": 3,
}


@pytest.mark.parametrize("seed", range(3))
def test_invariants_hold(seed):
    assert scenario.run(seed) == [], f"replay with scenario_chunks.run({seed})"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_invariants_hold_for_many_seeds(seed):
    assert scenario.run(seed) == [], f"replay with scenario_chunks.run({seed})"


def test_one_seed_gives_one_run():
    assert scenario.fingerprint(3) == scenario.fingerprint(3)


@pytest.mark.parametrize("mutant", scenario.MUTANTS)
def test_mutants_are_caught(mutant):
    seeds = [LIKELY[mutant], *range(10, 30)]
    assert any(scenario.run(seed, mutant=mutant) for seed in seeds)
