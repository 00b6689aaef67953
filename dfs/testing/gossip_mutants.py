"""Membership cores that break one rule each: what the checks of `scenario_gossip` must find.

`nobuddy` only costs time, which the directed tests of the core see and the scenario does not.
"""

from dfs.cluster.membership import Membership
from dfs.cluster.swim import DEAD, Claim
from dfs.cluster.swimtable import Member

MUTANTS = {
    "norefute": "who is accused does not raise its incarnation",
    "noindirect": "nobody else is asked before a silent peer is suspected",
    "nosuspicion": "a silent peer is dead at once",
    "hasty": "a suspect has 0.3 seconds to refute",
    "endless": "there is no limit to how often news is told",
    "mute": "news is told once",
    "forgetdead": "the dead are forgotten at once",
    "bootless": "a claim of an earlier run outranks the present one",
    "squatter": "a process goes on when a later one has its identity",
    "sleeper": "who slept holds it against the others that nothing arrived meanwhile",
    "loner": "nobody speaks to the dead",
    "nosync": "tables are not compared",
    "unaware": "who is slow itself judges others as if it were not",
    "nobuddy": "the suspect is not told that it is suspected",
}


class _NoRefute(Membership):
    def rule_refuted(self, claim: Claim) -> int:
        return self.me.incarnation


class _NoIndirect(Membership):
    def rule_relays(self) -> int:
        return 0


class _NoSuspicion(Membership):
    def rule_suspicion(self) -> float:
        return 0.0


class _Hasty(Membership):
    def rule_suspicion(self) -> float:
        return 0.3 / 6


class _Endless(Membership):
    def rule_limit(self) -> int:
        return 1000


class _Mute(Membership):
    def rule_limit(self) -> int:
        return 1


class _ForgetDead(Membership):
    def _adopt(self, claim: Claim, raw: bytes, now: float, *, relay: bool) -> None:
        super()._adopt(claim, raw, now, relay=relay)
        if claim.status >= DEAD:
            self.table.forget(claim.key)


class _Bootless(Membership):
    def rule_outranks(self, new: Claim, old: Claim) -> bool:
        return (new.incarnation, new.status) > (old.incarnation, old.status)


class _Squatter(Membership):
    def rule_usurps(self, claim: Claim) -> bool:
        return False


class _Sleeper(Membership):
    def _slept(self, late: float) -> None:
        pass


class _Loner(Membership):
    def _seldom(self, now: float) -> None:
        self._seldom_at = now + 10.0


class _NoSync(Membership):
    def _send_sync(self, member: Member) -> None:
        pass


class _Unaware(Membership):
    def rule_slow(self, change: int) -> None:
        pass


class _NoBuddy(Membership):
    def rule_first(self, member: Member) -> bytes:
        return b""


_CLASSES: dict[str, type[Membership]] = {
    "norefute": _NoRefute,
    "noindirect": _NoIndirect,
    "nosuspicion": _NoSuspicion,
    "hasty": _Hasty,
    "endless": _Endless,
    "mute": _Mute,
    "forgetdead": _ForgetDead,
    "bootless": _Bootless,
    "squatter": _Squatter,
    "sleeper": _Sleeper,
    "loner": _Loner,
    "nosync": _NoSync,
    "unaware": _Unaware,
    "nobuddy": _NoBuddy,
}


def core_class(mutant: str | None) -> type[Membership]:
    """The core with that rule broken; the real one for None."""
    return Membership if mutant is None else _CLASSES[mutant]
