"""Maps that change under load: no run goes wrong, and each broken rule is found."""

import pytest

from dfs.testing import scenario_maps

SEEDS = 4  # in which each broken rule must show


@pytest.mark.parametrize("seed", range(2))
def test_no_run_goes_wrong(seed):
    world, found = scenario_maps.play(seed)
    assert found == []
    assert world.changes == 3
    assert max(world.cluster.maps) >= 7
    assert all(client.acked for client in world.clients)
    assert any(client.stored for client in world.clients)


@pytest.mark.parametrize("mutant", scenario_maps.MUTANTS)
def test_a_broken_rule_is_found(mutant):
    assert any(scenario_maps.run(seed, mutant=mutant) for seed in range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_more_runs(seed):
    assert scenario_maps.run(seed) == []
