"""Hints: registers kept for a home that could not be reached, until it can (Dynamo's handoff).

Hints make a home current again quickly; they are no guarantee.  Anti-entropy is, so whatever is
over a limit is dropped and the target is marked *dirty*: it gets no more hints until anti-entropy
with it, which then comes first, has finished.  The limits:

- age: 3 h after the first undelivered hint of a target all its hints go.  Sender and receiver check
  the age of each one too, by the time of the write it carries: a hint that outlived the purge of
  its tombstone would bring a deleted key back;
- 1 GiB for each target, and a twentieth of the disk in all.

In the store a hint is the row `h` target:u16 written:u64 number:u32 -> format:u8 and a codec tuple
(written, row key, register); `written` is wall time in microseconds.  `H` length:u16 row target
written number finds it by its row.  The row `nhints` target:u16 -> (format, first, bytes, count,
dirty since) goes with every change, so that nothing is scanned at the start.

Sans-IO: see `metadata.steps`.  Blobs have no hints: they never change, W homes acknowledge a put,
and anti-entropy brings what is missing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dfs import codec
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import Busy, Corrupt, InvalidArgument, NotHome, RemoteProtocolError, StaleEpoch
from metadata.antientropy import members
from metadata.exchange import BATCH_BYTES, BATCH_ITEMS
from metadata.merkle import REGISTERS, Op, Table, partition_of_row
from metadata.steps import Call, Merge, Rest, Steps, Write

TTL = 3 * 3600_000_000  # us
TARGET_BYTES = 1 << 30
DISK_SHARE = 20  # a twentieth of the disk for all hints together
PREFIX = b"h"
INDEX = b"H"
STATE = b"nhints"
_FORMAT = 1
OVERHEAD = 64  # bytes of a hint besides row and register


@dataclass(slots=True)
class Target:
    """What is kept for one node."""

    first: int = 0  # us: when the oldest undelivered one was written; 0 = there is none
    bytes: int = 0
    count: int = 0
    dirty: int = 0  # us: since when anti-entropy has to do it; 0 = hints may
    stored: int = 0  # since the start of this process, as the next two
    delivered: int = 0
    dropped: int = 0


@dataclass(slots=True)
class Hint:
    """One hint as it was read."""

    key: bytes
    written: int
    row: bytes
    register: bytes


def encode(written: int, row: bytes, register: bytes) -> bytes:
    """The value of a hint's row."""
    return bytes([_FORMAT]) + codec.pack((written, row, register))


def decode(key: bytes, value: bytes) -> Hint:
    """Raises `Corrupt` when it is no hint of ours."""
    if value[:1] != bytes([_FORMAT]):
        raise Corrupt(f"hint {key.hex()} has format {value[:1].hex()}: upgrade dfs or drop hints")
    try:
        written, row, register = codec.unpack(memoryview(value)[1:])
    except (ValueError, TypeError, RemoteProtocolError) as e:
        raise Corrupt(f"hint {key.hex()} is damaged: {e}") from e
    return Hint(key, written, row, register)


def _index(key: bytes, row: bytes) -> bytes:
    """Finds hints by row: `H` length:u16 row, and what identifies the hint."""
    return INDEX + len(row).to_bytes(2, "big") + row + key[len(PREFIX) :]


class Hints:
    """The hints a node keeps for others, and its side of taking those kept for it.

    `budget` gives the bytes that all hints together may take now.  Operations that methods return
    go to the store at once, in order.
    """

    ttl = TTL
    target_bytes = TARGET_BYTES

    def __init__(
        self,
        me: int,
        get_map: Callable[[], ClusterMap],
        view: Table,
        budget: Callable[[], int],
    ) -> None:
        """Read the state of every target from `view`."""
        self.me = me
        self.get_map = get_map
        self._view = view
        self._budget = budget
        self._number = 0
        self.refused = 0  # hints for us that were too old
        self.targets: dict[int, Target] = {}
        for key, value in view.scan(STATE, b"", 1 << 14):
            form, first, size, count, dirty = codec.unpack(value)
            if form != _FORMAT:
                raise Corrupt(f"the state of hints has format {form}: upgrade dfs")
            self.targets[int.from_bytes(key[-2:], "big")] = Target(first, size, count, dirty)

    def size(self) -> int:
        """Bytes of all hints."""
        return sum(t.bytes for t in self.targets.values())

    # -- keeping

    def add(self, row: bytes, register: bytes, target: int, written: int, now: int) -> list[Op]:
        """Operations that keep a hint; raises `Busy` when limits forbid it.

        The caller counts the copy for W only if this did not raise and the operations are durable.
        """
        state = self.targets.setdefault(target, Target())
        size = len(row) + len(register) + OVERHEAD
        reason = self._reason(state, size, written, now)
        if reason:
            state.dropped += 1
            raise Busy(f"no hint for node {target} is kept here: {reason}")
        self._number = (self._number + 1) & 0xFFFFFFFF
        key = PREFIX + target.to_bytes(2, "big") + max(0, written).to_bytes(8, "big")
        key += self._number.to_bytes(4, "big")
        while self._view.get(key) is not None:  # numbers begin anew with each process
            self._number = (self._number + 1) & 0xFFFFFFFF
            key = key[:-4] + self._number.to_bytes(4, "big")
        state.first = min(state.first or written, written)
        state.bytes += size
        state.count += 1
        state.stored += 1
        return [(key, encode(written, row, register)), (_index(key, row), b""), self._state(target)]

    def find(self, row: bytes) -> list[bytes]:
        """Registers kept for others under this row, for reads that fallbacks answer.

        A home of the row has merged them itself, and finds none.
        """
        if not any(t.count for t in self.targets.values()):
            return []
        if self.me in members(self.get_map(), partition_of_row(REGISTERS, row)):
            return []
        prefix = _index(b"", row)
        keys = [PREFIX + key[len(prefix) :] for key, _ in self._view.scan(prefix, b"", 1000)]
        found = [(key, self._view.get(key)) for key in keys]
        return [decode(key, value).register for key, value in found if value is not None]

    def _reason(self, state: Target, size: int, written: int, now: int) -> str:
        """Why another hint must not be kept; "" = it may."""
        if state.dirty:
            return "there were too many or too old ones; anti-entropy will do it"
        if now - written > self.ttl:
            return f"the write is {(now - written) // 1_000_000} s old"
        if state.first and now - state.first > self.ttl:
            over = f"the first one waits for over {self.ttl // 1_000_000} s"
        elif state.bytes + size > self.target_bytes:
            over = f"they take {state.bytes} bytes already"
        elif self.size() + size > self._budget():
            over = "all hints together have reached their share of the disk"
        else:
            return ""
        state.dirty = now
        return over

    def _state(self, target: int) -> Op:
        t = self.targets[target]
        key = STATE + target.to_bytes(2, "big")
        if not t.count:
            t.first = t.bytes = 0
        if not t.count and not t.dirty:
            return key, None
        return key, codec.pack((_FORMAT, t.first, t.bytes, t.count, t.dirty))

    # -- delivering

    def waiting(self) -> list[int]:
        """Targets with hints; ascending."""
        return sorted(n for n, t in self.targets.items() if t.count)

    def dirty(self) -> list[int]:
        """Targets that anti-entropy has to visit first; ascending."""
        return sorted(n for n, t in self.targets.items() if t.dirty)

    def cleaned(self, target: int, since: int) -> list[Op]:
        """A complete exchange with `target` that began at `since` (us) is done."""
        state = self.targets.get(target)
        if state is None or not state.dirty or state.dirty > since:
            return []
        state.dirty = 0
        return [self._state(target)]

    def mark_dirty(self, target: int, now: int) -> list[Op]:
        """Let anti-entropy visit `target` first; no hints until then."""
        state = self.targets.setdefault(target, Target())
        state.dirty = state.dirty or now
        return [self._state(target)]

    def deliver(self, target: int, now: int) -> Steps[int]:
        """Hand the hints of a target over, oldest first; returns how many it took.

        Hints for a partition of which the target is no home any more go to all its present homes.
        Raises what calls raise; what was acknowledged until then is gone.
        """
        done = 0
        while batch := self._batch(target):
            state = self.targets[target]
            fresh = [h for h in batch if now - h.written <= self.ttl]
            yield from self._hand_over(target, fresh)
            done += len(fresh)
            state.delivered += len(fresh)
            yield from self._forget(target, batch)
            if len(fresh) < len(batch):
                state.dropped += len(batch) - len(fresh)
                yield Write(self.mark_dirty(target, now))
            yield Rest(sum(len(h.row) + len(h.register) for h in batch), state.bytes)
        state = self.targets.get(target, Target())
        if state.count:  # the counts were those before a crash or damage
            state.count = 0
            yield Write([self._state(target)])
        return done

    def _hand_over(self, target: int, hints: Sequence[Hint]) -> Steps[None]:
        cluster = self.get_map()
        by_home: dict[int, list[tuple[bytes, bytes, int]]] = {}
        for hint in hints:
            homes = members(cluster, partition_of_row(REGISTERS, hint.row))
            for home in (target,) if target in homes else homes:
                item = hint.row, hint.register, hint.written
                by_home.setdefault(home, []).append(item)
        for home, items in by_home.items():
            if home == self.me:
                yield Merge(REGISTERS, [(row, register) for row, register, _ in items])
            else:
                yield Call(home, "hints.deliver", (tuple(items),), cluster.epoch)

    def _batch(self, target: int) -> list[Hint]:
        prefix = PREFIX + target.to_bytes(2, "big")
        found: list[Hint] = []
        size = 0
        for key, value in self._view.scan(prefix, b"", BATCH_ITEMS):
            size += len(value)
            if found and size > BATCH_BYTES:
                break
            found.append(decode(key, value))
        return found

    def _forget(self, target: int, hints: Iterable[Hint]) -> Steps[None]:
        state = self.targets[target]
        ops: list[Op] = []
        for hint in hints:
            ops += ((hint.key, None), (_index(hint.key, hint.row), None))
            state.count = max(0, state.count - 1)
            size = len(hint.row) + len(hint.register) + OVERHEAD
            state.bytes = max(0, state.bytes - size)
            state.first = max(state.first, hint.written)
        ops.append(self._state(target))
        yield Write(ops)

    def expire(self, now: int) -> Steps[int]:
        """Drop everything kept for targets whose first hint is too old; returns how many."""
        dropped = 0
        for target, state in sorted(self.targets.items()):
            if state.count and now - state.first > self.ttl:
                dropped += yield from self.drop(target, now)
        return dropped

    def drop(self, target: int, now: int) -> Steps[int]:
        """Drop everything kept for a target, and leave it to anti-entropy; returns how many."""
        yield Write(self.mark_dirty(target, now))
        dropped = 0
        prefix = PREFIX + target.to_bytes(2, "big")
        while rows := self._view.scan(prefix, b"", 1000):
            state = self.targets[target]
            dropped += len(rows)
            state.dropped += len(rows)
            state.count = max(0, state.count - len(rows))
            size = sum(OVERHEAD + len(value) for _, value in rows)
            state.bytes = max(0, state.bytes - size)
            ops: list[Op] = [(key, None) for key, _ in rows]
            ops += [(_index(key, decode(key, value).row), None) for key, value in rows]
            yield Write([*ops, self._state(target)])
        self.targets[target].count = 0
        yield Write([self._state(target)])
        return dropped

    # -- taking

    def handle(
        self, sender: int, epoch: int, items: Sequence[tuple[Any, ...]], now: int
    ) -> Steps[tuple[Any, ...]]:
        """Answer `hints.deliver`: merge what is not too old.  Returns (taken, refused)."""
        cluster = self.get_map()
        taken = []
        for row, register, written in items:
            if now - written > self.ttl:
                self.refused += 1
                continue
            try:
                partition = partition_of_row(REGISTERS, row)
            except ValueError as e:
                raise InvalidArgument(str(e)) from None
            if epoch < cluster.last_change(METADATA, partition):
                raise StaleEpoch(
                    f"node {sender} has hints of epoch {epoch} for partition {partition}, whose "
                    f"homes changed in {cluster.last_change(METADATA, partition)}",
                    cluster.encode(),
                )
            if self.me not in members(cluster, partition):
                raise NotHome(f"node {self.me} is no home of partition {partition}")
            taken.append((row, register))
        yield Merge(REGISTERS, taken)
        return (len(taken), len(items) - len(taken))

    # -- what operators see

    def status(self, now: int) -> list[dict[str, Any]]:
        """For each target: node, count, bytes, age (s), dirty, stored, delivered, dropped."""
        return [
            {
                "node": number,
                "count": t.count,
                "bytes": t.bytes,
                "age": max(0, now - t.first) / 1e6 if t.count else 0.0,
                "dirty": bool(t.dirty),
                "stored": t.stored,
                "delivered": t.delivered,
                "dropped": t.dropped,
            }
            for number, t in sorted(self.targets.items())
        ]
