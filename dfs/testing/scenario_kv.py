"""Registers under faults: nothing acknowledged is lost, nothing deleted is back, reads only go on.

Each seed plays one schedule of `dfs.testing.kv_cores`: 3 to 50 nodes, clients with contexts and
resends, lost and late messages, crashes at any write, stopped nodes, full disks, skewed clocks,
changes of the map in their phases, old disk states that come back, days that pass.
"""

from dfs.errors import DfsError
from dfs.testing.kv_cores import ViolationError, run_cores
from dfs.testing.kv_mutants import MUTANTS

__all__ = ["MUTANTS", "NAME", "run"]

NAME = "kv"


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of the schedule of a seed; empty is good."""
    try:
        run_cores(seed, mutant)
    except ViolationError as e:
        return [str(e)]
    except (AssertionError, DfsError, KeyError, ValueError) as e:
        if mutant is None:
            raise
        return [f"a broken rule broke the program: {e!r}"]
    return []
