"""Journal replicas under the random scheduler of `dfs.testing.journal_cores`."""

import pytest

from dfs.testing.journal_cores import ViolationError, run_cores
from dfs.testing.journal_mutants import MUTANTS

# These take hundreds of schedules; tests/unit/metadata/test_journal_directed.py finds them at once.
RARE = {"noprep", "atonce", "vote", "ownack", "forgetful", "staleconfirm", "yesman", "selfconfirm"}
RARE |= {"undisturbed"}  # no client there forms entries that count on those before

# Seeds that found them when this was written, so that the search is short as long as they do.
FIRST = {"later": (48,), "hasty": (23,), "oldsize": (15,), "removed": (12,), "norecover": (12,)}


def search(seeds, mutant):
    for seed in seeds:
        run_cores(seed, mutant)


def test_replicas_agree_under_faults_and_membership_changes():
    operations = changes = amnesias = trims = 0
    for seed in range(60):
        world = run_cores(seed)
        operations += len(world.results)
        changes += world.changes
        amnesias += world.amnesias
        trims += world.trims
    assert operations > 1000, "the schedules do next to nothing"
    assert changes > 50
    assert amnesias > 50
    assert trims > 100


def test_a_seed_is_a_schedule():
    first, second = run_cores(7), run_cores(7)
    assert first.results == second.results
    assert first.history == second.history


@pytest.mark.parametrize("mutant", sorted(MUTANTS.keys() - RARE))
def test_a_broken_rule_is_found(mutant):
    with pytest.raises(ViolationError):
        search((*FIRST.get(mutant, ()), *range(150)), mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", sorted(RARE - {"noprep", "forgetful", "staleconfirm"}))
def test_a_rare_breach_is_found(mutant):
    with pytest.raises(ViolationError):
        search(range(6000), mutant)


@pytest.mark.slow
def test_soak():
    for seed in range(1000, 9000):
        run_cores(seed)
