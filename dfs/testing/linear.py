"""A linearizability checker for what several clients did with names.

Given operations with their results and the times of call and return, `check` searches an order of
them that keeps to real time (who returned before another was called comes first) and in which a
sequential name space gives each its result: the search of Wing and Gong ("Testing and Verifying
Concurrent Objects", 1993) with the memory of states of Lowe ("Testing for Linearizability", 2017),
a history at a time for names that no rename connects (locality: Herlihy and Wing, 1990; the
partitions of Horn and Kroening, 2015, and of Porcupine).

Two things go beyond the classic question.  The outcome of an operation may be *unknown*: it takes
effect once after its call, or never.  And operations of a *session* may be *volatile*:
acknowledged, but lost with the session if it was not followed by an fsync.  What a session loses is
a suffix of what it did, looks included, so the search may give up all that is left of a session
once, provided all of it is volatile.  Even then the session saw a state of its own that nobody
else changed meanwhile: what is lost must have had its results one after the other, from the state
where it is given up, and nobody else's later operation may have returned before the last of it was
called.  Whether the suffixes of one session in several partitions fit together is not asked here.
"""

import errno
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNKNOWN = object()  # the result of an operation that did not return one
OK = "ok"
FILE, DIRECTORY = 0, 1
NOREPLACE, EXCHANGE = 1, 2
LIMIT = 100_000  # states that one partition's search may visit

State = tuple[tuple[bytes, tuple[int, int]], ...]  # (name, (token, kind)) of what exists, sorted
What = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: who, what, what it returned, and when.

    `what` is one of ("create" | "mkdir", name, token), ("unlink" | "rmdir" | "lookup", name) and
    ("rename", name, new name, flags).  A token is a number that its caller gives to what it makes,
    used once.  `result`: "ok", the name of an errno, for a lookup the token, or `UNKNOWN`.
    `session` and `volatile` as the module says; without a session nothing is ever lost.
    """

    client: str
    what: What
    result: Any
    called: float
    returned: float
    session: Any = None
    volatile: bool = False

    @property
    def names(self) -> tuple[bytes, ...]:
        """What it depends on."""
        return self.what[1:3] if self.what[0] == "rename" else self.what[1:2]

    @property
    def until(self) -> float:
        """When it must have taken effect."""
        return math.inf if self.result is UNKNOWN else self.returned

    def __str__(self) -> str:
        """For people."""
        result = "?" if self.result is UNKNOWN else self.result
        lost = ", may be lost" if self.volatile else ""
        return (
            f"[{self.called:.3f}-{self.returned:.3f}] {self.client}:"
            f" {' '.join(map(str, self.what))} -> {result}{lost}"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome: what cannot have happened, in words; and how much was looked at."""

    violations: tuple[str, ...]
    undecided: int  # partitions whose search was given up
    partitions: int


def apply(state: State, what: What) -> tuple[State, Any]:
    """What an operation does to the names and returns; directories hold nothing."""
    kind, name = what[:2]
    have = dict(state)
    old = have.get(name)
    if kind == "lookup":
        return state, "ENOENT" if old is None else old[0]
    if kind in ("create", "mkdir"):
        if old is not None:
            return state, "EEXIST"
        have[name] = (what[2], DIRECTORY if kind == "mkdir" else FILE)
        return _sorted(have), OK
    if old is None:
        return state, "ENOENT"
    if kind == "rename":
        return _rename(state, have, what)
    if kind == "unlink" and old[1] == DIRECTORY:
        return state, "EISDIR"
    if kind == "rmdir" and old[1] != DIRECTORY:
        return state, "ENOTDIR"
    if kind not in ("unlink", "rmdir"):
        raise ValueError(f"unknown operation {kind!r}")
    del have[name]
    return _sorted(have), OK


def _rename(state: State, have: dict[bytes, tuple[int, int]], what: What) -> tuple[State, Any]:
    _, name, new, flags = what
    old, victim = have[name], have.get(new)
    if victim is None:
        if flags & EXCHANGE:
            return state, "ENOENT"
        del have[name]
    elif flags & NOREPLACE:
        return state, "EEXIST"
    elif name == new:
        return state, OK
    elif flags & EXCHANGE:
        have[name] = victim
    elif old[1] != victim[1]:
        return state, "ENOTDIR" if old[1] == DIRECTORY else "EISDIR"
    else:
        del have[name]
    have[new] = old
    return _sorted(have), OK


def _sorted(have: dict[bytes, tuple[int, int]]) -> State:
    return tuple(sorted(have.items()))


def result_of(error: int | None) -> str:
    """`Operation.result` of an errno, or of none."""
    return OK if error is None else errno.errorcode.get(error, str(error))


def check(history: Iterable[Operation], *, limit: int = LIMIT) -> Verdict:
    """Whether a history, which begins without names, is linearizable; `limit` bounds the search."""
    violations: list[str] = []
    undecided = 0
    parts = partitions(history)
    for part in parts:
        search = _Search(part, limit)
        found = search.run()
        if found is None:
            undecided += 1
        elif not found:
            violations.append(search.explain())
    return Verdict(tuple(violations), undecided, len(parts))


def partitions(history: Iterable[Operation]) -> list[list[Operation]]:
    """Operations by the names that renames connect, each part in order of the calls."""
    above: dict[bytes, bytes] = {}

    def top(name: bytes) -> bytes:
        while (parent := above.setdefault(name, name)) != name:
            above[name] = above[parent]
            name = parent
        return name

    ordered = sorted(history, key=lambda op: (op.called, op.returned))
    for op in ordered:
        above[top(op.names[-1])] = top(op.names[0])
    parts: dict[bytes, list[Operation]] = {}
    for op in ordered:
        parts.setdefault(top(op.names[0]), []).append(op)
    return list(parts.values())


class _Search:
    """The search of one partition.  A set of operations is a number with a bit for each."""

    def __init__(self, part: Sequence[Operation], limit: int) -> None:
        self.part = part
        self.limit = limit
        self.certain = sum(1 << i for i, op in enumerate(part) if op.result is not UNKNOWN)
        self.sessions: dict[Any, int] = {}  # session -> its operations with results
        self.durable: dict[Any, int] = {}  # session -> those that cannot be lost
        for i, op in enumerate(part):
            if op.result is UNKNOWN or op.session is None:
                continue
            self.sessions[op.session] = self.sessions.get(op.session, 0) | 1 << i
            if not op.volatile:
                self.durable[op.session] = self.durable.get(op.session, 0) | 1 << i
        self.best: tuple[int, int, State] = (-1, 0, ())  # (how many are in order, left, state)

    def run(self) -> bool | None:
        """Whether there is an order; None when the limit was reached."""
        seen: set[tuple[int, State]] = set()
        todo: list[tuple[int, State]] = [((1 << len(self.part)) - 1, ())]
        while todo:
            left, state = self._settle(*todo.pop())
            if not left & self.certain:
                return True  # what is unknown and left never took effect
            if (left, state) in seen:
                continue
            if len(seen) >= self.limit:
                return None
            seen.add((left, state))
            done = len(self.part) - left.bit_count()
            if done > self.best[0]:
                self.best = (done, left, state)
            todo += self._losses(left, state)
            todo += reversed(self._steps(left, state))
        return False

    def _possible(self, left: int) -> list[int]:
        """Operations that may come next: called before any other that is left has returned."""
        found: list[int] = []
        until = math.inf
        rest = left
        while rest:
            i = (rest & -rest).bit_length() - 1
            rest &= rest - 1
            op = self.part[i]
            if op.called > until:
                break  # they are in order of the calls
            found.append(i)
            until = min(until, op.until)
        return [i for i in found if self.part[i].called <= until]

    def _settle(self, left: int, state: State) -> tuple[int, State]:
        """Take what fits and changes nothing: no order is lost by having it come first."""
        again = True
        while again:
            again = False
            for i in self._possible(left):
                op = self.part[i]
                if op.result is not UNKNOWN and apply(state, op.what) == (state, op.result):
                    left &= ~(1 << i)
                    again = True
        return left, state

    def _steps(self, left: int, state: State) -> list[tuple[int, State]]:
        found = []
        for i in self._possible(left):
            op = self.part[i]
            after, result = apply(state, op.what)
            if after != state and op.result in (UNKNOWN, result):
                found.append((left & ~(1 << i), after))
        return found

    def _losses(self, left: int, state: State) -> list[tuple[int, State]]:
        """The end of a session: all that is left of it is lost."""
        return [
            (left & ~mine, state)
            for session, mine in self.sessions.items()
            if left & mine
            and not left & self.durable.get(session, 0)
            and self._alone(left & mine, left & ~mine & self.certain, state)
        ]

    def _alone(self, lost: int, others: int, state: State) -> bool:
        """Whether a session can have done what it lost before anybody else did anything."""
        last = max(op.called for op in self._these(lost))
        if any(op.returned < last for op in self._these(others)):
            return False
        for op in self._these(lost):
            state, result = apply(state, op.what)
            if result != op.result:
                return False
        return True

    def _these(self, some: int) -> list[Operation]:
        return [op for i, op in enumerate(self.part) if some >> i & 1]

    def explain(self) -> str:
        """How far an order came, and what then did not fit."""
        _, left, state = self.best
        names = {name.decode(errors="replace"): thing for name, thing in state}
        stuck = "; ".join(str(self.part[i]) for i in self._possible(left))
        return (
            f"no order of {len(self.part)} operations explains their results: with the names"
            f" {names} none of these fits: {stuck}"
        )
