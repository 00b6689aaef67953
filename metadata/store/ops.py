"""What a batch may hold: checks and sizes of its operations."""

from collections.abc import Sequence
from typing import Any

from dfs.errors import InvalidArgument
from metadata.store import expiry
from metadata.store.memtable import OVERHEAD, Value
from metadata.store.options import MAX_BATCH, MAX_KEY, MAX_VALUE

Put = tuple[bytes, bytes]
PutUntil = tuple[bytes, bytes, int]  # absent from that second since the epoch on
Delete = tuple[bytes, None]
Op = Put | PutUntil | Delete | tuple[bytes, bytes | None]


def measure(ops: Sequence[Op]) -> tuple[Sequence[tuple[bytes, Value]], int, int]:
    """The operations as the memtable takes them, bytes of keys and values, number of puts.

    Raises `InvalidArgument`.
    """
    pairs: Sequence[Any] = ops
    try:
        size, puts = _sizes(ops)
    except ValueError:  # some operation is no pair
        pairs = [_value(op) for op in ops]
        size, puts = _sizes(pairs)
    if size + OVERHEAD * len(ops) > MAX_BATCH:
        raise InvalidArgument(f"a batch of {size} bytes is over the limit of {MAX_BATCH}")
    return pairs, size, puts


def _sizes(pairs: Sequence[Any]) -> tuple[int, int]:
    size = puts = 0
    for key, value in pairs:
        if key.__class__ is not bytes or not 0 < len(key) <= MAX_KEY:
            raise InvalidArgument(f"a key must be 1 to {MAX_KEY} bytes, not {key!r:.60}")
        size += len(key)
        if value is not None:
            data = value if value.__class__ is bytes else _data(key, value)
            if len(data) > MAX_VALUE:
                raise InvalidArgument(f"value of {key[:40]!r}: over {MAX_VALUE} bytes")
            size += len(data)
            puts += 1
    return size, puts


def _data(key: bytes, value: Any) -> bytes:
    if value.__class__ is tuple and value[0].__class__ is bytes:
        data: bytes = value[0]
        expiry.check(value[1], key)
        return data
    raise InvalidArgument(f"value of {key[:40]!r}: {value!r:.40} is not bytes")


def _value(op: Any) -> tuple[bytes, Value]:
    if len(op) == 2:
        return op  # type: ignore[no-any-return]
    if len(op) != 3 or op[1].__class__ is not bytes:
        raise InvalidArgument(f"not (key, value) nor (key, bytes, expiry): {op!r:.80}")
    key, value, expires = op
    return key, (value, expires)
