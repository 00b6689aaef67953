"""Effects: what a transaction does to the items of a volume, as data.

An effect is a tuple that starts with its operation:

    (PUT, key, value)                          create or replace an item
    (PATCH, key, ((field, op, operand), ...))  change fields of an item, by position in its tuple
    (DELETE, key)                              remove an item; fine if it is absent
    (DELETE_RANGE, start, end)                 remove the items in [start, end) of one group

The operations of a PATCH are SET (assign), ADD (to an integer) and LAST (assign, for times: the
journal's order decides and nobody cares who was overwritten).  A PATCH of an absent item does
nothing: the item was deleted by an earlier commit and stays deleted.  So do operations that the
value's shape does not allow; sums saturate at 64 bits.  No effect can fail, since by the time it is
applied it has been agreed upon and every replica must come to the same state.

`apply` is the only interpreter: transactions see their own effects through it, views follow the
journal through it and checkpoints fold the journal through it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from dfs.codec import pack, unpack
from dfs.volume import entries
from dfs.volume.items import GROUP_SIZE

PUT, PATCH, DELETE, DELETE_RANGE = range(4)
SET, ADD, LAST = range(3)
INT_MIN, INT_MAX = -(1 << 63), (1 << 64) - 1

Effect = tuple[Any, ...]
Change = tuple[int, int, Any]  # (field, op, operand)


class Target(Protocol):
    """What effects are applied to."""

    def get(self, key: bytes) -> bytes | None:
        """Current value, with the effects so far; may raise `Missing`."""
        ...

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set or, with None, remove an item."""
        ...

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Remove the items in [start, end), which lie in one group."""
        ...


def apply(target: Target, effects: Iterable[Effect]) -> None:
    """Apply effects in order.

    Raises what `target.get` raises; the target must then forget what it was given so far.
    """
    put = target.put
    for effect in effects:
        op = effect[0]
        if op == PUT:
            put(effect[1], effect[2])
        elif op == PATCH:
            old = target.get(effect[1])
            if old is not None:
                put(effect[1], patched(old, effect[2]))
        elif op == DELETE:
            put(effect[1], None)
        elif op == DELETE_RANGE:
            target.delete_range(effect[1], effect[2])


def patched(value: bytes, changes: Sequence[Change]) -> bytes:
    """The value with some fields changed."""
    fields = list(unpack(value))
    size = len(fields)
    for field, op, operand in changes:
        if not 0 < field < size:
            continue
        if op == ADD:
            old = fields[field]
            if type(old) is int and type(operand) is int:
                fields[field] = min(max(old + operand, INT_MIN), INT_MAX)
        else:
            fields[field] = operand
    return pack(tuple(fields))


def writes(effects: Iterable[Effect]) -> tuple[list[bytes], list[bytes]]:
    """Keys and groups whose readers these effects invalidate, each once, in order.

    PUT, DELETE and a PATCH that SETs write their key and the key's group; DELETE_RANGE writes its
    group.  ADD and LAST write nothing: two creations in one directory do not conflict although both
    touch the directory's times and link count.  A reader of a single key in a group that may be
    deleted by range records the group as well (see `dfs.volume.view.Txn.get`).
    """
    keys: dict[bytes, None] = {}
    groups: dict[bytes, None] = {}
    for effect in effects:
        op, key = effect[0], effect[1]
        if op == PATCH and commutes(effect):
            continue
        groups[key[:GROUP_SIZE]] = None
        if op != DELETE_RANGE:
            keys[key] = None
    return list(keys), list(groups)


def commutes(patch: Effect) -> bool:
    """Whether a PATCH writes nothing in the sense of `writes`."""
    return all(change[1] != SET for change in patch[2])


def of_entry(entry: entries.Entry) -> tuple[Effect, ...]:
    """All effects of a journal entry, in order; none for control entries."""
    if entry.kind != entries.DATA:
        return ()
    parts = entry.body[0]
    if len(parts) == 1:
        only: tuple[Effect, ...] = parts[0][3]
        return only
    return tuple(effect for part in parts for effect in part[3])
