"""Options: what a request may ask for."""

import pytest

from dfs.errors import InvalidArgument
from metadata.kv import _options
from metadata.quorum import DEFAULTS, Options


def fields(options):
    return {name: getattr(options, name) for name in Options.__slots__}


def test_a_lone_request_id_is_what_the_constructor_makes_of_it():
    request = bytes(range(16))
    assert fields(_options({"request": request})) == fields(Options({"request": request}))
    assert _options({}) is DEFAULTS
    assert _options(None) is DEFAULTS
    assert fields(_options({"request": request, "w": 3})) == fields(
        Options({"request": request, "w": 3})
    )


@pytest.mark.parametrize(
    "given", [{"request": b"short"}, {"request": 16 * "x"}, {"w": -1}, {"x": 1}, 5]
)
def test_nonsense_is_refused(given):
    with pytest.raises(InvalidArgument):
        _options(given)
