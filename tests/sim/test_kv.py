"""Registers under faults; see `dfs.testing.kv_cores`."""

import secrets

import pytest

from dfs.testing.kv_cores import run_cores
from dfs.testing.kv_mutants import MUTANTS
from dfs.testing.scenario_kv import NAME, run

# Mutants by the seed that found them when this was written: the search is short as long as it does.
FOUND = {
    "hasty": 0, "w-1": 0, "nopw": 0, "r-1": 0, "resend": 0, "writea": 0, "writeb": 3,
    "mergenewer": 0, "mergesees": 0, "nodot": 0, "nocontext": 0, "allcontext": 0, "nodigest": 0,
    "limitmerge": 0,
}  # fmt: skip


def test_registers_keep_their_promises_under_faults():
    worlds = [run_cores(seed) for seed in range(72)]
    assert sum(w.ended for w in worlds) > 1000, "the schedules do next to nothing"
    assert sum(w.changes for w in worlds) > 20
    assert sum(w.crashes for w in worlds) > 100
    assert sum(w.restores for w in worlds) > 1


def test_fresh_seeds():
    first = secrets.randbelow(1 << 30)
    for seed in range(first, first + 48):
        assert run(seed) == [], f"dfs sim --scenario kv --seeds {seed}"


def test_a_seed_is_a_schedule():
    first, second = run_cores(5), run_cores(5)
    assert first.network.sent == second.network.sent
    assert first.oracle.rows.keys() == second.oracle.rows.keys()
    assert [n.store.rows() for n in first.nodes.values()] == [
        n.store.rows() for n in second.nodes.values()
    ]


@pytest.mark.parametrize("mutant", sorted(FOUND))
def test_a_broken_rule_is_found(mutant):
    for seed in (FOUND[mutant], *range(40)):
        if run(seed, mutant=mutant):
            return
    pytest.fail(f"{mutant} was not noticed")


@pytest.mark.slow
def test_soak():
    for seed in range(1000, 6000):
        assert run(seed) == [], seed


def test_the_scenario_names_its_mutants():
    assert NAME == "kv"
    assert FOUND.keys() < MUTANTS.keys()
