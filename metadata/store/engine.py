"""The store: an ordered map of bytes to bytes on one disk, durable and checked.

A log-structured merge tree (O'Neil et al. 1996).  `batch` is the only mutation: it appends one log
record, applies it to the memtable and waits for the group commit.  Reads are synchronous and never
wait for a write: they see a batch from the moment it is logged, which may be shortly before it is
durable; who must not act on what a power loss could undo awaits `sync` first.

Concurrency: everything runs on one loop; between awaits there is mutual exclusion.  In `batch` no
await may come between the log append and the memtable: their order must be the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import trio

from dfs.env import Env
from dfs.errors import InvalidArgument
from metadata.store import recovery
from metadata.store.maintenance import Maintenance
from metadata.store.memtable import OVERHEAD, Memtable
from metadata.store.options import MAX_BATCH, MAX_KEY, MAX_VALUE, StoreOptions
from metadata.store.reader import Reader
from metadata.store.state import State
from metadata.store.wal import pack_batch

Op = tuple[bytes, bytes | None]  # None: delete
SCAN_LIMIT = 1000
DEFAULTS = StoreOptions()


class Snapshot:
    """The state of a store at one moment; holds memory and disk space until it is dropped."""

    __slots__ = ("_reader",)

    def __init__(self, reader: Reader) -> None:
        """Made by `Store.snapshot`."""
        self._reader = reader

    def get(self, key: bytes) -> bytes | None:
        """See `Store.get`."""
        return self._reader.get(key)

    def scan(
        self, prefix: bytes, after: bytes = b"", limit: int = SCAN_LIMIT
    ) -> list[tuple[bytes, bytes]]:
        """See `Store.scan`."""
        return _scan(self._reader, prefix, after, limit)


class Store:
    """An open store; made by `Store.open`."""

    def __init__(self, state: State, tail_cut: int) -> None:
        """Use `Store.open`."""
        self._state = state
        self._maintenance = Maintenance(state)
        self._rotating = trio.Lock()
        self._tail_cut = tail_cut
        self._user_bytes = 0
        self._puts = 0

    @classmethod
    async def open(cls, env: Env, prefix: str = "lsm", options: StoreOptions = DEFAULTS) -> Self:
        """Open or create the store in directory `prefix` of the disk.

        Raises `Corrupt` when acknowledged data is damaged beyond what can be named key by key.
        """
        loaded = await env.disk.run(recovery.load, env.disk, prefix, options)
        state = State(env, prefix, options, loaded)
        state.memtable.segments.append(await state.log.rotate())
        return cls(state, loaded.cut)

    async def run(self) -> None:
        """Flush and merge in the background until cancelled; raises `StoreFailed`."""
        await self._maintenance.run()

    def close(self) -> None:
        """Refuse further writes; nothing is lost, what is in memory is also in the log."""
        self._state.log.close()

    # -- writes

    async def batch(self, ops: Sequence[Op], *, sync: bool = True) -> None:
        """Apply puts and deletes atomically; with `sync` they are durable on return.

        Later operations of a batch win over earlier ones.  Raises `InvalidArgument`, `DiskFull`
        (nothing was applied), or `StoreFailed` (whether it is durable is unknown; the store takes
        no more writes).  A cancelled batch may have been applied.
        """
        size = 0
        for key, value in ops:
            if type(key) is not bytes or not 0 < len(key) <= MAX_KEY:
                raise InvalidArgument(f"a key must be 1 to {MAX_KEY} bytes, not {key!r:.60}")
            size += len(key)
            if value is not None:
                if type(value) is not bytes or len(value) > MAX_VALUE:
                    raise InvalidArgument(f"value of {key[:40]!r}: not bytes, or over {MAX_VALUE}")
                size += len(value)
        if size + OVERHEAD * len(ops) > MAX_BATCH:
            raise InvalidArgument(f"a batch of {size} bytes is over the limit of {MAX_BATCH}")
        state = self._state
        if state.memtable.bytes >= state.options.memtable_bytes:
            await self._make_room()
        if ops:
            state.log.append(pack_batch(ops))
            state.memtable.apply(ops)
            self._user_bytes += size
            self._puts += len(ops)
        if sync:
            await state.log.sync()

    async def sync(self) -> None:
        """Return when everything that reads see is durable; free when it is already."""
        await self._state.log.sync()

    async def _make_room(self) -> None:
        s = self._state
        async with self._rotating:
            while s.memtable.bytes >= s.options.memtable_bytes:
                if len(s.frozen) >= s.options.max_frozen:
                    await self._maintenance.flush_oldest()
                elif s.options.background and len(s.runs) >= s.options.max_runs:
                    await self._maintenance.step()
                else:
                    await self._freeze()

    async def _freeze(self) -> None:
        s = self._state
        number = await s.log.rotate()  # switches segments just before it returns: no await between
        s.memtable.end = s.log.written
        s.frozen.insert(0, s.memtable)
        s.memtable = Memtable([number])
        s.refresh()

    async def flush(self) -> None:
        """Put everything that is in memory into tables."""
        async with self._rotating:
            if self._state.memtable.data:
                await self._freeze()
        while await self._maintenance.flush_oldest():
            pass

    async def compact(self) -> None:
        """Flush, salvage what is damaged, and merge everything into one run."""
        await self.flush()
        await self._maintenance.merge_all()

    async def verify(self) -> list[str]:
        """Read every table completely; returns what is wrong, which is then quarantined."""
        return await self._maintenance.verify()

    # -- reads

    def get(self, key: bytes) -> bytes | None:
        """The value, None if absent; raises `Corrupt` when damage hides it."""
        return self._state.reader.get(key)

    def get_many(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """The values in the order of the keys; see `get`."""
        get = self._state.reader.get
        return [get(key) for key in keys]

    def scan(
        self, prefix: bytes, after: bytes = b"", limit: int = SCAN_LIMIT
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` items whose keys start with `prefix` and are greater than key `after`.

        Raises `Corrupt` when damage hides any of the range.
        """
        return _scan(self._state.reader, prefix, after, limit)

    def snapshot(self) -> Snapshot:
        """A consistent view of now; costs a copy of the memtable's dict."""
        return Snapshot(self._state.snapshot())

    # -- what operators see

    @property
    def quarantined(self) -> list[str]:
        """Names of damaged tables; their intact part stays in use, the original is `NAME.bad`."""
        return list(self._state.quarantined)

    @property
    def errors(self) -> list[str]:
        """What went wrong since the store was opened."""
        return list(self._state.errors)

    def accept_losses(self) -> int:
        """Let lost keys read as absent or older from now on; returns how many ranges that frees.

        For operators, after the data was restored from replicas or given up.  Lasting with the
        next flush or merge.
        """
        count = 0
        for run in self._state.runs:
            count += len(run.lost)
            run.lost = ()
        return count

    def statistics(self) -> dict[str, Any]:
        """Sizes in bytes and counts since the store was opened."""
        s = self._state
        tables = [t for r in s.runs for t in r.tables]
        stored = sum(t.meta.size for t in tables)
        cache = s.cache.statistics()
        return {
            "bytes": stored,
            "plain_bytes": sum(t.meta.plain for t in tables),
            "entries": sum(t.meta.entries for t in tables),
            "tombstones": sum(t.meta.tombstones for t in tables),
            "tables": len(tables),
            "runs": len(s.runs),
            "levels": 1 + max((r.level for r in s.runs), default=-1),
            "memtable_bytes": s.memtable.bytes + sum(m.bytes for m in s.frozen),
            "frozen": len(s.frozen),
            "index_bytes": s.indexes.bytes,
            "cache_bytes": cache["bytes"],
            "cache_hits": cache["hits"],
            "cache_misses": cache["misses"],
            "filtered": sum(t.filtered for t in tables),
            "searched": sum(t.searched for t in tables),
            "puts": self._puts,
            "user_bytes": self._user_bytes,
            "flushes": self._maintenance.flushes,
            "merges": self._maintenance.merges,
            "write_amplification": (self._user_bytes + s.table_bytes_written)
            / max(1, self._user_bytes),
            "syncs": s.log.statistics()["syncs"],
            "sync_calls": s.log.statistics()["calls"],
            "tail_cut": self._tail_cut,
            "lost_ranges": sum(len(r.lost) for r in s.runs),
            "quarantined": len(s.quarantined),
        }


def _scan(reader: Reader, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
    start = max(prefix, after + b"\0") if after else prefix
    return reader.scan(start, prefix_end(prefix), limit)


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with the prefix; empty if there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b""
