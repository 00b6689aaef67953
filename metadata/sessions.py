"""Sessions of a volume and the rest of a home's control state, as values.

A session is one mounted or library client.  What the home knows of it is *control state*: it is
changed by journal entries only, repeated in every checkpoint entry, and therefore equal at every
home that takes over.
"""

from collections.abc import Iterable
from typing import Any

from dfs.errors import Corrupt
from dfs.ids import SessionId

READ_WRITE, READ_ONLY = "rw", "ro"
EXCLUSIVE = "rwx"  # the only one that writes, see `metadata.exclusion`
MODES = (READ_WRITE, READ_ONLY, EXCLUSIVE)
CONTROL_VERSION = 1


class Session:
    """One open session: who it is and the outcome of its last request that reached the journal.

    One outcome is enough, since a client sends its next request only after it knows how the one
    before ended.
    """

    __slots__ = ("mode", "name", "no", "nonce", "seq", "sid", "verdicts")

    def __init__(
        self,
        sid: SessionId,
        mode: str,
        nonce: bytes,
        name: str,
        no: int = 0,
        seq: int = 0,
        verdicts: tuple[bool, ...] = (),
    ) -> None:
        """`no`, `seq`, `verdicts`: last request, the entry that holds it, what it came to."""
        self.sid = sid
        self.mode = mode
        self.nonce = nonce
        self.name = name
        self.no = no
        self.seq = seq
        self.verdicts = verdicts

    @property
    def writes(self) -> bool:
        """Whether it may change the volume."""
        return self.mode != READ_ONLY

    def encode(self) -> tuple[Any, ...]:
        """As a codec value, in the order of the constructor."""
        return (self.sid, self.mode, self.nonce, self.name, self.no, self.seq, self.verdicts)


class Control:
    """Decoded control state of a checkpoint entry."""

    __slots__ = ("epoch", "holder", "params", "sessions", "tree_bytes")

    def __init__(
        self,
        params: dict[str, Any],
        sessions: Iterable[Session],
        epoch: int,
        holder: SessionId,
        tree_bytes: int,
    ) -> None:
        """`epoch`, `holder`: of the delegation, 0 for nobody; `tree_bytes`: a rough size."""
        self.params = params
        self.sessions = list(sessions)
        self.epoch = epoch
        self.holder = holder
        self.tree_bytes = tree_bytes

    def encode(self) -> tuple[Any, ...]:
        """As a codec value: (version, params, sessions, epoch, holder, tree_bytes)."""
        return (
            CONTROL_VERSION,
            self.params,
            tuple(session.encode() for session in self.sessions),
            self.epoch,
            self.holder,
            self.tree_bytes,
        )

    @classmethod
    def decode(cls, value: Any) -> "Control":
        """Parse; raises `Corrupt` for anything that is not of this version."""
        if not isinstance(value, tuple) or len(value) != 6 or value[0] != CONTROL_VERSION:
            raise Corrupt(f"control state is not of version {CONTROL_VERSION}: {str(value)[:40]}")
        _, params, sessions, epoch, holder, tree_bytes = value
        try:
            return cls(params, [Session(*s) for s in sessions], epoch, holder, tree_bytes)
        except TypeError as e:
            raise Corrupt(f"malformed control state: {e}") from e
