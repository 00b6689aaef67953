"""Limits as people write them on the command line: `4096`, `500M`, `10GiB`, `none`."""

import re

import click

UNITS = "KMGTPE"
MOST = (1 << 63) - 1
_SIZE = re.compile(rf"(\d+)(\.\d+)?\s*(?:([{UNITS}])i?)?B?", re.IGNORECASE)


def limit_of_bytes(text: str) -> int:
    """Bytes, units are powers of 1024; 0 for `none`.  Raises `click.BadParameter`."""
    if text.lower() == "none":
        return 0
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is no size such as 500M or 10GiB, and not none")
    unit = 1024 ** (1 + UNITS.index(match[3].upper())) if match[3] else 1
    return _limit(text, int(match[1]) * unit + int(float(match[2] or 0) * unit))


def limit_of_files(text: str) -> int:
    """A number; 0 for `none`.  Raises `click.BadParameter`."""
    if text.lower() == "none":
        return 0
    if not text.isdecimal():
        raise click.BadParameter(f"{text!r} is no number, and not none")
    return _limit(text, int(text))


def _limit(text: str, number: int) -> int:
    if not 0 < number <= MOST:
        raise click.BadParameter(f"{text!r} is no limit: it is 1 to 2^63-1, or none")
    return number
