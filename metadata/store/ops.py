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
    if any(len(op) != 2 for op in ops):
        pairs = [_value(op) for op in ops]
    size = puts = 0
    for key, value in pairs:
        if key.__class__ is not bytes or not 0 < len(key) <= MAX_KEY:
            raise InvalidArgument(f"a key must be 1 to {MAX_KEY} bytes, not {key!r:.60}")
        size += len(key)
        if value is not None:
            data = value[0] if value.__class__ is tuple else value
            if data.__class__ is not bytes or len(data) > MAX_VALUE:
                raise InvalidArgument(f"value of {key[:40]!r}: not bytes, or over {MAX_VALUE}")
            size += len(data)
            puts += 1
    if size + OVERHEAD * len(ops) > MAX_BATCH:
        raise InvalidArgument(f"a batch of {size} bytes is over the limit of {MAX_BATCH}")
    return pairs, size, puts


def _value(op: Any) -> tuple[bytes, Value]:
    if len(op) == 2:
        return op[0], op[1]
    if len(op) != 3 or op[1].__class__ is not bytes:
        raise InvalidArgument(f"not (key, value) nor (key, bytes, expiry): {op!r:.80}")
    key, value, expires = op
    return key, (value, expiry.check(expires, key))
