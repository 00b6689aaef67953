"""SWIM's vocabulary: what members claim about each other, and the messages that carry it.

Two kinds of statement travel, each encoded once and passed on as the same bytes:

- a `Claim` says that a member is alive, suspect, dead or has left.  Claims about one member are
  ordered by (boot, incarnation, status), the higher one wins; only the member itself raises its
  incarnation, to refute what is said about it, and its boot, by starting again;
- `Vitals` are what a member tells about itself: heartbeat counter, cluster map, disk, load.  They
  are ordered by (boot, heartbeat).

A message is a `dfs.codec` tuple (`VERSION` 1):

    (version, kind, claim, vitals, serial, subject, claims, vitals of others)

`claim` and `vitals` are the sender's own, so that whoever is spoken to knows the speaker.

    kind      subject                                  meaning
    PING      key of the member that is meant          answer with ACK
    ACK       0                                        `serial` of the PING or PING_REQ
    NACK      0                                        the member of that PING_REQ is silent
    PING_REQ  (key, address)                           PING it for me, answer ACK or NACK
    GOSSIP    0                                        only the claims
    SYNC      512 bytes, a digest per bucket           send TABLE where yours differ
    TABLE     (64 bits: buckets, whether to answer)    all that the sender knows of those buckets

Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard" (2017).
"""

from functools import lru_cache
from typing import Any, NamedTuple

from dfs import codec
from dfs.cluster.address import is_address
from dfs.cluster.map import CHUNK, METADATA
from dfs.errors import RemoteProtocolError
from dfs.ids import NODE_BITS

VERSION = 1
PING, ACK, NACK, PING_REQ, GOSSIP, SYNC, TABLE = range(1, 8)
KINDS = ("?", "ping", "ack", "nack", "ping_req", "gossip", "sync", "table")
ALIVE, SUSPECT, DEAD, LEFT = range(4)
STATUSES = ("alive", "suspect", "dead", "left")
NOBODY = -1  # accuser of a claim that nobody made in particular
BUCKETS = 64
BUCKET_BYTES = 8
MAX_KEY = 2 << NODE_BITS
MAX_UPDATES = 4096  # in one message; the largest that is sent has some hundreds

Message = tuple[Any, ...]


class Claim(NamedTuple):
    """That a member, at this boot and incarnation, has this status."""

    key: int  # see `member_key`
    node_id: bytes  # 16 bytes
    address: str
    boot: int  # higher at each start of the process; 0 = assumed from the map, never heard
    incarnation: int
    status: int  # ALIVE, SUSPECT, DEAD or LEFT
    by: int  # key of the accuser; NOBODY for other claims


class Vitals(NamedTuple):
    """What a member says of itself."""

    key: int
    boot: int
    heartbeat: int  # counts the vitals of this boot
    epoch: int  # of its cluster map
    digest: bytes  # of its cluster map, 32 bytes
    total: int  # bytes of disk
    free: int  # bytes of it that are free
    load: float  # any unit that all members share


def member_key(number: int, role: str) -> int:
    """The identity of a daemon as one integer: node number and role."""
    return number * 2 + (role == CHUNK)


def key_number(key: int) -> int:
    """The node number in a key."""
    return key >> 1


def key_role(key: int) -> str:
    """The role in a key."""
    return CHUNK if key & 1 else METADATA


def show(key: int) -> str:
    """A key for people: `metadata 3`."""
    return f"{key_role(key)} {key >> 1}"


def encode(value: Claim | Vitals) -> bytes:
    """The bytes that travel."""
    return codec.pack(value)


def _natural(value: object, limit: int = 1 << 63) -> bool:
    return type(value) is int and 0 <= value < limit


def _fields(raw: bytes, count: int, what: str) -> tuple[Any, ...]:
    value = codec.unpack(raw)
    if type(value) is not tuple or len(value) != count:
        raise RemoteProtocolError(f"{what} of another form: {value!r:.200}")
    return value


# Pure functions of bytes: the same statement arrives many times, so its parse is remembered.
@lru_cache(maxsize=1 << 14)
def decode_claim(raw: bytes) -> Claim:
    """Decode and validate; raises `RemoteProtocolError`."""
    claim = Claim(*_fields(raw, 7, "a claim"))
    if not (
        _natural(claim.key, MAX_KEY)
        and type(claim.node_id) is bytes
        and len(claim.node_id) == 16
        and type(claim.address) is str
        and len(claim.address) <= 300
        and is_address(claim.address)
        and _natural(claim.boot)
        and _natural(claim.incarnation)
        and _natural(claim.status, len(STATUSES))
        and (claim.by == NOBODY or _natural(claim.by, MAX_KEY))
    ):
        raise RemoteProtocolError(f"malformed claim: {claim!r:.300}")
    return claim


@lru_cache(maxsize=1 << 14)
def decode_vitals(raw: bytes) -> Vitals:
    """Decode and validate; raises `RemoteProtocolError`."""
    vitals = Vitals(*_fields(raw, 8, "vitals"))
    if not (
        _natural(vitals.key, MAX_KEY)
        and _natural(vitals.boot)
        and _natural(vitals.heartbeat)
        and _natural(vitals.epoch)
        and type(vitals.digest) is bytes
        and len(vitals.digest) == 32
        and _natural(vitals.total)
        and _natural(vitals.free)
        and type(vitals.load) is float
    ):
        raise RemoteProtocolError(f"malformed vitals: {vitals!r:.300}")
    return vitals


def check_message(message: Message) -> None:
    """Raise `RemoteProtocolError` unless the message has the form of its kind."""
    if len(message) != 8 or message[0] != VERSION:
        version = message[0] if message else None
        raise RemoteProtocolError(
            f"gossip of version {version!r}, this program speaks {VERSION}: upgrade the older one"
        )
    _, kind, claim, vitals, serial, subject, claims, others = message
    if (
        type(claim) is bytes
        and type(vitals) is bytes
        and _natural(serial)
        and _is_updates(claims)
        and _is_updates(others)
        and _natural(kind, len(KINDS))
        and _fits(kind, subject)
    ):
        return
    raise RemoteProtocolError(f"malformed gossip of kind {kind!r}")


def _is_updates(value: object) -> bool:
    return (
        type(value) is tuple
        and len(value) <= MAX_UPDATES
        and all(type(raw) is bytes for raw in value)
    )


def _fits(kind: int, subject: Any) -> bool:
    if kind == PING:
        return _natural(subject, MAX_KEY)
    if kind == SYNC:
        return type(subject) is bytes and len(subject) == BUCKETS * BUCKET_BYTES
    if kind in (PING_REQ, TABLE):
        if type(subject) is not tuple or len(subject) != 2:
            return False
        if kind == TABLE:
            return _natural(subject[0], 1 << BUCKETS) and type(subject[1]) is bool
        return _natural(subject[0], MAX_KEY) and type(subject[1]) is str and is_address(subject[1])
    return kind in (ACK, NACK, GOSSIP)
