"""Fixed chunk boundaries."""

import pytest

from dfs.chunks.chunker import plan
from dfs.chunks.format import MAX_CHUNK
from dfs.errors import InvalidArgument

MIB = 1 << 20


@pytest.mark.parametrize(
    ("offset", "length", "size", "expected"),
    [
        (0, 0, MIB, []),
        (0, 1, MIB, [(0, 1)]),
        (0, MIB, MIB, [(0, MIB)]),
        (5, MIB, MIB, [(5, MIB - 5), (MIB, 5)]),
        (MIB - 1, 2 * MIB, MIB, [(MIB - 1, 1), (MIB, MIB), (2 * MIB, MIB - 1)]),
        (9 * MAX_CHUNK, 10, MAX_CHUNK, [(9 * MAX_CHUNK, 10)]),
    ],
)
def test_boundaries(offset, length, size, expected):
    assert plan(offset, length, size) == expected


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((0, 1, 1000), {}),
        ((0, 1, 2 * MAX_CHUNK), {}),
        ((-1, 1), {}),
        ((0, -1), {}),
        ((0, 1), {"chunking": "cdc"}),
    ],
)
def test_bad_arguments(args, options):
    with pytest.raises(InvalidArgument):
        plan(*args, **options)
