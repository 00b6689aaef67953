"""What registers may and may not do, judged from every write of a schedule: the oracle.

Each write is a bit in integers used as sets.  A write *saw* what its context had: the writes whose
values a read returned, what those had seen, and so on; that is its causal past, independent of any
version vector.  From it follow

    covered     no register that leaves a node has seen a dot whose value it neither holds nor can
                show superseded: that is what makes a merge drop an acknowledged value
    unique      a dot names one write for ever, whatever crashed, was restored or came back
    kept        a value that a quorum of homes acknowledged is there, or was superseded by a write
                that saw it (with weaker levels, hints and homes that are lost may have had it)
    fresh       a read that began after a write was acknowledged, or another read answered, knows it
    dead        a value never comes back once a write that saw it was acknowledged, or a read was
                answered without it (a put that was resent to a second coordinator may: it is two
                writes then, which is why resends go to the same one first)

A dot counts from the moment it can be known elsewhere (*exposed*): one that a crash took with it
before it was sent or durable never was.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dfs.hashing import digest
from metadata import versions
from metadata.versions import Register, Vector

Seen = tuple[int, int]  # writes that may have been seen, and that certainly were


class ViolationError(AssertionError):
    """An invariant does not hold."""


@dataclass(slots=True)
class Write:
    """A put or delete of a client; resends are the same write."""

    number: int
    row: bytes
    value: bytes | None
    saw: int  # writes it may supersede
    must: int  # writes it certainly supersedes
    sure: int = 0  # what each of its dots saw, if it was resent to a second coordinator
    sees: bool = False  # it has no context: it supersedes what its coordinator reads
    dots: set[tuple[bytes, int]] = field(default_factory=set)
    acked: bool = False
    counted: bool = False  # its copies were, when it was first acknowledged
    strict: bool = False  # acknowledged by a quorum of homes that any strict read meets


@dataclass(slots=True)
class Dot:
    """One minted dot."""

    write: Write
    batch: tuple[int, int] = (-1, 0)  # node and number of the batch it was made in
    exposed: bool = False
    homes: set[int] = field(default_factory=set)  # nodes whose row has durably held it
    hints: set[int] = field(default_factory=set)  # nodes that have durably held it as a hint
    lost: set[int] = field(default_factory=set)  # nodes that held it before they were restored
    left: dict[int, int] = field(default_factory=dict)  # who let go of it -> by the map of an epoch


@dataclass(slots=True)
class History:
    """All that happened to one row."""

    dots: dict[tuple[bytes, int], Dot] = field(default_factory=dict)
    writes: dict[int, Write] = field(default_factory=dict)
    known: int = 0  # writes that every strict read from now on must know
    dead: int = 0  # writes that no strict read may return from now on
    purged: int = 0  # writes that all replicas agreed to forget
    doubled: int = 0  # writes that were resent to a second coordinator, and so happened twice


class Oracle:
    """See the module's docstring."""

    def __init__(self) -> None:
        """Nothing was written."""
        self.rows: dict[bytes, History] = {}
        self.values: dict[bytes, Write] = {}
        self._judged: dict[tuple[bytes, bytes], None] = {}  # in order
        self._count = 0
        self.decoded: dict[bytes, Register] = {}

    # ------------------------------------------------------------------------------- bookkeeping

    def history(self, row: bytes) -> History:
        """Of a row, made when it is first asked for."""
        found = self.rows.get(row)
        if found is None:
            found = self.rows[row] = History()
        return found

    def write(self, row: bytes, value: bytes | None, saw: "Seen | None") -> Write:
        """A client is about to write; `saw` None: whatever its coordinator sees."""
        history = self.history(row)
        number = self._count
        self._count += 1
        may, sure = saw or (0, 0)
        write = Write(number, row, value, may, sure, sure)
        if saw is None:
            write.sees = True
            write.must = history.known
        history.writes[number] = write
        if value is not None:
            self.values[value] = write
        return write

    def decode(self, data: bytes) -> Register:
        """A register, from a cache."""
        found = self.decoded.get(data)
        if found is None:
            found = self.decoded[data] = versions.decode(data)
        return found

    def minted(
        self, write: Write, actor: bytes, hlc: int, batch: tuple[int, int] = (-1, 0)
    ) -> None:
        """A replica made a dot for a write; it may still be lost without a trace."""
        history = self.history(write.row)
        known = history.dots.get((actor, hlc))
        if known is not None and known.exposed and known.write is not write:
            raise ViolationError(f"unique: the dot {actor.hex()}:{hlc} names two writes")
        history.dots[actor, hlc] = Dot(write, batch)
        if write.dots:
            history.doubled |= 1 << write.number
        write.dots.add((actor, hlc))

    def seen(self, write: Write, vector: Vector) -> None:
        """What the coordinator of a write without a context read for it."""
        history = self.history(write.row)
        seen = [d.write for d in self.seen_by(history, vector) if d.write is not write]
        may, sure = self.past(seen)
        write.saw |= may
        write.sure = write.sure & sure if write.dots else sure

    def seen_by(self, history: History, vector: Vector) -> list[Dot]:
        """The exposed dots that a vector covers."""
        newest = dict(vector)
        return [
            d
            for (actor, hlc), d in history.dots.items()
            if hlc <= newest.get(actor, 0) and d.exposed
        ]

    def past(self, writes: Iterable[Write]) -> "Seen":
        """The bits of writes and of everything that they may have seen, and certainly saw."""
        may = sure = 0
        for w in writes:
            may |= 1 << w.number | w.saw
            sure |= 1 << w.number | w.sure
        return may, sure

    # ------------------------------------------------------------------------------------ checks

    def exposed(self, row: bytes, data: bytes) -> None:
        """A register leaves a node, or is durable there: it must not hide anything."""
        if not data or (row, data) in self._judged:
            return
        self._judged[row, data] = None
        history = self.history(row)
        register = self.decode(data)
        here = {(a, h) for a, h, _ in register[1]}
        newest = dict(register[0])
        covered = []
        for name, dot in history.dots.items():
            if name[1] <= newest.get(name[0], 0):
                if name in here or newest.get(name[0]) == name[1]:
                    self._expose(history, dot)
                covered.append((name, dot))
        superseded = history.purged
        for _, dot in covered:
            superseded |= dot.write.saw
        for name, dot in covered:
            bit = 1 << dot.write.number
            gone = dot.exposed and name not in here and not superseded & bit
            # a resend that read what the first attempt wrote replaces it
            if gone and dot.write.value is not None and not dot.write.dots & here:
                raise ViolationError(
                    f"covered: a register has seen write {dot.write.number} of {row!r} and "
                    "lost its value"
                )
        for actor, hlc, value in register[1]:
            dot_here = history.dots.get((actor, hlc))
            if dot_here is None or dot_here.write.value != value:
                raise ViolationError(f"unique: {row!r} holds a value nobody wrote under that dot")

    def _expose(self, history: History, dot: Dot) -> None:
        """A dot is out, and with it those of its batch: they are durable together or not at all."""
        if dot.exposed:
            return
        dot.exposed = True
        if dot.batch[0] >= 0:
            for other in history.dots.values():
                if other.batch == dot.batch:
                    other.exposed = True

    def durable(self, row: bytes, data: bytes, node: int, *, hint: bool) -> None:
        """A node has a register on disk."""
        self.exposed(row, data)
        history = self.rows.get(row)
        if history is None:
            return
        newest = dict(self.decode(data)[0])
        for (actor, hlc), dot in history.dots.items():
            if hlc <= newest.get(actor, 0):
                (dot.hints if hint else dot.homes).add(node)

    def dropped(self, row: bytes, node: int, epoch: int) -> None:
        """A node has a row no more, durably; it judged by the map of that epoch."""
        for dot in self.history(row).dots.values():
            if node in dot.homes:
                dot.homes.discard(node)
                dot.left[node] = epoch

    def missed(self, row: bytes, nodes: Sequence[int], quorum: int) -> int:
        """The writes that an answer of some `quorum` of these nodes would not know, and should."""
        history = self.rows.get(row)
        if history is None or len(nodes) < quorum:
            return 0
        bits = 0
        for number in _numbers(history.known & ~history.purged):
            dots = [history.dots[name] for name in history.writes[number].dots]
            if sum(not any(n in d.homes for d in dots) for n in nodes) >= quorum:
                bits |= 1 << number
        return bits

    def alone(self, row: bytes, node: int) -> bool:
        """Whether some write is at no other home: it may be acknowledged yet, and hints expire."""
        history = self.rows.get(row)
        if history is None:
            return False
        return any(dot.homes == {node} for dot in history.dots.values())

    def risen(self, row: bytes, data: bytes) -> int:
        """The values in a register that were purged, and so are back."""
        history = self.rows.get(row)
        if history is None or not history.purged:
            return 0
        live = sum(1 << history.dots[a, h].write.number for a, h, _ in self.decode(data)[1])
        return live & history.purged & ~history.doubled

    def purge(self, row: bytes, data: bytes | None, name: bytes) -> None:
        """A replica forgets a tombstone of that digest; `data` is what its disk has of the row."""
        if data is None or digest(data) != name:  # it came in the same batch
            data = next(d for d in self.decoded if digest(d) == name)
        history = self.history(row)
        register = self.decode(data)
        if register[1]:
            raise ViolationError(f"purge: {row!r} still has values and was purged")
        history.purged |= self.past(d.write for d in self.seen_by(history, register[0]))[0]

    def returned(self, row: bytes, values: Iterable[bytes], vector: Vector) -> "Seen":
        """The causal past of what a read returned; checks that the values are of the row."""
        history = self.history(row)
        writes = []
        for value in values:
            write = self.values.get(value)
            if write is None or write.row != row:
                raise ViolationError(f"{row!r} returned a value that nobody wrote to it")
            writes.append(write)
        writes += [d.write for d in self.seen_by(history, vector) if d.write.value is None]
        return self.past(writes)

    def read(self, row: bytes, values: Iterable[bytes], vector: Vector, began: "Floor") -> "Seen":
        """A strict read ended: nothing it should know is missing, nothing dead is back."""
        values = tuple(values)
        history = self.history(row)
        may, past = self.returned(row, values, vector)
        missing = began.known & ~may & ~history.purged
        if missing:
            raise ViolationError(f"fresh: a read of {row!r} missed writes {_numbers(missing)}")
        live = sum(1 << self.values[v].number for v in set(values))
        back = live & began.dead & ~history.doubled
        if back:
            raise ViolationError(f"dead: {row!r} shows writes {_numbers(back)} again")
        history.known |= past
        history.dead |= past & ~live
        return may, past

    def acked(self, write: Write, *, strict: bool) -> None:
        """A client knows that its write happened."""
        write.acked = True
        history = self.history(write.row)
        if strict:
            write.strict = True
            history.known |= 1 << write.number | write.sure
            history.dead |= write.sure
            if write.must & ~write.saw & ~history.purged:
                raise ViolationError(
                    f"fresh: write {write.number} was to supersede what is there, and missed "
                    f"{_numbers(write.must & ~write.saw)}"
                )

    def floor(self, row: bytes) -> "Floor":
        """What a read that begins now has to know."""
        history = self.history(row)
        return Floor(history.known, history.dead)

    def seen_registers(self, row: bytes, count: int) -> list[bytes]:
        """Some registers that the row had on its way, the latest ones."""
        return [data for name, data in self._judged if name == row][-count:]

    def final(self, row: bytes, register: Register) -> None:
        """The replicas agree on a register at the end: no acknowledged value is missing."""
        history = self.history(row)
        here = {(a, h) for a, h, _ in register[1]}
        superseded = 0
        for name, dot in history.dots.items():
            if dot.exposed and versions.covers(register[0], *name):
                superseded |= dot.write.saw
        superseded |= history.purged
        for write in history.writes.values():
            bit = 1 << write.number
            owed = write.strict and write.value is not None and not superseded & bit
            if owed and not write.dots & here:
                raise ViolationError(f"kept: the acknowledged write {write.number} is lost")
        live = {self.values[v].number for _, _, v in register[1]}
        back = [n for n in sorted(live) if history.dead & ~history.doubled & 1 << n]
        if back:
            raise ViolationError(f"dead: {row!r} ends with writes {back} back")


@dataclass(frozen=True, slots=True)
class Floor:
    """What was known and dead when a read began."""

    known: int
    dead: int


def _numbers(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]
