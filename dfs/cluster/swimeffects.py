"""What comes out of `dfs.cluster.membership.Membership`: effects, and members as they are known."""

from typing import NamedTuple

from dfs.cluster.swim import ALIVE, STATUSES, Message, Vitals, key_number, key_role
from dfs.cluster.swimtable import Member


class Info(NamedTuple):
    """What a member tells about itself."""

    epoch: int
    digest: bytes  # 32 bytes, of the cluster map
    total: int  # bytes of disk
    free: int  # bytes
    load: float


class Snapshot(NamedTuple):
    """One member as it is known here at one moment."""

    key: int
    number: int
    role: str
    node_id: bytes
    address: str
    status: str  # "alive", "suspect", "dead", "left"; "unknown" = named by the map, never heard of
    boot: int
    incarnation: int
    since: float  # monotonic seconds of the last change of status or boot
    vitals: Vitals | None


class Send(NamedTuple):
    """Effect: send the message, at most once."""

    address: str
    message: Message


class Changed(NamedTuple):
    """Effect: a member's status changed, or it started again (the statuses may then be equal)."""

    member: Snapshot
    old: str
    new: str


class OtherMap(NamedTuple):
    """Effect: a member has a newer map than we, or another one of the same epoch."""

    address: str
    epoch: int
    digest: bytes


class Usurped(NamedTuple):
    """Effect: another process has this identity; this one must stop."""

    reason: str


Effect = Send | Changed | OtherMap | Usurped


def status_of(member: Member) -> str:
    """How a member is, in a word; see `Snapshot.status`."""
    claim = member.claim
    return "unknown" if claim.boot == 0 and claim.status == ALIVE else STATUSES[claim.status]


def snapshot_of(member: Member) -> Snapshot:
    """What is known of a member now."""
    claim = member.claim
    return Snapshot(
        claim.key,
        key_number(claim.key),
        key_role(claim.key),
        claim.node_id,
        claim.address,
        status_of(member),
        claim.boot,
        claim.incarnation,
        member.since,
        member.vitals,
    )
