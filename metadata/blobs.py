"""Blobs of a metadata node: immutable bytes named by their BLAKE3, kept in the store.

Every hash is verified on the way in and on the way out.  A blob whose stored bytes do not match is
reported, removed, and answered as absent: the reader takes another replica and may put it again.
Puts of blobs that are held cost a look-up; they are acknowledged only when the held copy is
durable, like any other put.

A blob and its share of the digests (`metadata.merkle`) change in one batch.  The digests ask for
one writer at a time, so a lock is held until a batch is in the store's log, not until it is on the
disk.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from dfs.env import Buffer, Context, Handler, Reply
from dfs.errors import Corrupt, InvalidArgument
from dfs.hashing import DIGEST_SIZE, digest
from metadata.merkle import BLOBS, Digests, Op, partition_of_row
from metadata.store.engine import Store
from metadata.store.options import MAX_VALUE

PREFIX = b"b"  # of the keys in the store: PREFIX + hash
MAX_ERRORS = 100  # texts kept
BATCH = 1 << 20  # bytes checked or written to the store at once: others wait for a ms or two
REPLY = 48 << 20  # bytes of data in one answer


class Blobs:
    """Serves `blob.*` from a store; also the node's own way to its blobs."""

    def __init__(
        self,
        store: Store,
        digests: Digests | None = None,
        *,
        admit: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Keep blobs in `store` under `PREFIX`, and `digests` of them.

        `admit(bytes)` raises `DiskFull` when no new blobs of that size are taken from others.
        """
        self._store = store
        self._admit = admit
        self._digests = digests
        self._writing = trio.Lock()
        self._bad: dict[bytes, None] = {}  # answered as absent until removed or put again
        self.errors: list[str] = []
        self.corrupt = 0  # bad copies met so far
        self.puts = 0
        self.held = 0  # puts of blobs that were here already
        self.gets = 0

    def handlers(self) -> dict[str, Handler]:
        """For the node's dispatch table; see `dfs.wire.messages`."""
        return {"blob.put": self._put, "blob.get": self._get, "blob.has": self._has}

    # -- the node's own

    def get(self, blob_hash: bytes) -> bytes | None:
        """The verified blob, or None when it is absent or its copy here is bad."""
        self.gets += 1
        if blob_hash in self._bad:
            return None
        try:
            data = self._store.get(PREFIX + blob_hash)
        except Corrupt as e:
            self._report(f"blob {blob_hash.hex()[:16]}: {e}")
            return None
        if data is not None and digest(data) != blob_hash:
            self._bad[blob_hash] = None
            self._report(f"blob {blob_hash.hex()[:16]}: stored bytes do not match the hash")
            return None
        return data

    async def put(self, blobs: Sequence[bytes]) -> list[bytes]:
        """Store blobs durably; returns their hashes.  Raises `DiskFull`, `StoreFailed`."""
        hashes = [digest(b) for b in blobs]
        await self._store_all(list(zip(hashes, blobs, strict=True)))
        return hashes

    async def _store_all(self, blobs: Sequence[tuple[bytes, bytes]], *, ours: bool = True) -> None:
        missing: list[tuple[bytes, bytes | None]] = []
        size = 0
        for blob_hash, data in blobs:
            self.puts += 1
            if self.get(blob_hash) is not None:
                self.held += 1
                continue
            if not ours:
                self._admit(size + len(data))
            missing.append((blob_hash, data))
            size += len(data)
            if size >= BATCH:
                await self._write(missing)
                missing, size = [], 0
                await trio.lowlevel.checkpoint()
        if missing:
            await self._write(missing)
        await self._store.sync()  # the held ones may be on their way only

    async def merge(self, rows: Sequence[tuple[bytes, bytes]]) -> int:
        """Store rows (`PREFIX` + hash, blob) from a peer durably; returns how many were new.

        Raises `Corrupt` when one does not match its hash; none is stored then.
        """
        for row, data in rows:
            if row[:1] != PREFIX or digest(data) != row[1:]:
                raise Corrupt(f"blob {row[1:9].hex()} arrived with other bytes")
        held = self.held
        await self._store_all([(row[1:], data) for row, data in rows])
        return len(rows) - (self.held - held)

    async def _write(self, blobs: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Put blobs, or remove them (None), and return when reads see it."""
        async with self._writing:
            await self._write_now(blobs)

    async def _write_now(self, blobs: Sequence[tuple[bytes, bytes | None]]) -> None:
        ops: list[Op] = [(PREFIX + blob_hash, data) for blob_hash, data in blobs]
        ops += self._digest_ops(ops)
        await self._batch(ops)
        for blob_hash, _ in blobs:
            self._bad.pop(blob_hash, None)

    def _digest_ops(self, ops: Sequence[Op]) -> list[Op]:
        if self._digests is None:
            return []
        changes = {}
        for row, data in ops:  # a bad copy that is replaced was counted under its name already
            had = self._holds(row)
            changes[row] = (BLOBS, partition_of_row(BLOBS, row), row, b"" if had else None, data)
        return self._digests.ops(list(changes.values()))

    def _holds(self, row: bytes) -> bool:
        """Whether there is a row, good or bad; a lost one was counted, too."""
        try:
            return self._store.get(row) is not None
        except Corrupt:
            return True

    async def _batch(self, ops: list[Op]) -> None:
        try:
            await self._store.batch(ops, sync=False)
        except BaseException:
            if self._digests is not None:
                self._digests.reload(ops)
            raise

    async def change_digests(self, make: Callable[[], list[Op]]) -> None:
        """Make and store operations on the digests of blobs, in turn with their writes; durable."""
        async with self._writing:
            await self._batch(make())
        await self._store.sync()

    async def discard(self, hashes: Sequence[bytes], allowed: Callable[[], bool]) -> int:
        """Remove blobs of partitions that are others' now; returns how many.

        `allowed` is asked in turn with the writes: blobs that somebody puts later stay.
        """
        async with self._writing:
            if not allowed():
                return 0
            found = [h for h in hashes if self._holds(PREFIX + h)]
            await self._write_now([(h, None) for h in found])
        return len(found)

    async def remove_bad(self) -> int:
        """Remove the bad copies met so far from the store; returns how many."""
        bad = list(self._bad)
        if bad:
            await self._write([(h, None) for h in bad])
            await self._store.sync()
        return len(bad)

    def _report(self, text: str) -> None:
        self.corrupt += 1
        if text not in self.errors:
            del self.errors[: len(self.errors) - MAX_ERRORS + 1]
            self.errors.append(text)

    # -- handlers

    async def _put(self, _ctx: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
        (wanted,) = args
        blobs = []
        at = pause = 0
        for blob_hash, length in wanted:
            _check_hash(blob_hash)
            if at - pause >= BATCH:
                pause = at
                await trio.lowlevel.checkpoint()
            if type(length) is not int or not 0 <= length <= min(MAX_VALUE, len(data) - at):
                raise InvalidArgument(f"blob {blob_hash.hex()[:16]} of {length!r} bytes at {at}")
            blob = bytes(data[at : at + length])
            at += length
            if digest(blob) != blob_hash:
                raise Corrupt(f"blob {blob_hash.hex()[:16]} arrived with other bytes; send again")
            blobs.append((blob_hash, blob))
        if at != len(data):
            raise InvalidArgument(f"{len(data) - at} bytes of data belong to no blob")
        await self._store_all(blobs, ours=False)
        return (len(blobs),), b""

    def _get(
        self, _ctx: Context, args: tuple[Any, ...], _data: memoryview
    ) -> Reply | Awaitable[Reply]:
        (hashes,) = args
        lengths = []
        found: list[Buffer] = []
        room = REPLY
        for blob_hash in hashes:
            _check_hash(blob_hash)
            blob = self.get(blob_hash)
            if blob is None:
                lengths.append(-1)
                continue
            room -= len(blob)
            if room < 0:  # -1 would say "absent"
                raise InvalidArgument(f"the blobs asked for exceed {REPLY} bytes; ask for fewer")
            lengths.append(len(blob))
            found.append(blob)
        reply = (tuple(lengths),), found
        return self._remove_and_reply(reply) if self._bad else reply

    async def _remove_and_reply(self, reply: Reply) -> Reply:
        await self.remove_bad()
        return reply

    async def _has(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        (hashes,) = args
        for blob_hash in hashes:
            _check_hash(blob_hash)
        answer = tuple(self.get(h) is not None for h in hashes)
        await self._store.sync()  # True promises durability
        return (answer,), b""


def _check_hash(blob_hash: Any) -> None:
    if type(blob_hash) is not bytes or len(blob_hash) != DIGEST_SIZE:
        raise InvalidArgument(f"not a blob hash: {blob_hash!r:.80}")
