"""Whole chunk clusters under faults, from seeds; and mutants that must be caught."""

import pytest

from dfs.testing import scenario_chunks as scenario

pytestmark = pytest.mark.filterwarnings("ignore")

# For each mutant a few seeds; at least one of them must turn red.
CATCHING = {
    "ack-before-sync": (0,),
    "sync-ignores-boot": (0,),
    "read-without-verify": (0,),
    "ingest-without-verify": (0,),
    "fewer-acks": (0,),
    "no-catch-up": (0,),
    "resurrect": (0,),
}


@pytest.mark.parametrize("seed", range(5))
def test_invariants_hold(seed):
    assert scenario.run(seed) == [], f"replay with scenario_chunks.run({seed})"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_invariants_hold_for_many_seeds(seed):
    assert scenario.run(seed) == [], f"replay with scenario_chunks.run({seed})"


def test_one_seed_gives_one_run():
    assert scenario.fingerprint(3) == scenario.fingerprint(3)
    assert scenario.fingerprint(3) != scenario.fingerprint(4)


def test_every_mutant_has_seeds():
    assert set(CATCHING) == set(scenario.MUTANTS)


@pytest.mark.parametrize("mutant", scenario.MUTANTS)
def test_mutants_are_caught(mutant):
    assert any(scenario.run(seed, mutant=mutant) for seed in CATCHING[mutant])
