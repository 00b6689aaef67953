"""`VOLUME:/path`, as file commands take it."""

import os
from typing import Any, NamedTuple

import click

from dfs.cli.context import printable


class Place(NamedTuple):
    """A path in a volume."""

    volume: str
    path: bytes  # absolute, without a slash at its end (the root is b"/")
    directory: bool  # it ended in a slash: it means a directory

    def __str__(self) -> str:
        """As people are shown it."""
        return printable(self.text)

    @property
    def text(self) -> str:
        """As people write it, for programs."""
        return f"{self.volume}:{os.fsdecode(self.path)}"

    def __truediv__(self, name: bytes) -> "Place":
        """The entry `name` of this directory."""
        return Place(self.volume, self.path.rstrip(b"/") + b"/" + name, directory=False)

    @property
    def name(self) -> bytes:
        """The last part of the path; b"" for the root."""
        return self.path.rpartition(b"/")[2]


class PlaceType(click.ParamType):  # type: ignore[type-arg]  # no generic in click 8.1
    """Parses `VOLUME:/path`; `VOLUME:` is its root, and the slash may be left out."""

    name = "VOLUME:/PATH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Place:
        """A `Place`; a usage error if there is no volume."""
        if isinstance(value, Place):
            return value
        volume, colon, path = str(value).partition(":")
        if not colon or not volume or "/" in volume:
            self.fail(f"{value!r} is no place in a volume, such as photos:/summer", param, ctx)
        parts = [part for part in os.fsencode(path).split(b"/") if part and part != b"."]
        return Place(volume, b"/" + b"/".join(parts), not parts or path.endswith("/"))


PLACE = PlaceType()


def is_place(text: str) -> bool:
    """Whether an argument is meant as a place in a volume and not as a local path."""
    volume, colon, _ = text.partition(":")
    return bool(colon and volume) and "/" not in volume
