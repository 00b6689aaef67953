"""Clients that break one rule of holding a delegation each, for tests that must find them."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import trio

from dfs.client import session
from dfs.client.committer import Committer
from dfs.client.delegation import Batch, Delegation
from dfs.client.files import Files
from dfs.client.freshness import Freshness
from dfs.volume.view import LOCAL, View

HOLDERS = {
    "newest_first": "batches are sent out of order",
    "early_sync": "fsync does not wait until the batches are in the journal",
    "past_lease": "a holder serves although its lease is over",
    "returned_first": "a recalled delegation is returned before what is pending was sent",
    "old_lease": "a lease counts from the answer, not from the question",
    "view_kept": "the view keeps what was lost with the session",
    "data_kept": "data written before a loss is committed afterwards",
    "late_values": "a batch takes values of operations after it",
}
SEEDED = ("newest_first", "early_sync")  # what whole clusters meet often enough

Patch = tuple[Any, str, Callable[..., Any]]


def _newest_first() -> list[Patch]:
    def first(self: Delegation, view: View) -> Batch:
        self._close(view)
        return self.batches[-1]

    def confirmed(self: Delegation, batch: Batch) -> None:
        self.batches.remove(batch)
        self.pending -= batch.size
        for waiter in batch.waiters:
            waiter.resolve(True)
        self._changed.unpark_all()

    return [(Delegation, "first", first), (Delegation, "confirmed", confirmed)]


def _early_sync() -> list[Patch]:
    async def settle(_: Committer) -> None:
        await trio.lowlevel.checkpoint()

    return [(Committer, "settle", settle)]


def _past_lease() -> list[Patch]:
    def lease(self: session.Session, asked_at: float, owner: int | None) -> None:
        real(self, asked_at, owner)
        self._freshness.limit = math.inf

    real = session.Session.lease
    return [(session.Session, "lease", lease)]


def _returned_first() -> list[Patch]:
    async def linger(self: Committer) -> None:
        if self.delegation.recalled:
            await self._give_back(self.delegation.epoch)
        await real(self)

    real = Committer._linger
    return [(Committer, "_linger", linger)]


def _old_lease() -> list[Patch]:
    def confirm(self: Freshness, _asked_at: float) -> None:
        real(self, self._clock.monotonic())

    real = Freshness.confirm
    return [(Freshness, "confirm", confirm)]


def _view_kept() -> list[Patch]:
    def reset(self: View, root: bytes, seq: int) -> None:
        ahead = self._overlay.items if hasattr(self, "_overlay") else {}
        real(self, root, seq)
        for key, (at, value) in ahead.items():
            if at >= LOCAL:
                self._overlay.put(key, value)

    real = View.reset
    return [(View, "reset", reset)]


def _data_kept() -> list[Patch]:
    def on_fenced(self: Files, _held: bool, lost: set[int]) -> None:
        real(self, False, lost)

    real = Files._on_fenced
    return [(Files, "_on_fenced", on_fenced)]


def _late_values() -> list[Patch]:
    def first(self: Delegation, view: View) -> Batch:
        batch = real(self, view)
        batch.close(view)
        return batch

    real = Delegation.first
    return [(Delegation, "first", first)]


_MUTANTS: dict[str, Callable[[], list[Patch]]] = {
    "newest_first": _newest_first,
    "early_sync": _early_sync,
    "past_lease": _past_lease,
    "returned_first": _returned_first,
    "old_lease": _old_lease,
    "view_kept": _view_kept,
    "data_kept": _data_kept,
    "late_values": _late_values,
}


@contextlib.contextmanager
def broken(mutant: str | None) -> Iterator[None]:
    """Break the rule for the length of the block; nothing if it is not one of these."""
    patches = _MUTANTS[mutant]() if mutant in _MUTANTS else []
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, function in patches:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
