"""One connection as a sans-IO state machine: bytes in, events out; messages in, buffers out.

Both sides greet before anything else: the client sends HELLO, the server answers HELLO, or GOODBYE
with the error that explains why not (another cluster, another version, a wrong secret).  Then the
client sends REQUEST and CAST, the server answers requests with REPLY or ERROR, in any order; the
stream number tells which.  GOODBYE ends a connection with a reason.

HELLO meta is `(protocol version, cluster id, name, secret)`, extended by appending.  The secret is
compared, not proved: it keeps strangers out on a network that cannot be listened to.

A broken rule raises `RemoteProtocolError` when the peer broke it and `LocalProtocolError` when we
would.  After either the connection is over; its owner closes the socket.
"""

from enum import Enum
from hmac import compare_digest
from typing import Any, NamedTuple

from dfs.codec import pack, unpack
from dfs.errors import (
    DfsError,
    LocalProtocolError,
    RemoteProtocolError,
    WrongCluster,
    WrongVersion,
    from_wire,
    to_wire,
)
from dfs.wire import frame
from dfs.wire.frame import CAST, ERROR, GOODBYE, HELLO, KIND_NAMES, REPLY, REQUEST, Buffers
from dfs.wire.outgoing import SendQueue

PROTOCOL = 1
_GREETING_LIMIT = 64 << 10  # nobody gets more memory than this before the handshake

# (kind, stream, priority, epoch, deadline in ms, value, data)
#   REQUEST, CAST: value = (method, args), or None if its data was discarded
#   REPLY: value = result; ERROR: value = the `DfsError`; HELLO: value = the peer's `Greeting`
Event = tuple[int, int, int, int, int, Any, memoryview]


class Role(Enum):
    """Which side of the connection we are."""

    CLIENT = "client"
    SERVER = "server"


class State(Enum):
    """Where a connection stands."""

    GREETING = "greeting"  # the peer's HELLO has not come
    OPEN = "open"
    CLOSED = "closed"


# All transitions: kinds that may arrive or leave in a state, and the state they lead to.
_RECEIVE: dict[tuple[Role, State], dict[int, State]] = {
    (Role.CLIENT, State.GREETING): {HELLO: State.OPEN, GOODBYE: State.CLOSED},
    (Role.CLIENT, State.OPEN): {REPLY: State.OPEN, ERROR: State.OPEN, GOODBYE: State.CLOSED},
    (Role.CLIENT, State.CLOSED): {},
    (Role.SERVER, State.GREETING): {HELLO: State.OPEN, GOODBYE: State.CLOSED},
    (Role.SERVER, State.OPEN): {REQUEST: State.OPEN, CAST: State.OPEN, GOODBYE: State.CLOSED},
    (Role.SERVER, State.CLOSED): {},
}
_SEND: dict[tuple[Role, State], frozenset[int]] = {
    (Role.CLIENT, State.OPEN): frozenset({REQUEST, CAST}),
    (Role.SERVER, State.OPEN): frozenset({REPLY, ERROR}),
}


class Greeting(NamedTuple):
    """What a side says about itself in HELLO."""

    protocol: int
    cluster_id: bytes
    name: str
    secret: bytes = b""


class Connection:
    """One side of one connection."""

    __slots__ = (
        "_decoder",
        "_error",
        "_expected",
        "_me",
        "_sendable",
        "peer",
        "queue",
        "role",
        "state",
    )

    def __init__(self, role: Role, cluster_id: bytes, name: str, secret: bytes = b"") -> None:
        """Start greeting; a client's HELLO is queued at once."""
        self.role = role
        self.peer: Greeting | None = None
        self.queue = SendQueue()
        self._decoder = frame.Decoder(max_meta=_GREETING_LIMIT, max_data=0, single=True)
        self._me = Greeting(PROTOCOL, cluster_id, name, secret)
        self._error: DfsError | None = None
        self._enter(State.GREETING)
        if role is Role.CLIENT:
            self._greet()

    def _enter(self, state: State) -> None:
        self.state = state
        self._expected = _RECEIVE[self.role, state]
        self._sendable = _SEND.get((self.role, state), frozenset())

    def _greet(self) -> None:
        self.queue.put(0, frame.encode(HELLO, 0, pack(tuple(self._me))), (), 0)

    # ----------------------------------------------------------------------------------- sending

    def send(
        self,
        kind: int,
        stream: int,
        meta: bytes,
        data: Buffers = b"",
        *,
        priority: int = 0,
        epoch: int = 0,
        deadline: int = 0,
    ) -> None:
        """Queue a frame with encoded `meta`; raises `LocalProtocolError` and queues nothing."""
        if kind not in self._sendable:
            raise LocalProtocolError(
                f"a {self.role.value} may not send {KIND_NAMES[kind]} while {self.state.value}"
            )
        parts, length = frame.gather(data)
        head = frame.encode(
            kind, stream, meta, length, priority=priority, epoch=epoch, deadline=deadline
        )
        self.queue.put(priority, head, parts, length)

    def release(self) -> None:
        """Let go of all buffers, sent or not; the connection is over.

        The traceback of what ended it is a cycle that keeps it until the garbage collector comes,
        which may be a million objects later.
        """
        self._decoder.release()
        self.queue.clear()

    def goodbye(self, reason: DfsError) -> None:
        """Queue the reason why we end this connection; nothing may be sent after it."""
        if self.state is not State.CLOSED:
            self.queue.put(0, frame.encode(GOODBYE, 0, pack(to_wire(reason))), (), 0)
            self._enter(State.CLOSED)

    # --------------------------------------------------------------------------------- receiving

    @property
    def waiting(self) -> int:
        """Bytes that `next_buffer()` will allocate for a large frame; 0 = none."""
        return self._decoder.waiting

    @property
    def waiting_deadline(self) -> int:
        """Deadline, in ms, of the large frame that is waiting; 0 = none."""
        return self._decoder.head[5]

    def discard(self) -> None:
        """Do not keep the waiting large frame; its event then has the value None."""
        self._decoder.discard()

    def next_buffer(self) -> memoryview:
        """Where to receive next."""
        if self._error is not None:
            raise self._error
        try:
            return self._decoder.next_buffer()
        except DfsError as e:
            self._refuse(e)
            raise

    def received(self, n: int) -> list[Event]:
        """`n` bytes are in `next_buffer()`: the events they complete.

        Raises `RemoteProtocolError`, `WrongVersion`, `WrongCluster`, or what the peer's GOODBYE
        says; a server has queued the GOODBYE that tells the client then.  Events before the bad
        frame are returned first, the error by the next call.
        """
        events: list[Event] = []
        try:
            greeting = self.state is State.GREETING
            events.extend(map(self._event, self._decoder.received(n)))
            if greeting and self.state is State.OPEN:  # what follows HELLO has other limits
                events.extend(map(self._event, self._decoder.received(0)))
        except DfsError as e:
            self._refuse(e)
            if not events:
                raise
            self._error = e
        return events

    def eof(self) -> None:
        """The peer sent its last byte; raises `RemoteProtocolError` when that is inside a frame."""
        self._decoder.eof()

    def _refuse(self, error: DfsError) -> None:
        if self.role is Role.SERVER:
            self.goodbye(error)
        else:
            self._enter(State.CLOSED)

    def _event(self, received: frame.Frame) -> Event:
        kind, stream, priority, epoch, deadline, meta, data = received
        after = self._expected.get(kind)
        if after is None:
            raise RemoteProtocolError(
                f"{KIND_NAMES[kind]} from the peer of a {self.role.value} while {self.state.value}"
            )
        if meta is None:
            return kind, stream, priority, epoch, deadline, None, data
        value = unpack(meta)
        if kind in (REQUEST, CAST):
            if not (
                type(value) is tuple
                and len(value) == 2
                and type(value[0]) is str
                and type(value[1]) is tuple
            ):
                raise RemoteProtocolError("a request's meta is not (method, arguments)")
        elif kind == ERROR:
            value = _error(value)
        elif kind == GOODBYE:
            self._enter(after)
            raise _error(value)
        elif kind == HELLO:
            value = self._welcome(value)
            self._enter(after)
        return kind, stream, priority, epoch, deadline, value, data

    def _welcome(self, value: Any) -> Greeting:
        """Check the peer's HELLO and answer it."""
        if not (
            isinstance(value, tuple)
            and len(value) >= 4
            and isinstance(value[0], int)
            and isinstance(value[1], bytes)
            and isinstance(value[2], str)
            and isinstance(value[3], bytes)
        ):
            raise RemoteProtocolError("HELLO does not say (protocol, cluster id, name, secret)")
        peer, me = Greeting(*value[:4]), self._me
        if peer.protocol != PROTOCOL:
            raise WrongVersion(
                f"{peer.name!r} speaks protocol {peer.protocol}, {me.name!r} speaks {PROTOCOL}; "
                "run the same release of dfs on both sides"
            )
        if peer.cluster_id != me.cluster_id:
            raise WrongCluster(
                f"{peer.name!r} belongs to cluster {peer.cluster_id.hex() or '(none)'}, "
                f"{me.name!r} to {me.cluster_id.hex() or '(none)'}; check the addresses in the "
                "cluster file"
            )
        if not compare_digest(peer.secret, me.secret):
            raise WrongCluster(
                f"{peer.name!r} and {me.name!r} do not have the same cluster secret; copy it from "
                "a working node's cluster file"
            )
        self.peer = peer
        if self.role is Role.SERVER:
            self._greet()
        self._decoder.limit(frame.MAX_META, frame.MAX_DATA)
        return peer


def _error(value: Any) -> DfsError:
    if not (
        isinstance(value, tuple)
        and len(value) == 3
        and type(value[0]) is int
        and isinstance(value[1], str)
        and isinstance(value[2], tuple)
    ):
        raise RemoteProtocolError("an error's meta is not (code, message, details)")
    try:
        return from_wire(*value)
    except (TypeError, ValueError) as e:
        raise RemoteProtocolError(f"an error's details make no sense: {e}") from e


def encode_value(value: Any) -> bytes:
    """Meta of a frame; raises `LocalProtocolError` for a value that has no encoding."""
    try:
        return pack(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise LocalProtocolError(f"value cannot be sent: {e}") from e
