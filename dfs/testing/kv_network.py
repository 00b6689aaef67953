"""Events in virtual time, and messages that are late, lost, doubled, cut off or held back.

The scheduler of simulations without tasks: a heap of (time, order, function), everything random
from one source.  A node that is stopped (SIGSTOP, a paused machine) neither runs nor loses
anything: what it was sent, and what it had just sent, goes on when it continues.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any

Event = Callable[[], None]
LIMIT = 60_000  # events of a schedule


@dataclass(slots=True)
class Weather:
    """How bad the network of a schedule is."""

    drop: float = 0.0
    duplicate: float = 0.0
    late: float = 0.0  # share of messages that take seconds
    base: float = 0.001  # seconds that a message usually takes, at most
    latest: float = 5.0

    @classmethod
    def random(cls, random: Random) -> "Weather":
        """The weather of a schedule."""
        return cls(
            drop=random.choice((0.0, 0.01, 0.05, 0.2)),
            duplicate=random.choice((0.0, 0.02, 0.1)),
            late=random.choice((0.0, 0.02, 0.15)),
            base=random.choice((0.001, 0.005, 0.1)),
            latest=random.choice((2.0, 8.0, 50.0)),
        )


class Scheduler:
    """Virtual time and what happens in it."""

    def __init__(self, random: Random) -> None:
        """At time 0, with nothing to do."""
        self.random = random
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._order = 0

    def after(self, delay: float, event: Event) -> None:
        """Run `event` in `delay` seconds."""
        self._order += 1
        heappush(self._heap, (self.now + delay, self._order, event))

    def run(self, until: float, limit: int) -> bool:
        """Run what is due by `until`; False if `limit` events did not suffice."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            due, _, event = heappop(heap)
            self.now = max(self.now, due)
            event()
            self.events += 1
            if self.events > limit:
                return False
        self.now = max(self.now, until)
        return True

    def jump(self, seconds: float) -> None:
        """Let time pass for everybody; what was due meanwhile happens right afterwards."""
        self.now += seconds


class Network:
    """Carries messages between numbered nodes; clients have negative numbers."""

    def __init__(
        self, scheduler: Scheduler, weather: Weather, deliver: Callable[[int, int, Any], None]
    ) -> None:
        """`deliver(source, target, message)` is called when one arrives."""
        self.scheduler = scheduler
        self.weather = weather
        self.sent = self.lost = 0
        self._deliver = deliver
        self._cut: set[tuple[int, int]] = set()
        self._stopped: dict[int, list[tuple[int, int, Any]]] = {}
        self.calm = False

    def send(self, source: int, target: int, message: Any) -> None:
        """Send; it may never arrive, or twice, or after those sent later."""
        self.sent += 1
        scheduler, weather = self.scheduler, self.weather
        random = scheduler.random
        if source == target:
            scheduler.after(0.0, lambda: self._arrive(source, target, message))
            return
        if self.calm:
            delay = random.random() * 0.002
            scheduler.after(delay, lambda: self._arrive(source, target, message))
            return
        if (source, target) in self._cut or random.random() < weather.drop:
            self.lost += 1
            return
        copies = 2 if random.random() < weather.duplicate else 1
        for _ in range(copies):
            delay = random.random() * weather.base
            if random.random() < weather.late:
                delay = random.random() ** 2 * weather.latest
            scheduler.after(delay, lambda: self._arrive(source, target, message))

    def _arrive(self, source: int, target: int, message: Any) -> None:
        held = self._stopped.get(target)
        if held is None:
            self._deliver(source, target, message)
        else:
            held.append((source, target, message))

    # -------------------------------------------------------------------------------- partitions

    def cut(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Messages from the first to the second of each pair are lost from now on."""
        self._cut.update(pairs)

    def heal(self) -> None:
        """All links work again."""
        self._cut.clear()

    def stopped(self, node: int) -> bool:
        """Whether the node is stopped."""
        return node in self._stopped

    def stop(self, node: int) -> None:
        """The node does nothing until it is continued."""
        self._stopped.setdefault(node, [])

    def carry_on(self, node: int) -> None:
        """What the node was sent meanwhile arrives now, one after the other."""
        for source, target, message in self._stopped.pop(node, ()):
            self.scheduler.after(0.0, lambda m=(source, target, message): self._deliver(*m))  # type: ignore[misc]  # mypy: defaults of lambdas

    def forget(self, node: int) -> None:
        """The node died while it was stopped: what it was sent is gone."""
        if node in self._stopped:
            self._stopped[node] = []
