"""Registers with one rule broken each: what proves that the simulation can see such a fault."""

from collections.abc import Iterator
from contextlib import contextmanager

from dfs.cluster.joint import RULES, Rules
from metadata.antientropy import AntiEntropy
from metadata.coordinator import Coordinator
from metadata.hints import Hints
from metadata.merkle import Digests
from metadata.registers import Registers
from metadata.tombstones import Tombstones

MUTANTS: dict[str, str] = {}


class Classes:
    """The real classes, or those with the fault."""

    def __init__(self, mutant: str | None) -> None:
        """Choose by name; None: all real."""
        self.registers = Registers
        self.coordinator = Coordinator
        self.digests = Digests
        self.hints = Hints
        self.antientropy = AntiEntropy
        self.tombstones = Tombstones
        self.rules: Rules = RULES
        del mutant

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While functions that are no methods are replaced."""
        yield
