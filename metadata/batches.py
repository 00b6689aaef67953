"""Batches of requests: what the home's state machine hands out to be proposed or answered."""

from typing import Any

from metadata.requests import Request

Verdicts = tuple[bool, ...]
Answer = (
    Any  # Commit: (seq, verdicts); Open: sid; DelegationChange: epoch; else (); or the DfsError
)
Answers = list[tuple[Request, Answer]]


class Formed:
    """Result of forming a batch."""

    __slots__ = ("answers", "confirm", "payload")

    def __init__(self, payload: bytes | None, answers: Answers, confirm: list[Request]) -> None:
        """`payload`: the entry to propose, if there is one; `answers`: final already; `confirm`:
        to be passed to `settle` after a Confirm begun now.
        """
        self.payload = payload
        self.answers = answers
        self.confirm = confirm


class Flight:
    """A batch that was handed out to be proposed."""

    __slots__ = ("answers", "control", "parts", "payload")

    def __init__(
        self, payload: bytes, answers: Answers, parts: tuple[tuple[Any, ...], ...] | None
    ) -> None:
        """`parts`: body of a DATA entry, else None; `answers` hold once it is chosen."""
        self.payload = payload
        self.answers = answers
        self.parts = parts
        self.control = answers[0][0] if parts is None else None
