"""Random schedules for exclusive sessions: those of `scenario_delegation`, with modes.

Some clients open exclusively.  A home refuses an open that others are in the way of, and closes
those if all of them are silent, as `VolumeService` does.

Checked besides what `scenario_delegation` checks: by the chosen journal an exclusive session is the
only one that writes; who makes way was answered nothing for as long as it could rely on an answer.
"""

from random import Random
from typing import Any

from dfs.ids import SessionId
from dfs.testing.homemodel import Violation, judged
from dfs.testing.scenario_delegation import LEASE, DelegationWorld, Holder
from dfs.testing.scenario_home import Home
from dfs.volume import entries
from metadata.batches import Answer
from metadata.delegation import SILENCE, Standing
from metadata.exclusion import Excluded, rivals
from metadata.requests import Close, Open, Request
from metadata.sessions import EXCLUSIVE, READ_WRITE, Session
from metadata.tail import kind_of
from metadata.volumes import HomeCore

NAME = "exclusion"
STEPS = 4000
MUTANTS = {
    "admits_writers": "a session opens for writing beside an exclusive one",
    "joins_writers": "a session opens exclusively beside one that writes",
    "judged_on_arrival": "who is in the way is looked at when the open arrives, and not again",
    "hasty_way": "who was silent for 5 s makes way",
    "take_over_way": "a new owner counts silence from before it took over",
    "told_to_the_end": "a session is told about now while its end is on its way",
}


class _AdmitsWriters(HomeCore):
    def _rivals(self, request: Open) -> tuple[Session, ...]:
        return super()._rivals(request) if request.mode == EXCLUSIVE else ()


class _JoinsWriters(HomeCore):
    def _rivals(self, request: Open) -> tuple[Session, ...]:
        return tuple(s for s in super()._rivals(request) if s.mode == EXCLUSIVE)


class _JudgedOnArrival(HomeCore):
    def submit(self, request: Request) -> None:
        if isinstance(request, Open) and request.token.get("excluded") is None:
            request.token["excluded"] = super()._rivals(request)
        super().submit(request)

    def _rivals(self, request: Open) -> tuple[Session, ...]:
        found: tuple[Session, ...] = request.token["excluded"]
        return found


class _ToldToTheEnd(HomeCore):
    def losing(self, sid: SessionId) -> bool:
        return sid == self.holder and super().losing(sid)


class _Unbiased(Standing):
    def silence(self, sid: SessionId, now: float) -> float:
        return now - self._beats.get(sid, self.since - 100.0)


CORES: dict[str, type[HomeCore]] = {
    "admits_writers": _AdmitsWriters,
    "joins_writers": _JoinsWriters,
    "judged_on_arrival": _JudgedOnArrival,
    "told_to_the_end": _ToldToTheEnd,
}


class ExclusionWorld(DelegationWorld):
    """One schedule; see the module's docstring."""

    def __init__(self, seed: int, mutant: str | None = None) -> None:
        """Everything is drawn from `seed`."""
        self.seed = seed
        self.modes: dict[SessionId, str] = {}  # of the open sessions, by the chosen journal
        self.way: set[SessionId] = set()  # sessions that some home closed for others
        self.share = Random(f"{seed}/share").choice((0.1, 0.3, 0.6))  # of exclusive sessions
        super().__init__(seed, mutant)
        self.counts |= dict.fromkeys(("exclusive", "refused", "way"), 0)

    def core_class(self) -> type[HomeCore]:
        """A core with the mutant's rule broken."""
        return CORES.get(self.mutant or "", HomeCore)

    def takeover(self, home: Home) -> None:
        """A home wins the ballot: it has heard of nobody."""
        super().takeover(home)
        if self.mutant == "take_over_way":
            self.standings[self.homes.index(home)] = _Unbiased(self.now(home))

    # ------------------------------------------------------------------------------- journal

    def choose(self, payload: bytes) -> None:
        """An entry is chosen: writers must be alone where one is exclusive."""
        entry = entries.decode(payload)
        if entry.kind == entries.SESSION:
            sid, mode = entry.body[:2]
            self.modes[sid] = mode
            if EXCLUSIVE in self.modes.values() and len(self.modes) > 1:
                raise Violation("an exclusive session is not the only one that writes")
            self.counts["exclusive"] += mode == EXCLUSIVE
        for sid in entries.closed(entry):
            self.modes.pop(sid, None)
            if sid in self.way and sid not in self.dead:
                self.made_way(sid)
        super().choose(payload)

    def accept(self) -> None:
        """The accepted entry reaches a majority, the end of a session some later than others."""
        payload = self.accepted[1] if self.accepted is not None and self.sluggish else b""
        if kind_of(payload) != entries.CLOSE or self.random.random() < 0.1:
            super().accept()

    def made_way(self, sid: SessionId) -> None:
        """A session that may live is closed for another."""
        self.dead.add(sid)
        self.counts["way"] += 1
        for client in self.clients:
            if not isinstance(client, Holder) or client.sid != sid:
                continue
            if self.clock(client) < client.heard + LEASE:
                raise Violation("a session made way although it relies on an answer")

    # --------------------------------------------------------------------------------- homes

    def serve(self, home: Home, core: HomeCore, m: dict[str, Any]) -> None:
        """A message arrives at a home that believes that it owns the ballot."""
        if m["k"] != "open":
            super().serve(home, core, m)
            return
        self.sids += 1
        mine = Random(f"{self.seed}/{m['no']}").random() < self.share
        opening = Open(self.sids, EXCLUSIVE if mine else READ_WRITE, m["no"], "")
        opening.token = {**m, "mark": core.launched}
        core.submit(opening)

    def answer(self, home: Home, request: Request, answer: Answer) -> None:
        """Turn an outcome of the core into a message."""
        if isinstance(answer, Excluded) and isinstance(request, Open):
            self.make_way(home, request)
            self.reply(request, {"k": "busy"})
        else:
            super().answer(home, request, answer)

    def make_way(self, home: Home, request: Open) -> None:
        """Close the sessions that are in the way, if they are silent."""
        core, standing, now = home.core, self.standing(home), self.now(home)
        if core is None:
            return
        found = rivals(request.mode, core.sessions.values())
        patience = 5.0 if self.mutant == "hasty_way" else SILENCE
        if any(standing.silence(s.sid, now) <= patience for s in found):
            self.counts["refused"] += 1
            return
        sids = tuple(s.sid for s in found)
        self.way.update(sids)
        closing = Close(sids)
        closing.token = None
        if sids and not any(core.losing(sid) for sid in sids):
            core.submit(closing)


def play(seed: int, *, mutant: str | None = None, steps: int = STEPS) -> tuple[Any, list[str]]:
    """Run one schedule; the world at its end and what was violated."""
    world = ExclusionWorld(seed, mutant)
    return world, judged(world, steps, f"{NAME} seed {seed}")


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of one schedule; empty is good."""
    return play(seed, mutant=mutant)[1]
