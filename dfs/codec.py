"""MessagePack with every option pinned: the only module that imports msgpack.

Values are None, bool, int (64 bit), float, bytes, str and tuples of them, and maps with such keys.
Encoding is canonical for these types as long as maps are not hashed (order of insertion).
Decoding returns tuples, never lists, and never allocates more than the input can hold
(`unpackb` caps every declared length by the input's size).
"""

from typing import Any

import msgpack

from dfs.errors import RemoteProtocolError

_packer = msgpack.Packer(use_bin_type=True, strict_types=False, autoreset=True)
MAX_SIZE = 64 << 20  # bytes; larger input is refused before it is parsed

Buffer = bytes | bytearray | memoryview


def pack(value: Any) -> bytes:
    """Encode one value; raises TypeError or OverflowError on a type outside the module's list."""
    return bytes(_packer.pack(value))


def unpack(data: Buffer) -> Any:
    """Decode exactly one value; raises `RemoteProtocolError` on anything else.

    Bytes come back as `bytes`, text as `str`, arrays as tuples.
    """
    if len(data) > MAX_SIZE:
        raise RemoteProtocolError(f"message of {len(data)} bytes is over the limit of {MAX_SIZE}")
    try:
        return msgpack.unpackb(data, use_list=False, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as e:
        raise RemoteProtocolError(f"undecodable message: {type(e).__name__}: {e}") from e
