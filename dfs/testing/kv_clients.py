"""Clients of the register simulation: they read, write with what they saw, resend, and remember."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    NoQuorum,
    NotHome,
    StaleEpoch,
    TooManySiblings,
    Unreachable,
)
from dfs.testing.kv_oracle import Floor, Seen, ViolationError, Write
from metadata import versions
from metadata.quorum import majority

if TYPE_CHECKING:
    from dfs.testing.kv_cores import World

STRICT = (None, "quorum", "all", "each-zone")
EXPECTED = (
    Busy,
    DeadlineExceeded,
    DiskFull,
    NoQuorum,
    NotHome,
    StaleEpoch,
    TooManySiblings,
    Unreachable,
)


@dataclass(slots=True)
class Operation:
    """A get (no `write`), put or delete of one client."""

    row: bytes
    options: dict[str, Any]
    write: Write | None
    context: bytes | None
    patience: float
    floor: Floor
    strict: bool
    tries: int = 0
    tried: dict[int, None] = field(default_factory=dict)
    last: bool = False

    def quotas(self, m: ClusterMap, me: int) -> list[tuple[tuple[int, ...], int, int]]:
        """(members, copies, copies on homes) that coordinator `me` needs, derived apart."""
        level = self.options.get("level")
        w, pw = m.params.w, m.params.pw
        if level is not None:
            w = {"one": 1, "all": m.n}.get(level, majority(m.n))
            pw = 0 if level == "one" else w
        w = self.options.get("w", w)
        pw = min(w, self.options.get("pw", pw))
        zones = {node.number: node.zone for node in m.nodes}
        found = []
        for row in m.write_sets(METADATA, int.from_bytes(self.row[1:3], "big")):
            near = {zones[n] for n in row}
            if level == "local-quorum" and zones[me] in near:
                near = {zones[me]}
            elif level != "each-zone":
                found.append((row, w, pw))
                continue
            for zone in sorted(near):
                members = tuple(n for n in row if zones[n] == zone)
                found.append((members, majority(len(members)), majority(len(members))))
        return found


class Client:
    """One session: an operation at a time."""

    def __init__(self, world: "World", number: int) -> None:
        """Nothing asked yet."""
        self.world = world
        self.number = number
        self.count = 0
        self.current: tuple[Any, Operation] | None = None
        self.contexts: dict[bytes, tuple[bytes, Seen]] = {}
        self.stopped = False
        self.paused = False
        self.read_back = 0

    def begin(self) -> None:
        """Ask something soon."""
        if not self.stopped and not self.paused:
            pace = self.world.random.choice((0.1, 0.5, 2.0))
            self.world.scheduler.after(self.world.random.random() * pace, self._next)

    def stop(self) -> None:
        """Nothing new."""
        self.stopped = True

    def pause(self) -> None:
        """Nothing new for a while."""
        self.paused = True

    def resume(self) -> None:
        """Go on."""
        if self.paused:
            self.paused = False
            self.begin()

    def _next(self) -> None:
        if self.stopped or self.paused or self.current is not None:
            return
        world, random, theme = self.world, self.world.random, self.world.theme
        row = random.choice(world.rows)
        options: dict[str, Any] = {}
        if random.random() < theme.weak:
            x = random.random()
            if x < 0.7:
                options["level"] = random.choice(
                    ("one", "quorum", "all", "local-quorum", "each-zone", "quorum")
                )
            elif x < 0.9:
                options |= {"pw": 0, "pr": 0}
            else:
                options["eventual"] = True
        strict = options.get("level") in STRICT and not options.keys() & {"pw", "pr", "eventual"}
        patience = random.choice((0.05, 0.5, 1.0) if theme.impatient else (1.0, 4.0, 10.0))
        oracle = world.oracle
        write: Write | None = None
        context: bytes | None = b""
        kind = random.random()
        if kind < 0.55:
            value: bytes | None = b"%d.%d" % (self.number, self.count)
            if random.random() < theme.deletes:
                value = None
            saw: Seen | None = (0, 0)
            if row in self.contexts and random.random() < 0.75:
                context, saw = self.contexts[row]
            elif random.random() < 0.5:
                context, saw = None, None
            write = oracle.write(row, value, saw)
            if saw is None and not strict:
                write.must = 0
            options["request"] = b"%08d%08d" % (self.number, self.count)
            world.writes[options["request"]] = write
        self._submit(Operation(row, options, write, context, patience, oracle.floor(row), strict))

    def _submit(self, operation: Operation) -> None:
        token = (self.number, self.count)
        self.count += 1
        self.world.operations[token] = operation
        self.current = token, operation
        self._send()

    def delete(self, row: bytes) -> None:
        """Delete whatever a quorum shows."""
        write = self.world.oracle.write(row, None, None)
        request = b"%08d%08d" % (self.number, self.count)
        options = {"level": "quorum", "request": request}
        self.world.writes[request] = write
        floor = self.world.oracle.floor(row)
        self._submit(Operation(row, options, write, None, 4.0, floor, True))

    def last_read(self, row: bytes) -> None:
        """A quorum read at the end, whatever else is going on here."""
        floor = self.world.oracle.floor(row)
        operation = Operation(row, {"level": "quorum"}, None, b"", 10.0, floor, True, last=True)
        token = (self.number, self.count)
        self.count += 1
        self.world.operations[token] = operation
        m = self.world.chain.at(self.world.committed)
        home = m.read_homes(METADATA, int.from_bytes(row[1:3], "big"))[0]
        operation.tried[home] = None
        self.world.network.send(-1 - self.number, home, ("kv", (token, 1), operation, m.epoch))

    def _send(self, to: int | None = None) -> None:
        assert self.current is not None  # the callers know
        token, operation = self.current
        world, random = self.world, self.world.random
        operation.tries += 1
        m = world.chain.at(random.randint(1, world.committed))
        if world.calm or random.random() >= world.theme.old_maps:
            m = world.chain.at(world.committed)
        homes = m.read_homes(METADATA, int.from_bytes(operation.row[1:3], "big"))
        if to is None:
            to = random.choice(homes if random.random() < 0.9 else list(world.nodes))
            behind = [n for n in world.laggards if n in homes]
            if behind and random.random() < 0.5:
                to = random.choice(behind)
            if operation.tried and random.random() < 0.6:
                to = next(iter(operation.tried))
        operation.tried[to] = None
        attempt = (token, operation.tries)
        world.network.send(-1 - self.number, to, ("kv", attempt, operation, m.epoch))
        tries = operation.tries
        world.scheduler.after(operation.patience + 0.5, lambda: self._timeout(token, tries))

    def _timeout(self, token: Any, tries: int) -> None:
        if self.current is None or self.current[0] != token:
            return
        operation = self.current[1]
        if operation.tries == tries:
            self._again(operation)

    def _again(self, operation: Operation, to: int | None = None) -> None:
        if operation.tries < 4 and self.world.random.random() < 0.8:
            self._send(to)
        else:
            self.world.failed += 1
            self._over()

    def _over(self) -> None:
        self.current = None
        self.begin()

    def answered(self, _source: int, message: Any) -> None:
        """An answer, maybe to something long forgotten."""
        token, result = message[0][0], message[1]
        operation = self.world.operations[token]
        if not operation.last and (self.current is None or self.current[0] != token):
            return
        if isinstance(result, DfsError):
            if not isinstance(result, EXPECTED):
                raise ViolationError(f"answers: {result!r}") from result
            if operation.last:
                raise ViolationError(f"liveness: a read without faults fails: {result!r}")
            if isinstance(result, NotHome) and result.details:
                homes = [n for n in result.details if isinstance(n, int)]
                if homes:
                    self._again(operation, self.world.random.choice(homes))
                    return
            self._again(operation)
            return
        self.world.ended += 1
        oracle = self.world.oracle
        if operation.write is not None:
            oracle.acked(operation.write, strict=operation.strict)
            if operation.strict:
                self.world.check_quorums(operation.row)
            self._over()
            return
        values, context, _ = result
        vector = versions.decode_context(context)
        if operation.strict:
            past = oracle.read(operation.row, values, vector, operation.floor)
            self.world.check_quorums(operation.row)
        else:
            past = oracle.returned(operation.row, values, vector)
        if operation.last:
            self.read_back += 1
            return
        self.contexts[operation.row] = (context, past)
        self._over()
