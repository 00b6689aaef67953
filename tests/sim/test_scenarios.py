"""Every scenario can be listed, run and broken by name."""

import inspect
from collections.abc import Mapping

import pytest

from dfs.cli.check_cmd import scenarios
from dfs.testing import scenario_joint, scenario_sync

SCENARIOS = scenarios()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_the_interface(name):
    scenario = SCENARIOS[name]
    assert name == scenario.NAME
    assert scenario.__name__ == f"dfs.testing.scenario_{name}"
    assert (scenario.__doc__ or "").strip()
    assert scenario.MUTANTS
    if isinstance(scenario.MUTANTS, Mapping):
        assert all(isinstance(about, str) for about in scenario.MUTANTS.values())
    parameters = inspect.signature(scenario.run).parameters
    assert list(parameters) == ["seed", "mutant"]
    assert parameters["mutant"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["mutant"].default is None


@pytest.mark.parametrize(
    ("scenario", "mutant"), [(scenario_sync, "nodigest"), (scenario_joint, "readfenced")]
)
def test_seeds_and_mutants_by_name(scenario, mutant):
    assert [scenario.run(seed) for seed in range(3)] == [[], [], []]
    assert any(scenario.run(seed, mutant=mutant) for seed in range(100))
