"""Registers with one rule broken each: what proves that the simulation can see such a fault.

The faults themselves are in `dfs.testing.kv_broken`; those in the shell (`hasty`, `amnesia`, ...)
are read by name in `dfs.testing.kv_shell` and `kv_writer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dfs.cluster.joint import RULES, Rules
from dfs.testing.kv_broken import CLASSES, PATCHES
from metadata.antientropy import AntiEntropy
from metadata.coordinator import Coordinator
from metadata.hints import Hints
from metadata.merkle import Digests
from metadata.registers import Registers
from metadata.rejoin import PullFirst
from metadata.tombstones import Tombstones

MUTANTS = {
    "hasty": "a node answers and sends before its own copy is durable",
    "w-1": "one copy less than W is waited for",
    "nopw": "copies on homes are not told from hints",
    "r-1": "one answer less than R is waited for",
    "norepair": "a read answers before what differs is written back",
    "repairpw": "what differs is written back to W copies, hints among them",
    "nopr": "answers of fallbacks count as those of homes",
    "m3": "a refusal by a node with a newer map counts as a copy",
    "owncopy": "a mint is sent on before the own copy is durable",
    "repair1": "what differs is written back to one home only",
    "sameactor": "a node that lost and regained a partition mints under the old actor",
    "mintb": "members of B coordinate and mint in phase 1",
    "amnesia": "a node that was restored from an old state keeps its actors",
    "showsold": "a node that was restored from an old state answers reads at once",
    "mixesold": "a home that waits merges new values into registers that may be ghosts",
    "keepsold": "a former home that is one again keeps its old rows",
    "nopull": "nodes with old registers do not wait until they have pulled",
    "resend": "a resent put is a new one",
    "mintagain": "a mint is forgotten when its caller's time runs out",
    "nofence": "replicas carry out requests of any older epoch",
    "nowritefence": "replicas carry out writes of any older epoch",
    "noreadfence": "replicas carry out reads of any older epoch",
    "writea": "during a transition only the old homes are written",
    "writeb": "during a transition only the new homes are written",
    "readb": "phase 1 reads the new homes",
    "fence-1": "phase 1 is left when one member of A fewer is fenced and has pushed",
    "push-1": "phase 1 is left when one member of B fewer has been pushed to",
    "readfence-1": "phase 2 is left when no member of A is fenced",
    "anyreport": "reports of earlier epochs count",
    "mergenewer": "a merge keeps one of two concurrent values only",
    "mergesees": "a merge drops values that only the other side lacks",
    "nodot": "a delete has no dot",
    "nocontext": "a put supersedes nothing",
    "allcontext": "a put supersedes everything its coordinator has",
    "oldclock": "the hybrid clock starts again at the wall clock after a restart",
    "purgeearly": "a tombstone is purged when some home has it",
    "purgemoving": "tombstones are purged while homes change",
    "notall": "tombstones are purged though a home does not answer",
    "nograce": "tombstones are purged at once",
    "grace0": "tombstones are purged at any age",
    "settle0": "tombstones are purged as soon as all homes have them",
    "oldhints": "hints are delivered and taken at any age",
    "hintsender": "hints are delivered at any age",
    "hintreceiver": "hints are taken at any age",
    "expush": "former homes push their registers",
    "pushwaiting": "a home that waits says that it has pushed",
    "nodigest": "a change of a row leaves the digests as they are",
    "limitmerge": "a merge keeps at most three siblings",
    "nomap": "an operation goes on by the old map",
}


class Classes:
    """The real classes, or those with the fault."""

    def __init__(self, mutant: str | None) -> None:
        """Choose by name; None: all real."""
        found = CLASSES.get(mutant or "", {})
        self.registers: type[Registers] = found.get("registers", Registers)
        self.coordinator: type[Coordinator] = found.get("coordinator", Coordinator)
        if "operation" in found:

            class Broken(Coordinator):
                operation_class = found["operation"]

            self.coordinator = Broken
        self.digests: type[Digests] = found.get("digests", Digests)
        self.hints: type[Hints] = found.get("hints", Hints)
        self.antientropy: type[AntiEntropy] = found.get("antientropy", AntiEntropy)
        self.tombstones: type[Tombstones] = found.get("tombstones", Tombstones)
        self.rules: Rules = found.get("rules", RULES)
        self.pull_first: type[PullFirst] = found.get("pull_first", PullFirst)
        self._patch = PATCHES.get(mutant or "")

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While functions and classes that are reached by name are replaced."""
        if self._patch is None:
            yield
            return
        module, name, broken = self._patch
        real = getattr(module, name)
        setattr(module, name, broken)
        try:
            yield
        finally:
            setattr(module, name, real)
