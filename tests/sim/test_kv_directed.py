"""What random schedules of registers meet too seldom, step by step; and that a broken rule shows.

See `dfs.testing.kv_directed`.
"""

import pytest

from dfs.testing.kv_cores import ViolationError
from dfs.testing.kv_directed import (
    SCHEDULES,
    home_again,
    home_again_to_a_new_value,
    several_homes_again,
)
from dfs.testing.kv_mutants import MUTANTS


@pytest.mark.parametrize("schedule", dict.fromkeys(SCHEDULES.values()), ids=lambda f: f.__name__)
def test_the_real_rules_hold(schedule):
    schedule(None)


FORGETTING = (home_again, several_homes_again, home_again_to_a_new_value)


@pytest.mark.parametrize("schedule", FORGETTING)
def test_former_homes_forget(schedule):
    schedule(None)


def test_they_must_forget_for_good():
    with pytest.raises(ViolationError):  # one that meets a new value is saved by its pull, too
        several_homes_again("keepsold")


@pytest.mark.parametrize("mutant", SCHEDULES)
def test_a_broken_rule_shows(mutant):
    assert mutant in MUTANTS
    with pytest.raises(ViolationError):
        SCHEDULES[mutant](mutant)
