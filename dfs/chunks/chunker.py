"""Where one chunk ends and the next begins: a pure planner.

Boundaries are fixed: multiples of the chunk size, counted from the start of the file, so that
rewriting a range replaces the same chunks and never shifts the others.  `chunking` names the
method; `"fixed"` is the only one.
"""

from dfs.chunks.format import BLOCK, MAX_CHUNK
from dfs.errors import InvalidArgument


def plan(
    offset: int, length: int, chunk_size: int = MAX_CHUNK, *, chunking: str = "fixed"
) -> list[tuple[int, int]]:
    """Cut the file range `[offset, offset + length)` into pieces `(offset, length)`, each a chunk.

    No piece crosses a multiple of `chunk_size` (a multiple of 64 KiB, at most 4 MiB).
    """
    if chunking != "fixed":
        raise InvalidArgument(f"unknown chunking method {chunking!r}; known: 'fixed'")
    if not BLOCK <= chunk_size <= MAX_CHUNK or chunk_size % BLOCK:
        raise InvalidArgument(f"chunk size {chunk_size} is no multiple of {BLOCK} <= {MAX_CHUNK}")
    if offset < 0 or length < 0:
        raise InvalidArgument(f"negative range {offset}+{length}")
    out = []
    end = offset + length
    while offset < end:
        size = min(end, (offset // chunk_size + 1) * chunk_size) - offset
        out.append((offset, size))
        offset += size
    return out
