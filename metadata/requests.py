"""What clients and timers ask of a volume's home, checked and in the form the core works on.

A request keeps its place in the core's queues until its outcome is known.  Its `token` belongs to
whoever submitted it.
"""

from collections.abc import Iterator
from typing import Any

from dfs.errors import InvalidArgument
from dfs.ids import SessionId
from dfs.volume.effects import Effect
from dfs.volume.items import GROUP_SIZE, MAX_KEY
from dfs.volume.validation import MAX_EFFECTS, validate
from metadata.sessions import MODES

MAX_REQUEST = 8 << 20  # bytes of effects in one commit
MAX_TXNS = 4096  # in one commit
MAX_READS = 1 << 16  # keys and groups of one transaction
MAX_NAME = 256  # characters of a session's name
NONCE_SIZE = 16
MANY = 512  # effects that are checked without giving others a turn: some 2 ms of work
EFFECT_OVERHEAD = 24  # rough bytes of encoding beyond keys and values

Txn = tuple[tuple[bytes, ...], tuple[bytes, ...], tuple[Effect, ...]]  # (keys, groups, effects)


class Request:
    """Anything that waits for its turn at the home."""

    __slots__ = ("token",)
    token: Any


class Commit(Request):
    """Transactions of one session, judged together: `vol.commit`."""

    __slots__ = ("base", "epoch", "no", "oldest", "sid", "size", "txns", "writing")

    def __init__(
        self,
        sid: SessionId,
        no: int,
        base: int,
        txns: tuple[Txn, ...],
        oldest: int = 0,
        epoch: int = 0,
    ) -> None:
        """See `vol.commit` of `dfs.wire.messages`; nothing is checked here."""
        self.token = None
        self.sid = sid
        self.no = no
        self.base = base
        self.txns = txns
        self.oldest = oldest
        self.epoch = epoch
        self.writing = any(txn[2] for txn in txns)
        self.size = sum(map(_size, txns)) if self.writing else 0


class Open(Request):
    """A session that opens under an id that was just minted."""

    __slots__ = ("mode", "name", "nonce", "sid")

    def __init__(self, sid: SessionId, mode: str, nonce: bytes, name: str) -> None:
        """See `vol.open` of `dfs.wire.messages`; nothing is checked here."""
        self.token = None
        self.sid = sid
        self.mode = mode
        self.nonce = nonce
        self.name = name


class Close(Request):
    """Sessions that end: closed by their clients, or expired."""

    __slots__ = ("sids",)

    def __init__(self, sids: tuple[SessionId, ...]) -> None:
        """Sessions that are not open any more do no harm."""
        self.token = None
        self.sids = sids


class DelegationChange(Request):
    """What gives the volume's delegation to somebody, or takes it away."""

    __slots__ = ()


class Delegate(DelegationChange):
    """A session gets the delegation, as soon as `metadata.delegation` admits it."""

    __slots__ = ("sid",)

    def __init__(self, sid: SessionId) -> None:
        """`sid` is open for writing."""
        self.token = None
        self.sid = sid


class Return(DelegationChange):
    """The holder gives the delegation back."""

    __slots__ = ("epoch", "sid")

    def __init__(self, sid: SessionId, epoch: int) -> None:
        """Nothing happens if `sid` does not hold it with that epoch."""
        self.token = None
        self.sid = sid
        self.epoch = epoch


class Revoke(DelegationChange):
    """The home takes the delegation of an epoch away and ends its holder's session."""

    __slots__ = ("epoch",)

    def __init__(self, epoch: int) -> None:
        """Nothing happens if the epoch is over."""
        self.token = None
        self.epoch = epoch


class Configure(Request):
    """The journal's members change: node numbers, and the version that follows the present one."""

    __slots__ = ("members", "version")

    def __init__(self, version: int, members: tuple[int, ...]) -> None:
        """See `CONFIG` of `dfs.volume.entries`."""
        self.token = None
        self.version = version
        self.members = members


class Checkpoint(Request):
    """A tree that was folded and stored: `root` holds every entry up to `covered`."""

    __slots__ = ("covered", "root", "tree_bytes")

    def __init__(self, covered: int, root: bytes, tree_bytes: int) -> None:
        """`tree_bytes` is an estimate of the tree's size."""
        self.token = None
        self.covered = covered
        self.root = root
        self.tree_bytes = tree_bytes


def check_commit(args: tuple[Any, ...]) -> int:
    """The number of effects in (sid, no, base, have, txns, oldest, epoch), as on the wire.

    Checks everything but the effects themselves; raises `InvalidArgument`.  What passes this and
    `checks` can neither make the core fail nor, once `made_commit` takes it, grow its memory beyond
    `MAX_REQUEST`.
    """
    sid, no, base, have, txns, oldest, epoch = args
    for value in (sid, no, base, have, epoch):
        if type(value) is not int or value < 0:
            raise InvalidArgument(f"commit with a malformed number: {value!r}")
    if type(oldest) is not int:  # below 0 it is an age
        raise InvalidArgument(f"commit with a malformed age of its chunks: {oldest!r:.80}")
    if no == 0:
        raise InvalidArgument("requests of a session are numbered from 1")
    if type(txns) is not tuple or not 0 < len(txns) <= MAX_TXNS:
        raise InvalidArgument(f"a commit holds 1 to {MAX_TXNS} transactions")
    count = 0
    for txn in txns:
        if type(txn) is not tuple or len(txn) != 3:
            raise InvalidArgument(f"a transaction is (keys, groups, effects), not {txn!r:.80}")
        _check_reads(txn[0], MAX_KEY)
        _check_reads(txn[1], GROUP_SIZE)
        if type(txn[2]) is not tuple or len(txn[2]) > MAX_EFFECTS:
            raise InvalidArgument(f"effects are no tuple of at most {MAX_EFFECTS}")
        count += len(txn[2])
    return count


def checks(args: tuple[Any, ...], *, system: bool) -> Iterator[None]:
    """Check the effects of what passed `check_commit`; yields after some `MANY` of them each time.

    `system` admits items of the system volume.  Raises `InvalidArgument`.
    """
    left = MANY
    for _, _, effects in args[4]:
        for at in range(0, len(effects), MANY):
            part = effects[at : at + MANY]
            validate(part, system=system)
            left -= len(part)
            if left <= 0:
                left = MANY
                yield


def made_commit(args: tuple[Any, ...]) -> tuple[Commit, int]:
    """The request and `have`, of arguments that passed the checks; or it is too large."""
    sid, no, base, have, txns, oldest, epoch = args
    request = Commit(sid, no, base, txns, oldest, epoch)
    if request.size > MAX_REQUEST:
        raise InvalidArgument(
            f"commit of {request.size} bytes is over the limit of {MAX_REQUEST}: split it"
        )
    return request, have


def check_open(mode: Any, nonce: Any, name: Any) -> None:
    """Check the arguments of `vol.open`; raises `InvalidArgument`."""
    if mode not in MODES:
        raise InvalidArgument(f'a session is opened "rw", "ro" or "rwx", not {mode!r:.20}')
    if type(nonce) is not bytes or len(nonce) != NONCE_SIZE:
        raise InvalidArgument(f"a nonce has {NONCE_SIZE} bytes")
    if type(name) is not str or len(name) > MAX_NAME:
        raise InvalidArgument(f"a session's name has up to {MAX_NAME} characters")


def _check_reads(names: Any, limit: int) -> None:
    if type(names) is not tuple or len(names) > MAX_READS:
        raise InvalidArgument(f"reads are no tuple of at most {MAX_READS} names")
    for name in names:
        if type(name) is not bytes or len(name) > limit:
            raise InvalidArgument(f"a transaction read no item of that name: {name!r:.80}")


def _size(txn: Txn) -> int:
    """Rough encoded size of a transaction's effects."""
    size = 0
    for effect in txn[2]:
        size += EFFECT_OVERHEAD + len(effect[1])
        if len(effect) > 2:
            operand = effect[2]
            size += len(operand) if type(operand) is bytes else EFFECT_OVERHEAD * len(operand)
    return size
