"""What one replica of a journal keeps on disk: its records, and how they fold back into state.

Three records describe a replica completely (tuples, first field is the kind):

    (PROMISED, ballot)
        no lower ballot is answered any more
    (ENTRY, seq, ballot, prev_hash, payload, chosen)
        accepted at `ballot`, or known to be chosen
    (BASE, seq, hash, version, members, genesis, promised)
        everything up to `seq` is chosen and dropped; the config in force after it is repeated

An ENTRY that is not marked chosen also promises its ballot.  Per seq the last record counts.
`replay` does not depend on the order of records of different seqs, so live records of an old file
may be copied to the end of a new one.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from blake3 import blake3

from dfs.errors import Corrupt, RemoteProtocolError
from dfs.volume import entries

Ballot = tuple[int, int]  # (round, node): compared as tuples
Record = tuple[Any, ...]

PROMISED, ENTRY, BASE = 1, 2, 3
NO_BALLOT: Ballot = (0, 0)
NO_HASH = bytes(32)


class Base(NamedTuple):
    """Where a log starts: `seq` (0 = at the beginning), its chain hash, the config after it."""

    seq: int
    hash: bytes
    version: int
    members: tuple[int, ...]
    genesis: bytes  # payload of the genesis entry; b"" only in a blank replica


BLANK = Base(0, NO_HASH, 0, (), b"")


class Pending(NamedTuple):
    """The entry accepted on top of the last chosen one, itself not known to be chosen."""

    ballot: Ballot
    payload: bytes
    hash: bytes


def chain(prev_hash: bytes, seq: int, payload: bytes) -> bytes:
    """Chain hash of entry `seq`: BLAKE3(prev_hash | seq as u64be | payload)."""
    h = blake3(prev_hash + seq.to_bytes(8, "big"))
    h.update(payload)
    return h.digest()


def config_of(payload: bytes) -> tuple[int, int, tuple[int, ...]] | None:
    """(kind, version, members) when the payload is a GENESIS or CONFIG entry, else None.

    Looks at three bytes first: an entry is a msgpack array of less than 16 fields that starts with
    its format version and kind, both under 128.
    """
    if len(payload) < 3 or payload[0] & 0xF0 != 0x90 or payload[1] != entries.VERSION:
        return None
    if payload[2] not in (entries.GENESIS, entries.CONFIG):
        return None
    try:
        kind, _, body = entries.decode(payload)
        version, members = body[1:3] if kind == entries.GENESIS else body
    except (Corrupt, RemoteProtocolError, ValueError, TypeError):
        return None
    if not isinstance(version, int) or not isinstance(members, tuple) or not members:
        return None
    if not all(isinstance(m, int) for m in members) or len(set(members)) != len(members):
        return None
    return kind, version, members


class State:
    """Durable state of a replica as it is handed to a `Replica`; `log` holds what is above base."""

    __slots__ = ("base", "chosen", "configs", "head", "log", "pending", "promised")

    def __init__(self) -> None:
        """A blank state: no promise, no entry."""
        self.promised: Ballot = NO_BALLOT
        self.base: Base = BLANK
        self.chosen = 0  # last seq known to be chosen
        self.head = NO_HASH  # chain hash of `chosen`
        self.pending: Pending | None = None  # accepted at chosen + 1
        self.configs: list[tuple[int, int, tuple[int, ...]]] = []  # (seq, version, members)
        self.log: list[tuple[bytes, bytes]] = []  # (prev_hash, payload) of base.seq+1 .. chosen


def apply_config(
    configs: list[tuple[int, int, tuple[int, ...]]], seq: int, payload: bytes
) -> tuple[int, ...] | None:
    """Enter the config that entry `seq` may hold; return its members when it takes effect.

    A CONFIG counts only as the next version; every replica ignores any other one alike.
    """
    found = config_of(payload)
    if found is None:
        return None
    kind, version, members = found
    if (kind == entries.GENESIS) != (seq == 1):
        return None
    if kind == entries.CONFIG and (not configs or version != configs[-1][1] + 1):
        return None
    configs.append((seq, version, members))
    return members


def replay(records: Iterable[Record]) -> State:
    """Fold records, in the order they were written, into a state; raises `Corrupt` on a gap.

    A gap or a break of the hash chain means that durable records are missing.
    """
    state = State()
    found: dict[int, Record] = {}
    for record in records:
        kind = record[0]
        if kind == ENTRY:
            found[record[1]] = record
            if not record[5] and record[2] > state.promised:
                state.promised = record[2]
        elif kind == PROMISED:
            state.promised = max(state.promised, record[1])
        else:
            state.promised = max(state.promised, record[6])
            if record[1] > state.base.seq:
                state.base = Base(*record[1:6])
    base = state.base
    state.chosen, state.head = base.seq, base.hash
    if base.seq:
        state.configs.append((base.seq, base.version, base.members))
    live = sorted(seq for seq in found if seq > base.seq)
    for position, seq in enumerate(live, base.seq + 1):
        _, _, ballot, prev_hash, payload, chosen = found[seq]
        if seq != position:
            raise Corrupt(f"entries {position} to {seq - 1} are missing")
        if prev_hash != state.head:
            raise Corrupt(f"entry {seq} does not continue the hash chain")
        here = chain(prev_hash, seq, payload)
        if seq == live[-1] and not chosen:
            state.pending = Pending(ballot, payload, here)
            break
        # An entry that another was accepted on top of is chosen, marked or not.
        state.chosen, state.head = seq, here
        state.log.append((prev_hash, payload))
        apply_config(state.configs, seq, payload)
        if seq == 1:
            state.base = base._replace(genesis=payload)
    return state
