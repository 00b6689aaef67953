"""Membership under faults: the crashed are found, the living are left alone, views converge.

Each seed makes a cluster of 5 to 50 members and plays four acts of those below, one after the
other; after each the faults end and all views must agree with the truth within a bounded time.
Throughout, a member that was declared dead may only come back with a higher boot or incarnation.
"""

from collections.abc import Callable, Iterable
from random import Random

from dfs.cluster.swim import ACK, NACK, Message
from dfs.cluster.swimeffects import Changed
from dfs.cluster.swimsuspicion import LONGEST, shortest
from dfs.testing.gossip import Process, Sim, address_of, key_of
from dfs.testing.gossip_mutants import MUTANTS, core_class

__all__ = ["ACTS", "MUTANTS", "NAME", "World", "play", "run"]

NAME = "gossip"
SIZES = (5, 6, 8, 12, 20, 50)
ACTS_PER_SEED = 4
QUIET_RATE = 2.6  # messages per member and second with nothing to tell: PING, ACK, some SYNC


class World:
    """A cluster, the truth about it, and what was seen to be wrong."""

    def __init__(self, seed: int, mutant: str | None = None, size: int = 0) -> None:
        """All members run and know each other from the map."""
        self.random = random = Random(seed)
        self.violations: list[str] = []
        self.sim = Sim(random.getrandbits(32), core=core_class(mutant), on_change=self._changed)
        self.size = size or random.choice(SIZES)
        self.expected: dict[int, str] = {}  # number -> status that all should see
        self.excused: set[int] | None = set()  # whose death is no error; None = anybody's
        self.may_suspect: set[int] | None = set()
        self._fell: dict[tuple[int, int], tuple[int, int]] = {}  # (process, key): boot, incarnation
        self.deaths = self.suspicions = 0
        for number in range(self.size):
            self.start(number, range(self.size))
        self.settle(20.0, "a cold start")

    # ----------------------------------------------------------------------------------- truth

    def start(self, number: int, seeds: Iterable[int]) -> Process:
        """Start a member; from now on all should see it alive."""
        self.expected[number] = "alive"
        return self.sim.start(number, seeds)

    def crash(self, number: int) -> None:
        """Crash a member; from now on all should see it dead."""
        self.expected[number] = "dead"
        self.sim.crash(self.process(number))

    def process(self, number: int) -> Process:
        """The running process of a member."""
        return self.sim.listening[address_of(number)]

    def some(self, count: int) -> list[int]:
        """Different members that run."""
        return self.random.sample(self.living(), count)

    def living(self) -> list[int]:
        """All members that run."""
        return [number for number, status in self.expected.items() if status == "alive"]

    def detection(self) -> float:
        """Seconds within which everybody knows of a crash: a full round, the longest suspicion."""
        n = len(self.expected)
        return min(n, 12) + 3.0 + shortest(n) * LONGEST + 5.0

    def _changed(self, sim: Sim, process: Process, change: Changed) -> None:
        member = change.member
        stamp = (member.boot, member.incarnation)
        place = (id(process), member.key)
        if change.new == "dead":
            self.deaths += 1
            if self.excused is not None and member.number not in self.excused:
                self.fail(f"{process.number} declares {member.number} dead without a cause")
        if change.new == "suspect":
            self.suspicions += 1
            if self.may_suspect is not None and member.number not in self.may_suspect:
                self.fail(f"{process.number} suspects {member.number} without a cause")
        fell = self._fell.get(place)
        if change.new in ("dead", "left"):
            self._fell[place] = max(stamp, fell or stamp)
        elif fell is not None and stamp <= fell:
            self.fail(f"{process.number} brings {member.number} back at {stamp}, dead at {fell}")

    def fail(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(f"{self.sim.now:.2f} s, {self.size} members: {text}")

    # ---------------------------------------------------------------------------------- checks

    def wrong(self) -> list[str]:
        """Where views differ from the truth."""
        found = []
        for process in self.sim.processes():
            for number, expected in self.expected.items():
                if number != process.number:
                    snapshot = process.core.snapshot(key_of(number))
                    status = "nobody" if snapshot is None else snapshot.status
                    if status != expected:
                        found.append(
                            f"{process.number} sees {number} {status} instead of {expected}"
                        )
        return found

    def settle(self, bound: float, after: str) -> None:
        """Wait until all views are right."""
        end = self.sim.now + bound
        wrong = self.wrong()
        while wrong and self.sim.now < end:
            self.sim.run_until(self.sim.now + 0.5)
            wrong = self.wrong()
        if wrong:
            self.fail(f"{bound:g} s after {after} {len(wrong)} views are wrong: {wrong[0]}")

    def calm(self) -> None:
        """No faults any more; nobody may be accused of anything."""
        sim = self.sim
        sim.loss = sim.duplicate = 0.0
        sim.delay = (0.0005, 0.003)
        sim.cut.clear()
        sim.slow.clear()
        sim.run_until(sim.now + 12.0)  # what was under way ends
        self.excused, self.may_suspect = set(), set()

    def pass_time(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.sim.run_until(self.sim.now + seconds)


# -------------------------------------------------------------------------------------------- acts


def crash(world: World) -> None:
    """Some crash, are found, and come back by a seed, with their next boot."""
    victims = world.some(world.random.randint(1, max(1, len(world.living()) // 4)))
    world.excused = world.may_suspect = set(victims)
    for number in victims:
        world.crash(number)
        world.pass_time(world.random.random())
    world.settle(world.detection(), "a crash")
    for number in victims:
        world.start(number, world.some(1))
    world.settle(8.0, "a restart")


def replay(world: World) -> None:
    """Old messages arrive again after their sender died, and after it came back."""
    sim, random = world.sim, world.random
    (victim,) = world.some(1)
    old: list[Message] = []
    sim.record = old
    world.pass_time(5.0)
    sim.record = None
    world.excused = world.may_suspect = {victim}
    key = key_of(victim)
    world.crash(victim)
    world.settle(world.detection(), "a crash")
    for again in (False, True):
        if again:
            world.start(victim, world.some(1))
            world.settle(8.0, "a restart")
        for message in random.sample(old, min(len(old), 200)):
            target = world.process(random.choice(world.living()))
            if message[1] not in (ACK, NACK) and target.core.me.key != key:
                sim.deliver(target, message)
        world.pass_time(1.0)
        world.settle(5.0, "old messages")


def pause(world: World) -> None:
    """Some sleep for too long: others find them dead, and alive again when they wake."""
    sleepers = world.some(world.random.randint(1, 2))
    world.excused = world.may_suspect = set(sleepers)
    for number in sleepers:
        world.sim.pause(world.process(number))
        world.expected[number] = "dead"
    world.pass_time(world.detection())
    asleep = set(sleepers)
    bad = [text for text in world.wrong() if int(text.split()[0]) not in asleep]
    if bad:
        world.fail(f"a sleeper was not found: {bad[0]}")
    for number in sleepers:
        world.expected[number] = "alive"
        world.sim.resume(world.process(number))
    world.settle(15.0 if len(sleepers) == 1 else 40.0, "a long pause")


def nap(world: World) -> None:
    """Some sleep for two seconds: nobody dies of that, and they blame nobody else."""
    sleepers = world.some(world.random.randint(1, 2))
    world.may_suspect = set(sleepers)
    for _ in range(6):
        for number in sleepers:
            world.sim.pause(world.process(number))
        world.pass_time(2.0)
        for number in sleepers:
            world.sim.resume(world.process(number))
        world.pass_time(1.0 + world.random.random() * 4)
    world.settle(20.0, "naps")


def link(world: World) -> None:
    """One link is cut, both ways or one way: the others vouch for both ends."""
    a, b = world.some(2)
    world.sim.cut.add((a, b))
    if world.random.random() < 0.5:
        world.sim.cut.add((b, a))
    world.pass_time(60.0)
    world.settle(0.0, "a minute with one link cut")


def halves(world: World) -> None:
    """Two halves lose each other and meet again without help."""
    living = world.living()
    world.random.shuffle(living)
    at = world.random.randint(max(1, len(living) // 4), len(living) // 2)
    one, other = living[:at], living[at:]
    world.excused = world.may_suspect = None
    both = world.random.random() < 0.7
    for a in one:
        for b in other:
            world.sim.cut.add((a, b))
            if both:
                world.sim.cut.add((b, a))
    # who misses many answers takes itself for slow and probes every 9 s
    world.pass_time(world.detection() + 20.0 + 9.0 * len(other) / at)
    if both:
        for number in other:
            status = world.process(one[0]).core.status(key_of(number))
            if status != "dead":
                world.fail(f"{one[0]} sees {number} {status} across a partition")
    world.sim.cut.clear()
    world.settle(60.0, "the halves could meet")


def weather(world: World) -> None:
    """Loss, duplicates and reordering; up to 10 % of loss nobody is declared dead for it."""
    sim, random = world.sim, world.random
    sim.loss = random.choice((0.05, 0.1, 0.3))
    sim.duplicate = random.choice((0.0, 0.1))
    sim.delay = random.choice(((0.0005, 0.003), (0.001, 0.2)))
    world.may_suspect = None
    (victim,) = world.some(1)
    if sim.loss > 0.1:
        world.excused = None
    else:
        world.excused = {victim}
    world.pass_time(60.0)
    world.crash(victim)
    world.pass_time(world.detection() + 20.0)
    for process in world.sim.processes():
        status = process.core.status(key_of(victim))
        if status != "dead":
            world.fail(f"{process.number} sees the crashed {victim} {status} after loss")
    world.calm()
    world.may_suspect = {victim}
    world.excused = {victim}
    world.settle(60.0, "the weather")
    world.start(victim, world.some(1))
    world.settle(8.0, "a restart")


def come_and_go(world: World) -> None:
    """A new member joins by one seed, another says good-bye and returns."""
    newcomer = len(world.expected)
    world.start(newcomer, world.some(1))
    world.settle(8.0, "a join")
    (leaver,) = world.some(1)
    world.expected[leaver] = "left"
    world.sim.leave(world.process(leaver))
    world.settle(8.0, "a good-bye")
    world.pass_time(20.0)
    world.start(leaver, world.some(1))
    world.settle(8.0, "a return")


def usurper(world: World) -> None:
    """A second process with one identity: a later one replaces the first, a twin is found out."""
    sim = world.sim
    (number,) = world.some(1)
    first = world.process(number)
    twin = world.random.random() < 0.5
    world.excused = world.may_suspect = {number}
    elsewhere = f"tcp://10.99.{number}.1:7401"
    boot = first.core.me.boot if twin else 0
    second = sim.start(number, world.living(), address=elsewhere, boot=boot)
    world.pass_time(30.0)
    left = [p for p in (first, second) if p.running]
    if len(left) > 1 or (not twin and left != [second]):
        world.fail(f"two processes are member {number}; running: {[p.address for p in left]}")
    for process in left:
        sim.crash(process)
    world.expected[number] = "dead"
    world.settle(world.detection(), "the end of both")
    world.start(number, world.some(1))
    world.settle(8.0, "a restart")


def slow(world: World) -> None:
    """One member is slow: it finds out that it is the slow one, and stops accusing others."""
    (number,) = world.some(1)
    world.sim.slow[number] = 0.6
    world.excused = world.may_suspect = None
    core = world.process(number).core
    world.pass_time(20.0)
    before = core.counts["failed"]
    world.pass_time(40.0)
    failed = core.counts["failed"] - before
    if failed > 12:
        world.fail(f"slow {number} found fault with others {failed} times in 40 s")
    world.calm()
    world.may_suspect = world.excused = None
    world.settle(60.0, "a slow member")


def quiet(world: World) -> None:
    """With nothing to tell there are only probes."""
    world.pass_time(20.0)
    before = sum(p.sent for p in world.sim.processes())
    world.pass_time(20.0)
    count = len(world.living())
    rate = (sum(p.sent for p in world.sim.processes()) - before) / 20.0 / count
    if rate > QUIET_RATE:
        world.fail(f"{rate:.1f} messages per member and second with nothing to tell")


def newmap(world: World) -> None:
    """One member gets a newer map: all others hear of it from a member that has it."""
    sim = world.sim
    (number,) = world.some(1)
    sim.infos[number] = sim.info._replace(epoch=sim.info.epoch + 1, digest=b"\1" * 32)
    world.process(number).core.refresh(sim.infos[number], sim.now)
    sim.other_maps.clear()
    world.pass_time(3.0 * len(world.living()))
    told = {who for who, _ in sim.other_maps}
    missing = [x for x in world.living() if x != number and x not in told]
    if missing:
        world.fail(f"{missing} never heard of the map of {number}")
    sim.info = sim.infos.pop(number)
    for process in sim.processes():
        process.core.refresh(sim.info, sim.now)
    world.pass_time(1.0)


ACTS: dict[str, Callable[[World], None]] = {
    "crash": crash,
    "replay": replay,
    "pause": pause,
    "nap": nap,
    "link": link,
    "halves": halves,
    "weather": weather,
    "come_and_go": come_and_go,
    "usurper": usurper,
    "slow": slow,
    "quiet": quiet,
    "newmap": newmap,
}


def play(seed: int, *, mutant: str | None = None, acts: Iterable[str] = (), size: int = 0) -> World:
    """Play a seed; the world tells what was wrong."""
    world = World(seed, mutant, size)
    for name in acts or world.random.sample(sorted(ACTS), ACTS_PER_SEED):
        if world.violations:
            break
        ACTS[name](world)
        world.calm()
        world.settle(20.0, name)
    return world


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of one seed; empty is good."""
    return play(seed, mutant=mutant).violations[:5]
