"""Run a trio program on a virtual clock with a scheduler that follows a seed."""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

import trio
import trio.testing

from dfs.errors import leaves

T = TypeVar("T")


def run_seeded(fn: Callable[..., Awaitable[T]], *args: Any, seed: int) -> T:
    """`trio.run(fn, *args)`; virtual time jumps as soon as every task waits.

    Uses trio's own switch for reproducible order of tasks, which its test-suite uses the same way.
    """
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]  # Final, but a switch
    trio._core._run._r = Random(seed)
    return trio.run(fn, *args, clock=trio.testing.MockClock(autojump_threshold=0))


def run_judged(
    fn: Callable[[], Awaitable[Any]], *, seed: int, name: str, wanted: tuple[type[Exception], ...]
) -> list[str]:
    """Run a schedule; what was violated: the first of `wanted` in all that it raises, in words.

    Anything else that it raises is raised here: it is a fault of the scenario.
    """
    try:
        run_seeded(fn, seed=seed)
    except BaseException as e:
        found = next((x for x in leaves(e) if isinstance(x, wanted)), None)
        if found is None:
            raise
        return [f"{name} seed {seed}: {type(found).__name__}: {found}"]
    return []
