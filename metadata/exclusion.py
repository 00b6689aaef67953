"""Exclusive sessions: which sessions keep another from being opened, and what that one is told.

An exclusive session is the volume's only writer, which is what a database needs: two servers on one
data directory destroy it on any file system.  Whether a session is exclusive is its mode, which is
control state, so every home judges an open alike: in the order of the journal, by what is chosen.
Readers do not count.

A session that keeps others out and is silent for longer than a delegation would be left to it
(`metadata.delegation.SILENCE`) is closed in favour of the one that asks: from then on it is fenced,
by the rules for every session that is over.

Nothing here waits, reads a clock or does I/O.
"""

from collections.abc import Iterable

from dfs.errors import DfsError, InUse
from metadata.sessions import EXCLUSIVE, READ_ONLY, Session


class Excluded(DfsError):
    """Sessions that are open keep another from being opened; the core's answer to `Open`."""

    def __init__(self, rivals: tuple[Session, ...]) -> None:
        """`rivals`: the sessions that are in the way."""
        super().__init__(f"{len(rivals)} sessions are in the way")
        self.rivals = rivals


def rivals(mode: str, sessions: Iterable[Session]) -> tuple[Session, ...]:
    """Open sessions beside which none of `mode` may be opened."""
    if mode == READ_ONLY:
        return ()
    if mode == EXCLUSIVE:
        return tuple(s for s in sessions if s.writes)
    return tuple(s for s in sessions if s.mode == EXCLUSIVE)


def in_use(volume: str, mode: str, rival: Session, silence: float | None) -> InUse:
    """What a client is told that asked for `mode`; `silence`: seconds, None if it is not known."""
    who = f"session {rival.sid} ({rival.name or 'without a name'})"
    heard = "" if silence is None else f", heard of {silence:.1f} s ago"
    if rival.mode == EXCLUSIVE:
        text = (
            f"volume {volume} is in use exclusively by {who}{heard}:"
            " unmount it there first, or open the volume read-only"
        )
    else:
        text = (
            f"volume {volume} cannot be opened exclusively, {who} has it open for writing{heard}:"
            " unmount it there first"
        )
    return InUse(text, rival.sid, silence)
