"""Boot numbers: what keeps a restored or doubled data directory from speaking for its node.

A node that lost what it promised must never vote again under its number.  A lost disk is noticed,
as there is no marker; a directory that was restored from a copy, or is used by two processes, looks
healthy.  So each start takes the next *boot number*, durably, with a random nonce, and tells the
other metadata nodes, who remember the highest one of each node id, durably.  The node serves
nothing but that until a majority of the metadata nodes (itself included) has noted it.  A number
that somebody has seen already, with another nonce, was used by a later life of the directory.

While it runs, a node takes a new number every ten minutes: a copy is younger than that or it is
noticed.  What remains is a copy made in the last minutes of the node's life.

Chunkservers have their numbers remembered here too, with other consequences: see
`chunkserver.boot`.

On disk: the file `life`, (format, number, nonce) as a `dfs.codec` tuple; at others the row
`n` `boot/` node id, the same; for a chunkserver `n` `boot/` node id `/chunk`.
"""

import logging
from typing import Any

import trio

from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap, Node
from dfs.codec import pack, unpack
from dfs.env import Context, Env, Handler, Priority, Reply
from dfs.errors import Busy, ConfigError, Corrupt, DfsError, InvalidArgument
from dfs.rpc.mapkeeper import MapKeeper, settled, stale
from metadata.store.engine import Store

log = logging.getLogger(__name__)

FILE = "life"
ROW = b"nboot/"
FORMAT = 1
NONCE = 16  # bytes
ASK = 2.0  # seconds a node may take to note a number
AGAIN = 0.5  # seconds between rounds of telling
TELL = 10.0  # seconds between log lines while waiting, and between questions while running
ASK_AGAIN = 3  # nodes that are asked every `TELL` whether they know of another process
BUMP = 600.0  # seconds between numbers while running
WAIT = 10.0  # seconds a request waits for the node to be admitted

Seen = tuple[int, bytes]  # number, nonce


def banned(current: ClusterMap, node_id: bytes) -> bool:
    """Whether the node was removed from the cluster: its id is refused for ever."""
    return any(i == node_id for _, i in current.banned)


class Boot:
    """The boot number of this node, and those it has seen of others."""

    def __init__(self, env: Env, number: int, node: Node, keeper: MapKeeper, store: Store) -> None:
        """`node` is this node's entry of the map.  Nothing is written before `begin`."""
        self._env = env
        self._number = number
        self._node = node
        self._keeper = keeper
        self._store = store
        self._noting = trio.Lock()
        self._usurped = trio.Event()
        self._why = ""
        self._real: dict[str, Handler] = {}
        self.boot = 0
        self.nonce = b""
        self.noted: set[int] = set()  # other metadata nodes that have noted the present number
        self.admitted = trio.Event()  # set by whoever starts the rest of the node

    # ------------------------------------------------------------------------------------- own

    def begin(self) -> None:
        """Take the next number, durably.  Raises `Corrupt` when the last one is unreadable."""
        disk = self._env.disk
        last = 0
        if disk.exists(FILE):
            file = disk.open(FILE)
            try:
                last, _ = _decode(file.pread(file.size(), 0), "the file `life`")
            finally:
                file.close()
        self.nonce = self._env.random.randbytes(NONCE)
        self._take(last + 1)

    def _take(self, boot: int) -> None:
        self._env.disk.write_atomic(FILE, pack((FORMAT, boot, self.nonce)))
        self.boot = boot
        self.noted = set()

    def rule_needed(self, metadata_nodes: int) -> int:
        """How many metadata nodes, this one included, must have noted the number."""
        return metadata_nodes // 2 + 1

    def rule_later(self, seen: Seen) -> bool:
        """Whether what somebody has seen was written by a later life than this one."""
        return seen[0] >= self.boot and seen[1] != self.nonce

    def rule_outdated(self, theirs: int, here: int) -> bool:
        """Whether a node counts the majority of a map that is not the newest one any more."""
        return 0 < theirs < here

    async def check(self) -> None:
        """Tell the others until enough of them have noted the number.

        Raises `ConfigError` when this directory must not be used.
        """
        told_at = float("-inf")
        while True:
            current = self._keeper()
            others = self._others(current)
            needed = self.rule_needed(len(others) + 1)
            failures = {} if needed == 1 else await self._tell_all(current, others)
            if self._keeper() is not current:
                continue  # an old majority may be of nodes that know nothing
            noted = [n for n in others if n in self.noted]
            if len(noted) + 1 >= needed:
                return
            now = self._env.clock.monotonic()
            if now > told_at + TELL:
                told_at = now
                why = "; ".join(f"{current.node(n).name}: {e}" for n, e in failures.items())
                log.warning(
                    "not serving yet: %d of %d metadata nodes must know that this node starts "
                    "(so that a restored copy of it cannot), %d do. %s",
                    needed,
                    len(others) + 1,
                    len(noted) + 1,
                    why,
                )
            await trio.sleep(AGAIN * self._env.random.uniform(0.5, 1.5))

    def _others(self, current: ClusterMap) -> list[int]:
        return [
            x.number
            for x in current.nodes
            if x.metadata_addr and x.node_id != self._node.node_id and x.number != self._number
        ]

    async def _tell_all(self, current: ClusterMap, others: list[int]) -> dict[int, DfsError]:
        """Tell those who have not noted the number; what they failed with."""
        failures: dict[int, DfsError] = {}
        refusals: list[ConfigError] = []

        async def tell(number: int) -> None:
            args = (self._number, self._node.node_id, self.boot, self.nonce)
            try:
                (boot, nonce), _ = await self._env.rpc.call(
                    current.address(METADATA, number),
                    "node.boot",
                    args,
                    timeout=ASK,
                    priority=Priority.HIGH,
                    epoch=current.epoch,
                )
            except ConfigError as e:
                refusals.append(e)
            except DfsError as e:
                self._keeper.learn(e)
                failures[number] = e
            else:
                if self.rule_later((boot, nonce)):
                    refusals.append(ConfigError(self._words(current.node(number).name, boot)))
                elif nonce == self.nonce:
                    self.noted.add(number)

        async with trio.open_nursery() as nursery:
            for number in others:
                if number not in self.noted:
                    nursery.start_soon(tell, number)
        if refusals:
            raise refusals[0]
        return failures

    def _words(self, witness: str, boot: int) -> str:
        return (
            f"node {self._node.name} must not run on {self._env.disk.path()}: {witness} has seen "
            f"its boot number {boot}, and here it is only {self.boot}. Either this directory is "
            "an older copy, which has forgotten what the node promised since, or another process "
            "runs as the same node. Stop the copy; if the newer directory is lost, replace the "
            "node: `dfs cluster node replace`"
        )

    def on_usurped(self, why: str) -> None:
        """Somebody knows of a later life of this node: stop, and say why."""
        if not self._usurped.is_set():
            self._why = why
            self._usurped.set()

    async def run(self) -> None:
        """Keep the number fresh and known, until cancelled.  Raises `ConfigError` to stop."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            taken = self._env.clock.monotonic()
            while True:
                with trio.move_on_after(TELL):  # new members are told at once
                    await self._keeper.wait_for(self._keeper().epoch + 1)
                if self._env.clock.monotonic() > taken + BUMP:
                    taken = self._env.clock.monotonic()
                    self._take(self.boot + 1)
                current = self._keeper()
                others = self._others(current)
                # whoever copied this directory has told the others: ask some of them
                self.noted -= set(self._env.random.sample(others, min(ASK_AGAIN, len(others))))
                await self._tell_all(current, others)

    async def _watch(self) -> None:
        await self._usurped.wait()
        raise ConfigError(self._why)

    # ---------------------------------------------------------------------------------- others

    def handlers(self) -> dict[str, Handler]:
        """`node.boot`; see `dfs.wire.messages`."""
        return {"node.boot": self._on_boot}

    async def _on_boot(self, ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        number, node_id, boot, nonce, role = (*args, METADATA)[:5]
        if (
            type(number) is not int
            or type(boot) is not int
            or type(node_id) is not bytes
            or type(nonce) is not bytes
            or role not in ROLES
        ):
            raise InvalidArgument("node.boot takes (number, node id, boot number, nonce, role)")
        current = self._keeper()
        if banned(current, node_id):
            raise ConfigError(
                f"node {number} (id {node_id.hex()}) was removed from the cluster: its data "
                "directory cannot come back. Format an empty one and add it as a new node"
            )
        if role == METADATA and self.rule_outdated(ctx.epoch, current.epoch):
            raise stale(current, ctx.epoch, current.epoch)
        if node_id == self._node.node_id and role == METADATA:
            seen: Seen = (self.boot, self.nonce)  # somebody runs as this very node
            if boot > self.boot and nonce != self.nonce:
                self.on_usurped(self._words("a process that just asked it", boot))
            return seen, b""
        async with self._noting:
            key = ROW + node_id + (b"/chunk" if role == CHUNK else b"")
            stored = self._store.get(key)
            seen = (0, b"") if stored is None else _decode(stored, f"row {key!r}")
            if boot > seen[0]:
                seen = (boot, nonce)
                await self._store.batch([(key, pack((FORMAT, *seen)))])
            else:
                await self._store.sync()
        return seen, b""

    # ------------------------------------------------------------------------------------ gate

    def gate(self, handlers: dict[str, Handler]) -> dict[str, Handler]:
        """Stand-ins for handlers that wait until this node is `admitted`."""
        self._real = handlers
        return {name: self._gated(name) for name in handlers}

    def _gated(self, name: str) -> Handler:
        async def wait(ctx: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
            patience = min(WAIT, ctx.deadline - self._env.clock.monotonic())
            with trio.move_on_after(patience):
                await self.admitted.wait()
            if not self.admitted.is_set():
                raise Busy(
                    f"node {self._node.name} is starting and waits for a majority of the "
                    "metadata nodes; are they up?"
                )
            return await settled(self._real[name](ctx, args, data))

        return wait


def _decode(data: bytes, what: str) -> Seen:
    try:
        version, *rest = unpack(data)
        if version == FORMAT:
            boot, nonce = rest
            if type(boot) is not int or type(nonce) is not bytes:
                raise ValueError("fields of other types")  # noqa: TRY301 - judged below
            return boot, nonce
    except (DfsError, TypeError, ValueError) as e:
        raise Corrupt(f"{what} is unreadable: {e}") from e
    raise Corrupt(
        f"{what} has format {version!r}, this program knows format {FORMAT}: a newer version of it "
        "has used this directory. Run that version"
    )
