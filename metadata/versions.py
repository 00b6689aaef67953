"""Registers: values with a dotted version vector, and everything that may be done to them.

A dot (actor, hlc) names one write for ever.  A version vector says which writes were seen: every
write of the actor up to that hlc is here, or was superseded by something that is.  A register is
`(vv, siblings)`: plain tuples in canonical order, so that equal registers are equal tuples and
equal bytes.  (Almeida et al., "Scalable and accurate causality tracking for eventually consistent
stores", DAIS 2014; hybrid logical clocks: Kulkarni et al. 2014.)

Encoded: one format byte, then the `dfs.codec` encoding of (vv, siblings); a context is the same
with the vv alone.
"""

from typing import Any

from dfs import codec
from dfs.errors import Corrupt, InvalidArgument, RemoteProtocolError, TooManySiblings

Vector = tuple[tuple[bytes, int], ...]  # (actor, hlc), ascending by actor
Sibling = tuple[bytes, int, bytes]  # actor, hlc, value
Register = tuple[Vector, tuple[Sibling, ...]]  # siblings: the newest dot first

EMPTY: Register = ((), ())  # never written; has no encoded form but absence
FORMAT = b"\x01"
ACTOR_SIZE = 8
MAX_HLC = (1 << 63) - 1  # microseconds since 1970; lasts 292,000 years
MAX_SIBLINGS = 32
MAX_VALUE = 1 << 20  # bytes of all siblings together


def covers(vector: Vector, actor: bytes, hlc: int) -> bool:
    """Whether the vector has seen the dot."""
    return any(known == actor and hlc <= newest for known, newest in vector)


def join(a: Vector, b: Vector) -> Vector:
    """The pointwise maximum: everything that one of the two has seen."""
    if a == b or not b:
        return a
    if not a:
        return b
    newest = dict(a)
    for actor, hlc in b:
        if hlc > newest.get(actor, 0):
            newest[actor] = hlc
    return tuple(sorted(newest.items()))


def _newest_first(sibling: Sibling) -> tuple[int, bytes]:
    return (-sibling[1], sibling[0])


def merge(a: Register, b: Register) -> Register:
    """The least register that has seen what either has: a join, in any order, any number of times.

    A sibling stays if both have it, or if the other has not seen its dot.
    """
    if a == b or not b[0]:
        return a
    if not a[0]:
        return b
    (seen_a, in_a), (seen_b, in_b) = a, b
    if _follows(seen_a, seen_b, in_b):
        return b
    if _follows(seen_b, seen_a, in_a):
        return a
    return _merged(seen_a, in_a, seen_b, in_b)


def _follows(seen_a: Vector, seen_b: Vector, in_b: tuple[Sibling, ...]) -> bool:
    """Whether b is a later write, by an actor that a knows, on top of all that a has seen.

    What almost every copy of a replaced value finds.  Nothing of a is left then: its siblings are
    covered, and b's only one is another.
    """
    if len(in_b) != 1 or len(seen_a) != len(seen_b):
        return False
    writer, newest, _ = in_b[0]
    for (actor, hlc), (other, later) in zip(seen_a, seen_b, strict=True):
        if actor != other or hlc > later or (actor == writer and hlc >= newest):
            return False
    return True


def _merged(
    seen_a: Vector, in_a: tuple[Sibling, ...], seen_b: Vector, in_b: tuple[Sibling, ...]
) -> Register:
    """The merge of any two registers."""
    by_a, by_b = dict(seen_a), dict(seen_b)
    dots_a = {(x[0], x[1]) for x in in_a}
    dots_b = {(x[0], x[1]) for x in in_b}
    kept = [x for x in in_a if x[1] > by_b.get(x[0], 0) or (x[0], x[1]) in dots_b]
    kept += [x for x in in_b if x[1] > by_a.get(x[0], 0) and (x[0], x[1]) not in dots_a]
    if len(kept) > 1:
        kept.sort(key=_newest_first)
    return join(seen_a, seen_b), tuple(kept)


def put(
    register: Register, context: Vector, actor: bytes, hlc: int, value: bytes | None
) -> Register:
    """The register after a write that has seen `context`; value None deletes.

    The dot must be new: `hlc` above what register and context have seen of the actor.  Raises
    `TooManySiblings` when another value does not fit beside those that the write has not seen.
    """
    seen, siblings = register
    if context:
        by_context = dict(context)
        siblings = tuple(x for x in siblings if x[1] > by_context.get(x[0], 0))
    vector = join(join(seen, context), ((actor, hlc),))
    if value is None:
        return vector, siblings
    if siblings:
        if len(siblings) >= MAX_SIBLINGS:
            raise TooManySiblings(
                f"the key has {len(siblings)} concurrent values already: get it, then put with "
                "the context that came with them",
                len(siblings),
            )
        size = len(value) + sum(len(x[2]) for x in siblings)
        if size > MAX_VALUE:
            raise TooManySiblings(
                f"the key's {len(siblings) + 1} concurrent values would have {size} bytes, at most "
                f"{MAX_VALUE} are kept: get it, then put with the context that came with them",
                len(siblings),
            )
    return vector, tuple(sorted((*siblings, (actor, hlc, value)), key=_newest_first))


def newest_hlc(register: Register) -> int:
    """The newest dot's time, microseconds since 1970; 0 if it was never written."""
    return max((hlc for _, hlc in register[0]), default=0)


def is_tombstone(register: Register) -> bool:
    """Whether the register was written, and everything in it deleted."""
    return bool(register[0]) and not register[1]


# ------------------------------------------------------------------------------------ encoding


def encode(register: Register) -> bytes:
    """The canonical bytes; `EMPTY` has none."""
    return FORMAT + codec.pack(register)


def decode(data: bytes) -> Register:
    """Decode and validate; raises `Corrupt`, also for another format or another order."""
    if data[:1] != FORMAT:
        raise Corrupt(f"not a register this program knows: starts with {data[:8]!r}")
    try:
        register: Register = codec.unpack(memoryview(data)[1:])
        vector, siblings = register
        _check_vector(vector)
        _check_siblings(siblings, dict(vector))
    except (TypeError, ValueError, AttributeError, RemoteProtocolError) as e:
        raise Corrupt(f"malformed register: {e}") from e
    return register


def encode_context(vector: Vector) -> bytes:
    """What a client gets and hands back; a vector that has seen nothing is b""."""
    return FORMAT + codec.pack(vector) if vector else b""


def decode_context(data: Any) -> Vector:
    """Decode a client's context; raises `InvalidArgument`."""
    if data == b"":
        return ()
    if data.__class__ is not bytes or data[:1] != FORMAT:
        raise InvalidArgument("not a context: pass on what a get or a put returned")
    try:
        vector: Vector = codec.unpack(memoryview(data)[1:])
        _check_vector(vector)
    except (TypeError, ValueError, AttributeError, RemoteProtocolError) as e:
        raise InvalidArgument(f"damaged context: {e}; get the key again") from e
    return vector


def _check_vector(vector: Vector) -> None:
    if vector.__class__ is not tuple or not vector:
        raise ValueError("no write was seen")
    before = b""
    for actor, hlc in vector:
        if actor.__class__ is not bytes or len(actor) != ACTOR_SIZE or actor <= before:
            raise ValueError("actors out of order")
        if hlc.__class__ is not int or not 0 < hlc <= MAX_HLC:
            raise ValueError(f"an hlc of {hlc!r}")
        before = actor


def _check_siblings(siblings: tuple[Sibling, ...], by_vector: dict[bytes, int]) -> None:
    if siblings.__class__ is not tuple:
        raise ValueError("no siblings")
    before: tuple[int, bytes] | None = None
    for actor, hlc, value in siblings:
        if value.__class__ is not bytes or hlc.__class__ is not int or hlc <= 0:
            raise ValueError("a malformed sibling")
        if hlc > by_vector.get(actor, 0):
            raise ValueError("a sibling that the vector has not seen")
        order = (-hlc, actor)
        if before is not None and order <= before:
            raise ValueError("siblings out of order")
        before = order
