"""Registers under faults: nothing acknowledged is lost, nothing deleted is back, reads only go on.

Each seed plays one schedule of `dfs.testing.kv_cores`: 3 to 50 nodes, clients with contexts and
resends, lost and late messages, crashes at any write, stopped nodes, full disks, skewed clocks,
changes of the map in their phases, old disk states that come back, days that pass.  A mutant that
takes more luck than that is also played its schedule of `dfs.testing.kv_directed`, with seed 49.
"""

from dfs.errors import DfsError
from dfs.testing.kv_cores import ViolationError, run_cores
from dfs.testing.kv_directed import SCHEDULES
from dfs.testing.kv_mutants import MUTANTS

__all__ = ["MUTANTS", "NAME", "run"]

NAME = "kv"
DIRECTED_SEED = 49


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of the schedule of a seed; empty is good."""
    directed = SCHEDULES.get(mutant or "") if seed == DIRECTED_SEED else None
    try:
        if directed is not None:
            directed(mutant)
        run_cores(seed, mutant)
    except ViolationError as e:
        return [f"directed: {directed.__name__}: {e}" if directed else str(e)]
    except (AssertionError, DfsError, KeyError, ValueError) as e:
        if mutant is None:
            raise
        return [f"a broken rule broke the program: {e!r}"]
    return []
