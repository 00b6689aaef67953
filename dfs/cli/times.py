"""Times of files as people read them."""

from datetime import UTC, datetime


def local_time(ns: int) -> str:
    """Nanoseconds since the epoch in local time, to the second."""
    return datetime.fromtimestamp(ns / 1e9, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
