"""Open files handed to processes of the same host, so that they read without the server.

A server whose files never change under their readers (what is in them proves itself) listens at an
abstract unix socket beside its address.  A process of the same machine connects, asks for files by
number and is sent descriptors, opened for reading (SCM_RIGHTS); from then on it reads as fast as
the kernel can copy.  This is HDFS' "short-circuit local reads" (HDFS-347).

The connection stays open for two reasons.  When the server removes a file it says so, and the
client closes its descriptor at once: until then the space is not free.  When the server ends, the
client sees that and closes all of them.  A descriptor that is still held is no danger for anybody's
data: bytes are believed only when they match their digests.

One message is one packet (SOCK_SEQPACKET), a `dfs.codec` tuple, golden in tests/data:

    client    (1, number, token)    may I have this file?
    server    (1, number, True)     here it is: a descriptor, and perhaps a second one of the same
                                    file that reads past the kernel's cache (O_DIRECT)
              (1, number, False)    no; and unasked: it is removed, close it

The token is what `chunk.door` answers to whoever may use the server's other methods: an abstract
socket has no permissions of its own.  Whoever has it may read everything in those files.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from hmac import compare_digest
from pathlib import Path
from random import Random

import trio

from dfs.codec import pack, unpack
from dfs.errors import DfsError, NotFound, RemoteProtocolError, Unreachable

VERSION = 1
CLIENTS = 256  # connections a server has at once
PATIENCE = 2.0  # seconds a server may take to answer
_PACKET = 512
_BACKLOG = 64


def machine() -> bytes:
    """Which run of which kernel this is, the same for all processes of a host; b"" = unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


def encode(number: int, word: bytes | bool) -> bytes:
    """A message about file `number`: a token asks, a truth value answers."""
    return pack((VERSION, number, word))


def decode(packet: bytes) -> tuple[int, bytes | bool]:
    """`(number, token or answer)`; raises `RemoteProtocolError`."""
    value = unpack(packet)
    if not (
        isinstance(value, tuple)
        and len(value) >= 3
        and value[0] == VERSION
        and type(value[1]) is int
        and isinstance(value[2], bytes | bool)
    ):
        raise RemoteProtocolError(f"no message about descriptors of version {VERSION}: {value!r}")
    return value[1], value[2]


class DescriptorServer:
    """Hands out descriptors of numbered files."""

    def __init__(self, open_file: Callable[[int], list[int]], random: Random) -> None:
        """`open_file` returns one or two new read-only descriptors, see above.

        It raises `NotFound` for a removed file.
        """
        self._open_file = open_file
        self.token = random.randbytes(16)
        self.name = f"dfs/{random.randbytes(16).hex()}"
        self._clients: dict[socket.socket, set[int]] = {}
        self._given = 0

    def statistics(self) -> dict[str, int]:
        """Connections, and descriptors given so far."""
        return {"clients": len(self._clients), "descriptors": self._given}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.setblocking(False)
            listener.bind(f"\0{self.name}")
            listener.listen(_BACKLOG)
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        sock, _ = listener.accept()
                    except (BlockingIOError, ConnectionAbortedError):
                        continue
                    except OSError as e:
                        if e.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                            raise
                        await trio.sleep(0.2)
                        continue
                    if len(self._clients) >= CLIENTS:
                        sock.close()
                        continue
                    sock.setblocking(False)
                    self._clients[sock] = set()
                    nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(sock)
                packet = sock.recv(_PACKET)
                if not packet:
                    return
                number, token = decode(packet)
                if not (isinstance(token, bytes) and compare_digest(token, self.token)):
                    return
                await self._give(sock, number)
        except (OSError, DfsError):
            return  # one client that broke the rules or went away; it reads through the server
        finally:
            del self._clients[sock]
            sock.close()

    async def _give(self, sock: socket.socket, number: int) -> None:
        try:
            fds = self._open_file(number)
        except NotFound:
            await trio.lowlevel.wait_writable(sock)
            sock.send(encode(number, False))
            return
        numbers = self._clients[sock]
        numbers.add(number)
        try:
            while number in numbers:  # else it was removed meanwhile, and that was told
                try:
                    socket.send_fds(sock, [encode(number, True)], fds)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sock)
                else:
                    self._given += 1
                    return
        finally:
            for fd in fds:
                os.close(fd)

    def revoke(self, number: int) -> None:
        """The file is removed: have every client close it."""
        packet = encode(number, False)
        for sock, numbers in list(self._clients.items()):
            if number in numbers:
                numbers.discard(number)
                try:
                    sock.send(packet)
                except OSError:  # one that does not read: cut off, which closes all it has
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)


class Descriptor:
    """A file of another process; closed when it is revoked and nobody reads from it.

    `direct` is a descriptor opened with O_DIRECT, -1 if there is none.
    """

    __slots__ = ("_users", "direct", "fd", "revoked")

    def __init__(self, fd: int, direct: int = -1) -> None:
        """Own the descriptors."""
        self.fd = fd
        self.direct = direct
        self.revoked = False
        self._users = 0

    def acquire(self) -> None:
        """Keep both open until `release`; only while it is not revoked."""
        self._users += 1

    def release(self) -> None:
        """The end of one `acquire`."""
        self._users -= 1
        self._close()

    def revoke(self) -> None:
        """Nobody begins to read from it any more."""
        self.revoked = True
        self._close()

    def _close(self) -> None:
        if self.revoked and not self._users and self.fd >= 0:
            os.close(self.fd)
            if self.direct >= 0:
                os.close(self.direct)
            self.fd = self.direct = -1

    def __del__(self) -> None:
        """Give the descriptors back when nobody did."""
        self._users = 0
        self.revoke()


class DescriptorClient:
    """A connection to a `DescriptorServer` and what it gave."""

    def __init__(self, sock: socket.socket, token: bytes, limit: int) -> None:
        """Use `connect`."""
        self._sock = sock
        self._token = token
        self._limit = limit
        self._files: dict[int, Descriptor] = {}  # most recently asked for last
        self._asked: dict[int, trio.Event] = {}
        self.closed = False

    @classmethod
    async def connect(cls, name: str, token: bytes, *, limit: int = 128) -> "DescriptorClient":
        """Connect; `limit` descriptors are kept.  Raises `Unreachable`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(f"\0{name}")  # does not wait; a full backlog is a refusal
            await trio.lowlevel.checkpoint()
        except OSError as e:
            sock.close()
            raise Unreachable(f"cannot reach the socket {name}: {e.strerror or e}") from e
        except BaseException:
            sock.close()
            raise
        return cls(sock, token, limit)

    def __len__(self) -> int:
        """Descriptors that are held."""
        return len(self._files)

    async def run(self) -> None:
        """Receive until the server ends or we are cancelled, then close everything."""
        sock = self._sock
        try:
            while True:
                await trio.lowlevel.wait_readable(sock)
                packet, fds, _, _ = socket.recv_fds(sock, _PACKET, 2, socket.MSG_CMSG_CLOEXEC)
                file = Descriptor(*fds[:2]) if fds else None  # closes itself if nobody takes it
                if not packet:
                    return
                number, given = decode(packet)
                old = self._files.pop(number, None)
                if old is not None:
                    old.revoke()
                if given is True and file is not None:
                    self._files[number] = file
                    if len(self._files) > self._limit:
                        self._files.pop(next(iter(self._files))).revoke()
                asked = self._asked.pop(number, None)
                if asked is not None:
                    asked.set()
        except (OSError, DfsError):
            return
        finally:
            self.closed = True
            for file in self._files.values():
                file.revoke()
            self._files.clear()
            for asked in self._asked.values():
                asked.set()
            self._asked.clear()
            sock.close()

    async def get(self, number: int) -> Descriptor | None:
        """The file, asked for if it is not here; None when it cannot be had."""
        file = self._files.pop(number, None)
        if file is not None:
            self._files[number] = file
            return file
        asked = self._asked.get(number)
        if asked is None and not self.closed:
            try:
                self._sock.send(encode(number, self._token))
            except OSError:
                return None
            asked = self._asked[number] = trio.Event()
        if asked is not None:
            with trio.move_on_after(PATIENCE):
                await asked.wait()
        return self._files.get(number)

    def close(self) -> None:
        """End `run` soon."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
