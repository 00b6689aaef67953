"""`SimHost`: what a simulated metadata node keeps over crashes, and its present run."""

from random import Random
from typing import TYPE_CHECKING, Protocol

import trio

from dfs.clock import Clock
from dfs.env import Env
from dfs.testing.disk import SimDisk
from dfs.testing.network import SimEndpoint, SimNetwork
from dfs.testing.processes import SimProcesses

if TYPE_CHECKING:
    from metadata.service import MetadataNode


class Surroundings(Protocol):
    """What the hosts of one simulation share."""

    random: Random
    network: SimNetwork
    clock: Clock


class SimHost:
    """A disk, and the node that runs on it while there is one; subclasses start it."""

    def __init__(self, around: Surroundings, number: int) -> None:
        """An empty disk; not started."""
        self.number = number
        self.name = f"node{number}"
        self.address = f"tcp://{self.name}:1"
        self.disk = SimDisk(Random(around.random.random()), sync_delay=0.002)
        self.node: MetadataNode | None = None
        self.endpoint: SimEndpoint | None = None
        self._around = around
        self._scope = trio.CancelScope()

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return self.node is not None

    def make_env(self) -> tuple[Env, SimEndpoint]:
        """The surroundings of a run that begins, and its endpoint."""
        around = self._around
        self._scope = trio.CancelScope()
        self.endpoint = endpoint = around.network.endpoint(self.name)
        random = Random(around.random.random())
        return Env(around.clock, self.disk, endpoint, SimProcesses(random), random), endpoint

    def crash(self) -> None:
        """Lose power."""
        self._scope.cancel()
        if self.endpoint is not None:
            self.endpoint.close()
        self.disk.crash()
        self.node = None
