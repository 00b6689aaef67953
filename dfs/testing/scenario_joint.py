"""Homes of one partition move, by the real map and the real thresholds: no quorum misses a write.

A seed plays one trace of `dfs.testing.joint_cores` in every shape: homes that are disjoint or
overlap, N of 3, 4 and 5, W = N, R = N.
"""

from random import Random
from typing import TYPE_CHECKING

from dfs.cluster.joint import RULES
from dfs.testing import joint_mutants
from dfs.testing.joint_cores import SHAPES, World

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MUTANTS", "NAME", "run"]

NAME = "joint"
MUTANTS = {name: mutant[0] for name, mutant in joint_mutants.MUTANTS.items()}


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of the traces of a seed; empty is good.

    A mutant is played in the shapes in which it must be seen only.
    """
    world_class: Callable[..., World] = World
    rules = RULES
    shapes = tuple(SHAPES)
    if mutant is not None:
        _, world_class, rules, shapes, _ = joint_mutants.MUTANTS[mutant]
    found = []
    for shape in shapes:
        world = world_class(Random(seed), shape, rules)
        world.run()
        found += [f"{shape}: {name}, {count} times" for name, count in world.violations.items()]
    return found
