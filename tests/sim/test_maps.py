"""Maps that change under load: no run goes wrong, and each broken rule is found."""

import pytest

from dfs.testing import scenario_maps

# A seed that shows each fault; found by trying seeds from 0 on.
SHOWS = {"push_early": 3}


@pytest.mark.parametrize("seed", range(2))
def test_no_run_goes_wrong(seed):
    world, found = scenario_maps.play(seed)
    assert found == []
    assert world.changes == 3
    assert max(world.cluster.maps) >= 7
    assert all(client.acked for client in world.clients)
    assert any(client.stored for client in world.clients)


@pytest.mark.parametrize("mutant", SHOWS)
def test_a_broken_rule_is_found(mutant):
    assert scenario_maps.run(SHOWS[mutant], mutant=mutant)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_more_runs(seed):
    assert scenario_maps.run(seed) == []
