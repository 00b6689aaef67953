"""Many `Membership` cores in one process: a heap of events, virtual time, a network with faults.

No tasks, no trio: a thousand members run ten times slower than real time on one core.  Equal seeds
give equal runs.  Faults are attributes that may be changed at any moment: `loss`, `duplicate`,
`delay` (messages overtake each other when it varies), `cut` (directed), and the methods `crash`,
`pause`, `resume`.
"""

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from random import Random
from typing import Any

from dfs.cluster.membership import Membership
from dfs.cluster.swim import Message, member_key
from dfs.cluster.swimeffects import Changed, Info, OtherMap, Send, Usurped
from dfs.codec import pack, unpack
from dfs.wire.frame import HEADER_SIZE

OnChange = Callable[["Sim", "Process", Changed], None]
_METADATA = "metadata"


def key_of(number: int) -> int:
    """The key of simulated node `number`."""
    return member_key(number, _METADATA)


def seed_of(number: int) -> tuple[int, bytes, str]:
    """Node `number` as the cluster map names it."""
    return key_of(number), number.to_bytes(16, "big"), address_of(number)


def address_of(number: int) -> str:
    """Where node `number` listens."""
    return f"tcp://10.{number >> 8}.{number & 255}.1:7401"


class Process:
    """One run of one member."""

    __slots__ = ("address", "core", "due", "inbox", "number", "paused", "running", "sent", "size")

    def __init__(self, number: int, address: str, core: Membership) -> None:
        """Running."""
        self.number = number
        self.address = address
        self.core = core
        self.due = 0.0  # of its earliest event in the heap
        self.running = True
        self.paused = False
        self.inbox: list[Any] = []  # what came while it was paused
        self.sent = 0  # messages
        self.size = 0  # bytes, with the frame's header


class Sim:
    """The world of a simulation."""

    def __init__(
        self,
        seed: int,
        *,
        core: type[Membership] = Membership,
        strict: bool = True,
        on_change: OnChange | None = None,
    ) -> None:
        """Empty; `strict` sends every message through the codec."""
        self.random = Random(seed)
        self.now = 0.0
        self.loss = 0.0
        self.duplicate = 0.0
        self.delay = (0.0005, 0.003)
        self.cut: set[tuple[int, int]] = set()  # only asked for membership, never iterated
        self.slow: dict[int, float] = {}  # by number: seconds more for what it sends or receives
        self.source = -1  # whose message is being handled; -1 = none
        self.info = Info(1, bytes(32), 1 << 40, 1 << 39, 0.5)
        self.infos: dict[int, Info] = {}  # by number, where it is not `info`
        self.listening: dict[str, Process] = {}
        self.boots: dict[int, int] = {}
        self.other_maps: list[tuple[int, OtherMap]] = []
        self.usurped: list[Process] = []
        self.record: list[Message] | None = None  # give it a list to keep what is sent
        self.delivered = 0
        self._core = core
        self._strict = strict
        self._on_change = on_change
        self._heap: list[tuple[float, int, Process, Any, int]] = []
        self._serial = 0

    # --------------------------------------------------------------------------------- members

    def start(
        self, number: int, seeds: Iterable[int], *, address: str = "", boot: int = 0
    ) -> Process:
        """Start a process that knows the nodes `seeds`; its boot is one more than ever before."""
        boot = boot or self.boots.get(number, 0) + 1
        self.boots[number] = max(boot, self.boots.get(number, 0))
        address = address or address_of(number)
        random = Random(self.random.random())
        core = self._core(number, _METADATA, number.to_bytes(16, "big"), address, boot, random)
        process = Process(number, address, core)
        self.listening[address] = process
        core.start(self.now)
        self._do(process, core.configure([seed_of(x) for x in seeds], (), self.now))
        self._turn(process)
        return process

    def crash(self, process: Process) -> None:
        """End a process without a word."""
        process.running = False
        if self.listening.get(process.address) is process:
            del self.listening[process.address]

    def leave(self, process: Process) -> None:
        """End a process that says good-bye."""
        self._do(process, process.core.leave())
        self.crash(process)

    def pause(self, process: Process) -> None:
        """As SIGSTOP: what is sent to it waits."""
        process.paused = True

    def resume(self, process: Process) -> None:
        """As SIGCONT: messages that waited come first, or its timers, by chance."""
        process.paused = False
        if not process.running:
            return
        inbox, process.inbox = process.inbox, []
        if self.random.random() < 0.5:
            self._tick(process)
        for message in inbox:
            if process.running:
                self._receive(process, message)
        self._turn(process)

    def processes(self) -> list[Process]:
        """Those that run, by number."""
        found = [p for p in self.listening.values() if p.running]
        return sorted(found, key=lambda p: (p.number, p.address))

    def deliver(self, process: Process, message: Message) -> None:
        """A message arrives now, whoever sent it whenever."""
        if process.running and not process.paused:
            self._do(process, process.core.handle(message, self.now))
            self._turn(process)

    # ------------------------------------------------------------------------------------ time

    def run_until(self, end: float) -> None:
        """Let events happen until a virtual time."""
        heap = self._heap
        while heap and heap[0][0] <= end:
            when, _, process, message, source = heappop(heap)
            self.now = when
            if message is None:
                if process.running and when == process.due:
                    process.due = float("inf")
                    if not process.paused:
                        self._turn(process)
            else:
                self._arrive(process, message, source)
        self.now = end

    def at(self, when: float, process: Process, message: Any, source: int) -> None:
        """An event in the heap."""
        self._serial += 1
        heappush(self._heap, (when, self._serial, process, message, source))

    def _tick(self, process: Process) -> None:
        core, now = process.core, self.now
        if now >= core.refresh_at:
            core.refresh(self.infos.get(process.number, self.info), now)
        self._do(process, core.tick(now))

    def _turn(self, process: Process) -> None:
        """Do what is due, and come back when something is."""
        core, now = process.core, self.now
        if not process.running:
            return
        due = min(core.next_deadline(), core.refresh_at)
        if due <= now:
            self._tick(process)
            due = min(core.next_deadline(), core.refresh_at)
        due = max(due, now + 1e-6)
        if due < process.due or process.due <= now:
            process.due = due
            self.at(due, process, None, 0)

    def _arrive(self, process: Process, message: Any, source: int) -> None:
        if not process.running or (source, process.number) in self.cut:
            return
        if process.paused:
            process.inbox.append(message)
            return
        self.delivered += 1
        self.source = source
        self._receive(process, message)
        self.source = -1
        self._turn(process)

    def _receive(self, process: Process, message: Any) -> None:
        if self._strict:
            message = unpack(message)
        self._do(process, process.core.handle(message, self.now))

    def _do(self, process: Process, effects: list[Any]) -> None:
        for effect in effects:
            if type(effect) is Send:
                self._send(process, effect)
            elif type(effect) is Changed:
                if self._on_change is not None:
                    self._on_change(self, process, effect)
            elif type(effect) is Usurped:
                self.usurped.append(process)
                self.crash(process)
            else:
                self.other_maps.append((process.number, effect))

    def _send(self, process: Process, effect: Send) -> None:
        packed = pack(("swim", effect.message))
        if self.record is not None:
            self.record.append(effect.message)
        process.sent += 1
        process.size += HEADER_SIZE + len(packed)
        target = self.listening.get(effect.address)
        if target is None or (process.number, target.number) in self.cut:
            return
        random = self.random.random
        copies = 1 if random() >= self.duplicate else 2
        low, high = self.delay
        if self.slow:
            low += self.slow.get(process.number, 0.0) + self.slow.get(target.number, 0.0)
            high += low - self.delay[0]
        message = pack(effect.message) if self._strict else effect.message
        for _ in range(copies):
            if random() >= self.loss:
                self.at(self.now + low + (high - low) * random(), target, message, process.number)


def everywhere(sim: Sim, number: int) -> dict[str, int]:
    """What the running processes other than `number` hold it for: status -> how many."""
    found: dict[str, int] = {}
    key = key_of(number)
    for process in sim.processes():
        if process.number != number:
            status = process.core.status(key)
            found[status] = found.get(status, 0) + 1
    return found
