"""The error tree of the whole product: one class per cause, one stable wire code per class.

Every class carries `code` (stable on the wire, never reused) and `errno` (what a POSIX caller
sees).  An error is mapped once at each border: to `(code, message, details)` on the wire, to an
errno in the FUSE adapter, to one readable line and an exit status in the CLI.  A message names the
thing, the cause and the next step.
"""

import errno as _errno
from collections.abc import Iterator
from typing import Any, ClassVar


class DfsError(Exception):
    """Something went wrong in dfs; the base of every error that crosses a border."""

    code: ClassVar[int] = 1
    errno: int = _errno.EIO

    def __init__(self, message: str = "", *details: Any) -> None:
        """Keep the message for people and `details` (msgpack-able) for programs."""
        super().__init__(message or (type(self).__doc__ or "").splitlines()[0])
        self.details = details


class NotFound(DfsError):
    """The named thing does not exist."""

    code = 2
    errno = _errno.ENOENT


class AlreadyExists(DfsError):
    """The named thing exists already."""

    code = 3
    errno = _errno.EEXIST


class InvalidArgument(DfsError):
    """The request itself is wrong; sending it again will not help."""

    code = 4
    errno = _errno.EINVAL


class Corrupt(DfsError):
    """Stored or received bytes do not match their checksum."""

    code = 10


class NoQuorum(DfsError):
    """Too few replicas answered in time; the message says which did."""

    code = 11


class DeadlineExceeded(DfsError):
    """The deadline of the request passed before an answer came; its outcome may be unknown."""

    code = 12


class Unreachable(DfsError):
    """The peer refuses connections or the connection broke; the outcome may be unknown."""

    code = 13


class StaleEpoch(DfsError):
    """The request carries an older map epoch than the partition's last change."""

    code = 14


class WrongCluster(DfsError):
    """The peer belongs to another cluster."""

    code = 15


class WrongVersion(DfsError):
    """The peer speaks another protocol version."""

    code = 16


class ProtocolError(DfsError):
    """A frame or message breaks the protocol; the connection is closed."""

    code = 17


class LocalProtocolError(ProtocolError):
    """We were about to break the protocol ourselves."""

    code = 18


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""

    code = 19


class Busy(DfsError):
    """The server refuses work for now; try again after a pause."""

    code = 20
    errno = _errno.EAGAIN


class DiskFull(DfsError):
    """The server's disk is full; delete data or add capacity."""

    code = 21
    errno = _errno.ENOSPC


class NotHome(DfsError):
    """This node is no home of the partition or volume; details: numbers of the nodes that are."""

    code = 22


class Fenced(DfsError):
    """The session or delegation is over; its un-committed work is dropped."""

    code = 23
    errno = _errno.ESTALE


class VolumeNotFound(NotFound):
    """No volume has this name; `dfs volume list` shows those that exist."""

    code = 24


class StoreFailed(DfsError):
    """A disk failed a write or sync; the store is quarantined until an operator looks."""

    code = 25


class UnknownMethod(DfsError):
    """The server does not know the method; it is older or newer than the caller."""

    code = 26
    errno = _errno.ENOSYS


class ConfigError(DfsError):
    """A configuration file, option or data directory is not usable as it is."""

    code = 27
    errno = _errno.EINVAL


# 31: `metadata.journalhandle.Trimmed`


class TooManySiblings(DfsError):
    """A key has too many concurrent values to take another: get it, then put with the context."""

    code = 32


class ForkedMap(DfsError):
    """Two different cluster maps have the same epoch; nothing is written until it is settled."""

    code = 33


class InUse(DfsError):
    """Another session has the volume in a way that excludes this one.

    Details: that session's id, and how many seconds ago it was last heard of (None: not known).
    """

    code = 34
    errno = _errno.EBUSY


class FsError(DfsError):
    """A POSIX error; `details[0]` is the errno."""

    code = 30

    def __init__(self, message: str, *details: Any) -> None:
        """Build from `(message, errno)`."""
        super().__init__(message, *details)
        self.errno = int(details[0]) if details else _errno.EIO


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a tree of exception groups, in order; of a single error, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def _tree(cls: type[DfsError]) -> dict[int, type[DfsError]]:
    # A class without a code of its own (local to some module) travels as its parent.
    found = {cls.code: cls} if "code" in vars(cls) else {}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


def to_wire(error: BaseException) -> tuple[int, str, tuple[Any, ...]]:
    """Encode an error for a reply; an unexpected exception becomes a plain `DfsError`.

    Of a group that is around a single error, as a nursery makes it, that error is encoded.
    """
    found = [*leaves(error)]
    if len(found) == 1:
        error = found[0]
    if isinstance(error, DfsError):
        return error.code, str(error), tuple(error.details)
    return DfsError.code, f"internal error: {type(error).__name__}: {error}", ()


def from_wire(code: int, message: str, details: tuple[Any, ...]) -> DfsError:
    """Rebuild an error from a reply; an unknown code becomes a plain `DfsError`."""
    return _tree(DfsError).get(code, DfsError)(message, *details)
