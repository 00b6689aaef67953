"""What clients of one volume did, so that it can be judged: diaries and the arena.

A *diary* is a directory that one session writes: a sequence of operations, so that the state after
each is known.  Whatever anybody finds there must be one of these states: not older than what was
made durable, nor than what was acknowledged before the look began, unless that was lost; and what
is found later is not older (V4, J5).

The *arena* is a directory where all fight for a few names; its history is judged by
`dfs.testing.linear`.  Both follow what a session lost: a *lineage* is what was acknowledged by one
session of one client, and how much of it can be lost.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from dfs.client.filesystem import FileSystem
from dfs.errors import FsError
from dfs.testing.linear import OK, UNKNOWN, Operation, check, result_of

ANSWERS = ("ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENOTEMPTY")  # results; else: not known

Listing = Mapping[bytes, tuple[int, int]]  # name -> (token, size)


def settled(fs: FileSystem) -> bool:
    """Whether all that was acknowledged is in the journal."""
    return not fs.session.statistics()["pending"]


@dataclass
class Look:
    """What somebody found in a diary."""

    who: str
    acknowledged: int  # operations, before the look began
    attempted: int  # at its end
    found: Listing | None  # None: the diary was not there


@dataclass
class Diary:
    """One session's directory: what was tried there, acknowledged and made durable."""

    name: bytes
    session: tuple[str, int]  # (client and life, generation)
    ops: list[tuple[Any, ...]] = field(default_factory=list)
    acknowledged: int = 0
    durable: int = 0
    over: bool = False
    looks: list[Look] = field(default_factory=list)

    def states(self) -> list[Listing]:
        """The directory after 0, 1, 2, ... of its operations."""
        found: list[Listing] = [{}]
        for op in self.ops:
            found.append(_after(found[-1], op))
        return found

    async def run(
        self, fs: FileSystem, op: tuple[Any, ...], do: Callable[[], Awaitable[Any]]
    ) -> None:
        """Do the next operation; an error ends the diary, since nothing is known any more."""
        self.ops.append(op)
        try:
            await do()
        except BaseException:
            self.over = True
            raise
        self.note(fs)

    def note(self, fs: FileSystem) -> None:
        """The last operation returned."""
        if fs.session.generation != self.session[1]:
            self.over = True  # it cannot be told which session has it
            return
        self.acknowledged = len(self.ops)
        if settled(fs):
            self.durable = self.acknowledged

    async def sync(self, fs: FileSystem, do: Callable[[], Awaitable[Any]]) -> None:
        """Make what was acknowledged durable."""
        count = self.acknowledged
        await do()
        if fs.session.generation == self.session[1]:
            self.durable = max(self.durable, count)

    def judge(self, final: Listing | None) -> list[str]:
        """What nobody may have found; `final` is what is there at the end."""
        looks = [*self.looks, Look("the judge", self.durable, len(self.ops), final)]
        states = self.states()
        oldest, found = 0, []
        for look in looks:
            # What was acknowledged and turned out to be durable had happened when the look began.
            oldest = max(oldest, min(look.acknowledged, self.durable))
            if look.found is None:
                found.append(f"V4: {look.who} did not find {self.name!r}, which was fsynced before")
                continue
            fits = [n for n in range(oldest, look.attempted + 1) if states[n] == look.found]
            if fits:
                oldest = fits[0]
            elif not self._rerun(states, look):
                found.append(
                    f"V4: {look.who} found {dict(look.found)} in {self.name!r}, which is no state"
                    f" of it after operation {oldest} to {look.attempted}; durable {self.durable}"
                )
        return found

    def _rerun(self, states: list[Listing], look: Look) -> bool:
        """Whether the last operation was done by the next session, after a loss."""
        if self.acknowledged == len(self.ops):
            return False
        return any(
            _after(states[n], self.ops[-1]) == look.found
            for n in range(self.durable, len(self.ops))
        )


def _after(state: Listing, op: tuple[Any, ...]) -> Listing:
    have, kind, name = dict(state), op[0], op[1]
    if kind == "create":
        have[name] = (op[2], 0)
    elif name not in have:
        return state  # only where what came before was lost
    elif kind == "unlink":
        del have[name]
    elif kind == "rename":
        have[op[2]] = have.pop(name)
    else:
        have[name] = (have[name][0], op[2])
    return have


@dataclass
class _Lineage:
    ops: list[int] = field(default_factory=list)  # indexes into the history
    durable: int = 0  # of them


class Arena:
    """The history of the names that all fight for."""

    def __init__(self) -> None:
        """Empty."""
        self.tokens = 0
        self._history: list[Operation] = []
        self._lineages: dict[tuple[str, int], _Lineage] = {}

    def token(self) -> int:
        """A number for what is made next."""
        self.tokens += 1
        return self.tokens

    def names(self) -> list[bytes]:
        """All names that were fought for."""
        return sorted({name for op in self._history for name in op.names})

    async def run(
        self, fs: FileSystem, client: str, what: tuple[Any, ...], do: Callable[[], Awaitable[Any]]
    ) -> None:
        """Do one operation and note how it went; what is not a result is raised."""
        called, result = trio.current_time(), UNKNOWN
        try:
            got = await do()
            result = OK if got is None else got
        except FsError as e:
            result = result_of(e.errno)
            if result not in ANSWERS:
                result = UNKNOWN
                raise
        finally:
            self._note(fs, Operation(client, what, result, called, trio.current_time()))

    def _note(self, fs: FileSystem, op: Operation) -> None:
        if op.result is UNKNOWN:
            self._history.append(op)
            return
        session = (op.client, fs.session.generation)
        lineage = self._lineages.setdefault(session, _Lineage())
        lineage.ops.append(len(self._history))
        self._history.append(replace(op, session=session))
        if settled(fs):
            lineage.durable = len(lineage.ops)

    async def sync(self, fs: FileSystem, client: str, do: Callable[[], Awaitable[Any]]) -> None:
        """Make what a client has done durable."""
        session = (client, fs.session.generation)
        lineage = self._lineages.setdefault(session, _Lineage())
        count = len(lineage.ops)
        await do()
        if fs.session.generation == session[1]:
            lineage.durable = max(lineage.durable, count)

    def history(self) -> list[Operation]:
        """All operations, those that can be lost marked so."""
        found = list(self._history)
        for lineage in self._lineages.values():
            for i in lineage.ops[lineage.durable :]:
                found[i] = replace(found[i], volatile=True)
        return found

    def judge(self) -> list[str]:
        """What cannot have happened."""
        verdict = check(self.history())
        found = [f"J3: {text}" for text in verdict.violations]
        if verdict.undecided:
            found.append(f"J3: of {verdict.partitions} histories {verdict.undecided} are undecided")
        return found
