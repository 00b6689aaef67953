"""Home cores that break one rule each: what the checkers of `scenario_home` must find."""

from typing import Any

from dfs.volume.window import Window
from metadata.batches import Answer
from metadata.requests import Commit, Open, Request
from metadata.sessions import Session
from metadata.volumes import HomeCore


class _EarlyConflict(HomeCore):
    def _judge(self, request: Commit, batch: Window) -> Any:
        verdicts = super()._judge(request, batch)
        return (False,) * len(request.txns) if verdicts is None else verdicts


class _NoIntraBatch(HomeCore):
    def _judge(self, request: Commit, batch: Window) -> Any:
        return super()._judge(request, Window(0))


class _NoIntraRequest(HomeCore):
    def _judge(self, request: Commit, batch: Window) -> Any:
        verdicts = super()._judge(request, batch)
        if verdicts is None:
            return None
        return tuple(not self._changed(request.base, txn[0], txn[1]) for txn in request.txns)


class _FloorIgnored(HomeCore):
    def _changed(self, base: int, keys: Any, groups: Any) -> bool:
        return super()._changed(max(base, self.covered), keys, groups)


class _BareCheckpoint(HomeCore):
    def control(self, tree_bytes: int) -> tuple[Any, ...]:
        kept = self.sessions
        self.sessions = {s.sid: Session(s.sid, s.mode, s.nonce, s.name) for s in kept.values()}
        bare = super().control(tree_bytes)
        self.sessions = kept
        return bare


class _DedupAtArrival(HomeCore):
    def _recall(self, session: Session, request: Commit) -> Answer:
        return None


class _NonceIgnored(HomeCore):
    def _form_control(self, request: Request, now: int, formed: Any) -> None:
        if isinstance(request, Open):
            self._nonces.pop(request.nonce, None)
        super()._form_control(request, now, formed)


class _WallStamps(HomeCore):
    def form(self, now: int) -> Any:
        self.stamp = 0
        return super().form(now)


CORES: dict[str, type[HomeCore]] = {
    "early_conflict": _EarlyConflict,
    "no_intra_batch": _NoIntraBatch,
    "no_intra_request": _NoIntraRequest,
    "floor_ignored": _FloorIgnored,
    "bare_checkpoint": _BareCheckpoint,
    "dedup_at_arrival": _DedupAtArrival,
    "nonce_ignored": _NonceIgnored,
    "wall_stamps": _WallStamps,
}
