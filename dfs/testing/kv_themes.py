"""What a schedule of registers dwells on: each seed has some kinds of trouble, and much of them.

A schedule in which everything happens a little reaches few states that need three rare things in
one order.  Switching features off at random makes the others common (swarm testing: Groce et al.,
ISSTA 2012).
"""

from dataclasses import dataclass, field
from random import Random

FAULTS = {
    "cut": 6.0, "links": 3.0, "crash": 4.0, "start": 9.0, "stop": 2.0, "continue": 6.0,
    "full": 1.5, "skew": 1.5, "restore": 2.0, "age": 1.0, "nothing": 14.0,
}  # fmt: skip


@dataclass(slots=True)
class Theme:
    """The choices of a seed."""

    moves: float = 0.0  # probability of a change of homes per step; 0 = never
    news: float = 0.2  # probability that a node hears of the newest map in a step
    purges: bool = False  # days pass, tombstones go
    restores: bool = False  # old states of disks come back
    late: bool = False  # pushes and hints come hours late, again
    old_maps: float = 0.3  # share of requests by clients with an old map
    laggards: int = 0  # nodes that hear of maps by requests only
    withheld: bool = False  # hints wait for long
    impatient: bool = False  # callers give up while their disk is slow
    deletes: float = 0.25
    weak: float = 0.4  # share of operations with levels and options
    rows: str = "several"  # "one", "bucket" (two of one bucket) or "several"
    steps: int = 25
    faults: dict[str, float] = field(default_factory=dict)

    @classmethod
    def random(cls, random: Random) -> "Theme":
        """Choose."""
        theme = cls()
        if random.random() < 0.65:
            theme.moves = random.choice((0.1, 0.4, 1.0))
            theme.news = random.choice((0.05, 0.1, 0.3, 0.6))
            theme.laggards = random.choice((0, 1, 1, 2))
            theme.old_maps = random.choice((0.1, 0.5, 0.9))
        theme.purges = random.random() < 0.3
        theme.restores = random.random() < 0.3
        theme.late = random.random() < 0.4
        theme.withheld = random.random() < 0.4
        theme.impatient = random.random() < 0.15
        theme.deletes = random.choice((0.1, 0.25, 0.6))
        theme.weak = random.choice((0.0, 0.2, 0.5))
        theme.rows = random.choice(("one", "bucket", "several", "several"))
        theme.steps = random.choice((12, 25, 45))
        theme.faults = {
            name: weight * random.choice((0.0, 0.3, 1.0, 1.0, 3.0))
            for name, weight in FAULTS.items()
        }
        theme.faults["nothing"] += 1.0
        if theme.restores:
            theme.faults["restore"] = FAULTS["restore"] * random.choice((1.0, 4.0))
        else:
            theme.faults["restore"] = 0.0
        for cause, cure in (("crash", "start"), ("stop", "continue")):
            theme.faults[cure] = max(theme.faults[cure], 1.5 * theme.faults[cause])
        return theme
