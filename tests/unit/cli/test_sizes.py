"""Limits on the command line."""

import click
import pytest

from dfs.cli.sizes import limit_of_bytes, limit_of_files


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("4096", 4096),
        ("10K", 10 << 10),
        ("1.5m", 3 << 19),
        ("10GiB", 10 << 30),
        ("2 TB", 2 << 40),
        ("9223372036854775807", (1 << 63) - 1),
        ("none", 0),
    ],
)
def test_sizes(text, value):
    assert limit_of_bytes(text) == value


@pytest.mark.parametrize("text", ["", "-1", "0", "x", "10Q", "1e3", "9E", "9223372036854775808"])
def test_no_sizes(text):
    with pytest.raises(click.BadParameter):
        limit_of_bytes(text)


def test_numbers_have_no_units():
    assert limit_of_files("1000") == 1000
    for text in ("1K", "1.5", "0"):
        with pytest.raises(click.BadParameter):
            limit_of_files(text)
