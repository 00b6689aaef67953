"""An in-memory cluster for tests of the client: one sequential home, dict blobs, dict chunks.

`FakeHome` implements the `vol.*` and `jrnl.genesis` methods with a plain list as the journal and
optimistic concurrency judged one request at a time.  It delegates volumes when it is told to
(`FakeHome.delegates`), recalls the delegation when another session asks for anything, and revokes
it when it is told to (`revoke`) or `revoke_after` seconds after the recall.  Every client gets its
own `FakeRpc`, whose knobs make calls slow, unreachable, or executed without an answer; arguments
and results go through `dfs.codec`, so that only what fits on the wire passes.

It is longer than most modules because it stands for a whole cluster, whose parts know each other.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import trio

from dfs import ids
from dfs.client.connect import Cluster
from dfs.client.store import Prepared
from dfs.clock import Clock, SystemClock
from dfs.codec import pack, unpack
from dfs.env import Buffer, Buffers, Priority
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    Fenced,
    InUse,
    InvalidArgument,
    NotFound,
    UnknownMethod,
    Unreachable,
)
from dfs.hashing import digest
from dfs.testing.fakevolume import FakeVolume, chunks_named
from dfs.volume import effects as fx
from dfs.volume import entries, tree
from dfs.volume.validation import validate
from dfs.volume.window import Window

HOMES = (1, 2, 3)
ON_THE_WAY = 60 * 10**9  # ns that a commit may be old when it arrives
RECALL_WAIT = 0.5  # seconds that a request waits for the return of a delegation


class FakeNode(NamedTuple):
    """What a client asks of a `Node`."""

    number: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"node{self.number}"


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

    def node(self, number: int) -> FakeNode:
        """A node."""
        return FakeNode(number)

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


class FakeHome:
    """The homes of all volumes, agreeing by being one object.

    `delegates`: whether `vol.delegate` grants at once to a session that is the volume's only one;
    otherwise the answer is to ask again in `delegate_wait` seconds.  `revoke_after`: seconds after
    which a request that waits for the return of a delegation makes the home revoke it.  `full`: the
    homes on whose disks not a byte is left; no entry is written while they are a majority.
    """

    delegates = False
    delegate_wait = 1.0
    revoke_after = float("inf")
    heard_ago: float | None = 0.0  # seconds; what is said of sessions that keep another one out

    def __init__(self, *, latency: float = 0.0005) -> None:
        """`latency`: seconds that each request takes on the virtual clock."""
        self.latency = latency
        self.volumes: dict[bytes, FakeVolume] = {}
        self.blobs = FakeBlobs()
        self.chunks = FakeChunkStore()
        self.calls: dict[str, int] = {}
        self.full: set[int] = set()
        self.map = FakeMap()
        self._sids = 0

    def create(self, volume: bytes, params: dict[str, Any]) -> None:
        """Make an empty volume, as `jrnl.genesis` does."""
        self.genesis(volume, entries.encode(entries.GENESIS, 1, params, 1, HOMES))

    def genesis(self, volume: bytes, entry: bytes) -> int:
        """`jrnl.genesis`: idempotent."""
        if volume not in self.volumes:
            self.volumes[volume] = FakeVolume(
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
        control = (1, v.params, sessions, v.epoch, v.holder, 0)
        v.append(entries.CHECKPOINT, upto, v.root, control)
        v.window.forget(upto)

    def fence(self, volume: bytes, sid: int) -> None:
        """End a session from the home's side."""
        self.volumes[volume].close(sid)

    def recall(self, volume: bytes) -> None:
        """Want the delegation back, as if another session had asked for something."""
        self.volumes[volume].want()

    def revoke(self, volume: bytes) -> None:
        """Take the delegation away and end its holder's session."""
        v = self.volumes[volume]
        if v.holder:
            v.sessions.pop(v.holder)
            v.delegate(0, v.holder)

    def status(self, number: int) -> tuple[dict[str, Any]]:
        """`node.status` of a node."""
        self.calls["node.status"] = self.calls.get("node.status", 0) + 1
        return ({"journals_full": number in self.full, "disk_path": f"/disk{number}"},)

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

    async def _admit(self, v: FakeVolume, sid: int) -> None:
        """Wait until no other session has the delegation."""
        give_up = trio.current_time() + RECALL_WAIT
        while v.holder not in (0, sid):
            v.want()
            now = trio.current_time()
            if v.wanted_at is not None and now >= v.wanted_at + self.revoke_after:
                v.sessions.pop(v.holder)
                v.delegate(0, v.holder)
            elif now >= give_up:
                raise Busy(f"session {v.holder:x} has the delegation of the volume: ask again")
            else:
                with trio.move_on_after(min(give_up - now, self.revoke_after)):
                    await v.news.wait()

    def _check_disks(self) -> None:
        """An entry is about to be written."""
        if len(self.full) > len(HOMES) // 2:
            raise DiskFull(f"the disks of nodes {sorted(self.full)} are full")

    async def _open(self, v: FakeVolume, mode: str, nonce: bytes, name: str) -> Any:
        for rival, session in v.sessions.items() if not v.opened(nonce) and mode != "ro" else ():
            if session[2] != "ro" and "rwx" in (mode, session[2]):
                raise InUse(f"session {rival:x} has the volume", rival, self.heard_ago)
        await self._admit(v, v.opened(nonce))
        sid = v.opened(nonce)
        if not sid:
            self._check_disks()
            self._sids += 1
            sid = ids.session_id(1, self._sids)
            v.sessions[sid] = [0, None, mode, nonce]
            v.append(entries.SESSION, sid, mode, nonce, name)
        return sid, v.seq, v.covered, v.root, v.after(v.covered), 1, v.params

    async def _delegate(self, v: FakeVolume, sid: int) -> Any:
        session = v.sessions.get(sid)
        if session is None:
            raise Fenced(f"session {sid:x} is over")
        if session[2] == "ro":
            raise InvalidArgument(f"session {sid:x} is read-only")
        if v.holder == sid:
            return v.epoch, v.seq, 0.0, 1
        if v.holder or not self.delegates or len(v.sessions) > 1:
            return 0, 0, self.delegate_wait, 1
        self._check_disks()
        seq = v.delegate(sid)
        return v.epoch, seq, 0.0, 1

    async def _return(self, v: FakeVolume, sid: int, epoch: int) -> Any:
        if (v.holder, v.epoch) == (sid, epoch):
            self._check_disks()
            v.delegate(0)
        return v.seq, 1

    async def _commit(
        self,
        v: FakeVolume,
        sid: int,
        no: int,
        base: int,
        have: int,
        txns: Any,
        oldest: int,
        epoch: int = 0,
    ) -> Any:
        if sid in v.sessions:
            old = epoch and (epoch, sid) != (v.epoch, v.holder)
            if old and no != v.sessions[sid][0]:
                raise Fenced(f"the delegation of epoch {epoch} is over: {v.epoch} is the present")
            await self._admit(v, sid)
        session = v.sessions.get(sid)
        if session is None:
            raise Fenced(f"session {sid:x} is over")
        if no != session[0]:
            verdicts = []
            accepted: list[Any] = []
            own = Window(0)
            for keys, groups, effects in txns:
                validate(effects, system=v.system)
                ok = bool(epoch) or not (
                    v.window.changed_since(base, keys, groups) or own.changed_since(0, keys, groups)
                )
                if ok:
                    own.record(1, effects)
                    accepted += effects
                verdicts.append(ok)
            if accepted:
                self._check_disks()
                self._check_chunks(v, chunks_named(accepted), oldest)
                part = (sid, no, tuple(verdicts), tuple(accepted))
                v.window.record(v.seq + 1, accepted)
                v.append(entries.DATA, (part,))
                session[0] = no
            session[1] = (v.seq, tuple(verdicts))
        seq, verdicts = session[1]
        news = tuple(e for e in v.after(have) if e[0] <= seq)
        return no, seq, verdicts, news, 1, v.delegation

    def _check_chunks(self, v: FakeVolume, named: set[bytes], oldest: int) -> None:
        """A commit tells how old the chunks are that it names first, or they could be collected."""
        now = self.chunks.clock.elapsed_ns()
        for chunk_id in named - v.named:
            age = now - self.chunks.stamps.get(chunk_id, now)
            if chunk_id in self.chunks.stamps and not age - ON_THE_WAY <= -oldest != 0:
                raise AssertionError(
                    f"chunk {chunk_id.hex()[:16]} is {age} ns old, and its commit says {-oldest}"
                )
        v.named |= named

    async def _watch(self, v: FakeVolume, sid: int, have: int, wait: float) -> Any:
        if sid in v.sessions:
            await self._admit(v, sid)
            if v.seq <= have and wait > 0 and not self._untold(v, sid):
                with trio.move_on_after(wait):
                    await v.news.wait()
                await self._admit(v, sid)
        if sid not in v.sessions:
            raise Fenced(f"session {sid:x} is over")
        if v.holder == sid:
            v.told = v.delegation
        reset = None
        if have < v.covered:
            reset = (v.covered, v.root)
            have = v.covered
        return v.seq, v.after(have), reset, 1, v.delegation

    @staticmethod
    def _untold(v: FakeVolume, sid: int) -> bool:
        """Whether this session has the delegation, and no watch told it yet to return it."""
        return v.holder == sid and v.wanted_at is not None and v.told != v.delegation

    async def _sync(self, v: FakeVolume) -> Any:
        await self._admit(v, -1)
        return v.seq, 1

    async def _close(self, v: FakeVolume, sid: int) -> Any:
        v.close(sid)
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
            if method == "node.status":
                return self.home.status(int(to.rsplit(":", 1)[1])), b""
            result = unpack(pack(await self.home.handle(method, unpack(pack(args)))))
            self._maybe_break(to, self.lose_answer)
            return result, b""
        raise DeadlineExceeded(f"{to} did not answer {method} within {timeout} s")

    def _maybe_break(self, to: str, probability: float) -> None:
        if int(to.rsplit(":", 1)[1]) in self.down or self.random.random() < probability:
            raise Unreachable(f"{to} is down")

    def request(
        self,
        to: str,
        method: str,
        args: tuple[Any, ...] = (),
        data: Buffers = b"",
        *,
        timeout: float,
        on_reply: Callable[[tuple[Any, Buffer] | DfsError], None],
        priority: int = Priority.NORMAL,
        epoch: int = 0,
    ) -> None:
        """See `dfs.env.Rpc.request`."""

        async def ask() -> None:
            try:
                answer: tuple[Any, Buffer] | DfsError = await self.call(
                    to, method, args, data, timeout=timeout, priority=priority, epoch=epoch
                )
            except DfsError as e:
                answer = e
            on_reply(answer)

        trio.lowlevel.spawn_system_task(ask)

    def cast(self, *_args: Any, **_kw: Any) -> None:
        """Not used by clients' sessions."""
        raise NotImplementedError

    def later(self, _fn: Callable[[], None]) -> bool:
        """A client handles no messages."""
        return False


class FakeChunkStore:
    """All chunks of the fake cluster, with knobs to make it fail."""

    def __init__(self) -> None:
        """No chunks."""
        self.stored: dict[bytes, bytes] = {}
        self.durable: set[bytes] = set()
        self.clock: Clock = SystemClock()
        self.stamps: dict[bytes, int] = {}  # chunk id -> when it was last put or touched
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
        self.store.stamps[chunk_id] = self.store.clock.elapsed_ns()
        self.store.puts += 1
        self._mine.add(chunk_id)
        self._prepared.pop(chunk_id, None)
        if durable:
            self.store.durable.add(chunk_id)

    async def sync(self) -> None:
        """Make what this client put durable."""
        await trio.sleep(self.store.delay)
        self._check(writing=True)
        self.store.durable |= self._mine
        self._mine.clear()

    def read_nowait(self, chunk_id: bytes, offset: int, length: int) -> Buffer | None:
        """Only what is not sent yet."""
        prepared = self._prepared.get(chunk_id)
        return None if prepared is None else bytes(prepared.read(offset, length))

    async def touch(self, chunk_ids: Sequence[bytes]) -> list[bool]:
        """Whether each chunk is held durably."""
        await trio.sleep(self.store.delay)
        held = [c in self.store.durable for c in chunk_ids]
        self.store.stamps.update(
            (c, self.store.clock.elapsed_ns())
            for c, yes in zip(chunk_ids, held, strict=True)
            if yes
        )
        return held

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
