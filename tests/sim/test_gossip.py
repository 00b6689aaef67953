"""Membership under faults, from seeds; and every broken rule is found."""

import pytest

from dfs.testing.gossip import Sim, address_of, key_of
from dfs.testing.scenario_gossip import ACTS, MUTANTS, play, run

# A seed and its cluster that find each mutant, by the act that does.
FOUND_BY = {
    "norefute": "weather",
    "noindirect": "link",
    "nosuspicion": "weather",
    "hasty": "weather",
    "endless": "quiet",
    "mute": "crash",
    "forgetdead": "replay",
    "bootless": "crash",
    "squatter": "usurper",
    "sleeper": "nap",
    "loner": "halves",
    "nosync": "crash",
    "unaware": "slow",
}
ONLY_DIRECTED = {"nobuddy"}  # tests/unit/cluster/test_membership.py


@pytest.mark.parametrize("act", sorted(ACTS))
def test_an_act_leaves_no_violation(act):
    for seed, size in enumerate((5, 7, 12, 20)):
        assert play(seed, acts=[act], size=size).violations == [], f"seed {seed}"


def test_fifty_members():
    world = play(1, acts=["crash", "weather", "halves", "come_and_go"], size=50)
    assert world.violations == []
    assert world.deaths > 50
    assert world.suspicions > 100


def test_seeds():
    for seed in range(1, 21):
        assert run(seed) == [], f"seed {seed}"


def test_a_seed_is_a_run():
    first, second = play(5), play(5)
    assert first.sim.delivered == second.sim.delivered
    assert first.sim.now == second.sim.now
    assert (first.deaths, first.suspicions) == (second.deaths, second.suspicions)


def test_all_mutants_are_accounted_for():
    assert FOUND_BY.keys() | ONLY_DIRECTED == MUTANTS.keys()


@pytest.mark.parametrize("mutant", sorted(FOUND_BY))
def test_a_broken_rule_is_found(mutant):
    for seed in range(40):
        size = (5, 8, 12, 20)[seed % 4]
        if play(seed, mutant=mutant, acts=[FOUND_BY[mutant]], size=size).violations:
            return
    pytest.fail(f"{MUTANTS[mutant]}: nobody noticed")


def test_news_reaches_all_in_few_rounds():
    """At 200 members a new boot is known everywhere within two seconds."""
    sim = Sim(1, strict=False)
    for number in range(200):
        sim.start(number, range(200))
    sim.run_until(60.0)
    sim.crash(sim.listening[address_of(7)])
    sim.start(7, [0])
    sim.run_until(62.0)
    boots = {p.core.snapshot(key_of(7)).boot for p in sim.processes() if p.number != 7}
    assert boots == {2}


def test_a_cluster_without_faults_is_never_suspicious():
    sim = Sim(2, strict=False)
    for number in range(30):
        sim.start(number, range(30))
    sim.run_until(300.0)
    for process in sim.processes():
        counts = process.core.counts
        assert counts["probes"] > 290
        assert (counts["failed"], counts["suspected"], counts["pauses"]) == (0, 0, 0)


@pytest.mark.slow
def test_soak():
    for seed in range(1000, 3000):
        assert run(seed) == [], f"seed {seed}"
