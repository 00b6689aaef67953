"""Transitions lose no acknowledged write and show no stale read, whatever is late, lost or dead."""

from collections import Counter
from random import Random

import pytest

from dfs.testing.joint_cores import SHAPES, World
from dfs.testing.joint_mutants import MUTANTS

TRACES = 300


@pytest.mark.parametrize("shape", SHAPES)
def test_no_trace_violates_anything(shape):
    ends = Counter()

    class Counted(World):
        def _finish(self):
            ends[self.present] += 1
            super()._finish()

    for seed in range(TRACES):
        world = Counted(Random(seed), shape)
        world.run()
        assert not world.violations, f"seed {seed} of {shape}"
        ends["acked"] += world.acked > 0
    # the faults did not keep the transition from happening while they went on
    assert ends[2] + ends[3] > TRACES / 50
    assert ends["acked"] > TRACES / 2


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, mutant in MUTANTS.items() for shape in mutant[3]]
)
def test_every_broken_rule_is_seen(name, shape):
    _, world_class, rules, _, invariant = MUTANTS[name]
    for seed in range(3000):
        world = world_class(Random(seed), shape, rules)
        world.run()
        if world.violations[invariant]:
            return
    pytest.fail(f"mutant {name} is not seen in {shape}")


def test_a_dead_member_of_a_blocks_nothing():
    died = 0
    for seed in range(TRACES):
        world = World(Random(seed), "disjoint")
        world._die()
        world.run()
        died += len(world.dead)
        assert world.present == 3
        assert not world.violations
    assert died == TRACES


def test_a_majority_of_a_that_is_dead_blocks_the_transition():
    """The check of M4 can fail."""
    world = World(Random(1), "disjoint", deaths=2)
    world.dead.update(world.old[:2])
    world.run()
    assert world.violations["M4 stuck"]
