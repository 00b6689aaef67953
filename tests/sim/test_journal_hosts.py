"""Whole journal hosts on a simulated network and disks; see `dfs.testing.scenario_journal`."""

import pytest

from dfs.testing.disk import SimDisk
from dfs.testing.journal_mutants import MUTANTS as CORE_MUTANTS
from dfs.testing.network import SimEndpoint
from dfs.testing.scenario_journal import MUTANTS, NAME, play, run


def test_hosts_agree_under_power_cuts_partitions_and_moves():
    worlds = [play(seed) for seed in range(14)]
    assert [w.violations for w in worlds] == [[]] * len(worlds)
    assert sum(len(w.results) for w in worlds) > 800
    assert sum(w.reads for w in worlds) > 150
    assert sum(w.crashes for w in worlds) > 100
    assert sum(w.changes for w in worlds) > 25


def test_hosts_whose_disks_are_quick_agree_too(monkeypatch):
    monkeypatch.setattr(SimDisk, "quick", True)
    monkeypatch.setattr(SimEndpoint, "turns", True)
    worlds = [play(seed) for seed in range(8)]
    assert [w.violations for w in worlds] == [[]] * len(worlds)
    assert sum(len(w.results) for w in worlds) > 400
    assert sum(w.crashes for w in worlds) > 50


def test_a_seed_is_a_schedule():
    first, second = play(3), play(3)
    assert first.results == second.results
    assert first.network.fingerprint == second.network.fingerprint


@pytest.mark.parametrize("mutant", ["nosync", "hasty", "norecover", "nostep", "later"])
def test_a_broken_host_is_found(mutant):
    for seed in range(25):
        try:
            if play(seed, mutant=mutant).violations:
                return
        except BaseExceptionGroup:
            return  # a node refused to go on with what it found on its disk
    pytest.fail(f"{mutant} was not noticed")


def test_the_scenario_plays_both_schedules():
    assert NAME == "journal"
    assert run(1) == []
    assert CORE_MUTANTS.keys() < MUTANTS.keys()
    assert run(1, mutant="norecover")
