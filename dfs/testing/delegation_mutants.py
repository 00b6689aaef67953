"""Homes that break one rule of the delegation each: what `scenario_delegation` must find."""

from typing import Any

from dfs.errors import DfsError
from dfs.ids import SessionId
from dfs.volume import entries
from metadata.delegation import Delegated, Standing
from metadata.requests import Commit, Open, Request
from metadata.volumes import HomeCore

MUTANTS = {
    "no_epoch": "a commit of the holder is accepted whatever its epoch",
    "epoch_kept": "returning the delegation does not make its epoch higher",
    "survives_close": "a holder whose session ended keeps the delegation",
    "commits_past": "commits of others do not wait for the delegation",
    "opens_past": "sessions open while another one has the delegation",
    "watches_past": "watches of others are answered while somebody has the delegation",
    "memory_past": "what was committed is told again while another session has the delegation",
    "hasty_revoke": "a holder is revoked after 10 s of silence",
    "take_over_revokes": "a new owner counts the holder's silence from before it took over",
    "resend_beats": "an outcome from memory counts as a beat",
    "grant_at_once": "the delegation is granted although others were heard of lately",
    "take_over_grants": "a new owner counts the silence of others from before it took over",
    "unclaimed": "others are told about now while a grant is on its way",
    "past_lease": "a holder serves as long as nobody tells it otherwise",
    "deaf": "a holder that is asked for the delegation goes on serving",
    "drops_on_return": "a holder returns the delegation before it committed all it has",
}


class _NoEpoch(HomeCore):
    def _refuse(self, session: Any, request: Commit, now: int) -> DfsError | None:
        if request.epoch:
            return None
        return super()._refuse(session, request, now)


class _EpochKept(HomeCore):
    def _launch(self, formed: Any, kind: int, now: int, body: Any, answers: Any) -> None:
        if kind == entries.DELEGATION and body[1:] == (0,):
            body = (self.epoch, 0)
        super()._launch(formed, kind, now, body, answers)


class _SurvivesClose(HomeCore):
    def _apply(self, seq: int, kind: int, stamp: int, body: tuple[Any, ...]) -> None:
        before = self.epoch, self.holder
        super()._apply(seq, kind, stamp, body)
        if kind == entries.CLOSE:
            self.epoch, self.holder = before


class _CommitsPast(HomeCore):
    def _refuse(self, session: Any, request: Commit, now: int) -> DfsError | None:
        answer = super()._refuse(session, request, now)
        return None if isinstance(answer, Delegated) else answer


class _OpensPast(HomeCore):
    def _form_control(self, request: Request, now: int, formed: Any) -> None:
        holder = self.holder
        if isinstance(request, Open):
            self.holder = 0
        super()._form_control(request, now, formed)
        self.holder = holder


class _Impatient(Standing):
    def due(self, holder: SessionId, progress: int, now: float) -> float:
        return min(super().due(holder, progress, now), 10.0 - self.silence(holder, now))


class _Unbiased(Standing):
    def silence(self, sid: SessionId, now: float) -> float:
        return now - self._beats.get(sid, self.since - 100.0)


CORES: dict[str, type[HomeCore]] = {
    "no_epoch": _NoEpoch,
    "epoch_kept": _EpochKept,
    "survives_close": _SurvivesClose,
    "commits_past": _CommitsPast,
    "opens_past": _OpensPast,
}

STANDINGS: dict[str, type[Standing]] = {
    "hasty_revoke": _Impatient,
    "take_over_revokes": _Unbiased,
    "take_over_grants": _Unbiased,
}
