"""Journal entries of a volume: what they are made of and how they are encoded.

An entry is the unit of consensus; its bytes are encoded once, by the home that proposes it, and go
unchanged to the acceptors, into the log files and to every watching client.  Layout: a tuple that
starts with `(VERSION, kind, stamp_ns, ...)`:

    DATA        (..., ((sid, no, verdicts, effects), ...))  effects of the session's accepted
                transactions, in order, as in `dfs.volume.effects`; verdicts: one bool a transaction
    CONFIG      (..., version, members)            members: node numbers; journal membership
    SESSION     (..., sid, mode, nonce, name)      a session opens; mode "rw", "ro", or "rwx" for
                the only one that writes
    CLOSE       (..., (sid, ...))                  sessions end; the delegation ends with its holder
    GENESIS     (..., params, version, members)    seq 1 of every journal; params: map str -> value
    CHECKPOINT  (..., covered_seq, root, control)  the tree `root` holds all up to covered_seq;
                control: the home's control state at this entry: a take-over reads no tree
    DELEGATION  (..., epoch, sid or 0, closed)     granted to sid, or returned / revoked;
                closed: the session that ends by being revoked, or absent

Each grant, return, revocation and close of the holder makes the delegation's epoch one higher.
`stamp_ns` is the proposer's wall clock, made to grow strictly along the journal.
"""

from typing import Any, NamedTuple

from dfs.codec import Buffer, pack, unpack
from dfs.errors import Corrupt
from dfs.ids import SessionId

VERSION = 1
DATA, CONFIG, SESSION, CLOSE, GENESIS, CHECKPOINT, DELEGATION = range(7)


class Entry(NamedTuple):
    """A decoded entry; `body` is the kind's own fields as listed in the module's docstring."""

    kind: int
    stamp: int
    body: tuple[Any, ...]


def encode(kind: int, stamp: int, *body: Any) -> bytes:
    """Encode an entry."""
    return pack((VERSION, kind, stamp, *body))


def decode(data: Buffer) -> Entry:
    """Decode an entry; raises `Corrupt` when it is none of ours or of a newer version."""
    value = unpack(data)
    if not isinstance(value, tuple) or len(value) < 3 or value[0] != VERSION:
        raise Corrupt(f"not a journal entry of version {VERSION}: {bytes(data[:16])!r}...")
    return Entry(value[1], value[2], value[3:])


def closed(entry: Entry) -> tuple[SessionId, ...]:
    """Sessions that end with this entry."""
    kind, _, body = entry
    if kind == CLOSE:
        return tuple(body[0])
    if kind == DELEGATION and len(body) > 2:
        return (body[2],)
    return ()
