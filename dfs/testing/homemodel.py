"""What a volume's journal must mean: a sequential file system and the checks against it.

`Ledger` takes the chosen entries of a journal, one after the other, and what clients were told, and
raises `Violation` when the two cannot both be right: the entries are replayed as operations on a
model file system, one at a time, and every answer must follow from some state on the way.
"""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any, Protocol

from dfs.codec import unpack
from dfs.volume import entries
from dfs.volume.effects import ADD, DELETE, PATCH, PUT, SET, Effect, apply
from dfs.volume.items import (
    DIR,
    ENTRY,
    F_KIND,
    F_MODE,
    F_NLINK,
    F_PARENT,
    GROUP_SIZE,
    INODE,
    REG,
    Inode,
    decode_entries,
    encode_entries,
    entry_key,
    group,
    inode_key,
)
from metadata.requests import Txn


class Violation(Exception):
    """A checker saw something that must never happen."""


# ------------------------------------------------------------------- a sequential file system

KIND, MODE, PARENT = F_KIND, F_MODE, F_PARENT
COUNT = F_NLINK  # here: number of entries of a directory
Op = tuple[Any, ...]
State = dict[bytes, bytes]
Outcome = tuple[Any, list[bytes], list[bytes], list[Effect]]  # result, keys, groups, effects


def _name(parent: int, name: int) -> bytes:
    return entry_key(parent, 16 + name)


def _entry(ino: int) -> bytes:
    return encode_entries(((b"name", ino, REG),))


def new_inode(kind: int, parent: int) -> bytes:
    """Value of an inode without entries."""
    return Inode(kind, 0, nlink=0, parent=parent).encode()


def is_inode(key: bytes) -> bool:
    """Whether a key is an INODE's; the others are ENTRYs."""
    return key[8] == INODE


def run_op(state: State, op: Op) -> Outcome:
    """Run one operation on a state; pure."""
    keys: list[bytes] = []
    groups: list[bytes] = []

    def read(key: bytes) -> Any:
        keys.append(key)
        value = state.get(key)
        return None if value is None else unpack(value)

    result, effects = _OPS[op[0]](read, groups, state, *op[1:])
    return result, keys, groups, effects


def directories(state: State) -> list[int]:
    """Inode numbers of all directories."""
    return [
        int.from_bytes(key[:8], "big")
        for key, value in state.items()
        if is_inode(key) and unpack(value)[KIND] == DIR
    ]


def invent(random: Random, state: State, ino: int) -> Op:
    """A random operation on a state; `ino` is for what it may create."""
    dirs = directories(state)
    parent, name, x = random.choice(dirs), random.randrange(2), random.random()
    if x < 0.42:
        return ("create" if x < 0.25 else "mkdir", parent, name, ino)
    if x < 0.68:
        return ("unlink" if x < 0.52 else "rmdir", parent, name)
    if x < 0.82:
        return ("rename", parent, name, random.choice(dirs), random.randrange(2))
    if x < 0.92:
        return ("chmod", random.choice(dirs), random.randint(1, 9))
    return ("stat", parent, name)


def _children(state: State, ino: int) -> list[bytes]:
    prefix = group(ino, ENTRY)
    return [key for key in state if key[:GROUP_SIZE] == prefix]


def _stat(read: Any, _groups: Any, _state: State, parent: int, name: int) -> Any:
    found = read(_name(parent, name))
    return ("ENOENT" if found is None else found[1][0][1]), []


def _chmod(read: Any, _groups: Any, _state: State, ino: int, mode: int) -> Any:
    if read(inode_key(ino)) is None:
        return "ENOENT", []
    return "ok", [(PATCH, inode_key(ino), ((MODE, SET, mode),))]


def _make(kind: int) -> Callable[..., Any]:
    def run(read: Any, _groups: Any, _state: State, parent: int, name: int, ino: int) -> Any:
        up, found = read(inode_key(parent)), read(_name(parent, name))
        if up is None or up[KIND] != DIR:
            return "ENOENT", []
        if found is not None:
            return "EEXIST", []
        return "ok", [
            (PUT, _name(parent, name), _entry(ino)),
            (PUT, inode_key(ino), new_inode(kind, parent)),
            (PATCH, inode_key(parent), ((COUNT, ADD, 1),)),
        ]

    return run


def _remove(kind: int) -> Callable[..., Any]:
    def run(read: Any, groups: list[bytes], state: State, parent: int, name: int) -> Any:
        up, found = read(inode_key(parent)), read(_name(parent, name))
        if up is None or up[KIND] != DIR or found is None:
            return "ENOENT", []
        ino = found[1][0][1]
        if read(inode_key(ino))[KIND] != kind:
            return "EKIND", []
        if kind == DIR:
            groups.append(group(ino, ENTRY))
            if _children(state, ino):
                return "ENOTEMPTY", []
        return "ok", [
            (DELETE, _name(parent, name)),
            (DELETE, inode_key(ino)),
            (PATCH, inode_key(parent), ((COUNT, ADD, -1),)),
        ]

    return run


def _rename(
    read: Any, _groups: Any, _state: State, parent: int, name: int, into: int, new: int
) -> Any:
    up, found = read(inode_key(parent)), read(_name(parent, name))
    if up is None or up[KIND] != DIR or found is None:
        return "ENOENT", []
    ino = found[1][0][1]
    moved, target = read(inode_key(ino)), read(inode_key(into))
    if target is None or target[KIND] != DIR:
        return "ENOENT", []
    if read(_name(into, new)) is not None:
        return "EEXIST", []
    if moved[KIND] == DIR:
        above = into
        while above != 1:
            if above == ino:
                return "EINVAL", []
            above = read(inode_key(above))[PARENT]
    return "ok", [
        (DELETE, _name(parent, name)),
        (PUT, _name(into, new), _entry(ino)),
        (PATCH, inode_key(ino), ((PARENT, SET, into),)),
        (PATCH, inode_key(parent), ((COUNT, ADD, -1),)),
        (PATCH, inode_key(into), ((COUNT, ADD, 1),)),
    ]


_OPS: dict[str, Callable[..., Any]] = {
    "stat": _stat,
    "chmod": _chmod,
    "create": _make(REG),
    "mkdir": _make(DIR),
    "unlink": _remove(REG),
    "rmdir": _remove(DIR),
    "rename": _rename,
}


class Target(State):
    """A state that effects are applied to."""

    def put(self, key: bytes, value: bytes | None) -> None:
        """See `dfs.volume.effects.Target`."""
        if value is None:
            self.pop(key, None)
        else:
            self[key] = value

    def delete_range(self, start: bytes, end: bytes) -> None:
        """See `dfs.volume.effects.Target`."""
        for key in [k for k in self if start <= k < end]:
            del self[key]


def check_state(state: State) -> None:
    """Names lead to inodes, directories to the root, and counts are right."""
    for key, value in state.items():
        ino = int.from_bytes(key[:8], "big")
        if not is_inode(key):
            target = decode_entries(value)[0][1]
            if inode_key(target) not in state or inode_key(ino) not in state:
                raise Violation("dangling name")
        elif (fields := unpack(value))[KIND] == DIR:
            if fields[COUNT] != len(_children(state, ino)):
                raise Violation("entry count drifted")
            hops = 0
            while ino != 1:
                above = state.get(inode_key(ino))
                hops += 1
                if above is None or hops > 50:
                    raise Violation("directory does not reach the root")
                ino = unpack(above)[PARENT]


# ---------------------------------------------------------------------------------- the ledger


class Ledger:
    """One volume's chosen journal and everything its clients were told; see the module's docstring.

    Entry n leads to `states[n]`.  Operations are known by their ids: `submit` says which of them a
    request carries.  `blind`: effects of entries are not compared with those of the model.
    """

    def __init__(self, genesis: bytes, *, blind: bool = False) -> None:
        """A volume that was just created."""
        root = {inode_key(1): new_inode(DIR, 1)}
        self.blind = blind
        self.log = [genesis]
        self.states: list[State] = [root, root]
        self.checkpoints = [(1, 0), (1, 0)]  # (seq of the entry, covered), the last two
        self.requests: dict[tuple[int, int], list[tuple[int, Op]]] = {}
        self.effects: dict[tuple[int, int], tuple[bool, ...]] = {}  # which transactions have some
        self.verdicts: dict[tuple[int, int], tuple[bool, ...]] = {}
        self.applied: dict[int, int] = {}  # operation -> seq
        self.failed: set[int] = set()
        self.nonces: dict[bytes, int] = {}
        self.stamp = entries.decode(genesis).stamp
        self.floor = 0  # newest entry that some client was told of
        self.answers = 0

    def submit(self, sid: int, no: int, ops: list[tuple[int, Op]], txns: Iterable[Txn]) -> None:
        """A client makes a request of these (id, operation), one transaction each."""
        self.requests[sid, no] = ops
        self.effects[sid, no] = tuple(bool(txn[2]) for txn in txns)

    def choose(self, payload: bytes) -> None:
        """An entry is chosen: replay it, check everything it must satisfy."""
        kind, stamp, body = entry = entries.decode(payload)
        if stamp <= self.stamp:
            raise Violation("stamps do not grow")
        self.stamp = stamp
        seq = len(self.log) + 1
        state = self.states[-1]
        if kind == entries.DATA:
            for sid, no, verdicts, effects in body[0]:
                state = self.replay(state, seq, sid, no, verdicts, effects)
            check_state(state)
        elif kind == entries.SESSION:
            if body[2] in self.nonces:
                raise Violation("one open made two sessions")
            self.nonces[body[2]] = body[0]
        elif ended := entries.closed(entry):
            self.nonces = {n: sid for n, sid in self.nonces.items() if sid not in ended}
        elif kind == entries.CHECKPOINT and body[0] > self.checkpoints[-1][1]:
            self.checkpoints = [self.checkpoints[-1], (seq, body[0])]
        self.log.append(payload)
        self.states.append(state)

    def check_final(self, sid: int, no: int, verdicts: tuple[bool, ...]) -> None:
        """Whoever judges a request again comes to the same verdicts.

        Not so for transactions without effects: another answer may speak of another time.
        """
        known = self.verdicts.setdefault((sid, no), verdicts)
        effects = self.effects.get((sid, no), ())
        for before, now, writes in zip(known, verdicts, effects, strict=True):
            if writes and now != before:
                raise Violation("a verdict was not final")

    def replay(
        self, state: State, seq: int, sid: int, no: int, verdicts: Any, effects: Any
    ) -> State:
        """Run the operations of one part of an entry on the model; the state after them."""
        self.check_final(sid, no, verdicts)
        wanted: list[Effect] = []
        target = Target(state)
        for (op_id, op), ok in zip(self.requests[sid, no], verdicts, strict=True):
            result, _, _, want = run_op(target, op)
            if not ok or not want:
                if ok and result == "ok":
                    raise Violation("not serializable: an error became a success")
                continue
            if result != "ok":
                raise Violation(f"not serializable: {op[0]} -> {result}")
            if op_id in self.failed:
                raise Violation("effect of an operation that was answered an error")
            if op_id in self.applied:
                raise Violation("applied twice")
            self.applied[op_id] = seq
            wanted += want
            apply(target, want)
        if self.blind:
            target = Target(state)
            apply(target, effects)
        elif tuple(wanted) != effects:
            raise Violation("not serializable: other effects")
        return target

    def finish(self, op: list[Any], result: Any) -> None:
        """An operation answers the application: check what it says."""
        op_id, what, invoked, _ = op
        seq = self.applied.get(op_id)
        self.answers += 1
        if result == "ok":
            if seq is None:
                raise Violation("ok without effect")
            if seq <= invoked:
                raise Violation("real-time order")
            self.floor = max(self.floor, seq)
            return
        if seq is not None:
            raise Violation("effect of an operation that was answered an error")
        if not any(run_op(state, what)[0] == result for state in self.states[invoked:]):
            raise Violation(f"stale answer: {what[0]} -> {result}")
        self.failed.add(op_id)


def whole(state: State, effect: Effect) -> Effect:
    """A PATCH that SETs as a PUT of the whole value."""
    if effect[0] != PATCH or effect[2][0][1] != SET:
        return effect
    target = Target(state)
    apply(target, [effect])
    return (PUT, effect[1], target[effect[1]])


class Stepped(Protocol):
    """A world of a scenario that goes on step by step."""

    time: int

    def step(self) -> None:
        """Whatever happens next; raises `Violation`."""
        ...

    def check_end(self) -> None:
        """What must hold at the end; raises `Violation`."""
        ...


def judged(world: Stepped, steps: int, where: str) -> list[str]:
    """Run a world to its end; what was violated, empty is good."""
    try:
        for _ in range(steps):
            world.step()
        world.check_end()
    except Violation as e:
        return [f"{where} step {world.time}: {e}"]
    return []
