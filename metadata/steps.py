"""What background protocols ask of the world: the effects that their generators yield.

A protocol of the metadata node that runs behind the scenes (anti-entropy, hints, purging) is a
generator: it yields an effect and is sent the effect's result, or has its error thrown in.  The
node drives it with real calls and a real store, the simulator with its own scheduler, faults and
crashes.  Local reads are synchronous and are no effect; between two yields nothing else happens on
the node, and across a yield everything may have changed.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[Any, Any, T]

Item = tuple[bytes, bytes]  # row key, value


@dataclass(frozen=True, slots=True)
class Call:
    """Ask a node; the result is what its handler returned.  `epoch` is that of the map acted on."""

    node: int
    method: str
    args: tuple[Any, ...]
    epoch: int


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge rows that came from elsewhere into a table, with its digests; durable on return.

    Registers are merged with what is here, blobs are verified and added.  No items: a barrier, on
    return all that reads see is durable.  The result is how many rows were taken in.
    """

    table: int
    items: Sequence[Item]


@dataclass(frozen=True, slots=True)
class Purge:
    """Remove registers whose values have these digests, with their share of the digests; durable.

    Tombstones only, unless they are `ghosts`.  The result says for each (row, value digest) whether
    the row is absent now; False = it differs.
    """

    items: Sequence[tuple[bytes, bytes]]
    ghosts: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """Put judged registers in the place of old ones, in a partition that waits; durable.

    Items are row, value digest of the old one, and the register (b"" = none at all).  The result
    says for each whether the row was that and is replaced; see `metadata.pull`.
    """

    items: Sequence[tuple[bytes, bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Correct:
    """Correct the digests of a partition by {bucket: difference}, in turn with its writes; durable.

    None makes lost sums readable first.  No result; see `metadata.merkle.Digests`.
    """

    table: int
    partition: int
    errors: dict[int, int] | None


@dataclass(frozen=True, slots=True)
class Write:
    """Put and delete rows of the node's own state (hints, marks), which have no digests; durable.

    No result.
    """

    ops: Sequence[tuple[bytes, bytes | None]]


@dataclass(frozen=True, slots=True)
class Accept:
    """Let rows in [first, last) that damage hides read as absent, or as older; durable.

    No result; see `metadata.store.engine.Store.accept_losses`.
    """

    first: bytes
    last: bytes


@dataclass(frozen=True, slots=True)
class Rest:
    """Let others work for a while after having moved `size` bytes with `backlog` bytes to go."""

    size: int
    backlog: int = 0


def drain(steps: Steps[T]) -> T:
    """Run a protocol that asks for nothing; raises `RuntimeError` if it does."""
    try:
        effect = next(steps)
    except StopIteration as e:
        result: T = e.value
        return result
    raise RuntimeError(f"a protocol that should only read asks for {effect!r}")
