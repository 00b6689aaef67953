"""Journals with one rule broken each: what proves that the simulations can see such a fault.

Some faults are in a replica (`replica_class`), some in how it is driven or operated; the scenarios
read the name for those.
"""

from typing import ClassVar

from metadata.journal import OWNING, Replica, Ticket
from metadata.journalacceptor import ACCEPT, PREPARE, REPLY, SEND
from metadata.journalstate import Ballot, config_of

MUTANTS = {
    "noprep": "a proposer goes on at the new members without preparing there",
    "later": "a proposer counts the old members for two more entries",
    "alpha": "everybody lets a config take effect two entries later",
    "atonce": "a config entry is counted at its own new members",
    "learned": "members learned from a promise, quorum still counted at the members asked",
    "vote": "a replica that lost its state votes under its old id",
    "nocatchup": "an acceptor accepts on top of a gap",
    "removed": "answers of replicas that are no members are counted",
    "oldsize": "the majority is computed on the size of the config before",
    "early": "old members are wiped when the config is chosen, not held by the new majority",
    "onejournal": "old members are wiped when the first of their journals has moved",
    "nopush": "an old member says Moved but does not tell the new members",
    "nocas": "a config request carries no version",
    "genesis": "a blank replica takes the members of the map for a genesis",
    "nostep": "a proposer that accepted a higher ballot still counts its late acks",
    "norecover": "a new owner does not propose what the promises report",
    "hasty": "votes leave before what they speak of is durable",
    "ownack": "the proposer counts its own vote before it is durable",
    "forgetful": "recovery ignores promises",
    "staleconfirm": "a confirm round counts for who came after it started",
    "yesman": "an acceptor confirms a ballot though it promised a higher one",
    "selfconfirm": "a confirm needs no majority",
    "undisturbed": "an owner that re-prepares keeps its queue though another's entry came first",
}


class _NoPrepare(Replica):
    def rule_members_changed(self) -> None:
        if self.me not in self.members:
            super().rule_members_changed()
            return
        self._inform(self.members)
        self.asked = self.members
        self._next()


class _Later(Replica):
    lag = 0

    def rule_members_changed(self) -> None:
        if self.lag >= 2:
            self.lag = 0
            super().rule_members_changed()
            return
        self.lag += 1
        self._next()


class _Alpha(Replica):
    def rule_deciders(self) -> tuple[int, ...]:
        members: tuple[int, ...] = ()
        for at, (seq, _, later) in enumerate(self.configs):
            if at == 0 or seq <= self.chosen - 2:
                members = later
        return members


class _AtOnce(Replica):
    def rule_voters(self, payload: bytes) -> tuple[int, ...]:
        found = config_of(payload)
        return found[2] if found else self.asked


class _Learned(Replica):
    def rule_promised_elsewhere(self) -> bool:
        return False


class _NoCatchUp(Replica):
    def rule_on_top(self, seq: int, prev_hash: bytes) -> bool:
        if seq > self.chosen + 1:
            self.chosen, self.head, self.pending = seq - 1, prev_hash, None
            self.tail.clear()
        return super().rule_on_top(seq, prev_hash)


class _Removed(Replica):
    def rule_majority(self, who: "set[int] | dict[int, object]", members: tuple[int, ...]) -> bool:  # type: ignore[override]  # narrower on purpose
        return len(who) > len(members) // 2

    def _strangers(self) -> list[int]:
        known = {m for _, _, members in self.configs for m in members}
        return sorted(known - set(self.asked))

    def _start(self) -> None:
        super()._start()
        message = (PREPARE, self.ballot, self.chosen)
        if self.role:
            self.out.extend((REPLY, m, message) for m in self._strangers())

    def _accept(self, payload: bytes, ticket: Ticket | None) -> None:
        super()._accept(payload, ticket)
        message = (ACCEPT, self.ballot, self.chosen + 1, self.head, payload)
        self.out.extend((SEND, m, message) for m in self._strangers())


class _OldSize(Replica):
    def rule_majority(self, who: "set[int] | dict[int, object]", members: tuple[int, ...]) -> bool:  # type: ignore[override]  # narrower on purpose
        n = len(self.configs[-2][2]) if len(self.configs) > 1 else len(members)
        return sum(m in who for m in members) > n // 2


class _NoPush(Replica):
    def rule_moved(self) -> None:
        pass

    def rule_members_changed(self) -> None:
        self._start()


class _NoStep(Replica):
    def rule_higher_ballot(self) -> None:
        pass

    def rule_learned(self) -> None:
        pass


class _NoRecover(Replica):
    def rule_recover(self, found: list[tuple[Ballot, bytes]]) -> bytes | None:
        return None


class _StaleConfirm(Replica):
    def rule_confirm_waits(self, ticket: Ticket) -> None:
        self.confirming.append(ticket)


class _YesMan(Replica):
    def rule_confirmed(self, ballot: Ballot) -> bool:
        return True


class _SelfConfirm(Replica):
    def _check_confirmed(self) -> None:
        if self.role == OWNING:
            self.confirmed = set(self.asked)
        super()._check_confirmed()


class _Undisturbed(Replica):
    def rule_disturbed(self) -> bool:
        return False


class Mutants:
    """Replica classes by the name of their fault."""

    CLASSES: ClassVar[dict[str, type[Replica]]] = {
        "noprep": _NoPrepare,
        "later": _Later,
        "alpha": _Alpha,
        "atonce": _AtOnce,
        "learned": _Learned,
        "nocatchup": _NoCatchUp,
        "removed": _Removed,
        "oldsize": _OldSize,
        "nopush": _NoPush,
        "nostep": _NoStep,
        "norecover": _NoRecover,
        "staleconfirm": _StaleConfirm,
        "yesman": _YesMan,
        "selfconfirm": _SelfConfirm,
        "undisturbed": _Undisturbed,
    }


def replica_class(mutant: str | None) -> type[Replica]:
    """The replica with that fault; the correct one when the fault is not in the replica."""
    return Mutants.CLASSES.get(mutant or "", Replica)
