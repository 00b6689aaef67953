"""Validation: what a home checks before it lets a client's effects into the journal.

Trust ends at the volume: a client that may write can damage its own volume, but never the home, the
other readers or another volume.  So everything that could make `apply`, the tree or a decoder fail,
or grow without bound, is refused here, with the reason.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dfs.codec import pack, unpack
from dfs.errors import DfsError, InvalidArgument
from dfs.hashing import DIGEST_SIZE
from dfs.volume import items
from dfs.volume.effects import (
    ADD,
    DELETE,
    DELETE_RANGE,
    INT_MAX,
    INT_MIN,
    LAST,
    PATCH,
    PUT,
    SET,
    Effect,
)
from dfs.volume.items import GROUP_SIZE

MAX_EFFECTS = 1 << 16  # in one transaction
VOLUME_STATES = ("creating", "created", "deleting")
# Groups that may be deleted by range.  Directories may not: an ENTRY is read alone, by its key, and
# whoever read it must find out that it went.
RANGES = frozenset((items.XATTR, items.BACKLINK, items.EXTENT))
_ADMIN = items.ADMIN_INO.to_bytes(8, "big")
_REGISTRY = items.REGISTRY_INO.to_bytes(8, "big")
_INT = {int}
_PATCHABLE = {items.INODE: items.INODE_FIELDS, items.USAGE: 3, items.VOLUME: 4}


def validate(effects: Any, *, system: bool = False) -> None:
    """Check the shape, keys, sizes and values of one transaction's effects.

    `system` admits VOLUME items.  Raises `InvalidArgument`.
    """
    if type(effects) is not tuple or len(effects) > MAX_EFFECTS:
        raise InvalidArgument(f"effects are no tuple of at most {MAX_EFFECTS}")
    for effect in effects:
        try:
            _check(effect, system)
        except InvalidArgument:
            raise
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError, DfsError) as e:
            raise InvalidArgument(f"malformed effect {repr(effect)[:80]}: {e}") from e


def _check(effect: Effect, system: bool) -> None:
    if type(effect) is not tuple or not effect:
        raise InvalidArgument(f"effect is no tuple: {repr(effect)[:80]}")
    op = effect[0]
    if op == PUT and type(op) is int and len(effect) == 3:  # the most by far
        _, key, value = effect
        if type(key) is bytes and type(value) is bytes:
            _check_put(key, value, system)
            return
    match effect:
        case (op, bytes(key), tuple(changes)) if op == PATCH:
            _check_patch(key, check_key(key, system), changes)
        case (op, bytes(key)) if op == DELETE:
            check_key(key, system)
        case (op, bytes(start), bytes(end)) if op == DELETE_RANGE:
            prefix = start[:GROUP_SIZE]
            if len(start) < GROUP_SIZE or len(start) > items.MAX_KEY or len(end) > items.MAX_KEY:
                raise InvalidArgument(f"bad bounds of a range: {start!r}, {end!r}")
            if prefix[8] not in RANGES or items.split_key(prefix)[0] == items.ADMIN_INO:
                raise InvalidArgument(f"items of this type are not deleted by range: {start!r}")
            if not start <= end <= items.group_end(prefix):
                raise InvalidArgument(f"range leaves its group: {start!r} to {end!r}")
        case _:
            raise InvalidArgument(f"unknown effect: {repr(effect)[:80]}")


def _check_put(key: bytes, value: bytes, system: bool) -> None:
    if len(key) + len(value) > items.MAX_ITEM:
        raise InvalidArgument(f"item of {len(key) + len(value)} bytes, key {key!r}")
    kind = check_key(key, system)
    fields = unpack(value)
    if type(fields) is not tuple or not fields or fields[0] != items.VERSION:
        raise InvalidArgument(f"value of {key!r} is no version {items.VERSION} tuple")
    if not _VALUES[kind](key, fields):
        raise InvalidArgument(f"value of {key!r} is malformed: {repr(fields)[:80]}")
    if pack(fields) != value:
        raise InvalidArgument(f"value of {key!r} is not encoded canonically")


def check_key(key: bytes, system: bool = False) -> int:
    """Type of a well-formed key; raises `InvalidArgument` for others."""
    if not GROUP_SIZE <= len(key) <= items.MAX_KEY:
        raise InvalidArgument(f"key of {len(key)} bytes")
    kind, size, admin = key[8], len(key) - GROUP_SIZE, key.startswith(_ADMIN)
    if kind in (items.INODE, items.SYMLINK):
        good = size == 0 and not admin
    elif kind in (items.ORPHAN, items.USAGE, items.QUOTA):
        good = admin and size == (8 if kind == items.ORPHAN else 0)
    elif kind == items.VOLUME:
        good = system and key.startswith(_REGISTRY) and 0 < size <= items.MAX_NAME
    elif admin:
        good = False
    elif kind == items.ENTRY:
        good = size == 8 and items.FIRST_HASH <= items.suffix_u64(key) < 1 << items.HASH_BITS
    elif kind == items.EXTENT:
        good = size == 8 and items.suffix_u64(key) <= items.MAX_OFFSET
    elif kind == items.BACKLINK:
        good = size == 16
    else:
        good = kind == items.XATTR and 0 < size <= items.MAX_NAME
    if not good:
        raise InvalidArgument(f"forbidden or malformed key: {key!r}")
    return kind


def _check_patch(key: bytes, kind: int, changes: tuple[Any, ...]) -> None:
    arity = _PATCHABLE.get(kind)
    if arity is None:
        raise InvalidArgument(f"items of this type are not patched: {key!r}")
    if not 0 < len(changes) <= 2 * arity:
        raise InvalidArgument(f"patch of {key!r} with {len(changes)} changes")
    for change in changes:
        if type(change) is not tuple or len(change) != 3:
            raise InvalidArgument(f"malformed change of {key!r}: {repr(change)[:80]}")
        field, op, operand = change
        if type(field) is not int or not 0 < field < arity or op not in (SET, ADD, LAST):
            raise InvalidArgument(f"malformed change of {key!r}: {repr(change)[:80]}")
        if kind == items.VOLUME:
            if op == ADD or not _VOLUME_FIELDS[field](operand):
                raise InvalidArgument(f"malformed change of {key!r}: {repr(change)[:80]}")
        elif not _integer(operand) or (kind == items.INODE and field == items.F_KIND):
            raise InvalidArgument(f"forbidden change of {key!r}: {repr(change)[:80]}")


def _integer(value: Any) -> bool:
    return type(value) is int and INT_MIN <= value <= INT_MAX


def _integers(values: Sequence[Any]) -> bool:
    """Whether all of some values, at least one, are integers of 64 bits."""
    return {*map(type, values)} == _INT and min(values) >= INT_MIN and max(values) <= INT_MAX


def _name(value: Any) -> bool:
    return (
        type(value) is bytes
        and 0 < len(value) <= items.MAX_NAME
        and b"/" not in value
        and b"\0" not in value
        and value not in (b".", b"..")
    )


def _inode(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == items.INODE_FIELDS and _integers(f) and f[1] in items.KINDS


def _entries(_key: bytes, f: Sequence[Any]) -> bool:
    if len(f) != 2 or type(f[1]) is not tuple or not f[1]:
        return False
    for record in f[1]:
        if type(record) is not tuple or len(record) != 3:
            return False
        name, ino, kind = record
        if not _name(name) or not _integer(ino) or ino <= 0 or kind not in items.KINDS:
            return False
    return len(f[1]) == 1 or len({record[0] for record in f[1]}) == len(f[1])


def _symlink(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 2 and type(f[1]) is bytes and 0 < len(f[1]) <= items.MAX_TARGET


def _xattr(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 2 and type(f[1]) is bytes


def _backlinks(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 2 and type(f[1]) is tuple and bool(f[1]) and all(map(_name, f[1]))


def _extent(key: bytes, f: Sequence[Any]) -> bool:
    if len(f) < 4 or not _integer(f[1]) or not 0 < f[1] <= items.MAX_EXTENT:
        return False
    if items.suffix_u64(key) + f[1] > items.MAX_OFFSET + 1:
        return False
    if f[2] == 0:
        return len(f) == 4 and type(f[3]) is bytes and len(f[3]) == f[1]
    if f[2] != 1 or len(f) != 6 or type(f[3]) is not bytes or len(f[3]) != DIGEST_SIZE:
        return False
    return _integer(f[4]) and _integer(f[5]) and f[4] >= 0 and f[4] + f[1] <= f[5]


def _orphan(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 1


def _usage(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 3 and _integers(f)


def _quota(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 3 and _integers(f) and min(f) >= 0


def _volume_id(value: Any) -> bool:
    return type(value) is bytes and len(value) == 16


def _params(value: Any) -> bool:
    return type(value) is dict and all(type(k) is str for k in value) and len(pack(value)) < 8192


_VOLUME_FIELDS: dict[int, Callable[[Any], bool]] = {
    items.F_VOLUME_ID: _volume_id,
    items.F_VOLUME_STATE: VOLUME_STATES.__contains__,
    items.F_VOLUME_PARAMS: _params,
}


def _volume(_key: bytes, f: Sequence[Any]) -> bool:
    return len(f) == 4 and all(check(f[i]) for i, check in _VOLUME_FIELDS.items())


_VALUES: dict[int, Callable[[bytes, Sequence[Any]], bool]] = {
    items.INODE: _inode,
    items.ENTRY: _entries,
    items.SYMLINK: _symlink,
    items.XATTR: _xattr,
    items.BACKLINK: _backlinks,
    items.EXTENT: _extent,
    items.ORPHAN: _orphan,
    items.USAGE: _usage,
    items.QUOTA: _quota,
    items.VOLUME: _volume,
}
