"""An in-memory cluster for tests of the client: one sequential home, dict blobs, dict chunks.

`FakeHome` implements the `vol.*` and `jrnl.genesis` methods with a plain list as the journal and
optimistic concurrency judged one request at a time.  Every client gets its own `FakeRpc`, whose
knobs make calls slow, unreachable, or executed without an answer; arguments and results go through
`dfs.codec`, so that only what fits on the wire passes.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any
from weakref import WeakValueDictionary

import trio

from dfs import ids
from dfs.client.connect import Cluster
from dfs.client.store import Prepared
from dfs.clock import Clock, SystemClock
from dfs.codec import pack, unpack
from dfs.env import Buffer, Buffers, Priority
from dfs.errors import (
    DeadlineExceeded,
    DfsError,
    DiskFull,
    Fenced,
    NotFound,
    UnknownMethod,
    Unreachable,
)
from dfs.hashing import digest
from dfs.volume import effects as fx
from dfs.volume import entries, tree
from dfs.volume.validation import validate
from dfs.volume.window import Window

HOMES = (1, 2, 3)


class FakeMap:
    """The few questions that a client asks of a `ClusterMap`."""

    epoch = 1
    nodes: tuple[Any, ...] = ()

    def volume_homes(self, volume: bytes) -> tuple[int, ...]:
        """The same three nodes for every volume."""
        return HOMES

    def old_homes(self, role: str, partition: int) -> tuple[int, ...]:
        """Nothing moves."""
        return ()

    def address(self, role: str, number: int) -> str:
        """Address of a node."""
        return f"fake:{role}:{number}"


class FakeBlobs:
    """A `BlobClient` on a dict."""

    def __init__(self) -> None:
        """No blobs."""
        self.stored: dict[bytes, bytes] = {}
        self.gets = 0

    async def put_many(self, blobs: Sequence[bytes], *, timeout: float = 10) -> list[bytes]:
        """Store; returns the ids."""
        await trio.lowlevel.checkpoint()
        self.stored.update((digest(b), b) for b in blobs)
        return [digest(b) for b in blobs]

    async def get_many(self, hashes: Iterable[bytes], *, timeout: float = 10) -> dict[bytes, bytes]:
        """Blobs by id; raises `NotFound`."""
        await trio.lowlevel.checkpoint()
        self.gets += 1
        wanted = list(hashes)
        absent = [h.hex() for h in wanted if h not in self.stored]
        if absent:
            raise NotFound(f"blobs {absent}")
        return {h: self.stored[h] for h in wanted}


class _Volume:
    def __init__(self, params: dict[str, Any], genesis: bytes, *, system: bool) -> None:
        self.params = params
        self.system = system
        self.log: list[bytes] = [genesis]  # entry of seq n at index n - 1
        self.covered = 0
        self.root = b""
        self.sessions: dict[int, list[Any]] = {}  # sid -> [no, answer, mode, nonce]
        self.window = Window(0, 1 << 40)
        self.news = trio.Event()

    @property
    def seq(self) -> int:
        return len(self.log)

    def append(self, kind: int, *body: Any) -> int:
        self.log.append(entries.encode(kind, 1_000_000_000 + self.seq, *body))
        self.news.set()
        self.news = trio.Event()
        return self.seq

    def after(self, seq: int) -> tuple[tuple[int, bytes], ...]:
        return tuple((i + 1, self.log[i]) for i in range(seq, self.seq))


class FakeHome:
    """The homes of all volumes, agreeing by being one object."""

    def __init__(self, *, latency: float = 0.0005) -> None:
        """`latency`: seconds that each request takes on the virtual clock."""
        self.latency = latency
        self.volumes: dict[bytes, _Volume] = {}
        self.blobs = FakeBlobs()
        self.chunks = FakeChunkStore()
        self.calls: dict[str, int] = {}
        self.map = FakeMap()
        self._sids = 0

    def create(self, volume: bytes, params: dict[str, Any]) -> None:
        """Make an empty volume, as `jrnl.genesis` does."""
        self.genesis(volume, entries.encode(entries.GENESIS, 1, params, 1, HOMES))

    def genesis(self, volume: bytes, entry: bytes) -> int:
        """`jrnl.genesis`: idempotent."""
        if volume not in self.volumes:
            self.volumes[volume] = _Volume(
                entries.decode(entry).body[0], entry, system=volume == ids.SYSTEM_VOLUME
            )
        return 1

    def client(self, *, seed: int = 0, clock: Clock | None = None, name: str = "client") -> Cluster:
        """A `Cluster` as `connect` gives; its `rpc` is a `FakeRpc` with knobs."""
        rpc = FakeRpc(self, name)
        get_map: Callable[[], Any] = lambda: self.map  # noqa: E731 - needs the type
        return Cluster(rpc, get_map, self.blobs, clock or SystemClock(), Random(seed))

    def chunk_client(self) -> "FakeChunks":
        """What stands for `dfs.client.chunkio.ChunkClient`."""
        return FakeChunks(self.chunks)

    def checkpoint(self, volume: bytes, upto: int | None = None) -> None:
        """Fold the journal up to `upto` into a tree and record that in the journal."""
        v = self.volumes[volume]
        upto = v.seq if upto is None else upto
        state = _Folding(self.blobs.stored, v.root)
        for data in v.log[v.covered : upto]:
            fx.apply(state, fx.of_entry(entries.decode(data)))
        salt = v.params["salt"]
        v.root, nodes = tree.apply(state.node, v.root, sorted(state.edits.items()), salt)
        self.blobs.stored.update(nodes)
        v.covered = upto
        sessions = tuple((sid, s[2], s[3], "", 0, 0, ()) for sid, s in v.sessions.items())
        v.append(entries.CHECKPOINT, upto, v.root, (1, v.params, sessions, 0, 0, 0))
        v.window.forget(upto)

    def fence(self, volume: bytes, sid: int) -> None:
        """End a session from the home's side."""
        v = self.volumes[volume]
        if v.sessions.pop(sid, None) is not None:
            v.append(entries.CLOSE, (sid,))

    async def handle(self, method: str, args: tuple[Any, ...]) -> Any:
        """Serve one request."""
        self.calls[method] = self.calls.get(method, 0) + 1
        if method == "jrnl.genesis":
            return (self.genesis(*args),)
        handler = getattr(self, "_" + method.replace("vol.", ""), None)
        if not method.startswith("vol.") or handler is None:
            raise UnknownMethod(method)
        volume = self.volumes.get(args[0])
        if volume is None:
            raise NotFound(f"no journal of volume {args[0].hex()} here")
        return await handler(volume, *args[1:])

    async def _open(self, v: _Volume, mode: str, nonce: bytes, name: str) -> Any:
        sid = next((sid for sid, s in v.sessions.items() if s[3] == nonce), 0)
        if not sid:
            self._sids += 1
            sid = ids.session_id(1, self._sids)
            v.sessions[sid] = [0, None, mode, nonce]
            v.append(entries.SESSION, sid, mode, nonce, name)
        return sid, v.seq, v.covered, v.root, v.after(v.covered), 1, v.params

    async def _commit(
        self, v: _Volume, sid: int, no: int, base: int, have: int, txns: Any, oldest: int
    ) -> Any:
        session = v.sessions.get(sid)
        if session is None:
            raise Fenced(f"session {sid:x} is over")
        if no != session[0]:
            verdicts = []
            accepted: list[Any] = []
            own = Window(0)
            for keys, groups, effects in txns:
                validate(effects, system=v.system)
                ok = not v.window.changed_since(base, keys, groups)
                ok = ok and not own.changed_since(0, keys, groups)
                if ok:
                    own.record(1, effects)
                    accepted += effects
                verdicts.append(ok)
            if accepted:
                part = (sid, no, tuple(verdicts), tuple(accepted))
                v.window.record(v.seq + 1, accepted)
                v.append(entries.DATA, (part,))
                session[0] = no
            session[1] = (v.seq, tuple(verdicts))
        seq, verdicts = session[1]
        return no, seq, verdicts, tuple(e for e in v.after(have) if e[0] <= seq), 1

    async def _watch(self, v: _Volume, sid: int, have: int, wait: float) -> Any:
        if sid not in v.sessions:
            raise Fenced(f"session {sid:x} is over")
        if v.seq <= have and wait > 0:
            with trio.move_on_after(wait):
                await v.news.wait()
        reset = None
        if have < v.covered:
            reset = (v.covered, v.root)
            have = v.covered
        return v.seq, v.after(have), reset, 1

    async def _sync(self, v: _Volume) -> Any:
        return v.seq, 1

    async def _close(self, v: _Volume, sid: int) -> Any:
        if v.sessions.pop(sid, None) is not None:
            v.append(entries.CLOSE, (sid,))
        return ()


class _Folding:
    """Target of effects for a checkpoint: edits on top of a tree."""

    def __init__(self, blobs: dict[bytes, bytes], root: bytes) -> None:
        self.blobs = blobs
        self.root = root
        self.edits: dict[bytes, bytes | None] = {}

    def node(self, name: bytes) -> tree.Node:
        return tree.decode(self.blobs[name])

    def get(self, key: bytes) -> bytes | None:
        if key in self.edits:
            return self.edits[key]
        return tree.get(self.node, self.root, key)

    def put(self, key: bytes, value: bytes | None) -> None:
        self.edits[key] = value

    def delete_range(self, start: bytes, end: bytes) -> None:
        for key in [k for k in self.edits if start <= k < end]:
            self.edits[key] = None
        for key, _ in tree.scan(self.node, self.root, start, end):
            self.edits[key] = None


class FakeRpc:
    """A client's way to the fake homes; one per client.

    `delay` seconds are added to every call.  `down` holds the numbers of homes that do not answer.
    `lose_request`, `lose_answer`: probabilities; a lost answer means that the request was executed.
    """

    def __init__(self, home: FakeHome, name: str, random: Random | None = None) -> None:
        """A perfect network until a knob is turned."""
        self.home = home
        self.name = name
        self.random = random or Random(name)
        self.delay = 0.0
        self.down: set[int] = set()
        self.lose_request = 0.0
        self.lose_answer = 0.0

    async def call(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        timeout: float,
        priority: int = Priority.NORMAL,
        epoch: int = 0,
    ) -> tuple[Any, Buffer]:
        """See `dfs.env.Rpc.call`."""
        with trio.move_on_after(timeout):
            await trio.sleep(self.home.latency + self.delay)
            self._maybe_break(to, self.lose_request)
            result = unpack(pack(await self.home.handle(method, unpack(pack(args)))))
            self._maybe_break(to, self.lose_answer)
            return result, b""
        raise DeadlineExceeded(f"{to} did not answer {method} within {timeout} s")

    def _maybe_break(self, to: str, probability: float) -> None:
        if int(to.rsplit(":", 1)[1]) in self.down or self.random.random() < probability:
            raise Unreachable(f"{to} is down")

    def request(self, *_args: Any, **_kw: Any) -> None:
        """Not used by clients' sessions."""
        raise NotImplementedError

    def cast(self, *_args: Any, **_kw: Any) -> None:
        """Not used by clients' sessions."""
        raise NotImplementedError


class FakeChunkStore:
    """All chunks of the fake cluster, with knobs to make it fail."""

    def __init__(self) -> None:
        """No chunks."""
        self.stored: dict[bytes, bytes] = {}
        self.durable: set[bytes] = set()
        self.full = False
        self.broken = False
        self.delay = 0.001
        self.reads = 0
        self.puts = 0


class FakeChunks:
    """Stands for `dfs.client.chunkio.ChunkClient`: same methods, on a dict."""

    def __init__(self, store: FakeChunkStore) -> None:
        """One client of the store."""
        self.store = store
        self._mine: set[bytes] = set()
        self._prepared: WeakValueDictionary[bytes, Prepared] = WeakValueDictionary()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing to do in the background."""
        task_status.started()
        await trio.sleep_forever()

    def _check(self, *, writing: bool) -> None:
        if self.store.broken:
            raise Unreachable("chunkservers are down")
        if writing and self.store.full:
            raise DiskFull("chunkservers are full")

    async def put(self, data: Buffer | Sequence[Buffer], *, durable: bool = False) -> bytes:
        """Store a chunk; returns its id."""
        prepared = await self.prepare(data)
        await self.put_prepared(prepared, durable=durable)
        return prepared.chunk_id

    async def prepare(self, data: Buffer | Sequence[Buffer]) -> Prepared:
        """Name a chunk; it can be read by this client until its put has ended."""
        parts = [data] if isinstance(data, (bytes, bytearray, memoryview)) else data
        plain = b"".join(parts)
        if not 0 < len(plain) <= 4 << 20:
            raise DfsError(f"chunk of {len(plain)} bytes")
        prepared = Prepared(digest(plain), [plain], [plain])
        self._prepared[prepared.chunk_id] = prepared
        return prepared

    async def put_prepared(self, prepared: Prepared, *, durable: bool = False) -> None:
        """Store a prepared chunk."""
        await trio.sleep(self.store.delay)
        self._check(writing=True)
        chunk_id = prepared.chunk_id
        self.store.stored[chunk_id] = bytes(prepared.read(0, prepared.length))
        self.store.puts += 1
        self._mine.add(chunk_id)
        self._prepared.pop(chunk_id, None)
        if durable:
            self.store.durable.add(chunk_id)

    async def sync(self) -> int:
        """Make what this client put durable."""
        await trio.sleep(self.store.delay)
        self._check(writing=True)
        self.store.durable |= self._mine
        self._mine.clear()
        return 0

    async def touch(self, chunk_ids: Iterable[bytes]) -> list[bool]:
        """Whether each chunk is held durably."""
        await trio.sleep(self.store.delay)
        return [c in self.store.durable for c in chunk_ids]

    async def read(self, chunk_id: bytes, offset: int, length: int) -> bytes:
        """A range of a chunk; raises `NotFound`."""
        prepared = self._prepared.get(chunk_id)
        if prepared is not None:
            return bytes(prepared.read(offset, length))
        await trio.sleep(self.store.delay)
        self._check(writing=False)
        self.store.reads += 1
        plain = self.store.stored.get(chunk_id)
        if plain is None:
            raise NotFound(f"chunk {chunk_id.hex()}")
        return plain[offset : offset + length]
