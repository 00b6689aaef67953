"""Background processes of the simulator: inline, after a virtual delay."""

import importlib
import inspect
from random import Random
from typing import Any

import trio

from dfs.codec import pack, unpack
from dfs.errors import DfsError, from_wire, to_wire


class SimProcesses:
    """See `dfs.env.Processes`; arguments and results go through the codec, as between processes."""

    def __init__(self, random: Random, *, delay: float = 0.05) -> None:
        """Jobs take up to `delay` virtual seconds before they run; `jobs` counts them."""
        self._random = random
        self._delay = delay
        self._faults = 0
        self.jobs = 0

    def fail_next(self, count: int = 1) -> None:
        """Let the next `count` jobs die without having run."""
        self._faults += count

    async def run(self, function: str, *args: Any) -> Any:
        """See `dfs.env.Processes.run`."""
        packed = pack(args)
        self.jobs += 1
        await trio.sleep(self._random.random() * self._delay)
        if self._faults:
            self._faults -= 1
            raise DfsError(f"the process that ran {function} died (injected)")
        module, _, name = function.partition(":")
        target = getattr(importlib.import_module(module), name)
        try:
            result = target(*unpack(packed))
            if inspect.isawaitable(result):
                result = await result
        except Exception as e:
            raise from_wire(*unpack(pack(to_wire(e)))) from e
        return unpack(pack(result))
